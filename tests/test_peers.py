"""transformers' generate beside ours. Run: python -m pytest tests/test_peers.py"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

import bench
import caprese
import sample
from beyond import peers

BUNDLED = str(Path(bench.__file__).parent / "models" / "tiny-math")
QUICK = ["--device", "cpu", "--prompt", "6", "--generate", "3", "--repeats", "1"]
needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"),
                                        reason="needs transformers")
FAMILIES = {"llama": {}, "tied": {"tie_word_embeddings": True},
            "gemma2": {"model_type": "gemma2", "head_dim": 8}}


def command(monkeypatch, *flags):
    """The exit code of python -m beyond.peers with these flags, run in this process."""
    monkeypatch.setattr(sys, "argv", ["peers.py", *flags])
    try:
        sample.run_command(peers.main)
    except SystemExit as stop:
        return stop.code
    return 0


@needs_transformers
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_the_peer_computes_the_same_from_the_same_memory(changes):
    model = tiny.model(**changes)
    peer = peers.make_peer(model, tiny.CONFIG | changes)
    addresses = {name: p.data_ptr() for name, p in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        assert addresses[name] == parameter.data_ptr()
    tokens = tiny.tokens(1, 9)
    with torch.no_grad():
        # Two orders of summation in float32, logits of about 1.
        torch.testing.assert_close(peer(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


@needs_transformers
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_each_row_is_measured_in_both_with_the_same_method_attached(changes, monkeypatch):
    model = tiny.model(**changes)
    peer = peers.make_peer(model, tiny.CONFIG | changes)
    attached, generate = [], peers.generate

    def watched(peer, prompt, count, first_token):
        attached.append((list(caprese.sparse_layers(peer)), count))
        new = generate(peer, prompt, count, first_token)
        assert new.shape == (1, count)
        return new

    monkeypatch.setattr(peers, "generate", watched)
    args = peers.arguments(QUICK)
    sparse = {"method": "griffin", "rank": 6, "density": 0.4}
    results = peers.measure(model, peer, {"full": None, "GRIFFIN + Caprese": sparse}, args)
    names = ["full", "transformers, full", "GRIFFIN + Caprese", "transformers, GRIFFIN + Caprese"]
    assert [row["row"] for row in results] == names
    # Of each row a warm-up, here as long, and the measured run.
    assert attached == 2 * [([], 3)] + 2 * [([0, 1], 3)]
    for own, theirs in (results[:2], results[2:]):
        assert isinstance(theirs["ratio to full"], float) and theirs["saving reached"] is None
        for column in ("MB per token", "ratio bytes allow", "weights MB", "copies MB", "cache MB"):
            assert theirs[column] == own[column], column
        assert 0 < theirs["prefill s"] < theirs["total s"] and set(theirs) == set(own)
    assert results[1]["ratio bytes allow"] == 1 > results[3]["ratio bytes allow"]
    assert results[3]["copies MB"] > 0 and results[3]["selection s"] > 0
    assert not caprese.sparse_layers(model) and not caprese.sparse_layers(peer)


@needs_transformers
def test_the_command_prints_the_rows_of_both(monkeypatch, capsys):
    assert command(monkeypatch, *QUICK, "--model", BUNDLED, "--json", "--only", "GRIFFIN") == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["rows"]
    assert [row["row"] for row in rows] == ["GRIFFIN", "transformers, GRIFFIN"]
    assert BUNDLED in printed.err.splitlines()[0]


def test_without_only_the_rows_are_full_and_caprese():
    assert peers.arguments(QUICK).only == ["full", "GRIFFIN + Caprese"]


@needs_transformers
def test_the_first_token_is_timed_within_the_one_call(monkeypatch):
    """The clock counts its own readings: at the start, at the first token, at the end."""
    readings = iter(range(10))
    monkeypatch.setattr(bench, "clock", lambda device: next(readings))
    peer = peers.make_peer(tiny.model(), tiny.CONFIG)
    assert peers.time_peer(peer, tiny.tokens(1, 6), 4) == (1, 2)


# ---- what does not fit is said before anything slow

@pytest.fixture
def nothing_slow(monkeypatch):
    """Makes the model of a command a TypeError."""
    monkeypatch.setattr(bench, "make_model", None)


def refused(monkeypatch, capsys, *flags):
    """The one line that the command ends with."""
    assert command(monkeypatch, *QUICK, *flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    return printed.err


def test_without_transformers_it_is_refused(monkeypatch, capsys, nothing_slow):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install transformers" in refused(monkeypatch, capsys)


def test_reselection_is_refused(monkeypatch, capsys, nothing_slow):
    assert "--reselect" in refused(monkeypatch, capsys, "--reselect", "4")


@needs_transformers
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_this_version_of_transformers_fits(family):
    peers.check_transformers(family)


@needs_transformers
def test_a_version_that_fails_is_named(monkeypatch, capsys, nothing_slow):
    def fails(*args):
        raise TypeError("generate() has no such argument\nand more lines")

    import transformers
    monkeypatch.setattr(peers, "generate", fails)
    line = refused(monkeypatch, capsys)
    assert transformers.__version__ in line and "has no such argument" in line


@needs_transformers
def test_a_version_that_computes_other_tokens_is_named(monkeypatch, capsys, nothing_slow):
    generate = peers.generate
    monkeypatch.setattr(peers, "generate", lambda *args: (generate(*args) + 1) % 97)
    assert "tokens are others" in refused(monkeypatch, capsys)


@needs_transformers
def test_a_tensor_that_is_unknown_here_is_refused(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel
    initialise = LlamaModel.__init__

    def with_another_tensor(self, config):
        initialise(self, config)
        self.register_buffer("unknown", torch.ones(2), persistent=False)

    monkeypatch.setattr(LlamaModel, "__init__", with_another_tensor)
    with pytest.raises(ValueError, match="model.unknown"):
        peers.make_peer(tiny.model(), tiny.CONFIG)
