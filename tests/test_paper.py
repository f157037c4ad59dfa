"""The scripts of paper/: python -m pytest tests/test_paper.py"""

import ast
import gzip
import importlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import bench
import caprese
import data
import distill
import sample
from paper import (common, experiment, figure2_residual, figure3_coverage, figure8_spectrum,
                   recount, scores)
from paper.__main__ import SCRIPTS
from paper.experiment import BOTH_STAGES, BUNDLED_CATS_DENSITY, E2E, LAYERWISE, Experiment, Variant
from paper.lora import LoRAFF

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--limit", "3", "--samples", "16", "--rank", "4", "--method", "griffin",
        "--max-new-tokens", "8"]
TOTALS = {  # parameters that the models' own cards and checkpoints state
    "r1-distill-qwen-1.5b": 1777088000, "r1-distill-qwen-7b": 7615616512,
    "r1-distill-qwen-14b": 14770033664, "qwen2.5-14b": 14770033664, "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824, "llama-3.1-8b": 8030261248, "gemma-2-2b": 2614341888,
    "gemma-2-9b": 9241705984, "smollm2-135m": 134515008}


def settings(name, *flags):
    """The settings of a script for these flags."""
    script = importlib.import_module(f"paper.{name}")
    return common.fill_defaults(common.arguments([*TINY, *flags], script), script)


def make(tmp_path, *flags, name="table1_accuracy", load=True):
    """An Experiment on the bundled model with tiny settings, whose files are in tmp_path."""
    args = settings(name, "--out", str(tmp_path), *flags)
    return Experiment(args, common.read_inputs(args), load)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One --out folder for all scripts, so that each adapter is trained once."""
    return tmp_path_factory.mktemp("runs")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# ---- scores

def test_f1_and_rouge():
    assert scores.f1("The cat sat.", "a cat sat") == 1
    assert scores.f1("dog", "cat") == 0 == scores.f1("", "cat")
    assert scores.f1("the black cat", "cat") == pytest.approx(2 / 3)
    found = scores.rouge("the cat was found under the bed", "the cat was under the bed")
    assert found == pytest.approx({"rouge1": 12 / 13, "rouge2": 8 / 11, "rougeL": 12 / 13})
    found = scores.rouge("b a", "a b")
    assert found == pytest.approx({"rouge1": 1, "rouge2": 0, "rougeL": 0.5})
    assert scores.rouge("", "a b") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert scores.rouge("", "") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_each_kind_of_problem_has_its_score():
    maths = data.Problem("q", "", "2")
    passage = data.Problem("q", "", "a black cat", "passage")
    article = data.Problem("q", "", "a b", "summary")
    assert scores.scores(maths, "#### 2") == {"accuracy": 1.0}
    assert scores.scores(maths, "#### 3") == {"accuracy": 0.0}
    assert scores.scores(passage, "black cat") == {"f1": 1.0}
    assert scores.scores(passage, "I looked. The answer is black cat.") == {"f1": 1.0}
    # a base model goes on with the next article, which counts for nothing
    assert scores.scores(article, "a b\n### c")["rougeL"] == 1


def test_gpqa_rows_become_multiple_choice(tmp_path):
    wrong = {f"Incorrect Answer {i}": f"no{i}" for i in (1, 2, 3)}
    rows = [{"Question": f"q{i}", "Correct Answer": "yes"} | wrong for i in range(8)]
    file = write(tmp_path / "gpqa.jsonl", rows + [{"question": "1 + 1", "answer": "2"}])
    problems = data.read_problems(file, evaluation=True, parse=scores.read_row)
    assert [p.kind for p in problems] == ["choice"] * 8 + ["maths"]
    for problem in problems[:8]:
        assert f"({problem.answer}) yes" in problem.question and "(D) " in problem.question
    assert len({problem.answer for problem in problems[:8]}) > 1
    again = data.read_problems(file, evaluation=True, parse=scores.read_row)
    assert [p.question for p in again] == [p.question for p in problems]


def test_summary_knows_one_run_from_several():
    def answer(run, accuracy):
        return {"run": run, "accuracy": accuracy, "tokens": 10}

    one = scores.summary([answer(0, 1.0), answer(0, 1.0), answer(0, 0.0), answer(0, 1.0)])
    deviation = 100 * (0.75 * 0.25 / 4) ** 0.5  # binomial
    assert one == pytest.approx({"accuracy %": 75, "accuracy ±": deviation, "tokens": 10})
    two = scores.summary([answer(0, 1.0), answer(0, 1.0), answer(1, 1.0), answer(1, 0.0)], "x ")
    deviation = 100 * 0.125 ** 0.5  # of 1 and 0.5, the means of the runs
    assert two == pytest.approx({"x accuracy %": 75, "x accuracy ±": deviation, "x tokens": 10})


def test_pass_at_k_equals_brute_force():
    for n in range(1, 7):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * right + [False] * (n - right)
            draws = list(itertools.combinations(samples, k))
            expected = sum(map(any, draws)) / len(draws)
            assert figure3_coverage.pass_at_k(n, right, k) == pytest.approx(expected)


# ---- moments

def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_best_rank_is_the_truncated_svd():
    e = draw(50, 12) @ draw(12, 12)
    U, S, V = torch.linalg.svd(e, full_matrices=False)
    energies = figure2_residual.best_rank_energy(e.T @ e)
    assert len(energies) == 13
    for r in (0, 1, 5, 12):
        error = (e - U[:, :r] * S[:r] @ V[:r]).square().sum()
        # squares of singular values up to 1e3 come from E, so 1e-9 is rounding in float64
        torch.testing.assert_close(energies[r], error, rtol=1e-9, atol=1e-8)


def test_linear_energy_is_the_error_of_the_map():
    x, e, M = draw(50, 12), draw(50, 12) @ draw(12, 12), draw(12, 12)
    found = figure2_residual.linear_energy(x.T @ x, x.T @ e, e.T @ e, M)
    torch.testing.assert_close(found, (e - x @ M).square().sum())


@pytest.mark.parametrize("method", ["topk", "griffin", "cats"])
def test_moments_are_sums_over_the_response_tokens(method):
    """Against the layers' own outputs, sample by sample, without padding."""
    model = caprese.attach(tiny.model(), method, 0.4, range(4))
    samples = [([5, 6, 7], [8, 9, 10, 11]), ([3, 4], [1, 2])]
    found = figure2_residual.moments(model, samples)
    for i, ff in caprese.sparse_layers(model).items():
        A, C, E, energy = 0, 0, 0, 0
        for prompt, response in samples:
            inputs, tokens = [], torch.tensor([prompt + response])
            handle = ff.register_forward_pre_hook(lambda ff, args: inputs.append(args[0]))
            model(tokens)
            handle.remove()
            generated = torch.arange(tokens.shape[1])[None] >= len(prompt)
            x, full = inputs[0], ff(inputs[0])
            with caprese.phase(model, "mixed", generated):
                e = (full - ff(x))[generated].double()
            x = x[generated].double()
            A, C, E = A + x.T @ x, C + x.T @ e, E + e.T @ e
            energy += full[generated].double().square().sum()
        for ours, expected in zip(found[i], (A, C, E, energy)):
            # the model runs in float32, and e is a difference of numbers about as large as itself
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_singular_values_are_those_of_the_product():
    L, R = draw(30, 4), draw(4, 30)
    expected = torch.linalg.svdvals(L @ R)[:4]
    torch.testing.assert_close(figure8_spectrum.singular_values(L, R), expected)


# ---- figure 6

def test_figure6_agrees_with_the_paper(capsys):
    result = common.run(["figure6_parameters"], ["--json", "--device", "cpu"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == result and "0.8 to 1.3" in printed.err
    rows = {row["model"]: row for row in result["figure6_parameters"]["rows"]}
    totals = {name: round(row["parameters (M)"] * 1e6) for name, row in rows.items()}
    assert totals == TOTALS and set(rows) == set(bench.SHAPES)
    everywhere = {name: row["all layers %"] for name, row in rows.items()}
    for name in ("r1-distill-qwen-1.5b", "r1-distill-qwen-14b", "llama-3.1-8b", "gemma-2-2b",
                 "gemma-2-9b"):
        assert 0.8 < everywhere[name] < 1.3
        assert rows[name]["first half %"] == pytest.approx(everywhere[name] / 2)


# ---- answers that are kept

def test_batches_hold_every_job_once_and_runs_of_one_problem_together():
    jobs = [(i, run) for i in range(5) for run in range(3)]
    found = experiment.batches(jobs, 2, runs=3)
    assert sum(found, []) == jobs
    for batch in found:
        assert len(batch) <= 2 and len({i for i, _ in batch}) == 1
    of_one_run = experiment.batches([(i, 0) for i in range(5)], 2, runs=1)
    assert [len(batch) for batch in of_one_run] == [2, 2, 1]


def without_seconds(answers):
    return [{key: value for key, value in a.items() if key != "seconds"} for a in answers]


@pytest.mark.parametrize("runs, cut", [(1, 0), (1, 1), (3, 0)])
def test_a_killed_run_continues_to_the_same_answers(tmp_path, monkeypatch, runs, cut):
    """Killed within a line, also within a batch: the batches that are incomplete are decoded."""
    found = make(tmp_path, "--temperature", "0.9", "--runs", str(runs), "--batch-size", "2")
    variant = Variant("CATS", "cats", density=0.1)
    problems = data.problems("maths", 6, 5, evaluation=True)
    whole = found.answers(variant, "maths", problems)
    assert (found.count, found.reused) == (6 * runs, 0)
    file, = tmp_path.glob("maths-cats-*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6 * runs
    complete = 4 if runs == 1 else 3  # lines of the first two batches
    kept = complete + cut  # cut: the first line of the third batch is complete as well
    file.write_bytes(b"".join(lines[:kept]) + lines[kept][:17])
    decoded, decode = [], found.decode
    monkeypatch.setattr(found, "decode", lambda questions, *rest: decoded.extend(questions)
                        or decode(questions, *rest))
    assert without_seconds(found.answers(variant, "maths", problems)) == without_seconds(whole)
    assert len(decoded) == 6 * runs - complete
    assert found.reused == complete
    decoded.clear()
    assert found.answers(variant, "maths", problems) and not decoded
    assert found.reused == complete + 6 * runs


def test_answers_to_other_questions_are_not_taken(tmp_path):
    problems = data.problems("maths", 2, 5, evaluation=True)
    found = make(tmp_path, "--max-new-tokens", "4")
    found.answers(Variant("full"), "maths", problems)
    answers = found.answers(Variant("full"), "maths", problems[::-1])
    assert [a["question"] for a in answers] == [p.question for p in problems[::-1]]
    assert found.reused == 0


def test_a_file_of_answers_belongs_to_all_that_they_depend_on(tmp_path, monkeypatch):
    found = make(tmp_path)
    griffin = Variant("GRIFFIN", "griffin", 0.5)

    def file(variant=griffin, settings=None):
        return found.file("maths", variant, settings, "jsonl")

    first = file()
    assert file() == first == file(replace(griffin, name="renamed"))
    others = [file(replace(griffin, density=0.6)), file(replace(griffin, reselect=8)),
              file(replace(griffin, rank=4)), file(replace(griffin, block=LoRAFF)),
              file(replace(griffin, rank=4, stages=LAYERWISE)),
              file(replace(griffin, rank=4, stages=E2E)),
              file(replace(griffin, rank=4, stages=BOTH_STAGES)), file(settings="other")]
    found.tokenizer.template = "other"
    others.append(file())
    found.tokenizer.template = None
    weight = found.model.model.norm.weight
    with torch.no_grad():
        weight += 1
    others.append(file())
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("name", ["model.py", "caprese.py", "data.py", "sample.py", "distill.py"])
def test_a_change_of_the_code_makes_other_files(tmp_path, monkeypatch, name):
    """A fork that changes SparseFF must never read the answers of the code before."""
    def files():
        found = make(tmp_path)
        trained = Variant("x", "griffin", 0.5, 4, LAYERWISE)
        return [found.file("", variant, None, "x") for variant in (Variant("full"), trained)]

    before, sources = files(), []
    for file in experiment.SOURCES:
        if file.name == name and file.parent == ROOT:
            edited = tmp_path / name
            edited.write_text(file.read_text() + "\n# edited\n")
            file = edited
        sources.append(file)
    assert sources != experiment.SOURCES
    assert files() == before
    monkeypatch.setattr(experiment, "SOURCES", sources)
    after = files()
    assert before[0] != after[0] and before[1] != after[1]


def test_the_source_of_a_block_counts_for_its_variants_alone(tmp_path, monkeypatch):
    found = make(tmp_path)
    variants = [Variant("x", "griffin", 0.5, 4, E2E, block)
                for block in (caprese.SparseFF, LoRAFF)]
    before = [found.file("", variant, None, "x") for variant in variants]
    edited = tmp_path / "lora.py"
    edited.write_text((ROOT / "paper" / "lora.py").read_text() + "\n# edited\n")
    find = experiment.inspect.getsourcefile
    monkeypatch.setattr(experiment.inspect, "getsourcefile",
                        lambda block: str(edited) if block is LoRAFF else find(block))
    after = [found.file("", variant, None, "x") for variant in variants]
    assert after[0] == before[0] and after[1] != before[1]


def test_a_change_of_the_files_of_data_makes_other_files(tmp_path):
    """Content counts, not names: of --data for answers, of --train and --adapter for variants."""
    problems = data.problems("maths", 12, 5)
    rows = [{"question": p.question, "response": p.response, "answer": p.answer} for p in problems]
    adapter = tmp_path / "a.safetensors"
    flags = ["--model", str(sample.BUNDLED), "--dtype", "float32", "--max-new-tokens", "2",
             "--data", write(tmp_path / "sums.jsonl", rows[:3]),
             "--train", write(tmp_path / "train.jsonl", rows[4:]), "--adapter", str(adapter)]
    trained = Variant("x", "griffin", 0.5, 4, LAYERWISE)
    loaded = Variant("a", adapter=str(adapter))

    def files(seed):
        model = caprese.attach(sample.load(settings("table1_accuracy"))[0], rank=4)
        caprese.save_adapter(tiny.fill(model, seed), adapter)
        found = make(tmp_path / "runs", *flags)
        (tmp_path / "runs").mkdir(exist_ok=True)
        found.answers(Variant("full"), "sums", found.problem_sets()["sums"])
        return (len(list((tmp_path / "runs").glob("sums-full-*.jsonl"))), found.reused,
                found.file("", trained, None, "x"), found.file("", loaded, None, "x"))

    before = files(seed=1)
    assert before[:2] == (1, 0)
    assert files(seed=1) == (1, 3, *before[2:])  # --limit 3
    write(tmp_path / "sums.jsonl", rows[:2] + [rows[2] | {"answer": "77"}])
    assert files(seed=1) == (2, 0, *before[2:])
    write(tmp_path / "train.jsonl", rows[4:-1])
    after = files(seed=2)
    assert after[2] != before[2] and after[3] != before[3]


def test_a_learned_correction_is_read_again_and_the_same(tmp_path, monkeypatch):
    found = make(tmp_path)
    variant = found.learned(found.sparse("griffin"), BOTH_STAGES)
    first = {i: ff.L.clone() for i, ff in caprese.sparse_layers(found.prepare(variant)).items()}
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # of the first stage, and of both

    def train(*args):
        raise AssertionError("it must not be trained again")

    monkeypatch.setattr(distill, "layerwise", train)
    monkeypatch.setattr(distill, "end_to_end", train)
    for i, ff in caprese.sparse_layers(make(tmp_path).prepare(variant)).items():
        assert torch.equal(ff.L, first[i]) and ff.R.any()
    with pytest.raises(AssertionError):
        found.prepare(found.learned(replace(variant, density=0.4), LAYERWISE))


# ---- variants

def test_variants_are_the_rows_of_the_paper(tmp_path):
    adapter = str(sample.BUNDLED / "griffin.safetensors")
    found = make(tmp_path, "--method", "int4", "--adapter", adapter, load=False)
    variants = found.variants(("griffin",))
    assert [variant.name for variant in variants] == [
        "full", "GRIFFIN", "GRIFFIN + layer-wise", "GRIFFIN + E2E", "4-bit", "4-bit + layer-wise",
        "4-bit + E2E", "griffin"]
    assert [variant.rank for variant in variants] == [0, 0, 4, 4, 0, 4, 4, 0]
    assert found.sparse("griffin").density == 0.5
    assert found.sparse("cats").density == BUNDLED_CATS_DENSITY


def test_4_bit_has_no_density(tmp_path):
    found = make(tmp_path, "--density", "0.3", load=False)
    assert found.sparse("int4").density == 1 and found.sparse("griffin").density == 0.3


def test_a_real_model_without_samples_has_no_learned_rows(tmp_path):
    file = write(tmp_path / "sums.jsonl", [{"question": "1 + 1", "answer": "2"}])
    found = make(tmp_path, "--model", "x/y", "--data", file, load=False)
    assert [variant.name for variant in found.variants(("griffin",))] == ["full", "GRIFFIN"]
    assert found.sparse("griffin").density == 0.5


# ---- answers that are kept

def test_kept_answers_are_counted_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recount, "FOLDER", tmp_path / "kept")
    runs = tmp_path / "runs"
    runs.mkdir()
    about = {"set": "sums", "run": 0, "problem": 0, "seconds": 1.0}
    lines = [about | {"variant": "full", "question": "1 + 1", "answer": "2",
                      "response": "It is #### 2", "tokens": 5, "accuracy": 0.0},
             about | {"variant": "full", "problem": 1, "question": "1 + 2", "answer": "3",
                      "response": "It is #### 4", "tokens": 7, "accuracy": 1.0},
             about | {"variant": "GRIFFIN", "question": "1 + 1", "answer": "2",
                      "response": "1 1 1", "tokens": 9, "accuracy": 0.0}]
    lines.append(lines[0] | {"run": 1})
    write(runs / "sums.jsonl", lines)
    news = about | {"set": "xsum", "variant": "full", "question": "An article", "answer": "News",
                    "response": "News", "tokens": 1, "rouge1": 0.25}
    write(runs / "news.jsonl", [news])
    recount.collect(runs)
    rows = recount.count(tmp_path / "kept" / "sums.jsonl.gz")
    assert rows == [
        {"variant": "full", "set": "sums", "answers": 2, "score %": 50.0, "±": 50 / 2 ** 0.5,
         "tokens": 6},
        {"variant": "griffin", "set": "sums", "answers": 1, "score %": 0.0, "±": 0.0, "tokens": 9}]
    text = gzip.decompress((tmp_path / "kept" / "xsum.jsonl.gz").read_bytes()).decode()
    assert "article" not in text and "row 1" in text
    monkeypatch.setattr(sys, "argv", ["recount"])
    recount.main()
    assert "25.000" in capsys.readouterr().out
    write(runs / "other_density.jsonl", lines[2:3])
    with pytest.raises(ValueError, match="a second file of"):
        recount.collect(runs)


# ---- the scripts

def test_the_scripts_are_named_as_the_paper_names_them():
    names = {file.stem for file in (ROOT / "paper").glob("*.py")}
    shown = {name for name in names if name.startswith(("table", "figure", "time", "loss", "in_"))}
    assert shown == set(SCRIPTS) and len(SCRIPTS) == 14
    for name in SCRIPTS:
        script = importlib.import_module(f"paper.{name}")
        title = script.__doc__.split(":")[0]  # Figures 4 and 7
        kind, number = re.match(r"(table|figure|time|loss|in_)(\d*)", name).groups()
        ours = kind in ("time", "loss", "in_")
        assert title == "Ours" if ours else title.lower().startswith(kind)
        assert number in re.findall(r"\d+", title) or ours
        assert set(script.NEEDS) <= {"problems", "graded", "samples", "corrections",
                                      "transformers"}
        assert callable(script.measure) and callable(script.draw)
        source = (ROOT / "paper" / f"{name}.py").read_text()
        assert f'common.main("{name}")' in source
        imports = [node for node in ast.parse(source).body
                   if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = [getattr(node, "module", node.names[0].name) for node in imports]
        own = [name for name in modules if name.split(".")[0] not in sys.stdlib_module_names]
        assert own[0] == "paper", f"{name}: it says how to run it before all other imports"


def test_a_script_that_is_run_as_a_file_says_how_to_run_it():
    done = subprocess.run([sys.executable, "paper/figure2_residual.py"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "python -m paper.figure2_residual" in done.stderr


COLUMNS = {  # columns that a script must have
    "table1_accuracy": {"active parameters (M)", "maths accuracy %", "reading accuracy ±"},
    "table3_reselection": {"rho", "accuracy %", "ms per token", "seconds to a right answer"},
    "table6_lora": {"added parameters %", "maths accuracy %"},
    "table7_int4": {"added parameters %", "maths accuracy %"},
    "figure2_residual": {"density", "alone", "best rank 4", "L R rank 4"},
    "figure3_coverage": {"K", "compute", "coverage %", "coverage ±"},
    "figure4_length": {"tokens", "against full"},
    "figure5_density": {"density", "rank", "accuracy %"},
    "figure8_spectrum": {"layer", "ranks for 90%", "unexplained"},
    "time_to_right_answer": {"seconds", "seconds to a right answer"},
    "in_transformers": {"transformers accuracy %", "equal answers %", "ms per token"},
    "lossless": {"n", "equal %", "acceptance", "bytes_to_full", "ms per token"},
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_script_runs_on_the_bundled_model(out, tmp_path, name, monkeypatch, capsys):
    script = importlib.import_module(f"paper.{name}")
    if "transformers" in script.NEEDS:
        pytest.importorskip("transformers")
    for constant, fewer in (("DENSITIES", (0.3, 0.6)), ("BUNDLED_RHO", (4,)), ("PASSES", (3,)),
                            ("METHODS", {"oracle top-k": "topk", "GRIFFIN": "griffin"})):
        if name != "table1_accuracy" and hasattr(script, constant):
            monkeypatch.setattr(script, constant, fewer)
    flags = [*TINY, "--out", str(out)]
    flags += ["--runs", "2"] if name == "figure3_coverage" else []
    flags += ["--method", "int4"] if name == "table7_int4" else []
    if importlib.util.find_spec("matplotlib"):
        flags += ["--plot", str(tmp_path / "plots")]
    result = common.run([name], flags)[name]
    rows = result["rows"]
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    assert COLUMNS[name] <= rows[0].keys()
    json.dumps(result)
    printed = capsys.readouterr().out
    if result["answers"]:
        assert f"{result['reused']} of {result['answers']} answers are from earlier runs" in printed
    if importlib.util.find_spec("matplotlib"):
        picture, = (tmp_path / "plots").iterdir()
        assert picture.name == f"{name}.png" and picture.stat().st_size > 5000
    if name == "figure2_residual":
        for row in rows:
            assert 0 < row["best rank 8"] < row["best rank 2"] < row["alone"] < 1
            assert row["best rank 4"] < row["L R rank 4"]
    if name == "figure3_coverage":
        assert {row["K"] for row in rows} == {1, 2}
        assert all(0 < row["compute"] <= row["K"] for row in rows)
    if name == "table6_lora":
        added = {row["method"]: row["added parameters %"] for row in rows}
        assert list(added) == ["full", "GRIFFIN", "GRIFFIN + LoRA, E2E alone",
                               "GRIFFIN + L R, E2E alone", "GRIFFIN + E2E"]
        # LoRA's rank is a whole number, here 1 for 0.7
        assert added["GRIFFIN + L R, E2E alone"] == added["GRIFFIN + E2E"] > 0
        assert added["GRIFFIN + LoRA, E2E alone"] > 0


def test_lora_and_low_rank_have_equally_many_parameters(tmp_path):
    found = make(tmp_path, "--rank", "32")
    griffin = replace(found.sparse("griffin"), rank=32)
    added = [caprese.added_parameters(found.prepare(replace(griffin, block=block)))
             for block in (caprese.SparseFF, LoRAFF)]
    assert added[1] == pytest.approx(added[0], rel=0.07)  # LoRA's rank, here 5, is a whole number


# ---- refusals

@pytest.mark.parametrize("name, flags, words", [
    ("table1_accuracy", ["--adapter", "nothing.safetensors"], "nothing.safetensors"),
    ("table1_accuracy", ["--model", "m", "--data", "nothing.jsonl"], "nothing.jsonl"),
    ("table1_accuracy", ["--model", "m"], "--data"),
    ("figure2_residual", ["--model", "m"], "--train"),
    ("figure5_density", ["--model", "m", "--data", "x.jsonl"], "--train"),
    ("figure8_spectrum", ["--model", "m"], "--adapter"),
    ("figure2_residual", ["--model", "m", "--train", "nothing.jsonl"], "nothing.jsonl"),
    ("table1_accuracy", ["--train", "x.jsonl"], "--train"),
    ("table1_accuracy", ["--temperature", "nan"], "--temperature"),
    ("table1_accuracy", ["--temperature", "-1"], "--temperature"),
    ("table1_accuracy", ["--runs", "3"], "--temperature"),
    ("figure3_coverage", ["--temperature", "0"], "--temperature"),
    ("table1_accuracy", ["--limit", "0"], "--limit"),
    ("table1_accuracy", ["--batch-size", "0"], "--batch-size"),
    ("table1_accuracy", ["--density", "7"], "--density"),
    ("table1_accuracy", ["--density", "nan"], "--density"),
])
def test_bad_flags_are_refused_before_loading(monkeypatch, tmp_path, name, flags, words):
    def load(*args):
        raise AssertionError("the model must not be loaded")

    monkeypatch.setattr(sample, "load", load)
    with pytest.raises((ValueError, OSError)) as error:
        common.run([name], [*flags, "--out", str(tmp_path / "runs")])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, words", [
    (["--plot", __file__], "folder"),
    (["--out", __file__], "folder"),
    (["--rank", "1000"], "rank"),
    (["--device", "meta"], "meta"),
])
def test_bad_flags_are_refused_before_the_first_slow_step(monkeypatch, tmp_path, flags, words):
    def measure(*args):
        raise AssertionError("nothing must be measured")

    monkeypatch.setattr(importlib.import_module("paper.table1_accuracy"), "measure", measure)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # matplotlib is optional
    flags = flags if "--out" in flags else [*flags, "--out", str(tmp_path)]
    with pytest.raises(ValueError, match=words) as error:
        common.run(["table1_accuracy"], ["--device", "cpu", "--samples", "8", *flags])
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_model_is_refused_before_the_first_slow_step(tmp_path):
    file = tmp_path / "other.safetensors"
    caprese.save_adapter(caprese.attach(tiny.model(), rank=2), file)
    with pytest.raises(ValueError, match="another model"):
        make(tmp_path, "--adapter", str(file))


def test_problems_without_right_and_wrong_are_refused_before_the_first_slow_step(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"prompt": "c", "reference": "a"}])
    with pytest.raises(ValueError, match="right or wrong"):
        common.run(["figure4_length"], ["--device", "cpu", "--samples", "8", "--data", file])


def test_plot_without_matplotlib_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        common.run(["figure6_parameters"], ["--plot", str(tmp_path)])


def test_two_files_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rename"):
        common.run(["table1_accuracy"], ["--data", "a/x.jsonl", "--data", "b/x.jsonl"])


def test_the_command_ends_in_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table1_accuracy", "--temperature", "nan"])
    with pytest.raises(SystemExit) as exit:
        common.main("table1_accuracy")
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_all_of_them_go_without_those_that_need_samples(tmp_path, monkeypatch, capsys):
    """A real model without samples and adapters: what needs L and R is left out, in one line."""
    ran = []
    monkeypatch.setattr(common, "run_script", lambda name, *rest: ran.append(name) or {})
    file = write(tmp_path / "sums.jsonl", [{"question": "1 + 1", "answer": "2"}])
    common.run(SCRIPTS, ["--model", str(sample.BUNDLED), "--device", "cpu", "--data", file,
                         "--out", str(tmp_path)])
    left_out = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    needy = ["table6_lora", "figure2_residual", "figure5_density", "figure8_spectrum"]
    if not importlib.util.find_spec("transformers"):
        needy.append("in_transformers")
    assert left_out == needy
    assert sorted(ran + left_out) == sorted(SCRIPTS)
