"""Figure 5: accuracy against density, GRIFFIN alone and with L R of three ranks.

The paper draws r = 128, 256 and 512 and claims that Caprese helps at every density, most where
sparsity costs most, and that a larger rank adds little. Here the ranks are r/2, r and 2r; without
--full L and R are learned layer-wise alone, as there are many of them.
"""

from dataclasses import replace

import sample
from paper import common, report
from paper.experiment import Experiment
from paper.scores import summary

DENSITIES = (0.2, 0.4, 0.6, 0.8)


def main(argv=None):
    """The full model, then a row for each density and rank; rank 0 is the sparse method alone."""
    args = common.arguments("paper.figure5_density", __doc__, argv, refuses=("adapter",))
    methods = (args.method or []) + args.block or ["griffin"]
    if len(methods) > 1:
        raise common.CannotRun("it draws one method, so give one --method or --block")
    experiment = Experiment(args, samples=True)
    name, problems = experiment.graded()
    stages = common.stages(args) if args.full else common.stages(args)[:1]
    alone = common.sparse(args, methods[0])
    variants = [common.Variant("full")]
    for density in DENSITIES:
        variants.append(replace(alone, density=density))
        for rank in common.three_ranks(args, experiment.model):
            variants.append(replace(alone, density=density, rank=rank, stages=stages))
    rows = []
    for variant in variants:
        row = {"method": variant.name, "set": name, "density": variant.density,
               "rank": variant.rank}
        rows.append(row | summary(experiment.answers(variant, name, problems)))
    return report.show(args, rows, draw, experiment=experiment)


def draw(figure, rows):
    """Accuracy against density: a line for each rank, the darker the larger."""
    axes = figure.subplots()
    full, *rows = rows
    axes.axhline(full["accuracy %"], color="black", linestyle="--", label="full")
    shades = ("#fc9272", "#9ecae1", "#4292c6", "#08519c")
    for rank, color in zip(dict.fromkeys(row["rank"] for row in rows), shades):
        chosen = [row for row in rows if row["rank"] == rank]
        label = f"{rows[0]['method']} + L R, r = {rank}" if rank else rows[0]["method"]
        report.draw_line(axes, chosen, "density", "accuracy %", label, color)
    axes.set(xlabel="density, kept / all", ylabel="accuracy %", ylim=(0, 100))


if __name__ == "__main__":
    sample.run_command(main)
