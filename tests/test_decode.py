"""The decode step, its graphs, and the batch around it.

Run: python -m pytest tests/test_decode.py
"""

from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_families import FAMILIES, FIXTURES
from torch.testing import assert_close

import caprese
import data
import sample
from model import Cache, Step, Transformer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
METHODS = ["full", *caprese.METHODS]


def attach(model, method, density=0.4, rank=6):
    """Set up one of METHODS, its correction filled with numbers that matter."""
    if method != "full":
        tiny.fill(caprese.attach(model, method, density, None, rank))
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.VARIANTS)
def test_a_step_of_fixed_num_keys_equals_the_ordinary_one(family, method, device):
    """What a captured graph runs: positions from the device, a fixed number of keys, a mask."""
    model = attach(tiny.model(device=device, **tiny.VARIANTS[family]), method)
    for lengths in ([9], [9, 5, 7]):
        prompt = tiny.tokens(len(lengths), 9, device=device)
        new = tiny.tokens(len(lengths), 6, seed=4, device=device)
        found = []
        for num_keys in (None, 20):
            step, _ = sample.prefill(model, prompt, 11, lengths)
            read = (step.cache.k[0], step.cache.lengths, step.tokens)
            addresses = [tensor.data_ptr() for tensor in read]
            logits = []
            for token in new.T:
                step.tokens[:, 0] = token
                with caprese.phase(model, "sparse"):
                    logits.append(step.run(num_keys))
            found.append(torch.stack(logits))
            read = (step.cache.k[0], step.cache.lengths, step.tokens)
            assert addresses == [tensor.data_ptr() for tensor in read]
            assert step.cache.lengths.tolist() == [n + 6 for n in lengths]
            assert step.cache.num_keys is None
        assert_close(*found, **CLOSE)


def test_num_keys_follow_the_cache_closely():
    """Never too few, at most an eighth too many beyond 2048, and few different numbers."""
    step = Step(None, tiny.model(max_position_embeddings=40000).new_cache(1, 33000))
    seen = []
    for length in range(0, 33000, 7):
        step.cache.max_length = length
        seen.append(step.num_keys())
        assert length + 1 <= seen[-1] <= min(33000, max(length + 256, (length + 1) * 1.13))
    assert len(set(seen)) < 50


@pytest.fixture
def as_on_cuda(monkeypatch, device):
    """Steps are kept as they are on CUDA, whatever the device."""
    def new_cache(model, batch_size, capacity):
        return Cache(model.config, batch_size, capacity, device, model.dtype)
    monkeypatch.setattr(Transformer, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(Transformer, "new_cache", new_cache)


def test_a_step_is_used_again_only_where_it_fits(as_on_cuda, device):
    """The same number of rows and enough room; and it starts from nothing."""
    model = attach(tiny.model(device=device, max_position_embeddings=3000), "griffin")
    prompt = tiny.tokens(1, 6, device=device)
    expected = sample.generate(model, prompt, 8)
    step = model.last_step
    sample.generate(model, tiny.tokens(1, 12, seed=5, device=device), 8)
    assert model.last_step is step
    assert torch.equal(sample.generate(model, prompt, 8), expected)
    assert model.last_step is step and step.cache.capacity == 1024
    assert model.new_step(1, 1024) is step and step.cache.max_length == 0
    assert model.new_step(1, 1025) is not step
    assert model.new_step(2, 20) is not step
    many = sample.generate(model, prompt, 8, samples=3)
    assert torch.equal(many, expected.expand(3, -1))
    assert model.last_step is None  # its rows are others now


def load_other_weights(model):
    attach(model, "griffin")  # as it was
    other = attach(tiny.model(seed=5, device=model.model.norm.weight.device), "griffin")
    model.load_state_dict(other.state_dict(), assign=True)


def set_other_rank(model):
    for ff in caprese.sparse_layers(model).values():
        ff.set_adapter(L=torch.ones(32, 3), R=torch.ones(3, 32))


@pytest.mark.parametrize("change", [
    set_other_rank, load_other_weights, caprese.detach,
    lambda model: attach(model, "griffin", 0.7), lambda model: attach(model, "cats")])
def test_a_graph_does_not_outlive_what_it_reads(change, as_on_cuda, device):
    model, prompt = attach(tiny.model(device=device), "griffin"), tiny.tokens(1, 6, device=device)
    sample.generate(model, prompt, 8)
    step = model.last_step
    step.graphs["fake"] = None
    sample.generate(model, tiny.tokens(1, 7, seed=3, device=device), 8, reselect=3)
    assert model.last_step is step and "fake" in step.graphs  # the buffers are the same
    change(model)
    sample.generate(model, prompt, 8)
    assert model.last_step is step and "fake" not in step.graphs


def test_a_graphs_tensors_keep_their_storage(as_on_cuda, device):
    """So no new tensor can have an old address and pass for the one that the graph reads."""
    model, prompt = attach(tiny.model(device=device), "griffin"), tiny.tokens(1, 6, device=device)
    sample.generate(model, prompt, 3)
    captured = model.last_step.captured
    addresses = {tensor.data_ptr() for tensor in captured}
    ff = caprese.sparse_layers(model)[0]
    assert {ff.L.data_ptr(), ff.R.data_ptr(), ff.up_k.data_ptr()} <= addresses
    before = ff.L.detach().clone()
    del ff
    for _ in range(3):
        set_other_rank(model)
        attach(model, "griffin")
        for ff in caprese.sparse_layers(model).values():
            assert not {ff.L.data_ptr(), ff.R.data_ptr()} & addresses
        del ff
    assert any(t.shape == before.shape and torch.equal(t, before) for t in captured)


@pytest.mark.parametrize("reselect", [None, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_leave_change_nothing(family, method, reselect, device, monkeypatch):
    """Every family and method: a batch that shrinks as its rows end gives each row's own tokens.

    In float64, where another order of summation does not carry a gate across CATS' threshold.
    """
    model = Transformer.from_pretrained(FIXTURES / family, device, torch.float64)
    attach(model, method)
    tokens = load_file(FIXTURES / family / "expected.safetensors")["tokens"].reshape(-1)
    tokens, lengths = tokens.repeat(27)[:27].view(3, 9).to(device), [4, 9, 6]
    free = sample.generate(model, tokens, 10, prompt_lengths=lengths, reselect=reselect)
    stops = (int(free[0, 1]), int(free[1, 6]))
    sizes, reorder = [], sample.reorder

    def counted(model, step, rows):
        sizes.append(len(rows))
        return reorder(model, step, rows)
    monkeypatch.setattr(sample, "reorder", counted)
    settings = {"reselect": reselect, "stop_ids": stops}
    together = sample.generate(model, tokens, 10, prompt_lengths=lengths, **settings)
    assert sizes and max(sizes) < 3
    for row, length in enumerate(lengths):
        alone = sample.generate(model, tokens[row:row + 1, :length], 10, **settings)[0].tolist()
        assert data.until_stop(together[row].tolist(), stops) == alone


def test_samples_leave_one_by_one(device):
    """Rows of one prompt that share a selection keep sharing it as others leave."""
    model, prompt = attach(tiny.model(device=device), "griffin"), tiny.tokens(1, 6, device=device)

    def draw(stops):
        generator = torch.Generator(device).manual_seed(0)
        return sample.generate(model, prompt, 12, samples=6, temperature=1.0, stop_ids=stops,
                               generator=generator)
    stop = int(draw(())[2, 2])
    new = draw((stop,))
    assert caprese.sparse_layers(model)[0].compact and len(new) == 6
    for ids in new.tolist():
        if stop in ids:
            assert set(ids[ids.index(stop):]) == {stop}


def test_onednn_is_as_it_was_after_a_step():
    before = torch.backends.mkldnn.enabled
    sample.generate(tiny.model(), tiny.tokens(1, 6), 3)
    assert torch.backends.mkldnn.enabled == before
