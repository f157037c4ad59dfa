"""The batch around decode steps: rows leave it as they end.

Run: python -m pytest tests/test_decode.py
"""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_families import FAMILIES, FIXTURES

import caprese
import data
import sample
from model import Transformer

METHODS = ["full", *caprese.METHODS]


def attach(model, method, density=0.4, rank=6):
    """Set up one of METHODS, its correction filled with numbers that matter."""
    if method != "full":
        tiny.fill(caprese.attach(model, method, density, None, rank))
    return model


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
