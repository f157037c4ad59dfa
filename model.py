"""A Llama-style transformer that loads official weights. It knows nothing of sparsity.

Letters in the shape comments: B batch, T tokens of this call, N positions that attention reads,
D hidden_size, H query heads, K key/value heads, d head_dim, F intermediate_size, V vocab_size.
Modules have their official names, so official weights fit without renaming.
Where the families (llama, mistral, qwen2, qwen3, gemma2) differ, the code asks a field of Config,
never the family's name.
"""

import json
import math
import re
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_later

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": nn.GELU(approximate="tanh")}


@dataclass
class Config:
    """What the parts below need to know. Raises ValueError on values of which no model can be made.

    A field has the name that it has in config.json, if it is there.
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
    rope_theta: float | int = 10000.0
    rope_scaling: dict | None = None  # the four numbers of the llama3 rule
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
    dtype: torch.dtype = torch.float32  # of the stored weights

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
        """The Config of a config.json, read as a dictionary: see read_config."""
        return read_config(raw, source)


# ---- the parts

def at_least_float32(x):
    """x, if its dtype is float32 or float64; else x in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size, config):
        super().__init__(size, config.rms_norm_eps)
        self.plus_one = config.norm_plus_one

    def forward(self, x):
        if not self.plus_one:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        # Gemma rounds to the dtype once, at the end; bfloat16 would lose most of 1 + weight.
        weight = 1 + at_least_float32(self.weight)
        return F.rms_norm(at_least_float32(x), self.normalized_shape, weight, self.eps).to(x.dtype)


def rope_frequencies(config):
    """Rotary frequencies [d/2] in float32: theta^(-2i/d); rope_scaling stretches them.

    They are made on the CPU, in the order of operations of the families' own code: at distant
    positions the last bit matters.
    """
    even = torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # How often a pair turns within the context of pretraining. A pair that turns often keeps its
    # frequency, one that turns seldom is slowed by the factor, and between them it is blended.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * kept + frequencies / scaling["factor"] * (1 - kept)


def rotate(x, cos, sin):
    """Rotary position embedding; x [B, T, heads, d], cos and sin [B or 1, T, 1, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Cache:
    """The keys and values of earlier tokens, preallocated: for each layer [B, K, capacity, d].

    Row b holds lengths[b] tokens. max_length is the largest of lengths, known on the host so that
    no decode step waits for the device. ragged says that lengths differ between rows.
    """

    def __init__(self, config, batch_size, capacity, device, dtype):
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.long)
        self.capacity = capacity
        self.max_length = 0
        self.ragged = False

    def advance(self, num_tokens):
        """Make every row longer by num_tokens, an int; by a negative one, shorter."""
        self.lengths += num_tokens
        self.max_length += num_tokens

    def set_lengths(self, lengths):
        """Let row b hold lengths[b] tokens, [B] int64. Entries behind them are masked."""
        self.lengths.copy_(lengths)
        self.max_length = int(lengths.max())
        self.ragged = bool((lengths != lengths[0]).any())

    def reorder(self, rows):
        """Keep these rows [n] int64, in this order; a row may occur several times."""
        for layer in range(len(self.k)):
            self.k[layer] = self.k[layer][rows]
            self.v[layer] = self.v[layer][rows]
        self.lengths = self.lengths[rows]
        self.set_lengths(self.lengths)

    def num_keys(self, T):
        """N, how many positions attention reads in a call of T tokens.

        Raises ValueError if the cache has no room for them.
        """
        if self.max_length + T > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens in a row, not for "
                             f"{self.max_length + T}")
        return self.max_length + T

    def write(self, layer, k, v, positions):
        """Store k, v [B, K, T, d] at positions [B, T]; return all keys and values [B, K, N, d]."""
        T = k.shape[2]
        N = self.num_keys(T)
        for stored, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.ragged:
                # scatter_ would do the same, but on a CPU it copies all that is stored.
                rows = torch.arange(len(new), device=new.device)[:, None]  # [B, 1]
                stored.transpose(1, 2).index_put_((rows, positions), new.transpose(1, 2))
            else:  # all positions are the same: a plain copy
                stored[:, :, self.max_length:self.max_length + T] = new
        return self.k[layer][:, :, :N], self.v[layer][:, :, :N]


def attention_mask(positions, num_keys, window=None):
    """Bool [B, 1, T, N]: key j is seen from position i if i - window < j <= i."""
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
        self.layer, self.head_dim = layer, d
        self.scale = (config.query_pre_attn_scalar or d) ** -0.5
        self.softcap = config.attn_logit_softcapping
        self.q_proj = nn.Linear(D, H * d, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, K * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, K * d, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.o_bias)
        self.q_norm = RMSNorm(d, config) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config) if config.qk_norm else nn.Identity()

    def forward(self, x, positions, rope, mask, cache):
        """x [B, T, D] -> [B, T, D]; the other inputs are those of Decoder.layer_inputs."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # [B, T, H, d]
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # [B, T, K, d]
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # [B, T, K, d]
        q = rotate(self.q_norm(q), *rope).transpose(1, 2)  # [B, H, T, d]
        k = rotate(self.k_norm(k), *rope).transpose(1, 2)  # [B, K, T, d]
        v = v.transpose(1, 2)                              # [B, K, T, d]
        if cache is not None:
            k, v = cache.write(self.layer, k, v, positions)  # [B, K, N, d]
        attend = self.attend_capped if self.softcap else self.attend
        out = attend(q, k, v, mask)  # [B, H, T, d]
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v, mask):
        """q [B, H, T, d], k and v [B, K, N, d] -> [B, H, T, d].

        mask is bool [B, 1, T, N]. It is None in two cases: one token that sees all keys, or T = N
        tokens of which each sees itself and those before it.
        """
        B, H, T, d = q.shape
        K = k.shape[1]
        if T == 1:
            # The H/K query heads that share a key/value head become H/K rows of it, as they are at
            # one position. So the kernel does not copy the keys for each head. On a CPU, at 2048
            # positions, it saves 4% of Llama 3.2 1B's step in float32 and 20% in bfloat16.
            q = q.reshape(B, K, H // K, d)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1,
                                             scale=self.scale, enable_gqa=q.shape[1] != K)
        return out.reshape(B, H, T, d)

    def attend_capped(self, q, k, v, mask):
        """As attend(), but with Gemma 2's cap on the scores, which the fused kernel does not have.

        Here the mask is never None.
        """
        B, H, T, d = q.shape
        K, N = k.shape[1:3]
        q = q.reshape(B, K, H // K * T, d)  # query heads that share a key/value head
        scores = q @ k.mT * (self.scale / self.softcap)  # [B, K, H/K * T, N]
        scores = torch.tanh(scores) * self.softcap
        scores = scores.view(B, H, T, N).masked_fill(~mask, -math.inf)
        weights = torch.softmax(at_least_float32(scores), dim=-1).to(v.dtype)
        out = weights.view(B, K, H // K * T, N) @ v  # [B, K, H/K * T, d]
        return out.view(B, H, T, d)


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
        z = self.act_fn(self.gate_proj(x)) * self.up_proj(x)  # (1) [B, T, F]
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
        """x [B, T, D] -> [B, T, D]; the other inputs are those of Decoder.layer_inputs."""
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
        self.inv_freq = rope_frequencies(config)  # no buffer: a cast of the model must not reach it
        self.gradient_checkpointing = False  # distill.py turns it on for large models

    def forward(self, tokens, cache=None):
        """The final embedding, after the last norm: tokens [B, T] int64 -> [B, T, D].

        With a cache the tokens continue each row at cache.lengths.
        """
        x = self.embed(tokens)
        for layer, inputs in zip(self.layers, self.layer_inputs(tokens, cache)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recompute_later(layer, x, *inputs, use_reentrant=False,
                                    preserve_rng_state=False)
            else:
                x = layer(x, *inputs)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def embed(self, tokens):
        """The first layer's input: tokens [B, T] int64 -> [B, T, D].

        Raises ValueError on a token id that has no embedding. CUDA reports it later and otherwise.
        """
        try:
            x = self.embed_tokens(tokens)
        except IndexError:
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()}, but embeddings of 0 to "
                             f"{self.config.vocab_size - 1}: another model's tokenizer?") from None
        if self.config.scale_embeddings:  # by a factor rounded to the dtype, as Gemma does
            x = x * torch.tensor(self.config.hidden_size ** 0.5, dtype=x.dtype)
        return x

    def layer_inputs(self, tokens, cache=None):
        """For each layer its inputs besides x: (positions [B or 1, T], rope, mask, cache)."""
        T = tokens.shape[1]
        positions = torch.arange(T, device=tokens.device)[None]  # [1, T]
        num_keys, ragged = T, False
        if cache is not None:
            positions = cache.lengths[:, None] + positions  # [B, T]
            num_keys, ragged = cache.num_keys(T), cache.ragged
        rope = self.rope(positions)
        # No mask is needed if the one new token sees all keys (T = 1), or if all keys are of this
        # call (T = N), where the fused kernel's own causal rule is enough. It cannot cap scores.
        capped = self.config.attn_logit_softcapping is not None
        plain = T in (1, num_keys) and not ragged and not capped
        masks = {}
        for window in set(self.config.windows):
            fits = window is None or num_keys <= window
            masks[window] = None if plain and fits else attention_mask(positions, num_keys, window)
        return [(positions, rope, masks[window], cache) for window in self.config.windows]

    def rope(self, positions):
        """cos and sin [B or 1, T, 1, d] of the rotary angles; computed in float32, then cast."""
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
        """The head: final embeddings [..., D] -> [..., V], capped if the config says so."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = F.linear(hidden_states, head.weight)
        cap = self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits

    def new_cache(self, batch_size, capacity):
        """An empty Cache for batch_size sequences of at most `capacity` tokens each."""
        return Cache(self.config, batch_size, capacity, self.device, self.dtype)

    @torch.no_grad()
    def decode(self, tokens, cache):
        """One decode step: tokens [B] int64 -> logits [B, V]; the cache advances by one token."""
        onednn = torch.backends.mkldnn.enabled
        if len(tokens) == 1:  # torch's own product of one row, measured in bfloat16, is faster
            torch.backends.mkldnn.enabled = False
        try:
            hidden_states = self.model(tokens[:, None], cache)  # [B, 1, D]
            return self.logits(hidden_states[:, 0])
        finally:
            torch.backends.mkldnn.enabled = onednn

    @classmethod
    def from_pretrained(cls, path_or_repo_id, device="cpu", dtype=None):
        """Load a folder in the official layout, or a hub repo id.

        dtype None keeps the one that config.json names. A head that is stored beside a tied
        embedding and differs from it is used, as in transformers. Raises ValueError or OSError in
        one line that says which file or tensor is at fault and what to do.
        """
        folder = resolve(path_or_repo_id)
        config = Config.from_dict(read_json(folder / "config.json"), folder / "config.json")
        weights = read_weights(folder, device, dtype or config.dtype)
        if config.tie_word_embeddings and HEAD in weights:
            weights.setdefault(EMBEDDING, weights[HEAD])  # some converters store the head alone
            if torch.equal(weights[HEAD], weights[EMBEDDING]):
                del weights[HEAD]
            else:  # the stored head counts
                config = replace(config, tie_word_embeddings=False)
        with torch.device("meta"):
            model = cls(config)
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:  # many lines
            raise ValueError(f"{folder} does not fit its config.json: is a file missing, or from "
                             f"another model? {' '.join(str(error).split()):.500}") from None
        return model.requires_grad_(False).eval()


# ======== The model ends here. Below: config.json and files ========

# ---- config.json

# The value of a key that config.json leaves out: for every family, and for one.
DEFAULTS = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "attention_bias": False,
            "use_sliding_window": False, "max_window_layers": 28, "window_step": 1}
FAMILY_DEFAULTS = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
               "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
               "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
               "hidden_activation": "gelu_pytorch_tanh"},
}
# What a family's own code does, no matter what config.json says.
FAMILY_RULES = {
    "llama": {"use_sliding_window": False},
    "mistral": {"use_sliding_window": True, "max_window_layers": 0, "attention_bias": False},
    "qwen2": {"attention_bias": True, "o_bias": False},
    "qwen3": {"qk_norm": True},
    "gemma2": {"use_sliding_window": True, "max_window_layers": 0, "window_step": 2,
               "scale_embeddings": True, "norm_plus_one": True, "post_norms": True},
}
# For these keys null is a value: no window, no cap, as many as query heads. For all others null
# means that the key is left out.
NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
            "num_key_value_heads")
LLAMA3_RULE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NOT_IMPLEMENTED = ("mlp_bias", "use_bidirectional_attention", "quantization_config", "quantization")


def read_config(raw, source):
    """The Config of a config.json of the classic or the newer style (rope_parameters, layer_types).

    Raises ValueError that names the source and what is missing, wrong or not implemented.
    """
    try:
        values = config_values(raw)
        names = [f.name for f in fields(Config) if f.name in values or f.default is MISSING]
        return Config(**{name: values[name] for name in names})
    except KeyError as error:
        raise ValueError(f"{source} lacks {error}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{source} holds a value that cannot be used: {error}") from None


def config_values(raw):
    """What a config.json says and what its family implies, by the names of Config's fields."""
    if not isinstance(raw, dict):
        raise ValueError("it must be a JSON object")
    family = one_of("model_type", raw.get("model_type"), FAMILY_DEFAULTS)
    for key in NOT_IMPLEMENTED:
        if raw.get(key):
            raise ValueError(f"{key} is not implemented")
    given = {key: value for key, value in raw.items() if value is not None or key in NULLABLE}
    values = DEFAULTS | FAMILY_DEFAULTS[family] | given | FAMILY_RULES[family]
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
    values.setdefault("head_dim", values["hidden_size"] // heads)
    values.setdefault("o_bias", values["attention_bias"])
    # Gemma 2's code ignores hidden_act, which its first config files carry as well.
    act = values.get("hidden_activation", values.get("hidden_act", "silu"))
    values["hidden_act"] = one_of("hidden_act", act, ACTIVATIONS)
    dtype = values.get("dtype", values.get("torch_dtype", "float32"))
    values["dtype"] = DTYPES[one_of("dtype", dtype, DTYPES)]
    values["windows"] = layer_windows(values)
    return values | rope_values(values)


def one_of(name, value, known):
    """The value, if it is known; else ValueError."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
    return value


def rope_values(values):
    """rope_theta and rope_scaling from either style; ValueError on a type not implemented."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_scaling is {rope!r}, but must be one object, none per layer type")
    pretrained = {"original_max_position_embeddings": values.get("max_position_embeddings")}
    values = values | pretrained | rope
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    one_of("rope type", rope_type, ("default", "llama3"))
    if values["partial_rotary_factor"] != 1.0:
        raise ValueError("partial_rotary_factor is not implemented")
    scaling = {key: float(values[key]) for key in LLAMA3_RULE} if rope_type == "llama3" else None
    return {"rope_theta": values["rope_theta"], "rope_scaling": scaling}


def layer_windows(values):
    """Sliding window per layer (None: full attention), by layer_types or by the family's rule."""
    # Qwen configs carry a window even where it is off.
    window = values.get("sliding_window") if values["use_sliding_window"] else None
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window is {window!r}, not a positive int")
    layers = range(values["num_hidden_layers"])
    sliding = layers[values["max_window_layers"]::values["window_step"]]
    by_rule = ["sliding_attention" if i in sliding else "full_attention" for i in layers]
    types = values.get("layer_types") or by_rule
    windows = {"sliding_attention": window, "full_attention": None}
    if len(types) != len(layers) or set(types) - set(windows):
        raise ValueError(f"{len(types)} layer_types for {len(layers)} layers: {set(types)}")
    return tuple(windows[layer_type] for layer_type in types)


# ---- files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
REPO_FILES = ["*config.json", "model*.safetensors", INDEX, "tokenizer.json", "special_tokens*",
              "*.jinja"]  # what is fetched from the hub


def advice(path, otherwise):
    """What to do about a path that cannot be read: what beyond/foreign_files.py says, if it can."""
    try:
        from beyond.foreign_files import explain
    except ImportError:
        return otherwise
    return explain(path) or otherwise


def read_json(file):
    """The content of a JSON file. Raises OSError or ValueError in one line that names it."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        reason = f"is not text in UTF-8 (byte {error.start + 1})"
    except (ValueError, RecursionError) as error:
        reason = f"is not valid JSON ({error})"
    raise ValueError(f"{file} {reason}; {advice(file, 'correct or fetch it again')}")


def resolve(name):
    """The local folder of a model, given its path or, if there is no such folder, its hub repo id.

    A repo id is a str owner/name. Raises OSError in one line that says what to do, also for a
    folder that does not hold a model in the official layout.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = fetch(name)
    has_weights = (folder / INDEX).exists() or any(folder.glob("model*.safetensors"))
    is_adapter = (folder / "adapter_config.json").exists()
    if is_adapter or not has_weights or not (folder / "config.json").exists():
        needed = "it must hold config.json and model*.safetensors, and no adapter_config.json"
        raise FileNotFoundError(f"{folder} holds no readable model: {advice(folder, needed)}")
    return folder


def fetch(repo_id):
    """The folder of the hub's cache that holds REPO_FILES of a repo. Offline, the cache suffices.

    Raises OSError in one line that says what to do.
    """
    is_repo_id = isinstance(repo_id, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo_id)
    if not is_repo_id or Path(repo_id).exists():
        raise FileNotFoundError(f"{repo_id} is not a folder, and no hub repo id owner/name either; "
                                f"{advice(repo_id, 'check its spelling')}")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(repo_id, allow_patterns=REPO_FILES))
    except Exception as error:  # proxies, certificates, gates: several libraries' errors
        first_line = (str(error) or repr(error)).splitlines()[0]
        raise OSError(f"{repo_id} is no folder here, and the hub did not send it: {first_line} "
                      "(check spelling and network; a gated repo needs `hf auth login`)") from None


def weight_files(folder):
    """The safetensors files that together hold the weights of a model.

    If there is an index, they are those that it names, whatever they are called. Else it is
    model.safetensors. Else they are all model*.safetensors, which must be shards of one set. Raises
    ValueError in one line.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        try:
            return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} has no weight_map to files; fetch it again") from None
    if single.exists():
        return [single]
    files = sorted(folder.glob("model*.safetensors"))
    if len({re.sub(r"-\d+-of-", "-of-", file.name) for file in files}) > 1:
        raise ValueError(f"{folder} needs {INDEX} to say which of its files belong together: "
                         f"{', '.join(file.name for file in files)}")
    return files


def open_weights(file):
    """The open safetensors file; ValueError in one line if there is none."""
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is absent, cut off, or no safetensors file ({error}); "
                         f"{advice(file, 'fetch it again')}") from None


def read_weights(folder, device, dtype):
    """{name: tensor} of all weights in a folder; each goes straight to its device and dtype.

    On the CPU, one that has the dtype already stays a private, copy-on-write view of the file.
    Raises ValueError on a tensor that does not hold floats, or that two files hold.
    """
    weights = {}
    for file in weight_files(folder):
        for name in open_weights(file).keys():
            # Opened anew for each tensor: closing frees the pages, so no cast stands beside a file.
            tensor = open_weights(file).get_tensor(name)
            if tensor.dtype not in DTYPES.values():
                raise ValueError(f"{file}: {name} is {tensor.dtype}, but only weights in "
                                 f"{', '.join(DTYPES)} are read")
            if name in weights:
                raise ValueError(f"{file}: {name} is in another file as well; remove one of them")
            if not name.endswith("rotary_emb.inv_freq"):  # a table that old converters store
                weights[name] = tensor.to(device).to(dtype)  # the device casts faster
    return weights
