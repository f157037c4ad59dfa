"""The oracle top-k of figure 2. Run: python -m pytest tests/test_oracle.py"""

import pytest
import tiny
import torch
from torch.testing import assert_close

import caprese
from paper.oracle import OracleFF

# The same float32 products in other orders: a few 1e-6 at logits of size 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_it_keeps_the_largest_of_each_token(device):
    ff = caprese.sparse_layers(caprese.attach(tiny.model(device=device), OracleFF, 0.25))[0]
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)).to(device)
    gate, z = ff.neurons(x)
    kept = ff.sparsify(x, gate, z)
    assert (kept != 0).sum(-1).eq(20).all()
    assert kept[kept != 0].eq(z[kept != 0]).all()
    smallest = z.abs().sort(-1, descending=True).values[..., 19]
    assert (z - kept).abs().amax(-1).le(smallest).all()


def test_no_other_choice_of_as_many_neurons_drops_less_of_z(device):
    """It bounds GRIFFIN and CATS from below, token by token."""
    model, dropped = tiny.model(device=device), {}
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).to(device)
    for method in (OracleFF, "griffin"):
        ff = caprese.sparse_layers(caprese.attach(model, method, 0.4))[0]
        gate, z = ff.neurons(x)
        kept = ff.sparsify(x, gate, z, ff.selection(x, gate, z, None))
        dropped[method] = (z - kept).norm(dim=-1)
    assert (dropped[OracleFF] < dropped["griffin"]).all()


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_decoding_and_teacher_forcing_agree(density, device):
    model, tokens = tiny.model(device=device), tiny.tokens(2, 12, device=device)
    full = model(tokens)
    tiny.fill(caprese.attach(model, OracleFF, density, rank=0 if density == 1 else 4))
    with caprese.phase(model, "decode"):
        decoded = model(tokens)
    assert_close(caprese.teacher_forced(model, tokens, [1, 1])[:, :1], full[:, :1], **CLOSE)
    ff, x = caprese.sparse_layers(model)[0], torch.randn(1, 5, 32, device=device)
    generated = torch.ones(1, 5, dtype=torch.bool, device=device)
    assert_close(ff.teacher_forced(x, generated), ff.decode(x), **CLOSE)
    far = (decoded - full).abs().max()
    assert far < 1e-4 if density == 1 else far > 0.05


def test_it_uses_all_parameters_of_all_layers(device):
    layers = caprese.sparse_layers(caprese.attach(tiny.model(device=device), OracleFF, 0.25))
    assert list(layers) == [0, 1, 2, 3]
    assert all(ff.active_parameters() == 3 * 32 * 80 for ff in layers.values())
