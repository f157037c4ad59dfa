"""The transformer by itself: cache, masks, norms, rotary angles. Run: python -m pytest tests/test_model.py"""

import math

import pytest
import tiny
import torch
from torch.testing import assert_close

from model import Config, RMSNorm, Transformer, attention_mask, generated_mask, rope_frequencies, rotate

# Cached and uncached runs add the same float32 products in another order: a few 1e-6 at logits of size 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
VARIANTS = {
    "llama": {"rope_scaling": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "sliding_window": 5, "head_dim": 16, "num_key_value_heads": 2,
               "query_pre_attn_scalar": 12, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
}


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny.model(**VARIANTS[request.param])


def cached(model, tokens, cuts):
    """Logits [B, T, V] of tokens fed in pieces that end at `cuts`."""
    cache = model.new_cache(*tokens.shape)
    pieces = torch.tensor_split(tokens, cuts, dim=1)
    return torch.cat([model.logits(model.hidden(piece, cache)) for piece in pieces], dim=1)


@pytest.mark.parametrize("cuts", [[1], [7], list(range(1, 14)), [3, 4, 9]])
def test_cache_in_pieces_equals_one_pass(model, cuts):
    """Token by token, and in chunks that start in the middle of a window."""
    tokens = tiny.tokens(2, 14)
    assert_close(cached(model, tokens, cuts), model(tokens), **CLOSE)


def test_ragged_rows_equal_each_row_alone(model):
    """A batch padded on the right: the padding is never seen, neither by prefill nor by later steps."""
    lengths, new = torch.tensor([9, 4, 6]), tiny.tokens(3, 5, seed=3)
    tokens = tiny.tokens(3, 9)
    cache = model.new_cache(3, 14)
    model.hidden(tokens, cache)
    cache.set_lengths(lengths)
    # one token, then two at once, then the rest
    out = torch.cat([model.logits(model.hidden(piece, cache)) for piece in new.split((1, 2, 2), dim=1)], dim=1)
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat((tokens[row:row + 1, :length], new[row:row + 1]), dim=1)
        assert_close(out[row:row + 1], model(alone)[:, length:], **CLOSE)


def test_rewinding_rewrites(model):
    """What reselection does: step back over some tokens and feed others in their place."""
    tokens, others = tiny.tokens(1, 12), tiny.tokens(1, 4, seed=4)
    cache = model.new_cache(1, 12)
    model.hidden(tokens, cache)
    cache.move(-4)
    out = model.logits(model.hidden(others, cache))
    assert_close(out, model(torch.cat((tokens[:, :8], others), dim=1))[:, 8:], **CLOSE)
    assert cache.max_length == 12 and cache.lengths.tolist() == [12]


def test_taking_a_row_several_times_continues_it_as_often(model):
    tokens, new = tiny.tokens(2, 7), tiny.tokens(6, 1, seed=5)
    cache = model.new_cache(2, 8)
    model.hidden(tokens, cache)
    cache.take(torch.arange(2).repeat_interleave(3))
    out = model.logits(model.hidden(new, cache))
    assert_close(out, model(torch.cat((tokens.repeat_interleave(3, dim=0), new), dim=1))[:, -1:], **CLOSE)


def test_nothing_looks_ahead(model):
    tokens = tiny.tokens(1, 12)
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % tiny.CONFIG["vocab_size"]
    assert_close(model(tokens)[:, :8], model(changed)[:, :8], **CLOSE)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_window_of_w_sees_w_positions(window):
    """Through one layer, position i depends on i - w + 1 .. i and on nothing else."""
    model = tiny.model(model_type="mistral", sliding_window=window, num_hidden_layers=1)
    tokens, i = tiny.tokens(1, 12), 9
    seen = set()
    for j in range(12):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % tiny.CONFIG["vocab_size"]
        if (model(changed)[0, i] - model(tokens)[0, i]).abs().max() > 1e-3:
            seen.add(j)
    assert seen == set(range(i - window + 1, i + 1))


def test_attention_mask_by_rows():
    """Rows of different lengths, a window of 2: [B, 1, T, keys]."""
    mask = attention_mask(torch.tensor([[3], [1]]), 5, window=2)
    assert mask[:, 0, 0].int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_rotary_angles():
    """The llama3 rule, band by band, and the rotation, against their definitions in double precision."""
    config = Config.from_dict(tiny.CONFIG | {"head_dim": 16, "rope_theta": 1000.0, "rope_scaling": LLAMA3})
    expected = []
    for i in range(8):
        freq = 1000.0 ** (-2 * i / 16)
        wavelength = 2 * math.pi / freq
        if wavelength > 64 / 1.0:
            freq /= 8.0
        elif wavelength > 64 / 4.0:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            freq = (1 - smooth) * freq / 8.0 + smooth * freq
        expected.append(freq)
    assert_close(rope_frequencies(config), torch.tensor(expected), rtol=1e-6, atol=0)

    x, angle = torch.randn(1, 1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), [0.3, 1.2]
    both = torch.tensor(angle + angle, dtype=torch.float64)
    a, b, c, d = x.flatten().tolist()  # the pairs are (a, c) and (b, d): halves, not neighbours
    turned = [a * math.cos(.3) - c * math.sin(.3), b * math.cos(1.2) - d * math.sin(1.2),
              c * math.cos(.3) + a * math.sin(.3), d * math.cos(1.2) + b * math.sin(1.2)]
    assert_close(rotate(x, both.cos(), both.sin()).flatten(), torch.tensor(turned, dtype=torch.float64))


def test_gemma_norm_keeps_small_weights_in_bfloat16():
    """1 + 0.003 is 1 in bfloat16: the sum has to be taken in float32."""
    norm = RMSNorm(64, Config.from_dict(tiny.CONFIG | {"model_type": "gemma2"})).bfloat16()
    norm.weight.data.fill_(0.003)
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + norm.eps).rsqrt() * (1 + norm.weight.double())
    assert torch.equal(norm(x), exact.to(torch.bfloat16))


def test_bfloat16_stays_near_float32(model):
    """Bounded by what rounding to 8 bits in 4 layers can do; wrong dtypes inside would raise or drift off."""
    tokens = tiny.tokens(2, 10)
    exact = model(tokens)
    rough = model.bfloat16()(tokens)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


def test_positions_are_counted_in_float32():
    """Bfloat16 cannot count past 256; the angles of a bfloat16 model are computed before rounding."""
    model = tiny.model().bfloat16()
    cos, _ = model.rope(torch.tensor([[1001]]))
    assert_close(cos[0, 0, 0, 0].item(), math.cos(1001), rtol=0, atol=2 ** -8)


def test_generated_mask():
    tokens = torch.zeros(2, 4, dtype=torch.long)
    assert generated_mask(tokens, None) is None
    assert generated_mask(tokens, [1, 3]).int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]


def test_gradients_reach_inputs_after_generation():
    """What inference mode leaves behind (the rotary table) must not stop a later training step."""
    model = tiny.model()
    with torch.inference_mode():
        model(tiny.tokens(1, 4))
    model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model(tiny.tokens(1, 4)).sum().backward()
    assert model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_config_without_windows_runs_all_layers():
    config = Config(17, 8, 12, 3, 2, 2, 4)
    assert config.windows == (None, None, None)
    assert Transformer(config)(torch.tensor([[1, 2]])).shape == (1, 2, 17)
