"""Figure 8: the singular values of L R in each layer, the largest as 1.

The paper shows how fast they fall. The faster they do, the smaller a rank would have been enough.
The table adds how many hold 90% of the sum of their squares, and how much of the residual's energy
in (7) the correction leaves unexplained, on up to 500 training samples. That may exceed 1: L and R
that are learned block by block or end-to-end also mend what the blocks before them could not.
"""

from paper import common

import torch

import caprese
import distill

NEEDS = ("corrections",)
FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1)  # of the rank, where the table shows singular values


def singular_values(L, R):
    """Those of L R [D, D], largest first, from the triangular factors of L and R^T: [r]."""
    left, right = torch.linalg.qr(L.double()).R, torch.linalg.qr(R.double().T).R
    return torch.linalg.svdvals(left @ right.T)


def measure(experiment):
    """A row for each variant that has L and R, and each of its layers."""
    rows = []
    for variant in experiment.variants(("griffin", "cats")):
        layers = caprese.sparse_layers(experiment.prepare(variant))
        layers = {i: ff for i, ff in layers.items() if ff.L.shape[1]}
        unexplained = {}
        if layers and experiment.trainable:
            some = experiment.samples[::-(-len(experiment.samples) // 500)]
            unexplained = distill.unexplained(experiment.model, some, experiment.recipe())
        for i, ff in layers.items():
            values, rank = singular_values(ff.L.detach(), ff.R.detach()), ff.L.shape[1]
            energy = values.square().cumsum(0) / values.square().sum()
            row = {"method": variant.name, "layer": i, "rank": rank, "largest": values[0].item()}
            for fraction in FRACTIONS:
                index = max(1, round(fraction * rank)) - 1
                row[f"at {fraction}r"] = (values[index] / values[0]).item()
            rows.append(row | {"ranks for 90%": int((energy < 0.9).sum()) + 1,
                               "unexplained": unexplained.get(i)})
    return rows


def draw(figure, rows):
    """A panel for each method: a line for each layer, the darker the later."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = min(2, len(methods))
    panels = figure.subplots(-(-len(methods) // columns), columns, sharex=True, sharey=True,
                             squeeze=False)
    last = max(row["layer"] for row in rows)
    for axes, method in zip(panels.flat, methods):
        for row in rows:
            if row["method"] == method:
                axes.plot(FRACTIONS, [row[f"at {fraction}r"] for fraction in FRACTIONS],
                          marker="o", markersize=3, color=common.color(method),
                          alpha=(row["layer"] + 2) / (last + 2))
        axes.set(title=method, ylim=(0, 1))
    figure.supxlabel("index of the singular value over r; a line for each layer, darker if later",
                     fontsize=9)
    figure.supylabel("singular value over the largest", fontsize=9)


if __name__ == "__main__":
    common.main("figure8_spectrum")
