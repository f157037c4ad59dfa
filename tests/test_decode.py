"""The decode step and the batch around it. Run: python -m pytest tests/test_decode.py"""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_families import FAMILIES, FIXTURES
from test_model import VARIANTS
from torch.testing import assert_close

import caprese
import data
import sample
from model import Step, Transformer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
WAYS = {"full": None, "griffin": ("griffin", 0.4, None, 6), "cats": ("cats", 0.4, None, 6), "topk": ("topk", 0.4),
        "int4": ("int4",), "lora": ("griffin", 0.4, None, 6, "lora")}


def attach(model, way):
    """Set up one of WAYS, its correction filled with numbers that matter."""
    if WAYS[way]:
        tiny.fill(caprese.attach(model, *WAYS[way]))
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", VARIANTS)
def test_a_step_of_fixed_span_equals_the_ordinary_one(family, way, monkeypatch):
    """What a captured graph runs: positions from the device, a fixed number of keys, a mask; rows alone and ragged."""
    monkeypatch.setattr(caprese, "ROW_BYTES", 0)
    model = attach(tiny.model(**VARIANTS[family]), way)
    for lengths in ([9], [9, 5, 7]):
        prompt, new = tiny.tokens(len(lengths), 9), tiny.tokens(len(lengths), 6, seed=4)
        found = []
        for span in (None, 20):
            step, _ = sample.prefill(model, prompt, 11, torch.tensor(lengths) if len(lengths) > 1 else None)
            at = step.cache.k[0].data_ptr(), step.cache.lengths.data_ptr(), step.tokens.data_ptr()
            logits = []
            for token in new.T:
                step.tokens[:, 0] = token
                logits.append(step.run(span))
            found.append(torch.stack(logits))
            assert at == (step.cache.k[0].data_ptr(), step.cache.lengths.data_ptr(), step.tokens.data_ptr())
            assert step.cache.lengths.tolist() == [n + 6 for n in lengths] and step.cache.span is None
        assert_close(*found, **CLOSE)


def test_spans_follow_the_cache_closely():
    """Never short, at most an eighth too long beyond 2048, few in number."""
    step = Step(None, tiny.model(max_position_embeddings=40000).new_cache(1, 33000), [])
    spans = []
    for length in range(0, 33000, 7):
        step.cache.max_length = length
        spans.append(step.span())
        assert length + 1 <= spans[-1] <= min(33000, max(length + 256, (length + 1) * 1.13))
    assert len(set(spans)) < 50


def test_a_step_is_used_again_only_where_it_fits():
    """As on CUDA, where graphs are kept: same rows, same blocks, enough room; and it starts from nothing."""
    model, prompt = attach(tiny.model(), "griffin"), tiny.tokens(1, 6)
    expected = sample.generate(model, prompt, 8)
    model.last_step = step = model.new_step(1, 20)
    sample.generate(model, tiny.tokens(1, 12, seed=5), 8)
    assert model.last_step is step and torch.equal(sample.generate(model, prompt, 8), expected)
    assert model.new_step(1, 20) is step and model.new_step(1, 21) is not step
    model.last_step = step
    assert model.new_step(2, 20) is not step
    model.last_step = step
    attach(model, "griffin")
    assert model.new_step(1, 20) is not step
    model.last_step = step = model.new_step(1, 20)
    assert torch.equal(sample.generate(model, prompt, 8, samples=3), expected.expand(3, -1))
    assert model.last_step is None  # its rows are others now


@pytest.mark.parametrize("lag", [0, 3, 100])
def test_a_late_host_yields_the_same_tokens(lag, monkeypatch):
    """On CUDA the host sees a row's end some steps later; nobody may notice."""
    model, prompts, lengths = tiny.model(), tiny.tokens(4, 6), torch.tensor([6, 3, 5, 4])
    free = sample.generate(model, prompts, 30, prompt_lengths=lengths)
    stops = (int(free[0, 3]), int(free[1, 9]), int(free[2, 14]))
    expected = sample.generate(model, prompts, 30, prompt_lengths=lengths, stop_ids=stops)
    monkeypatch.setitem(sample.LAG, "cpu", lag)
    assert torch.equal(sample.generate(model, prompts, 30, prompt_lengths=lengths, stop_ids=stops), expected)
    for row, ids in enumerate(expected.tolist()):
        assert data.until_stop(ids, stops) == data.until_stop(free[row].tolist(), stops)


@pytest.mark.parametrize("reselect", [None, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_leave_change_nothing(family, way, reselect, monkeypatch):
    """Every family and method: a batch that shrinks as its rows end gives each row's tokens as alone.

    In float64, where another order of summation does not carry a gate across CATS' threshold.
    """
    monkeypatch.setattr(caprese, "ROW_BYTES", 0)
    model = attach(Transformer.from_pretrained(FIXTURES / family, dtype=torch.float64), way)
    for ff in caprese.sparse_layers(model).values():
        ff.double()
    tokens, lengths = load_file(FIXTURES / family / "expected.safetensors")["tokens"], torch.tensor([4, 9, 6])
    tokens = tokens.reshape(-1)[:27].view(3, 9) if tokens.numel() >= 27 else tokens.reshape(-1).repeat(9)[:27].view(3, 9)
    free = sample.generate(model, tokens, 10, prompt_lengths=lengths, reselect=reselect)
    stops = (int(free[0, 1]), int(free[1, 6]))
    sizes, take = [], sample.take
    monkeypatch.setattr(sample, "take", lambda model, step, rows: sizes.append(len(rows)) or take(model, step, rows))
    together = sample.generate(model, tokens, 10, prompt_lengths=lengths, reselect=reselect, stop_ids=stops)
    assert sizes and max(sizes) < 3
    for row, n in enumerate(lengths):
        alone = sample.generate(model, tokens[row:row + 1, :n], 10, reselect=reselect, stop_ids=stops)[0].tolist()
        assert data.until_stop(together[row].tolist(), stops) == alone


def test_samples_leave_one_by_one():
    """Rows of one prompt that share a selection keep sharing it as others leave."""
    model, prompt = attach(tiny.model(), "griffin"), tiny.tokens(1, 6)
    draw = lambda stops: sample.generate(model, prompt, 12, samples=6, temperature=1.0, stop_ids=stops,
                                         generator=torch.Generator().manual_seed(0))
    stop = int(draw(())[2, 2])
    new = draw((stop,))
    assert caprese.fixed(model) and len(new) == 6
    assert all(set(ids[ids.index(stop):]) == {stop} for ids in new.tolist() if stop in ids)


def test_onednn_is_left_as_it_was():
    was = torch.backends.mkldnn.enabled
    sample.generate(tiny.model(), tiny.tokens(1, 6), 3)
    assert torch.backends.mkldnn.enabled == was
