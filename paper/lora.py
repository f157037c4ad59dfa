"""LoRA in place of x L R: the paper's baseline (appendix C, table 6), and an example of a fork.

The matrices of the sparse FF become Wg + A B, W1 + A B, W2 + A B, with as many parameters in all
as L and R have. It cannot fuse as equations (9) and (10) do: x A B is two products, one after the
other, beside each of the three matrices, and the last A B needs what the first two have made.

    caprese.attach(model, LoRAFF, density=0.5, rank=256)
    caprese.load_adapter(model, file, method=LoRAFF)

A correction that only adds something else to FF_sparse(x) needs less than this: `correction`, and
for the compact path `gather` and `fused`.
"""

import torch
from torch import nn
from torch.nn import functional as F

import caprese

MATRICES = ("gate", "up", "down")


class LoRAFF(caprese.GRIFFIN):
    """GRIFFIN with a low-rank update A B on each of its three matrices.

    Its parameters are gate_A [D, q], gate_B [q, F], up_A [D, q], up_B [q, F], down_A [F, q] and
    down_B [q, D] in float32. The compact path reads them as buffers gate_A_k, gate_B_k and so on.
    """

    def new_adapter(self, rank):
        """Create the factors; each B is zero, so that training starts from GRIFFIN exactly.

        q is chosen so that they have as many parameters as L and R of this rank.
        """
        D, F_ = self.gate_proj.in_features, self.gate_proj.out_features
        q = 0 if rank == 0 else max(1, round(2 * D * rank / (3 * (D + F_))))  # 3 q (D + F) = 2 D r
        device = self.gate_proj.weight.device
        for name in MATRICES:
            out_features, in_features = getattr(self, f"{name}_proj").weight.shape
            A = torch.randn(in_features, q, device=device, dtype=torch.float32)
            B = torch.zeros(q, out_features, device=device, dtype=torch.float32)
            setattr(self, f"{name}_A", nn.Parameter(A * in_features ** -0.5))
            setattr(self, f"{name}_B", nn.Parameter(B))
            self.register_buffer(f"{name}_A_k", None, persistent=False)
            self.register_buffer(f"{name}_B_k", None, persistent=False)

    def set_adapter(self, **factors):
        """Take the six factors by name; their rank q may be another than before.

        Raises ValueError, and changes nothing, if one does not fit or holds no finite number.
        """
        for name in MATRICES:
            out_features, in_features = getattr(self, f"{name}_proj").weight.shape
            A, B = factors[f"{name}_A"], factors[f"{name}_B"]
            if A.dim() != 2 or len(A) != in_features or B.shape != (A.shape[1], out_features):
                raise ValueError(f"{name}_A {list(A.shape)} and {name}_B {list(B.shape)} must have "
                                 f"the shapes [{in_features}, q] and [q, {out_features}]")
            if not (A.isfinite().all() and B.isfinite().all()):
                raise ValueError(f"{name}_A or {name}_B holds a value that is not finite")
        for name, factor in factors.items():
            factor = factor.detach().to(self.gate_proj.weight.device, torch.float32)
            setattr(self, name, nn.Parameter(factor.contiguous()))

    def correction(self, x):
        """Zeros [B, T, D]: beside the FF nothing is added. The updates are within `sparse`.

        Raises ValueError where gradients are recorded: (7) has nothing to learn here.
        """
        if torch.is_grad_enabled():
            raise ValueError("LoRA has no layer-wise stage, for its update stands within the FF; "
                             "give --layerwise none")
        return torch.zeros_like(x)

    def sparse(self, x, gate, z, kept):
        """The masked path: [B, T, D] -> [B, T, D]. gate and z, made without A B, are not used."""
        gate = self.act_fn(self.gate_proj(x) + low_rank(x, self.gate_A, self.gate_B))
        z = gate * (self.up_proj(x) + low_rank(x, self.up_A, self.up_B))
        z = self.sparsify(x, gate, z, kept)
        return self.down_proj(z) + low_rank(z, self.down_A, self.down_B)

    @torch.no_grad()
    def gather(self, neurons):
        """Copy the kept neurons [k] of the matrices, and their part of the factors.

        All are copied as F.linear reads them, [out, in].
        """
        tensors = {"gate_k": self.gate_proj.weight[neurons],      # [k, D]
                   "up_k": self.up_proj.weight[neurons],          # [k, D]
                   "down_k": self.down_proj.weight[:, neurons],   # [D, k]
                   "gate_A_k": self.gate_A.T, "gate_B_k": self.gate_B[:, neurons].T,
                   "up_A_k": self.up_A.T, "up_B_k": self.up_B[:, neurons].T,
                   "down_A_k": self.down_A[neurons].T, "down_B_k": self.down_B.T}
        for name, tensor in tensors.items():
            self.buffer(name, tensor.shape, self.gate_proj.weight.dtype).copy_(tensor)

    def fused(self, x):
        """A decode step of the compact path, in nine products: [B, T, D] -> [B, T, D]."""
        gate = F.linear(x, self.gate_k) + F.linear(F.linear(x, self.gate_A_k), self.gate_B_k)
        up = F.linear(x, self.up_k) + F.linear(F.linear(x, self.up_A_k), self.up_B_k)
        z = self.act_fn(gate) * up
        return F.linear(z, self.down_k) + F.linear(F.linear(z, self.down_A_k), self.down_B_k)

    def active_parameters(self):
        """As of GRIFFIN; gate_B, up_B and down_A have entries of the dropped neurons as well."""
        q, num_dropped = self.gate_A.shape[1], self.gate_proj.out_features - self.num_kept
        return super().active_parameters() - 3 * q * num_dropped


def low_rank(x, A, B):
    """x A B in x's dtype: x [..., in], A [in, q], B [q, out] -> [..., out]."""
    return x @ A.to(x.dtype) @ B.to(x.dtype)
