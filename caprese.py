"""The paper, equation by equation: GRIFFIN, CATS, top-k, 4-bit, and the low-rank correction x L R.

Letters in the shape comments: B batch, T tokens, D hidden_size, F intermediate_size, k kept
neurons, r rank.

`attach(model, "griffin", density=0.5, rank=16)` replaces gated MLPs by SparseFF, which is called as
they are: x in, y out. What a call means is the phase of the model, set by `with phase(model, ...)`:

    full      the original FF (the default)
    prompt    the original FF, and its tokens are counted for the selection
    sparse    FF_sparse(x) + x L R by the last selection: decoding
    mixed     teacher-forced: a mask says which tokens are generated; the others select for them

To change the method, change one of: statistic (what makes a neuron worth keeping),
SparseFF.sparsify (what is dropped), SparseFF.correction (what is put back). For GRIFFIN change
SparseFF.gather and fused as well, which do the same on the kept neurons alone.
"""

import hashlib
import json
import math
import weakref
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

METHODS = ("griffin", "cats", "topk", "int4")


# ---- what the prompt says about the neurons

def statistic(z, counted=None):
    """GRIFFIN's s, over the tokens where counted [B, T] is True: z [B, T, F] -> [B, F].

    Zbar_i = |Z_i| / ||Z_i||_2 for each token i, then s_j = ||Zbar[:, j]||_2 for each neuron j.
    Squared, s is the sum of the tokens' energies, each weighted by the inverse of its total.
    """
    sum_dtype = torch.promote_types(z.dtype, torch.float32)  # bfloat16 is too coarse for long sums
    chunk = 64 if z.device.type == "cpu" else z.shape[1]     # tokens that fit into a CPU's cache
    s_squared = torch.zeros(len(z), 1, z.shape[2], dtype=sum_dtype, device=z.device)
    for start in range(0, z.shape[1], chunk):
        energy = z[:, start:start + chunk].to(sum_dtype).square()  # [B, chunk, F]
        weight = energy.sum(-1).clamp_min(1e-30).reciprocal()      # [B, chunk], 1 / ||Z_i||^2
        if counted is not None:
            weight = weight * counted[:, start:start + chunk]
        s_squared += weight[:, None] @ energy
    return s_squared[:, 0].sqrt()


def quantile(values, q):
    """The linearly interpolated q-quantile of values [N], as a float32 scalar tensor.

    torch.quantile computes the same, but it refuses more than 16M values.
    """
    values = values.float()
    position = q * (len(values) - 1)
    low = values.kthvalue(math.floor(position) + 1).values
    high = values.kthvalue(math.ceil(position) + 1).values
    return torch.lerp(low, high, position % 1)


def threshold(gate, density, counted=None):
    """The tau of CATS' equation (5): gate [B, T, F] -> [B] float32.

    One number per row: the (1 - density) quantile of |gate| over all counted tokens and neurons.
    At density 1 it is 0, so that nothing is dropped.
    """
    if density == 1:
        return torch.zeros(len(gate), device=gate.device)
    rows = gate if counted is None else [row[mask] for row, mask in zip(gate, counted)]
    return torch.stack([quantile(row.abs().flatten(), 1 - density) for row in rows])  # (5)


def quantise(weight, group=64):
    """Round weight [out, in] to 4 bits: `group` neighbours along `in` share a scale and an offset.

    Returns the rounded values in the weight's own shape and dtype (appendix D). This simulates the
    quality of 4 bits, not their speed.
    """
    size = math.gcd(group, weight.shape[1])
    w = weight.detach().float().unflatten(1, (-1, size))  # [out, groups, size]
    low, high = w.aminmax(dim=-1, keepdim=True)
    scale = (high - low).clamp_min(1e-12) / 15
    rounded = ((w - low) / scale).round() * scale + low
    return rounded.flatten(1).to(weight.dtype)


# ---- the sparse FF block

class Phase:
    """What the calls of a model mean at present; all its sparse layers share one such object."""
    name = "full"
    mask = None  # bool [B, T]. prompt: the tokens to count (None: all). mixed: the generated ones.
    set_by_hand = False  # by `with phase(...)`; then the hooks on a transformers model do nothing
    hooks = ()
    filled = None  # the KV cache of the last hooked call, as a weakref, and how much it held then


class SparseFF(nn.Module):
    """Stands in for a gated MLP with gate_proj, up_proj, down_proj and act_fn.

    The base weights are the MLP's own Linears. The module's own parameters are the correction,
    L [D, r] and R [r, D] in float32; decoding takes them up at the next select(). What a decode
    step reads are buffers that keep their addresses as long as their shapes stay, so that a
    captured CUDA graph stays valid.
    """
    correction_name = "linear"  # in the metadata of an adapter

    def __init__(self, mlp, method, density, rank, phase):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.original = [mlp]  # in a list, so that its weights are not registered a second time
        self.method, self.density, self.phase = method, density, phase
        self.num_kept = max(1, round(density * self.gate_proj.out_features))  # k
        self.statistic = None  # of the prompt so far: GRIFFIN's s [B, F] or CATS' tau [B]
        self.compact = False   # True: decode on the gathered buffers gate_k, up_k, down_k
        # Otherwise by `selection`, for each row GRIFFIN's mask [B, F] or CATS' tau [B].
        for name in ("selection", "gate_k", "up_k", "down_k"):
            self.register_buffer(name, None, persistent=False)
        self.new_adapter(rank)
        if method == "int4":
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(mlp, name).weight
                self.register_buffer(f"{name}_int4", quantise(weight), persistent=False)

    def new_adapter(self, rank):
        """Create L and R. R is zero, so that training starts from the sparse method exactly."""
        D, device = self.gate_proj.in_features, self.gate_proj.weight.device
        self.L = nn.Parameter(torch.randn(D, rank, device=device) * D ** -0.5)
        self.R = nn.Parameter(torch.zeros(rank, D, device=device))

    def set_adapter(self, L, R):
        """Take L [D, r] and R [r, D] as the correction; r may be another than before.

        Raises ValueError if the shapes do not fit or a value is not finite.
        """
        D, device = self.gate_proj.in_features, self.gate_proj.weight.device
        fits = L.dim() == 2 and len(L) == D and R.shape == (L.shape[1], D)
        if not fits or not L.isfinite().all() or not R.isfinite().all():
            raise ValueError(f"L, R must have the shapes [{D}, r], [r, {D}] and finite values")
        self.L = nn.Parameter(L.detach().to(device, torch.float32).contiguous())
        self.R = nn.Parameter(R.detach().to(device, torch.float32).contiguous())

    def adapter_parameters(self):
        """{name: parameter} of the correction."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, x):
        """x [B, T, D] -> [B, T, D], by the phase of the model."""
        phase, mask = self.phase.name, self.phase.mask
        if phase == "sparse" and self.compact:
            return self.fused(x)
        gate, z = self.neurons(x)
        if phase == "sparse":
            return self.sparse(x, gate, z, self.selection)
        if phase == "mixed":
            return self.mixed(x, gate, z, mask)
        if phase == "prompt":
            self.count(gate, z, mask)
        return self.down_proj(z)  # (2)

    def neurons(self, x):
        """act(x Wg) and Z = FF1(x), both [B, T, F]."""
        gate = self.act_fn(self.gate_proj(x))
        return gate, gate * self.up_proj(x)  # (1)

    # -- selection

    @torch.no_grad()
    def prompt_statistic(self, gate, z, counted=None):
        """GRIFFIN's s [B, F] or CATS' tau [B] of the counted tokens; None for the other methods."""
        if self.method == "cats":
            return threshold(gate, self.density, counted)
        return statistic(z, counted) if self.method == "griffin" else None

    def count(self, gate, z, counted=None):
        """Add tokens of the full model to the statistic."""
        if self.statistic is None:
            self.statistic = self.prompt_statistic(gate, z, counted)
        elif self.method == "griffin":  # CATS' tau is that of the prefill alone
            # Section 4.1.1: sqrt(s^2 + s_G^2).
            self.statistic = torch.hypot(self.statistic, self.prompt_statistic(gate, z, counted))

    def top_neurons(self, s):
        """The top-k neurons of s [B, F] -> [B, k], ascending as in memory."""
        return s.topk(self.num_kept, dim=-1).indices.sort(dim=-1).values

    def row_selection(self, s):
        """What each row keeps: GRIFFIN's mask, s [B, F] -> bool [B, F]; CATS' tau [B] as it is."""
        if self.method != "griffin":
            return s
        return torch.zeros_like(s, dtype=torch.bool).scatter_(1, self.top_neurons(s), True)

    # -- the masked path: every neuron is computed, the dropped ones are zeroed

    def sparsify(self, gate, z, selection):
        """What the method keeps of z [B, T, F]; the rest is zero."""
        if self.method == "griffin":
            return z * selection[:, None]  # (3)
        if self.method == "cats":
            tau = selection.to(gate.dtype)[:, None, None]
            return z * (gate.abs() >= tau)  # (5)
        top = z.detach().abs().topk(self.num_kept, dim=-1).indices  # the oracle of figure 2
        return torch.zeros_like(z).scatter(-1, top, z.gather(-1, top))

    def quantised(self, x):
        """The FF with weights of 4 bits (appendix D): x [B, T, D] -> [B, T, D]."""
        gate = self.act_fn(F.linear(x, self.gate_proj_int4))
        return F.linear(gate * F.linear(x, self.up_proj_int4), self.down_proj_int4)

    def correction(self, x):
        """x L R of equation (7): [B, T, D] -> [B, T, D]."""
        return x @ self.L.to(x.dtype) @ self.R.to(x.dtype)  # (7)

    def sparse(self, x, gate, z, selection):
        """FF_sparse(x) + x L R: [B, T, D] -> [B, T, D]."""
        if self.method == "int4":
            return self.quantised(x) + self.correction(x)
        z = self.sparsify(gate, z, selection)
        return self.down_proj(z) + self.correction(x)  # (4) or (6), and x L R of (7)

    def mixed(self, x, gate, z, generated):
        """FF(x), but sparse() where generated [B, T] is True; the row's other tokens select."""
        selection = self.row_selection(self.prompt_statistic(gate, z, ~generated))
        generated = generated[..., None]
        if self.method == "int4":
            return torch.where(generated, self.sparse(x, gate, z, selection), self.down_proj(z))
        z = torch.where(generated, self.sparsify(gate, z, selection), z)
        return self.down_proj(z) + torch.where(generated, self.correction(x), 0)

    def residual(self, x, generated):
        """FF(x) - FF_sparse(x), which equation (7) regresses on x: [B, T, D] -> [B, T, D]."""
        gate, z = self.neurons(x)
        if self.method == "int4":
            return self.down_proj(z) - self.quantised(x)
        selection = self.row_selection(self.prompt_statistic(gate, z, ~generated))
        return self.down_proj(z - self.sparsify(gate, z, selection))  # (7)

    # -- the compact path: GRIFFIN, when all rows keep the same neurons

    def buffer(self, name, shape, dtype):
        """The buffer of this name and shape: the one that is there, if it fits, else a new one."""
        device, old = self.gate_proj.weight.device, getattr(self, name)
        if old is None or (old.shape, old.dtype, old.device) != (shape, dtype, device):
            setattr(self, name, torch.empty(shape, dtype=dtype, device=device))
        return getattr(self, name)

    def select_rows(self):
        """Decode by the masked path, each row by its own statistic."""
        self.compact, self.gate_k, self.up_k, self.down_k = False, None, None, None
        if self.statistic is not None:
            selection = self.row_selection(self.statistic)
            self.buffer("selection", selection.shape, selection.dtype).copy_(selection)

    @torch.no_grad()
    def gather(self, top):
        """Decode by the compact path: copy neurons top [k] into [Wg_k], [W1_k | L], [W2_k ; R]."""
        D, dtype = self.gate_proj.in_features, self.gate_proj.weight.dtype
        k, r = len(top), self.L.shape[1]
        self.compact, self.selection = True, None
        gate_k = self.buffer("gate_k", (k, D), dtype)
        up_k = self.buffer("up_k", (k + r, D), dtype)
        down_k = self.buffer("down_k", (D, k + r), dtype)
        torch.index_select(self.gate_proj.weight, 0, top, out=gate_k)
        torch.index_select(self.up_proj.weight, 0, top, out=up_k[:k])
        torch.gather(self.down_proj.weight, 1, top.expand(D, -1), out=down_k[:, :k])
        up_k[k:] = self.L.T       # [W1_k, L]   (9)
        down_k[:, k:] = self.R.T  # [W2_k ; R]  (10)

    def fused(self, x):
        """FF_sparse(x) + x L R by three small dense products: [B, T, D] -> [B, T, D]."""
        z = F.linear(x, self.up_k)                        # x [W1_k, L]               (9)
        gate = self.act_fn(F.linear(x, self.gate_k))      # the gate of L's r entries is one
        z[..., :self.num_kept] *= gate                    # times [act(x Wg_k), 1_r]  (9)
        return F.linear(z, self.down_k)                   # z+ [W2_k ; R]             (10)


# ---- a model with sparse FF blocks

def attach(model, method="griffin", density=0.5, layers=None, rank=0, block=SparseFF):
    """Replace the MLPs of `layers` by `block`; attaching again starts afresh. Returns the model.

    layers None is the paper's choice (section 4): the first half for griffin, all for the others.
    rank 0 means no correction. int4 has no density. Raises ValueError on an unknown method, a
    density outside (0, 1], a rank outside 0..hidden_size, layers that the model does not have, or
    MLPs whose Linears have a bias. On a causal model of transformers, hooks set the phase of each
    call: see watch_calls.
    """
    total, hidden_size = len(model.model.layers), model.config.hidden_size
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; these are: {', '.join(METHODS)}")
    if not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density is {density!r}, but it must be a number in (0, 1]")
    if not 0 <= rank <= hidden_size:
        raise ValueError(f"rank is {rank}, but it must lie in 0..{hidden_size}, the hidden_size")
    if layers is None:
        layers = range(max(1, total // 2) if method == "griffin" else total)
    known = set(layers) & set(range(total))
    if not 0 < len(known) == len(layers):
        raise ValueError(f"layers are {layers}, but must be different numbers in 0..{total - 1}")
    detach(model)
    if any(model.model.layers[i].mlp.gate_proj.bias is not None for i in layers):
        raise ValueError("the MLPs of this model have biases, which is not implemented")
    shared_phase = Phase()
    for i in layers:
        layer = model.model.layers[i]
        layer.mlp = block(layer.mlp, method, density, rank, shared_phase)
    if hasattr(model, "generate"):  # a model of transformers; ours has none
        watch_calls(model, shared_phase)
    return model


def detach(model):
    """Put the original MLPs back. Returns the model."""
    for i, ff in sparse_layers(model).items():
        model.model.layers[i].mlp = ff.original[0]
        for hook in ff.phase.hooks:
            hook.remove()
    return model


def sparse_layers(model):
    """{layer index: its SparseFF}, in order; empty if nothing is attached."""
    mlps = enumerate(layer.mlp for layer in model.model.layers)
    return {i: mlp for i, mlp in mlps if isinstance(mlp, SparseFF)}


@contextmanager
def phase(model, name, mask=None):
    """Within this context the model's calls mean `name`: "full", "prompt", "sparse" or "mixed".

    mask is bool [B, T]. In a prompt it says which tokens are counted (None: all), in a mixed call
    which are generated. In training the context must also surround the backward pass, which may
    recompute activations. Raises ValueError on an unknown name.
    """
    if name not in ("full", "prompt", "sparse", "mixed"):
        raise ValueError(f"unknown phase {name!r}")
    shared = next((ff.phase for ff in sparse_layers(model).values()), Phase())
    before = shared.name, shared.mask, shared.set_by_hand
    shared.name, shared.mask, shared.set_by_hand = name, mask, True
    try:
        yield
    finally:
        shared.name, shared.mask, shared.set_by_hand = before


def reset(model):
    """Forget the prompts counted so far. To be called before a prefill."""
    for ff in sparse_layers(model).values():
        ff.statistic = None


def select(model):
    """Select from all tokens counted so far: after a prefill, and at each reselection.

    If all rows keep the same neurons, GRIFFIN goes to the compact path.
    """
    layers, agree = list(sparse_layers(model).values()), False
    # Of weights that are spread over several devices no neuron can be gathered.
    whole = all(type(ff.gate_proj.weight) is nn.Parameter for ff in layers)
    if layers and layers[0].method == "griffin" and whole:
        tops = torch.stack([ff.top_neurons(ff.statistic) for ff in layers])  # [layers, B, k]
        agree = tops.shape[1] == 1 or torch.equal(tops, tops[:, :1].expand_as(tops))
    for i, ff in enumerate(layers):
        if agree:
            ff.gather(tops[i, 0])
        else:
            ff.select_rows()


def reorder(model, rows):
    """Continue with these rows [n] int64 of the batch; a row may occur several times."""
    for ff in sparse_layers(model).values():
        if ff.statistic is not None:
            ff.statistic = ff.statistic[rows]
        if ff.selection is not None:
            ff.selection = ff.selection[rows]


def teacher_forced(model, tokens, prompt_lengths):
    """Logits of given sequences as decoding sees them: tokens [B, T] int64 -> [B, T, V].

    Positions from prompt_lengths[b] on are generated: they use the sparse FF of their row. The
    positions before use the full FF and select for the row. Raises ValueError where gradients
    would be recorded on a model that recomputes activations: the phase has ended by then.
    """
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if recomputes and torch.is_grad_enabled():
        raise ValueError("with gradient_checkpointing teacher_forced needs torch.no_grad()")
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    lengths = torch.as_tensor(prompt_lengths, device=tokens.device)
    with phase(model, "mixed", positions >= lengths[:, None]):
        output = model(tokens)
    return getattr(output, "logits", output)  # transformers wraps them


# ---- a transformers model: its decoding loop is not ours, so hooks set the phase of each call

def watch_calls(model, shared):
    """Set the phase of each call of a transformers model from the KV cache that the call carries.

    An empty cache begins a prompt, more than one token goes on with it, and one token decodes. (So
    a prompt in chunks must not end in a chunk of one token, which would count as decoded.) What
    would use the full model under the sparse one's name raises ValueError.
    """
    def before(decoder, args, kwargs):
        if shared.set_by_hand:
            return
        # By what it can do: transformers 5.24 renamed the argument past_key_values to cache.
        cache = next((v for v in kwargs.values() if hasattr(v, "get_seq_length")), None)
        if cache is None:
            raise ValueError("without a KV cache no prompt selects; see caprese.teacher_forced")
        if model.training:
            raise ValueError("the sparse model is for inference: call model.eval() first")
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        start, count = int(cache.get_seq_length()), tokens.shape[1]
        if start == 0:
            reset(model)
        elif shared.filled != (weakref.ref(cache), start):
            raise ValueError("the sparse model must have filled this KV cache itself, from empty")
        elif count > 1 and next(iter(sparse_layers(model).values())).method == "cats":
            raise ValueError("CATS' tau needs the whole prompt in one call, not in chunks")
        shared.filled = weakref.ref(cache), start + count
        shared.name = "prompt" if start == 0 or count > 1 else "sparse"
        shared.mask = padding_mask(kwargs.get("attention_mask"), start, count)

    def after(decoder, args, output):
        if shared.set_by_hand or shared.name == "full":  # the latter: `before` refused the call
            return
        prompt, filled = shared.name == "prompt", shared.filled
        shared.name, shared.mask, shared.filled = "full", None, None
        if output is None:  # the call has failed, so nothing may go on with its cache
            return
        if prompt:
            select(model)
        shared.filled = filled

    def refuse_assisted(model, args, kwargs):
        if kwargs.get("logits_to_keep") not in (None, 0, 1) and not shared.set_by_hand:
            raise ValueError("assisted generation is refused: here the full model would answer")

    shared.hooks = (model.register_forward_pre_hook(refuse_assisted, with_kwargs=True),
                    model.model.register_forward_pre_hook(before, with_kwargs=True),
                    model.model.register_forward_hook(after, always_call=True))


def padding_mask(attention_mask, start, count):
    """Which of `count` tokens from position `start` on are no padding: bool [B, count], or None.

    attention_mask is what transformers gives to a decoder: None, [B, keys] of ones and zeros, or
    [B, 1, count, keys] of bools or of 0 and -inf, alone or in a dictionary by kinds of layers.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask[min(attention_mask)]  # full before sliding_attention
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, start:start + count].bool()
    # All tokens but padding see themselves, in a sliding window as well.
    start = min(start, attention_mask.shape[-1] - count)
    sees_itself = attention_mask[:, 0].diagonal(start, -2, -1)[:, :count]
    return sees_itself if sees_itself.dtype == torch.bool else sees_itself == 0


# ---- counting parameters

def correction_parameters(model):
    """{"layer.name": parameter} of the whole correction."""
    return {f"{i}.{name}": parameter for i, ff in sparse_layers(model).items()
            for name, parameter in ff.adapter_parameters().items()}


def added_parameters(model):
    """Parameters of the correction, as a fraction of the model's own (figure 6)."""
    added = sum(p.numel() for p in correction_parameters(model).values())
    return added / (sum(p.numel() for p in model.parameters()) - added)


def active_parameters(model):
    """Parameters that one generated token uses: without dropped neurons, with the correction.

    CATS needs all of Wg to choose its neurons. The oracle top-k needs all of everything.
    """
    active = sum(p.numel() for p in model.parameters())
    for ff in sparse_layers(model).values():
        selected = {"griffin": ff.parameters(), "cats": (ff.up_proj.weight, ff.down_proj.weight)}
        intermediate_size = ff.gate_proj.out_features
        for p in selected.get(ff.method, ()):
            if intermediate_size in p.shape:  # it has a part for each neuron
                active -= p.numel() // intermediate_size * (intermediate_size - ff.num_kept)
    return active


def weights_read(model):
    """How many weights a decode step reads: (of the full model, of the sparse one).

    It reads one row of an embedding table that is not the head as well.
    """
    unread = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    full = sum(p.numel() for p in model.parameters())
    full -= sum(p.numel() for p in correction_parameters(model).values())
    return full - unread, active_parameters(model) - unread


# ---- adapters on disk

def fingerprint(model):
    """A short hash of the base model's shape and of a few weights.

    It is the same in float32 and in bfloat16.
    """
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    shape = " ".join(str(getattr(model.config, name)) for name in names)
    weights = torch.cat([model.model.norm.weight, model.model.embed_tokens.weight[:8].flatten()])
    raw = weights.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(shape.encode() + raw).hexdigest()[:16]


def save_adapter(model, file):
    """Write the correction to a safetensors file; its metadata say what it belongs to.

    Raises ValueError if nothing is attached, OSError if the file cannot be written.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError("no sparse method is attached, so there is no adapter to save")
    tensors = {f"model.layers.{i}.mlp.{name}": parameter.float() for i, ff in layers.items()
               for name, parameter in ff.adapter_parameters().items()}
    ff = next(iter(layers.values()))
    about = {"method": ff.method, "density": ff.density, "correction": ff.correction_name,
             "layers": list(layers), "model": fingerprint(model)}
    save_tensors(tensors, file, about)


def load_adapter(model, file, density=None, block=SparseFF):
    """Attach the method that an adapter was made for, with its correction. Returns the model.

    density None is the one that it was trained at. Raises FileNotFoundError, or ValueError for a
    file of another kind, or for a correction that does not fit this model.
    """
    tensors, about = read_adapter(file)
    for key, value in {"model": fingerprint(model), "correction": block.correction_name}.items():
        if about.get(key) != value:
            raise ValueError(f"{file} was made for another {key}: {about.get(key)}, not {value}")
    try:
        density = about.get("density") if density is None else density
        attach(model, about.get("method"), density, about.get("layers") or [], 0, block)
        for i, ff in sparse_layers(model).items():
            mlp = f"model.layers.{i}.mlp"
            ff.set_adapter(**{name: tensors[f"{mlp}.{name}"] for name in ff.adapter_parameters()})
    except (ValueError, TypeError, KeyError) as error:
        detach(model)
        raise ValueError(f"{file} does not fit this model, or lacks a tensor: {error}") from None
    return model


def read_adapter(file):
    """({name: tensor}, what the metadata say) of an adapter; FileNotFoundError or ValueError."""
    if not Path(file).exists():
        raise FileNotFoundError(f"adapter {file} does not exist; python distill.py makes adapters")
    tensors, about = load_tensors(file)
    if not isinstance(about, dict) or "method" not in about:
        raise ValueError(f"{file} is not a Caprese adapter: its metadata do not name a method")
    return tensors, {"correction": "linear"} | about  # the first adapters do not say so


def save_tensors(tensors, file, about):
    """Write {name: tensor} and a JSON description under a temporary name, then rename.

    Raises OSError if that fails; the file that was there before is intact then.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = Path(f"{file}.tmp")
    try:  # one key, for the order of several varies
        save_file(tensors, temporary, metadata={"caprese": json.dumps(about)})
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {file} ({error}); what was there before is intact") from None


def load_tensors(file):
    """({name: tensor}, the JSON description or None) of such a file; ValueError if unreadable."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get("caprese", "null"))
            return {name: opened.get_tensor(name) for name in opened.keys()}, about
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from None
