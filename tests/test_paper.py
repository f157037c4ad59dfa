"""The scripts of paper/: python -m pytest tests/test_paper.py"""

import gzip
import importlib
import importlib.util
import itertools
import json
import re
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
from paper import __main__ as paper_main
from paper import (common, experiment, figure2_residual, figure3_coverage, figure8_spectrum, recount,
                   report, scores)
from paper.common import BUNDLED_CATS_DENSITY, Variant
from paper.experiment import Experiment
from paper.lora import LoRAFF
from paper.oracle import OracleFF

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--limit", "3", "--samples", "16", "--rank", "4", "--method", "griffin",
        "--max-new-tokens", "8"]
GRIFFIN = Variant("GRIFFIN", caprese.GRIFFIN, 0.5)
CATS = Variant("CATS", caprese.CATS, 0.1)
TOTALS = {  # parameters that the models' own cards and checkpoints state
    "r1-distill-qwen-1.5b": 1777088000, "r1-distill-qwen-7b": 7615616512,
    "r1-distill-qwen-14b": 14770033664, "qwen2.5-14b": 14770033664, "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824, "llama-3.1-8b": 8030261248, "gemma-2-2b": 2614341888,
    "gemma-2-9b": 9241705984, "smollm2-135m": 134515008}



def settings(*flags, **defaults):
    """The settings of a script for these flags."""
    return common.arguments("paper.test", "A test.", [*TINY, *flags], **defaults)


def make(folder, *flags):
    """An Experiment on the bundled model with tiny settings, whose files are in a folder."""
    return Experiment(settings("--out", str(folder), *flags))


def run(name, *flags):
    """The result of a script, as --json prints it."""
    return importlib.import_module(f"paper.{name}").main(list(flags))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One --out folder for all scripts, so that each adapter is learned once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def stub(monkeypatch):
    """A tiny random model in place of the bundled one, with the bundled tokenizer."""
    tokenizer = data.Tokenizer(sample.BUNDLED)
    size = tokenizer.tokenizer.get_vocab_size()
    monkeypatch.setattr(sample, "load", lambda args: (
        tiny.model(vocab_size=size, max_position_embeddings=512), tokenizer))


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
    assert scores.scores(passage, "black cat") == {"contains": 1.0, "f1": 1.0}
    assert scores.scores(passage, "I looked. The answer is black cat.") == {"contains": 1, "f1": 1}
    assert scores.scores(passage, "black catfish, cat")["contains"] == 0
    # a base model goes on with the next article, which counts for nothing
    assert scores.scores(article, "a b\n### c")["rougeL"] == 1


def test_the_standard_error_is_wilsons_and_never_zero():
    for right, n in ((0, 5), (3, 5), (5, 5), (40, 40), (1, 1)):
        values = [1.0] * right + [0.0] * (n - right)
        assert scores.standard_error(values) == pytest.approx(sample.standard_error(right / n, n))
        assert scores.standard_error(values) > 0
    values = [0.2, 0.3] * 5000  # of other values it is that of their own spread
    assert scores.standard_error(values) == pytest.approx(0.05 / 100, rel=0.01)
    assert scores.standard_error([0.7]) == 0.5  # one value says nothing


def test_several_runs_of_one_problem_are_one_value():
    def answer(problem, run, accuracy):
        return {"problem": problem, "run": run, "accuracy": accuracy, "tokens": 10 + run}

    one = scores.summary([answer(i, 0, float(i < 3)) for i in range(4)])
    error = 100 * sample.standard_error(0.75, 4)
    assert one == pytest.approx({"accuracy %": 75, "accuracy ±": error, "tokens": 10})
    same = [answer(i, run, float(i < 3)) for i in range(4) for run in range(3)]
    three = scores.summary(same, "x ")  # the same verdict three times makes nothing surer
    assert three == pytest.approx({"x accuracy %": 75, "x accuracy ±": error, "x tokens": 11})
    mixed = scores.summary([answer(i, run, float(i < run)) for i in range(3) for run in range(3)])
    assert mixed["accuracy %"] == pytest.approx(100 / 3)  # of 2/3, 1/3 and 0
    assert mixed["accuracy ±"] == pytest.approx(100 / 3 / 3 ** 0.5)


def test_differences_are_taken_problem_by_problem():
    def answers(*accuracies):
        return [{"problem": i, "run": 0, "accuracy": a} for i, a in enumerate(accuracies)]

    found = scores.differences(answers(1.0, 0.0, 0.0, 0.0), answers(1.0, 1.0, 0.0, 0.0), "x ")
    column = "accuracy, difference, points"
    assert found == pytest.approx({f"x {column}": -25, f"x {column} ±": 25})  # 0.5 / sqrt(4)
    same = scores.differences(answers(1.0, 0.0), answers(1.0, 0.0))
    assert same == {column: 0, f"{column} ±": 100 * sample.standard_error(0.0, 2)}
    close = scores.differences(answers(0.5, 0.25), answers(0.25, 0.0))  # as ROUGE may be
    assert close == {column: 25, f"{column} ±": 0}
    assert scores.differences(answers(1.0), answers(0.0)) == {column: 100, f"{column} ±": 50}
    with pytest.raises(ValueError):
        scores.differences(answers(1.0, 0.0), answers(1.0))


def test_times_are_ratios_of_sums_with_the_spread_of_the_answers():
    seconds, tokens, right = [1.0, 2.0, 3.0], [10, 20, 30], [1.0, 0.0, 1.0]
    found = scores.timing(seconds, tokens, right)
    assert found["ms per token"] == pytest.approx(100)
    assert found["ms per token ±"] == pytest.approx(0, abs=1e-9)  # every answer has the same ratio
    assert found["seconds"] == 2 and found["seconds ±"] == pytest.approx(1 / 3 ** 0.5)
    assert found["seconds to a right answer"] == 3 and found["seconds to a right answer ±"] > 0
    none = scores.timing(seconds, tokens, [0.0] * 3)
    assert none["seconds to a right answer"] is None


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


@pytest.mark.parametrize("method", [OracleFF, "griffin", "cats"])
def test_moments_are_sums_over_the_response_tokens(method):
    """Against the layers' own outputs, sample by sample, without padding."""
    model = caprese.attach(tiny.model(), method, 0.4, "all")
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
            with caprese.phase(model, "teacher_forced", generated=generated):
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


def test_what_is_unexplained_has_the_mean_of_distills():
    model = tiny.fill(caprese.attach(tiny.model(), "griffin", 0.4, "all", rank=4))
    samples = [([5, 6, 7], [8, 9, 10, 11]), ([3, 4], [1, 2])]
    found = figure8_spectrum.unexplained_by_layer(model, samples)
    assert list(found) == [0, 1, 2, 3] and len(set(found.values())) == 4
    assert sum(found.values()) / 4 == pytest.approx(distill.unexplained(model, samples))


# ---- figure 6

def test_figure6_agrees_with_the_paper(capsys):
    result = run("figure6_parameters", "--json", "--device", "cpu")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == result and "0.8 to 1.3" in printed.err
    rows = {row["model"]: row for row in result["rows"]}
    totals = {name: round(row["parameters (M)"] * 1e6) for name, row in rows.items()}
    assert totals == TOTALS and set(rows) == set(bench.SHAPES)
    everywhere = {name: row["all layers %"] for name, row in rows.items()}
    for name in ("r1-distill-qwen-1.5b", "r1-distill-qwen-14b", "llama-3.1-8b", "gemma-2-2b",
                 "gemma-2-9b"):
        assert 0.8 < everywhere[name] < 1.3
        assert rows[name]["first half %"] == pytest.approx(everywhere[name] / 2)


# ---- answers that are kept

def without_seconds(answers):
    return [{key: value for key, value in a.items() if key not in ("seconds", "set")}
            for a in answers]


@pytest.mark.parametrize("runs, cut", [(1, 0), (1, 1), (3, 0)])
def test_a_killed_run_goes_on_to_the_same_answers(tmp_path, stub, monkeypatch, runs, cut):
    """Killed within a line, also within a batch: the batches that are incomplete are decoded."""
    found = make(tmp_path, "--temperature", "0.9", "--runs", str(runs), "--batch-size", "2")
    problems = data.problems("maths", 6, 5, evaluation=True)
    whole = found.answers(CATS, "maths", problems)
    assert [(a["problem"], a["run"]) for a in whole] == [
        (i, run) for i in range(6) for run in range(runs)]
    assert len({a["response"] for a in whole}) > 3
    assert (found.count, found.reused) == (6 * runs, 0)
    file, = tmp_path.glob("maths-cats-*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6 * runs
    kept = 4 + cut  # lines of the first two batches; cut: the first one of the third as well
    file.write_bytes(b"".join(lines[:kept]) + lines[kept][:17])
    decoded, decode = [], found.decode

    def spy(variant, problems, batch):
        decoded.extend(batch)
        return decode(variant, problems, batch)

    monkeypatch.setattr(found, "decode", spy)
    assert without_seconds(found.answers(CATS, "maths", problems)) == without_seconds(whole)
    assert len(decoded) == 6 * runs - 4
    assert found.reused == 4
    decoded.clear()
    assert found.answers(CATS, "maths", problems) and not decoded
    assert found.reused == 4 + 6 * runs


def test_answers_to_other_questions_are_not_taken(tmp_path, stub):
    problems = data.problems("maths", 2, 5, evaluation=True)
    found = make(tmp_path)
    found.answers(Variant("full"), "maths", problems)
    answers = found.answers(Variant("full"), "maths", problems[::-1])
    assert [a["question"] for a in answers] == [p.question for p in problems[::-1]]
    other = [replace(problems[1], answer="77"), problems[0]]
    assert found.answers(Variant("full"), "maths", other)[0]["answer"] == "77"
    assert found.reused == 0


def test_answers_know_whether_they_ended(tmp_path):
    """By a stop token, by --max-new-tokens, by the context, or not at all."""
    problems = data.problems("maths", 2, 5, evaluation=True)
    long = make(tmp_path / "long", "--max-new-tokens", "90")
    assert [a["ended"] for a in long.answers(Variant("full"), "maths", problems)] == [True, True]
    short = make(tmp_path / "short")
    for answer in short.answers(Variant("full"), "maths", problems):
        assert answer["tokens"] == 8 and not answer["ended"]
    tight = make(tmp_path / "tight", "--max-new-tokens", "90")
    prompts = [len(tight.tokenizer.prompt_ids(data.ask(problem))) for problem in problems]
    tight.model.config.max_position_embeddings = max(prompts) + 4
    cut = tight.answers(Variant("full"), "maths", problems)[prompts.index(max(prompts))]
    assert cut["tokens"] == 4 and not cut["ended"]


def test_the_names_of_kept_files_tell_variants_apart(tmp_path, monkeypatch):
    learned = replace(GRIFFIN, rank=4, stages=("layer-wise",))
    names = [variant.file_name() for variant in (
        Variant("full"), GRIFFIN, CATS, replace(GRIFFIN, density=0.6),
        replace(GRIFFIN, layers="all"), replace(GRIFFIN, reselect=8), learned,
        replace(learned, rank=5),
        replace(learned, stages=("E2E",)), replace(learned, stages=("layer-wise", "E2E")),
        replace(learned, method=LoRAFF), Variant("x", adapter="x.safetensors"),
        Variant("y", adapter="y.safetensors"))]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert replace(GRIFFIN, name="renamed").file_name() == GRIFFIN.file_name()


def test_a_class_that_was_edited_is_another_variant(tmp_path, monkeypatch):
    """A fork must never read the answers of the code before, be it its own or that of a base."""
    monkeypatch.syspath_prepend(tmp_path)
    base, fork = tmp_path / "edited_base.py", tmp_path / "edited_fork.py"
    base.write_text("import caprese\n\n\nclass Base(caprese.GRIFFIN):\n    pass\n")
    fork.write_text("import edited_base\n\n\nclass Fork(edited_base.Base):\n    pass\n")
    block = sample.import_block("edited_fork:Fork")
    variant = replace(GRIFFIN, method=block)
    names = [variant.file_name()]
    for file in (fork, base):
        file.write_text(file.read_text() + "# edited\n")
        assert variant.file_name() == names[-1]  # the running code is still the one before
        distill.source_digest.cache_clear()  # what another process would do
        names.append(variant.file_name())
    assert len(set(names)) == 3 and names[0].startswith("edited_fork-Fork-")
    fork.unlink()
    distill.source_digest.cache_clear()
    with pytest.raises(ValueError, match="source files of edited_fork:Fork"):
        variant.file_name()


@pytest.mark.parametrize("kind", ["griffin", "cats", "adapter"])
def test_answers_of_an_edited_caprese_py_are_not_taken(tmp_path, stub, monkeypatch, kind):
    """Also of a row of --adapter. The full model is none of our methods, so its answers stay."""
    problems = data.problems("maths", 2, 5, evaluation=True)
    file = tmp_path / "a.safetensors"
    model = sample.load(None)[0]
    caprese.save_adapter(tiny.fill(caprese.attach(model, rank=4)), file)
    caprese.detach(model)

    def reused():
        found = make(tmp_path / "runs", "--adapter", str(file))
        rows = common.variants(found.args, ())
        variant = {"griffin": GRIFFIN, "cats": CATS, "adapter": rows[-1]}[kind]
        counts = []
        for each in (rows[0], variant):
            before = found.reused
            found.answers(each, "maths", problems)
            counts.append(found.reused - before)
        return counts

    assert reused() == [0, 0] and reused() == [2, 2]
    edited = tmp_path / "caprese.py"
    edited.write_text(Path(caprese.__file__).read_text() + "# edited\n")
    getsourcefile = distill.inspect.getsourcefile
    monkeypatch.setattr(distill.inspect, "getsourcefile", lambda block: str(edited)
                        if block.__module__ == "caprese" else getsourcefile(block))
    distill.source_digest.cache_clear()
    assert reused() == [2, 0] and reused() == [2, 2]
    distill.source_digest.cache_clear()


def test_the_hash_is_that_of_the_code_that_was_imported(monkeypatch):
    """It is taken with the flags, before the model loads, for the built-in methods as well."""
    distill.source_digest.cache_clear()
    settings("--block", "paper.oracle:OracleFF")
    monkeypatch.setattr(distill.inspect, "getsourcefile", lambda block: 1 / 0)
    for block in (caprese.GRIFFIN, caprese.CATS, LoRAFF, OracleFF):
        assert len(distill.source_digest(block)) == 16


@pytest.mark.parametrize("line", [
    b"{}", b"[]", b"null", b"no JSON", b"\xff", b'{"problem": 0, "run": 0}', b"",
    "without response", "without accuracy", "a problem that is text", "a score that is text"])
def test_a_damaged_answer_is_named_by_file_and_line(tmp_path, stub, line):
    problems = data.problems("maths", 2, 5, evaluation=True)
    make(tmp_path).answers(GRIFFIN, "maths", problems)
    file, = tmp_path.glob("*.jsonl")
    first, second = file.read_bytes().splitlines(keepends=True)
    answer = json.loads(second)
    if isinstance(line, str):
        if line.startswith("without "):
            del answer[line.removeprefix("without ")]
        else:
            answer["problem" if "problem" in line else "accuracy"] = "0"
        line = json.dumps(answer).encode()
    file.write_bytes(first + line + b"\n")
    for read in (lambda: make(tmp_path).answers(GRIFFIN, "maths", problems),
                 lambda: recount.collect(tmp_path)):
        with pytest.raises(ValueError, match="line 2 is not a kept answer; delete") as error:
            read()
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert file.read_bytes() == first + line + b"\n"
    file.write_bytes(first)
    make(tmp_path).answers(GRIFFIN, "maths", problems)
    again = json.loads(file.read_bytes().splitlines()[-1])
    assert again["response"] == json.loads(second)["response"]


def test_recount_changes_no_file_that_it_reads(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "1 + 1", "answer": "2"}')
    with pytest.raises(ValueError, match="no answers"):
        recount.collect(tmp_path)
    assert file.read_text() == '{"question": "1 + 1", "answer": "2"}'


@pytest.mark.parametrize("content", [b"no gzip", b"\x1f\x8b", gzip.compress(b"{}\n"),
                                     gzip.compress(b"[]\n"), gzip.compress(b"no JSON\n"),
                                     gzip.compress(b"{}\n" * 99)[:-9], b"\x1f\x8b" + b"\x08" * 30])
def test_a_damaged_file_of_answers_is_named(tmp_path, content):
    file = tmp_path / "sums.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="sums.jsonl.gz is damaged .*; fetch it again") as error:
        recount.count(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", "", "no JSON"])
def test_a_damaged_settings_json_is_named(tmp_path, stub, content):
    make(tmp_path)
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        make(tmp_path)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert file.read_text() == content


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, stub):
    """/dev/full takes no bytes."""
    found = make(tmp_path)
    name = f"maths-{GRIFFIN.file_name()}-batch-128-temperature-0.jsonl"
    problems = data.problems("maths", 2, 5, evaluation=True)
    found.answers(GRIFFIN, "maths", problems)
    assert (tmp_path / name).exists()
    with pytest.raises(OSError, match=r"cannot write /dev/full \(No space left on device\)"):
        report.write("/dev/full", b"text", "ab")
    (tmp_path / "settings.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot write .*settings.tmp"):
        make(tmp_path)


def test_settings_json_says_what_made_a_folder(tmp_path, stub):
    found = make(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["model"] == caprese.fingerprint(found.model)
    assert settings["commit"] == report.commit() and settings["samples"] == 16
    make(tmp_path, "--limit", "2", "--density", "0.4", "--batch-size", "3")  # these stand in names
    assert json.loads((tmp_path / "settings.json").read_text()) == settings


@pytest.mark.parametrize("flags, name", [
    (["--seed", "1"], "seed"), (["--max-new-tokens", "9"], "max_new_tokens"),
    (["--samples", "17"], "samples"), (["--layerwise", "adam"], "layerwise"),
    (["--loss", "kl"], "loss"), (["--e2e-lr", "0.5"], "e2e_lr"),
    (["--e2e-epochs", "2"], "e2e_epochs"), (["--e2e-batch-size", "2"], "e2e_batch_size"),
    (["--paper"], "layerwise, e2e_lr, e2e_epochs, e2e_batch_size")])
def test_a_run_with_other_settings_is_refused_by_name(tmp_path, stub, flags, name):
    make(tmp_path)
    before = (tmp_path / "settings.json").read_text()
    with pytest.raises(ValueError, match=f"another {name}; give another --out") as error:
        make(tmp_path, *flags)
    assert "\n" not in str(error.value)
    assert (tmp_path / "settings.json").read_text() == before


def test_a_run_with_other_inputs_is_refused_by_name(tmp_path, monkeypatch):
    """A file replaced under its name: of --data, --train, --adapter, or the model itself."""
    problems = data.problems("maths", 12, 5)
    rows = [{"question": p.question, "response": p.response, "answer": p.answer} for p in problems]
    adapter, folder = tmp_path / "a.safetensors", tmp_path / "runs"
    model, tokenizer = sample.load(settings())
    monkeypatch.setattr(sample, "load", lambda args: (model, tokenizer))

    def new_adapter(seed):
        caprese.save_adapter(tiny.fill(caprese.attach(model, rank=4), seed), adapter)
        caprese.detach(model)

    def again():
        return make(folder, "--model", str(sample.BUNDLED), "--data", str(tmp_path / "sums.jsonl"),
                    "--train", str(tmp_path / "train.jsonl"), "--adapter", str(adapter))

    def refused(name):
        with pytest.raises(ValueError, match=f"with another {name}; give another --out"):
            again()

    new_adapter(1)
    write(tmp_path / "sums.jsonl", rows[:4])
    write(tmp_path / "train.jsonl", rows[4:])
    again()
    again()
    write(tmp_path / "sums.jsonl", rows[:3] + [rows[3] | {"answer": "77"}])
    refused("data sums")
    write(tmp_path / "sums.jsonl", rows[:4])
    write(tmp_path / "train.jsonl", rows[4:-1])
    refused("training data")
    write(tmp_path / "train.jsonl", rows[4:])
    new_adapter(2)
    refused("adapter a")
    new_adapter(1)
    again()
    model.model.norm.weight.data += 1
    new_adapter(1)
    refused("adapter a, model")


def test_a_folder_of_unknown_answers_is_refused(tmp_path, stub):
    write(tmp_path / "maths.jsonl", [{"problem": 0}])
    with pytest.raises(ValueError, match="settings.json"):
        make(tmp_path)


def test_another_commit_is_said(tmp_path, stub, monkeypatch, capsys):
    make(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(experiment, "commit", lambda: "abc1234")
    make(tmp_path)
    assert "is abc1234; if more than the files" in capsys.readouterr().err


@pytest.mark.parametrize("name, said", [("abc-dirty", True), ("abc", False)])
def test_files_that_differ_from_the_commit_are_said(tmp_path, stub, monkeypatch, capsys, name,
                                                    said):
    """Two states of a working tree have one name, so nobody can tell whether it has changed."""
    monkeypatch.setattr(experiment, "commit", lambda: name)
    make(tmp_path)
    assert capsys.readouterr().err == ""
    make(tmp_path)
    assert ("note:" in capsys.readouterr().err) == said


def test_a_learned_correction_is_read_again_and_the_same(tmp_path, stub, monkeypatch):
    found = make(tmp_path)
    variant = common.learned(found.args, GRIFFIN, ("layer-wise", "E2E"))
    first = {i: ff.L.clone() for i, ff in caprese.sparse_layers(found.prepare(variant)).items()}
    # of the first stage, and of both; no checkpoint is left
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}
    assert len(list(tmp_path.glob("*.safetensors"))) == 2

    def train(*args, **settings):
        raise AssertionError("it must not be trained again")

    monkeypatch.setattr(distill, "layerwise_stage", train)
    monkeypatch.setattr(distill, "train_end_to_end", train)
    again = make(tmp_path).prepare(replace(variant, reselect=3))
    for i, ff in caprese.sparse_layers(again).items():
        assert torch.equal(ff.L, first[i]) and ff.R.any()
    with pytest.raises(AssertionError):
        found.prepare(replace(variant, density=0.4))


def test_a_killed_training_goes_on_to_the_same_correction(tmp_path, stub, monkeypatch):
    """Killed within the end-to-end stage, by an exception at its second step."""
    flags = ["--e2e-batch-size", "4", "--layerwise", "none"]
    whole = make(tmp_path / "whole", *flags)
    variant = common.learned(whole.args, GRIFFIN, ("E2E",))
    expected = {i: ff.R.clone() for i, ff in
                caprese.sparse_layers(whole.prepare(variant)).items()}
    found, backward, steps = make(tmp_path / "killed", *flags), distill.e2e_backward, []
    found.args.save_every = 1

    def killed(*args, **settings):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return backward(*args, **settings)

    monkeypatch.setattr(distill, "e2e_backward", killed)
    with pytest.raises(KeyboardInterrupt):
        found.prepare(variant)
    for i, ff in caprese.sparse_layers(found.prepare(variant)).items():
        torch.testing.assert_close(ff.R, expected[i], rtol=0, atol=0)
    assert len(steps) == 5  # two, the one that was killed, and the other two of four


# ---- variants

def names(*flags, methods=("griffin",), **settings_of_variants):
    found = common.variants(settings(*flags), methods, **settings_of_variants)
    return [variant.name for variant in found]


def test_variants_are_the_rows_of_the_paper():
    adapter = str(sample.BUNDLED / "griffin.safetensors")
    args = settings("--method", "int4", "--adapter", adapter)
    variants = common.variants(args, ("cats",))
    assert [variant.name for variant in variants] == [
        "full", "GRIFFIN", "GRIFFIN + layer-wise", "GRIFFIN + E2E", "4-bit", "4-bit + layer-wise",
        "4-bit + E2E", "griffin"]
    assert [variant.rank for variant in variants] == [0, 0, 4, 4, 0, 4, 4, 0]
    assert variants[3].stages == ("layer-wise", "E2E")
    assert common.sparse(args, "griffin").density == 0.5
    assert common.sparse(args, "cats").density == BUNDLED_CATS_DENSITY
    assert names(each_stage=False) == ["full", "GRIFFIN", "GRIFFIN + E2E"]


def test_the_stages_are_those_that_the_flags_ask_for():
    assert names("--layerwise", "none") == ["full", "GRIFFIN", "GRIFFIN + E2E"]
    for each_stage in (True, False):
        assert names("--e2e-epochs", "0", each_stage=each_stage) == [
            "full", "GRIFFIN", "GRIFFIN + layer-wise"]
    last = common.variants(settings("--layerwise", "none"), ("griffin",))[-1]
    assert last.stages == ("E2E",)


def test_a_block_is_one_more_method_in_the_same_table():
    args = settings("--block", "paper.oracle:OracleFF")
    variants = common.variants(args, ("cats",))
    assert [variant.name for variant in variants][3:] == [
        "GRIFFIN + E2E", "OracleFF", "OracleFF + layer-wise", "OracleFF + E2E"]
    assert variants[-1].method is OracleFF and variants[-1].density == 0.5


def test_4_bit_has_no_density():
    args = settings("--density", "0.3")
    assert common.sparse(args, "int4").density == 1
    assert common.sparse(args, "griffin").density == 0.3


def test_a_real_model_without_samples_has_no_learned_rows():
    assert names("--model", "x/y", "--data", "sums.jsonl") == ["full", "GRIFFIN"]


def test_the_recipe_is_that_of_distill():
    """What distill.py fills in for the same flags, so that a row can be learned by the paper's."""
    shared = ("rank", "layerwise", "loss", "e2e_lr", "e2e_epochs", "e2e_batch_size", "samples")
    for flags in ([], ["--paper"], ["--layerwise", "none", "--loss", "kl"],
                  ["--e2e-lr", "0.5", "--rank", "7", "--paper"]):
        for model in ([], ["--model", "x/y"]):
            own = ["--train", "x.jsonl", "--data", "y.jsonl"] if model else []
            ours = common.arguments("paper.test", "", [*flags, *model, *own, "--full"])
            theirs = distill.arguments([*flags, *model, *(["--data", "x.jsonl"] if model else [])])
            for name in shared:
                assert getattr(ours, name) == getattr(theirs, name), name
    assert common.arguments("paper.test", "", []).samples == 1000
    assert common.arguments("paper.test", "", ["--paper"]).samples == 20000


def test_each_stage_is_learned_by_the_flags(tmp_path, stub, monkeypatch):
    asked = []
    monkeypatch.setattr(distill, "layerwise_stage",
                        lambda model, samples, args, checkpoint: asked.append(args.layerwise))
    monkeypatch.setattr(distill, "train_end_to_end",
                        lambda model, samples, *settings, **more: asked.append(settings))
    found = make(tmp_path, "--layerwise", "adam", "--loss", "kl", "--e2e-lr", "0.5",
                 "--e2e-epochs", "7", "--e2e-batch-size", "3")
    found.prepare(common.learned(found.args, GRIFFIN, common.stages(found.args)))
    assert asked == ["adam", (0.5, 7, 3, "kl")]


def test_adapters_of_other_classes_are_rows(tmp_path, stub):
    file = tmp_path / "lora.safetensors"
    model = sample.load(None)[0]
    caprese.save_adapter(tiny.fill(caprese.attach(model, LoRAFF, rank=4)), file)
    found = make(tmp_path / "runs", "--adapter", str(file))
    prepared = found.prepare(common.variants(found.args, ())[-1])
    assert all(type(ff) is LoRAFF for ff in caprese.sparse_layers(prepared).values())


# ---- answers that are kept

def test_kept_answers_are_counted_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recount, "FOLDER", tmp_path / "kept")
    runs = tmp_path / "runs"
    runs.mkdir()
    about = {"set": "sums", "run": 0, "problem": 0, "seconds": 1.0, "kind": "maths",
             "ended": True}
    lines = [about | {"variant": "full", "question": "1 + 1", "answer": "2",
                      "response": "It is #### 2", "tokens": 5, "accuracy": 0.0},
             about | {"variant": "full", "problem": 1, "question": "1 + 2", "answer": "3",
                      "response": "It is #### 4", "tokens": 7, "accuracy": 1.0, "ended": False},
             about | {"variant": "GRIFFIN", "question": "1 + 1", "answer": "2",
                      "response": "1 1 1", "tokens": 9, "accuracy": 0.0}]
    write(runs / "full.jsonl", lines[:2] + [lines[0] | {"run": 1}])
    write(runs / "griffin.jsonl", lines[2:])
    passage = about | {"set": "told", "kind": "passage", "variant": "full", "question": "Who?",
                       "answer": "a black cat", "response": "The black cat sat.", "tokens": 5,
                       "f1": 0.0}
    write(runs / "told.jsonl", [passage])
    news = about | {"set": "xsum", "variant": "full", "question": "An article", "answer": "News",
                    "response": "News", "tokens": 1, "rouge1": 0.25}
    write(runs / "news.jsonl", [news])
    recount.collect(runs)
    rows = recount.count(tmp_path / "kept" / "sums.jsonl.gz")
    assert rows == [
        {"variant": "full", "set": "sums", "answers": 2, "score %": 50.0,
         "score ±": 100 * sample.standard_error(0.5, 2), "tokens": 6, "ended %": 50.0},
        {"variant": "griffin", "set": "sums", "answers": 1, "score %": 0.0,
         "score ±": 100 * sample.standard_error(0, 1), "tokens": 9, "ended %": 100.0}]
    told, = recount.count(tmp_path / "kept" / "told.jsonl.gz")
    assert told["score %"] == 100  # the answer stands in it, though it is not equal
    text = gzip.decompress((tmp_path / "kept" / "xsum.jsonl.gz").read_bytes()).decode()
    assert "article" not in text and "row 1" in text
    monkeypatch.setattr(sys, "argv", ["recount"])
    recount.main()
    assert "25.000" in capsys.readouterr().out
    write(runs / "other_density.jsonl", lines[2:])
    with pytest.raises(ValueError, match="a second file of"):
        recount.collect(runs)


def test_the_answers_of_this_repository_are_read():
    """They were kept before answers knew their kind and whether they had ended."""
    rows = recount.count(ROOT / "paper" / "answers" / "svamp.jsonl.gz")
    assert len(rows) == 12 and all(row["answers"] == 300 for row in rows)
    score = {row["variant"]: row["score %"] for row in rows}
    assert score["griffin"] < 4 and score["full"] == pytest.approx(9.3, abs=1)  # RESULTS: 9%
    rows = recount.count(ROOT / "paper" / "answers" / "xsum.jsonl.gz")
    assert len(rows) == 13 and all(5 < row["score %"] < 30 for row in rows)  # ROUGE-1


# ---- the scripts

def test_the_scripts_are_named_as_the_paper_names_them():
    found = {file.stem for file in (ROOT / "paper").glob("*.py")}
    shown = {name for name in found if name.startswith(("table", "figure", "loss", "in_"))}
    assert shown == {script.__name__.rpartition(".")[2] for script in paper_main.SCRIPTS}
    assert len(shown) == len(paper_main.SCRIPTS) == 13
    for script in paper_main.SCRIPTS:
        name = script.__name__.rpartition(".")[2]
        title = script.__doc__.split(":")[0]  # Figures 4 and 7
        kind, number = re.match(r"(table|figure|loss|in_)(\d*)", name).groups()
        ours = kind in ("loss", "in_")
        assert title == "Ours" if ours else title.lower().startswith(kind)
        assert number in re.findall(r"\d+", title) or ours
        assert f'"paper.{name}", __doc__, argv' in (ROOT / "paper" / f"{name}.py").read_text()


COLUMNS = {  # columns that a script must have
    "table1_accuracy": {"active parameters (M)", "maths accuracy %", "reading accuracy ±"},
    "table3_reselection": {"rho", "accuracy %", "ms per token", "ms per token ±",
                           "seconds to a right answer", "seconds to a right answer ±"},
    "table5_latency": {"ms per token", "ms per token ±", "bound ms", "ratio to uncorrected"},
    "table6_lora": {"added parameters %", "maths accuracy %"},
    "table7_int4": {"added parameters %", "maths accuracy %"},
    "figure2_residual": {"density", "alone", "best rank 4", "L R rank 4"},
    "figure3_coverage": {"K", "compute", "coverage %", "coverage ±"},
    "figure4_length": {"tokens", "against full", "ended %"},
    "figure5_density": {"density", "rank", "accuracy %"},
    "figure8_spectrum": {"layer", "ranks for 90%", "unexplained"},
    "in_transformers": {"transformers accuracy %", "equal answers %", "ms per token ±"},
    "lossless": {"n", "equal %", "acceptance", "bytes_to_full", "ms per token"},
}
FEWER = {  # constants of a script, and what stands in for them here
    "figure2_residual": {"DENSITIES": (0.3,),
                         "METHODS": {"oracle top-k": OracleFF, "GRIFFIN": "griffin"}},
    "figure5_density": {"DENSITIES": (0.3, 0.6)},
    "table3_reselection": {"BUNDLED_RHO": (4,)},
    "lossless": {"PASSES": (3,)},
    "table5_latency": {"QUICK": {"shape": "tiny", "prompt": 8, "generate": (3,), "repeats": 2}},
}


@pytest.mark.parametrize("name", [
    name if name in ("table1_accuracy", "table3_reselection", "figure2_residual")
    else pytest.param(name, marks=pytest.mark.slow) for name in COLUMNS])
def test_every_script_runs_on_the_bundled_model(out, tmp_path, name, monkeypatch, capsys):
    script = importlib.import_module(f"paper.{name}")
    if name == "in_transformers":
        pytest.importorskip("transformers")
        pytest.importorskip("beyond.in_transformers")
    if name == "lossless":
        pytest.importorskip("beyond.lossless")
    for constant, value in FEWER.get(name, {}).items():
        monkeypatch.setattr(script, constant, value)
    monkeypatch.setitem(bench.SHAPES, "tiny", tiny.CONFIG)
    monkeypatch.setattr(bench, "memory_speed", lambda device: 1e10)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.tsv")
    flags = [*TINY, "--out", str(out), "--log"]
    if name in ("figure2_residual", "table5_latency", "table6_lora"):  # whose rows are fixed
        flags = [flag for flag in flags if flag not in ("--method", "griffin")]
    flags += ["--runs", "2"] if name == "figure3_coverage" else []
    flags += ["--method", "int4"] if name == "table7_int4" else []
    plots = bool(importlib.util.find_spec("matplotlib"))
    result = script.main([*flags, *(["--plot", str(tmp_path / "plots")] if plots else [])])
    rows = result["rows"]
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    assert COLUMNS[name] <= rows[0].keys()
    json.dumps(result)
    printed = capsys.readouterr().out
    assert printed.count(f"python -m paper.{name} ") == 1  # the two lines at the start
    if result.get("answers"):
        assert f"{result['reused']} of {result['answers']} answers are from earlier runs" in printed
    if plots:
        picture, = (tmp_path / "plots").iterdir()
        assert picture.name == f"{name}.png" and picture.stat().st_size > 5000
    for line in (tmp_path / "results.tsv").read_text().splitlines():
        assert len(line.split("\t")) == 10
    if name == "figure2_residual":
        for row in rows:
            assert 0 < row["best rank 8"] < row["best rank 2"] < row["alone"] < 1
            assert row["best rank 4"] < row["L R rank 4"]
    if name == "table1_accuracy":
        table = {row["method"]: row for row in rows}
        pairs = {row["method"]: row for row in result["differences"]}
        assert list(pairs) == [
            "GRIFFIN against full", "GRIFFIN + layer-wise against full",
            "GRIFFIN + E2E against full", "GRIFFIN + E2E against GRIFFIN + layer-wise"]
        for names, row in pairs.items():
            one, other = (table[name]["maths accuracy %"] for name in names.split(" against "))
            assert row["maths accuracy, difference, points"] == pytest.approx(one - other)
            assert row["maths accuracy, difference, points ±"] > 0
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


def test_the_log_says_what_made_each_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.tsv")
    monkeypatch.setattr(report, "commit", lambda: "abc1234")
    args = settings("--log", "--data", "a b.jsonl", "--model", "some/model")
    wide = [{"method": "GRIFFIN + E2E", "rho": None, "x accuracy %": 87.5, "x accuracy ±": 1.25,
             "x tokens": 30, "y f1 %": 50.0, "y f1 ±": 2.0}]
    report.log(args, wide, {"x": [], "y": []})
    report.log(args, [{"method": "CATS", "set": "z", "rho": 8, "seconds": 2.0, "ratio": None}], ())
    header, *lines = [line.split("\t") for line in
                      (tmp_path / "results.tsv").read_text().splitlines()]
    assert header == ["commit", "date", "machine", "command", "model", "method", "set", "metric",
                      "value", "error"]
    assert all(line[0] == "abc1234" and line[4] == "some/model" for line in lines)
    assert all(line[3].startswith("python -m paper.test --device cpu") for line in lines)
    assert "'a b.jsonl'" in lines[0][3]
    assert [line[5:] for line in lines] == [
        ["GRIFFIN + E2E", "x", "accuracy %", "87.5", "1.25"],
        ["GRIFFIN + E2E", "x", "tokens", "30", ""],
        ["GRIFFIN + E2E", "y", "f1 %", "50", "2"],
        ["CATS, rho 8", "z", "seconds", "2", ""]]


def test_every_method_and_adapter_has_a_colour_of_its_own():
    methods = ["full", "GRIFFIN", "GRIFFIN + layer-wise", "GRIFFIN + E2E", "one", "two", "three"]
    found = report.colors([{"method": method} for method in methods])
    assert list(found) == methods and len(set(found.values())) == len(methods)


def test_lora_and_low_rank_have_equally_many_parameters(tmp_path):
    found = make(tmp_path, "--rank", "32")
    added = []
    for method in (caprese.GRIFFIN, LoRAFF):
        model = found.prepare(replace(GRIFFIN, method=method, rank=32))
        added.append(caprese.added_parameters(model))
    assert added[1] == pytest.approx(added[0], rel=0.07)  # LoRA's rank, here 5, is a whole number


# ---- refusals

@pytest.mark.parametrize("name, flags, words", [
    ("table1_accuracy", ["--adapter", "nothing.safetensors"], "nothing.safetensors"),
    ("table1_accuracy", ["--model", "m", "--data", "nothing.jsonl"], "nothing.jsonl"),
    ("table1_accuracy", ["--model", "m"], "--data"),
    ("figure2_residual", ["--model", "m"], "--train"),
    ("figure5_density", ["--model", "m", "--data", "x.jsonl"], "--train"),
    ("figure8_spectrum", ["--model", "m"], "--adapter"),
    ("table6_lora", ["--e2e-epochs", "0"], "--e2e-epochs"),
    ("figure2_residual", ["--model", "m", "--train", "nothing.jsonl"], "nothing.jsonl"),
    ("table1_accuracy", ["--train", "x.jsonl"], "--train"),
    ("table6_lora", ["--method", "griffin"], "takes no --method"),
    ("figure2_residual", ["--block", "paper.lora:LoRAFF"], "takes no --block"),
    ("figure5_density", ["--adapter", "nothing.safetensors"], "takes no --adapter"),
    ("figure5_density", ["--method", "griffin", "--method", "cats"], "one --method or --block"),
    ("table1_accuracy", ["--block", "paper.lora:Nothing"], "paper.lora:Nothing"),
    ("table1_accuracy", ["--temperature", "nan"], "temperature"),
    ("table1_accuracy", ["--temperature", "-1"], "temperature"),
    ("table1_accuracy", ["--runs", "3"], "--temperature"),
    ("figure3_coverage", ["--temperature", "0"], "--temperature"),
    ("table1_accuracy", ["--limit", "0"], "--limit"),
    ("table1_accuracy", ["--batch-size", "0"], "--batch-size"),
    ("table1_accuracy", ["--density", "7"], "--density"),
    ("table1_accuracy", ["--density", "nan"], "--density"),
    ("table1_accuracy", ["--data", "a/x.jsonl", "--data", "b/x.jsonl"], "rename"),
    ("table1_accuracy", ["--adapter", "a/x.st", "--adapter", "b/x.st"], "rename"),
    ("table1_accuracy", 2 * ["--block", "paper.lora:LoRAFF"], "rename"),
])
def test_bad_flags_are_refused_before_loading(monkeypatch, tmp_path, name, flags, words):
    def load(*args):
        raise AssertionError("the model must not be loaded")

    monkeypatch.setattr(sample, "load", load)
    with pytest.raises((ValueError, OSError)) as error:
        run(name, *flags, "--out", str(tmp_path / "runs"))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, words", [
    (["--plot", __file__], "test_paper"),
    (["--out", __file__], "test_paper"),
    (["--rank", "1000"], "rank"),
    (["--device", "meta"], "meta"),
])
def test_bad_flags_are_refused_before_the_first_slow_step(monkeypatch, tmp_path, flags, words):
    def prepare(*args):
        raise AssertionError("nothing must be measured")

    monkeypatch.setattr(Experiment, "prepare", prepare)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # matplotlib is optional
    flags = flags if "--out" in flags else [*flags, "--out", str(tmp_path)]
    with pytest.raises((ValueError, OSError), match=words) as error:
        run("table1_accuracy", "--device", "cpu", "--samples", "8", *flags)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_model_is_refused_before_the_first_slow_step(tmp_path):
    file = tmp_path / "other.safetensors"
    caprese.save_adapter(caprese.attach(tiny.model(), rank=2), file)
    with pytest.raises(ValueError, match="another model"):
        make(tmp_path / "runs", "--adapter", str(file))
    assert not (tmp_path / "runs").exists()


def test_problems_without_right_and_wrong_are_refused_before_the_first_slow_step(tmp_path, stub):
    file = write(tmp_path / "x.jsonl", [{"prompt": "c", "reference": "a"}])
    with pytest.raises(ValueError, match="right or wrong"):
        run("figure4_length", *TINY, "--data", file, "--out", str(tmp_path / "runs"))


def test_plot_without_matplotlib_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        run("figure6_parameters", "--plot", str(tmp_path))


def test_the_command_ends_in_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table1_accuracy", "--temperature", "nan"])
    with pytest.raises(SystemExit) as exit:
        sample.run_command(importlib.import_module("paper.table1_accuracy").main)
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_all_of_them_go_without_those_that_need_samples(tmp_path, monkeypatch, capsys, stub):
    """A real model without samples and adapters: what needs L and R is left out, in one line."""
    ran = []
    monkeypatch.setattr(report, "show", lambda args, *rest, **more: ran.append(args.script))
    for script in paper_main.SCRIPTS:
        if script.__name__ in ("paper.table5_latency", "paper.in_transformers", "paper.lossless"):
            monkeypatch.setattr(script, "main", lambda argv, name=script.__name__: ran.append(name))
    file = write(tmp_path / "sums.jsonl", [{"question": "1 + 1", "answer": "2"}])
    paper_main.main(["--model", str(sample.BUNDLED), "--device", "cpu", "--data", file,
                     "--max-new-tokens", "2", "--out", str(tmp_path / "runs")])
    left_out = re.findall(r"(\S+) is left out: .*--train FILE", capsys.readouterr().err)
    assert left_out == ["paper.table6_lora", "paper.figure2_residual", "paper.figure5_density",
                        "paper.figure8_spectrum"]
    assert sorted(ran + left_out) == sorted(script.__name__ for script in paper_main.SCRIPTS)
