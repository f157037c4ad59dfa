"""Figure 3: coverage of many samples against compute, with a verifier that knows the right answer.

A problem is covered if one of K samples is right (pass@K). The paper draws coverage against K A, A
being the fraction of the parameters that a token uses, K = 1..100, on 140 MATH problems, and claims
that Caprese reaches the full model's coverage at the same or less compute.
"""

import math
import statistics

import bench
import sample
from paper import common, report
from paper.experiment import Experiment
from paper.scores import standard_error

SIZES = (1, 2, 5, 10, 20, 50, 100)  # K


def pass_at_k(n, right, k):
    """1 - C(n - right, k) / C(n, k): the chance that k of n samples contain a right one.

    From n samples this estimates pass@k without bias.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def main(argv=None):
    """A row for each variant and each K; the error is that of the mean over the problems."""
    args = common.arguments("paper.figure3_coverage", __doc__, argv,
                            limit=(30, 140), runs=(20, 100), temperature=(0.6, 0.6))
    experiment = Experiment(args)
    name, problems = experiment.graded()
    full = bench.active_parameters(experiment.prepare(common.Variant("full")))
    rows = []
    for variant in common.variants(args, ("griffin", "cats"), each_stage=False):
        right = [0] * len(problems)
        for answer in experiment.answers(variant, name, problems):
            right[answer["problem"]] += int(answer["accuracy"])
        active = bench.active_parameters(experiment.prepare(variant)) / full
        for k in [k for k in SIZES if k <= args.runs]:
            covered = [pass_at_k(args.runs, count, k) for count in right]
            rows.append({"method": variant.name, "set": name, "K": k, "compute": k * active,
                         "coverage %": 100 * statistics.fmean(covered),
                         "coverage ±": 100 * standard_error(covered)})
    return report.show(args, rows, draw, experiment=experiment)


def draw(figure, rows):
    """Coverage against relative compute: a line for each variant."""
    axes = figure.subplots()
    for method, color in report.colors(rows).items():
        chosen = [row for row in rows if row["method"] == method]
        report.draw_line(axes, chosen, "compute", "coverage %", method, color,
                         linestyle="--" if method == "full" else "-")
    sizes = sorted({row["K"] for row in rows})
    axes.set(xlabel="K times the active fraction of the parameters", xscale="log",
             ylabel="coverage, % of problems", xticks=sizes, xticklabels=sizes)


if __name__ == "__main__":
    sample.run_command(main)
