"""Ours: the time to a right answer. A method that answers longer, or wrongly, is not faster.

The paper measures the time to the next token (table 5), the length of answers (figure 4) and their
accuracy (table 1) apart. Their product is what a user waits for: the seconds of all answers, each
decoded alone in its batch, prefill included, over the number of right ones.
"""

from paper import common
from paper.experiment import BOTH_STAGES
from paper.scores import summary
from paper.table3_reselection import timing

NEEDS = ("graded",)
QUICK = {"limit": 40, "batch_size": 1}
FULL = {"limit": 200, "batch_size": 1}


def measure(experiment):
    """A row for each variant."""
    rows = []
    name, problems = experiment.graded()
    for variant in experiment.variants(("griffin", "cats"), stages=(BOTH_STAGES,)):
        answers = experiment.answers(variant, name, problems)
        rows.append({"method": variant.name} | summary(answers) | timing(answers))
    return rows


def draw(figure, rows):
    """Bars: the seconds of an answer beside the seconds to a right one."""
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, ("seconds", "seconds to a right answer")):
        common.draw_bars(axes, rows, column)
    panels[0].set_xlabel("seconds of an answer")


if __name__ == "__main__":
    common.main("time_to_right_answer")
