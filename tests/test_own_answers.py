"""A training set of the model's own answers. Run: python -m pytest tests/test_own_answers.py"""

import json
import resource
import sys
from pathlib import Path

import pytest
import torch

import caprese
import data
import sample
from beyond import own_answers

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["-n", 4, "--batch-size", 8, "--only-right"]
INSTRUCTED = f"{data.INSTRUCTION} "


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def about(file):
    return Path(f"{file}.about.json")


@pytest.fixture
def questions(tmp_path):
    """Six questions of the bundled model's kind, and the first again with a wrong answer."""
    rows = [{"question": p.question, "answer": p.answer} for p in data.problems("maths", 6, 3)]
    rows.append({"question": rows[0]["question"], "answer": "123456"})
    return write_rows(tmp_path / "questions.jsonl", rows)


@pytest.fixture
def run(monkeypatch, capsys, questions):
    """Call python -m beyond.own_answers with these arguments: (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)
    bundled = (sample.Transformer.from_pretrained(sample.BUNDLED, dtype=torch.float32),
               data.Tokenizer(sample.BUNDLED))
    monkeypatch.setattr(sample, "load", lambda args: bundled)

    def call(*args):
        given = [] if "--questions" in args else ["--questions", questions]
        monkeypatch.setattr(sys, "argv", [
            "own_answers", "--device", "cpu", *map(str, [*given, *args])])
        code = 0
        try:
            sample.run_command(own_answers.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    call.model, call.tokenizer = bundled
    return call


# ---- what is written

def test_a_training_set_holds_right_answers(run, tmp_path):
    file = tmp_path / "own.jsonl"
    code, out, err = run(*SETTINGS, "--out", file, "--json")
    assert code == 0, err
    rows = read_rows(file)
    assert 0 < len(rows) <= 24 and all(row["right"] for row in rows)
    assert all(data.correct(row["response"], row["answer"]) for row in rows)
    assert len(data.read_problems(file)) == len(rows)
    assert json.loads(out) == {"file": str(file), "answers": 28, "samples": len(rows)}
    assert f"the answers to 7 of 7 questions, which gave {len(rows)} samples" in err


def test_without_only_right_wrong_answers_are_kept_and_marked(run, tmp_path):
    file = tmp_path / "own.jsonl"
    assert run("--out", file)[0] == 0
    rows = read_rows(file)
    assert [row["right"] for row in rows] == [
        data.correct(row["response"], row["answer"]) for row in rows]
    assert len(rows) == 7 and rows[-1]["right"] is False and rows[0]["right"] is True
    # Greedy answers are those of sample.respond, in the order of the questions.
    asked = [data.ask(problem) for problem in data.read_problems(
        file.with_name("questions.jsonl"), evaluation=True)]
    expected = {i: text for i, text, _ in sample.respond(run.model, run.tokenizer, asked)}
    assert [row["response"] for row in rows] == [expected[i] for i in range(7)]


def test_a_kind_survives(run, tmp_path, monkeypatch):
    """A summary is asked, and learned, without the instruction for maths."""
    maths, summary = (data.Problem(p.question, "", p.answer, kind) for p, kind in zip(
        data.problems("maths", 2, 3), ("maths", "summary")))
    read, asked = data.read_problems, []
    monkeypatch.setattr(data, "read_problems", lambda *args, **kwargs: [maths, summary])
    prompt_ids = run.tokenizer.prompt_ids
    monkeypatch.setattr(run.tokenizer, "prompt_ids",
                        lambda question: asked.append(question) or prompt_ids(question))
    file = tmp_path / "own.jsonl"
    assert run("--out", file)[0] == 0
    assert asked == [INSTRUCTED + maths.question, summary.question]
    rows = read_rows(file)
    assert [row["kind"] for row in rows] == ["maths", "summary"]
    learned = read(file)
    assert [problem.kind for problem in learned] == ["maths", "summary"]
    assert [data.ask(problem) for problem in learned] == asked


@pytest.mark.parametrize("there", [True, False])
def test_who_grades(there, monkeypatch):
    """paper/'s grading, where it is; the core's without it."""
    def grade(response, answer):
        return True
    module = type(sys)("paper.grading")
    module.correct = grade
    monkeypatch.setitem(sys.modules, "paper.grading", module if there else None)
    assert own_answers.grader() is (grade if there else data.correct)


# ---- only answers that end

def test_answers_that_max_new_tokens_cuts_are_left_out_and_none_at_all_is_said(run, tmp_path):
    file = tmp_path / "cut.jsonl"
    for _ in range(2):  # also where it is finished already
        code, out, err = run("--out", file, "--max-new-tokens", 2)
        assert code == 2 and file.read_text() == ""
        assert "none of 7 answers ended" in err.splitlines()[-1]


def test_the_last_token_that_is_allowed_may_be_the_end(run, tmp_path):
    question = data.read_problems(tmp_path / "questions.jsonl", 1, evaluation=True)[0]
    (_, response, length), = sample.respond(run.model, run.tokenizer, [data.ask(question)])
    file = write_rows(tmp_path / "one.jsonl", [vars(question)])
    for limit, count in ((length, 1), (length - 1, 0)):
        out = tmp_path / f"{limit}.jsonl"
        run("--questions", file, "--out", out, "--max-new-tokens", limit)
        assert [row["response"] for row in read_rows(out)] == [response] * count


def test_answers_that_the_context_cuts_are_left_out_and_long_questions_are_named(
        run, tmp_path, monkeypatch):
    problems = data.read_problems(tmp_path / "questions.jsonl", evaluation=True)
    prompts = [len(run.tokenizer.prompt_ids(data.ask(problem))) for problem in problems]
    lengths = {i: n for i, _, n in sample.respond(
        run.model, run.tokenizer, [data.ask(problem) for problem in problems])}
    totals = [prompts[i] + lengths[i] for i in range(len(problems))]
    for limit in sorted({max(prompts), *totals, min(totals) - 1} - {max(totals)}):
        monkeypatch.setattr(run.model.config, "max_position_embeddings", limit)
        file = tmp_path / f"{limit}.jsonl"
        code, _, err = run("--out", file)
        ended = [p.question for p, total in zip(problems, totals) if total <= limit]
        assert [row["question"] for row in read_rows(file)] == ended
        assert code == (0 if ended else 2)
        for i, length in enumerate(prompts):
            named = f"question {i + 1} has {length} tokens, which the context cannot hold"
            assert (named in err) == (length >= limit)
    assert max(prompts) > min(totals)  # so that one limit has met all three cases


def test_an_empty_answer_is_no_sample(run, tmp_path, monkeypatch):
    stop = run.tokenizer.stop_ids[0]
    monkeypatch.setattr(sample, "generate", lambda model, tokens, *args, **settings:
                        tokens.new_full((len(tokens), 1), stop))
    code, _, err = run("--out", tmp_path / "own.jsonl")
    assert code == 2 and "none of 7 answers" in err


def test_a_model_without_a_stop_id_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.tokenizer, "stop_ids", ())
    code, _, err = run("--out", tmp_path / "own.jsonl")
    assert code == 2 and "eos_token_id" in err and not (tmp_path / "own.jsonl").exists()


# ---- an interrupt

@pytest.mark.slow
def test_it_resumes_to_the_same_bytes_whenever_it_is_killed(run, tmp_path, monkeypatch):
    file, states = tmp_path / "own.jsonl", []
    settings = ["-n", 2, "--batch-size", 4, "--max-new-tokens", 40]  # some answers are longer
    save = own_answers.Output.save

    def noted_save(output):
        if file.exists():  # a kill may come before the new `about`, and after it
            states.append((file.read_bytes(), about(file).read_text()))
        save(output)
        states.append((file.read_bytes() if file.exists() else None, about(file).read_text()))

    with monkeypatch.context() as patch:
        patch.setattr(own_answers.Output, "save", noted_save)
        assert run(*settings, "--out", file)[0] == 0
    expected, end = file.read_bytes(), about(file).read_text()
    assert len(states) == 1 + 2 * 4 and json.loads(end)["answers"] == 14
    first, second = json.loads(states[2][1])["bytes"], json.loads(states[4][1])["bytes"]
    assert 0 < first < second < len(expected)
    for cut in (first + 1, (first + second) // 2):  # in the middle of a block
        states.append((expected[:cut], states[2][1]))
    # On a GPU the interrupted block may have been another, longer one.
    states.append((expected + b'{"question": "longer than all', states[2][1]))
    for content, progress in states:
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        about(file).write_text(progress)
        code, _, err = run(*settings, "--out", file)
        assert code == 0, err
        assert file.read_bytes() == expected and about(file).read_text() == end


@pytest.mark.slow
def test_an_interrupt_keeps_the_blocks_before(run, tmp_path, monkeypatch):
    whole, file = tmp_path / "whole.jsonl", tmp_path / "own.jsonl"
    assert run(*SETTINGS, "--out", whole)[0] == 0
    generate, calls = sample.generate, []

    def interrupted(*args, **settings):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **settings)

    monkeypatch.setattr(sample, "generate", interrupted)
    assert run(*SETTINGS, "--out", file)[0] == 130
    assert json.loads(about(file).read_text())["answers"] == 16
    code, out, _ = run(*SETTINGS, "--out", file)
    assert code == 0 and "the answers to 4 of 7 questions, which gave" in out
    assert len(calls) == 3 + 2  # no block is answered twice
    assert file.read_bytes() == whole.read_bytes()


def test_a_finished_run_says_so_and_does_nothing(run, tmp_path, monkeypatch):
    file = tmp_path / "own.jsonl"
    assert run("--out", file)[0] == 0
    before = file.read_bytes(), about(file).read_text(), file.stat().st_mtime_ns
    monkeypatch.setattr(sample, "generate", None)
    code, out, err = run("--out", file)
    assert code == 0 and "the answers to 7 of 7 questions" in out and "it is finished" in out
    assert err == ""
    assert before == (file.read_bytes(), about(file).read_text(), file.stat().st_mtime_ns)


# ---- work that goes on with other inputs

@pytest.fixture
def begun(run, tmp_path):
    """The files of a run that was finished."""
    file = tmp_path / "own.jsonl"
    assert run("--out", file)[0] == 0
    return file


def refused(run, file, *flags):
    """The one line with which this command is refused; the files stay as they were."""
    before = file.read_bytes(), about(file).read_bytes()
    code, out, err = run("--out", file, *flags)
    assert code == 2 and out == "" and (file.read_bytes(), about(file).read_bytes()) == before
    return err.splitlines()[-1]


@pytest.mark.parametrize("flags, words", [
    (["-n", 4], "n was 1 and is 4"),
    (["--temperature", 0.5], "temperature was 0.0 and is 0.5"),
    (["--top-p", 0.5], "top_p was 1.0 and is 0.5"),
    (["--max-new-tokens", 300], "max_new_tokens was 512 and is 300"),
    (["--only-right"], "only_right was False and is True"),
    (["--batch-size", 2], "batch_size was 64 and is 2"),
    (["--seed", 1], "seed was 0 and is 1")])
def test_other_settings_are_refused(flags, words, run, begun):
    assert words in refused(run, begun, *flags)


@pytest.mark.parametrize("change", ["answer", "question", "order", "more", "kind"])
def test_other_questions_under_the_same_name_are_refused(change, run, begun, questions):
    rows = read_rows(questions)
    if change in ("answer", "question"):
        rows[2][change] += "1"
    if change == "order":
        rows.reverse()
    if change == "more":
        rows.append(rows[0])
    if change == "kind":  # the same text, asked without the instruction
        rows[0] = {"prompt": rows[0]["question"], "answer": rows[0]["answer"], "kind": "text"}
    write_rows(questions, rows)
    assert "questions was " in refused(run, begun)


def test_the_same_questions_under_another_name_go_on(run, begun, questions):
    other = questions.with_name("renamed.jsonl")
    other.write_text("\n".join(json.dumps(row, sort_keys=True) for row in read_rows(questions)))
    code, out, err = run("--questions", other, "--out", begun)
    assert code == 0 and "it is finished" in out, err


def test_another_model_grader_dtype_or_template_is_refused(run, begun, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(caprese, "fingerprint", lambda model: "another")
        assert "model was " in refused(run, begun) and "is another" in refused(run, begun)
    with monkeypatch.context() as patch:
        patch.setattr(own_answers, "grader", lambda: json.loads)
        assert "graded by was " in refused(run, begun)
    with monkeypatch.context() as patch:
        patch.setattr(run.tokenizer, "template", "{{ messages[0].content }}")
        assert "questions was " in refused(run, begun)
    run.model.bfloat16()
    assert "dtype was torch.float32 and is torch.bfloat16" in refused(run, begun)


@pytest.mark.parametrize("content", ['{"question": "mine", "answer": "keep"}\n', "keep", "\n"])
def test_a_file_of_others_is_refused(content, run, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text(content)
    code, _, err = run("--out", file)
    assert code == 2 and file.read_text() == content and not about(file).exists()
    assert "give another --out" in err.splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"other\n", None])
def test_a_file_that_was_changed_is_refused(content, run, begun):
    begun.write_bytes(begun.read_bytes()[:-9] if content is None else content)
    assert "has been changed" in refused(run, begun)


@pytest.mark.parametrize("more", [b"\n", b'{"question": "mine", "response": "keep"}\n'])
def test_a_finished_file_to_which_a_line_was_added_is_refused(more, run, begun):
    begun.write_bytes(begun.read_bytes() + more)
    assert "has been changed" in refused(run, begun)


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.about.json"])
def test_a_file_that_cannot_be_written_is_named(name, run, tmp_path):
    """As on a full disk: no file may become larger than 100 bytes, or 600 for the first one."""
    file, limits = tmp_path / "own.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600 if name == file.name else 100, limits[1]))
    try:
        code, _, err = run("--out", file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = err.splitlines()[-1]
    assert code == 2 and f"cannot write {tmp_path / name} (File too large)" in last
    assert run("--out", file)[0] == 0 and len(read_rows(file)) == 7


@pytest.mark.parametrize("content", ["", "no JSON", "[]", "{}", "null", '{"settings": 3}'])
def test_a_damaged_about_is_refused(content, run, begun):
    about(begun).write_text(content)
    assert about(begun).name in refused(run, begun)


def test_a_file_that_was_deleted_is_begun_anew(run, begun):
    before = begun.read_bytes()
    begun.unlink()
    assert run("--out", begun)[0] == 0 and begun.read_bytes() == before
    begun.unlink()
    assert run("--out", begun, "--max-new-tokens", 300)[0] == 0


def test_an_output_that_is_an_input_is_refused(run, questions):
    before = questions.read_bytes()
    code, _, err = run("--out", questions)
    assert code == 2 and "would overwrite the input" in err and questions.read_bytes() == before
    named = about(questions.with_name("x.jsonl"))
    named.write_bytes(before)
    code, _, err = run("--questions", named, "--out", questions.with_name("x.jsonl"))
    assert code == 2 and "would overwrite the input" in err and named.read_bytes() == before


# ---- the command line

@pytest.mark.parametrize("n, temperature, top_p", [(1, 0.0, 1.0), (4, 0.6, 0.95)])
def test_several_answers_are_drawn_as_in_the_paper(n, temperature, top_p, tmp_path):
    args = own_answers.arguments(["--questions", "x", "--out", f"{tmp_path}/y", "-n", str(n)])
    assert (args.temperature, args.top_p) == (temperature, top_p)


@pytest.mark.parametrize("flags, words", [
    (["-n", 4, "--temperature", 0], "the same answer"),
    (["--temperature", -1], "temperature"),
    (["--out", "no/such/folder/own.jsonl"], "no/such/folder"),
    (["--questions", "none.jsonl"], "none.jsonl"),
    (["prompt"], "prompt"),
    (["--adapter", "models/tiny-math/griffin.safetensors"], "--adapter"),
    (["--method", "griffin"], "--method"),
])
def test_bad_input_is_one_line_and_exit_code_2(flags, words, run, tmp_path):
    code, out, err = run("--out", tmp_path / "own.jsonl", *flags)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err


@pytest.mark.parametrize("flag", ["--questions", "--out"])
def test_both_files_are_needed(flag):
    with pytest.raises(ValueError, match=flag):
        own_answers.arguments(["--out" if flag == "--questions" else "--questions", "file"])
