"""Decoding, sampling, the command line. Run: python -m pytest tests/test_sample.py"""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import caprese
import data
import sample

ROOT = Path(__file__).resolve().parents[1]
QUESTION = ("Please reason step by step. Tom has 12 apples. Tom buys 5 more. "
            "How many apples does Tom have?")


def test_greedy_is_the_argmax_of_the_models_logits(device):
    model, prompt = tiny.model(device=device), tiny.tokens(2, 7, device=device)
    new = sample.generate(model, prompt, 10)
    logits = model(torch.cat([prompt, new], dim=1))[:, 6:-1]
    assert torch.equal(logits.argmax(-1), new)


def test_a_row_repeats_its_stop_until_the_last_is_done(device):
    model, prompts = tiny.model(device=device), tiny.tokens(3, 6, device=device)
    free = sample.generate(model, prompts, 20)
    stop = int(free[0, 3])
    new = sample.generate(model, prompts, 20, stop_ids=(stop,))
    for row in range(3):
        ids = data.until_stop(free[row].tolist(), (stop,))
        assert new[row].tolist() == ids + [stop] * (new.shape[1] - len(ids))
    alone = sample.generate(model, prompts[:1], 20, stop_ids=(stop,))
    assert alone.shape[1] == free[0].tolist().index(stop) + 1


def test_generation_ends_at_the_context(device):
    model = tiny.model(device=device)  # context 128
    assert sample.generate(model, tiny.tokens(1, 120, device=device), 50).shape == (1, 8)
    with pytest.raises(ValueError, match="context"):
        sample.generate(model, tiny.tokens(1, 128, device=device), 1)


def test_a_consumer_that_breaks_off_leaves_the_full_model(device):
    model, tokens = tiny.model(device=device), tiny.tokens(1, 7, device=device)
    full = model(tokens)
    tiny.fill(caprese.attach(model, "griffin", 0.4, rank=6))
    steps = sample.stream(model, tokens, 10, reselect=4)
    for _ in range(2):
        next(steps)
        torch.testing.assert_close(model(tokens), full)  # between two steps as well
    steps.close()
    torch.testing.assert_close(model(tokens), full)


def test_samples_are_drawn_by_the_seed(device):
    model, prompt = tiny.model(device=device), tiny.tokens(1, 7, device=device)
    caprese.attach(model, "griffin", 0.4)
    drawn = []
    for _ in range(2):
        generator = torch.Generator(device).manual_seed(0)
        drawn.append(sample.generate(model, prompt, 10, samples=4, temperature=1.0,
                                     generator=generator))
    assert len({tuple(row) for row in drawn[0].tolist()}) == 4
    assert torch.equal(*drawn)


@pytest.mark.parametrize("reselect", [None, 3])
@pytest.mark.parametrize("method", caprese.METHODS)
def test_samples_of_several_prompts_keep_their_own_selection(method, reselect, device):
    model = caprese.attach(tiny.model(device=device).double(), method, 0.4)
    prompts, settings = tiny.tokens(2, 7, device=device), {"prompt_lengths": [7, 5]}
    once = sample.generate(model, prompts, 8, reselect=reselect, **settings)
    twice = sample.generate(model, prompts, 8, reselect=reselect, samples=2, **settings)
    assert torch.equal(twice, once.repeat_interleave(2, dim=0))


def test_choose_follows_the_distribution_and_top_p(device):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], device=device)

    def draw(**settings):
        generator = torch.Generator(device).manual_seed(0)
        drawn = sample.choose(p.log().expand(20000, -1), generator=generator, **settings)
        return torch.bincount(drawn, minlength=4).cpu() / 20000
    # Three standard deviations of a frequency among 20,000 draws are at most 0.011.
    assert torch.allclose(draw(temperature=1.0), p.cpu(), atol=0.011)
    cut = torch.tensor([0.625, 0.375, 0, 0])
    assert torch.allclose(draw(temperature=1.0, top_p=0.8), cut, atol=0.011)
    assert draw(temperature=1.0, top_p=1e-9)[0] == 1 and draw(temperature=1e-3)[0] == 1
    sharp = p.cpu() ** 2
    assert torch.allclose(draw(temperature=0.5), sharp / sharp.sum(), atol=0.011)


@pytest.mark.parametrize("bad", [
    {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"reselect": 0},
    {"samples": 0}, {"max_new_tokens": 0}])
def test_generate_refuses(bad):
    with pytest.raises(ValueError):
        sample.generate(tiny.model(), tiny.tokens(1, 5), **{"max_new_tokens": 4} | bad)


# ---- the command line, in this process

@pytest.fixture
def run(monkeypatch, capsys):
    """Call python sample.py with these arguments: (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, args)])
        code = 0
        try:
            sample.run_command(sample.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return call


def test_command_answers_three_ways():
    done = subprocess.run([sys.executable, "sample.py", "--json", "--device", "cpu"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["method"] for row in rows] == ["full", "sparse", "sparse + Caprese"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    for row in rows:
        shown = f"{row['response']}\n"  # what streamed is what is reported
        assert shown in done.stderr and isinstance(row["correct"], bool)
        assert row["leaves_full_at"] is not None or row["response"] == rows[0]["response"]
    marks = [line for line in done.stderr.splitlines() if line.strip() == "^"]
    assert len(marks) == sum(row["leaves_full_at"] is not None for row in rows)


def test_command_answers_a_prompt(run):
    code, out, _ = run(QUESTION, "--json")
    row = json.loads(out)["rows"][0]
    assert code == 0 and data.correct(row["response"], "17") and row["leaves_full_at"] is None
    _, out, _ = run(QUESTION, "--json", "--method", "cats", "--density", "0.9", "--reselect", "8",
                    "-n", "3", "--seed", "3")
    assert len(json.loads(out)["rows"][0]["samples"]) == 3


def test_verified_answers_are_the_full_models(run):
    code, out, err = run("--json", "--verify", "--reselect", "6")
    full, *drafted = json.loads(out)["rows"]
    assert code == 0 and "acceptance" not in full
    for row in drafted:
        assert row["response"] == full["response"] and row["leaves_full_at"] is None
        assert 0 < row["acceptance"] <= 1 <= row["tokens_per_pass"] <= 6
        # A pass reads the full model once, and at most 5 draft steps before it less each.
        assert 1 < row["bytes_to_full"] * row["tokens_per_pass"] < 1 + 5
    assert err.count("of the full model's bytes]") == 2
    for flags in (["--verify"], ["--verify", "--reselect", "6", "-n", "2"]):
        assert run(*flags)[0] == 2


@pytest.mark.parametrize("n, temperature, top_p", [(1, 0.0, 1.0), (4, 0.6, 0.95)])
def test_several_samples_are_drawn_as_in_the_paper(n, temperature, top_p, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "x", "-n", str(n)])
    args = sample.arguments()
    assert (args.temperature, args.top_p) == (temperature, top_p)


def test_four_bits_are_no_fraction_of_the_neurons(run):
    code, out, _ = run(QUESTION, "--method", "int4", "--max-new-tokens", "2")
    assert code == 0 and "weights of 4 bits" in out and "neurons" not in out


def test_a_method_without_a_bundled_adapter_answers_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "BUNDLED", tmp_path)
    code, out, err = run("--method", "cats")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "cats.safetensors does not exist" in err


def test_a_method_with_a_bundled_adapter_answers_by_it(run, monkeypatch, tmp_path):
    for file in sample.BUNDLED.iterdir():
        (tmp_path / file.name).symlink_to(file)
    model = sample.Transformer.from_pretrained(sample.BUNDLED)
    adapter = tmp_path / "cats.safetensors"
    adapter.unlink(missing_ok=True)
    caprese.save_adapter(tiny.fill(caprese.attach(model, "cats", 0.3, rank=4)), adapter)
    monkeypatch.setattr(sample, "BUNDLED", tmp_path)
    code, out, err = run("--method", "cats", "--max-new-tokens", "3")
    assert code == 0, err
    assert "sparse: cats, 30% of the neurons" in out and "sparse + Caprese: cats, 30%" in out


@pytest.mark.parametrize("method, density, layers, says", [
    ("cats", 0.5, None, "cats, 50% of the neurons in 8 of 8 layers"),
    ("griffin", 0.4, [0, 2], "griffin, 40% of the neurons in 2 of 8 layers")])
def test_an_adapter_of_ones_own_answers_three_ways(method, density, layers, says, run, tmp_path):
    model = sample.Transformer.from_pretrained(sample.BUNDLED)
    file = tmp_path / "own.safetensors"
    caprese.save_adapter(tiny.fill(caprese.attach(model, method, density, layers, 4)), file)
    code, out, err = run("--adapter", file, "--max-new-tokens", "3")
    assert code == 0, err
    lines = [line.partition(": ")[2] for line in out.splitlines() if ": " in line]
    assert "full model" in lines and says in lines
    assert any(line.startswith(f"{says}, x L R of ") for line in lines)


@pytest.mark.parametrize("args, words", [
    (["x", "--method", "magic"], "magic"),
    (["x", "--density", "1.5"], "(0, 1]"),
    (["x", "--adapter", "none.safetensors"], "none.safetensors"),
    (["x", "--method", "cats", "--adapter", "models/tiny-math/griffin.safetensors"], "for griffin"),
    (["x", "--adapter", "models/tiny-math/model.safetensors"], "not a Caprese adapter"),
    (["long " * 600], "context"),
    (["half \ud800 a pair"], "surrogate"),
    (["x", "--device", "abacus"], "abacus"),
    (["x", "--device", "meta"], "meta"),
    (["x", "--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
    (["--model", "models/tiny-math"], "prompt"),
    (["x", "--temperature", "-1"], "temperature"),
    (["x", "--temperature", "nan"], "temperature"),
    (["--questions", "file.jsonl"], "--out"),
])
def test_bad_input_is_one_line_and_exit_code_2(args, words, run):
    code, _, err = run(*args)
    assert code == 2 and words in err.splitlines()[-1]


# ---- where an answer leaves the full model's

@pytest.fixture(scope="module")
def bundled():
    """(model, tokenizer) of the bundled model."""
    return sample.Transformer.from_pretrained(sample.BUNDLED), data.Tokenizer(sample.BUNDLED)


@pytest.fixture
def compare(bundled, monkeypatch):
    """A function: (what is printed, the row, the tokens) of an answer, beside full_ids."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["sample.py", "x", "--device", "cpu"])

    def call(full_ids=(), terminal=False):
        out = io.StringIO()
        out.isatty = lambda: terminal
        row, ids = sample.answer(*bundled, QUESTION, sample.arguments(), out, full_ids)
        return out.getvalue(), row, ids
    return call


def other_at(ids, number):
    """The same tokens but for one."""
    return [*ids[:number], ids[number] + 1, *ids[number + 1:]]


@pytest.mark.parametrize("number", [0, 4, -1])
def test_a_caret_points_at_the_first_other_token(number, bundled, compare):
    plain, row, ids = compare()
    number %= len(ids)  # the last one is the stop token, which has no text: behind the answer
    printed, row, _ = compare(other_at(ids, number))
    assert row["leaves_full_at"] == number
    before = bundled[1].decode(ids[:number])
    text = plain.splitlines()[0]
    space = text[len(before):len(before) + 1] == " "  # the caret points at the word, not before it
    assert printed == plain + " " * (len(before) + space) + "^\n"


@pytest.mark.parametrize("no_color", [None, ""])
def test_on_a_terminal_the_rest_is_red(no_color, bundled, compare, monkeypatch):
    plain, _, ids = compare()
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    printed, row, _ = compare(other_at(ids, 4), terminal=True)
    assert row["leaves_full_at"] == 4
    first, *red = printed.split("\033[31m")
    assert first == bundled[1].decode(ids[:4]) and len(red) > 1
    assert all(part.count("\033[0m") == 1 for part in red)
    assert printed.replace("\033[31m", "").replace("\033[0m", "") == plain
    assert printed.endswith("\033[0m\n")


def test_no_color_gives_a_caret_on_a_terminal(compare, monkeypatch):
    _, _, ids = compare()
    monkeypatch.setenv("NO_COLOR", "1")
    printed = [compare(other_at(ids, 4), terminal)[0] for terminal in (False, True)]
    assert printed[0] == printed[1] and "^" in printed[1] and "\033" not in printed[1]


@pytest.mark.parametrize("terminal", [False, True])
def test_an_equal_answer_has_no_mark(terminal, compare):
    plain, _, ids = compare()
    printed, row, _ = compare(ids, terminal)
    assert printed == plain and row["leaves_full_at"] is None


def test_several_samples_have_no_mark(run):
    code, out, err = run("--json", "-n", "2", "--max-new-tokens", "4")
    assert code == 0 and "^" not in err and "\033" not in err
    rows = json.loads(out)["rows"]
    assert len(rows) == 3 and all(row["leaves_full_at"] is None for row in rows)


# ---- a training set of one's own

@pytest.fixture
def questions(tmp_path):
    """Six questions of the bundled model's kind, and the first again with a wrong answer."""
    file = tmp_path / "questions.jsonl"
    problems = data.problems("maths", 6, 3)
    rows = [{"question": p.question, "answer": p.answer} for p in problems]
    rows.append({"question": rows[0]["question"], "answer": "123456"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_training_set_holds_right_answers_and_resumes_to_the_same_bytes(questions, run, tmp_path):
    whole, other = tmp_path / "whole.jsonl", tmp_path / "other.jsonl"
    settings = ["--questions", questions, "-n", 4, "--batch-size", 8, "--only-right"]
    code, _, err = run(*settings, "--out", whole)
    assert code == 0, err
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert 0 < len(rows) <= 24 and all(row["right"] for row in rows)
    assert all(data.correct(row["response"], row["answer"]) for row in rows)
    assert len(data.read_problems(whole)) == len(rows)
    before = whole.read_bytes()
    for length in (0, len(before) // 3, len(before) - 150, len(before)):  # as a kill leaves it
        whole.write_bytes(before[:length])
        assert run(*settings, "--out", whole)[0] == 0
        assert whole.read_bytes() == before
    for foreign in ('{"question": "mine", "answer": "keep"}\n', "keep", "\n"):
        other.write_text(foreign)
        assert run(*settings, "--out", other)[0] == 2 and other.read_text() == foreign


def test_cut_answers_are_left_out(questions, run, tmp_path):
    file = tmp_path / "cut.jsonl"
    code, _, err = run("--questions", questions, "--out", file, "--max-new-tokens", 2)
    assert code == 0, err
    assert file.read_text() == ""


def test_a_gpu_that_this_torch_cannot_use_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sample.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    sample.check_device("cpu")
    assert "pip install --force-reinstall torch" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    sample.check_device("cpu")
    assert capsys.readouterr().err == ""
