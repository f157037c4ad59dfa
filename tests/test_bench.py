"""The commands behind the paper's tables and figures. Run: python -m pytest tests/test_bench.py"""

import importlib
import importlib.util
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import bench
import caprese
import data
import distill
import sample

ROOT = Path(__file__).resolve().parents[1]
TOTALS = {  # parameters that the models' own cards and checkpoints state
    "r1-distill-qwen-1.5b": 1777088000, "r1-distill-qwen-7b": 7615616512, "r1-distill-qwen-14b": 14770033664,
    "qwen2.5-14b": 14770033664, "llama-3.2-1b": 1235814400, "llama-3.2-3b": 3212749824, "llama-3.1-8b": 8030261248,
    "gemma-2-2b": 2614341888, "gemma-2-9b": 9241705984, "smollm2-135m": 134515008}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One --out folder for all tests, so that adapters are trained once."""
    return tmp_path_factory.mktemp("runs")


def call(out, command, *flags):
    """Rows of a command on the embedded model, with few problems and samples."""
    args = bench.arguments([command, "--quick", "--device", "cpu", "--limit", "4", "--samples", "80", "--out", str(out),
                            *flags])
    return bench.COMMANDS[command][0](bench.Bench(args), bench.settings(args, command))


def test_pass_at_k_equals_brute_force():
    for n, right in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if right <= n:
                draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
                assert bench.pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_best_rank_is_the_truncated_svd_and_linear_left_is_the_error():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x, e, M = draw(50, 12), draw(50, 12) @ draw(12, 12), draw(12, 12)
    U, S, V = torch.linalg.svd(e, full_matrices=False)
    for r in (1, 5, 12):
        left = (e - U[:, :r] * S[:r] @ V[:r]).square().sum().item()
        assert bench.best_rank_left(e.T @ e)[r].item() == pytest.approx(left, abs=1e-9)
    assert bench.linear_left(x.T @ x, x.T @ e, e.T @ e, M).item() == pytest.approx((e - x @ M).square().sum().item())


@pytest.mark.parametrize("method", ["topk", "griffin", "cats"])
def test_residual_moments_are_sums_over_the_response_tokens(method):
    """Against the layers' own outputs, sample by sample, without padding."""
    model, pairs = caprese.attach(tiny.model(), method, 0.4, range(4)), [([5, 6, 7], [8, 9, 10, 11]), ([3, 4], [1, 2])]
    found = bench.residual_moments(model, pairs, 2)
    for i, ff in caprese.sparse_layers(model).items():
        E, energy = 0, 0
        for prompt, response in pairs:
            inputs, tokens = [], torch.tensor([prompt + response])
            handle = ff.register_forward_pre_hook(lambda ff, args: inputs.append(args[0]))
            model(tokens)
            handle.remove()
            full, generated = ff(inputs[0]), torch.arange(tokens.shape[1])[None] >= len(prompt)
            e = (full - ff(inputs[0], generated))[generated].double()
            E, energy = E + e.T @ e, energy + full[generated].double().square().sum()
        torch.testing.assert_close(found[i][2], E, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[i][3], energy, rtol=1e-4, atol=1e-4)


def test_singular_values_are_those_of_the_product():
    L, R = torch.randn(30, 4), torch.randn(4, 30)
    torch.testing.assert_close(bench.singular_values(L, R), torch.linalg.svdvals((L @ R).double())[:4],
        rtol=1e-4, atol=1e-4)


def test_shapes_are_those_of_the_official_models():
    rows = {r["model"]: r for r in bench.params(None, bench.arguments(["params"]))}
    assert {name: round(r["parameters (M)"] * 1e6) for name, r in rows.items()} == TOTALS
    assert 0.8 < rows["llama-3.1-8b"]["added %, all layers"] < 0.9  # the paper's lower end
    assert rows["llama-3.1-8b"]["added %, first half"] == pytest.approx(rows["llama-3.1-8b"]["added %, all layers"] / 2)


def test_active_parameters_count_what_a_token_uses():
    model = tiny.model()  # D 32, F 80, 4 layers
    total = bench.active_parameters(model)
    assert total == sum(p.numel() for p in model.parameters())
    assert bench.active_parameters(caprese.attach(model, "griffin", 0.5,
        rank=3)) == total - 2 * 3 * 40 * 32 + 2 * 2 * 3 * 32
    assert bench.active_parameters(caprese.attach(model, "cats", 0.5)) == total - 4 * 2 * 40 * 32
    assert bench.active_parameters(caprese.attach(model, "int4")) == total


def test_summary_knows_one_run_from_several():
    answer = lambda run, right: {"run": run, "accuracy": right, "tokens": 10}
    one = bench.summary([answer(0, r) for r in (1.0, 1.0, 0.0, 1.0)])
    assert one == pytest.approx({"accuracy": 0.75, "accuracy ±": (0.75 * 0.25 / 4) ** 0.5, "tokens": 10})
    two = bench.summary([answer(run, r) for run, r in ((0, 1.0), (0, 1.0), (1, 1.0), (1, 0.0))])
    assert two == pytest.approx({"accuracy": 0.75, "accuracy ±": 0.125 ** 0.5, "tokens": 10})


def test_batches_hold_every_job_once_and_runs_of_one_problem_together():
    jobs = [(i, run) for i in range(5) for run in range(3)]
    chunks = list(bench.batches(jobs, 2, 3))
    assert sum(chunks, []) == jobs and all(len(c) <= 2 and len({i for i, _ in c}) == 1 for c in chunks)
    assert list(map(len, bench.batches([(i, 0) for i in range(5)], 2, 1))) == [2, 2, 1]


def test_accuracy_compares_every_method_with_the_full_model(out):
    rows = {r["method"]: r for r in call(out, "accuracy", "--method", "griffin", "--method", "cats")}
    assert list(rows) == ["full", "GRIFFIN", "GRIFFIN + layer-wise", "GRIFFIN + E2E", "GRIFFIN + LoRA", "CATS",
                          "CATS + layer-wise", "CATS + E2E"]
    active = {name: r["active parameters (M)"] for name, r in rows.items()}
    assert active["GRIFFIN"] < active["GRIFFIN + E2E"] < active["full"] == pytest.approx(1.246848)
    assert rows["full"]["maths accuracy"] == 1 > rows["GRIFFIN"]["maths accuracy"]
    assert {"reading accuracy", "maths accuracy ±", "maths tokens"} < set(rows["full"])


@pytest.mark.parametrize("command, flags, keys", [
    ("reselect", ["--method", "griffin"], {"rho", "accuracy", "seconds"}),
    ("coverage", ["--method", "griffin", "--runs", "3"], {"K", "compute", "coverage"}),
    ("density", ["--method", "griffin", "--limit", "2"], {"density", "rank", "stage", "accuracy"}),
    ("length", ["--method", "griffin"], {"difficulty", "full", "GRIFFIN + E2E"}),
    ("spectrum", ["--method", "griffin"], {"layer", "σ1", "ranks for 90%", "residual left"}),
    ("runtime", ["--method", "griffin"], {"seconds", "seconds to a right answer"}),
    ("residual", [], {"density", "alone", "best rank 32", "L R rank 32"}),
])
def test_every_command_runs_on_the_embedded_model(out, command, flags, keys, monkeypatch):
    monkeypatch.setattr(bench, "DENSITIES", (0.3, 0.6))
    monkeypatch.setattr(bench, "RHO", {True: (8,)})
    rows = call(out, command, *flags)
    assert rows and all(r.keys() == rows[0].keys() for r in rows) and keys <= rows[0].keys()
    json.dumps(rows), distill.table(rows)
    if command == "residual":
        for r in rows:
            assert 0 < r["best rank 64"] < r["best rank 16"] < r["alone"] < 1 and r["best rank 32"] < r["L R rank 32"]
        errors = [r["alone"] for r in rows if r["method"] == "topk"]
        assert errors == sorted(errors, reverse=True)
    if command == "coverage":
        assert {r["K"] for r in rows} == {1, 2} and all(0 < r["compute"] <= r["K"] for r in rows)
    if command == "spectrum":
        assert all(0 < r["residual left"] < 1 for r in rows)


@pytest.mark.parametrize("runs", [1, 3])
def test_a_killed_run_goes_on_to_the_same_table(tmp_path, out, monkeypatch, runs):
    """Killed in the middle of a line, it decodes what is missing and nothing else."""
    flags = ["--temperature", "0.9", "--runs", str(runs), "--batch", "2", "--out", str(tmp_path)]
    args = bench.arguments(["accuracy", "--device", "cpu", "--limit", "6", *flags, "--max-new-tokens", "24"])
    run, way = bench.Bench(args), bench.Way("CATS", "cats", density=0.1)
    problems, decoded = data.problems("maths", 6, 5, True), []
    ask = lambda: run.answers(way, "maths", problems, bench.settings(args, "accuracy"))
    responses = lambda answers: [{k: v for k, v in a.items() if k != "seconds"} for a in answers]
    whole = ask()
    file = next(tmp_path.glob("maths*.jsonl"))
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6 * runs == len(whole)
    keep = 2 * (2 if runs == 1 else 1)  # two whole batches
    file.write_bytes(b"".join(lines[:keep]) + lines[keep][:17])
    decode = run.decode
    monkeypatch.setattr(run, "decode", lambda chunk, *a: decoded.extend(chunk) or decode(chunk, *a))
    assert responses(ask()) == responses(whole) and len(decoded) == 6 * runs - keep
    assert responses(bench.read_answers(file)) == responses(whole)
    decoded.clear()
    assert responses(ask()) == responses(whole) and not decoded


def test_answers_of_other_settings_or_problems_are_not_taken(tmp_path):
    base = ["accuracy", "--device", "cpu", "--out", str(tmp_path), "--max-new-tokens"]
    problems, way = data.problems("maths", 2, 5, True), bench.Way("full")
    for tokens, chosen, files in (("8", problems, 1), ("9", problems, 2), ("9", problems[::-1], 2)):
        args = bench.arguments(base + [tokens])
        answers = bench.Bench(args).answers(way, "maths", chosen, bench.settings(args, "accuracy"))
        assert [a["question"] for a in answers] == [p.question for p in chosen]
        assert all(a["tokens"] == int(tokens) for a in answers)
        assert len(list(tmp_path.iterdir())) == files


def test_a_model_with_its_own_problems_samples_and_adapter(tmp_path):
    """--model, --data, --train and --adapter together: the embedded model as if it were somebody else's."""
    problems = data.problems("maths", 3, 5, True)
    file, train = tmp_path / "sums.jsonl", tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems))
    train.write_text("".join(json.dumps({"question": p.question, "answer": p.response}) + "\n"
                             for p in data.problems("maths", 40, 5)))
    args = bench.arguments(["accuracy", "--device", "cpu", "--dtype", "float32", "--model", str(sample.EMBEDDED),
        "--rank", "8",
                            "--data", str(file), "--out", str(tmp_path / "runs"), "--method", "griffin",
                            "--max-new-tokens",
                            "8", "--adapter", str(sample.EMBEDDED / "griffin.safetensors")])
    rows = bench.accuracy(bench.Bench(args), bench.settings(args, "accuracy"))
    assert [r["method"] for r in rows] == ["full", "GRIFFIN", "griffin"] and "sums accuracy" in rows[0]
    args.train = [str(train)]
    names = [way.name for way in bench.Bench(args).ways(bench.settings(args, "accuracy"))]
    assert names == ["full", "GRIFFIN", "GRIFFIN + layer-wise", "GRIFFIN + E2E", "griffin"]
    assert len(bench.Bench(args).pairs) == 40


def run(monkeypatch, *args):
    """The exit code of the command line, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["bench.py", *args])
    try:
        sample.run(bench.main)
    except SystemExit as e:
        return e.code
    return 0


def test_json_is_one_object_on_stdout():
    done = subprocess.run([sys.executable, "bench.py", "params", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["params"]
    assert len(found["rows"]) == len(bench.SHAPES) and "0.8 to 1.3" in found["paper"] and "gemma-2-9b" in done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
@pytest.mark.parametrize("command", bench.COMMANDS)
def test_every_command_can_be_drawn(tmp_path, out, command, monkeypatch):
    import matplotlib
    monkeypatch.setattr(bench, "DENSITIES", (0.3, 0.6))
    monkeypatch.setattr(bench, "RHO", {True: (8,)})
    matplotlib.use("Agg")
    rows = call(out, command, *(["--runs", "2"] if command == "coverage" else []), *(["--method", "griffin"]))
    bench.draw(command, rows, tmp_path / "a.png")
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_without_matplotlib_plot_says_so_before_any_work(monkeypatch, capsys):
    assert run(monkeypatch, "accuracy", "--plot", "a.png") == 2
    assert capsys.readouterr().err == "error: --plot needs matplotlib: pip install matplotlib\n"


@pytest.mark.parametrize("way", [n for n in bench.LATENCY_ROWS if n.startswith("GRIFFIN")])
def test_latency_counts_the_bytes_that_a_step_reads(way):
    """All weights but those of the replaced blocks, plus the compact buffers that stand in for them, plus the cache."""
    model, args = tiny.model(), bench.arguments(["latency", "--rank", "6", "--density", "0.4"])
    bench.attach_row(model, bench.LATENCY_ROWS[way], args)
    sample.generate(model, tiny.tokens(1, 6), 4)
    about = bench.account(model, bench.LATENCY_ROWS[way], 6, 4, None)
    ffs = caprese.sparse_layers(model).values()
    read = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("embed_tokens.weight"))
    read -= sum(p.numel() for ff in ffs for p in ff.parameters())
    read += sum(t.numel() for ff in ffs for n, t in vars(ff).items() if n.endswith("_k") and n != "tau_k")
    cache = 2 * 4 * 2 * 8 * 8  # k and v, 4 layers, 2 heads of 8, 6 + 4 / 2 positions
    assert about["bytes"] == 4 * (read + cache)
    assert about["full_bytes"] - about["bytes"] > 0 and about["active"] == read


def test_latency_runs_on_a_folder_and_prints_its_ratios(out):
    rows = call(out, "latency", "--model", "models/tiny-math", "--prompt", "8", "--generate", "3", "5", "--reselect",
                "2", "--repeats", "1")
    assert [(row["row"], row["generated"]) for row in rows] == [(n, g) for g in (3, 5) for n in bench.LATENCY_ROWS]
    assert all(row["ms per token"] > 0 and row["bound ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == rows[0]["by bytes"] == 1 > rows[1]["by bytes"]
    assert {row["row"] for row in rows if row["over bare"]} == {n for n in bench.LATENCY_ROWS if " + " in n}
    assert "copies MB" in bench.latency_table(rows)


@pytest.mark.parametrize("args, words", [
    (["latency", "--generate", "1"], "--generate"),
    (["latency", "--prompt", "0"], "--prompt"),
    (["accuracy", "--model", "models/tiny-math"], "--data"),
    (["residual", "--model", "models/tiny-math"], "--train"),
    (["accuracy", "--train", "x.jsonl"], "--train"),
    (["accuracy", "--model", "models/tiny-math", "--data", "nothing.jsonl"], "nothing.jsonl"),
    (["accuracy", "--limit", "0"], "--limit"),
    (["accuracy", "--runs", "3"], "--temperature"),
    (["coverage", "--temperature", "0"], "--temperature"),
    (["accuracy", "--density", "7", "--limit", "1"], "density"),
    (["spectrum", "--model", "models/tiny-math"], "--adapter"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, args, words, monkeypatch, capsys):
    assert run(monkeypatch, *args, "--out", str(tmp_path)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and words in last


def test_the_reading_companion_names_what_exists():
    """Each `module.name` and each `bench.py command` in README's table; and each command is in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## The paper, line by line"):].split("\n## ")[0]
    names = re.findall(r"`(model|caprese|distill|sample|data|bench)\.((?!py`)[A-Za-z_.]+)`", section)
    assert len(names) > 20
    for module, name in names:
        found = importlib.import_module(module)
        for part in name.split("."):
            assert hasattr(found, part), f"{module}.{name}"
            found = getattr(found, part)
    commands = set(re.findall(r"bench\.py ([a-z]+)", section))
    assert commands == {*bench.COMMANDS, "all"}
