"""Table 3: accuracy and time against rho, the number of tokens between two reselections.

Every rho tokens the full model runs over the tokens since the last reselection, and GRIFFIN selects
its neurons anew (section 4.1.1). The paper claims that the smaller rho is, the nearer Caprese comes
to the full model; its 1.5B model, with answers of thousands of tokens, gains 24 points of AMC 23.
The bundled model's answers have some 45 tokens, so rho is smaller here; a --model takes those below
--max-new-tokens.

Ours: the time to a right answer. The paper measures the time to the next token (table 5), the
length of answers (figure 4) and their accuracy (table 1) apart. Their product is what a user waits
for. So each answer is decoded alone here, and its seconds, prefill included, are kept.
"""

from dataclasses import replace

import sample
from paper import common, report
from paper.experiment import Experiment
from paper.scores import summary, timing

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


def main(argv=None):
    """A row for each variant and each rho; of the methods that do not reselect, one row."""
    args = common.arguments("paper.table3_reselection", __doc__, argv,
                            limit=(40, 200), batch_size=(1, 1))
    experiment = Experiment(args)
    name, problems = experiment.graded()
    rhos = BUNDLED_RHO
    if args.model:
        rhos = [rho for rho in RHO if rho < args.max_new_tokens]
    rows = []
    for variant in common.variants(args, ("griffin",), each_stage=False):
        for rho in (None,) if variant.name == "full" else (None, *rhos):
            answers = experiment.answers(replace(variant, reselect=rho), name, problems)
            row = {"method": variant.name, "set": name, "rho": rho} | summary(answers)
            columns = [[answer[key] for answer in answers]
                       for key in ("seconds", "tokens", "accuracy")]
            rows.append(row | timing(*columns))
    return report.show(args, rows, draw, PAPER, experiment)


def draw(figure, rows):
    """Accuracy, and both times, against rho: a line for each variant."""
    panels = figure.subplots(1, 3)
    for axes, column in zip(panels, ("accuracy %", "ms per token", "seconds to a right answer")):
        for method, color in report.colors(rows).items():
            chosen = [row | {"rho": str(row["rho"] or "none")} for row in rows
                      if row["method"] == method and row[column] is not None]
            if method == "full" and chosen:
                axes.axhline(chosen[0][column], color=color, linestyle="--", label="full")
            elif method != "full":
                report.draw_line(axes, chosen, "rho", column, method, color)
        axes.set(xlabel="rho", ylabel=column)


if __name__ == "__main__":
    sample.run_command(main)
