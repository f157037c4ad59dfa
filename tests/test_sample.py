"""Decoding, sampling, the command line. Run: python -m pytest tests/test_sample.py"""

import io
import json
import os
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
ADAPTER = sample.BUNDLED / "griffin.safetensors"
PROBLEM = "Tom has 12 apples. Tom buys 5 more. How many apples does Tom have?"
QUESTION = f"{data.INSTRUCTION} {PROBLEM}"


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


def test_the_cache_is_not_larger_than_the_context(device, monkeypatch):
    model, capacities = tiny.model(device=device), []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda rows, capacity: (
        capacities.append(capacity), new_cache(rows, capacity))[1])
    tokens, lengths = tiny.tokens(2, 9, device=device), [9, 5]
    assert sample.generate(model, tokens, 10 ** 20, prompt_lengths=lengths).shape == (2, 123)
    assert capacities == [9 + 123]  # the context of 128, and what the longer row is fed in vain


def test_generation_ends_at_the_context(device):
    model = tiny.model(device=device)  # context 128
    assert sample.generate(model, tiny.tokens(1, 120, device=device), 50).shape == (1, 8)
    with pytest.raises(ValueError, match="context"):
        sample.generate(model, tiny.tokens(1, 128, device=device), 1)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("method", ["full", "griffin", "cats"])
def test_a_rows_limit_does_not_depend_on_its_neighbours(method, stop, device):
    """Each row ends where its own context is full, and gives -1 from then on."""
    model = tiny.model(device=device, max_position_embeddings=24).double()
    if method != "full":
        tiny.fill(caprese.attach(model, method, 0.4, rank=4))
    tokens, lengths = tiny.tokens(3, 20, device=device), [4, 20, 11]
    alone = [sample.generate(model, tokens[row:row + 1, :length], 17)[0]
             for row, length in enumerate(lengths)]
    assert [len(ids) for ids in alone] == [17, 4, 13]
    stop_ids = (int(alone[0][9]),) if stop else ()
    together = sample.generate(model, tokens, 17, prompt_lengths=lengths, stop_ids=stop_ids)
    for ids, expected in zip(together.tolist(), alone):
        expected = data.until_stop(expected.tolist(), stop_ids)
        filler = expected[-1] if expected[-1] in stop_ids else -1
        assert ids == expected + [filler] * (together.shape[1] - len(expected))
    assert stop or together.shape[1] == 17


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_end_decoding(bad, temperature, device):
    model = tiny.model(device=device)
    model.model.norm.weight[3] = bad
    with pytest.raises(ValueError, match="not finite in torch.float32.*--dtype"):
        sample.generate(model, tiny.tokens(2, 7, device=device), 4, temperature=temperature)


def test_a_row_that_is_not_finite_is_seen_beside_good_ones():
    logits = torch.zeros(3, 5)
    for bad in (torch.nan, torch.inf):
        broken = logits.clone()
        broken[1, 2] = bad
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match="not finite"):
                sample.choose(broken, temperature)
    logits[:, 1] = -torch.inf  # a token that is ruled out is no fault
    assert sample.choose(logits).tolist() == [0, 0, 0]


def test_a_question_that_fills_the_context_gets_no_answer_and_the_rest_do(capsys):
    model = sample.Transformer.from_pretrained(sample.BUNDLED, dtype=torch.float32)
    tokenizer = data.Tokenizer(sample.BUNDLED)
    alone = list(sample.respond(model, tokenizer, [QUESTION], 64))
    found = sorted(sample.respond(model, tokenizer, ["long " * 600, QUESTION], 64))
    assert found == [(0, "", 0), (1, *alone[0][1:])]
    assert "question 1 has" in capsys.readouterr().err
    with pytest.raises(ValueError, match="list of questions"):
        list(sample.respond(model, tokenizer, QUESTION, 64))


def test_evaluate_takes_a_grader_and_gives_an_error_above_zero():
    model = sample.Transformer.from_pretrained(sample.BUNDLED, dtype=torch.float32)
    tokenizer = data.Tokenizer(sample.BUNDLED)
    problems = data.problems("maths", 4, 5)
    with pytest.raises(ValueError, match="no problems"):
        sample.evaluate(model, tokenizer, [])
    for right in (True, False):
        accuracy, error = sample.evaluate(model, tokenizer, problems, max_new_tokens=8,
                                          grade=lambda response, answer: right)
        assert accuracy == right and error == pytest.approx(0.1)  # 1 / (2 * 4) / (1 + 1 / 4)
    # Wilson's interval at one standard error, by its definition: |p - q| = sqrt(p (1 - p) / n).
    for count, fraction in ((10, 0.3), (50, 0.98), (7, 0.0)):
        error = sample.standard_error(fraction, count)
        center = (fraction + 1 / (2 * count)) / (1 + 1 / count)
        for end in (center - error, center + error):
            assert abs(end - fraction) == pytest.approx((end * (1 - end) / count) ** 0.5, abs=1e-9)


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
    {"temperature": -1}, {"temperature": float("nan")}, {"temperature": 1e-40}, {"top_p": 1.1},
    {"prompt_lengths": [0]}, {"prompt_lengths": [6]}, {"prompt_lengths": [5, 5]},
    {"top_p": 0.0}, {"reselect": 0},
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
    marks = [line for line in done.stderr.splitlines() if line.strip() == "^"]
    assert len(marks) == sum(row["response"] != rows[0]["response"] for row in rows) > 0


def test_command_answers_a_prompt(run):
    """The bundled model is asked as it was taught, with the instruction, and says so."""
    code, out, err = run(PROBLEM, "--json")
    result = json.loads(out)
    assert code == 0 and result["prompt"] == QUESTION and "--plain" in err
    assert data.correct(result["rows"][0]["response"], "17")
    _, out, err = run(QUESTION, "--plain", "--json")
    assert json.loads(out) | {"rows": None} == {"prompt": QUESTION, "rows": None}
    assert "--plain" not in err
    _, out, _ = run(PROBLEM, "--json", "--method", "cats", "--density", "0.9", "--reselect", "8",
                    "-n", "3", "--seed", "3")
    assert len(json.loads(out)["rows"][0]["samples"]) == 3


def test_compare_answers_any_prompt_three_ways(run):
    code, out, err = run(PROBLEM, "--json", "--compare", "--adapter", ADAPTER)
    rows = json.loads(out)["rows"]
    assert code == 0 and [row["method"] for row in rows] == ["full", "sparse", "sparse + Caprese"]
    code, out, _ = run(PROBLEM, "--json", "--compare", "--model", sample.BUNDLED)
    result = json.loads(out)
    assert code == 0 and result["prompt"] == PROBLEM
    assert [row["method"] for row in result["rows"]] == ["full", "sparse"]


class Fork(caprese.GRIFFIN):
    """Keeps the neurons that GRIFFIN drops."""
    def statistic(self, x, gate, z, counted=None):
        return -super().statistic(x, gate, z, counted)

    def merge(self, s, s_G):
        return -torch.hypot(s, s_G)


def test_a_block_of_ones_own_answers(run, tmp_path):
    code, out, err = run(PROBLEM, "--json", "--block", "test_sample:Fork", "--max-new-tokens", 9)
    assert code == 0 and "test_sample:Fork, 50% of the neurons in 4 of 8 layers" in err
    _, other, _ = run(PROBLEM, "--json", "--method", "griffin", "--max-new-tokens", 9)
    assert json.loads(out)["rows"][0]["response"] != json.loads(other)["rows"][0]["response"]
    model = sample.Transformer.from_pretrained(sample.BUNDLED)
    file = tmp_path / "fork.safetensors"
    caprese.save_adapter(caprese.attach(model, Fork, rank=4), file)
    for prompt in ([PROBLEM], []):  # without one: all three ways, the full model first
        code, out, err = run(*prompt, "--adapter", file)
        assert code == 2 and "give --block test_sample:Fork" in err and "full model" not in out
    assert run(PROBLEM, "--adapter", file, "--block", "test_sample:Fork",
               "--max-new-tokens", 2)[0] == 0


@pytest.mark.parametrize("n, temperature, top_p", [(1, 0.0, 1.0), (4, 0.6, 0.95)])
def test_several_samples_are_drawn_as_in_the_paper(n, temperature, top_p, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "x", "-n", str(n)])
    args = sample.arguments()
    assert (args.temperature, args.top_p) == (temperature, top_p)


def test_a_method_without_a_bundled_adapter_answers_two_ways(run, monkeypatch, tmp_path):
    for file in sample.BUNDLED.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "cats.safetensors").unlink()
    monkeypatch.setattr(sample, "BUNDLED", tmp_path)
    code, out, err = run("--method", "cats", "--json", "--max-new-tokens", "3")
    assert code == 0, err
    assert [row["method"] for row in json.loads(out)["rows"]] == ["full", "sparse"]


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
    (["x", "--method", "cats", "--adapter", "models/tiny-math/griffin.safetensors"],
     "for the method griffin"),
    (["x", "--adapter", "models/tiny-math/model.safetensors"], "not a Caprese adapter"),
    (["long " * 600], "context"),
    (["half \ud800 a pair"], "surrogate"),
    (["x", "--device", "abacus"], "abacus"),
    (["x", "--device", "meta"], "meta"),
    (["x", "--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
    (["--model", "models/tiny-math"], "prompt"),
    (["x", "--temperature", "-1"], "temperature"),
    (["x", "--temperature", "nan"], "temperature"),
    (["x", "--block", "nothing:Here"], "nothing:Here"),
    (["x", "--block", "caprese"], "not module:Class"),
    (["x", "--block", "mine.py:Mine"], "the file mine.py is mine:Mine"),
    (["x", "--method", "cats", "--block", "caprese:GRIFFIN"], "not allowed with"),
    (["x", "--block", "caprese:Call"], "must be a subclass"),
    (["x", "--reselect", "4"], "--reselect"),
    (["x", "--reselect", "0"], "at least 1"),
    (["x", "--seed", "9" * 23], "64 bits"),
    (["x", "--seed", "one"], "--seed"),
    (["x", "-n", "9" * 13], "out of memory"),
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
    """A function: (what is printed, the tokens) of an answer, beside the tokens of another."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "x", "--device", "cpu"])

    def call(reference=()):
        out = io.StringIO()
        _, ids = sample.answer(*bundled, QUESTION, sample.arguments(), out, reference)
        return out.getvalue(), ids
    return call


def other_at(ids, number):
    """The same tokens but for one."""
    return [*ids[:number], ids[number] + 1, *ids[number + 1:]]


@pytest.mark.parametrize("number", [0, 4, -1])
def test_a_caret_points_at_the_first_other_token(number, bundled, compare):
    plain, ids = compare()
    number %= len(ids)  # the last one is the stop token, which has no text: behind the answer
    printed, _ = compare(other_at(ids, number))
    before = bundled[1].decode(ids[:number])
    text = plain.splitlines()[0]
    space = text[len(before):len(before) + 1] == " "  # the caret points at the word, not before it
    assert printed == plain + " " * (len(before) + space) + "^\n"


def test_an_equal_answer_has_no_mark(compare):
    plain, ids = compare()
    assert compare(ids)[0] == plain


def test_several_samples_have_no_mark(run):
    code, out, err = run("--json", "-n", "2", "--max-new-tokens", "4")
    assert code == 0 and "^" not in err and len(json.loads(out)["rows"]) == 3


@pytest.mark.parametrize("redirect, code", [
    (">&-", 0), pytest.param("2>&-", 0, marks=pytest.mark.slow),
    pytest.param("| head -c 1", 0, marks=pytest.mark.slow)])
def test_a_closed_output_is_no_crash(redirect, code):
    command = f"{sys.executable} sample.py hi --max-new-tokens 4 --device cpu {redirect}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


@pytest.mark.parametrize("text", ["a\u20ac b", "\U0001f600!", "x\ufffdy"])
def test_a_character_of_several_tokens_is_printed_whole(text):
    """Bytes come one by one; what is not yet a character waits, and the end is printed as it is."""
    class Bytes:
        stop_ids = ()

        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    for ids in (list(text.encode()), list(text.encode())[:-1]):
        out = io.StringIO()
        steps = (torch.tensor([token]) for token in ids)
        assert len(list(sample.print_steps(steps, Bytes(), out, ()))) == len(ids)
        assert out.getvalue() == bytes(ids).decode(errors="replace") + "\n"


def test_an_output_that_cannot_show_a_character_goes_on():
    code = "import sample; sample.run_command(lambda: print('\u20ac 5'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout == b"? 5" + os.linesep.encode()


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter(range(0, 100000, 3))  # seconds between two looks at the clock
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    for _ in sample.progress(range(100), "steps", 100):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= 22 and all(line.startswith("steps:") for line in lines)
    assert "\r" not in "".join(lines)


def test_a_gpu_that_this_torch_cannot_use_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sample.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    sample.check_device("cpu")
    assert "pip install --force-reinstall torch" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    sample.check_device("cpu")
    assert capsys.readouterr().err == ""
