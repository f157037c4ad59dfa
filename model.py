"""A Llama-style transformer that loads official weights. It knows nothing of sparsity.

Letters in the shape comments: B batch, T tokens of this call, S positions in the cache,
D hidden_size, H query heads, K key/value heads, d head_dim, F intermediate_size, V vocab_size.
Module names are the official ones, so loading is a strict comparison of names and shapes.
The families (llama, mistral, qwen2, qwen3, gemma2) differ in fields of Config and nowhere else.
"""

import json
import math
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# What each family's own code assumes: of keys that config.json leaves out, and whatever it says.
FAMILIES = {
    "llama": ({}, {"use_sliding_window": False}),
    "mistral": ({"num_key_value_heads": 8, "sliding_window": 4096},
                {"attention_bias": False, "use_sliding_window": True, "max_window_layers": 0}),
    "qwen2": ({"num_key_value_heads": 32}, {"attention_bias": True, "o_bias": False}),
    "qwen3": ({"head_dim": 128, "num_key_value_heads": 32}, {"qk_norm": True}),
    "gemma2": ({"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096,
                "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                "hidden_activation": "gelu_pytorch_tanh"},
               {"use_sliding_window": True, "max_window_layers": 0, "window_step": 2,
                "scale_embeddings": True, "norm_plus_one": True, "post_norms": True}),
}
# For these keys null is a value of its own: no window, no cap, as many as there are heads.
NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
            "num_key_value_heads")
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": nn.GELU(approximate="tanh")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPO_FILES = ["*config.json", "model*.safetensors", "tokenizer.json", "special_tokens*", "*.jinja"]


# ---- config.json

@dataclass
class Config:
    """The fields of config.json that change the numbers, defaults of the family filled in.

    rope_scaling is None or the llama3 dictionary. Raises ValueError on values that make no model.
    """
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple  # for each layer its sliding window, or None for full attention
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False    # of q, k and v
    o_bias: bool = False
    qk_norm: bool = False           # Qwen 3: RMSNorm on each head's query and key
    scale_embeddings: bool = False  # Gemma: embeddings times sqrt(D)
    norm_plus_one: bool = False     # Gemma: the norm's weight is stored minus one
    post_norms: bool = False        # Gemma 2: a norm after attention and after the MLP as well
    query_pre_attn_scalar: float | int | None = None  # attention scale: this (or d) to the -1/2
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
    dtype: torch.dtype = torch.float32  # of the checkpoint

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            bad_number = type(value) in (int, float) and not 0 < value < math.inf
            if bad_number or not isinstance(value, field.type):
                raise ValueError(f"{field.name} is {value!r}, not positive or of wrong type")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("num_key_value_heads does not divide the heads, or head_dim is odd")

    @classmethod
    def from_dict(cls, raw, source="config.json"):
        """Read a config.json of the classic or the newer style (rope_parameters, layer_types).

        Raises ValueError naming the source and whatever is missing or not implemented.
        """
        try:
            defaults, fixed = FAMILIES[one_of("model_type", raw.get("model_type"), FAMILIES)]
            for key in ("mlp_bias", "quantization_config", "use_bidirectional_attention"):
                if raw.get(key):
                    raise ValueError(f"{key} is not implemented")
            given = {k: v for k, v in raw.items() if v is not None or k in NULLABLE}
            raw = defaults | given | fixed
            # Gemma 2's code ignores hidden_act, which its first config files carry as well.
            act = raw.get("hidden_activation", raw.get("hidden_act", "silu"))
            dtype = raw.get("dtype", raw.get("torch_dtype", "float32"))
            raw |= rope_fields(raw) | {
                "num_key_value_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
                "head_dim": raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"]),
                "o_bias": raw.get("o_bias", raw.get("attention_bias", False)),
                "windows": layer_windows(raw), "hidden_act": one_of("hidden_act", act, ACTIVATIONS),
                "dtype": DTYPES[one_of("dtype", dtype, DTYPES)]}
            names = [f.name for f in fields(cls) if f.name in raw or f.default is MISSING]
            return cls(**{name: raw[name] for name in names})
        except KeyError as error:
            raise ValueError(f"{source} lacks {error}") from None
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"{source} holds a value that cannot be used: {error}") from None


def one_of(name, value, known):
    """The value, if it is known; else ValueError."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
    return value


def rope_fields(raw):
    """rope_theta and rope_scaling from either style; ValueError on a rope type we do not have."""
    own = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(own, dict) or any(isinstance(value, dict) for value in own.values()):
        raise ValueError(f"rope_scaling is {own!r}, but must be one object, none per layer type")
    kind = own.get("rope_type", own.get("type", "default"))
    one_of("rope type", kind, ("default", "llama3"))
    rope = {"original_max_position_embeddings": raw.get("max_position_embeddings")} | raw | own
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not implemented")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {key: float(rope[key]) for key in keys} if kind == "llama3" else None
    return {"rope_theta": float(rope.get("rope_theta", 10000.0)), "rope_scaling": scaling}


def layer_windows(raw):
    """Sliding window per layer (None: full attention), by layer_types or by the family's rule."""
    # Qwen configs carry a window even where it is off.
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window is {window!r}, not a positive int")
    layers, types = range(raw["num_hidden_layers"]), raw.get("layer_types")
    sliding = layers[raw.get("max_window_layers", 28)::raw.get("window_step", 1)]
    if types:
        if len(types) != len(layers) or set(types) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"{len(types)} layer_types for {len(layers)} layers: {set(types)}")
        sliding = [i for i in layers if types[i] == "sliding_attention"]
    return tuple(window if i in sliding else None for i in layers)


# ---- the parts

class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size, config):
        super().__init__(size, config.rms_norm_eps)
        self.plus_one = config.norm_plus_one

    def forward(self, x):
        if not self.plus_one:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        # Gemma rounds to the dtype once, at the end; bfloat16 would lose most of 1 + weight.
        weight = 1 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


def rope_frequencies(config):
    """Rotary frequencies [d/2] in float32: theta^(-2i/d), stretched as Llama 3.1 does where asked.

    On the CPU, in the families' own order of operations: far into a context the last bit shows.
    """
    exponents = torch.arange(0, config.head_dim, 2, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: many turns, untouched; 0: few, slowed
    return frequencies * keep + frequencies / factor * (1 - keep)


def rotate(x, cos, sin):
    """Rotary position embedding; x [B, T, heads, d], cos and sin [B or 1, T, 1, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Cache:
    """Preallocated keys and values, each layer [B, K, S, d]. Row b holds lengths[b] tokens.

    max_length is the largest of lengths, known on the host so that no step waits for the device.
    ragged says that lengths differ between rows; then keys beyond a row's length are masked.
    num_keys, if set, is how many positions a call reads whatever the rows hold, the rest masked.
    Then nothing in the call depends on the host's max_length, as a captured graph needs it.
    """

    def __init__(self, config, batch_size, capacity, device, dtype):
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.long)
        self.rows = torch.arange(batch_size, device=device)[:, None]  # [B, 1]
        self.capacity = capacity  # S, the most tokens that a row can hold
        self.max_length, self.ragged, self.num_keys = 0, False, None

    def advance(self, tokens):
        """Every row holds so many tokens more (or, if negative, fewer)."""
        self.lengths += tokens
        self.max_length += tokens

    def set_lengths(self, lengths):
        """Row b holds lengths[b] tokens; what stands behind is masked, then overwritten."""
        self.lengths.copy_(lengths)
        self.max_length = int(lengths.max())
        self.ragged = bool((lengths != lengths[0]).any())

    def reorder(self, rows):
        """Continue with these rows [n] int64; a row may occur several times."""
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]
        self.lengths = self.lengths[rows]
        self.rows = torch.arange(len(rows), device=self.rows.device)[:, None]
        self.set_lengths(self.lengths)

    def write(self, layer, k, v, positions):
        """Store k, v [B, K, T, d] at positions [B, T]; return the keys and values to read."""
        end = self.num_keys or self.max_length + k.shape[2]
        for stored, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.ragged or self.num_keys:  # scatter_ would copy all that is stored on a CPU
                stored.transpose(1, 2).index_put_((self.rows, positions), new.transpose(1, 2))
            else:
                stored[:, :, self.max_length:end] = new
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def attention_mask(positions, num_keys, window):
    """Bool [B, 1, T, num_keys]: key j is seen from position i if i - window < j <= i."""
    j = torch.arange(num_keys, device=positions.device)
    i = positions[:, None, :, None]
    past = j <= i
    return past if window is None else past & (j > i - window)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and a cache."""

    def __init__(self, config, layer):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.config, self.softcap = layer, config, config.attn_logit_softcapping
        self.scale = (config.query_pre_attn_scalar or d) ** -0.5
        self.q_proj = nn.Linear(D, H * d, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, K * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, K * d, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.o_bias)
        self.q_norm = RMSNorm(d, config) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config) if config.qk_norm else nn.Identity()

    def forward(self, x, positions, rope, mask, cache):
        """x [B, T, D] -> [B, T, D]; the other inputs are those of Decoder.layer_inputs."""
        B, T, _ = x.shape
        d = self.config.head_dim
        q = self.q_proj(x).view(B, T, -1, d)  # [B, T, H, d]
        k = self.k_proj(x).view(B, T, -1, d)  # [B, T, K, d]
        v = self.v_proj(x).view(B, T, -1, d)
        q = rotate(self.q_norm(q), *rope).transpose(1, 2)  # [B, H, T, d]
        k = rotate(self.k_norm(k), *rope).transpose(1, 2)  # [B, K, T, d]
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, positions)  # [B, K, S, d]
        out = self.attend(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v, mask):
        """q [B, H, T, d], k and v [B, K, S, d] -> [B, H, T, d].

        mask: bool [B, 1, T, S]; or None, then one token attends to all keys and several tokens,
        which are all the keys there are, attend causally. With soft-capping several tokens have a
        mask.
        """
        shape, (B, K) = q.shape, k.shape[:2]
        if shape[2] == 1:  # heads that share keys stand side by side like tokens: no key is copied
            q = q.reshape(B, K, -1, shape[-1])
        if not self.softcap:
            causal = mask is None and shape[2] > 1
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale,
                                                 enable_gqa=q.shape[1] != K)
            return out.reshape(shape)
        # tanh sits between scores and softmax (Gemma 2); the fused kernel has no place for it.
        q = q.reshape(B, K, -1, *q.shape[2:])  # [B, K, H/K, T, d]
        scores = q @ k[:, :, None].mT * (self.scale / self.softcap)  # [B, K, H/K, T, S]
        scores = torch.tanh(scores) * self.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None], -math.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        return (weights @ v[:, :, None]).reshape(shape)


class MLP(nn.Module):
    """The FF block FF(x) = FF2(FF1(x)): equations (1) and (2)."""

    def __init__(self, config):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False)  # Wg
        self.up_proj = nn.Linear(D, F_, bias=False)    # W1
        self.down_proj = nn.Linear(F_, D, bias=False)  # W2
        self.act_fn = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]."""
        z = self.act_fn(self.gate_proj(x)) * self.up_proj(x)  # (1)
        return self.down_proj(z)                              # (2)


class Layer(nn.Module):
    """Attention and MLP, each around a residual connection."""

    def __init__(self, config, layer):
        super().__init__()
        D = config.hidden_size
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)
        self.input_layernorm = RMSNorm(D, config)
        self.post_attention_layernorm = RMSNorm(D, config)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(D, config)
            self.post_feedforward_layernorm = RMSNorm(D, config)

    def forward(self, x, positions, rope, mask, cache):
        attended = self.self_attn(self.input_layernorm(x), positions, rope, mask, cache)
        if not self.post_norms:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        # Gemma 2: "post_attention" is a norm of the attention's output, not of the MLP's input.
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


# ---- the model

class Decoder(nn.Module):
    """Everything before the language-model head: tokens -> hidden states."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.inv_freq = rope_frequencies(config)
        self.gradient_checkpointing = False  # distill.py turns it on for large models

    def forward(self, tokens, cache=None):
        """The final embedding, after the last norm: tokens [B, T] int64 -> [B, T, D].

        With a cache the tokens continue each row at cache.lengths.
        """
        x = self.embed(tokens)
        for layer, inputs in zip(self.layers, self.layer_inputs(tokens, cache)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, *inputs)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def embed(self, tokens):
        """The first layer's input: tokens [B, T] int64 -> [B, T, D]."""
        x = self.embed_tokens(tokens)
        if self.config.scale_embeddings:  # by a factor rounded to the dtype, as Gemma does
            x = x * torch.tensor(self.config.hidden_size ** 0.5, dtype=x.dtype)
        return x

    def layer_inputs(self, tokens, cache=None):
        """For each layer, what it gets beside x: (positions [B or 1, T], rope, mask, cache)."""
        T = tokens.shape[1]
        positions, num_keys, ragged = torch.arange(T, device=tokens.device)[None], T, False
        if cache is not None:
            positions = cache.lengths[:, None] + positions
            num_keys = cache.num_keys or cache.max_length + T
            ragged = cache.ragged or cache.num_keys is not None
        rope = self.rope(positions)
        causal = T == num_keys and not self.config.attn_logit_softcapping
        masks = {}
        for window in set(self.config.windows):  # no mask where Attention.attend needs none
            slides = window is not None and num_keys > window
            needed = ragged or slides or T > 1 and not causal
            masks[window] = attention_mask(positions, num_keys, window) if needed else None
        return [(positions, rope, masks[window], cache) for window in self.config.windows]

    def rope(self, positions):
        """cos and sin [B or 1, T, 1, d] of the rotary angles, made in float32, in our dtype."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[:, :, None, None].float() * self.inv_freq  # [B, T, 1, d/2]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(self.norm.weight.dtype), angles.sin().to(self.norm.weight.dtype)


class Transformer(nn.Module):
    """A causal language model: `model` gives the hidden states, `logits` is the head on them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.last_step = None

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype(self):
        return self.model.norm.weight.dtype

    def forward(self, tokens):
        """tokens [B, T] int64 -> logits [B, T, V]."""
        return self.logits(self.model(tokens))

    def logits(self, hidden_states):
        """The head: final embeddings [..., D] -> [..., V], soft-capped where the family does so."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = F.linear(hidden_states, head.weight)
        cap = self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits

    def new_cache(self, batch_size, capacity):
        """An empty Cache for so many sequences of at most `capacity` tokens."""
        return Cache(self.config, batch_size, capacity, self.device, self.dtype)

    def decode(self, tokens, cache):
        onednn = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = onednn and len(tokens) > 1
        try:
            return self.logits(self.model(tokens[:, None], cache)[:, -1])
        finally:
            torch.backends.mkldnn.enabled = onednn

    def new_step(self, batch_size, capacity):
        """A Step with an empty cache. On CUDA the last one, with its graphs, if it fits."""
        if self.device.type != "cuda":
            return Step(self, self.new_cache(batch_size, capacity))
        last = self.last_step
        if last and len(last.tokens) == batch_size and last.cache.capacity >= capacity:
            last.cache.set_lengths(torch.zeros_like(last.cache.lengths))
            return last
        self.last_step = None  # its memory is free before the next one needs it
        capacity = min(1024 * math.ceil(capacity / 1024), self.config.max_position_embeddings)
        self.last_step = Step(self, self.new_cache(batch_size, capacity))
        return self.last_step

    @classmethod
    def from_pretrained(cls, path_or_repo_id, device="cpu", dtype=None):
        """Load a folder in the official layout, or a hub repo id.

        dtype None keeps the checkpoint's own. Raises ValueError or OSError in one line that names
        the file and the tensor at fault.
        """
        folder = resolve(path_or_repo_id)
        config = Config.from_dict(read_json(folder / "config.json"), folder / "config.json")
        with torch.device("meta"):
            model = cls(config)
        load_weights(folder, model, device, dtype or config.dtype)
        return model.requires_grad_(False).eval()


class Step:
    """One decode step: step(tokens [B] int64) -> logits [B, V]; the cache advances by one token.

    On CUDA it is captured as a graph, once for each number of keys, and replayed: the host issues
    one launch and waits for nothing. The next step overwrites the logits.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.tokens = torch.zeros_like(cache.lengths)[:, None]
        self.graphs = {}    # number of keys: (graph, its logits)
        self.identity = []  # addresses and shapes of what the graphs read, and the modules

    def __call__(self, tokens):
        self.tokens[:, 0] = tokens
        if not self.tokens.is_cuda:
            return self.run()
        num_keys = self.num_keys()
        if num_keys not in self.graphs:
            self.graphs[num_keys] = self.capture(num_keys)
        graph, logits = self.graphs[num_keys]
        graph.replay()
        self.cache.max_length += 1  # the graph has advanced cache.lengths
        return logits

    def check_graphs(self):
        """Drop the graphs if the model has other tensors or modules than they were captured with.

        To be called whenever that may have changed.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        now = [(t.data_ptr(), t.shape) for t in tensors] + list(self.model.modules())
        if now != self.identity:
            self.graphs, self.identity = {}, now
            self.captured = [t.detach() for t in tensors]  # held, so that no address is used again

    def reorder(self, rows):
        """A Step that continues with these rows [n] int64; a row may occur several times."""
        self.model.last_step = None  # its graphs are of the old rows
        self.cache.reorder(rows)
        return Step(self.model, self.cache)

    def num_keys(self):
        """How many positions to read: the next multiple of 256, or later of an eighth of them."""
        end = self.cache.max_length + 1
        unit = max(256, (1 << end.bit_length()) // 16)
        return min(-(-end // unit) * unit, self.cache.capacity)

    @torch.no_grad()
    def run(self, num_keys=None):
        """The step itself. With num_keys it reads so many positions, whatever the rows hold."""
        onednn = torch.backends.mkldnn.enabled
        # For one row in bfloat16 torch's own CPU product is faster.
        torch.backends.mkldnn.enabled = onednn and len(self.tokens) > 1
        self.cache.num_keys = num_keys
        try:
            hidden_states = self.model.model(self.tokens, self.cache)
            return self.model.logits(hidden_states[:, -1])
        finally:
            self.cache.num_keys, torch.backends.mkldnn.enabled = None, onednn

    def capture(self, num_keys):
        """(CUDA graph of run(num_keys), its logits)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once for real: what libraries set up is no part of a graph
            self.run(num_keys)
            self.cache.advance(-1)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.run(num_keys)
        self.cache.max_length -= 1  # nothing has run yet
        return graph, logits


# ---- files

def read_json(file):
    """What a JSON file holds; FileNotFoundError or ValueError in one line that names it."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None


def resolve(name):
    """The local folder of a path, or of a hub repo id owner/name (a str) that is no folder here.

    Only config, safetensors and tokenizer files are fetched, into the hub's cache, which also
    serves offline. Raises OSError in one line that says what to do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"{folder} is not a folder, and no hub repo id owner/name either")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=REPO_FILES))
    except Exception as error:  # proxies, certificates, gates: several libraries' errors
        first_line = (str(error) or repr(error)).splitlines()[0]
        raise OSError(f"{name} is no folder here, and the hub did not give it: {first_line} "
                      "(check spelling and network; a gated repo needs `hf auth login`)") from None


def load_weights(folder, model, device, dtype):
    """Load the model*.safetensors files in `folder` into `model`, in place of its parameters.

    Names and shapes must all match. Each tensor goes straight to its device and dtype. One that is
    on the CPU and has the dtype stays a private, copy-on-write view of the file. Raises ValueError
    or OSError naming the file and the tensor.
    """
    from safetensors import SafetensorError, safe_open
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no model*.safetensors; no other weights are read")
    expected, state = model.state_dict(), {}
    for file in files:
        try:
            names = safe_open(file, framework="pt").keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch it again") from None
        for name in names:
            if name not in expected:
                if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                    continue  # a tied head, a table: some converters store them though they follow
                raise ValueError(f"{file}: unexpected tensor {name}")
            # Opened anew for each tensor: closing frees the pages, so no cast stands beside a file.
            tensor = safe_open(file, framework="pt").get_tensor(name)
            shape = expected[name].shape
            if tensor.shape != shape or tensor.dtype not in DTYPES.values():
                raise ValueError(f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                                 f"but must be floats {list(shape)}")
            state[name] = tensor.to(device).to(dtype)  # the device casts faster
    lost = [name for name in expected if name not in state]
    if lost:
        raise ValueError(f"{folder} lacks {len(lost)} tensors, {lost[0]} first; is a file missing?")
    model.load_state_dict(state, assign=True)
