"""The oracle of figure 2: for each token the top-k neurons, chosen after all have been computed.

    caprese.attach(model, OracleFF, density=0.5)

No method that must choose before it computes leaves a smaller Z behind. It saves nothing.
"""

import torch

import caprese


class NoSelection(caprese.SparseFF):
    """A sparse FF that selects nothing by the prompt."""

    def reset(self):
        pass

    def count(self, x, gate, z, counted):
        pass

    def select(self):
        pass


class OracleFF(NoSelection):
    """Keeps, for each token, the k neurons with the largest |Z|."""

    def sparsify(self, x, gate, z, selection=None):
        kept = z.detach().abs().topk(self.num_kept, dim=-1).indices  # [B, T, k]
        return torch.zeros_like(z).scatter(-1, kept, z.gather(-1, kept))

    def decode(self, x):
        gate, z = self.neurons(x)
        return self.sparse(x, gate, z, None)

    def selection(self, x, gate, z, counted):
        return None
