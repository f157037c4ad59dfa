"""Figure 3: coverage of many samples against compute, with a verifier that knows the right answer.

A problem is covered if one of K samples is right (pass@K). The paper draws coverage against K A, A
being the fraction of the parameters that a token uses, K = 1..100, on 140 MATH problems, and claims
that Caprese reaches the full model's coverage at the same or less compute.
"""

import math
import statistics

from paper import common

import caprese
from paper.experiment import BOTH_STAGES, Variant

NEEDS = ("graded",)
QUICK = {"limit": 30, "runs": 20, "temperature": 0.6}
FULL = {"limit": 140, "runs": 100, "temperature": 0.6}
SIZES = (1, 2, 5, 10, 20, 50, 100)  # K


def pass_at_k(n, right, k):
    """1 - C(n - right, k) / C(n, k): the chance that k of n samples contain a right one.

    From n samples this estimates pass@k without bias.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def measure(experiment):
    """A row for each variant and each K; the deviation is that of the mean over the problems."""
    rows, runs = [], experiment.args.runs
    name, problems = experiment.graded()
    full = caprese.active_parameters(experiment.prepare(Variant("full")))
    for variant in experiment.variants(("griffin", "cats"), stages=(BOTH_STAGES,)):
        right = [0] * len(problems)
        for answer in experiment.answers(variant, name, problems):
            right[answer["problem"]] += int(answer["accuracy"])
        active = caprese.active_parameters(experiment.prepare(variant)) / full
        for k in SIZES:
            if k <= runs:
                covered = [100 * pass_at_k(runs, count, k) for count in right]
                rows.append({"method": variant.name, "K": k, "compute": k * active,
                             "coverage %": statistics.fmean(covered),
                             "coverage ±": statistics.pstdev(covered) / math.sqrt(len(covered))})
    return rows


def draw(figure, rows):
    """Coverage against relative compute: a line for each variant."""
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        common.draw_line(axes, chosen, "compute", "coverage %", method)
    sizes = sorted({row["K"] for row in rows})
    axes.set(xlabel="K times the active fraction of the parameters", xscale="log",
             ylabel="coverage, % of problems", xticks=sizes, xticklabels=sizes)


if __name__ == "__main__":
    common.main("figure3_coverage")
