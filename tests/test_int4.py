"""Weights of 4 bits (appendix D). Run: python -m pytest tests/test_int4.py"""

import copy

import tiny
import torch
from torch.testing import assert_close

import caprese
import distill
from paper.int4 import Int4FF, quantise

# The same float32 products in other orders: a few 1e-6 at logits of size 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def rounded_model(model):
    """A copy of a model whose FF weights are rounded in place: an independent reference."""
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(layer.mlp, name).weight
            weight.copy_(quantise(weight))
    return other


def test_a_group_has_16_levels_and_keeps_its_extremes():
    """No weight is off by more than half a step."""
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    rounded = quantise(weight, group=32)
    for ours, theirs in zip(rounded.view(20, 32), weight.view(20, 32)):
        step = (theirs.max() - theirs.min()) / 15
        assert len(ours.unique()) <= 16 and (ours - theirs).abs().max() <= step / 2 * 1.0001
        assert_close(ours.aminmax(), theirs.aminmax())


def test_a_group_is_64_weights_or_what_divides_the_width():
    weight = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([quantise(weight[:, i:i + 32], 32) for i in (0, 32, 64)], dim=1)
    assert_close(quantise(weight), expected)
    assert quantise(torch.full((2, 64), 0.5)).eq(0.5).all()  # a group of equal weights
    assert quantise(weight.bfloat16()).dtype == torch.bfloat16


def test_decoding_is_the_model_with_rounded_weights(device):
    """Prompt tokens use the exact weights; with all tokens generated, it is the rounded model."""
    model, tokens = tiny.model(device=device), tiny.tokens(2, 12, device=device)
    expected, full = rounded_model(model)(tokens), model(tokens)
    caprese.attach(model, Int4FF, layers="all")
    with caprese.phase(model, "decode"):
        assert_close(model(tokens), expected, **CLOSE)
    assert (expected - full).abs().max() > 0.05
    forced = caprese.teacher_forced(model, tokens, [5, 7])
    for row, length in enumerate([5, 7]):
        assert_close(forced[row, :length], full[row, :length], **CLOSE)
        assert (forced[row, length:] - full[row, length:]).abs().max() > 0.01


def test_four_bits_cost_less_than_half_of_the_neurons(device):
    model, tokens = tiny.model(device=device), tiny.tokens(2, 12, device=device)
    full = model(tokens)
    off = []
    for method in (Int4FF, "griffin"):
        caprese.attach(model, method, 0.5, "all", rank=6)
        found = caprese.teacher_forced(model, tokens, [5, 7])
        off.append((found - full)[:, 7:].abs().mean())
    assert 0.01 < off[0] < off[1]


def test_residual_is_what_the_rounded_ff_lacks(device):
    model = tiny.fill(caprese.attach(tiny.model(device=device), Int4FF, rank=4))
    ff = caprese.sparse_layers(model)[1]
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with caprese.phase(model, "decode"):
        decoded = ff(x)
    residual = ff.residual(x, torch.ones(2, 9, dtype=torch.bool, device=device))
    assert_close(residual, ff(x) - (decoded - ff.correction(x)), **CLOSE)
    assert residual.abs().max() > 0.01


def test_it_is_learned_as_the_sparse_methods_are(device):
    """In closed form, x L R of full rank explains some of the error of rounding."""
    model = caprese.attach(tiny.model(device=device), Int4FF, rank=32)
    samples = [(row[:4].tolist(), row[4:].tolist()) for row in tiny.tokens(16, 24)]
    batch = distill.data.collate(samples, range(16), model.device)
    assert distill.unexplained(model, samples) == 1  # R is zero
    distill.fit_closed_form(model, [batch])
    assert distill.unexplained(model, samples) < 0.9


def test_it_has_no_density_and_uses_all_parameters(tmp_path, device):
    model = tiny.fill(caprese.attach(tiny.model(device=device), Int4FF, 0.3, rank=4))
    assert list(caprese.sparse_layers(model)) == [0, 1, 2, 3]
    for ff in caprese.sparse_layers(model).values():
        assert ff.density == 1
        assert ff.active_parameters() == 3 * 32 * 80 + 2 * 32 * 4
    tokens, file = tiny.tokens(1, 9, device=device), tmp_path / "int4.safetensors"
    expected = caprese.teacher_forced(model, tokens, [4])
    caprese.save_adapter(model, file)
    assert caprese.read_adapter(file)[1]["method"] == "paper.int4:Int4FF"
    caprese.load_adapter(caprese.detach(model), file, method=Int4FF)
    assert_close(caprese.teacher_forced(model, tokens, [4]), expected, rtol=0, atol=0)
