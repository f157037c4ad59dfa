"""The paper, equation by equation: GRIFFIN, CATS and the low-rank correction x L R.

Letters in the shape comments: B batch, T tokens, S prompt tokens, D hidden_size, V vocab_size, k
kept neurons, r rank, F intermediate_size (F_ in code, where F is torch.nn.functional).

`attach(model, "griffin", density=0.5, rank=16)` puts a GRIFFIN, a SparseFF, in place of each gated
MLP. Like the MLP it maps x to y. What it computes depends on the phase of the model's call, which
is set by `with phase(model, ...)`:

    full             the original FF (the default)
    count            the original FF; its tokens are counted for the selection
    decode           FF_sparse(x) + x L R by the last selection
    teacher_forced   a mask says which tokens are generated. They are as in decode, the others as in
                     full, and the others of a row (its prompt) select for it

To change the method, write a subclass and hand it to attach, or to a script by --block
module:Class. Change `statistic` and `merge` (what makes a neuron worth keeping), `sparsify` (what
is dropped) or `correction` (what is put back). The fused path would ignore a change of the last two
alone; `may_gather`, at the end of this file, notices it, and decoding takes the masked path.
beyond/forks.py refuses a class that cannot work.
"""

import hashlib
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

PHASES = ("full", "count", "decode", "teacher_forced")
NOTHING_COUNTED = "no prompt selects: run one in the phase count, then call caprese.select"


# ---- the sparse FF block

class SparseFF(nn.Module):
    """Stands in for a gated MLP with gate_proj, up_proj, down_proj and act_fn.

    The base weights are the MLP's own Linears. The module's own parameters are the correction,
    L [D, r] and R [r, D] in float32. A method is a subclass, which must have

        reset()                             forget the tokens counted so far
        count(x, gate, z, counted)          remember what the counted tokens [B, T] say
        select()                            select from the tokens counted so far
        selection(x, gate, z, counted)      what the counted tokens select, nothing is remembered
        sparsify(x, gate, z, selection)     z [B, T, F] with the dropped neurons at zero
        decode(x)                           sparse(...) by the last selection, [B, T, D]

    where gate and z are those of `neurons`. What is selected is kept [B, F] in GRIFFIN, tau [B] in
    CATS. select() stores it for decode(); selection() returns it, for teacher forcing and (7).
    """
    row_state = ()       # names of the method's tensors that have an entry for each row of a batch
    gathers = False      # True: it may decode on gathered neurons, by `gather` and `fused`
    sparse_matrices = 0  # of how many of Wg, W1 and W2 a generated token reads kept neurons alone

    def __init__(self, mlp, density, rank, call):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.original = [mlp]  # in a list, so that its weights are not registered a second time
        self.density, self.call = density, call
        self.num_kept = max(1, round(density * self.gate_proj.out_features))  # k
        for name in self.row_state:
            self.register_buffer(name, None, persistent=False)
        self.new_adapter(rank)

    @staticmethod
    def default_layers(num_layers):
        """The layers that the paper makes sparse (section 4)."""
        return range(num_layers)

    def forward(self, x):
        """x [B, T, D] -> [B, T, D], by the phase of the call."""
        if self.call.phase == "decode":
            return self.decode(x)
        if self.call.phase == "teacher_forced":
            return self.teacher_forced(x, self.call.generated.to(x.device))
        gate, z = self.neurons(x)
        if self.call.phase == "count":
            counted = self.call.counted
            self.count(x, gate, z, None if counted is None else counted.to(x.device))
        return self.down_proj(z)  # (2)

    def neurons(self, x):
        """act(x Wg) and Z = FF1(x), both [B, T, F]."""
        gate = self.act_fn(self.gate_proj(x))
        return gate, gate * self.up_proj(x)  # (1)

    # -- the correction

    @torch.inference_mode(False)  # a parameter made in inference mode never gets a gradient
    def new_adapter(self, rank):
        """Create L and R. R is zero, so that training starts from the sparse method exactly."""
        D, device = self.gate_proj.in_features, self.gate_proj.weight.device
        L = torch.randn(D, rank, device=device, dtype=torch.float32) * D ** -0.5
        self.L = nn.Parameter(L)
        self.R = nn.Parameter(torch.zeros(rank, D, device=device, dtype=torch.float32))

    @torch.inference_mode(False)
    def set_adapter(self, L, R):
        """Take L [D, r] and R [r, D] as the correction; r may be another than before.

        The compact path copies them at the next select(), all else reads them at once. Raises
        ValueError if the shapes do not fit or a value is not finite.
        """
        D, device = self.gate_proj.in_features, self.gate_proj.weight.device
        fits = L.dim() == 2 and len(L) == D and R.shape == (L.shape[1], D)
        if not fits or not L.isfinite().all() or not R.isfinite().all():
            raise ValueError(f"L, R must have the shapes [{D}, r], [r, {D}] and finite values")
        self.L = nn.Parameter(L.detach().to(device, torch.float32).contiguous().clone())
        self.R = nn.Parameter(R.detach().to(device, torch.float32).contiguous().clone())

    def adapter_parameters(self):
        """{name: parameter} of the correction."""
        return dict(self.named_parameters(recurse=False))

    def correction(self, x):
        """x L R: [B, T, D] -> [B, T, D]."""
        return x @ self.L.to(x.dtype) @ self.R.to(x.dtype)  # (7)

    # -- the masked path: every neuron is computed, the dropped ones are zeroed

    def sparse(self, x, gate, z, selection):
        """FF_sparse(x) + x L R: [B, T, D] -> [B, T, D]."""
        z = self.sparsify(x, gate, z, selection)   # (3) or (5)
        return self.down_proj(z) + self.correction(x)  # (4) or (6), and x L R of (7)

    def teacher_forced(self, x, generated):
        """FF(x), but sparse() where generated [B, T] is True: [B, T, D] -> [B, T, D]."""
        gate, z = self.neurons(x)
        selection = self.selection(x, gate, z, ~generated)  # the prompt selects, as in a prefill
        sparse = self.sparse(x, gate, z, selection)
        return torch.where(generated[..., None], sparse, self.down_proj(z))

    def residual(self, x, generated):
        """FF(x) - FF_sparse(x), what (7) regresses on x: [B, T, D] -> [B, T, D]."""
        gate, z = self.neurons(x)
        selection = self.selection(x, gate, z, ~generated)
        # down_proj is linear and has no bias, so the difference may be taken before it.
        return self.down_proj(z - self.sparsify(x, gate, z, selection))

    def active_parameters(self):
        """How many parameters a generated token reads: kept neurons and the correction."""
        D, F_ = self.gate_proj.in_features, self.gate_proj.out_features
        dropped = self.sparse_matrices * D * (F_ - self.num_kept)
        return sum(p.numel() for p in self.parameters()) - dropped

    # -- state

    def reorder(self, rows):
        """Keep these rows [n] int64 of the batch, in this order; a row may occur several times."""
        for name in self.row_state:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[rows])

    def buffer(self, name, shape, dtype):
        """The buffer of this name: the one that is there, if it fits, else a new one.

        A captured CUDA graph stays valid as long as buffers keep their addresses.
        """
        device, old = self.gate_proj.weight.device, getattr(self, name)
        if old is None or (old.shape, old.dtype, old.device) != (shape, dtype, device):
            with torch.inference_mode(False):  # or autograd could never use the buffer
                setattr(self, name, torch.empty(shape, dtype=dtype, device=device))
        return getattr(self, name)


# ---- GRIFFIN: one choice of neurons for a whole sequence

class GRIFFIN(SparseFF):
    """Keeps the k neurons with the largest statistic s over the prompt.

    s [B, F] is the statistic of the tokens counted so far. If all rows keep the same neurons, as a
    single row always does, they are gathered, and three small dense products decode: the compact
    path. Otherwise each row has its mask, kept [B, F].
    """
    row_state = ("s", "kept")
    gathers = True
    sparse_matrices = 3

    def __init__(self, mlp, density, rank, call):
        super().__init__(mlp, density, rank, call)
        self.compact = False  # True: decode by the compact path, on these buffers
        for name in ("gate_k", "up_k", "down_k"):
            self.register_buffer(name, None, persistent=False)

    @staticmethod
    def default_layers(num_layers):
        """The first half; in all layers GRIFFIN hurts too much (section 4)."""
        return range(max(1, num_layers // 2))

    def statistic(self, x, gate, z, counted=None):
        """s over the tokens where counted [B, T] is True: z [B, T, F] -> [B, F].

        Zbar_i = |Z_i| / ||Z_i||_2 for each token i, then s_j = ||Zbar[:, j]||_2 for each neuron j.
        Norms do not see signs, so the code leaves the absolute value out.
        """
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # bfloat16 is too coarse for sums
        Zbar = F.normalize(z, dim=-1)                           # [B, T, F]
        if counted is not None:
            Zbar = Zbar * counted[..., None]
        return Zbar.norm(dim=1)                                 # [B, F], s

    def merge(self, s, s_G):
        """The statistic of all tokens, from those of the earlier and of the later ones: [B, F]."""
        return torch.hypot(s, s_G)  # section 4.1.1: sqrt(s^2 + s_G^2)

    def reset(self):
        """Forget the tokens counted so far."""
        self.s = None

    @torch.no_grad()
    def count(self, x, gate, z, counted):
        new = self.statistic(x, gate, z, counted)
        self.s = new if self.s is None else self.merge(self.s, new)

    def top_neurons(self, s):
        """The top-k neurons of s [B, F] -> [B, k], ascending as in memory."""
        return s.topk(self.num_kept, dim=-1).indices.sort(dim=-1).values

    @torch.no_grad()
    def selection(self, x, gate, z, counted):
        s = self.statistic(x, gate, z, counted)
        return self.mask(self.top_neurons(s))

    def mask(self, neurons):
        """Kept neurons [B, k] -> bool [B, F]."""
        F_, device = self.gate_proj.out_features, neurons.device
        mask = torch.zeros(len(neurons), F_, dtype=torch.bool, device=device)
        return mask.scatter_(1, neurons, True)

    def sparsify(self, x, gate, z, kept):
        return z * kept[:, None]  # (3)

    @torch.no_grad()
    def select(self):
        if self.s is None:
            raise ValueError(NOTHING_COUNTED)
        if not self.s.isfinite().all():
            raise ValueError("the statistic of the neurons is inf or NaN; does the dtype overflow?")
        neurons = self.top_neurons(self.s)  # [B, k]
        rows_agree = torch.equal(neurons, neurons[:1].expand_as(neurons))
        self.compact = self.gathers and rows_agree
        if self.compact:
            self.kept = None
            self.gather(neurons[0])
        else:
            self.gate_k, self.up_k, self.down_k = None, None, None
            mask = self.mask(neurons)
            self.buffer("kept", mask.shape, mask.dtype).copy_(mask)

    def decode(self, x):
        if self.compact:
            return self.fused(x)
        if self.kept is None:
            raise ValueError(NOTHING_COUNTED)
        gate, z = self.neurons(x)
        return self.sparse(x, gate, z, self.kept)

    def gather(self, neurons):
        """Copy the kept neurons [k] and the correction into [Wg_k], [W1_k, L], [W2_k ; R].

        All are transposed, [out, in], as F.linear reads them.
        """
        D, dtype = self.gate_proj.in_features, self.gate_proj.weight.dtype
        k, r = len(neurons), self.L.shape[1]
        gate_k = self.buffer("gate_k", (k, D), dtype)
        up_k = self.buffer("up_k", (k + r, D), dtype)
        down_k = self.buffer("down_k", (D, k + r), dtype)
        torch.index_select(self.gate_proj.weight, 0, neurons, out=gate_k)
        torch.index_select(self.up_proj.weight, 0, neurons, out=up_k[:k])
        copy_columns(self.down_proj.weight, neurons, down_k[:, :k])
        up_k[k:] = self.L.T       # [W1_k, L]   (9)
        down_k[:, k:] = self.R.T  # [W2_k ; R]  (10)

    def fused(self, x):
        """FF_sparse(x) + x L R by three small dense products: [B, T, D] -> [B, T, D]."""
        z = F.linear(x, self.up_k)                    # x [W1_k, L]               (9)
        gate = self.act_fn(F.linear(x, self.gate_k))  # the gate of L's r entries is one
        z[..., :self.num_kept] *= gate                # times [act(x Wg_k), 1_r]  (9)
        return F.linear(z, self.down_k)               # z+ [W2_k ; R]             (10)


def copy_columns(weight, columns, out):
    """Copy columns [k] of weight [D, F] into out [D, k].

    Viewed as integers of the same size: on a CPU torch.gather takes twice the time in bfloat16.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    columns = columns.expand(len(weight), -1)  # [D, k]
    torch.gather(weight.detach().view(bits), 1, columns, out=out.view(bits))


# ---- CATS: a choice of neurons for each token, by a threshold for each sequence

class CATS(SparseFF):
    """Keeps, for each token, the neurons whose gate is at least tau [B] in magnitude.

    count() measures prompt_tau; select() makes it tau, which decode() uses.
    """
    row_state = ("prompt_tau", "tau")
    sparse_matrices = 2  # all of Wg is needed to choose the neurons

    def threshold(self, gate, counted=None):
        """tau of (5): gate [B, T, F] -> [B] float32.

        One number for each row: the (1 - density) quantile of |gate| over all counted tokens and
        neurons. At density 1 it is 0, so that nothing is dropped.
        """
        if self.density == 1:
            return torch.zeros(len(gate), device=gate.device)
        rows = gate if counted is None else [row[mask] for row, mask in zip(gate, counted)]
        return torch.stack([quantile(row.abs().flatten(), 1 - self.density) for row in rows])

    @torch.no_grad()
    def selection(self, x, gate, z, counted):
        return self.threshold(gate, counted)

    def sparsify(self, x, gate, z, tau):
        tau = tau.to(gate.dtype)[:, None, None]
        return z * (gate.abs() >= tau)  # (5): T_tau(gate) * x W1, for z is gate * x W1

    def reset(self):
        self.prompt_tau = None

    @torch.no_grad()
    def count(self, x, gate, z, counted):
        if self.prompt_tau is None:  # tau is that of the prefill alone: a reselection keeps it
            self.prompt_tau = self.threshold(gate, counted)

    def select(self):
        if self.prompt_tau is None:
            raise ValueError(NOTHING_COUNTED)
        self.buffer("tau", self.prompt_tau.shape, torch.float32).copy_(self.prompt_tau)

    def decode(self, x):
        if self.tau is None:
            raise ValueError(NOTHING_COUNTED)
        gate, z = self.neurons(x)
        return self.sparse(x, gate, z, self.tau)


def quantile(values, q):
    """The linearly interpolated q-quantile of values [N], as a float32 scalar tensor.

    torch.quantile computes the same, but it refuses more than 16M values.
    """
    values = values.float()
    position = q * (len(values) - 1)
    low = values.kthvalue(math.floor(position) + 1).values
    high = values.kthvalue(math.ceil(position) + 1).values
    return torch.lerp(low, high, position % 1)


METHODS = {"griffin": GRIFFIN, "cats": CATS}


# ---- a model with sparse FF blocks. reset, select and reorder call the blocks' own, layer by layer

class Call:
    """The phase of a model's next call, and its masks; all sparse layers of the model share it."""
    phase = "full"
    counted = None    # bool [B, T]: in phase count, the tokens to count; None means all
    generated = None  # bool [B, T]: in phase teacher_forced, the tokens that are generated
    # Of beyond/in_transformers.py alone: True within `with phase(...)`, and the model's hooks.
    by_hand = False
    hooks = ()


def attach(model, method="griffin", density=0.5, layers=None, rank=0):
    """Replace the MLPs of `layers` by sparse ones; attaching again starts afresh.

    method is a name in METHODS or a subclass of SparseFF. layers None is the paper's choice
    (section 4), "all" is all, else they are indices. rank 0 means no correction. Returns the model,
    which is ours or a causal model of transformers: there, beyond/in_transformers.py sets the phase
    of each call. Raises ValueError on what is out of range or cannot be replaced.
    """
    block = METHODS.get(method, method)
    if not (isinstance(block, type) and issubclass(block, SparseFF)):
        raise ValueError(f"unknown method {method!r}; these are: {', '.join(METHODS)}")
    if type(density) not in (int, float) or not 0 < density <= 1:
        raise ValueError(f"density is {density!r}, but it must be a number in (0, 1]")
    all_layers = decoder(model).layers
    indices = layer_indices(layers, len(all_layers), block)
    if of_transformers(model):
        from beyond import in_transformers
        in_transformers.check(model, indices)
    hidden_size = all_layers[indices[0]].mlp.gate_proj.in_features
    if type(rank) is not int or not 0 <= rank <= hidden_size:
        raise ValueError(f"rank is {rank}, but it must lie in 0..{hidden_size}, the hidden_size")
    gathers = may_gather(block, all_layers[indices[0]].mlp.act_fn)
    detach(model)
    call = Call()
    if of_transformers(model):
        call.hooks = in_transformers.watch(model, call)
    for i in indices:
        ff = block(all_layers[i].mlp, density, rank, call)
        # Weights that are spread over several devices are a DTensor: no neuron can be gathered.
        ff.gathers = gathers and type(ff.gate_proj.weight) is nn.Parameter
        all_layers[i].mlp = ff
    return model


def layer_indices(layers, num_layers, block):
    """The layers that attach's argument means, as sorted indices; ValueError if one is missing."""
    if layers is None:
        return block.default_layers(num_layers)
    if isinstance(layers, str) and layers == "all":
        return range(num_layers)
    if isinstance(layers, int):
        layers = [layers]
    known = set(layers) & set(range(num_layers))
    if not 0 < len(known) == len(layers):
        raise ValueError(f"layers are {layers}, but must be different numbers "
                         f"in 0..{num_layers - 1}")
    return sorted(known)


def detach(model):
    """Put the original MLPs back. Returns the model."""
    for i, ff in sparse_layers(model).items():
        decoder(model).layers[i].mlp = ff.original[0]
        for hook in ff.call.hooks:
            hook.remove()
    return model


def of_transformers(model):
    """Is this a model of transformers? Ours has no generate()."""
    return hasattr(model, "generate")


def decoder(model):
    """The part that holds the layers; models of transformers for text and images nest it.

    Raises ValueError if there is none.
    """
    inner = getattr(model, "model", None)
    found = getattr(inner, "language_model", inner)
    if not hasattr(found, "layers"):
        raise ValueError(f"{type(model).__name__} has no model.layers to replace MLPs in; give a "
                         "causal language model, of PEFT what merge_and_unload() returns")
    return found


def sparse_layers(model):
    """{layer index: its SparseFF}, in order; empty if nothing is attached."""
    mlps = [getattr(layer, "mlp", None) for layer in decoder(model).layers]
    return {i: mlp for i, mlp in enumerate(mlps) if isinstance(mlp, SparseFF)}


@contextmanager
def phase(model, name, counted=None, generated=None):
    """Within this context the model's calls are of the phase `name`, one of PHASES.

    counted, bool [B, T], is for the phase count: which tokens are counted; None means all.
    generated, bool [B, T], is for the phase teacher_forced. In training the context must surround
    the backward pass as well, which may compute activations again. Raises ValueError on an unknown
    name.
    """
    if name not in PHASES:
        raise ValueError(f"unknown phase {name!r}; these are: {', '.join(PHASES)}")
    layers = list(sparse_layers(model).values())
    call = layers[0].call if layers else Call()  # nothing attached: the phase has no effect
    before = call.phase, call.counted, call.generated, call.by_hand
    call.phase, call.counted, call.generated, call.by_hand = name, counted, generated, True
    try:
        yield
    finally:
        call.phase, call.counted, call.generated, call.by_hand = before


def reset(model):
    """Forget the prompts counted so far. To be called before a prefill."""
    for ff in sparse_layers(model).values():
        ff.reset()


def select(model):
    """Select from all tokens counted so far: after a prefill, and at each reselection."""
    for ff in sparse_layers(model).values():
        ff.select()


def reorder(model, rows):
    """Keep these rows [n] int64 of the batch, in this order; a row may occur several times."""
    for ff in sparse_layers(model).values():
        ff.reorder(rows)


def teacher_forced(model, tokens, prompt_lengths):
    """Logits of given sequences as decoding sees them: tokens [B, T] int64 -> [B, T, V].

    Positions from prompt_lengths[b] on are generated: they use the sparse FF of their row. The
    positions before use the full FF and select for the row. Raises ValueError for a length outside
    1..T, and where gradients would be recorded on a model that recomputes activations: the phase
    has ended by then.
    """
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if recomputes and torch.is_grad_enabled():
        raise ValueError("with gradient_checkpointing teacher_forced needs torch.no_grad()")
    lengths = check_lengths(tokens, prompt_lengths)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    with phase(model, "teacher_forced", generated=positions >= lengths[:, None]):
        output = model(tokens)
    return getattr(output, "logits", output)  # transformers wraps them


def check_lengths(tokens, prompt_lengths):
    """prompt_lengths as a tensor [B] int64; ValueError if they are not those of tokens [B, S]."""
    lengths = torch.as_tensor(prompt_lengths, device=tokens.device)
    one_for_each = lengths.shape == (len(tokens),) and not lengths.is_floating_point()
    if not one_for_each or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"prompt_lengths must be {len(tokens)} whole numbers "
                         f"in 1..{tokens.shape[1]}")
    return lengths


def adapter_parameters(model):
    """{"layer.name": parameter} of the whole correction."""
    return {f"{i}.{name}": parameter for i, ff in sparse_layers(model).items()
            for name, parameter in ff.adapter_parameters().items()}


def added_parameters(model):
    """Parameters of the correction, as a fraction of the model's own (figure 6)."""
    added = sum(p.numel() for p in adapter_parameters(model).values())
    return added / (sum(p.numel() for p in model.parameters()) - added)


# ======== The paper ends here. Below: files, and checks of forks ========

# ---- adapters on disk

def method_name(block):
    """What adapters call a method: its name in METHODS, or module:Class."""
    names = {known: name for name, known in METHODS.items()}
    return names.get(block, f"{block.__module__}:{block.__qualname__}")


def fingerprint(model):
    """A short hash of the base model: of its shape, and of a few weights of every layer.

    It is the same in float32 and in bfloat16. The part before the dash is all that adapters of
    version 0.1 have.
    """
    base, config = decoder(model), decoder(model).config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    shape = " ".join(str(getattr(config, name)) for name in names)
    ends = [base.norm.weight, base.embed_tokens.weight[:8]]
    learned = {id(parameter) for parameter in adapter_parameters(model).values()}
    inside = []
    for layer in base.layers:
        for _, parameter in sorted(layer.named_parameters()):
            if id(parameter) not in learned:
                inside.append(parameter.flatten()[::max(1, parameter.numel() // 64)])
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight is not base.embed_tokens.weight:
        inside.append(head.weight[:8])
    return f"{weights_hash(ends, shape)}-{weights_hash(inside, '')}"


def weights_hash(tensors, text):
    """16 hex digits of a text and of tensors in bfloat16."""
    flat = [tensor.detach().to("cpu", torch.bfloat16).flatten() for tensor in tensors]
    raw = torch.cat(flat).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(text.encode() + raw).hexdigest()[:16]


def save_adapter(model, file, base=None):
    """Write the correction to a safetensors file; its metadata say what it belongs to.

    base is the model's fingerprint, for a model whose weights cannot be read here. Raises
    ValueError if nothing is attached, OSError if the file cannot be written.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError("no sparse method is attached, so there is no adapter to save")
    tensors = {f"model.layers.{i}.mlp.{name}": parameter.float() for i, ff in layers.items()
               for name, parameter in ff.adapter_parameters().items()}
    ff = next(iter(layers.values()))
    about = {"method": method_name(type(ff)), "density": ff.density, "layers": list(layers),
             "model": base or fingerprint(model)}
    save_tensors(tensors, file, about)


def load_adapter(model, file, density=None, method=None):
    """Attach the method that an adapter was made for, with its correction. Returns the model.

    density None is the one that it was trained at. method is the class, if it is not in METHODS:
    no file's name for code is followed. Raises FileNotFoundError, or ValueError for a file of
    another kind, or for a correction that does not fit this model.
    """
    tensors, about = read_adapter(file)
    block = method or METHODS.get(about["method"])
    block = METHODS.get(block, block)
    if not isinstance(block, type) or method_name(block) != about["method"]:
        raise ValueError(f"{file} was made for the method {about['method']}; give that class, "
                         "in a script by --block module:Class")
    own = fingerprint(model)
    if about.get("model") not in (own, own.split("-")[0]):
        raise ValueError(f"{file} was made for another model: {about.get('model')}, not {own}")
    try:
        density = about.get("density") if density is None else density
        attach(model, block, density, about.get("layers") or [], rank=0)
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
        raise FileNotFoundError(f"adapter {file} does not exist; distill.py makes adapters")
    tensors, about = load_tensors(file)
    if not isinstance(about, dict) or not isinstance(about.get("method"), str):
        raise ValueError(f"{file} is not a Caprese adapter: its metadata do not name a method")
    return tensors, about


def save_tensors(tensors, file, about):
    """Write {name: tensor} and a JSON description under a temporary name, then rename.

    Raises OSError if that fails; the file that was there before is intact then.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = Path(f"{file}.tmp")
    try:  # one key, for the order of several varies
        temporary.write_bytes(save(tensors, metadata={"caprese": json.dumps(about)}))
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
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from None


# ---- forks: a change takes effect

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # a class may compute its correction in float32


@torch.no_grad()
def may_gather(block, act_fn):
    """May a class decode on gathered neurons? It may if both paths compute the same.

    A tiny block of the class is tried. If beyond/forks.py is there, it raises ValueError for a
    class that cannot work.
    """
    try:
        from beyond import forks
    except ImportError:
        pass
    else:
        forks.check(block, act_fn)
    if not block.gathers:
        return False
    same = paths_agree(tiny_block(block, act_fn))
    if not same:
        print("note: gather and fused do not compute what sparsify and correction of "
              f"{method_name(block)} do; decoding takes the masked path, which saves no time",
              file=sys.stderr)
    return same


def paths_agree(ff):
    """Does the compact path compute what the masked path does?"""
    x = tiny_input(1, 9)
    try:
        return torch.allclose(decode_rest(ff, x, 7, gathers=True),
                              decode_rest(ff, x, 7, gathers=False), **CLOSE)
    except (AttributeError, RuntimeError):  # there are no L and R that fit the gathered matrices
        return False


def decode_rest(ff, x, prompt, gathers):
    """Decode the tokens of x [B, T, D] after the first `prompt` ones, one by one: [B, T - S, D]."""
    ff.gathers = gathers
    ff.reset()
    ff.count(x[:, :prompt], *ff.neurons(x[:, :prompt]), None)
    ff.select()
    return torch.cat([ff.decode(token) for token in x[:, prompt:].split(1, dim=1)], dim=1)


def has_closed_form(ff):
    """Is the correction of this block's class x L R? For no other has (7) a closed form."""
    tiny, x = tiny_block(type(ff), ff.act_fn), tiny_input(1, 5)
    parameters = {name: parameter.shape for name, parameter in tiny.adapter_parameters().items()}
    if parameters != {"L": (32, 4), "R": (4, 32)}:
        return False
    product = x @ tiny.L.to(x.dtype) @ tiny.R.to(x.dtype)
    return torch.allclose(tiny.correction(x), product, **CLOSE)


def tiny_input(B, T):
    """The input x [B, T, 32] of a tiny block, in float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, 32, dtype=torch.float64, device="cpu", generator=generator)


def tiny_block(block, act_fn, rank=4):
    """A sparse FF of this class with random weights in float64; its correction is random too."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        mlp = nn.Module()
        mlp.gate_proj, mlp.up_proj = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        mlp.down_proj, mlp.act_fn = nn.Linear(64, 32, bias=False), act_fn
        ff = block(mlp, 0.5, rank, Call()).double()
        for parameter in ff.adapter_parameters().values():
            parameter.data = torch.randn(parameter.shape)  # in float32, as in a model
    return ff
