"""Figures 4 and 7: the mean length of responses by difficulty.

The paper claims that Caprese answers more briefly than the full model, by up to 8.5% of the tokens,
where GRIFFIN and CATS alone answer at greater length. A method that answers at length is not faster
(see time_to_right_answer). The difficulty is MATH's level, or the number of steps of a solution.
The bundled model's answers have a fixed form, so their lengths hardly move.
"""

import statistics

from paper import common

NEEDS = ("graded",)

PAPER = {"mean response length against the full model's": [
    {"method": "Caprese", "length": "up to 8.5% shorter"},
    {"method": "GRIFFIN, CATS", "length": "longer"},
]}


def measure(experiment):
    """A row for each variant: its mean length in tokens over all problems and for each level."""
    rows = []
    name, problems = experiment.graded()
    levels = sorted({problem.level for problem in problems}, key=str)
    for variant in experiment.variants(("griffin", "cats")):
        lengths = {level: [] for level in ["all", *levels]}
        for answer in experiment.answers(variant, name, problems):
            lengths["all"].append(answer["tokens"])
            lengths[problems[answer["problem"]].level].append(answer["tokens"])
        means = {f"level {level}": statistics.fmean(lengths[level]) for level in levels}
        mean = statistics.fmean(lengths["all"])
        full = rows[0]["tokens"] if rows else mean
        rows.append({"method": variant.name, "tokens": mean, "against full": mean / full} | means)
    return rows


def draw(figure, rows):
    """Length over the full model's against difficulty: a line for each variant."""
    axes = figure.subplots()
    levels = [key for key in rows[0] if key.startswith("level ")]
    for row in rows:
        points = []
        for key in levels:
            points.append({"level": key.removeprefix("level "), "ratio": row[key] / rows[0][key]})
        common.draw_line(axes, points, "level", "ratio", row["method"])
    axes.set(xlabel="difficulty", ylabel="mean response length over the full model's")


if __name__ == "__main__":
    common.main("figure4_length")
