"""The paper, equation by equation: GRIFFIN, CATS, 4-bit, the low-rank correction, fusing and reselection.

Letters in the shape comments: B rows, T tokens, D hidden_size, F intermediate_size, k kept neurons, r rank.

    attach(model, "griffin", density=0.5, rank=16)   replaces FF blocks by SparseFF
    reset(model) -> prefill -> select(model) -> decode    what sample.py does with it

To change the method, change one of: statistic (what makes a neuron worth keeping), SparseFF.sparsify (what is
dropped), SparseFF.correct (what is put back).
"""

import hashlib
import json
import math
import os
import warnings

import torch
from torch import nn
from torch.nn import functional as F

METHODS = ("griffin", "cats", "topk", "int4")
CORRECTIONS = ("linear", "gated", "lora")
GROUP = 64        # weights that share a scale and an offset in 4 bits
ROW_BYTES = 2048  # CATS reads single rows of its matrices if they are at least so long; shorter ones do not pay


def statistic(z, prompt=None):
    """GRIFFIN's s of equation (3): z [B, T, F] -> [B, F], over the tokens where prompt [B, T] is True.

    Zbar_i = |Z_i| / ||Z_i||_2 for each token i, then s_j = ||Zbar[:, j]||_2 for each neuron j. Squared: the energy of
    each token weighted by the inverse of its sum.
    """
    wide = torch.promote_types(z.dtype, torch.float32)  # sums of squares are too coarse in bfloat16
    size = 64 if z.device.type == "cpu" else z.shape[1]  # tokens at a time: what fits into a CPU's cache
    total = torch.zeros(len(z), 1, z.shape[2], dtype=wide, device=z.device)
    for at in range(0, z.shape[1], size):
        energy = z[:, at:at + size].to(wide).square()
        weight = energy.sum(-1).clamp_min(1e-30).reciprocal()
        if prompt is not None:
            weight = weight * prompt[:, at:at + size]
        total += weight[:, None] @ energy
    return total[:, 0].sqrt()


def quantile(values, q):
    """Linearly interpolated q-quantile of non-negative values [N] of any N, exact, as a float32 scalar tensor.

    torch.quantile sorts, and refuses more than 16M values. Non-negative floats order like their bit patterns,
    so two counts of 2^15 and 2^16 bins find an order statistic in two passes.
    """
    bits = values.float().view(torch.int32)
    place = q * (len(bits) - 1)
    low, high = (_order_statistic(bits, k) for k in (int(place), min(int(place) + 1, len(bits) - 1)))
    return torch.lerp(low, high, place - int(place))


def _order_statistic(bits, k):
    """The k-th smallest (from 0) of non-negative float32 values given as int32 bit patterns [N]."""
    top = torch.bincount(bits >> 16, minlength=1 << 15).cumsum(0)
    upper = torch.searchsorted(top, k, right=True)
    below = torch.where(upper > 0, top[upper - 1], 0)
    rest = torch.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=1 << 16).cumsum(0)
    lower = torch.searchsorted(rest, k - below, right=True)
    return (upper << 16 | lower).int().view(torch.float32)


def quantise(weight, group=GROUP):
    """Round a weight [out, in] to 4 bits, in groups along `in` with a scale and an offset each (appendix D).

    Returns the rounded values in the weight's own shape and dtype: a simulation of the quality, not of the speed.
    """
    w = weight.detach().float().unflatten(1, (-1, math.gcd(group, weight.shape[1])))  # [out, groups, group]
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = (high - low).clamp_min(1e-12) / 15
    return (((w - low) / scale).round() * scale + low).flatten(1).to(weight.dtype)


class SparseFF(nn.Module):
    """Stands in for one FeedForward: full for prompt tokens, sparse plus a correction for generated ones.

    The base weights are the FF's own Linears by reference, frozen, under their official names; the module's own
    parameters are the correction, kept in float32. The state of the sequences at hand is s [B, F] (griffin) or
    tau [B] (cats); reset() forgets it.
    """

    def __init__(self, ff, method, density, rank, correction="linear"):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act = ff.gate_proj, ff.up_proj, ff.down_proj, ff.act
        self.replaced = [ff]  # in a list, so that its weights are not registered a second time
        self.method, self.density, self.rank, self.correction = method, density, rank, correction
        F_, D = self.gate_proj.weight.shape
        self.kept = max(1, round(density * F_))  # k
        down = lambda *shape: nn.Parameter(torch.randn(shape, device=self.gate_proj.weight.device) * shape[0] ** -0.5)
        up = lambda *shape: nn.Parameter(torch.zeros(shape, device=self.gate_proj.weight.device))
        # The second factor is zero: training starts from the sparse method exactly.
        if correction == "lora":
            q = max(1, round(2 * D * rank / (3 * (D + F_)))) if rank else 0  # as many parameters as L and R
            self.gate_A, self.gate_B = down(D, q), up(q, F_)
            self.up_A, self.up_B = down(D, q), up(q, F_)
            self.down_A, self.down_B = down(F_, q), up(q, D)
        else:
            self.L, self.R = down(D, rank), up(rank, D)
            if correction == "gated":
                self.G = down(D, rank)
        if method == "int4":
            self.quantised = [quantise(p.weight) for p in (ff.gate_proj, ff.up_proj, ff.down_proj)]
        self.reset()

    def reset(self):
        """Forget the sequences seen so far; the compact buffers stay where they are."""
        self.s = self.tau = self.mask = None
        self.compact = False

    def learned(self):
        """{name: parameter} of the correction."""
        return dict(self.named_parameters(recurse=False))

    def put(self, **tensors):
        """Take these as the correction, by name; ranks may differ from what it had, and from layer to layer."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor.to(self.gate_proj.weight.device, torch.float32).contiguous()))
        self.rank = next(iter(self.learned().values())).shape[1]

    def forward(self, x, generated=None):
        """x [B, T, D] -> [B, T, D]. generated: None or False, all tokens full (False: and they are counted for the
        selection); True, all sparse, by the last select(); bool [B, T], a fresh batch in which each row's
        generated tokens use the selection that its other tokens make."""
        if generated is True:
            return self.decode(x) if self.compact else self.sparse(x, *self.neurons(x))
        gate, z = self.neurons(x)
        if generated is False:
            self.observe(gate, z)
        full = self.down_proj(z)  # (2)
        if generated is None or generated is False:
            return full
        self.select_fresh(gate, z, generated)
        return torch.where(generated[..., None], self.sparse(x, gate, z), full)

    def neurons(self, x):
        """act(x Wg) and Z = FF1(x) of equation (1), both [B, T, F]."""
        gate = self.act(self.gate_proj(x))
        return gate, gate * self.up_proj(x)  # (1)

    def select_fresh(self, gate, z, generated):
        """Forget what was; each row's selection from its tokens that are not generated [B, T]."""
        self.reset()
        self.observe(gate, z, ~generated)
        self.select(compact=False)

    def residual(self, x, generated):
        """FF(x), and FF(x) - FF_sparse(x), which equation (7) regresses: x [B, T, D] -> both [B, T, D]."""
        gate, z = self.neurons(x)
        self.select_fresh(gate, z, generated)
        full = self.down_proj(z)
        return full, full - self.bare(x, gate, z)

    @torch.no_grad()
    def observe(self, gate, z, prompt=None):
        """Add tokens of the full model to the selection: all, or those where prompt [B, T] is True."""
        if self.method == "griffin":
            s = statistic(z, prompt)
            self.s = s if self.s is None else torch.hypot(self.s, s)  # 4.1.1: s <- sqrt(s^2 + s_G^2)
        elif self.method == "cats" and self.tau is None:  # of the prefill alone
            rows = zip(gate, [slice(None)] * len(gate) if prompt is None else prompt)
            tau = [quantile(g[p].abs().flatten(), 1 - self.density) for g, p in rows]  # (5)
            self.tau = torch.stack(tau) * (self.density < 1)  # at 1 nothing is dropped, not even below the minimum

    def select(self, compact=True):
        """Take the top-k of s (4). One selection for all rows goes to the compact buffers, unless compact is False."""
        compact = compact and type(self.gate_proj.weight) is nn.Parameter  # of a shard there is nothing to gather
        if self.method == "griffin":
            top = self.s.topk(self.kept, dim=-1).indices.sort(dim=-1).values  # [B, k], ascending as in memory
            self.compact = compact and len(top) == 1
            if self.compact:
                self.mask = None
                self.gather(top[0])
            else:
                self.mask = torch.zeros_like(self.s, dtype=torch.bool).scatter_(1, top, True)
        elif self.method == "cats" and compact and len(self.tau) == 1:
            self.tau = self.buffer("tau_k", 1, dtype=self.tau.dtype).copy_(self.tau)
            # Only on a CPU: plain torch cannot pick rows on a GPU without a copy of them and a wait for their number.
            row = self.up_proj.weight[0]
            self.compact = self.correction != "lora" and row.device.type == "cpu" and row.nbytes >= ROW_BYTES
            if self.compact:
                self.stand_by()

    def sparsify(self, gate, z):
        """What the method leaves of z [B, T, F]; the rest is zero."""
        if self.method == "griffin":
            return z * self.mask[:, None]                                           # (3)(4)
        if self.method == "cats":
            return z * (gate.abs() >= self.tau.to(gate.dtype)[:, None, None])       # (5)(6)
        if self.method == "int4":
            return z
        top = z.detach().abs().topk(self.kept, dim=-1).indices                      # oracle, figure 2
        return torch.zeros_like(z).scatter(-1, top, z.gather(-1, top))

    def bare(self, x, gate, z):
        """FF_sparse(x), the masked path: every neuron is computed, the dropped ones are zeroed."""
        if self.method == "int4":
            gate_proj, up_proj, down_proj = self.quantised
            return F.linear(self.act(F.linear(x, gate_proj)) * F.linear(x, up_proj), down_proj)  # appendix D
        return self.down_proj(self.sparsify(gate, z))

    def correct(self, x):
        """What is put back: [B, T, D] -> [B, T, D], x L R as in equation (7) or an alternative to it."""
        if self.correction == "lora":
            return self.lora(x) - self.bare(x, *self.neurons(x))
        h = x @ self.L.to(x.dtype)
        if self.correction == "gated":  # r more neurons, with no special gate: ours, not the paper's
            h = h * self.act(x @ self.G.to(x.dtype))
        return h @ self.R.to(x.dtype)

    def lora(self, x):
        """The sparse FF with W + A B for each of its matrices: appendix C, the baseline that does not fuse."""
        low_rank = lambda x, A, B: x @ A.to(x.dtype) @ B.to(x.dtype)
        gate = self.act(self.gate_proj(x) + low_rank(x, self.gate_A, self.gate_B))
        z = self.sparsify(gate, gate * (self.up_proj(x) + low_rank(x, self.up_A, self.up_B)))
        return self.down_proj(z) + low_rank(z, self.down_A, self.down_B)

    def sparse(self, x, gate, z):
        """FF_sparse(x) plus the correction, the masked path."""
        return self.bare(x, gate, z) + self.correct(x)

    def buffer(self, name, *shape, dtype=None):
        """The tensor self.<name> of this shape, in the weights' dtype, where it was before if it was there."""
        like, old = self.gate_proj.weight, getattr(self, name, None)
        dtype = dtype or like.dtype
        if old is None or (old.shape, old.dtype, old.device) != (shape, dtype, like.device):
            setattr(self, name, torch.empty(shape, dtype=dtype, device=like.device))
        return getattr(self, name)

    @torch.no_grad()
    def gather(self, top):
        """Copy neurons top [k] into [Wg_k], [W1_k | L], [W2_k ; R]; the buffers keep their addresses.

        A gated correction is r neurons more: its G stands below Wg_k. LoRA's factors stay by themselves.
        """
        k, D, lora = len(top), self.gate_proj.in_features, self.correction == "lora"
        r = 0 if lora else self.L.shape[1]
        gate = self.buffer("gate_k", k + r * (self.correction == "gated"), D)
        up, down = self.buffer("up_k", k + r, D), self.buffer("down_k", D, k + r)
        torch.index_select(self.gate_proj.weight, 0, top, out=gate[:k])
        torch.index_select(self.up_proj.weight, 0, top, out=up[:k])
        torch.gather(self.down_proj.weight, 1, top.expand(D, -1), out=down[:, :k])
        if lora:
            for name, p in self.learned().items():
                at = {"gate_B": (slice(None), top), "up_B": (slice(None), top), "down_A": top}.get(name, slice(None))
                self.buffer(f"{name}_k", *p[at].T.shape).copy_(p[at].T)
        else:
            up[k:], down[:, k:] = self.L.T, self.R.T
            if self.correction == "gated":
                gate[k:] = self.G.T

    def decode(self, x):
        """The compact path: x [B, T, D] -> [B, T, D]."""
        if self.method == "cats":
            return self.decode_cats(x)
        if self.correction == "lora":
            return self.decode_lora(x)
        return self.fused(x)

    def fused(self, x):
        """FF_sparse(x) + x L R by three small dense products: x [B, T, D] -> [B, T, D]."""
        z = F.linear(x, self.up_k)                                       # x [W1_k, L]                     (9)
        z[..., :len(self.gate_k)] *= self.act(F.linear(x, self.gate_k))  # times [act(x Wg_k), 1_r]        (9)
        return F.linear(z, self.down_k)                                  # z+ [W2_k ; R]                  (10)

    def decode_lora(self, x):
        """W_k + A B_k for each matrix: two products, one after the other, beside each of the three."""
        low_rank = lambda x, A, B: F.linear(F.linear(x, A), B)
        gate = self.act(F.linear(x, self.gate_k) + low_rank(x, self.gate_A_k, self.gate_B_k))
        z = gate * (F.linear(x, self.up_k) + low_rank(x, self.up_A_k, self.up_B_k))
        return F.linear(z, self.down_k) + low_rank(z, self.down_A_k, self.down_B_k)

    @torch.no_grad()
    def stand_by(self):
        """CATS knows its neurons only token by token: gather none, but the correction, and W2 by neuron [F, D]."""
        self.gather(torch.empty(0, dtype=torch.long))
        if not hasattr(self, "down_rows"):
            self.down_rows = self.down_proj.weight.T.contiguous()

    def decode_cats(self, x):
        """(5)(6) for one token [1, 1, D], reading of W1 and W2 only the rows whose gate passes; + x L R."""
        if x.shape[0] * x.shape[1] > 1:  # tokens differ in their rows
            return self.sparse(x, *self.neurons(x))
        gate = self.act(self.gate_proj(x)).flatten()                                     # [F], dense
        rows = (gate.abs() >= self.tau.to(gate.dtype)).nonzero().flatten()               # [n]         (5)
        z = gate[rows] * dot_rows(self.up_proj.weight, rows, x.view(1, -1))              # [n]
        out = add_rows(self.down_rows, rows, z).view(x.shape)                            # [1, 1, D]   (6)
        return out + self.fused(x) if self.rank else out


def dot_rows(weight, rows, x):
    """weight[rows] @ x: weight [N, D], rows [n] ascending, x [1, D] -> [n]. Reads those rows only, where torch can."""
    if weight.dtype not in (torch.float32, torch.float64):
        return F.linear(x, weight).flatten()[rows]  # the dense product is faster than one on copies of the rows
    with warnings.catch_warnings():  # torch calls sparse tensors a beta
        warnings.simplefilter("ignore")
        want = torch.sparse_csr_tensor(torch.tensor([0, len(rows)]), rows, x.new_zeros(len(rows)), (1, len(weight)),
                                       check_invariants=False)
    return torch.sparse.sampled_addmm(want, x, weight.T, beta=0.0).values()


def add_rows(weight, rows, z):
    """z @ weight[rows]: weight [N, D], rows [n], z [n] -> [D]. Blocks of 512 bytes and more occupy all threads."""
    most = max(1, weight.shape[1] * weight.element_size() // 512)
    blocks = math.gcd(weight.shape[1], 1 << most.bit_length() - 1)
    at = rows * blocks + torch.arange(blocks)[:, None]  # [blocks, n]
    return F.embedding_bag(at.flatten(), weight.view(len(weight) * blocks, -1), torch.arange(blocks) * len(rows),
                           mode="sum", per_sample_weights=z.repeat(blocks)).flatten()


def attach(model, method="griffin", density=0.5, layers=None, rank=0, correction="linear"):
    """Replace the FF blocks of `layers` by SparseFF; attaching again starts afresh. Returns model.

    layers None is the paper's choice: the first half for griffin, all for the others (section 4). rank 0 is the bare
    method. correction: "linear" is the paper's x L R, "gated" r more neurons, "lora" the paper's baseline with as many
    parameters as x L R. int4 has no density. Raises ValueError on an unknown name, density outside (0, 1], a bad layer.
    """
    total = len(model.layers)
    for what, value, known in (("method", method, METHODS), ("correction", correction, CORRECTIONS)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; these are: {', '.join(known)}")
    if method == "int4" and correction == "lora":
        raise ValueError("lora is the baseline of the sparse methods; it is not implemented on top of int4")
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, but it must lie in (0, 1]")
    if not 0 <= rank <= model.config.hidden_size:
        raise ValueError(f"rank is {rank}, but it must lie in 0..{model.config.hidden_size}, the model's hidden_size")
    layers = range(total // 2 if method == "griffin" else total) if layers is None else layers
    if not all(0 <= i < total for i in layers):
        raise ValueError(f"layers {list(layers)} must lie in 0..{total - 1}")
    detach(model)
    for i in layers:
        model.layers[i].mlp = SparseFF(model.layers[i].mlp, method, density, rank, correction)
    return model


def detach(model):
    """Put the full FF blocks back. Returns model."""
    for layer in model.layers:
        if isinstance(layer.mlp, SparseFF):
            layer.mlp = layer.mlp.replaced[0]
    return model


def sparse_layers(model):
    """{layer index: its SparseFF}, in order; empty if nothing is attached."""
    return {i: layer.mlp for i, layer in enumerate(model.layers) if isinstance(layer.mlp, SparseFF)}


def reset(model):
    """Forget all sequences: to be called before a prefill."""
    for ff in sparse_layers(model).values():
        ff.reset()


def select(model, compact=True):
    """Take the selection from all tokens counted so far: after a prefill, and at each reselection."""
    for ff in sparse_layers(model).values():
        ff.select(compact)


def fixed(model):
    """Does a decode step find all of its state at the same addresses, whatever the prompt and the selection?"""
    return all(ff.mask is None and ff.tau is getattr(ff, "tau_k", None) for ff in sparse_layers(model).values())


def take(model, rows):
    """Continue with these rows [n] only, as Cache.take does; a selection that all rows share stays as it is."""
    for ff in sparse_layers(model).values():
        for name in ("s", "mask", "tau"):
            state = getattr(ff, name)
            if state is not None and len(state) > 1:
                setattr(ff, name, state[rows])


def added_parameters(model):
    """Parameters of the correction as a fraction of the model's own (figure 6)."""
    added = sum(p.numel() for ff in sparse_layers(model).values() for p in ff.learned().values())
    return added / (sum(p.numel() for p in model.parameters()) - added)


def fingerprint(model):
    """A short hash of the base model's shape and of a few weights, the same in float32 and bfloat16."""
    config = model.config
    sample = torch.cat([model.model["norm"].weight, model.model["embed_tokens"].weight[:8].flatten()])
    text = f"{config.hidden_size} {config.intermediate_size} {config.num_hidden_layers} {config.vocab_size}"
    raw = sample.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(text.encode() + raw).hexdigest()[:16]


def save_adapter(model, file):
    """Write the correction and, as metadata, what it belongs to (safetensors); ValueError if none is attached."""
    layers = sparse_layers(model)
    if not layers:
        raise ValueError("no sparse method is attached, so there is no adapter to save")
    first = next(iter(layers.values()))
    about = {"method": first.method, "density": first.density, "correction": first.correction,
             "layers": list(layers), "model": fingerprint(model)}
    tensors = {f"model.layers.{i}.mlp.{name}": p.detach().to("cpu", torch.float32).contiguous()
               for i, ff in layers.items() for name, p in ff.learned().items()}
    save_tensors(tensors, file, about)


def save_tensors(tensors, file, about):
    """Write {name: tensor} and a JSON description under a temporary name, then rename; OSError if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    try:
        save_file(tensors, f"{file}.tmp", metadata={"caprese": json.dumps(about)})  # one key: two vary in order
        os.replace(f"{file}.tmp", file)
    except (OSError, SafetensorError) as e:
        if os.path.exists(f"{file}.tmp"):
            os.remove(f"{file}.tmp")
        raise OSError(f"cannot write {file} ({e}); what was there before is intact") from None


def load_tensors(file):
    """({name: tensor}, the JSON description or None) of such a file; ValueError if it is not readable."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(str(file), framework="pt") as f:
            about = json.loads((f.metadata() or {}).get("caprese", "null"))
            return {name: f.get_tensor(name) for name in f.keys()}, about
    except (SafetensorError, ValueError) as e:
        raise ValueError(f"{file} is not a readable safetensors file ({e})") from None


def load_adapter(model, file, density=None):
    """Attach the method that an adapter was made for, with its correction. Returns model.

    density None is the one it was trained at. A method attached before must be the adapter's, on the same layers.
    Raises FileNotFoundError, or ValueError for a file of another kind, model or method.
    """
    if not os.path.exists(file):
        raise FileNotFoundError(f"adapter {file} does not exist; python distill.py makes one")
    tensors, about = load_tensors(file)
    if about is None or "method" not in about:
        raise ValueError(f"{file} is not a Caprese adapter: its metadata says nothing of one")
    if about["model"] != fingerprint(model):
        raise ValueError(f"{file} was made for another model (its {about['model']}, this {fingerprint(model)})")
    attached = sparse_layers(model)
    if attached:
        first = next(iter(attached.values()))
        if (first.method, list(attached)) != (about["method"], about["layers"]):
            raise ValueError(f"{file} is for {about['method']} on layers {about['layers']}, "
                             f"not for {first.method} on layers {list(attached)}")
    attach(model, about["method"], density or about["density"], about["layers"], 0, about.get("correction", "linear"))
    for i, ff in sparse_layers(model).items():
        ff.put(**{name: tensors[f"model.layers.{i}.mlp.{name}"] for name in ff.learned()})
    return model
