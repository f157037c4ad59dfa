"""Problems, data sets, batches. Run: python -m pytest tests/test_data.py"""

import importlib.util
import json
import random
import re
import shutil
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

import data

ROOT = Path(__file__).resolve().parents[1]
TINY_MATH = ROOT / "models" / "tiny-math"
SHARED = ROOT.parent / "shared" / "data"


def solve(question):
    """The answer of a maths problem from its story alone, independently of the chain of thought."""
    sentences = re.findall(r"[^.?]+[.?]", question)
    value = int(re.search(r"\d+", sentences[0])[0])
    for sentence in sentences[1:-1]:
        n = int((re.search(r"\d+", sentence) or [2])[0])
        if re.search("gives away half|piles|share them", sentence):
            value //= n
        elif re.search("times as many|trades|doubles|double what", sentence):
            value *= n
        elif re.search("loses|gives away|sells|fewer", sentence):
            value -= n
        else:
            assert re.search("buys|finds|A friend gives|more than", sentence), sentence
            value += n
    return value


def test_maths_answers_follow_from_the_story_and_the_chain():
    steps = set()
    for p in data.problems("maths", 500, seed=7):
        assert int(p.answer) == solve(p.question)
        chain = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", p.response)
        value = int(re.search(r"\d+", p.question)[0])
        for a, op, b, result in chain:
            a, b, result = int(a), int(b), int(result)
            assert a == value and result == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]
            assert 1 <= result <= data.MAX_VALUE
            value = result
        assert p.response.endswith(f"#### {value}") and data.correct(p.response, p.answer)
        steps.add(len(chain))
    assert steps == set(range(2, 9))


def test_reading_asks_for_the_only_fact_of_its_kind():
    """So the kind alone tells the fact. The answer is one of its values, told of that person."""
    kinds = set()
    for p in data.problems("reading", 300, seed=7):
        passage, question = re.fullmatch(r"(.*\.) (.*\?)", p.question).groups()
        sentences = passage.split(". ")
        assert 5 <= len(sentences) <= 8
        found = []
        for kind, (asks, values) in data.FACTS.items():
            pattern = rf"\b{kind.format('(' + values.replace(' ', '|') + ')')}(?=[,. ]|$)"
            told = [(s.split()[0], m[1]) for s in sentences for m in re.finditer(pattern, s)]
            assert len(told) <= 1
            for who, value in told:
                found.append(kind)
                if asks.format(who) == question:
                    assert value == p.answer
                    kinds.add(kind)
                    assert p.response == f"{who} {kind.format(value)}. #### {value}"
        assert 14 <= len(found) <= 16
    assert kinds == set(data.FACTS) and len(kinds) >= 8


def test_reading_prompts_have_60_to_120_tokens():
    tokenizer = data.Tokenizer(TINY_MATH)
    lengths = [len(tokenizer.prompt_ids(p.question)) for p in data.problems("reading", 300, seed=7)]
    assert 60 <= min(lengths) and max(lengths) <= 120


@pytest.mark.parametrize("kind", ["maths", "reading"])
def test_held_out_problems_never_occur_in_training(kind):
    """Training draws from one side of the hash of a question, evaluation from the other."""
    training = {p.question for seed in range(3) for p in data.problems(kind, 1000, seed)}
    unseen = {p.question for seed in range(3)
              for p in data.problems(kind, 300, seed, evaluation=True)}
    assert not training & unseen
    assert all(data.held_out(q) for q in unseen) and not any(data.held_out(q) for q in training)


@pytest.fixture(scope="module")
def pretrain():
    """The script that trained the bundled model."""
    spec = importlib.util.spec_from_file_location("pretrain", TINY_MATH / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pretraining_draws_no_held_out_problem(pretrain):
    """Each question of a chat counts with the passage that stands before the first one."""
    rng, questions, several = random.Random(0), 0, 0
    for number in range(1500):
        turns = pretrain.make_chat(rng, number / 1500)
        passage = ""
        for question, response in turns:
            if question.startswith(data.INSTRUCTION):
                question = question.removeprefix(f"{data.INSTRUCTION} ")
            elif not passage:
                passage = question[:question.rindex(". ") + 2]
            else:
                question = passage + question
            assert not data.held_out(question) and "####" in response
        questions += len(turns)
        several += len(turns) > 1
    assert questions > 1500 and several > 300


def test_pretraining_learns_the_responses_and_their_end(pretrain):
    tokenizer = data.Tokenizer(TINY_MATH)
    turns = [("What is 1 + 1?", "1 + 1 = 2. #### 2"), ("And 2 + 2?", "2 + 2 = 4. #### 4")]
    ids, mask = pretrain.encode_chat(tokenizer, turns)
    learned = [token for token, wanted in zip(ids, mask) if wanted]
    assert learned == tokenizer.encode(turns[0][1]) + [0] + tokenizer.encode(turns[1][1]) + [0]
    assert ids[:ids.index(0)] == tokenizer.prompt_ids(turns[0][0]) + tokenizer.encode(turns[0][1])


def test_an_interrupted_pretraining_ends_with_the_same_weights(pretrain, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 1)
    monkeypatch.setattr(pretrain, "GROUP", 2)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    monkeypatch.setattr(pretrain, "CONFIG", pretrain.CONFIG | small)
    monkeypatch.setattr(pretrain, "make_tokenizer", copy_tokenizer)

    def run(folder):
        flags = ["--out", str(folder), "--steps", "4", "--batch-size", "2", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
        pretrain.main()
        return (folder / "model.safetensors").read_bytes()

    expected = run(tmp_path / "whole")
    batches = pretrain.group_of_batches

    def stop_at_the_second_group(tokenizer, args, group):
        if group == 1:
            raise KeyboardInterrupt
        return batches(tokenizer, args, group)

    monkeypatch.setattr(pretrain, "group_of_batches", stop_at_the_second_group)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.setattr(pretrain, "group_of_batches", batches)
    assert run(tmp_path / "parts") == expected
    assert not (tmp_path / "parts" / "training.state").exists()


def copy_tokenizer(folder):
    """In place of training a tokenizer: the bundled one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MATH / name, folder)


def test_problems_are_reproducible():
    first, again, other = (data.problems("maths", 20, seed) for seed in (5, 5, 6))
    assert first == again != other


def test_batches_hold_every_sample_once_with_its_prompt_length():
    samples = [([1] * (i % 5 + 1), [2] * (i % 7 + 1)) for i in range(23)]
    shuffled = [data.collate(samples, indices) for indices in data.batch_indices(samples, 4, 3)]
    for batches in (list(data.batches(samples, 4)), shuffled):
        seen = []
        for b in batches:
            assert b.tokens.dtype == torch.int64 and len(b.tokens) <= 4
            for i in range(len(b.tokens)):
                tokens, prompt, n = b.tokens[i], b.prompt_lengths[i], b.lengths[i]
                assert tokens[:prompt].eq(1).all() and tokens[prompt:n].eq(2).all()
                assert tokens[n:].eq(0).all()
                assert torch.equal(b.response[i], tokens == 2)
                assert torch.equal(b.generated[i], tokens != 1)
                seen.append((int(prompt), int(n - prompt)))
        assert sorted(seen) == sorted((len(p), len(r)) for p, r in samples)
    assert not data.collate(samples, [0, 3], counted=False).response.any()
    orders = [data.batch_indices(samples, 4, seed) for seed in (None, 3, 3, 4)]
    assert orders[1] == orders[2] and orders[0] != orders[1] != orders[3]


@pytest.mark.parametrize("ids, kept", [([1, 2, 9, 3, 9], [1, 2, 9]), ([8, 1], [8]), ([1], [1])])
def test_until_stop(ids, kept):
    assert data.until_stop(ids, (8, 9)) == kept


def test_too_long_samples_are_dropped_and_counted(capsys):
    tokenizer = data.Tokenizer(TINY_MATH)
    problems = data.problems("maths", 40, seed=1)
    everything = data.encode_samples(problems, tokenizer)
    limit = sorted(len(p) + len(r) for p, r in everything)[19]
    kept = data.encode_samples(problems, tokenizer, limit)
    assert kept == [sample for sample in everything if sum(map(len, sample)) <= limit]
    assert f"dropped {40 - len(kept)} of 40" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no sample"):
        data.encode_samples(problems, tokenizer, 3)


def write(folder, *rows):
    file = folder / "a.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def messages(response):
    return {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                         {"role": "assistant", "content": response},
                         {"role": "user", "content": "more"},
                         {"role": "assistant", "content": "bye"}]}


# a row of a data set: (question, response, answer, kind, level)
ROWS = [
    ({"question": "q", "answer": "a <<1+1=2>>2\n#### 2"}, ("q", "a 2\n#### 2", "2", "maths", 1)),
    ({"problem": "q", "answer": "7"}, ("q", "", "7", "maths", None)),
    ({"problem": "q", "answer": 7}, ("q", "", "7", "maths", None)),
    ({"problem": "q", "solution": r"so \boxed{7}", "level": "Level 3"},
     ("q", r"so \boxed{7}", "7", "maths", "Level 3")),
    ({"problem": "q", "solution": "a", "answer": r"\frac{1}{2}", "level": 3},
     ("q", "a", r"\frac{1}{2}", "maths", 3)),
    ({"query": "q", "response": "It is 2. #### 2\nThe answer is: 2", "original_question": "o"},
     ("q", "It is 2. #### 2\nThe answer is: 2", "2", "maths", None)),
    ({"question": "q", "response": "I think 3", "answer": "2", "right": False},
     ("q", "I think 3", "2", "maths", None)),
    ({"question": "q", "response": "so #### 3"}, ("q", "so #### 3", "3", "maths", None)),
    ({"question": "q", "options": ["x", "y"], "answer": "B"},
     ("q\n(A) x\n(B) y", "B", "B", "choice", None)),
    ({"question": "q", "choices": ["x", "y"], "answer": 0},
     ("q\n(A) x\n(B) y", "A", "A", "choice", None)),
    ({"context": "c", "question": "q", "answer": "a"}, ("c\nq", "a", "a", "passage", None)),
    ({"prompt": "q", "reference": "The answer is near."},
     ("q", "The answer is near.", "The answer is near.", "summary", None)),
    # text unless the response marks its final answer
    ({"prompt": "q\n", "response": "a"}, ("q\n", "a", "", "text", None)),
    ({"prompt": "q", "response": "a #### 5"}, ("q", "a #### 5", "5", "maths", None)),
    ({"prompt": "q", "response": "#### Title\n\na"}, ("q", "#### Title\n\na", "", "text", None)),
    ({"instruction": "q", "input": "i", "output": "a"}, ("q\ni", "a", "", "text", None)),
    ({"instruction": "q", "input": "", "output": r"\boxed{5}"},
     ("q", r"\boxed{5}", "5", "maths", None)),
    ({"context": "c", "question": "q", "answers": ["a", "b"]},
     ("c\nq", "a", "a", "passage", None)),
    (messages("a"), ("q", "a", "", "text", None)),
    (messages("a\n#### 5\n"), ("q", "a\n#### 5\n", "5", "maths", None)),
]


@pytest.mark.parametrize("row, expected", ROWS)
def test_what_a_row_is(tmp_path, row, expected):
    """A sample has its response, an evaluation problem its answer, and perhaps asks for a box."""
    problem = data.problem_from_row(row)
    assert astuple(problem) == expected
    question, response, answer, kind, level = expected
    instruction = data.INSTRUCTION + " " if kind in ("maths", "choice") else ""
    assert data.ask(problem) == instruction + question
    file = write(tmp_path, row)
    if response:
        assert data.read_problems(file) == [problem]
    else:
        with pytest.raises(ValueError, match="line 1: .*no response.*it needs question and"):
            data.read_problems(file)
    if answer:
        asked, = data.read_problems(file, evaluation=True, boxed=True)
        plain, = data.read_problems(file, evaluation=True)
        assert asked.question.startswith(plain.question) and "boxed" not in plain.question
        assert (asked.answer, asked.kind, asked.level) == (answer, kind, level)
        assert data.ask(asked).startswith(instruction + question)
        assert data.ask(asked).endswith(r"\boxed{}.") == (kind in ("maths", "choice"))
    else:
        with pytest.raises(ValueError, match="line 1: .*no answer"):
            data.read_problems(file, evaluation=True)


@pytest.mark.parametrize("row", [
    "{", "[]", "3", "null", '"question"', {}, {"question": "q"}, {"answer": "1"}, {"question": 5},
    {"question": "q", "answer": ["a"], "response": 3}, {"question": ["q"], "answer": "a"},
    {"question": "q", "options": ["x"], "answer": "B"}, {"context": "c", "answer": "a"},
    {"question": "q", "options": ["x"], "answer": 4}, {"context": "c", "question": "q"},
    {"question": "q", "choices": ["x", "y"], "answer": -1}, {"prompt": "q"}, {"reference": "a"},
    {"question": "q", "choices": ["x", "y"], "answer": "AB"}, {"prompt": "", "response": "a"},
    {"question": "q", "choices": {"text": ["x"]}, "answerKey": "A"}, {"messages": "hello"},
    {"question": "q", "choices": list("0123456789X"), "answer": 0}, {"messages": []},
    {"messages": [{"role": "user", "content": "q"}]},
    {"context": "c", "question": "q", "answers": []},
])
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_bad_line_is_named_in_one_line(tmp_path, row, evaluation):
    file = write(tmp_path, {"question": "q", "answer": "a"}, row)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: [^\n]*it needs question and[^\n]*$"):
        data.read_problems(file, evaluation=evaluation)
    assert len(data.read_problems(file, 1, evaluation=evaluation)) == 1


def test_skip_bad_names_what_it_leaves_out(tmp_path, capsys):
    good = {"prompt": "c", "response": "d"}
    file = write(tmp_path, good, '{"question": "a"', {"other": 1}, "", good, good)
    assert len(data.read_problems(file, 2, skip_bad=True)) == 2
    said = capsys.readouterr().err.splitlines()
    assert [re.search(r"line (\d+)", line)[1] for line in said] == ["2", "3"]


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        data.read_problems(tmp_path / "none.jsonl")
    for text in ("", "\n\n", "[]"):
        with pytest.raises(ValueError, match="a.jsonl holds no problems"):
            data.read_problems(write(tmp_path, text))
    with pytest.raises(ValueError, match=r"a.jsonl holds no problems"):
        data.read_problems(write(tmp_path, "{"), skip_bad=True)
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="b.jsonl is not valid JSON"):
        data.read_problems(tmp_path / "b.jsonl")


def test_a_json_list_a_byte_order_mark_and_windows_line_ends(tmp_path):
    """MetaMathQA is stored as one list; other line ends may stand inside a string."""
    row = {"query": "1 +\u2028 1?", "response": "It is 2."}
    lines = [json.dumps(row, ensure_ascii=False)] * 2
    for text in (json.dumps([row, row], indent=1), "\ufeff" + "\n".join(lines),
                 "\r\n".join(lines) + "\r\n"):
        (tmp_path / "b.json").write_bytes(text.encode())
        assert data.read_problems(tmp_path / "b.json") == [data.problem_from_row(row)] * 2
    for text, says in (('[{"query": "1 +', "cut.json is not valid JSON"), ("[3]", "line 1: ")):
        (tmp_path / "cut.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            data.read_problems(tmp_path / "cut.json")


def test_a_parser_of_ones_own(tmp_path):
    def parse(row):
        return data.Problem(row["Q"], "r", row["A"], "text")

    file = write(tmp_path, {"Q": "q", "A": "a"}, {"Q": "q"})
    assert data.read_problems(file, 1, evaluation=True, parse=parse)[0].answer == "a"
    with pytest.raises(ValueError, match="line 2: .*'A'"):
        data.read_problems(file, evaluation=True, parse=parse)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside this checkout")
@pytest.mark.parametrize("name, rows", [("gsm8k_test", 1319), ("xsum", 200)])
def test_real_sets_are_read_whole(name, rows):
    problems = data.read_problems(SHARED / f"{name}.jsonl")
    assert len(problems) == rows
    if name == "gsm8k_test":
        assert all(data.correct(p.response, p.answer) for p in problems)
        assert not any("<<" in p.response for p in problems)


def test_a_hub_data_set_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub
    asked = []

    def download(repo, name, repo_type):
        asked.append((repo, name, repo_type))
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    file = "hf://datasets/meta-math/MetaMathQA/a/b.json"
    with pytest.raises(OSError, match=f"cannot fetch {file}: no network$"):
        data.read_problems(file)
    assert asked == [("meta-math/MetaMathQA", "a/b.json", "dataset")]
