"""Figure 5: accuracy against density, GRIFFIN alone and with L R of three ranks.

The paper draws r = 128, 256 and 512 and claims that Caprese helps at every density, most where
sparsity costs most, and that a larger rank adds little. Here the ranks are r/2, r and 2r; without
--full L and R are learned layer-wise alone, as there are many of them.
"""

from dataclasses import replace

from paper import common
from paper.experiment import BOTH_STAGES, LAYERWISE, Variant
from paper.scores import summary

NEEDS = ("graded", "samples")
DENSITIES = (0.2, 0.4, 0.6, 0.8)


def measure(experiment):
    """The full model, then a row for each density and rank; rank 0 is the sparse method alone."""
    rank = experiment.rank
    name, problems = experiment.graded()
    stages = BOTH_STAGES if experiment.args.full else LAYERWISE
    ranks = sorted({max(1, rank // 2), rank, min(2 * rank, experiment.model.config.hidden_size)})
    alone = experiment.sparse((experiment.args.method or ["griffin"])[0])
    variants = [Variant("full")]
    for density in DENSITIES:
        variants.append(replace(alone, density=density))
        variants += [replace(alone, density=density, rank=r, stages=stages) for r in ranks]
    rows = []
    for variant in variants:
        row = {"method": variant.name, "density": variant.density, "rank": variant.rank}
        rows.append(row | summary(experiment.answers(variant, name, problems)))
    return rows


def draw(figure, rows):
    """Accuracy against density: a line for each rank, the darker the larger."""
    axes = figure.subplots()
    full, *rows = rows
    method = rows[0]["method"]
    axes.axhline(full["accuracy %"], color="black", linestyle="--", label="full")
    for rank in dict.fromkeys(row["rank"] for row in rows):
        chosen = [row for row in rows if row["rank"] == rank]
        label, style = method, {"color": common.color(method)}
        if rank:
            label = f"{method} + L R, r = {rank}"
            style = {"color": common.color(f"{method} + E2E"),
                     "alpha": (rank / rows[-1]["rank"]) ** 0.5}
        common.draw_line(axes, chosen, "density", "accuracy %", label, **style)
    axes.set(xlabel="density, kept / all", ylabel="accuracy %", ylim=(0, 100))


if __name__ == "__main__":
    common.main("figure5_density")
