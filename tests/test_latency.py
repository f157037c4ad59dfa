"""bench.py latency: what it counts, and that it runs. Run: python -m pytest tests/test_latency.py"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import bench
import caprese
import sample

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {"model": None, "shape": "tiny", "device": "cpu", "dtype": "float32", "seed": 0, "prompt": 6,
            "generate": [4, 9], "density": 0.5, "rank": 8, "reselect": None, "repeats": 2, "only": None, "peer": None}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", tiny.CONFIG)
    monkeypatch.setattr(bench, "memory_speed", lambda device: 1e9)


def arguments(**changes):
    return argparse.Namespace(**DEFAULTS | changes)


@pytest.mark.parametrize("reselect", [None, 3])
def test_every_row(reselect):
    rows = bench.latency(arguments(reselect=reselect))
    names = [(row["row"], row["generated"]) for row in rows]
    assert names == [(name, n) for n in (4, 9) for name in bench.LATENCY_ROWS]
    for row in rows:
        assert 0 < row["min"] <= row["ms per token"] <= row["max"]
        assert row["total s"] > row["prefill s"] > 0
        assert (row["copies MB"] > 0) == (row["row"] != "full")
    full, griffin = rows[0], rows[1]
    assert full["ratio"] == full["by bytes"] == 1 and griffin["by bytes"] < 1


def test_bytes_are_those_of_the_tensors_that_decoding_reads():
    """The compact buffers are the truth for GRIFFIN; CATS reads half of W1 and W2; D = 32, F = 80, k = 40, r = 8."""
    model = bench.latency_model(arguments())
    embedding = model.model["embed_tokens"].weight.numel()  # not tied: one row of it is read
    full = sum(p.numel() for p in model.parameters()) - embedding
    position = 2 * 4 * 2 * 8 * 4  # keys and values, layers, heads, d, bytes
    for name, way in bench.LATENCY_ROWS.items():
        bench.attach_row(model, way, arguments())
        sample.generate(model, tiny.tokens(1, 6), 4)
        about = bench.account(model, way, 6, 4, None)
        read = full
        for ff in caprese.sparse_layers(model).values():
            read -= sum(p.weight.numel() for p in (ff.gate_proj, ff.up_proj, ff.down_proj))
            if ff.method == "griffin":
                read += sum(t.numel() for key, t in vars(ff).items() if key.endswith("_k"))
            else:
                read += 32 * 80 + 2 * 32 * 40 + sum(p.numel() for p in ff.learned().values())
        assert about["active"] == read, name
        assert about["bytes"] == 4 * read + position * 8
        rho = bench.account(model, way, 6, 4, 2)
        assert rho["bytes"] == (about["bytes"] if way is None else (about["bytes"] + about["full_bytes"]) / 2)


def test_a_random_model_is_made_in_its_dtype_and_no_two_rows_are_alike():
    model = bench.latency_model(arguments(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for p in model.parameters():
        assert len(p.unique(dim=0)) == (len(p) if p.dim() > 1 else 1)
    assert model(tiny.tokens(1, 5)).isfinite().all()


def test_command():
    done = subprocess.run([sys.executable, "bench.py", "latency", "--model", "models/tiny-math", "--prompt", "8",
                           "--generate", "4", "--repeats", "1", "--only", "full", "GRIFFIN + Caprese", "--json"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["row"] for row in json.loads(done.stdout)["rows"]] == ["full", "GRIFFIN + Caprese"]
    assert "of bound" in done.stderr
    done = subprocess.run([sys.executable, "bench.py", "latency", "--generate", "1"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "--generate" in done.stderr.splitlines()[-1]
