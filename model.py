"""A Llama-style transformer that loads official weights. It knows nothing of sparsity.

Letters in the shape comments: B rows, T tokens of this call, S positions in the cache, D hidden_size,
H query heads, K key/value heads, d head_dim, V vocab_size (the FF width F and the rest live in caprese.py).
Module names are the official ones, so loading is a strict comparison of names and shapes.
The families (llama, mistral, qwen2, qwen3, gemma2) differ in fields of Config and nowhere else.
"""

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# What each family's own code assumes: of keys that config.json leaves out, and of what no key ever says.
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "qkv_bias": False, "o_bias": False},
    "qwen2": {"num_key_value_heads": 32, "qkv_bias": True, "o_bias": False},
    "qwen3": {"head_dim": 128, "num_key_value_heads": 32, "qk_norm": True},
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096, "tie_word_embeddings": True,
               "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
               "hidden_activation": "gelu_pytorch_tanh",
               "scale_embeddings": True, "norm_plus_one": True, "post_norms": True},
}
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
REPO_FILES = ["config.json", "generation_config.json", "model.safetensors", "model-*.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "chat_template.jinja"]


@dataclass
class Config:
    """The fields of config.json that change the numbers, defaults of the family filled in.

    rope_scaling is None or the llama3 dictionary; windows holds one entry a layer, None meaning full attention.
    Raises ValueError on sizes that make no model.
    """
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False                       # Qwen 3: RMSNorm on each head's query and key
    scale_embeddings: bool = False              # Gemma: embeddings times sqrt(D)
    norm_plus_one: bool = False                 # Gemma: the norm's weight is stored minus one
    post_norms: bool = False                    # Gemma 2: a norm after each block as well
    query_pre_attn_scalar: float | None = None  # attention scale is this (or d) to the power -1/2
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    windows: tuple = ()
    dtype: torch.dtype = torch.float32          # of the checkpoint

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and (not isinstance(value, int) or value < 1):
                raise ValueError(f"config.json: {f.name} is {value!r}, but it must be a positive whole number")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(f"config.json: {self.num_attention_heads} heads cannot share {self.num_key_value_heads} "
                             f"key/value heads of size {self.head_dim}")
        self.windows = self.windows or (None,) * self.num_hidden_layers

    @classmethod
    def from_dict(cls, raw):
        """Read a config.json of the classic or the newer style (rope_parameters, dtype, layer_types).

        Raises ValueError naming whatever is missing or not implemented.
        """
        model_type = raw.get("model_type")
        if model_type not in FAMILIES:
            raise ValueError(f"model_type {model_type!r} is not implemented; these are: {', '.join(FAMILIES)}")
        for name in raw.get("architectures") or []:
            if name.lower() != f"{model_type}forcausallm":
                raise ValueError(f"architecture {name!r} is not implemented; only the causal language model is")
        for key in ("mlp_bias", "quantization_config", "use_bidirectional_attention"):
            if raw.get(key):
                raise ValueError(f"config.json sets {key}, which is not implemented; use a checkpoint without it")
        family = FAMILIES[model_type]
        # null is as good as absent, save where it is a value of its own: no window, no cap, as many as there are heads
        nullable = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads")
        raw = family | {k: v for k, v in raw.items() if v is not None or k in nullable}
        # Gemma 2's code ignores hidden_act, which its first config files carry as well
        act = raw["hidden_activation"] if model_type == "gemma2" else raw.get("hidden_act", "silu")
        dtype = str(raw.get("dtype", raw.get("torch_dtype", "float32"))).removeprefix("torch.")
        for key, value, known in (("hidden_act", act, ACTIVATIONS), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"{key} {value!r} is not implemented; these are: {', '.join(known)}")
        bias = bool(raw.get("attention_bias"))
        optional = ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "query_pre_attn_scalar",
                    "attn_logit_softcapping", "final_logit_softcapping")
        try:
            heads, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
            return cls(
                raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"], layers, heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                hidden_act=act, dtype=DTYPES[dtype], windows=_windows(raw, model_type, layers),
                qkv_bias=family.get("qkv_bias", bias), o_bias=family.get("o_bias", bias),
                **{k: family.get(k, False) for k in ("qk_norm", "scale_embeddings", "norm_plus_one", "post_norms")},
                **{k: raw[k] for k in optional if k in raw}, **_rope(raw))
        except KeyError as e:
            raise ValueError(f"config.json lacks {e}") from None
        except TypeError as e:
            raise ValueError(f"config.json holds a value of the wrong kind: {e}") from None


def _rope(raw):
    """rope_theta and rope_scaling from either style; ValueError on a rope type we do not implement."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(v, dict) for v in rope.values()):
        raise ValueError("config.json gives rope_parameters per layer type, which is not implemented")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope type {kind!r} is not implemented; these are: default, llama3")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor is not implemented")
    scaling = None
    if kind == "llama3":
        rope = {"original_max_position_embeddings": raw.get("max_position_embeddings")} | rope
        scaling = {k: float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor",
                                               "original_max_position_embeddings")}
    return {"rope_theta": float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0), "rope_scaling": scaling}


def _windows(raw, model_type, layers):
    """Sliding window per layer (None: full attention), from layer_types or the family's older rule."""
    window = raw.get("sliding_window")
    if model_type == "llama" or (model_type in ("qwen2", "qwen3") and not raw.get("use_sliding_window")):
        window = None  # Qwen configs carry a number even where it is switched off
    if types := raw.get("layer_types"):
        if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types has {len(types)} entries for {layers} layers, of these kinds: "
                             + ", ".join(sorted(set(types))) + "; full_attention and sliding_attention are implemented")
        slides = [t == "sliding_attention" for t in types]
    else:
        rule = {"mistral": lambda i: True, "gemma2": lambda i: i % 2 == 0}
        slides = map(rule.get(model_type, lambda i: i >= raw.get("max_window_layers", 28)), range(layers))
    return tuple(window if s else None for s in slides)


class RMSNorm(nn.Module):
    def __init__(self, size, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.plus_one = config.rms_norm_eps, config.norm_plus_one

    def forward(self, x):
        if self.plus_one:  # Gemma rounds to the dtype once, at the end; bfloat16 would lose most of 1 + weight
            return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(config):
    """Rotary frequencies [d/2] in float32: theta^(-2i/d), stretched as Llama 3.1 does where asked.

    On the CPU, in the families' own order of operations: far into a context the last bit shows in the angles.
    """
    d = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32, device="cpu") / d)
    if config.rope_scaling:
        s = config.rope_scaling
        factor, low, high = s["factor"], s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # over the trained context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: many turns, untouched; 0: few, slowed by factor
        freq = freq * keep + freq / factor * (1 - keep)
    return freq


def rotate(x, cos, sin):
    """Rotary position embedding; x [B, T, heads, d], cos and sin [B or 1, T, 1, d]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Cache:
    """Preallocated keys and values, each layer [B, K, S, d]. Row b holds lengths[b] tokens.

    max_length is the largest of lengths, known on the host so that no step waits for the device.
    ragged says that lengths differ between rows; then keys beyond a row's length are masked.
    span, if set, is the number of positions that a call reads whatever the rows hold, the rest being masked: then
    nothing about the call depends on the host's max_length, as a captured graph needs it.
    """

    def __init__(self, config, rows, positions, device, dtype):
        shape = (rows, config.num_key_value_heads, positions, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(rows, device=device, dtype=torch.long)
        self.max_length, self.ragged, self.span = 0, False, None

    @property
    def positions(self):
        """S, the most tokens that a row can hold."""
        return self.k[0].shape[2]

    def move(self, tokens):
        """Advance (or, if negative, rewind) every row by this many tokens."""
        self.lengths += tokens
        self.max_length += tokens

    def set_lengths(self, lengths):
        """After a prefill padded on the right: lengths [B]; padding is masked, then overwritten."""
        self.lengths.copy_(lengths)
        self.max_length, self.ragged = int(lengths.max()), bool((lengths != lengths[0]).any())

    def take(self, rows):
        """Continue with these rows [n] int64 only; a row may be taken several times."""
        self.k, self.v = ([t[rows] for t in layers] for layers in (self.k, self.v))
        self.lengths = self.lengths[rows]
        self.set_lengths(self.lengths)

    def write(self, layer, k, v, positions):
        """Store k, v [B, K, T, d] at positions [B, T]; return all keys and values that this call reads."""
        end = self.max_length + k.shape[2]
        if self.ragged or self.span:
            rows = torch.arange(len(k), device=k.device)[:, None]
            self.k[layer][rows, :, positions] = k.transpose(1, 2)
            self.v[layer][rows, :, positions] = v.transpose(1, 2)
        else:
            self.k[layer][:, :, self.max_length:end], self.v[layer][:, :, self.max_length:end] = k, v
        return self.k[layer][:, :, :self.span or end], self.v[layer][:, :, :self.span or end]


def attention_mask(positions, keys, window):
    """Bool [B, 1, T, keys]: key j is seen from position i if i - window < j <= i."""
    j = torch.arange(keys, device=positions.device)
    i = positions[:, None, :, None]
    return (j <= i) if window is None else (j <= i) & (j > i - window)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim, self.softcap = layer, d, config.attn_logit_softcapping
        self.scale = (config.query_pre_attn_scalar or d) ** -0.5
        self.q_proj = nn.Linear(D, H * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(d, config), RMSNorm(d, config)

    def forward(self, x, positions, rope, mask, cache):
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))  # [B,T,H|K,d]
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, *rope).transpose(1, 2), rotate(k, *rope).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, positions)  # [B, K, S, d]
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v, mask):
        """q [B, H, T, d], k and v [B, K, S, d] -> [B, H, T, d].

        mask: bool [B, 1, T, S], or True for causal over these tokens alone, or None for everything.
        """
        shape, (B, K, S, _) = q.shape, k.shape
        if shape[2] == 1:  # the heads that share keys stand side by side like tokens: no key is read or copied twice
            q = q.reshape(B, K, -1, self.head_dim)
        gqa = q.shape[1] != K
        if not self.softcap:
            causal = mask is True
            return F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal,
                                                  scale=self.scale, enable_gqa=gqa).reshape(shape)
        # tanh sits between the scores and the softmax (Gemma 2), which the fused kernel has no place for.
        if gqa:
            k, v = (t.repeat_interleave(q.shape[1] // K, dim=1) for t in (k, v))
        scores = torch.tanh(q @ k.transpose(2, 3) * (self.scale / self.softcap)) * self.softcap
        if mask is True:
            mask = torch.ones(q.shape[2], S, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v).reshape(shape)


class FeedForward(nn.Module):
    """FF(x) = FF2(FF1(x)), FF1(x) = act(x Wg) * (x W1), FF2(z) = z W2: equations (1) and (2)."""

    def __init__(self, config):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False)  # Wg
        self.up_proj = nn.Linear(D, F_, bias=False)    # W1
        self.down_proj = nn.Linear(F_, D, bias=False)  # W2
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x, generated=None):
        """x [B, T, D] -> [B, T, D]. `generated` is for replacements of this block; the full FF ignores it."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # (1)(2)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D = config.hidden_size
        self.self_attn, self.mlp = Attention(config, layer), FeedForward(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, config), RMSNorm(D, config)
        self.post_norms = config.post_norms
        if self.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(D, config)
            self.post_feedforward_layernorm = RMSNorm(D, config)

    def forward(self, x, positions, rope, mask, cache, generated):
        h = self.self_attn(self.input_layernorm(x), positions, rope, mask, cache)
        if self.post_norms:  # Gemma 2: "post_attention" is a norm of the block's output, not of the next input
            x = x + self.post_attention_layernorm(h)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), generated))
        x = x + h
        return x + self.mlp(self.post_attention_layernorm(x), generated)


class Transformer(nn.Module):
    recompute = False  # activation checkpointing per block: distill.py turns it on for large models

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.last_step = None

    @property
    def layers(self):
        return self.model["layers"]

    @property
    def device(self):
        return self.model["norm"].weight.device

    @property
    def dtype(self):
        return self.model["norm"].weight.dtype

    def new_cache(self, rows, positions):
        """An empty Cache for rows sequences of at most this many tokens."""
        return Cache(self.config, rows, positions, self.device, self.dtype)

    def new_step(self, rows, positions):
        """A Step with an empty cache. On CUDA that is the last one, with its graphs, if it was of this kind."""
        blocks, last = [layer.mlp for layer in self.layers], self.last_step  # a graph is of these very blocks
        if last and last.blocks == blocks and len(last.tokens) == rows and last.cache.positions >= positions:
            last.cache.set_lengths(torch.zeros_like(last.cache.lengths))
            return last
        self.last_step = None  # gone before the next one needs the memory
        if self.device.type != "cuda":
            return Step(self, self.new_cache(rows, positions), blocks)
        positions = min(-(-positions // 1024) * 1024, self.config.max_position_embeddings)
        self.last_step = Step(self, self.new_cache(rows, positions), blocks)
        return self.last_step

    def hidden(self, tokens, cache=None, generated=None):
        """Final embedding, after the last norm and before the head: tokens [B, T] int64 -> [B, T, D].

        With a cache the tokens continue each row at cache.lengths. `generated` is handed to every FF block and
        tells which tokens are generated ones: None, nobody asks; False or True, none or all of this call; a bool
        tensor [B, T], token by token. The full FF treats all alike.
        """
        x = self.embed(tokens)
        for layer, beside in zip(self.layers, self.context(tokens, cache)):
            x = self.run(layer, x, *beside, cache, generated)
        if cache is not None:
            cache.move(tokens.shape[1])
        return self.model["norm"](x)

    def embed(self, tokens):
        """What the first block gets: tokens [B, T] int64 -> [B, T, D]."""
        x = F.embedding(tokens, self.model["embed_tokens"].weight)
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.hidden_size ** 0.5, dtype=x.dtype)  # rounded to the dtype, as Gemma does
        return x

    def context(self, tokens, cache=None):
        """What each block gets beside x: a list of (positions [B or 1, T], rope, mask), one for each block."""
        T, windows = tokens.shape[1], self.config.windows
        start = torch.zeros(1, dtype=torch.long, device=tokens.device) if cache is None else cache.lengths
        positions = start[:, None] + torch.arange(T, device=tokens.device)
        end = T if cache is None else cache.span or T + cache.max_length
        ragged = cache is not None and (cache.ragged or cache.span)
        masks = {}
        for window in set(windows):  # the cheapest form that says the same
            if ragged or (window is not None and end > window) or 1 < T < end:
                masks[window] = attention_mask(positions, end, window)
            else:
                masks[window] = True if T > 1 else None
        rope = self.rope(positions)
        return [(positions, rope, masks[window]) for window in windows]

    def run(self, layer, *args):
        """One block. With self.recompute its activations are not kept for the way back but computed again."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
        return layer(*args)

    def rope(self, positions):
        """cos and sin [B or 1, T, 1, d] of the rotary angles, computed in float32, in the model's dtype."""
        if getattr(self, "inv_freq", None) is None or self.inv_freq.device != positions.device:
            self.inv_freq = rope_frequencies(self.config).to(positions.device)
        angles = positions[:, :, None, None].float() * self.inv_freq  # [B, T, 1, d/2]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def logits(self, hidden):
        """Head on final embeddings [..., D] -> [..., V], soft-capped where the family does so."""
        weight = self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight
        out = F.linear(hidden, weight)
        cap = self.config.final_logit_softcapping
        return torch.tanh(out / cap) * cap if cap else out

    def forward(self, tokens, prompt_lengths=None):
        """Teacher-forced logits: tokens [B, T] int64 -> [B, T, V], no cache needed.

        prompt_lengths [B]: positions from there on count as generated (see hidden). None: everything is full.
        """
        return self.logits(self.hidden(tokens, generated=generated_mask(tokens, prompt_lengths)))

    @classmethod
    def from_pretrained(cls, path_or_repo_id, device="cpu", dtype=None):
        """Load a folder in the official layout, or a hub repo id; dtype None keeps the checkpoint's own.

        Raises ValueError or OSError in one line that names the file and the tensor at fault.
        """
        folder = resolve(path_or_repo_id)
        try:
            config = Config.from_dict(read_json(folder / "config.json"))
        except ValueError as e:
            raise ValueError(f"{folder}: {e}") from None
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(load_weights(folder, model, device, dtype or config.dtype), assign=True)
        return model.requires_grad_(False).eval()


class Step:
    """One decode step: step(tokens [B] int64) -> logits [B, V] of the next ones; the cache moves on.

    All that it reads keeps its address, so with capture (CUDA) it is recorded as a graph, once for each span of the
    cache, and replayed: the host issues one launch and waits for nothing. The logits are overwritten by the next step.
    """

    def __init__(self, model, cache, blocks, capture=False):
        self.model, self.cache, self.blocks, self.capture = model, cache, blocks, capture
        self.tokens = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=cache.lengths.device)
        self.graphs = {}  # span: (graph, its logits)

    def __call__(self, tokens):
        self.tokens[:, 0] = tokens
        if not self.capture:
            return self.run()
        span = self.span()
        if span not in self.graphs:
            self.graphs[span] = self.record(span)
        graph, logits = self.graphs[span]
        graph.replay()
        self.cache.max_length += 1  # the graph has moved cache.lengths
        return logits

    def take(self, rows):
        """A Step that goes on with these rows [n] int64 only, or with some of them several times."""
        self.model.last_step = None  # its graphs are of the old rows
        self.cache.take(rows)
        return Step(self.model, self.cache, self.blocks, self.capture)

    def span(self):
        """Positions to read at this length: the next multiple of 256, or beyond 4096 of an eighth of its power of 2."""
        end = self.cache.max_length + 1
        unit = max(256, (1 << end.bit_length()) // 16)
        return min(-(-end // unit) * unit, self.cache.positions)

    def run(self, span=None):
        """The step itself. With a span, shapes and addresses depend on nothing but the span."""
        self.cache.span, onednn = span, torch.backends.mkldnn.enabled
        if len(self.tokens) == 1:  # on CPUs, for one row in bfloat16, torch's own product is twice as fast as oneDNN's
            torch.backends.mkldnn.enabled = False
        try:
            return self.model.logits(self.model.hidden(self.tokens, self.cache, generated=True)[:, -1])
        finally:
            self.cache.span, torch.backends.mkldnn.enabled = None, onednn

    def record(self, span):
        """(CUDA graph of run(span), its logits)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once for real: what libraries set up on first use is no part of the graph
            self.run(span)
            self.cache.move(-1)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.run(span)
        self.cache.max_length -= 1  # nothing has run yet
        return graph, logits


def generated_mask(tokens, prompt_lengths):
    """Bool [B, T], True from prompt_lengths[b] on, or None if prompt_lengths is None."""
    if prompt_lengths is None:
        return None
    lengths = torch.as_tensor(prompt_lengths, device=tokens.device)
    return torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]


def read_json(file):
    """The object in a JSON file; FileNotFoundError or ValueError in one line that names it."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; the folder must be in the official layout") from None
    except ValueError as e:
        raise ValueError(f"{file} is not valid JSON: {e}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not an object")
    return found


def resolve(path_or_repo_id):
    """A local folder for a path, or for a hub repo id, owner/name, that is no folder here.

    Only config, safetensors and tokenizer files are fetched, into huggingface_hub's cache, which also serves offline.
    Raises OSError in one line that says what to do.
    """
    folder, name = Path(path_or_repo_id).expanduser(), str(path_or_repo_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; give the folder that holds config.json and the weights")
    if isinstance(path_or_repo_id, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"{folder} is not a folder (and a hub repo id has the form owner/name)")
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError:
        raise OSError(f"{name} is not a folder here; to fetch it from the hub, pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=REPO_FILES))
    except errors.GatedRepoError:  # a kind of RepositoryNotFoundError, so it comes first
        why = f"a gated hub repo: accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "neither a folder here nor a hub repo; check the spelling (a private repo needs `hf auth login`)"
    except errors.LocalEntryNotFoundError:
        why = "no folder here and not (completely) in the hub cache, and " + (
            "HF_HUB_OFFLINE forbids to fetch it; unset that once" if constants.HF_HUB_OFFLINE
            else "the hub cannot be reached; check the network or give a local folder")
    except Exception as e:  # proxies, certificates, rate limits: huggingface_hub lets several libraries' errors through
        why = f"no folder here, and fetching it failed: {(str(e) or repr(e)).splitlines()[0]}"
    raise OSError(f"{name} is {why}")


def load_weights(folder, model, device, dtype):
    """The state dict of `model`, read from the safetensors files in `folder`: names and shapes must all match.

    Each tensor goes straight to its device and dtype. One that is on the CPU and has the dtype stays a private,
    copy-on-write view of the file. Raises ValueError or OSError naming the file and the tensor.
    """
    from safetensors import SafetensorError
    source, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files, hint = [source], "weights are read from safetensors files only"
    if not source.exists() and index.exists():
        source, hint = index, f"{index.name} names it"
        files = sorted({folder / file for file in read_json(index).get("weight_map", {}).values()})
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    state = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; {hint}")
        try:
            state |= read_shard(file, shapes, device, dtype)
        except SafetensorError as e:
            raise ValueError(f"{file} is damaged or incomplete ({e}); fetch it again") from None
    missing = [name for name in shapes if name not in state]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{source} lacks the tensor {missing[0]}{more}")
    return state


def read_shard(file, shapes, device, dtype):
    """{name: tensor} of one memory-mapped safetensors file; ValueError for a tensor that `shapes` does not expect."""
    from safetensors import safe_open
    with safe_open(file, framework="pt") as shard:
        names = shard.keys()
    state = {}
    for name in names:
        if name not in shapes:
            if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                continue  # a tied head and a table: some converters store them, though they follow from the rest
            raise ValueError(f"{file}: unexpected tensor {name}")
        with safe_open(file, framework="pt") as shard:  # anew, for closing frees its pages: no cast beside a whole file
            part = shard.get_slice(name)
            if part.get_shape() != shapes[name]:
                raise ValueError(f"{file}: {name} has shape {part.get_shape()}, config.json asks for {shapes[name]}")
            if part.get_dtype() not in ("F32", "BF16", "F16"):
                raise ValueError(f"{file}: {name} holds {part.get_dtype()}; quantised weights are not implemented")
            state[name] = shard.get_tensor(name).to(device).to(dtype)  # the smaller dtype crosses to the device
    return state
