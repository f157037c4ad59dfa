"""Rows and files of public data sets. Run: python -m pytest tests/test_datasets.py"""

import json
import random
import sys
from dataclasses import astuple

import pytest

import data
from paper import datasets
from test_data import SHARED, is_read_as, read_fails, write

GPQA = {"Question": "q", "Correct Answer": "yes", "Incorrect Answer 1": "no1",
        "Incorrect Answer 2": "no2", "Incorrect Answer 3": "no3", "Explanation": "because"}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
         {"from": "human", "value": "more"}, {"from": "gpt", "value": "bye"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": r"\boxed{3}"}]

# a row as published, with columns that say nothing: (question, response, answer, kind, level)
ROWS = {
    "AMC": ({"problem": "q", "answer": "7", "id": 3, "url": "u"}, ("q", "", "7", "maths", None)),
    "AMC, a number": ({"problem": "q", "answer": 7}, ("q", "", "7", "maths", None)),
    "AMC, a decimal": ({"problem": "q", "answer": 27.0}, ("q", "", "27.0", "maths", None)),
    "AIME": ({"ID": "2024-I-1", "Problem": "q", "Solution": "s", "Answer": 204},
             ("q", "s", "204", "maths", None)),
    "MATH": ({"problem": "q", "solution": r"so \boxed{7}", "level": "Level 3", "type": "Algebra"},
             ("q", r"so \boxed{7}", "7", "maths", "Level 3")),
    "MATH, no braces": ({"problem": "q", "solution": r"so $\boxed 2$.", "level": "Level 1"},
                        ("q", r"so $\boxed 2$.", "2", "maths", "Level 1")),
    "MATH-500": ({"problem": "q", "solution": "a", "answer": r"\frac{1}{2}", "level": 3,
                  "subject": "Algebra", "unique_id": "test/1"},
                 ("q", "a", r"\frac{1}{2}", "maths", 3)),
    "null question": ({"question": None, "problem": "q", "answer": "7"},
                      ("q", "", "7", "maths", None)),
    "GSM8K with a source": ({"question": "q", "answer": "a <<1+1=2>>2\n#### 2", "source": "x"},
                            ("q", "a 2\n#### 2", "2", "maths", 1)),
    "prompt and response with a source": ({"prompt": "q", "response": "a", "source": "x"},
                                          ("q", "a", "", "text", None)),
    "MetaMathQA": ({"query": "q", "response": "It is 2. #### 2\nThe answer is: 2", "type": "GSM",
                    "original_question": "o"},
                   ("q", "It is 2. #### 2\nThe answer is: 2", "2", "maths", None)),
    "OpenMathInstruct-2": ({"problem": "q", "generated_solution": r"\boxed{2}",
                            "expected_answer": "2", "problem_source": "math"},
                           ("q", r"\boxed{2}", "2", "maths", None)),
    "OpenMathInstruct-1": ({"question": "q", "generated_solution": r"\boxed{3}",
                            "expected_answer": "2", "is_correct": False},
                           ("q", r"\boxed{3}", "2", "maths", None)),
    "OpenR1-Math": ({"problem": "q", "solution": "s", "answer": "2", "generations": ["a", "b"],
                     "messages": MESSAGES, "uuid": "u"}, ("q", r"\boxed{3}", "2", "maths", None)),
    "NuminaMath": ({"source": "x", "problem": "q", "solution": "s", "messages": MESSAGES},
                   ("q", r"\boxed{3}", "3", "maths", None)),
    "UltraChat": ({"prompt": "q", "prompt_id": "u", "messages": MESSAGES},
                  ("q", r"\boxed{3}", "3", "maths", None)),
    "SVAMP": ({"ID": "chal-1", "Body": "Ann has 8 eggs", "Question": "How many?",
               "Equation": "( 8.0 - 0.0 )", "Answer": 8.0, "Type": "Subtraction"},
              ("Ann has 8 eggs. How many?", "", "8.0", "maths", None)),
    "SVAMP, closed": ({"Body": "Ann has 8. ", "Question": "How many?", "Answer": "8.0"},
                      ("Ann has 8. How many?", "", "8.0", "maths", None)),
    "options": ({"question": "q", "options": ["x", "y"], "answer": "B"},
                ("q\n(A) x\n(B) y", "B", "B", "choice", None)),
    "MMLU": ({"question": "q", "choices": ["x", "y"], "answer": 0, "subject": "s"},
             ("q\n(A) x\n(B) y", "A", "A", "choice", None)),
    "MMLU-Pro": ({"question": "q", "options": ["x", "y", "z"], "answer": "C", "answer_index": 2,
                  "cot_content": ""}, ("q\n(A) x\n(B) y\n(C) z", "C", "C", "choice", None)),
    "options as an object": ({"question": "q", "options": {"A": "Rome", "B": "Paris"},
                              "answer": "B"},
                             ("q\n(A) Rome\n(B) Paris", "B", "B", "choice", None)),
    "the option's text": ({"question": "q", "choices": ["Rome", "Paris"], "answer": " paris"},
                          ("q\n(A) Rome\n(B) Paris", "B", "B", "choice", None)),
    "a small letter": ({"question": "q", "choices": ["x", "y"], "answer": "(b)"},
                       ("q\n(A) x\n(B) y", "B", "B", "choice", None)),
    "a position in text": ({"question": "q", "choices": ["x", "y"], "answer": "1"},
                           ("q\n(A) x\n(B) y", "B", "B", "choice", None)),
    "a number that is an option": ({"question": "q", "choices": ["1", "0"], "answer": "1"},
                                   ("q\n(A) 1\n(B) 0", "A", "A", "choice", None)),
    "ARC": ({"id": "x", "question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
             "answerKey": "B"}, ("q\n(A) x\n(B) y", "B", "B", "choice", None)),
    "ARC, digits": ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                     "answerKey": "1"}, ("q\n(A) x\n(B) y", "A", "A", "choice", None)),
    "AQuA-RAT": ({"question": "q", "options": ["A)21", "B)22"], "rationale": "so 22",
                  "correct": "B"}, ("q\n(A) 21\n(B) 22", "so 22", "B", "choice", None)),
    "RACE": ({"article": "c", "question": "q", "options": ["x", "y"], "answer": "A"},
             ("c\nq\n(A) x\n(B) y", "A", "A", "choice", None)),
    "reading": ({"context": "c", "question": "q", "answer": "a"},
                ("c\nq", "a", "a", "passage", None)),
    "several answers": ({"context": "c", "question": "q", "answers": ["a", "b"]},
                        ("c\nq", "a", "a", "passage", None)),
    "SQuAD": ({"id": "x", "title": "t", "context": "c", "question": "q",
               "answers": {"text": ["a", "b"], "answer_start": [13, 13]}},
              ("c\nq", "a", "a", "passage", None)),
    "GRIFFIN's XSum": ({"prompt": "q", "reference": "The answer is near."},
                       ("q", "The answer is near.", "The answer is near.", "summary", None)),
    "XSum": ({"document": "d", "summary": "s", "id": "1"},
             (f"d\n\n{datasets.SUMMARIZE}", "s", "s", "summary", None)),
    "CNN/DailyMail": ({"article": "d", "highlights": "s", "id": "1"},
                      (f"d\n\n{datasets.SUMMARIZE}", "s", "s", "summary", None)),
    "Alpaca": ({"instruction": "q", "input": "i", "output": "a"},
               ("q\ni", "a", "", "text", None)),
    "Alpaca without an input": ({"instruction": "q", "input": "", "output": r"\boxed{5}"},
                                ("q", r"\boxed{5}", "5", "maths", None)),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "x"},
              ("q\nc", "a", "", "text", None)),
    "TRL": ({"prompt": "q", "completion": "a"}, ("q", "a", "", "text", None)),
    "TRL, turns": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
                   ("q", r"\boxed{3}", "3", "maths", None)),
    "ShareGPT": ({"id": "x", "conversations": TURNS}, ("q", "a", "", "text", None)),
    "OpenThoughts": ({"system": "s", "conversations": TURNS}, ("s\n\nq", "a", "", "text", None)),
    "OpenOrca": ({"id": "x", "system_prompt": "s", "question": "q", "response": "a"},
                 ("s\nq", "a", "", "text", None)),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_a_row_is(tmp_path, name):
    is_read_as(tmp_path, *ROWS[name])


@pytest.mark.parametrize("name", ROWS)
def test_null_columns_change_nothing(name):
    """One schema for all rows: what a row does not have is null."""
    row, expected = ROWS[name]
    nulls = dict.fromkeys(["context", "options", "choices", "messages", "answers", "image",
                           "conversations", "reference", "instruction", "input"])
    assert astuple(data.problem_from_row(nulls | row)) == expected


def test_gpqa_becomes_multiple_choice():
    """In an order that the question decides, which differs between questions."""
    problems = [data.problem_from_row(GPQA | {"Question": f"q{i}"}) for i in range(8)]
    for problem in problems:
        assert problem.kind == "choice" and f"\n({problem.answer}) yes" in problem.question
        assert all(f" no{i}" in problem.question for i in (1, 2, 3))
    assert len({problem.answer for problem in problems}) > 1
    assert problems[3] == data.problem_from_row(GPQA | {"Question": "q3"})


@pytest.mark.parametrize("row, says", [
    # published sets that are none of these: their columns are named
    ({"ctx": "c", "endings": ["x", "y"], "label": "1"}, "endings may belong to the question"),
    ({"sentence": "s", "option1": "x", "option2": "y", "answer": "1"}, "sentence, option1, opt"),
    ({"premise": "p", "hypothesis": "h", "label": 0}, "premise, hypothesis may belong"),
    ({"story": "s", "questions": ["q"], "answers": ["a"]}, "columns story, questions, answers"),
    ({"text": "a whole document"}, "columns text;"),
    ({"data": [{"question": "q"}]}, "columns data;"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "in the columns prompt, chosen, rejected"),
    ({"task_id": 1, "prompt": "q", "canonical_solution": "a"}, "task_id, prompt, canonical"),
    ({"inputs": "q", "targets": "a"}, "inputs may belong"),
    # what belongs to a question is not left out
    ({"question": "q", "image": "a.png", "answer": "1"}, "image may belong"),
    ({"problem": "q", "image_1": {"bytes": "x"}, "answer": "1"}, "image_1 may belong"),
    ({"question": "q", "table": [["a"]], "answer": "1"}, "table may belong"),
    ({"question": "q", "choices": ["x", "y"], "hint": "h", "answer": 0}, "hint may belong"),
    ({"messages": MESSAGES, "tools": [{"name": "f"}], "answer": "1"}, "tools may belong"),
    # an answer is text or a number
    ({"question": "q", "answer": {"value": "Paris", "aliases": ["p"]}, "source": "x"}, "'value'"),
    ({"problem": "q", "answer": ["2"]}, "answer is ['2'], not text"),
    ({"passage": "c", "question": "q", "answer": True}, "answer is True, not text"),
    ({"problem": "q", "expected_answer": {"a": 1}}, "answer is {'a': 1}, not text"),
    ({"question": "q", "solution": ["s"], "final_answer": ["2"]}, "solution is ['s'], not text"),
    ({"context": {"title": ["t"]}, "question": "q", "answer": "a"}, "context is {'title'"),
    ({"context": "c", "question": "q", "answers": "a"}, "answers is 'a', not texts"),
    ({"context": "c", "question": "q", "answers": {"text": []}}, "not texts in a list"),
    ({"context": "c", "question": "q", "answers": [["a"]]}, "answer is ['a'], not text"),
    ({"context": "c", "question": "q", "answers": [3, 4], "answer": 3}, "answer and answers"),
    ({"context": "c", "question": "q"}, "no "),
    ({"context": "c", "answer": "a"}, "context, answer"),
    ({"Body": "b", "Question": "q"}, "no "), ({"Body": "b", "Answer": 1}, "columns body, answer"),
    ({"document": ["d"], "summary": "s"}, "document is ['d'], not text"),
    ({"document": "d", "summary": 5}, "summary is 5, not text"),
    ({"prompt": "q", "reference": ["r"]}, "reference is ['r'], not text"),
    ({"instruction": "q", "output": None}, "columns instruction;"),
    ({"instruction": "q", "output": {"a": 1}}, "output is {'a': 1}, not text"),
    # one column for each thing
    ({"question": "q", "problem": "p", "answer": "1"}, "question and problem, of which one"),
    ({"question": "q", "Question": "p", "answer": "1"}, "two columns have one name"),
    ({"question": "q", "options": ["x", "y"], "choices": ["z", "w"], "answer": "A"}, "options and"),
    ({"problem": "q", "solution": "s", "response": "r", "answer": "1"}, "response and solution"),
    # options
    ({"question": "q", "options": ["x"], "answer": "A"}, "not a list of 2 to 10 texts"),
    ({"question": "q", "options": ["x", "y"], "answer": "C"}, "'C' is that of 0 of the options"),
    ({"question": "q", "options": ["x", "y"], "answer": 2}, "answer is 2, not an option's"),
    ({"question": "q", "options": ["x", "y"], "answer": -1}, "answer is -1, not an option's"),
    ({"question": "q", "options": ["x", "y"], "answer": True}, "answer is True, not an option's"),
    ({"question": "q", "options": ["x", "y"], "answer": "AB"}, "'AB' is that of 0 of the options"),
    ({"question": "q", "options": ["x", "y"]}, "answer is None, not an option's"),
    ({"question": "q", "options": ["x", "x"], "answer": "x"}, "that of 2 of the options"),
    ({"question": "q", "options": ["B", "A"], "answer": "A"}, "that of 2 of the options"),
    ({"question": "q", "options": ["x", 3], "answer": "A"}, "of which each must be a text"),
    ({"question": "q", "options": "x, y", "answer": "A"}, "not a list of 2 to 10 texts"),
    ({"question": "q", "choices": list("0123456789X"), "answer": 0}, "not a list of 2 to 10"),
    ({"question": "q", "choices": {"text": ["x", "y"], "label": ["A"]}, "answerKey": "A"}, "each"),
    ({"question": "q", "choices": {"text": ["x", "y"], "label": "AB"}, "answerKey": "A"}, "opt"),
    (GPQA | {"Incorrect Answer 3": None}, "of which each must be a text"),
    (GPQA | {"Question": 5}, "question is 5, not text"),
    # chats
    ({"conversations": "hello"}, "a chat is a list of turns"),
    ({"conversations": [{"from": "tool", "value": "v"}]}, "a turn is by 'tool', not by one of"),
    ({"conversations": [{"value": "v"}]}, "a turn is by None, not by one of"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "one of them the user's"),
    ({"conversations": [{"from": "human", "value": 5}]}, "content is 5, not text"),
    ({"conversations": TURNS, "messages": MESSAGES}, "messages and conversations, of which one"),
    ({"prompt": ["q"], "completion": ["a"]}, "a chat is a list of turns"),
])
@pytest.mark.parametrize("evaluation", [False, True])
def test_another_row_is_refused_in_one_line(tmp_path, row, says, evaluation):
    read_fails(write(tmp_path, row), says, evaluation)
    read_fails(write(tmp_path, row), "line 1: ", evaluation)


def test_any_row_is_a_problem_or_a_value_error():
    """Of all columns that are known, with values of all types."""
    rng = random.Random(0)
    columns = sorted({column for row, _ in ROWS.values() for column in row} | set(GPQA))
    values = ["q", "A", "", " ", "1", 1, 0, -1, 2.5, float("nan"), True, None, [], {}, ["x", "y"],
              {"A": "x", "B": "y"}, {"text": ["x", "y"], "label": ["A", "B"]}, [["x"]], [1, 2],
              MESSAGES, TURNS, [{"role": ["user"], "content": "q"}], [{"from": {}}], {"text": "x"}]
    read = 0
    for _ in range(20_000):
        row = {column: rng.choice(values) for column in rng.sample(columns, rng.randint(1, 5))}
        try:
            problem = data.problem_from_row(row)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(text, str) for text in astuple(problem)[:4])
            assert problem.kind in data.KINDS
            read += 1
    assert read > 100


def test_json_that_is_not_one_object_per_line(tmp_path):
    for text in ('{\n "question": "q",\n "answer": "2"\n}', '{"data": [\n{"question": "q"}\n]}'):
        read_fails(write(tmp_path, text), "line 1 (one whole object) is not valid JSON", False)
    file = write(tmp_path, json.dumps({"data": [{"question": "q"}]}))
    read_fails(file, "no data set is known with the columns data; a row needs", True)


@pytest.mark.parametrize("row, says", [
    ({"problem": "q", "answer": "7"}, "its columns are problem, answer; without paper/datasets.py"),
    ({"question": "q", "answer": "7", "source": "x"}, "answer, source; without paper/datasets.py"),
])
def test_without_paper_another_row_is_refused_in_one_line(tmp_path, monkeypatch, row, says):
    import paper
    monkeypatch.delattr(paper, "datasets")
    monkeypatch.setitem(sys.modules, "paper.datasets", None)  # its import fails
    read_fails(write(tmp_path, row), says, True)
    read_fails(write(tmp_path, row), data.NEEDED, True)
    assert data.read_problems(write(tmp_path, {"question": "q", "answer": "7"}))[0].answer == "7"


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside this checkout")
@pytest.mark.parametrize("name, rows", [
    ("svamp", 1000), ("multiarith", 600), ("amc23", 40), ("aime24", 30), ("xsum", 200)])
def test_real_sets_are_read_whole(name, rows):
    problems = data.read_problems(SHARED / f"{name}.jsonl", evaluation=True)
    kind = "summary" if name == "xsum" else "maths"
    assert len(problems) == rows and {problem.kind for problem in problems} == {kind}
    instructed = [data.ask(problem).startswith(data.INSTRUCTION) for problem in problems]
    assert all(instructed) if kind == "maths" else not any(instructed)
    if name == "xsum":
        assert data.read_problems(SHARED / "xsum.jsonl") == problems


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
    with pytest.raises(OSError, match="hf://meta-math/MetaMathQA is not hf://datasets/OWNER"):
        data.read_problems("hf://meta-math/MetaMathQA")


def test_a_file_of_a_hub_data_set_is_read_where_it_was_fetched(tmp_path, monkeypatch):
    file = write(tmp_path, {"query": "q", "response": "#### 1"})
    monkeypatch.setattr(datasets, "download", {"hf://datasets/a/b/c.jsonl": file}.get)
    assert data.read_problems("hf://datasets/a/b/c.jsonl")[0].answer == "1"
