"""Problems, data sets, batches, grading. Run: python -m pytest tests/test_data.py"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data

ROOT = Path(__file__).resolve().parents[1]
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


def test_reading_answers_stand_in_the_passage_and_need_no_arithmetic():
    for p in data.problems("reading", 150, seed=7) + data.problems("reading", 150, seed=7, distinct=True):
        assert re.search(rf"\b{p.answer}\b", p.question) and not re.search(r"\d", p.question)


@pytest.mark.parametrize("kind", ["maths", "reading"])
def test_held_out_problems_never_occur_in_training(kind):
    """What pretrain.py and distill.py draw is on one side of the hash, what evaluation draws on the other."""
    training = {p.question for seed in range(3) for p in data.problems(kind, 1000, seed)}
    unseen = {p.question for seed in range(3) for p in data.problems(kind, 300, seed, evaluation=True)}
    assert not training & unseen
    assert all(data.held_out(q) for q in unseen) and not any(data.held_out(q) for q in training)


def test_pretraining_draws_no_held_out_problem():
    sys.path.insert(0, str(ROOT / "models" / "tiny-math"))
    import pretrain
    tokenizer = data.Tokenizer(ROOT / "models" / "tiny-math")
    tokens, mask = next(pretrain.batches(tokenizer, 64, seed=0))
    for row, response in zip(tokens, mask):
        prompt = tokenizer.decode(row[:response.nonzero()[0]].tolist())
        question = prompt.removeprefix(data.INSTRUCTION + " ")
        assert question.endswith("?") and not data.held_out(question)
        assert row[response][-1] == 0 and "####" in tokenizer.decode(row[response].tolist())


def test_distinct_reading_has_one_fact_of_each_kind():
    for p in data.problems("reading", 100, seed=7, evaluation=True, distinct=True):
        assert all(p.question.count(verb) == 1 for verb in (" lives ", " likes ", " has a "))


def test_problems_are_reproducible():
    assert data.problems("maths", 20, 5) == data.problems("maths", 20, 5) != data.problems("maths", 20, 6)


def test_batches_hold_every_sample_once_with_its_prompt_length():
    pairs = [([1] * (i % 5 + 1), [2] * (i % 7 + 1)) for i in range(23)]
    for seed in (None, 3):
        seen = []
        for b in (data.collate(pairs, chunk) for chunk in data.chunks(pairs, 4, seed)):
            for tokens, prompt, n, response in zip(b.tokens, b.prompt_lengths, b.lengths, b.response):
                assert tokens[:prompt].eq(1).all() and tokens[prompt:n].eq(2).all() and tokens[n:].eq(0).all()
                assert torch.equal(response, tokens == 2)
                seen.append((int(prompt), int(n - prompt)))
        assert sorted(seen) == sorted((len(p), len(r)) for p, r in pairs)


@pytest.mark.parametrize("text, answer, right", [
    ("12 + 5 = 17. #### 17", "17", True),
    ("#### 1,000", "1000", True),
    ("#### 025", "25", True),
    ("#### 17.", "17", True),
    ("#### 3\nno, #### 17", "17", True),
    ("#### Oslo", "Oslo", True),
    ("#### Oslo", "Rome", False),
    ("17", "17", False),
    ("#### 170", "17", False),
    ("", "17", False),
    ("####", "17", False),
])
def test_grading(text, answer, right):
    assert data.correct(text, answer) is right


def test_read_samples_takes_the_common_field_names(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"question": "q", "answer": "a <<1+1=2>>2\n#### 2"}, {"problem": "q", "solution": "a", "answer": "7"},
            {"query": "q", "response": "a"}, {"prompt": "q", "reference": "a"}, {"prompt": "q", "response": "a"},
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    samples = data.read_samples(file)
    assert [s.question for s in samples] == ["q"] * 6
    assert [s.response for s in samples] == ["a 2\n#### 2"] + ["a"] * 5
    assert [s.answer for s in samples[:2]] == ["2", "7"]
    assert [data.ask(s) for s in samples] == [f"{data.INSTRUCTION} q"] * 3 + ["q"] * 2 + [f"{data.INSTRUCTION} q"]
    assert len(data.read_samples(file, 2)) == 2


@pytest.mark.parametrize("line", ["{", "[]", "{}", "3", '{"question": "q"}',
                                  '{"messages": [{"role": "user", "content": "q"}]}'])
def test_read_samples_names_the_bad_line(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n' + line)
    with pytest.raises(ValueError, match="line 2"):
        data.read_samples(file)


def test_responses_are_moved_to_the_first_column():
    batch = next(data.batches([([1, 1, 1], [2, 3]), ([1], [4, 5, 6])], 2))
    tokens, real = batch.responses()
    assert sorted(row[mask].tolist() for row, mask in zip(tokens, real)) == [[2, 3], [4, 5, 6]]
    assert real[:, 0].all()


def test_too_long_samples_are_dropped_and_counted(capsys):
    tokenizer = data.Tokenizer(ROOT / "models" / "tiny-math")
    problems = data.problems("maths", 40, seed=1)
    everything = data.encode_samples(problems, tokenizer)
    limit = sorted(len(p) + len(r) for p, r in everything)[19]
    kept = data.encode_samples(problems, tokenizer, limit)
    assert kept == [pair for pair in everything if sum(map(len, pair)) <= limit]
    assert f"dropped {40 - len(kept)} of 40" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no sample"):
        data.encode_samples(problems, tokenizer, 3)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside this checkout")
@pytest.mark.parametrize("name, rows", [("gsm8k_test", 1319), ("xsum", 200)])
def test_real_sets_are_read_whole(name, rows):
    samples = data.read_samples(SHARED / f"{name}.jsonl")
    assert len(samples) == rows
    if name == "gsm8k_test":
        assert all(data.correct(s.response, s.answer) for s in samples)
        assert not any("<<" in s.response for s in samples)


def test_a_json_list_is_read_as_the_set_of_metamath_is_stored(tmp_path):
    (tmp_path / "MetaMathQA.json").write_text(json.dumps(
        [{"query": "1 + 1?", "response": "It is 2. #### 2\nThe answer is: 2", "type": "GSM_AnsAug",
          "original_question": "2?"}]))
    problem, = data.read_samples(tmp_path / "MetaMathQA.json")
    assert (problem.question, problem.kind) == ("1 + 1?", "maths") and problem.response.startswith("It is 2.")
    (tmp_path / "cut.json").write_text('[{"query": "1 +')
    with pytest.raises(ValueError, match="cut.json is not valid JSON"):
        data.read_samples(tmp_path / "cut.json")


def test_skip_bad_names_what_it_leaves_out(tmp_path, capsys):
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n{"question": "a"\n{"other": 1}\n\n'
                    '{"prompt": "c", "response": "d"}\n')
    with pytest.raises(ValueError, match="line 2.*--skip-bad"):
        data.read_samples(file)
    assert [p.question for p in data.read_samples(file, skip_bad=True)] == ["a", "c"]
    assert "2 bad lines: 2, 3" in capsys.readouterr().err


def test_a_hub_data_set_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub
    asked = []

    def download(repo, name, repo_type):
        asked.append((repo, name, repo_type))
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OSError, match="cannot fetch hf://datasets/meta-math/MetaMathQA/a/b.json: no network$"):
        data.read_samples("hf://datasets/meta-math/MetaMathQA/a/b.json")
    assert asked == [("meta-math/MetaMathQA", "a/b.json", "dataset")]


def test_generated_samples_are_right_answers_and_a_killed_run_goes_on(tmp_path):
    def run(file, *args):
        done = subprocess.run([sys.executable, "data.py", "generate", "--batch", "8", "--n", "2", "--samples", "12",
                               "--only-right", "--temperature", "1.0", "--out", str(file), *args],
                              cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stderr

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run(whole)[0] == 0
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert len(rows) == 12 and all(data.correct(r["response"], r["answer"]) for r in rows)
    assert not any(data.held_out(r["question"]) for r in rows)
    assert len(data.read_samples(whole)) == 12
    cut.write_bytes(whole.read_bytes()[:-150])  # in the middle of a line, as a kill leaves it
    assert run(cut)[0] == 0
    assert cut.read_bytes() == whole.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "mine", "answer": "keep"}\n')
    assert run(other)[0] == 2 and "keep" in other.read_text()
