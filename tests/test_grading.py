"""Which answers count as right. Run: python -m pytest tests/test_grading.py"""

import importlib.util
import random
import sys
import warnings
from pathlib import Path

import pytest

import data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None

RIGHT = {  # responses, and the answer that they give
    "marks": [
        ("12 + 5 = 17. #### 17", "17"), ("She makes 9 * 2 = $18 every day.\n#### 18", "18"),
        ("#### 3\nno, #### 17", "17"), ("####17", "17"), ("####\n17", "17"),
        ("#### 17\n\nI hope this helps. There were 20 eggs.", "17"), ("#### 17.", "17"),
        (r"So $m+n=\boxed{33}$.", "33"), (r"First \boxed{1}, but no: \boxed{2}.", "2"),
        (r"\boxed{\boxed{5}}", "5"), (r"\boxed {7}", "7"), (r"\boxed{12} and then \boxed{1", "12"),
        (r"The final answer is $\boxed{42}$. I hope it is correct.", "42"),
        ("Therefore, the answer is 42.", "42"), ("The answer is: **42**", "42"),
        ("**Answer:** 42", "42"), ("**Answer**: $42", "42"), ("Answer:\n42", "42"),
        ("The answer is 5. Wait. The answer is 6.", "6"), ("The answer is 3.5. Done.", "3.5"),
        ("#### Step 3: conclude\nThe answer is 5.", "5"),
    ],
    "numbers": [
        ("#### 1,000", "1000"), ("#### 1000.0", "1,000"), ("#### 1000", "1000.00"),
        ("#### 017", "17"), (r"\boxed{025}", "25"), ("#### 109,200,000", "109200000"),
        (r"\boxed{1{,}450{,}000}", "1,450,000"), (r"\boxed{10,\!080}", "10080"),
        (r"\boxed{10\,080}", "10080"), ("#### .5", "0.5"), ("#### 0.50", ".5"), ("#### 5.", "5"),
        ("#### -5", "-5"), ("#### −5", "-5"), ("#### - 5", "-5"), (r"\boxed{-5}", "−5"),
        ("#### -0", "0"), ("#### 3/4", "0.75"), (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{\dfrac34}", "0.75"), (r"\boxed{\tfrac{3}{4}}", "6/8"), ("#### 1 / 2", "0.5"),
        (r"\boxed{-\frac{1}{2}}", "-0.5"), (r"\boxed{\frac{-1}{2}}", "-1/2"),
        (r"\boxed{\frac{14}{7}}", "2"), (r"\boxed{x = 5}", "5"), (r"\boxed{m+n=33}", "33"),
        (r"\boxed{\textbf{(E) }27}", "27"), (r"\boxed{\textbf{(B)}\ 36}", "36"),
    ],
    "money, percent, units": [
        ("#### $18", "18"), ("#### $18.00", "18"), (r"#### \$18", "18"), ("#### -$5", "-5"),
        ("#### $-5", "-5"), ("#### 18 dollars", "$18"), ("#### $1,200.50", "1200.5"),
        ("#### 25%", "25"),
        (r"\boxed{25\%}", "25"), ("#### 25 percent", "25%"),
        ("#### 18 eggs", "18"), ("#### 18", "18 eggs"), ("#### 2 apples", "2 apples"),
        ("#### 60 miles per hour", "60"), ("#### 60 miles/hour", "60"), ("#### 5 cm", "5"),
        ("#### 5cm", "5"), (r"\boxed{5\text{ cm}}", "5"), ("#### 3 hours", "3 hours"),
        (r"\boxed{5\,\mathrm{cm}}", r"5 \text{ cm}"), (r"\boxed{24 \text{ inches}^2}", "24"),
        (r"\boxed{90^\circ}", "90"), (r"\boxed{90^{\circ}}", "90°"), ("#### 90 degrees", "90°"),
        ("The answer is 18 eggs per day.", "18"), ("The answer is $18 per day.", "18"),
        (r"The answer is $\$18$.", "18"), ("#### 18~\\text{cm}", "18"),
        ("#### 1/3 cup", "1/3"), (r"\boxed{\frac{1}{2} \text{ cup}}", "0.5"),
    ],
    "choices": [
        ("The answer is (B).", "B"), ("The answer is B", "B"), (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"), (r"\boxed{\textbf{(B)}}", "B"), ("Answer: (b)", "B"),
        (r"\boxed{C}", r"\text{(C)}"), ("The answer is (B) a dog", "B"),
        ("The correct answer is **B) Paris**", "B"), ("Answer: b", "B"), ("#### D", "D"),
        ("Answer: C. Ten to the minus nine", "C"), ("Some thoughts.\n\n(D)", "D"), ("**D**", "D"),
    ],
    "text": [
        ("#### Oslo", "Oslo"), ("The answer is  oslo.", "Oslo"), ("#### 3:30", "3:30"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"), (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{\dfrac{\pi}{2}}", r"\frac{\pi}{2}"), (r"\boxed{x^{2}+1}", "x^2 + 1"),
        (r"$\boxed{\left( 3, \frac{\pi}{2} \right)}$", r"(3,\frac{\pi}{2})"),
        (r"\boxed{\begin{pmatrix} -1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}-1\\2\end{pmatrix}"),
        (r"\boxed{p - q}", "p-q"), (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
    ],
}

WRONG = {
    "nothing is stated": [
        ("", "17"), ("17", "17"), ("So she has 17 eggs", "17"), ("####", "17"), ("#### ", "17"),
        (r"\boxed{}", "17"), (r"\boxed{17", "17"), ("The answer is", "17"), ("#### 17", ""),
        ("The answer isn't 17", "17"), ("The answer is not 17.", "17"), ("####", ""),
        ("The answer is either 17 or 18", "17"), ("Is the answer 17?", "17"),
    ],
    "a later mark says otherwise": [
        ("#### 17\nno, #### 18", "17"), (r"\boxed{17}, or rather \boxed{18}", "17"),
        (r"The answer is 17. \boxed{18}", "17"),
    ],
    "another number": [
        ("#### 170", "17"), ("#### 1.7", "17"), ("#### 017.5", "17"), ("#### -17", "17"),
        ("#### 17", "-17"), ("#### 1,000", "1"), ("#### 1,00", "100"), ("#### 1,0000", "10000"),
        ("#### 1.000", "1000"), ("#### 1,000", "1.000"), (r"\boxed{1{,}5}", "15"),
        ("#### 12.5.6", "12.5"), ("#### 1 7", "17"), ("#### 33", "33.3"), ("#### 99.99", "100"),
        ("#### 0.333", "1/3"), ("#### ∞", "0"), ("#### nan", "nan eggs"), ("#### 1" * 3, "111"),
        (r"\boxed{\frac{3}{4}}", "34"), (r"\boxed{\frac{3}{4}}", "3"), ("#### 17/18", "17"),
        (r"\boxed{\frac{4}{3}}", "3/4"), ("#### 1 1/2", "11/2"), (r"\boxed{2\frac{1}{2}}", "1"),
        (r"\boxed{2\frac{1}{2}}", "21/2"), ("#### 3/0", "3"), ("#### 1/2/3", "1/2"),
        ("#### 3/4.5", "3/4"), ("#### 2 3/2", "3.5"),
        (r"\boxed{0.\overline{3}}", "0.3"), ("#### 5e3", "5"),
    ],
    "more than one number": [
        ("#### 17 18", "17"), ("#### 17, 18", "17"), ("#### 17, 18", "18"), ("#### 17 + 18", "17"),
        ("#### 17 + 18 = 35", "17"), ("#### 17-18", "18"), ("#### 17 or 18", "17"),
        ("#### 17 or 18", "18"), ("#### 17 and 18", "18"), ("#### 17 to 18", "17"),
        ("#### 5 out of 17", "17"), ("#### 5 out of seven", "5"), ("#### $5 and $6", "5"),
        ("#### 5 feet 3 inches", "5"), ("#### 50% of 20", "50"), (r"\boxed{(1,2)}", "12"),
        (r"\boxed{x = 5 \text{ or } x = 6}", "6"), (r"\boxed{x = 5, 6}", "6"),
        ("#### Step 17: conclude", "17"), ("#### 17. Add the numbers", "17"),
    ],
    "more than a number": [
        ("#### 17 more", "17"), ("#### more than 17", "17"), ("#### about 17", "17"),
        ("#### ~17", "17"), ("#### <17", "17"), (r"\boxed{\approx 17}", "17"),
        (r"\boxed{\pm 17}", "17"), (r"\boxed{\sqrt{17}}", "17"), (r"\boxed{17\pi}", "17"),
        (r"\boxed{17x}", "17"), (r"\boxed{17 x}", "17"), (r"\boxed{17xy}", "17"),
        ("#### 17 xyz", "17"), (r"\boxed{17xyz}", "17"), (r"\boxed{17 abc}", "17"),
        (r"\boxed{17i}", "17"), (r"\boxed{17!}", "17"), (r"\boxed{17^2}", "17"),
        (r"\boxed{17_{8}}", "17"), (r"\boxed{10_2}", "10"), (r"\boxed{|17|}", "-17"),
        (r"\boxed{x > 17}", "17"), (r"\boxed{2x = 10}", "5"), (r"\boxed{2x = 10}", "10"),
        (r"\boxed{x \in \{5\}}", "6"), ("#### seventeen", "17"), ("#### 2**3", "23"),
        ("#### 2^3", "23"), ("#### 5 minus x", "5"), ("#### 5 is wrong", "5"),
        ("#### 5 factorial", "5"), ("#### 17 times", "17"), ("#### 17 five", "17"),
        ("#### 17 approximately", "17"), ("#### 17 twenty", "17"), ("#### 17 point", "17"),
        ("#### 5 times two", "5"), ("#### 5 below zero", "5"),
    ],
    "another unit": [
        ("#### 5 hours", "5 minutes"), ("#### 5 minutes", "300 seconds"), ("#### 5 million", "5"),
        ("#### £18", "$18"), ("#### 5", "5 million"), ("#### 5k", "5"),
        ("#### 5 dozen", "5"), ("#### 5 and a half", "5"), ("#### 2 thirds", "2"),
        ("#### 5 hundred", "5"), ("#### 25%", "2500"), ("#### 25", "0.25"), ("#### 0.25", "25"),
        ("#### 2.5%", "25"), ("#### 5 cm", "5 cm^2"),
    ],
    "another choice": [
        ("The answer is (A).", "B"), ("The answer is (A) and (B).", "A"), ("A or B", "A"),
        ("The answer is (A) and (B).", "B"), ("The answer is A or B", "A"), ("Answer: 2", "B"),
        ("The answer is A, B", "A"), ("The answer is A. B", "B"), ("The answer is (A)(B)", "A"),
        ("The answer is a cat", "A"), ("The answer is A cat", "A"), ("I think so", "I"),
        ("The answer is (A): no, (B)", "A"), ("Answer: not B", "B"), (r"\boxed{AB}", "A"),
        (r"\boxed{AB}", "B"), ("B is what I mean", "B"),
        ("The answer is Beijing", "B"), (r"\boxed{B}", "27"), (r"\boxed{\textbf{(E) }27}", "28"),
    ],
    "another text": [
        ("#### Oslo", "Rome"), ("#### Oslo or Rome", "Rome"), (r"\boxed{(1,2)}", "(2,1)"),
        (r"\boxed{\frac{\pi}{2}}", r"\frac{\pi}{3}"), (r"\boxed{[1,2]}", "(1,2)"),
        (r"\boxed{1 2}", "12"), (r"\boxed{x^{23}}", "x^{2}3"), (r"\boxed{\sqrt{2}}", r"\sqrt{3}"),
        (r"\boxed{5 \text{ or } \sqrt{2}}", "5"), (r"\boxed{(-\infty, 3]}", r"(-\infty, 3)"),
    ],
}


@pytest.mark.parametrize("topic", RIGHT)
def test_right(topic):
    assert not [case for case in RIGHT[topic] if not data.correct(*case)]


@pytest.mark.parametrize("topic", WRONG)
def test_a_wrong_answer_never_counts(topic):
    assert not [case for case in WRONG[topic] if data.correct(*case)]


MEANING = [  # the same in meaning or not, which the text does not tell
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}", True), (r"\sqrt{4}", "2", True),
    (r"1+x^2+\frac{x}{2}", r"\frac{x}{2}+x^2+1", True), (r"2\cdot 3", "6", True),
    (r"2\frac{1}{2}", "2.5", True), (r"\left(\frac{3}{4}\right)", "0.75", True),
    (r"\frac{1}{3}", "0.333333", False), (r"\sqrt{2}", "1.41421", False),
    (r"\pi", "3.14159", False), (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{2}}{2}", False),
    (r"x > \sqrt{2}", r"x \geq \sqrt{2}", False), (r"5, \sqrt{2}", r"\sqrt{2}", False),
    (r"\pm\sqrt{2}", r"\sqrt{2}", False),
]


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
def test_latex_by_meaning():
    for found, answer, right in MEANING:
        assert data.correct(rf"\boxed{{{found}}}", answer) is right, (found, answer)


def test_without_math_verify_latex_is_text_and_that_is_said_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # its import fails
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")  # as Python has it outside pytest
        for found, answer, _ in MEANING:
            assert not data.correct(rf"\boxed{{{found}}}", answer)
        assert data.correct(r"\boxed{\sqrt{2}}", r"\sqrt2")
    assert len(said) == 1 and "pip install math-verify" in str(said[0].message)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside this checkout")
@pytest.mark.parametrize("name", ["gsm8k_test", "svamp", "multiarith", "amc23", "aime24"])
def test_real_answers_in_every_form_and_their_near_misses(name):
    problems = data.read_problems(SHARED / f"{name}.jsonl", evaluation=True)
    answers = sorted({problem.answer for problem in problems})
    for i, answer in enumerate(answers):
        n = int(answer.replace(",", ""))
        right, wrong = [answer], [n + 1]
        if i % 10 == 0:
            right += [f"{n:,}", f"{n}.0", f"${n}", f"{n:03}", f"{n} things", f"{2 * n}/2",
                      f"\\frac{{{3 * n}}}{{3}}"]
            wrong += [-n or 1, f"1{n}", f"{n}.5", f"{n} or {n + 1}", f"{n}, {n + 1}", f"{n}x",
                      f"{n + 1}/7"]
        for form in ("#### {}", "\\boxed{{{}}}", "The answer is {}."):
            for text in right:
                assert data.correct(form.format(text), answer), (form, text)
            for text in wrong:
                assert not data.correct(form.format(text), answer), (form, text)


def test_any_text_is_graded_without_an_exception():
    pieces = ["#### ", "\\boxed{", "}", "{", "$", "answer is ", "1", ",", ".", "/", "\\frac", " ",
              "-", "a", "ab ", "%", "\n", "(A) ", "\\text{", "^", "∞", "٣", "="]
    rng = random.Random(0)
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 14))) for _ in range(1500)]
    # Long ones too: a pattern that backtracks without end would hang here.
    texts += ["#### " + "1" * 10000, "#### " + "1," * 5000, "\\boxed{" * 3000,
              "#### 1 " + "aa " * 5000, "#### 1 " + "aaa" * 60, "$" * 9999,
              "#### 1" + " " * 20000 + "!", "#### \\text{" + " " * 20000, "answer is " * 3000]
    for text in texts:
        assert data.correct(text, "9217") is False
        data.correct(text, text)
