"""Figures 4 and 7: the mean length of responses by difficulty.

The paper claims that Caprese answers more briefly than the full model, by up to 8.5% of the tokens,
where GRIFFIN and CATS alone answer at greater length. A method that answers at length is not faster
(see table 3). The difficulty is MATH's level, or the number of steps of a solution.
The bundled model's answers have a fixed form, so their lengths hardly move.
"""

import statistics

import sample
from paper import common, report
from paper.experiment import Experiment

PAPER = {"mean response length against the full model's": [
    {"method": "Caprese", "length": "up to 8.5% shorter"},
    {"method": "GRIFFIN, CATS", "length": "longer"},
]}


def main(argv=None):
    """A row for each variant: its mean length in tokens over all problems and for each level."""
    args = common.arguments("paper.figure4_length", __doc__, argv)
    experiment = Experiment(args)
    name, problems = experiment.graded()
    levels = sorted({problem.level for problem in problems}, key=str)
    rows = []
    for variant in common.variants(args, ("griffin", "cats")):
        answers = experiment.answers(variant, name, problems)
        lengths = {level: [] for level in levels}
        for answer in answers:
            lengths[problems[answer["problem"]].level].append(answer["tokens"])
        mean = statistics.fmean(answer["tokens"] for answer in answers)
        full = rows[0]["tokens"] if rows else mean
        ended = 100 * statistics.fmean(answer["ended"] for answer in answers)
        rows.append({"method": variant.name, "set": name, "tokens": mean,
                     "against full": mean / full, "ended %": ended}
                    | {f"level {level}": statistics.fmean(lengths[level]) for level in levels})
    return report.show(args, rows, draw, PAPER, experiment)


def draw(figure, rows):
    """Length over the full model's against difficulty: a line for each variant."""
    axes = figure.subplots()
    levels = [key for key in rows[0] if key.startswith("level ")]
    for row, color in zip(rows, report.colors(rows).values()):
        points = [{"level": key.removeprefix("level "), "ratio": row[key] / rows[0][key]}
                  for key in levels]
        report.draw_line(axes, points, "level", "ratio", row["method"], color)
    axes.set(xlabel="difficulty", ylabel="mean response length over the full model's")


if __name__ == "__main__":
    sample.run_command(main)
