"""Which answers count as right, F1, ROUGE, evaluation files. Run: python -m pytest tests/test_grading.py"""

import importlib.util
import json
import random
import time
from pathlib import Path

import pytest

import data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

RIGHT = [  # a response and the answer that it gives
    # marks
    ("12 + 5 = 17. #### 17", "17"), ("She makes 9 * 2 = $18 every day.\n#### 18", "18"), ("#### 3\nno, #### 17", "17"),
    ("####17", "17"), ("####\n17", "17"), ("#### 17\n\nI hope this helps. There were 20 eggs.", "17"),
    (r"So $m+n=\boxed{33}$.", "33"), (r"First \boxed{1}, but no: \boxed{2}.", "2"), (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed {7}", "7"), ("Therefore, the answer is 42.", "42"), ("The answer is: **42**", "42"),
    ("**Answer:** 42", "42"), ("**Answer**: $42", "42"), ("Answer:\n42", "42"),
    (r"The final answer is $\boxed{42}$. I hope it is correct.", "42"),
    ("The answer is 5. Wait. The answer is 6.", "6"), ("#### Step 3: conclude\nThe answer is 5.", "5"),
    ("The answer is 3.5. Done.", "3.5"), (r"\boxed{12} and then \boxed{1", "12"),
    # numbers
    ("#### 1,000", "1000"), ("#### 1000.0", "1,000"), ("#### 1000", "1000.00"), ("#### 017", "17"),
    (r"\boxed{25}", "025"), (r"\boxed{025}", "25"), ("#### 109,200,000", "109200000"),
    (r"\boxed{1{,}450{,}000}", "1,450,000"), (r"\boxed{10,\!080}", "10080"), (r"\boxed{10\,080}", "10080"),
    ("#### 17.", "17"), ("#### .5", "0.5"), ("#### 0.50", ".5"), ("#### 5.", "5"), ("#### (17)", "17"),
    ("#### -5", "-5"), ("#### −5", "-5"), ("#### - 5", "-5"), (r"\boxed{-5}", "−5"), ("#### 0", "0"), ("#### -0", "0"),
    # money, percent, units
    ("#### $18", "18"), ("#### $18.00", "18"), (r"#### \$18", "18"), ("#### 18 dollars", "$18"), ("#### -$5", "-5"),
    ("#### $-5", "-5"), ("#### £1,200.50", "1200.5"), ("#### $1.5 million", "1500000"), ("#### 2 thousand", "2,000"),
    ("#### 25%", "25"), (r"\boxed{25\%}", "25"), ("#### 25%", "0.25"), ("#### 0.25", "25%"),
    ("#### 25 percent", "25%"), ("#### 25 per cent", "25"), ("#### 18 eggs", "18"), ("#### 18", "18 eggs"),
    ("#### 1 egg", "1 eggs"), ("#### 60 miles per hour", "60"), ("#### 60 miles/hour", "60"), ("#### 5 cm", "5"),
    ("#### 5cm", "5"), (r"\boxed{5\text{ cm}}", "5"), (r"\boxed{5\,\mathrm{cm}}", r"5 \text{ cm}"),
    (r"\boxed{24 \text{ inches}^2}", "24"), (r"\boxed{90^\circ}", "90"), (r"\boxed{90^{\circ}}", "90°"),
    ("The answer is 18 eggs per day.", "18"), ("The answer is $18 per day.", "18"), ("#### 3 hours", "3 hours"),
    # fractions
    ("#### 3/4", "0.75"), (r"\boxed{\frac{3}{4}}", "3/4"), (r"\boxed{\dfrac34}", "0.75"),
    (r"\boxed{\tfrac{3}{4}}", "6/8"), (r"\boxed{-\frac{1}{2}}", "-0.5"), (r"\boxed{\frac{-1}{2}}", "-1/2"),
    ("#### 1 1/2", "1.5"), ("#### 1 / 2", "0.5"), (r"\boxed{2\frac{1}{2}}", "2.5"), (r"\boxed{\frac{14}{7}}", "2"),
    (r"\boxed{\left(\frac{3}{4}\right)}", "0.75"), ("#### 1/3 of the cake", "1/3"),
    # equations, choices, text
    (r"\boxed{x = 5}", "5"), (r"\boxed{m+n=33}", "33"), (r"\boxed{\textbf{(E) }27}", "27"),
    (r"\boxed{\textbf{(B)}\ 36}", "36"), ("The answer is (B).", "B"), ("The answer is B", "B"), (r"\boxed{B}", "B"),
    (r"\boxed{\text{B}}", "B"), (r"\boxed{\textbf{(B)}}", "B"), ("The correct answer is **B) Paris**", "B"),
    ("Answer: (b)", "B"), ("Answer: b", "B"), ("Answer: C. Ten to the minus nine", "C"),
    ("Some thoughts.\n\n(D)", "D"), ("**D**", "D"), ("#### D", "D"), ("#### Oslo", "Oslo"),
    ("The answer is  oslo.", "Oslo"), (r"\boxed{\text{Evelyn}}", "Evelyn"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"), ("#### 3:30", "3:30"), (r"\boxed{\dfrac{\pi}{2}}", r"\frac{\pi}{2}"),
    (r"\boxed{x^{2}+1}", "x^2 + 1"), (r"$\boxed{\left( 3, \frac{\pi}{2} \right)}$", r"(3,\frac{\pi}{2})"),
    (r"\boxed{p - q}", "p-q"), (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
]

WRONG = [
    # nothing is stated
    ("", "17"), ("17", "17"), ("So she has 17 eggs", "17"), ("####", "17"), ("#### ", "17"), (r"\boxed{}", "17"),
    (r"\boxed{17", "17"), ("The answer is", "17"), ("The answer isn't 17", "17"), ("#### 17", ""), ("####", ""),
    ("The answer is not 17.", "17"), ("The answer is either 17 or 18", "17"), ("Is the answer 17?", "17"),
    # another mark comes later
    ("#### 17\nno, #### 18", "17"), (r"\boxed{17}, or rather \boxed{18}", "17"),
    (r"The answer is 17. \boxed{18}", "17"),
    # other numbers
    ("#### 170", "17"), ("#### 1.7", "17"), ("#### 017.5", "17"), ("#### -17", "17"), ("#### 17", "-17"),
    ("#### 1,000", "1"), ("#### 1,00", "100"), ("#### 1,0000", "10000"), ("#### 1.000", "1000"),
    ("#### 1,000", "1.000"), ("#### 12.5.6", "12.5"), ("#### 1 7", "17"), ("#### 17 18", "17"), ("#### 17, 18", "17"),
    ("#### 17, 18", "18"), ("#### 17/18", "17"), ("#### 17 + 18", "17"), ("#### 17 + 18 = 35", "17"),
    ("#### 17-18", "18"), ("#### 17 or 18", "17"), ("#### 17 or 18", "18"), ("#### 17 and 18", "18"),
    ("#### 17 to 18", "17"), ("#### 5 out of 17", "17"), ("#### 5 out of seven", "5"), ("#### 17 more", "17"),
    ("#### more than 17", "17"), ("#### about 17", "17"), ("#### ~17", "17"), ("#### <17", "17"),
    (r"\boxed{\approx 17}", "17"), (r"\boxed{\pm 17}", "17"), (r"\boxed{\sqrt{17}}", "17"), (r"\boxed{17\pi}", "17"),
    (r"\boxed{17x}", "17"), (r"\boxed{17 x}", "17"), (r"\boxed{17xy}", "17"), (r"\boxed{17i}", "17"),
    (r"\boxed{17!}", "17"), (r"\boxed{17^2}", "17"), (r"\boxed{17_{8}}", "17"), (r"\boxed{10_2}", "10"),
    (r"\boxed{|17|}", "-17"), ("#### 5e3", "5"), (r"\boxed{0.\overline{3}}", "0.3"), (r"\boxed{x > 17}", "17"),
    (r"\boxed{2x = 10}", "5"), (r"\boxed{2x = 10}", "10"), (r"\boxed{x = 5 \text{ or } x = 6}", "6"),
    (r"\boxed{x = 5, 6}", "6"), (r"\boxed{x \in \{5\}}", "6"), (r"\boxed{(1,2)}", "12"), ("#### seventeen", "17"),
    ("#### Step 17: conclude", "17"), ("#### 17. Add the numbers", "17"), ("#### 1" * 3, "111"), ("#### 0.333", "1/3"),
    ("#### 33", "33.3"), ("#### 99.99", "100"), ("#### ∞", "0"), ("#### nan", "nan eggs"),
    ("#### 2**3", "23"), ("#### 2^3", "23"),
    # units, money, percent
    ("#### 5 hours", "5 minutes"), ("#### 5 minutes", "300 seconds"), ("#### 18 cents", "$18"), ("#### £18", "$18"),
    ("#### 5 million", "5"), ("#### 5", "5 million"), ("#### 5 dozen", "5"), ("#### 5 and a half", "5"),
    ("#### 2 thirds", "2"), ("#### 5 hundred", "5"), ("#### 25%", "2500"), ("#### 25", "0.25"), ("#### 0.25", "25"),
    ("#### 2.5%", "25"), ("#### 5 cm", "5 cm^2"), ("#### 50% of 20", "50"), ("#### 5 feet 3 inches", "5"),
    ("#### 5 minus x", "5"), ("#### $5 and $6", "5"), ("#### 5k", "5"), ("#### 5 is wrong", "5"),
    # fractions
    (r"\boxed{\frac{3}{4}}", "34"), (r"\boxed{\frac{3}{4}}", "3"), (r"\boxed{\frac{4}{3}}", "3/4"),
    ("#### 1 1/2", "11/2"), (r"\boxed{2\frac{1}{2}}", "1"), (r"\boxed{2\frac{1}{2}}", "21/2"), ("#### 3/0", "3"),
    ("#### 1/2/3", "1/2"), ("#### 3/4.5", "3/4"), (r"\boxed{\frac123}", "1/23"), ("#### 2 3/2", "3.5"),
    # choices and text
    ("The answer is (A).", "B"), ("The answer is (A) and (B).", "A"), ("The answer is (A) and (B).", "B"),
    ("A or B", "A"), ("The answer is A or B", "A"), ("The answer is A, B", "A"), ("The answer is A. B", "B"),
    ("The answer is (A)(B)", "A"), ("The answer is a cat", "A"), ("The answer is A cat", "A"), ("I think so", "I"),
    ("The answer is (A): no, (B)", "A"), ("Answer: not B", "B"), ("The answer is (A) is wrong", "A"),
    (r"\boxed{AB}", "A"), (r"\boxed{AB}", "B"),
    ("Answer: 2", "B"), ("B is what I mean", "B"), ("The answer is Beijing", "B"), ("#### Oslo", "Rome"),
    ("#### Oslo or Rome", "Rome"), (r"\boxed{B}", "27"), (r"\boxed{\textbf{(E) }27}", "28"),
    (r"\boxed{\frac{\pi}{2}}", r"\frac{\pi}{3}"), (r"\boxed{(1,2)}", "(2,1)"), (r"\boxed{[1,2]}", "(1,2)"),
    (r"\boxed{1 2}", "12"), (r"\boxed{x^{23}}", "x^{2}3"), (r"\boxed{\sqrt{2}}", r"\sqrt{3}"),
    (r"\boxed{5 \text{ or } \sqrt{2}}", "5"), (r"\boxed{(-\infty, 3]}", r"(-\infty, 3)"),
]


@pytest.mark.parametrize("text, answer", RIGHT)
def test_right(text, answer):
    assert data.correct(text, answer)


@pytest.mark.parametrize("text, answer", WRONG)
def test_a_wrong_answer_never_counts(text, answer):
    assert not data.correct(text, answer)


MEANING = [  # equal in meaning, not as text: only math-verify can tell
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}", True), (r"1+x^2+\frac{x}{2}", r"\frac{x}{2}+x^2+1", True),
    (r"\sqrt{4}", "2", True), (r"2\cdot 3", "6", True), (r"\frac{1}{3}", "0.333333", False),
    (r"\sqrt{2}", "1.41421", False), (r"\pi", "3.14159", False), (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{2}}{2}", False),
    (r"x > \sqrt{2}", r"x \geq \sqrt{2}", False), (r"5, \sqrt{2}", r"\sqrt{2}", False),
    (r"\pm\sqrt{2}", r"\sqrt{2}", False),
]


@pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="math-verify is not installed")
@pytest.mark.parametrize("found, answer, right", MEANING)
def test_latex_by_meaning(found, answer, right):
    assert data.correct(rf"\boxed{{{found}}}", answer) is right


def test_without_math_verify_latex_is_text_and_that_is_said_once(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)  # its import fails
    data.math_verify.cache_clear()
    for found, answer, _ in MEANING:
        assert not data.correct(rf"\boxed{{{found}}}", answer)
    assert capsys.readouterr().err.count("pip install math-verify") == 1
    data.math_verify.cache_clear()


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside this checkout")
@pytest.mark.parametrize("name", ["gsm8k_test", "svamp", "multiarith", "amc23", "aime24"])
def test_real_answers_in_every_dress_and_their_near_misses(name):
    for answer in sorted({p.answer for p in data.read_problems(SHARED / f"{name}.jsonl")})[:100]:
        n = int(answer.replace(",", ""))
        frac = f"\\frac{{{3 * n}}}{{3}}"
        for right in (n, f"{n:,}", f"{n}.0", f"${n}", f"{n:03}", f"{n} things", f"{2 * n}/2", frac):
            for text in (f"\\boxed{{{right}}}", f"#### {right}", f"17, so the answer is {right}."):
                assert data.correct(text, answer)
        for wrong in (n + 1, -n or 1, f"1{n}", f"{n}.5", f"{n} or {n + 1}", f"{n}, {n + 1}", f"{n}x", f"{n + 1}/7"):
            for text in (f"\\boxed{{{wrong}}}", f"#### {wrong}", f"17, so the answer is {wrong}."):
                assert not data.correct(text, answer)


def test_any_text_is_graded_quickly_and_without_an_exception():
    rng, pieces = random.Random(0), ["#### ", "\\boxed{", "}", "{", "$", "answer is ", "1", ",", ".", "/", "\\frac",
                                     " ", "-", "a", "ab ", "%", "\n", "(A) ", "\\text{", "^", "∞", "٣", "="]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 14)))
        assert data.correct(text, "9217") is False
        data.correct(text, text)
    start = time.perf_counter()
    for text in ("#### " + "1" * 10000, "#### " + "1," * 5000, "\\boxed{" * 3000, "#### 1 " + "aa " * 5000, "$" * 9999,
                 "#### 1" + " " * 20000 + "!", "answer is " * 3000):
        assert not data.correct(text, "17")
    assert time.perf_counter() - start < 10


def test_f1_and_rouge():
    assert data.f1("The cat sat.", "a cat sat") == 1 and data.f1("dog", "cat") == 0 == data.f1("", "cat")
    assert data.f1("the black cat", "cat") == pytest.approx(2 / 3)
    r = data.rouge("the cat was found under the bed", "the cat was under the bed")
    assert r == pytest.approx({"rouge1": 12 / 13, "rouge2": 8 / 11, "rougeL": 12 / 13})
    assert data.rouge("b a", "a b") == pytest.approx({"rouge1": 1, "rouge2": 0, "rougeL": 0.5})
    assert data.rouge("", "a b") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def write(tmp_path, *rows):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_read_problems_knows_the_common_sets(tmp_path):
    gpqa = {"Question": "q", "Correct Answer": "yes"} | {f"Incorrect Answer {i}": f"no{i}" for i in (1, 2, 3)}
    problems = data.read_problems(write(
        tmp_path, {"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        {"problem": "q", "solution": "s", "answer": "\\frac{1}{2}", "level": 3},
        {"question": "q", "options": ["x", "y"], "answer": "B"}, {"question": "q", "choices": ["x", "y"],
            "answer": 1}, gpqa,
        {"context": "c", "question": "q", "answers": ["a"]}, {"prompt": "c", "reference": "a"}))
    assert [p.kind for p in problems] == ["maths"] * 2 + ["choice"] * 3 + ["passage", "summary"]
    assert [p.answer for p in problems[:4]] == ["2", "\\frac{1}{2}", "B", "B"]
    assert [p.level for p in problems[:2]] == [1, 3]
    assert "(A) x\n(B) y" in problems[2].question and f"({problems[4].answer}) yes" in problems[4].question
    assert data.ask(problems[0]).startswith(data.INSTRUCTION) and "boxed" in data.ask(problems[0])
    assert data.ask(problems[5]) == "c\nq" and data.ask(problems[6]) == "c"
    assert data.scores(problems[0], "#### 2") == {"accuracy": 1.0}
    assert data.scores(problems[5], "A.") == data.scores(problems[5], "The answer is a.")
    assert data.scores(problems[6], "a\n### Article: b") == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1.0}


@pytest.mark.parametrize("row", [{}, [], {"question": "q"}, {"question": "q", "options": ["x"], "answer": "B"},
    {"answer": "1"},
                                 {"question": "q", "options": ["x"], "answer": 4}, {"context": "c", "answer": "a"}])
def test_read_problems_names_the_bad_line(tmp_path, row):
    with pytest.raises(ValueError, match="line 2"):
        data.read_problems(write(tmp_path, {"question": "q", "answer": "a"}, row))
