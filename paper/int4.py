"""Weights of 4 bits in place of sparsity, and x L R for the error of rounding (appendix D).

    caprese.attach(model, Int4FF, rank=256)

This shows the quality of 4 bits and not their speed: the rounded weights are kept, and multiplied,
in the model's own dtype.
"""

import math

import torch
from torch.nn import functional as F

from paper.oracle import NoSelection


class Int4FF(NoSelection):
    """The FF with weights rounded to 4 bits. Every neuron is computed.

    It has no density: whatever is given, it is 1.
    """

    def __init__(self, mlp, density, rank, call):
        super().__init__(mlp, 1.0, rank, call)
        for name in ("gate", "up", "down"):
            weight = getattr(self, f"{name}_proj").weight
            self.register_buffer(f"{name}_int4", quantise(weight), persistent=False)

    def quantised(self, x):
        """The FF with the rounded weights: x [B, T, D] -> [B, T, D]."""
        gate = self.act_fn(F.linear(x, self.gate_int4))
        return F.linear(gate * F.linear(x, self.up_int4), self.down_int4)

    def sparse(self, x, gate=None, z=None, selection=None):
        """The rounded FF with its correction; gate and z, of the exact weights, are not used."""
        return self.quantised(x) + self.correction(x)

    def teacher_forced(self, x, generated):
        """FF(x), but sparse() where generated [B, T] is True: [B, T, D] -> [B, T, D]."""
        gate, z = self.neurons(x)
        return torch.where(generated[..., None], self.sparse(x), self.down_proj(z))

    def residual(self, x, generated):
        """FF(x) minus the rounded FF, what (7) regresses on x: [B, T, D] -> [B, T, D]."""
        gate, z = self.neurons(x)
        return self.down_proj(z) - self.quantised(x)

    def decode(self, x):
        return self.sparse(x)


def quantise(weight, group=64):
    """Round weight [out, in] to 4 bits: `group` neighbours along `in` share a scale and an offset.

    Returns the rounded values in the weight's own shape and dtype. Where `in` is no multiple of
    `group`, a group is their greatest common divisor.
    """
    size = math.gcd(group, weight.shape[1])
    w = weight.detach().float().unflatten(1, (-1, size))  # [out, groups, size]
    low, high = w.aminmax(dim=-1, keepdim=True)
    scale = (high - low).clamp_min(1e-12) / 15            # 16 values, 0 to 15
    rounded = ((w - low) / scale).round() * scale + low
    return rounded.flatten(1).to(weight.dtype)
