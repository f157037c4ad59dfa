"""Table 3: accuracy and time against rho, the number of tokens between two reselections.

Every rho tokens the full model runs over the tokens since the last reselection, and GRIFFIN selects
its neurons anew (section 4.1.1). The paper claims that the smaller rho is, the nearer Caprese comes
to the full model; its 1.5B model, with answers of thousands of tokens, gains 24 points of AMC 23.
The bundled model's answers have some 45 tokens, so rho is smaller here; a --model takes those below
--max-new-tokens. Each answer is decoded alone in its batch, for its time.
"""

from dataclasses import replace

from paper import common
from paper.experiment import BOTH_STAGES
from paper.scores import summary

NEEDS = ("graded",)
QUICK = {"limit": 40, "batch_size": 1}
FULL = {"limit": 200, "batch_size": 1}
RHO = (1024, 256, 64, 32, 16)  # those below --max-new-tokens
BUNDLED_RHO = (32, 16, 8, 4)

PAPER = {"GRIFFIN + E2E on AMC 23, accuracy in percent": [
    {"model": "R1-Distill-Qwen 1.5B", "none": 34.38, "rho 1024": 41.87, "rho 256": 45.00,
     "rho 64": 58.75, "full": 60.83},
    {"model": "R1-Distill-Qwen 7B", "none": 71.88, "rho 1024": 69.25, "rho 256": 73.13,
     "rho 64": 73.75, "full": 75.00},
    {"model": "R1-Distill-Qwen 14B", "none": 84.38, "rho 1024": 88.13, "rho 256": 88.75,
     "rho 64": 91.88, "full": 90.63},
]}


def timing(answers):
    """Seconds of an answer, prefill and reselection included, and seconds to one that is right."""
    seconds = sum(answer["seconds"] for answer in answers)
    tokens = sum(answer["tokens"] for answer in answers)
    right = sum(answer["accuracy"] for answer in answers)
    return {"ms per token": 1e3 * seconds / tokens, "seconds": seconds / len(answers),
            "seconds to a right answer": seconds / right if right else None}


def measure(experiment):
    """A row for each variant and each rho."""
    rows = []
    name, problems = experiment.graded()
    rhos = BUNDLED_RHO
    if experiment.args.model:
        rhos = [rho for rho in RHO if rho < experiment.args.max_new_tokens]
    for variant in experiment.variants(("griffin",), stages=(BOTH_STAGES,)):
        for rho in (None,) if variant.name == "full" else (None, *rhos):
            reselected = variant
            if rho is not None:
                reselected = replace(variant, reselect=rho, name=f"{variant.name}, rho {rho}")
            answers = experiment.answers(reselected, name, problems)
            row = {"method": variant.name, "rho": rho}
            rows.append(row | summary(answers) | timing(answers))
    return rows


def draw(figure, rows):
    """Accuracy, and time to the next token, against rho: a line for each variant."""
    panels = figure.subplots(1, 2)
    for axes, column in zip(panels, ("accuracy %", "ms per token")):
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [row | {"rho": str(row["rho"] or "none")} for row in rows
                      if row["method"] == method]
            if method == "full":
                axes.axhline(chosen[0][column], color="black", linestyle="--", label="full")
            else:
                common.draw_line(axes, chosen, "rho", column, method)
        axes.set(xlabel="rho, tokens between reselections", ylabel=column)


if __name__ == "__main__":
    common.main("table3_reselection")
