"""The transformer by itself: cache, masks, norms, rotary angles.

Run: python -m pytest tests/test_model.py
"""

import math
from pathlib import Path

import pytest
import tiny
import torch
from torch.testing import assert_close

from model import (Attention, Config, RMSNorm, Transformer, attention_mask, rope_frequencies,
                   rotate)

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = sorted(f.parent.name for f in FIXTURES.glob("*/expected.safetensors"))
# Cached and uncached runs add the same float32 products in another order: they differ by a few 1e-6
# at logits of size 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=tiny.VARIANTS)
def model(request, device):
    return tiny.model(device=device, **tiny.VARIANTS[request.param])


def continued(model, cache, pieces):
    """Logits [B, T, V] of these pieces of tokens, fed one after the other."""
    return torch.cat([model.logits(model.model(piece, cache)) for piece in pieces], dim=1)


@pytest.mark.parametrize("cuts", [[1], [7], list(range(1, 14)), [3, 4, 9]])
def test_cache_in_pieces_equals_one_pass(model, device, cuts):
    """Token by token, and in chunks that start in the middle of a window."""
    tokens = tiny.tokens(2, 14, device=device)
    found = continued(model, model.new_cache(2, 14), torch.tensor_split(tokens, cuts, dim=1))
    assert_close(found, model(tokens), **CLOSE)


def test_ragged_rows_equal_each_row_alone(model, device):
    """The padding on the right is never seen, neither by the prefill nor by later steps."""
    lengths = torch.tensor([9, 4, 6], device=device)
    tokens, new = tiny.tokens(3, 9, device=device), tiny.tokens(3, 5, seed=3, device=device)
    cache = model.new_cache(3, 14)
    model.model(tokens, cache)
    cache.set_lengths(lengths)
    found = continued(model, cache, new.split((1, 2, 2), dim=1))
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat((tokens[row:row + 1, :length], new[row:row + 1]), dim=1)
        assert_close(found[row:row + 1], model(alone)[:, length:], **CLOSE)


@pytest.mark.parametrize("lengths", [[9], [9, 4, 6]], ids=["alone", "ragged"])
def test_a_decode_step_equals_one_pass(model, device, lengths):
    """Each step gives the logits of the next token, and each row grows by one."""
    prompts = tiny.tokens(len(lengths), 9, device=device)
    new = tiny.tokens(len(lengths), 4, seed=3, device=device)
    cache = model.new_cache(len(lengths), 13)
    model.model(prompts, cache)
    cache.set_lengths(torch.tensor(lengths, device=device))
    found = torch.stack([model.decode(tokens, cache) for tokens in new.T], dim=1)
    for row, length in enumerate(lengths):
        alone = torch.cat((prompts[row:row + 1, :length], new[row:row + 1]), dim=1)
        assert_close(found[row:row + 1], model(alone)[:, length:], **CLOSE)
    assert cache.lengths.tolist() == [length + 4 for length in lengths]
    assert cache.max_length == 13


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_onednn_is_as_it_was_after_a_step(monkeypatch, batch_size, enabled):
    """After a step, and after one that fails; a user may have turned it off."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    model, tokens = tiny.model(), tiny.tokens(1, batch_size)[0]
    seen = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    cache = model.new_cache(batch_size, 1)
    model.decode(tokens, cache)
    assert seen == [enabled and batch_size > 1]
    assert torch.backends.mkldnn.enabled == enabled
    with pytest.raises(ValueError, match="room for 1 "):
        model.decode(tokens, cache)
    assert torch.backends.mkldnn.enabled == enabled


def test_a_decode_step_keeps_nothing_for_gradients():
    model = tiny.model().requires_grad_(True)
    assert not model.decode(tiny.tokens(1, 1)[0], model.new_cache(1, 1)).requires_grad


@pytest.mark.parametrize("lengths", [[5, 5], [5, 2]], ids=["equal", "ragged"])
@pytest.mark.parametrize("new", [1, 4])
def test_what_does_not_fit_the_cache_is_refused(model, device, lengths, new):
    """Before anything is written."""
    cache = model.new_cache(2, 5 + new - 1)
    model.model(tiny.tokens(2, 5, device=device), cache)
    cache.set_lengths(torch.tensor(lengths, device=device))
    before = [stored.clone() for stored in (*cache.k, *cache.v)]
    with pytest.raises(ValueError, match=f"room for {4 + new} tokens in a row, not for {5 + new}"):
        model.model(tiny.tokens(2, new, device=device), cache)
    assert all(torch.equal(*pair) for pair in zip(before, (*cache.k, *cache.v)))
    assert cache.lengths.tolist() == lengths


@pytest.mark.parametrize("bad", [-1, 97, 150, 2 ** 40])
def test_a_token_beyond_the_embedding(bad):
    model, tokens = tiny.model(), tiny.tokens(1, 5)
    tokens[0, 3] = bad
    calls = [lambda: model(tokens), lambda: model.decode(tokens[0], model.new_cache(5, 1))]
    for call in calls:
        with pytest.raises(ValueError, match=f"{bad}.*embeddings of 0 to 96") as e:
            call()
        assert "\n" not in str(e.value)


def test_a_rewound_cache_is_written_anew(model, device):
    """What reselection does: it steps back over some tokens and feeds others in their place."""
    tokens, others = tiny.tokens(1, 12, device=device), tiny.tokens(1, 4, seed=4, device=device)
    cache = model.new_cache(1, 12)
    model.model(tokens, cache)
    cache.advance(-4)
    found = continued(model, cache, [others])
    assert_close(found, model(torch.cat((tokens[:, :8], others), dim=1))[:, 8:], **CLOSE)
    assert cache.max_length == 12 and cache.lengths.tolist() == [12]


def test_a_row_that_occurs_several_times_continues_as_often(model, device):
    tokens, new = tiny.tokens(2, 7, device=device), tiny.tokens(6, 1, seed=5, device=device)
    cache = model.new_cache(2, 8)
    model.model(tokens, cache)
    rows = torch.arange(2, device=device).repeat_interleave(3)
    cache.reorder(rows)
    found = continued(model, cache, [new])
    assert_close(found, model(torch.cat((tokens[rows], new), dim=1))[:, -1:], **CLOSE)


def test_nothing_looks_ahead(model, device):
    tokens = tiny.tokens(1, 12, device=device)
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


@pytest.mark.parametrize("window", [None, 6])
def test_a_mask_is_made_only_where_attention_needs_one(window):
    """A mask keeps the fused kernel from its causal path, which is much faster on long prompts."""
    model = tiny.model(model_type="mistral", sliding_window=window)

    def masked(length, new, capacity=20, lengths=None):
        cache = model.new_cache(2, capacity)
        if length:
            model.model(tiny.tokens(2, length), cache)
        if lengths:
            cache.set_lengths(torch.tensor(lengths))
        return model.model.layer_inputs(tiny.tokens(2, new), cache)[0][2] is not None
    assert not masked(0, 6) and not masked(5, 1)  # a whole prompt; one token that sees all
    assert masked(4, 2)                           # several tokens that continue a row
    assert masked(4, 1, lengths=[4, 3])           # rows of different lengths
    assert masked(0, 7) == masked(6, 1) == (window is not None)  # a key beyond the window
    model.model.config.attn_logit_softcapping = 50.0
    assert masked(0, 6) and masked(5, 1)          # the cap is not of the fused kernel


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("T, masked", [(1, False), (1, True), (5, False), (5, True)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_head_by_head(heads, T, masked, softcap):
    """Against the definition, in float64; so it also shows sums in a lower precision."""
    H, K = heads
    config = Config.from_dict(tiny.CONFIG | {"num_attention_heads": H, "num_key_value_heads": K,
                                             "head_dim": 8})
    config.attn_logit_softcapping = softcap
    attention = Attention(config, 0)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    S = T if T > 1 and not masked else 7
    q, k, v = random(2, H, T, 8), random(2, K, S, 8), random(2, K, S, 8)
    if masked:
        mask = random(2, 1, T, S) > 0
        mask[..., 0] = True
    else:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None].expand(2, 1, T, S)
    attend = attention.attend_capped if softcap else attention.attend
    found = attend(q, k, v, mask if masked or softcap else None)
    for head in range(H):
        shared = head // (H // K)
        scores = q[:, head] @ k[:, shared].mT / 8 ** 0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.softmax(scores.masked_fill(~mask[:, 0], -math.inf), dim=-1)
        assert_close(found[:, head], weights @ v[:, shared], rtol=1e-10, atol=1e-10)


def test_rotary_angles():
    """The llama3 rule, band by band, and the rotation, against their definitions."""
    config = Config.from_dict(tiny.CONFIG | {"head_dim": 16, "rope_theta": 1000.0,
                                             "rope_scaling": tiny.LLAMA3})
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

    a, b, c, d = 0.7, -1.1, 0.4, 2.3  # the pairs are (a, c) and (b, d): halves, not neighbours
    x = torch.tensor([[[[a, b, c, d]]]], dtype=torch.float64)
    angles = torch.tensor([0.3, 1.2, 0.3, 1.2], dtype=torch.float64)
    turned = [a * math.cos(.3) - c * math.sin(.3), b * math.cos(1.2) - d * math.sin(1.2),
              c * math.cos(.3) + a * math.sin(.3), d * math.cos(1.2) + b * math.sin(1.2)]
    found = rotate(x, angles.cos(), angles.sin()).flatten()
    assert_close(found, torch.tensor(turned, dtype=torch.float64))


def test_gemma_norm_keeps_small_weights_in_bfloat16():
    """1 + 0.003 is 1 in bfloat16: the sum has to be taken in float32."""
    norm = RMSNorm(64, Config.from_dict(tiny.CONFIG | {"model_type": "gemma2"})).bfloat16()
    norm.weight.data.fill_(0.003)
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    mean_square = x.double().square().mean(-1, keepdim=True)
    exact = x.double() * (mean_square + norm.eps).rsqrt() * (1 + norm.weight.double())
    assert torch.equal(norm(x), exact.to(torch.bfloat16))


def test_gemma_norm_in_float64():
    norm = RMSNorm(64, Config.from_dict(tiny.CONFIG | {"model_type": "gemma2"})).double()
    norm.weight.data.fill_(0.003)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * 1.003
    assert_close(norm(x), exact, rtol=1e-12, atol=1e-12)


@pytest.fixture
def restored_default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_global_default_dtype_changes_nothing(family, dtype, default, restored_default_dtype):
    """Weights, rotary frequencies, and logits in one pass, in chunks and in a ragged decode."""
    tokens = torch.arange(1, 25).view(2, 12)

    def everything():
        model = Transformer.from_pretrained(FIXTURES / family, dtype=dtype)
        cache = model.new_cache(2, 14)
        found = list(model.state_dict().values()) + [model.model.inv_freq, model(tokens)]
        found += [continued(model, cache, tokens.split((5, 7), dim=1))]
        cache.set_lengths(torch.tensor([12, 3]))
        found += [model.decode(tokens[:, 0], cache), model.decode(tokens[:, 1], cache)]
        return found
    expected = everything()
    torch.set_default_dtype(default)
    found = everything()
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert found[-1].dtype == dtype


def test_bfloat16_stays_near_float32(model, device):
    """Rounding to 8 bits in 4 layers does no more; wrong dtypes inside would raise or drift off."""
    tokens = tiny.tokens(2, 10, device=device)
    exact = model(tokens)
    rough = model.bfloat16()(tokens)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


def test_positions_are_counted_in_float32():
    """Bfloat16 cannot count past 256; a bfloat16 model's angles are computed before rounding."""
    model = tiny.model().bfloat16()
    cos, _ = model.model.rope(torch.tensor([[1001]]))
    assert_close(cos[0, 0, 0, 0].item(), math.cos(1001), rtol=0, atol=2 ** -8)


def test_gradients_reach_inputs_after_generation():
    """What inference mode leaves behind (the rotary table) must not stop a later training step."""
    model = tiny.model()
    with torch.inference_mode():
        model(tiny.tokens(1, 4))
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model(tiny.tokens(1, 4)).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient(model, device):
    gradients = []
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    for model.model.gradient_checkpointing in (False, True):
        weight.grad = None
        model(tiny.tokens(2, 6, device=device)).square().mean().backward()
        gradients.append(weight.grad)
    assert_close(*gradients, **CLOSE)
