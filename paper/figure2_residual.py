"""Figure 2: the relative error of a sparse FF's output against density, and how low-rank it is.

The paper shows the oracle top-k, alone and with the best approximation of its residual by rank 128,
256 and 512, and claims that the residual is close to low-rank: a small rank removes much of the
error. That approximation knows the residual of each token. Here the L R of the same rank stands
beside it, which knows x alone: fitted in closed form (7), and measured on samples that it has not
seen. The errors are |e| / |FF(x)|, means over all layers, which are all sparse.
"""

import math
import statistics

from paper import common

import torch
from tqdm import tqdm

import caprese
import data
import distill

NEEDS = ("samples",)
METHODS = {"oracle top-k": "topk", "GRIFFIN": "griffin", "CATS": "cats"}
DENSITIES = (0.2, 0.4, 0.6, 0.8)


def moments(model, samples):
    """{layer: (A, C, E, energy)} over the samples' response tokens, in float64.

    A = sum x^T x, C = sum x^T e and E = sum e^T e are [D, D]; energy = sum |FF(x)|^2.
    """
    sums = {ff: 0 for ff in caprese.sparse_layers(model).values()}

    def consume(ff, x, residual, output):
        x, e, output = x.float(), residual.float(), output.float()
        new = (x.T @ x, x.T @ e, e.T @ e, output.square().sum())
        if sums[ff] == 0:
            sums[ff] = [torch.zeros_like(total, dtype=torch.float64) for total in new]
        for total, addend in zip(sums[ff], new):
            total += addend

    for batch in data.batches(samples, batch_size=16, device=model.device):
        for found in distill.stream_residuals(model, batch):
            consume(*found)
    return {i: sums[ff] for i, ff in caprese.sparse_layers(model).items()}


def best_rank_energy(E):
    """[D + 1]: the energy of a residual that its best approximation of rank 0..D does not have.

    It is the sum of the squares of all but the largest r singular values of e (Eckart and Young),
    which are the eigenvalues of E = e^T e [D, D].
    """
    squares = torch.linalg.eigvalsh(E).clamp_min(0)  # smallest first
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def linear_energy(A, C, E, M):
    """|e - x M|^2 of a linear map M from the moments of x and e, all [D, D]."""
    return E.trace() - 2 * (M * C).sum() + (M * (A @ M)).sum()


def errors(seen, unseen, ranks):
    """{column: relative error} of one layer, from its moments on seen and on unseen samples."""
    A, C, E, energy = unseen
    L, R = distill.closed_form(seen[0], seen[1], max(ranks))
    best = best_rank_energy(E)
    remaining = {"alone": E.trace()}
    remaining |= {f"best rank {r}": best[r] for r in ranks}
    remaining |= {f"L R rank {r}": linear_energy(A, C, E, L[:, :r] @ R[:r]) for r in ranks}
    return {key: math.sqrt(max(0.0, value / energy)) for key, value in remaining.items()}


def measure(experiment):
    """A row for each method and density."""
    D, rank = experiment.model.config.hidden_size, experiment.rank
    ranks = sorted({max(1, rank // 2), rank, min(2 * rank, D)})
    samples = experiment.samples if experiment.args.full else experiment.samples[::3]
    unseen = samples[::5]
    seen = [sample for i, sample in enumerate(samples) if i % 5]
    rows = []
    for name, method in METHODS.items():
        for density in tqdm(DENSITIES, desc=name, leave=False, disable=None):
            layers = range(len(experiment.model.model.layers))
            model = caprese.attach(experiment.model, method, density, layers)
            on_seen, on_unseen = moments(model, seen), moments(model, unseen)
            found = [errors(on_seen[i], on_unseen[i], ranks) for i in layers]
            means = {key: statistics.fmean(layer[key] for layer in found) for key in found[0]}
            rows.append({"method": name, "density": density} | means)
    return rows


def draw(figure, rows):
    """A panel for each method: error against density, alone, with the best rank r, with L R."""
    for axes, name in zip(figure.subplots(1, len(METHODS)), METHODS):
        chosen = [row for row in rows if row["method"] == name]
        color = common.color(name if name == "oracle top-k" else f"{name} + E2E")
        for kind, linestyle in (("alone", "-"), ("best rank", ":"), ("L R rank", "-.")):
            columns = [column for column in rows[0] if column.startswith(kind)]
            for column, shade in zip(columns, (0.4, 0.7, 1.0)[-len(columns):]):
                common.draw_line(axes, chosen, "density", column, column, alpha=shade,
                                 linestyle=linestyle, color=color)
        axes.set(title=name, xlabel="density, kept / all", ylim=(0, None))
    figure.axes[0].set_ylabel("relative error of the FF output")


if __name__ == "__main__":
    common.main("figure2_residual")
