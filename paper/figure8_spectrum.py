"""Figure 8: the singular values of L R in each layer, the largest as 1.

The paper shows how fast they fall. The faster they do, the smaller a rank would have been enough.
The table adds how many hold 90% of the sum of their squares, and how much of the residual's energy
in (7) the correction leaves unexplained, on up to 500 training samples. That may exceed 1: L and R
that are learned block by block or end-to-end also mend what the blocks before them could not.
"""

from functools import partial

import torch

import caprese
import data
import distill
import sample
from paper import common, report
from paper.experiment import Experiment

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1)  # of the rank, where the table shows singular values


def singular_values(L, R):
    """Those of L R [D, D], largest first, from the triangular factors of L and R^T: [r]."""
    left, right = torch.linalg.qr(L.double()).R, torch.linalg.qr(R.double().T).R
    return torch.linalg.svdvals(left @ right.T)


def unexplained_by_layer(model, samples):
    """{layer: the fraction of the residual's energy in (7) that x L R misses}."""
    layers = caprese.sparse_layers(model)
    sums = {ff: [0.0, 0.0] for ff in layers.values()}

    @torch.no_grad()
    def visit(ff, x, e):
        sums[ff][0] += distill.squared_error(ff, x, e).item()
        sums[ff][1] += e.float().square().sum().item()

    for batch in data.batches(samples, 16, model.device):
        distill.visit_residuals(model, batch, visit)
    return {i: sums[ff][0] / max(sums[ff][1], 1e-30) for i, ff in layers.items()}


def main(argv=None):
    """A row for each variant that has L and R, and each of its layers."""
    args = common.arguments("paper.figure8_spectrum", __doc__, argv)
    if not common.trainable(args) and not args.adapter:
        raise common.CannotRun("there is no L R to look at: give --adapter or --train FILE, or no "
                               "--model")
    experiment = Experiment(args, problems=False)
    rows, spectra = [], {}
    for variant in common.variants(args, ("griffin", "cats")):
        layers = caprese.sparse_layers(experiment.prepare(variant))
        layers = {i: ff for i, ff in layers.items() if hasattr(ff, "L") and ff.L.shape[1]}
        unexplained = dict.fromkeys(layers)  # unknown without samples
        if layers and common.trainable(args):
            some = experiment.samples[::-(-len(experiment.samples) // 500)]
            unexplained = unexplained_by_layer(experiment.model, some)
        for i, ff in layers.items():
            values, rank = singular_values(ff.L.detach(), ff.R.detach()), ff.L.shape[1]
            spectra[variant.name, i] = (values / values[0]).tolist()
            energy = values.square().cumsum(0) / values.square().sum()
            row = {"method": variant.name, "layer": i, "rank": rank, "largest": values[0].item()}
            for fraction in FRACTIONS:
                index = max(1, round(fraction * rank)) - 1
                row[f"at {fraction}r"] = spectra[variant.name, i][index]
            rows.append(row | {"ranks for 90%": int((energy < 0.9).sum()) + 1,
                               "unexplained": unexplained[i]})
    return report.show(args, rows, partial(draw, spectra), experiment=experiment)


def draw(spectra, figure, rows):
    """A panel for each method: all singular values of {(method, layer): values}, by layers."""
    from matplotlib import colormaps
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = min(2, len(methods))
    panels = figure.subplots(-(-len(methods) // columns), columns, sharex=True, sharey=True,
                             squeeze=False)
    last = max(row["layer"] for row in rows)
    for axes, method in zip(panels.flat, methods):
        for (name, layer), values in spectra.items():
            if name == method:
                axes.plot(range(1, len(values) + 1), values, label=f"layer {layer}",
                          color=colormaps["viridis"](layer / max(1, last)))
        axes.set(title=method, ylim=(0, 1))
    for axes in panels[-1]:
        axes.set_xlabel("index of the singular value")
    for axes in panels[:, 0]:
        axes.set_ylabel("value / largest")


if __name__ == "__main__":
    sample.run_command(main)
