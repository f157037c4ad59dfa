"""Tables 1 and 4: what the sparse methods cost in maths and elsewhere, and how much comes back.

The paper claims that GRIFFIN and CATS keep language tasks intact and wreck maths, the more so the
longer an answer is; and that both stages of distillation bring much of it back, with the base
weights frozen and about 1% more parameters. End-to-end mostly wins over layer-wise, not always.
Its instruct models stay within noise on CoQA, QASPER, XSum and CNN/DM, by every method.
"""

import bench
import sample
from paper import common, report
from paper.experiment import Experiment

SETS = ("MATH-500", "AIME 24", "AMC 23", "BRUMO 25", "GPQA")
THINKING = {  # R1-Distill-Qwen, accuracy in percent
    "1.5B full": (79.40, 30.00, 60.83, 25.83, 18.69),
    "1.5B GRIFFIN": (42.00, 2.50, 16.88, 1.67, 11.62),
    "1.5B GRIFFIN + layer-wise": (47.20, 2.50, 28.13, 0.00, 13.13),
    "1.5B GRIFFIN + E2E": (60.40, 6.67, 34.38, 4.17, 16.67),
    "1.5B CATS": (72.00, 11.67, 37.50, 10.83, 11.62),
    "1.5B CATS + layer-wise": (73.80, 15.83, 48.13, 13.33, 16.67),
    "1.5B CATS + E2E": (74.80, 20.83, 47.50, 20.00, 22.22),
    "7B full": (90.20, 47.50, 75.00, 45.83, 38.38),
    "7B GRIFFIN": (80.60, 21.67, 62.50, 25.00, 21.72),
    "7B GRIFFIN + layer-wise": (84.80, 29.17, 64.38, 27.50, 27.78),
    "7B GRIFFIN + E2E": (85.40, 30.00, 71.88, 29.17, 23.74),
    "7B CATS": (89.20, 34.17, 62.50, 37.50, 32.83),
    "7B CATS + layer-wise": (87.00, 35.00, 70.00, 39.17, 38.38),
    "7B CATS + E2E": (90.00, 33.33, 78.13, 47.50, 35.86),
    "14B full": (92.80, 63.33, 90.63, 60.83, 52.53),
}
METHODS = ("full", "GRIFFIN", "GRIFFIN + layer-wise", "GRIFFIN + E2E", "CATS", "CATS + layer-wise",
           "CATS + E2E")
GSM8K = {  # accuracy in percent
    "Llama 3.2 1B": (22.44, 7.13, 13.72, 21.00, 19.18, 18.65, 20.39),
    "Llama 3.2 3B": (51.55, 28.96, 40.18, 44.66, 41.24, 45.49, 46.85),
    "Llama 3.1 8B": (53.98, 20.47, 37.60, 51.40, 50.95, 51.93, 58.00),
    "Gemma 2 2B": (51.02, 33.74, 42.53, 48.14, 34.42, 46.32, 46.17),
    "Gemma 2 9B": (78.17, 59.21, 76.72, 76.65, 76.50, 77.18, 77.18),
}
MATH = {
    "Llama 3.2 1B": (10.66, 5.42, 6.62, 8.44, 7.54, 8.28, 9.04),
    "Llama 3.2 3B": (14.32, 10.98, 13.70, 16.96, 12.04, 13.62, 14.40),
    "Llama 3.1 8B": (13.94, 6.16, 9.72, 12.64, 11.80, 13.66, 13.88),
    "Gemma 2 2B": (16.06, 11.32, 12.32, 13.70, 10.56, 13.90, 14.16),
    "Gemma 2 9B": (27.64, 25.22, 25.84, 25.30, 27.32, 28.16, 28.00),
}
PAPER = {
    "table 1, R1-Distill-Qwen, accuracy in percent": [
        {"model": name} | dict(zip(SETS, numbers)) for name, numbers in THINKING.items()],
    "table 4, GSM8K, accuracy in percent": [
        {"model": name} | dict(zip(METHODS, numbers)) for name, numbers in GSM8K.items()],
    "table 4, MATH, accuracy in percent": [
        {"model": name} | dict(zip(METHODS, numbers)) for name, numbers in MATH.items()],
}


def main(argv=None):
    """A row for each variant: the parameters that a token uses, and its scores on every set.

    A second table has the differences problem by problem: of each variant to the full model, and of
    each second stage to the first.
    """
    args = common.arguments("paper.table1_accuracy", __doc__, argv)
    experiment = Experiment(args)
    rows, variants = [], common.variants(args, ("griffin", "cats"))
    for variant in variants:
        active = bench.active_parameters(experiment.prepare(variant))
        row = {"method": variant.name, "active parameters (M)": active / 1e6}
        rows.append(row | experiment.score_columns(variant))
    pairs = [(variant, variants[0]) for variant in variants[1:]]
    pairs += [(second, first) for first, second in zip(variants, variants[1:])
              if len(second.stages) == 2]
    differences = [experiment.difference_row(*pair) for pair in pairs]
    return report.show(args, rows, report.draw_scores, PAPER, experiment, differences=differences)


if __name__ == "__main__":
    sample.run_command(main)
