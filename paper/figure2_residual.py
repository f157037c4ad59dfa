"""Figure 2: the relative error of a sparse FF's output against density, and how low-rank it is.

The paper shows the oracle top-k, alone and with the best approximation of its residual by rank 128,
256 and 512, and claims that the residual is close to low-rank: a small rank removes much of the
error. That approximation knows the residual of each token. Here the L R of the same rank stands
beside it, which knows x alone: fitted in closed form (7), and measured on samples that it has not
seen. The errors are |e| / |FF(x)|, means over all layers, which are all sparse.
"""

import math
import statistics

import torch

import caprese
import data
import distill
import sample
from paper import common, report
from paper.experiment import Experiment
from paper.oracle import OracleFF

METHODS = {"oracle top-k": OracleFF, "GRIFFIN": "griffin", "CATS": "cats"}
DENSITIES = (0.2, 0.4, 0.6, 0.8)


def moments(model, samples):
    """{layer: (A, C, E, energy)} over the samples' response tokens, in float64.

    A = sum x^T x, C = sum x^T e and E = sum e^T e are [D, D]; energy = sum |FF(x)|^2.
    """
    layers = caprese.sparse_layers(model)
    sums = {ff: [*distill.new_moments(ff), *distill.new_moments(ff)] for ff in layers.values()}
    energies = dict.fromkeys(sums, 0.0)

    def visit(ff, x, e):
        A, C, E, _ = sums[ff]
        distill.add_moments(A, C, x, e)
        distill.add_moments(E, torch.zeros_like(E), e, e)
        energies[ff] += ff.down_proj(ff.neurons(x)[1]).double().square().sum()

    for batch in data.batches(samples, 16, model.device):
        distill.visit_residuals(model, batch, visit)
    return {i: (*sums[ff][:3], energies[ff]) for i, ff in layers.items()}


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


def main(argv=None):
    """A row for each method and density."""
    args = common.arguments("paper.figure2_residual", __doc__, argv,
                            refuses=("method", "block", "adapter"))
    experiment = Experiment(args, problems=False, samples=True)
    samples = experiment.samples if args.full else experiment.samples[::3]
    unseen = samples[::5]
    seen = [one for i, one in enumerate(samples) if i % 5]
    ranks, rows = common.three_ranks(args, experiment.model), []
    for name, method in METHODS.items():
        for density in sample.progress(DENSITIES, name, len(DENSITIES)):
            model = caprese.attach(experiment.model, method, density, "all")
            on_seen, on_unseen = moments(model, seen), moments(model, unseen)
            layers = [errors(on_seen[i], on_unseen[i], ranks) for i in on_seen]
            means = {key: statistics.fmean(layer[key] for layer in layers) for key in layers[0]}
            rows.append({"method": name, "density": density} | means)
    return report.show(args, rows, draw, experiment=experiment)


def draw(figure, rows):
    """A panel for each method: error against density, alone, with the best rank r, with L R."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, methods):
        chosen = [row for row in rows if row["method"] == name]
        for kind, color, linestyle in (("alone", "black", "-"), ("best rank", "#4292c6", ":"),
                                       ("L R rank", "#a63603", "-.")):
            columns = [column for column in rows[0] if column.startswith(kind)]
            for column, alpha in zip(columns, (0.4, 0.7, 1.0)[-len(columns):]):
                report.draw_line(axes, chosen, "density", column, column, color, alpha=alpha,
                                 linestyle=linestyle)
        axes.set(title=name, xlabel="density, kept / all")
    panels[0].set_ylabel("relative error of the FF output")
    panels[0].set_ylim(bottom=0)  # of all panels, now that all lines are there


if __name__ == "__main__":
    sample.run_command(main)
