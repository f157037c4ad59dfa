"""Problems, rows of data sets, samples, batches. Run: python -m pytest tests/test_data.py"""

import hashlib
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


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind, evaluation, expected", [
    ("maths", False, "d2d7b41f525222ba"), ("maths", True, "c5482eb3b6e31ee1"),
    ("reading", False, "5f107363de4f0f6f"), ("reading", True, "2a8ed0e1fb203085"),
])
def test_generated_problems_never_change(kind, evaluation, expected):
    """The bundled model learned exactly these, and every figure of RESULTS.md is of them."""
    problems = data.problems(kind, 300, seed=0, evaluation=evaluation)
    assert digest([astuple(problem) for problem in problems]) == expected


def test_generated_hard_problems_and_passages_never_change():
    hard = data.problems("maths", 50, seed=3, evaluation=True, steps=8)
    assert digest([astuple(problem) for problem in hard]) == "41bcd92dad96eb98"
    rng = random.Random(11)
    passages = [data.make_passage(rng, 1 + i % 8, 4 + i % 12) for i in range(100)]
    assert digest(passages) == "913c6fefc68eb951"
    assert digest(rng.random()) == "4779a7852442343a"  # nor how many numbers they draw


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
    assert not data.collate(samples, [0, 3], with_response=False).response.any()
    orders = [data.batch_indices(samples, 4, seed) for seed in (None, 3, 3, 4)]
    assert orders[1] == orders[2] and orders[0] != orders[1] != orders[3]


@pytest.mark.parametrize("lengths", [
    [10] * 60,                         # all alike
    list(range(1, 61)),                # all different
    [2 ** (i // 6) for i in range(60)],  # far apart
])
def test_each_epoch_has_new_batches_of_similar_lengths(lengths):
    """Not the same batches in another order; and nearly as little padding as in the best order."""
    samples = [([1] * length, [2]) for length in lengths]
    random.Random(5).shuffle(samples)
    epochs = [data.batch_indices(samples, 8, seed) for seed in range(5)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(60))
        assert sorted(map(len, epoch)) == [4] + [8] * 7
    as_sets = [{frozenset(batch) for batch in epoch} for epoch in epochs]
    for i, first in enumerate(as_sets):
        for second in as_sets[:i]:
            assert len(first & second) <= 2

    def padded(epoch):
        return sum(len(batch) * max(sum(map(len, samples[i])) for i in batch) for batch in epoch)

    by_length = data.batch_indices(samples, 8)
    assert by_length == data.batch_indices(samples, 8)
    assert [len(samples[i][0]) for batch in by_length for i in batch] == sorted(lengths)
    at_random = list(range(60))
    random.Random(6).shuffle(at_random)
    worst = padded([at_random[i:i + 8] for i in range(0, 60, 8)])
    best = padded(by_length)
    assert all(padded(epoch) <= best + 0.45 * (worst - best) for epoch in epochs)


def test_the_masks_of_a_batch():
    batch = data.collate([([5, 6], [7]), ([5], [7, 8, 9])], [0, 1])
    assert batch.tokens.tolist() == [[5, 6, 7, 0], [5, 7, 8, 9]]
    assert batch.generated.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert batch.response.tolist() == [[False, False, True, False], [False, True, True, True]]


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
    longest = max(len(p) + len(r) for p, r in everything)
    said = capsys.readouterr().err
    assert f"left out {40 - len(kept)} of 40" in said and f"longest has {longest}\n" in said
    assert data.encode_samples(problems, tokenizer, longest) == everything
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="no sample has at most 3 tokens"):
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


@pytest.mark.parametrize("prompt, response, expected", [
    ("<user>q<assistant><think>\n", "<think>\nhm</think>5", "hm</think>5"),
    ("<user>q<assistant><think>\n", "\n<think>hm</think>5", "hm</think>5"),
    ("<user>q<assistant><think>", "<think>\nhm</think>5", "\nhm</think>5"),
    ("<user>q<assistant><think>\n\n", "<think>\n\n\nhm", "\nhm"),
    ("<user>q<assistant><think>\n", "hm</think>5", "hm</think>5"),
    ("<user>q<assistant>", "<think>\nhm</think>5", "<think>\nhm</think>5"),
    ("<user>what is <think>?<assistant>", "<think>\nhm", "<think>\nhm"),
    ("<user>q<assistant><think>\n", "5 <think> 6", "5 <think> 6"),
])
def test_a_thought_is_opened_once(prompt, response, expected):
    assert data.without_opening(prompt, response) == expected


def test_encoded_samples_open_a_thought_once():
    tokenizer = data.Tokenizer(TINY_MATH)
    tokenizer.template = "{{ messages[0].content }}<think> "
    problem = data.Problem("q", "<think> hm</think> 5", "5")
    (prompt, response), = data.encode_samples([problem], tokenizer)
    assert tokenizer.decode(prompt).endswith("<think> ")
    assert response == tokenizer.encode("hm</think> 5")


# a row of a data set: (question, response, answer, kind, level)
ROWS = [
    ({"question": "q", "answer": "a <<1+1=2>>2\n#### 2"}, ("q", "a 2\n#### 2", "2", "maths", 1)),
    ({"question": "q", "answer": "a"}, ("q", "a", "a", "maths", None)),
    ({"question": "q", "answer": 7}, ("q", "7", "7", "maths", None)),
    ({"question": "q", "answer": 0}, ("q", "0", "0", "maths", None)),
    ({"question": "q", "answer": 18.0}, ("q", "18.0", "18.0", "maths", None)),
    ({"question": "q", "answer": 1e-7}, ("q", "0.0000001", "0.0000001", "maths", None)),
    ({"question": "q", "answer": 1e22}, ("q", "1" + "0" * 22, "1" + "0" * 22, "maths", None)),
    ({"question": "q", "answer": 10 ** 400}, ("q", str(10 ** 400), str(10 ** 400), "maths", None)),
    ({"question": "q", "response": "I think 3", "answer": "2", "right": False, "block": 4, "id": 9},
     ("q", "I think 3", "2", "maths", None)),
    ({"question": "q", "response": "so #### 3"}, ("q", "so #### 3", "3", "maths", None)),
    ({"question": "q", "response": "so #### 3", "answer": "it is\n#### 4", "level": 5},
     ("q", "so #### 3", "4", "maths", 5)),
    ({"question": "q", "response": "cout << a = b >> c"},
     ("q", "cout << a = b >> c", "", "maths", None)),
    ({"question": "q", "response": r"so \boxed 3"}, ("q", r"so \boxed 3", "3", "maths", None)),
    # text unless the response marks its final answer, or an answer stands beside it
    ({"prompt": "q\n", "response": "a"}, ("q\n", "a", "", "text", None)),
    ({"prompt": "q", "response": "a #### 5"}, ("q", "a #### 5", "5", "maths", None)),
    ({"prompt": "q", "response": r"a \fbox{5}"}, ("q", r"a \fbox{5}", "5", "maths", None)),
    ({"prompt": "q", "response": "#### Title\n\na"}, ("q", "#### Title\n\na", "", "text", None)),
    ({"prompt": "q", "response": "a", "answer": "5"}, ("q", "a", "5", "maths", None)),
    ({"prompt": "q", "response": "#### 4", "answer": "5"}, ("q", "#### 4", "5", "maths", None)),
    (messages("a"), ("s\n\nq", "a", "", "text", None)),
    (messages("a\n#### 5\n"), ("s\n\nq", "a\n#### 5\n", "5", "maths", None)),
    (messages("a\n#### 5\n") | {"answer": 6}, ("s\n\nq", "a\n#### 5\n", "6", "maths", None)),
    ({"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "q"},
                   {"role": "assistant", "content": "a"}]}, ("q", "a", "", "text", None)),
    ({"messages": [{"role": "user", "content": "q"}], "answer": "5"},
     ("q", "", "5", "maths", None)),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "r"},
                   {"role": "assistant", "content": "a"}], "answer": "5"},
     ("q", "", "5", "maths", None)),
    # null and empty columns are absent, whatever the column
    ({"question": "q", "answer": "#### 5", "response": None, "messages": [], "options": None,
      "context": "", "prompt": " \n", "level": None, "kind": None, "choices": {}},
     ("q", "#### 5", "5", "maths", None)),
    # a kind that stands in the row counts
    ({"question": "q", "response": "a", "answer": "a", "kind": "summary"},
     ("q", "a", "a", "summary", None)),
    ({"question": "q", "response": "so (B)", "answer": "B", "kind": "choice"},
     ("q", "so (B)", "B", "choice", None)),
    ({"question": "c\nq", "response": "a", "answer": "a", "kind": "passage"},
     ("c\nq", "a", "a", "passage", None)),
    ({"question": "q", "response": "a #### 5", "kind": "text"},
     ("q", "a #### 5", "", "text", None)),
    ({"prompt": "q", "response": "a", "kind": "reading", "answer": "a"},
     ("q", "a", "a", "reading", None)),
]


def is_read_as(tmp_path, row, expected):
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
        with pytest.raises(ValueError, match="line 1: no response in the columns .*a row needs"):
            data.read_problems(file)
    if answer:
        asked, = data.read_problems(file, evaluation=True, boxed=True)
        plain, = data.read_problems(file, evaluation=True)
        assert asked.question.startswith(plain.question) and "boxed" not in plain.question
        assert (asked.answer, asked.kind, asked.level) == (answer, kind, level)
        assert data.ask(asked).startswith(instruction + question)
        assert data.ask(asked).endswith(r"\boxed{}.") == (kind in ("maths", "choice"))
    else:
        with pytest.raises(ValueError, match="line 1: no answer in the columns .*a row needs"):
            data.read_problems(file, evaluation=True)


@pytest.mark.parametrize("row, expected", ROWS)
def test_what_a_row_is(tmp_path, row, expected):
    is_read_as(tmp_path, row, expected)


@pytest.mark.parametrize("kind", data.KINDS)
def test_a_kind_survives_being_written(tmp_path, kind):
    """So that a summary is learned as it was asked: without the maths instruction."""
    first = data.Problem("q", "r", "a", kind)
    row = {"block": 0, "question": first.question, "response": first.response,
           "answer": first.answer, "kind": first.kind, "right": True}
    again, = data.read_problems(write(tmp_path, row))
    assert again == first and data.ask(again) == data.ask(first)


def test_a_box_is_asked_for_once(tmp_path):
    """What was written when a box had been asked for is read again with the same question."""
    file = write(tmp_path, {"question": "q", "answer": "1"})
    asked, = data.read_problems(file, evaluation=True, boxed=True)
    file = write(tmp_path, {"question": asked.question, "response": "1", "answer": "1"})
    assert data.read_problems(file, boxed=True)[0].question == asked.question


def read_fails(file, says, evaluation):
    """One line that names the file and says this."""
    with pytest.raises(ValueError) as error:
        data.read_problems(file, evaluation=evaluation)
    message = str(error.value)
    assert "\n" not in message and file.name in message and says in message


@pytest.mark.parametrize("row, says", [
    ("{", "not valid JSON"), ('{"question": "q", "answer": "a"', "not valid JSON"),
    ('{"question": "q" "answer": "a"}', "not valid JSON"), ("a" * 99, "not valid JSON"),
    ("[" * 100_000, "not valid JSON"), ("[]", "a row is an object, not []"),
    ("3", "a row is an object, not 3"), ("null", "not None"), ('"question"', "not 'question'"),
    ({}, "a row needs question and answer"), ({"question": ""}, "a row needs question and answer"),
    ({"question": "q"}, "in the columns question; a row needs"),
    ({"answer": "1"}, "answer"),
    ({"question": 5, "answer": "1"}, "question is 5, not text"),
    ({"question": ["q"], "answer": "a"}, "question is ['q'], not text"),
    ({"question": "q", "answer": ["a"]}, "answer is ['a'], not text"),
    ({"question": "q", "answer": {"value": "a"}}, "answer is {'value': 'a'}, not text"),
    ({"question": "q", "answer": True}, "answer is True, not text"),
    ({"question": "q", "answer": False}, "answer is False, not text"),
    ('{"question": "q", "answer": NaN}', "answer is nan, not text"),
    ('{"question": "q", "answer": Infinity}', "answer is inf, not text"),
    ('{"question": "q", "answer": -1e999}', "answer is -inf, not text"),
    ({"question": "q", "response": 3, "answer": "3"}, "response is 3, not text"),
    ({"question": "q", "response": ["a"]}, "response is ['a'], not text"),
    ({"prompt": {"text": "q"}, "response": "a"}, "prompt"), ({"prompt": "q"}, "columns prompt"),
    ({"prompt": " ", "response": "a"}, "a row needs"),
    ({"response": "a", "answer": "a"}, "a row needs"),
    ({"question": "q", "response": "a", "answer": "a", "kind": "riddle"}, "kind is 'riddle', not"),
    ({"question": "q", "response": "a", "answer": "a", "kind": ["maths"]}, "kind is ['maths']"),
    ({"messages": "hello"}, "messages is 'hello', not a list of turns"),
    ({"messages": ["hello"]}, "messages is ['hello'], not a list of turns"),
    ({"messages": [{"content": "q"}]}, "not a list of turns with role and content"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "one of them the user's"),
    ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}], "answer": "a"},
     "no question"),
    ({"messages": [{"role": "user", "content": ["q"]}], "answer": "a"}, "content is ['q'], not"),
    ({"messages": [{"role": "user", "content": None}], "answer": "a"}, "content is None, not text"),
    ('{"question": "a \\ud800 b", "response": "a", "answer": "a"}', "half of a surrogate pair"),
])
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_bad_line_is_named_in_one_line(tmp_path, row, says, evaluation):
    file = write(tmp_path, {"question": "q", "answer": "a"}, row)
    read_fails(file, says, evaluation)
    read_fails(file, "line 2", evaluation)
    assert len(data.read_problems(file, 1, evaluation=evaluation)) == 1


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        data.read_problems(tmp_path / "none.jsonl")
    with pytest.raises(OSError, match=tmp_path.name):
        data.read_problems(tmp_path)
    for text in ("", "\n\n", "[]", "  \n\t\n", "\ufeff"):
        with pytest.raises(ValueError, match="a.jsonl holds no problems"):
            data.read_problems(write(tmp_path, text))


def test_lines_of_blanks_are_skipped_and_counted(tmp_path):
    good = {"prompt": "c", "response": "d"}
    file = write(tmp_path, "", good, "   ", "\t", good, "", {"other": 1}, "")
    assert len(data.read_problems(file, 2)) == 2
    assert [place for place, _ in data.read_rows(file)] == ["line 2", "line 5", "line 7"]
    with pytest.raises(ValueError, match="line 7: "):
        data.read_problems(file)


def test_a_json_list_a_byte_order_mark_and_windows_line_ends(tmp_path):
    """MetaMathQA is stored as one list; other line ends may stand inside a string."""
    row = {"prompt": "1 +\u2028 1? \ufffd", "response": "It is 2."}
    lines = [json.dumps(row, ensure_ascii=False)] * 2
    for text in (json.dumps([row, row], indent=1), "\ufeff" + "\n".join(lines),
                 "\n " + json.dumps([row, row]), "\r\n".join(lines) + "\r\n"):
        (tmp_path / "b.json").write_bytes(text.encode())
        assert data.read_problems(tmp_path / "b.json") == [data.problem_from_row(row)] * 2
    for text, says in (('[{"prompt": "1 +', "cut.json is not valid JSON"), ("[3]", "row 1: ")):
        (tmp_path / "cut.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            data.read_problems(tmp_path / "cut.json")


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside this checkout")
@pytest.mark.parametrize("name, rows", [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_gsm8k_is_read_whole(name, rows):
    problems = data.read_problems(SHARED / f"{name}.jsonl")
    assert len(problems) == rows and {problem.kind for problem in problems} == {"maths"}
    assert data.read_problems(SHARED / f"{name}.jsonl", evaluation=True) == problems
    assert all(data.correct(p.response, p.answer) for p in problems)
    assert not any("<<" in p.response for p in problems)
    assert {p.level for p in problems} <= set(range(1, 12)) | {None}


PLAIN = {  # what the core knows: the last #### or box, as text or as a number
    True: [
        ("12 + 5 = 17. #### 17", "17"), ("#### 1,000", "1000"), ("#### 1000", "1,000"),
        ("#### 017", "17"), ("#### 17.0", "17"), ("#### 17.", "17"), ("#### .5", "0.5"),
        ("#### 3/4", "0.75"), ("#### -5", "-5"), ("#### +5", "5"), ("####\n17", "17"),
        ("#### Paris", "Paris"), (r"\boxed{17}", "17"), (r"\boxed {17}", "17"),
        (r"\fbox{17}", "17"),
        (r"so $\boxed 7$.", "7"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x = \{1\}, y = \{}", r"x = \{1\}, y = \{"), ("#### 3\nno, #### 17", "17"),
        ("#### 42\n\nThis answer is correct.", "42"), (r"\boxed{42}. I hope it is.", "42"),
        ("<think>#### 3</think>#### 17", "17"), ("#### 17\n\nQuestion: 1 + 1?\n#### 2", "17"),
        ("#### 17\n\n**Problem 2:** 1 + 1?\n\\boxed{2}", "17"),
        (r"\boxed{12} and then \boxed{1", "12"),
        ("Let me restate.\nProblem: 2+2?\n\\boxed{4}", "4"),  # a question, but no new one
        ("Let me restate a thing.\n### Question\nWho?\n#### Eva", "Eva"),
        ("#### 17\n\n### Question\n1 + 1?\n#### 2", "17"), ("#### 17\nFrage: 1 + 1?\n#### 2", "17"),
        ("#### 17\n<|im_start|>user\n1 + 1?\n#### 2", "17"),
        ("\\boxed{Eva}\n\nQuestion: x?\n\\boxed{Rome}", "Eva"),
        (r"\boxed{17}<|im_end|>\boxed{2}", "17"),
        (r"<Think>\boxed{3}</THINK>\boxed{4}", "4"), (r"◁think▷3◁/think▷\boxed{4}", "4"),
        (r"[THINK]\boxed{3}[/THINK]\boxed{4}", "4"), (r"<thought>3</thought>\boxed{4}", "4"),
        (r"<|begin_of_thought|>\boxed{3}<|end_of_thought|>\boxed{4}", "4"),
        # Ordinary prose after a box withdraws nothing.
        (r"\boxed{5}. However, this assumes that no one leaves.", "5"),
        (r"\boxed{5} days. He must wait for that long, but not longer.", "5"), ("#### No.", "No"),
        (r"\boxed{5}. There are no more steps, and it is actually the least.", "5"),
        ("\\boxed{5}\n\nLet me verify: 2 + 3 = 5. Let me recheck the units: eggs.", "5"),
        (r"\boxed{5} \text{ cm}. Note that 6 would be too long.", "5"),
        (r"\boxed{wait, 5}", "wait, 5"),
        ("#### " + "9" * 5000, "9" * 5000),  # longer than Python makes an integer of
    ],
    False: [
        ("", ""), ("", "17"), ("17", "17"), ("####", ""), ("#### ", "17"), (r"\boxed{}", ""),
        (r"\boxed{17", "17"), ("#### 170", "17"), ("#### 1,00", "100"), ("#### 1,0000", "10000"),
        ("#### 17,18", "1718"), ("#### 17 or 18", "17"), ("#### 17 eggs", "17"), ("#### 1 7", "17"),
        ("#### 3/0", "3"), ("#### 1_000", "1000"), ("#### 1e3", "1000"), ("#### 17x", "17"),
        ("#### paris", "Paris"), (r"\boxed{X}", "x"), ("The answer is 17.", "17"),
        ("#### 17\nno, #### 18", "17"), (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1}, \boxed{2}", "2"),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", "2"), ("<think>Maybe \\boxed{12}? Let me", "12"),
        ("<think>\\boxed{3}</think> It is 4.", "3"), ("\\boxed{3}</think> It is 4.", "3"),
        ("She has 18.\n\nQuestion: 1 + 1?\n#### 2", "2"), ("#### 5\n\nQ: 1 + 1?\n#### 2", "2"),
        ("#### " + "9" * 5000, "9" * 999), (r"\boxed " + "9" * 5000, "9" * 1000),
        (r"\boxed{5}. No, wait: 6.", "5"), (r"\boxed{5}. Wait, that is wrong.", "5"),
        (r"$\boxed{5}$, no, 6", "5"), ("\\boxed{5}\n\nHmm, let me see.", "5"),
        ("#### 5\nActually, it is 6.", "5"), (r"\boxed{5}. Oh wait.", "5"),
        (r"\boxed{5}. However, 6 is better.", "5"), (r"\boxed{A}, but B is better.", "A"),
        (r"\boxed{5}. Let me recalculate.", "5"), (r"\boxed{5} Sorry, 6.", "5"),
        (r"<Think>\boxed{5}", "5"), (r"<thought>\boxed{5}", "5"), (r"[THINK] \boxed{5}", "5"),
        (r"◁think▷ \boxed{5}", "5"), (r"<|begin_of_thought|> \boxed{5}", "5"),
        (r"</think>a<THINKING>\boxed{5}", "5"), ("Paris.\n\nQuestion: x?\n#### Rome", "Rome"),
        ("Paris\nQuestion: x?\n#### Rome", "Rome"),
        ("The answer is Eva.\n\nQuestion: x?\n#### Rome", "Rome"),
        ("#### 5\nUser: and now?\n#### 2", "2"), ("#### 5\n\nProblem 2. 1 + 1?\n#### 2", "2"),
    ],
}


@pytest.mark.parametrize("right", [True, False])
def test_the_core_compares_text_and_numbers(right):
    assert not [case for case in PLAIN[right] if data.correct(*case) is not right]


def test_samples_are_encoded_by_our_tokenizer_alone():
    """transformers' has no chat template in encode, so its ids would be others without a word."""
    with pytest.raises(ValueError, match="by data.Tokenizer.folder., .* not by a Tokenizer of"):
        problems = [data.Problem("1 + 1?", "2", "2")]
        data.encode_samples(problems, data.Tokenizer(TINY_MATH).tokenizer)
