"""The latency benchmark. Run: python -m pytest tests/test_bench.py"""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

import bench
import caprese
import sample
from model import Config, Transformer

BUNDLED = str(Path(bench.__file__).parent / "models" / "tiny-math")
TOTALS = {  # parameters, as the models' own cards and checkpoints state them
    "r1-distill-qwen-1.5b": 1777088000, "r1-distill-qwen-7b": 7615616512,
    "r1-distill-qwen-14b": 14770033664, "qwen2.5-14b": 14770033664, "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824, "llama-3.1-8b": 8030261248, "gemma-2-2b": 2614341888,
    "gemma-2-9b": 9241705984, "smollm2-135m": 134515008}
QUICK = ["--device", "cpu", "--prompt", "6", "--generate", "3", "--repeats", "1"]


class Magnitude(caprese.GRIFFIN):
    """A method of one's own: the sum of the magnitudes is the statistic."""

    def statistic(self, x, gate, z, counted=None):
        weight = torch.ones_like(z[..., 0]) if counted is None else counted.to(z.dtype)
        return (weight[:, None] @ z.abs())[:, 0]

    def merge(self, s, s_G):
        return s + s_G


class Bias(caprese.GRIFFIN):
    """A correction of one's own: a vector b [D]. It does not fuse, so all neurons are computed."""
    gathers = False

    def new_adapter(self, rank):
        self.b = torch.nn.Parameter(torch.zeros(self.gate_proj.in_features))

    def correction(self, x):
        return self.b.to(x.dtype).expand_as(x)

    def set_adapter(self, b):
        self.b = torch.nn.Parameter(b.float().clone())


class Incomplete(caprese.SparseFF):
    """Lacks all that a method must have."""


SPARSE_ROWS = {
    "GRIFFIN": {"method": "griffin", "density": 0.4},
    "GRIFFIN + Caprese": {"method": "griffin", "density": 0.4, "rank": 6},
    "GRIFFIN all layers": {"method": "griffin", "density": 0.4, "layers": "all"},
    "Magnitude + Caprese": {"method": Magnitude, "density": 0.4, "rank": 21},
}


def command(monkeypatch, *flags):
    """The exit code of python bench.py with these flags, run in this process."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    try:
        sample.run_command(bench.main)
    except SystemExit as stop:
        return stop.code
    return 0


# ---- shapes and weights

def test_shapes_are_those_of_the_official_models():
    totals = {}
    for name, config in bench.SHAPES.items():
        with torch.device("meta"):
            model = Transformer(Config.from_dict(config))
        totals[name] = sum(p.numel() for p in model.parameters())
    assert totals == TOTALS


def test_random_weights_have_no_two_equal_rows_and_norms_of_one():
    config = tiny.CONFIG | {"vocab_size": 40000}  # one matrix of more numbers than the block has
    torch.manual_seed(0)
    model = bench.random_model(config, "cpu", torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        if parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            assert len(parameter.unique(dim=0)) == len(parameter), name
            # 0.02; of the smallest matrix, 512 numbers, it is known to 3%.
            assert 0.017 < parameter.float().std() < 0.023, name


# ---- bytes

def test_active_parameters_count_what_a_token_uses():
    model = tiny.model()  # D 32, F 80, 4 layers
    total = sum(p.numel() for p in model.parameters())
    assert bench.active_parameters(model) == total
    caprese.attach(model, "griffin", 0.5, rank=3)  # 2 layers
    assert bench.active_parameters(model) == total - 2 * 3 * 40 * 32 + 2 * 2 * 3 * 32
    caprese.attach(model, "cats", 0.5)
    assert bench.active_parameters(model) == total - 4 * 2 * 40 * 32
    caprese.attach(model, Bias, 0.5, layers="all")
    assert bench.active_parameters(model) == total - 4 * 3 * 40 * 32 + 4 * 32


@pytest.mark.parametrize("tied", [True, False])
def test_the_full_model_is_counted_without_the_correction_and_without_an_unread_table(tied):
    model = tiny.model(tie_word_embeddings=tied)
    read = sum(p.numel() for p in model.parameters()) - (0 if tied else 97 * 32)
    assert bench.weights_read(model) == (read, read)
    caprese.attach(model, "griffin", 0.5, rank=3)  # 2 layers
    assert bench.weights_read(model) == (read, read - 2 * 3 * 40 * 32 + 2 * 2 * 3 * 32)


@pytest.mark.parametrize("name", SPARSE_ROWS)
def test_the_bytes_counted_are_those_of_the_tensors_that_a_step_reads(name):
    """The weights outside of the replaced MLPs, the compact buffers in their place, the cache."""
    model = caprese.attach(tiny.model(), **SPARSE_ROWS[name])
    sample.generate(model, tiny.tokens(1, 6), 4)
    layers = caprese.sparse_layers(model).values()
    read = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    compact = 0
    for ff in layers:
        assert ff.compact
        read -= sum(p.numel() for p in ff.parameters())
        compact += sum(b.numel() for b in (ff.gate_k, ff.up_k, ff.down_k))
    read += compact
    cache = 4 * 2 * 2 * 8 * 4  # bytes of a position: 4 layers, k and v, 2 heads of 8, float32
    used = bench.account(model, 6, 4)
    # The three steps after the prefill read 7, 8 and 9 positions.
    assert used["MB per token"] * 1e6 == pytest.approx(4 * read + 8 * cache)
    assert used["ratio bytes allow"] < 1
    # Beside the copies each of these layers holds its statistic, 80 numbers.
    assert used["copies MB"] * 1e6 == pytest.approx(4 * (compact + 80 * len(layers)))
    assert used["cache MB"] * 1e6 == 10 * cache


def test_a_tied_table_is_read_as_the_head():
    model = tiny.model(tie_word_embeddings=True)
    weights = 4 * sum(p.numel() for p in model.parameters())
    used = bench.account(model, 6, 4)
    assert used["MB per token"] * 1e6 == pytest.approx(weights + 8 * 4 * 2 * 2 * 8 * 4)


def test_a_sliding_window_limits_the_positions_that_are_read():
    full = bench.account(tiny.model(model_type="mistral", sliding_window=None), 20, 10)
    slides = bench.account(tiny.model(model_type="mistral", sliding_window=8), 20, 10)
    fewer = (25 - 8) * 4 * 2 * 2 * 8 * 4
    assert (full["MB per token"] - slides["MB per token"]) * 1e6 == pytest.approx(fewer)


@pytest.mark.parametrize("generated, reselect", [(9, 3), (9, 4), (10, 3), (5, 8), (5, 1)])
def test_reselection_passes_are_counted_as_they_happen(generated, reselect):
    model = caprese.attach(tiny.model(), "griffin", 0.4, rank=6)
    before = bench.account(model, 6, generated)
    phases = []
    ff = caprese.sparse_layers(model)[0]
    ff.register_forward_pre_hook(lambda ff, inputs: phases.append(ff.call.phase))
    sample.generate(model, tiny.tokens(1, 6), generated, reselect=reselect)
    steps, passes = len(phases) - 1, phases.count("count") - 1  # but the prefill
    full = before["MB per token"] / before["ratio bytes allow"]
    expected = (before["MB per token"] * (steps - passes) + full * passes) / steps
    used = bench.account(model, 6, generated, reselect)
    assert steps == generated - 1
    assert used["MB per token"] == pytest.approx(expected)


# ---- times

def test_ratios_are_taken_within_each_round():
    """In the second round everything is ten times slower, and so is the third for the full row."""
    times = {"full": (1e3, 1e4, 1e4),  # ms per token
             "GRIFFIN": (900, 9000, 900),
             "GRIFFIN + Caprese": (900, 9900, 1000), "GRIFFIN + LoRA": (990, 9900, 990)}
    rounds = {}
    for name, values in times.items():
        columns = {"MB per token": 80.0, "memory GB/s": 0.16, "prefill s": 2.0,
                   "ratio bytes allow": 1.0 if name == "full" else 0.8}
        rounds[name, 5] = [columns | {"ms per token": value} for value in values]
    row = bench.result("GRIFFIN + Caprese", 5, rounds)
    assert row["ms per token"] == 1000 and row["bound ms"] == pytest.approx(500)
    assert row["bandwidth reached"] == pytest.approx(0.5) and row["prefill s"] == 2
    assert row["ratio to full"] == pytest.approx(0.9)  # of 0.9, 0.99, 0.1
    assert row["saving reached"] == pytest.approx(0.5)
    assert row["ratio to uncorrected"] == pytest.approx(1.1)  # of 1, 1.1, 1.11
    assert bench.result("GRIFFIN + LoRA", 5, rounds)["ratio to uncorrected"] == pytest.approx(1.1)
    first = bench.result("full", 5, rounds)
    assert first["ratio to full"] == 1 and first["ratio to uncorrected"] is None
    assert first["saving reached"] is None


def test_times_are_those_of_the_steps_after_the_prefill(monkeypatch):
    monkeypatch.setattr(bench, "time_model", lambda *args: (2.0, 6.0))
    row = bench.measure(tiny.model(), {"full": None}, bench.arguments(QUICK))[0]
    assert row["prefill s"] == 2 and row["total s"] == 6 and row["selection s"] >= 0
    assert row["ms per token"] == 2000  # two steps, as the first of three tokens is the prefill's


def test_the_uncorrected_row_is_the_same_method_without_its_correction():
    rows = bench.variants(bench.arguments(["--device", "cpu"]))
    for name, settings in rows.items():
        if " + " in name:
            alone = {key: value for key, value in settings.items() if key != "rank"}
            assert rows[name.partition(" + ")[0]] == alone


def test_every_row_is_measured_for_every_length(monkeypatch, capsys):
    flags = ["--model", BUNDLED, "--device", "cpu", "--prompt", "8", "--generate", "3", "5",
             "--reselect", "2", "--repeats", "1", "--json"]
    assert command(monkeypatch, *flags) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    rows = result["rows"]
    assert set(result) == {"dtype", "graphs", "rows"}
    assert result["dtype"] in ("float32", "bfloat16") and result["graphs"] is False
    args = bench.arguments(flags)
    names = list(bench.variants(args))
    assert len(names) == 7
    assert [(row["row"], row["generated"]) for row in rows] == [(m, n) for n in (3, 5)
                                                                for m in names]
    columns = {column for table in bench.TABLES.values() for column in table}
    for row in rows:
        assert set(row) == columns | {"row", "generated"}
        assert row["ms per token"] > 0 and row["bound ms"] > 0
        assert (row["ratio to uncorrected"] is not None) == ("Caprese" in row["row"])
    assert rows[0]["ratio to full"] == rows[0]["ratio bytes allow"] == 1
    assert rows[1]["ratio bytes allow"] < 1
    lines = printed.err.splitlines()
    assert "a prompt of 8 tokens, medians of 1 rounds" in lines[0] and BUNDLED in lines[0]
    assert "plain PyTorch" in lines[1]
    for title, table in bench.TABLES.items():
        assert lines[lines.index(title) + 1].split() == " ".join(("row generated", *table)).split()


def test_measuring_leaves_nothing_attached_and_takes_rows_of_ones_own():
    args = bench.arguments(QUICK)
    model = tiny.model()
    own = {"Magnitude": {"method": Magnitude}, "Bias": {"method": Bias}}
    rows = bench.measure(model, {"full": None} | own | SPARSE_ROWS, args)
    assert not caprese.sparse_layers(model)
    assert [row["row"] for row in rows] == ["full", *own, *SPARSE_ROWS]
    assert rows[-1]["row"] == "Magnitude + Caprese" and rows[-1]["ratio to uncorrected"] > 0


def test_the_selection_is_timed_on_the_method_that_is_attached(monkeypatch):
    selected, select = [], caprese.select

    def watched(model):
        selected.append([type(ff) for ff in caprese.sparse_layers(model).values()])
        select(model)

    monkeypatch.setattr(caprese, "select", watched)
    rows = {"full": None, "Magnitude": {"method": Magnitude, "layers": [1]}}
    results = bench.measure(tiny.model(), rows, bench.arguments(QUICK))
    # In a warm-up, in the measured run, and alone.
    assert selected == 3 * [[]] + 3 * [[Magnitude]]
    assert all(row["selection s"] > 0 for row in results)


def test_a_block_has_rows_of_its_own_beside_the_others():
    block = f"{__name__}:Magnitude"
    args = bench.arguments(["--device", "cpu", "--block", block, "--density", "0.3"])
    rows = bench.variants(args)
    without = bench.variants(bench.arguments(["--device", "cpu", "--density", "0.3"]))
    assert list(rows) == [*without, block, f"{block} + Caprese"]
    assert rows[block] == {"method": Magnitude, "density": 0.3, "layers": None}
    assert rows[f"{block} + Caprese"] == rows[block] | {"rank": 256}


def test_a_method_has_its_rows_alone_beside_the_full_model():
    for name, names in {"cats": ["CATS"], "griffin": ["GRIFFIN", "GRIFFIN all layers"]}.items():
        rows = bench.variants(bench.arguments(["--device", "cpu", "--method", name]))
        assert list(rows) == ["full", *(row for n in names for row in (n, f"{n} + Caprese"))]
        assert {settings["method"] for settings in rows.values() if settings} == {name}


def test_with_reselection_after_every_token_all_rows_read_the_full_model():
    args = bench.arguments([*QUICK, "--reselect", "1"])
    for row in bench.measure(tiny.model(), {"full": None} | SPARSE_ROWS, args):
        assert row["ratio bytes allow"] == pytest.approx(1)


# ---- bad input

@pytest.mark.parametrize("flags, words", [
    (["--generate", "1"], "--generate"),
    (["--generate", "32", "0"], "--generate"),
    (["--generate", "200000"], "context"),
    (["--prompt", "0"], "--prompt"),
    (["--reselect", "0"], "--reselect"),
    (["--repeats", "0"], "--repeats"),
    (["--rank", "0"], "--rank"),
    (["--rank", "5000"], "rank"),
    (["--density", "7"], "density"),
    (["--density", "nan"], "density"),
    (["--only", "GRIFFON"], "GRIFFIN all layers"),
    (["--model", "nothing"], "nothing"),
    (["--model", BUNDLED, "--shape", "smollm2-135m"], "--shape"),
    (["--device", "meta"], "meta"),
    (["--device", "gpu9"], "gpu9"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--graphs"], "--graphs"),
    (["--method", "griffon"], "--method"),
    (["--method", "cats", "--only", "GRIFFIN"], "CATS + Caprese"),
    (["--block", "bench"], "bench"),
    (["--block", "nowhere:Nothing"], "nowhere"),
    (["--block", "bench:Nothing"], "Nothing"),
    (["--block", "model:MLP"], "model:MLP"),
    (["--block", f"{__name__}:Incomplete"], "Incomplete"),
])
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "make_model", None)  # calling it would be a TypeError
    assert command(monkeypatch, "--device", "cpu", *flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and words in printed.err
