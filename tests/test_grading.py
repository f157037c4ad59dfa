"""Which answers count as right in paper/. Run: python -m pytest tests/test_grading.py"""

import importlib.util
import random
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data
from paper import grading

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
        (r"\boxed{x \in \{5\}}", "6"), ("#### 2**3", "23"),
        ("#### 2^3", "23"), ("#### 5 minus x", "5"), ("#### 5 is wrong", "5"),
        ("#### 5 factorial", "5"), ("#### 17 times", "17"), ("#### 17 five", "17"),
        ("#### 17 approximately", "17"), ("#### 17 twenty", "17"), ("#### 17 point", "17"),
        ("#### 5 times two", "5"), ("#### 5 below zero", "5"),
    ],
    "another unit": [
        ("#### 5 hours", "5 minutes"), ("#### 5 minutes", "300 seconds"), ("#### 5 million", "5"),
        ("#### £18", "$18"), ("#### 5", "5 million"), ("#### 5k", "5"),
        *[(rf"\boxed{{3{scale}}}", "3") for scale in (
            "億", "亿", "兆", "萬", "億円", "个亿", "元多", "打", "双", "成", "割", "点五", "次方", "以上",
            "억", " lakhs", " lakh", " crores", " lacs", " grosses", " couples", " milliards",
            " fives", " doubles", " M", " G", r"\text{ M}")],
        ("#### R$ 5", "Rs. 5"), ("#### ₩5", "5 yen"), ("The answer is Rs. 50. No, wait.", "50"),
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


FORMS = {  # other languages, tags and currencies; what is not to be read of them
    True: [
        ("Правильный ответ — 42", "42"), ("Het antwoord is 42.", "42"), ("Svaret är 42.", "42"),
        ("Odpowiedź: 42", "42"), ("Odpowiedź to 42.", "42"), ("Cevap: 42", "42"),
        ("उत्तर: 42", "42"), ("सही उत्तर है 42।", "42"), ("الجواب هو 42.", "42"),
        ("الإجابة: 42", "42"),
        ("So.\n<answer>4</answer>", "4"), ("<answer> 4 </answer>\nI hope it helps.", "4"),
        (r"<answer>\boxed{4}</answer>", "4"), ("<Answer>B</Answer>", "B"),
        ("#### ₩42", "42"), ("#### R$ 42", "42"), (r"\boxed{R\$42}", "42"), ("#### Rs. 42", "42"),
        ("The answer is Rs. 42. It is", "42"), ("#### 42 CHF", "42"), ("#### CHF 1'000", "1000"),
        ("#### 42원", "42"), ("#### Rs 42", "42 rupees"), ("#### 3平方米", "3"), ("#### 3小时", "3"),
        ("The answer to this question is 5. However, this is not unique.", "5"),
    ],
    False: [
        ("The answer to this question is 5. However, 6 is better.", "5"),
        ("The answer is 5, but 6 is better.", "5"), ("Svaret är inte 42", "42"),
        ("ответ —42", "42"), ("ответ: —42", "42"), ("Answer - 42", "42"), ("उत्तर 42 43", "42"),
        ("<answer>4", "4"), ("<answer></answer>", "4"), ("<answer>4 or 5</answer>", "4"),
        ("<answer>4</answer> No, wait: 5.", "4"), ("<think><answer>4</answer>", "4"),
        ("<answer>4</answer><answer>5</answer>", "4"), ("#### CHF 42", "$42"),
    ],
}


@pytest.mark.parametrize("right", [True, False])
def test_languages_tags_and_currencies(right):
    assert not [case for case in FORMS[right] if grading.correct(*case) is not right]


REPORTED = {  # what public reports of other graders name, and more of the same kinds
    True: [
        (r"So the total is \boxed{42}. The answer is consistent with the condition.", "42"),
        ("#### 42\n\nThis answer is correct.", "42"),
        ("\\boxed{42}\n\nLet me double-check. Since 6 * 7 = 42, the answer is right.", "42"),
        (r"Therefore, $x = \boxed{5}$. This answer is an integer, as required.", "5"),
        (r"The final answer is $\boxed{\frac{1}{2}}$. This answer is in simplest form.", "1/2"),
        ("#### 18\n\nQuestion: Bob has 3 and buys 2. How many?\nAnswer: 3 + 2 = 5\n#### 5", "18"),
        (r"\fbox{12}", "12"), (r"so we get $\boxed 7$.", "7"), (r"thus \framebox{12}", "12"),
        (r"\boxed{2^{9}}", "512"), (r"\boxed{2^{10}}", "1024"), (r"\boxed{10^6}", "1000000"),
        (r"\boxed{x^2+1}", "1+x^2"), (r"\boxed{(x-1)(x+1)}", "x^2-1"), (r"\boxed{2(x+1)}", "2x+2"),
        (r"\boxed{x^2 + 2x + 1}", "x^{2}+2x+1"), (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
        (r"\boxed{1, -2}", "-2, 1"), (r"\boxed{-2,1}", "1,-2"), (r"\boxed{x \in [2,5)}", "[2,5)"),
        (r"\boxed{(-\infty, 2]}", r"(-\infty,2]"), (r"\boxed{[0, 1/2]}", r"[0,\frac12]"),
        (r"\boxed{[0,0.5]}", r"[0,\frac{1}{2}]"),
        (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{(1/2, 3)}", "(0.5, 3)"),
        (r"\boxed{\begin{pmatrix} -1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}-1\\2\end{pmatrix}"),
        (r"\boxed{\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}}",
         r"\begin{pmatrix} \frac{1}{2} \\ 3 \end{pmatrix}"),
        (r"\boxed{\begin{bmatrix} 1 \\ 3 \end{bmatrix}}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
        ("答案是 42。", "42"), ("答案：42", "42"), (r"所以答案是\boxed{42}。", "42"), (r"\boxed{42元}", "42"),
        (r"\boxed{42\text{元}}", "42"), (r"最终答案是 $\boxed{３}$", "3"),
        ("<think>The answer is 12. Wait, no: 15.</think>\n\nShe has **15** apples.", "15"),
        ("The answer is 3:30 PM.", "3:30 p.m."), ("The answer is 3:30 PM", "3:30 PM"),
        ("The answer is $1.5 million.", "1500000"), ("#### 1.5 million", "1,500,000"),
        ("The answer is €18.", "18"), ("The answer is 18 USD.", "18"),
        ("#### 18.00 dollars", "$18"), ("#### £18", "18"), ("#### ₹1,00,000", "100000"),
        ("#### 18¢", "18"), ("#### 12 m", "12"), ("#### 12 square meters", "12"),
        (r"\boxed{12\ \mathrm{m}^2}", "12"), (r"\boxed{12\text{ sq. units}}", "12"),
        ("#### 12 pieces of cake", "12"), ("#### 12 km/h", "12"), ("#### 5 people left", "5"),
        ("The answer is 1 000.", "1000"), ("The answer is 1’000.", "1000"),
        (r"\boxed{1\ 000}", "1000"), ("#### 1 000 000", "1000000"),
        (r"The answer is \(\frac{7}{2}\) or 3.5.", "3.5"), (r"\boxed{3.5 = \frac{7}{2}}", "7/2"),
        (r"\boxed{\frac{7}{2} \text{ or } 3.5}", "3.5"),
        (r"\boxed{\sqrt{2} \approx 1.414}", r"\sqrt{2}"), (r"\boxed{256+37 = 293}", "293"),
        ("The answer is two.", "2"), ("The answer is: one-half", "1/2"),
        (r"\boxed{\text{B. Paris}}", "B"), ("Answer: Option B", "B"),
        ("The correct option is B.", "B"), ("The answer is option (B).", "B"),
        (r"\boxed{\text{(B) } 12}", "B"), ("ANSWER: $B$", "B"), (r"\boxed{\mathbf{B}}", "B"),
        ("**Answer: B** because the others fail.", "B"), (r"\boxed{10_{2}}", "10_2"),
        (r"\boxed{2516}", "2516_8"), (r"\boxed{1010_2}", "1010_{2}"), (r"\boxed{90^{\circ}}", "90"),
        (r"\boxed{90\degree}", "90"), (r"\boxed{90 \text{ degrees}}", r"90^\circ"),
        (r"\boxed{\text{even}}", "Even"), (r"\boxed{\text{Yes}}", "yes"),
        ("**Final Answer: Yes**", "yes"), (r"\boxed{y=2x+3}", "2x+3"),
        (r"\boxed{y = -\frac{1}{2}x + 3}", r"y=-\frac12x+3"),
        (r"\boxed{\frac{\sqrt 3}{2}}", r"\frac{\sqrt{3}}{2}"), (r"\boxed{\sqrt{50}}", r"5\sqrt{2}"),
        (r"\boxed{\frac{2}{\sqrt{3}}}", r"\frac{2\sqrt{3}}{3}"),
        (r"\boxed{\dfrac{9}{7}}", r"\frac97"), (r"\boxed{-\tfrac 23}", r"-\frac{2}{3}"),
        (r"\boxed{\frac 59}", r"\frac59"), (r"\boxed{11\frac{1}{2}}", "11.5"),
        (r"\boxed{\binom{5}{2}}", "10"), (r"\boxed{5!}", "120"), ("Die Antwort ist 42.", "42"),
        ("Die Antwort lautet 42.", "42"), ("Antwort: 42", "42"), ("La réponse est 42.", "42"),
        ("Réponse : 42", "42"), ("La respuesta es 42.", "42"),
        ("La respuesta correcta es 42.", "42"), ("A resposta é 42.", "42"),
        ("La risposta è 42.", "42"), ("Ответ: 42", "42"), ("答えは42です。", "42"), ("答え：42", "42"),
        ("정답은 42입니다.", "42"), ("답: 42", "42"), ("最终答案是42。", "42"), ("答案为42", "42"),
        ("所以，答案是 42 元。", "42"), ("The answer is 42. This answer is correct.", "42"),
        ("The answer is 42. The answer is correct.", "42"), ("The final answer is: 42", "42"),
        ("Final Answer: The final answer is $42$. I hope it is correct.", "42"),
        ("**Answer:**\n\n42", "42"), ("So the answer: **42**.", "42"),
        ("\\boxed{42}\n\nHope this helps! The answer is a whole number.", "42"),
        ("#### 42\nThe answer is positive", "42"), ("\\boxed{5}\n\nProblem 2: x\n\\boxed{6}", "5"),
        ("The answer is 5.\n\nQ: What is 2+4?\nA: The answer is 6.", "5"),
        (r"<thinking>\boxed{3}</thinking>\boxed{4}", "4"), ("a</think>\n\nThe answer is 7.", "7"),
        (r"\boxed 42.", "42"), (r"\boxed\frac12", "1/2"), (r"\boxed{ 7 }", "7"),
        (r"\fbox{$7$}", "7"), (r"\boxed{$7$}", "7"), (r"\boxed{\$7}", "7"),
        (r"\boxed{7 \text{ dollars}}", "$7"), ("#### 7 euros", "€7"), ("#### 7 EUR", "€7"),
        ("#### 1,234,567", "1234567"), ("#### 5 thousand", "5000"),
        ("#### 2.5 billion people", "2500000000"), ("#### 3 hundred", "300"), ("#### twelve", "12"),
        ("The answer is twenty-five.", "25"), ("The answer is twenty five", "25"),
        ("The answer is one third", "1/3"), ("The answer is three quarters", "0.75"),
        ("The answer is zero", "0"), ("#### 5 m/s", "5"), ("#### 60 mph", "60"),
        ("#### 12 m^2", "12"), ("#### 12 m²", "12"), ("#### 12 cm²", "12 cm^2"),
        ("#### 12 meters", "12 m"), ("#### 1 hour", "1"), ("#### 17 units", "17"),
        ("#### 5 kg of flour", "5"), (r"\boxed{10^{-3}}", "0.001"),
        (r"\boxed{3\times 10^8}", "300000000"), (r"\boxed{\sqrt{16}}", "4"),
        (r"\boxed{x^2-1}", "(x+1)(x-1)"), (r"\boxed{xy}", "yx"), (r"\boxed{\{1,2,3\}}", "3,2,1"),
        (r"\boxed{f(x)=2x}", "2x"), (r"\boxed{x > 5}", "5<x"), (r"\boxed{0.1}", "1/10"),
        (r"\boxed{3+4 = 7}", "7"), (r"\boxed{\frac{1}{3} \approx 0.333}", "1/3"),
        (r"\boxed{2:3}", "2:3"), (r"\boxed{50\%}", "50"),
        (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
        ("The answer is 12:00", "12:00"), ("#### 9:05 am", "9:05 a.m."),
        ("The correct choice is (C).", "C"), ("The correct answer is option D: 42", "D"),
        (r"\boxed{\text{C}}", "C"), (r"\boxed{\textbf{C}}", "C"), ("The answer is Choice B.", "B"),
        ("**B**", "B"), ("(B)", "B"), (r"\boxed{777_8}", "777_8"), (r"\boxed{777}", "777_8"),
        (r"\boxed{\text{Monday}}", "monday"), ("The answer is New York.", "new york"),
        (r"\boxed{\left(\frac{3}{4}, 2\right)}", "(0.75, 2)"),
        (r"\boxed{\left[0, \frac{\pi}{2}\right)}", r"[0,\pi/2)"),
        (r"\boxed{\frac{3\sqrt{2}}{2}}", r"\frac{3}{\sqrt 2}"),
        (r"\boxed{-\frac{\pi}{4}}", r"\frac{-\pi}{4}"), (r"\boxed{3+2i}", "2i+3"),
        (r"\boxed{e^{2}}", "e^2"), (r"\boxed{\pm 3}", "3,-3"), (r"\boxed{120^\circ}", "120"),
        (r"\boxed{6!}", "720"), (r"\boxed{\lfloor 2.5 \rfloor}", "2"),
        (r"\boxed{\dfrac{1}{2}x}", r"\frac{x}{2}"), (r"\boxed{\frac12\text{ cup}}", "0.5"),
        (r"\boxed{1000\text{ m}}", "1000"), (r"\boxed{\text{(A)}}", "A"),
    ],
    False: [
        (r"<think>Maybe \boxed{12}? Let me check", "12"),
        ("<think>Suppose the answer is 12. Then 3 * 5 = 15, so", "12"), ("#### 15:30", "3:30 PM"),
        ("The answer is 2 hours and 30 minutes.", "2.5"), ("Answer: $LETTER", "B"),
        (r"\boxed{2516_8}", "2516"), (r"\boxed{5\%}", "0.05"), ("答案是 42 万", "42"),
        ("The answer is 42. Wait, no: 43.", "42"), ("The answer is 12. Wait, that's wrong.", "12"),
        ("The answer is probably 42", "42"), ("The answer is 42, or maybe 43.", "42"),
        ("**Final Answer**\n\n42", "42"), ("Answer - 42", "42"),
        ("My answer is 42 because 6*7=42.", "42"), ("\\boxed{5}\n\nProblem 2: x\n\\boxed{6}", "6"),
        ("The answer is 5.\n\nQ: What is 2+4?\nA: The answer is 6.", "6"),
        ("#### 5\nHuman: and 6?\nAssistant: #### 6", "6"), (r"<think>\boxed{3}</think>", "3"),
        (r"\boxed{3}</think> So it is 4.", "3"), (r"<think>a</think>x<think>\boxed{4}", "4"),
        (r"x = \boxed{1} and y = \boxed{2}", "2"), (r"\boxed{1}, \boxed{2}", "2"),
        (r"$\boxed{1}$ or $\boxed{2}$", "2"), (r"\boxed{€7}", "$7"), ("#### $7", "7 cents"),
        ("#### 700 cents", "$7"), ("#### 12,34", "1234"), ("#### 3, 100", "3100"),
        ("#### 1 234,5", "12345"), ("#### 1.234.567", "1234567"), ("#### 5 thousandths", "5000"),
        ("#### 5 hundredths", "500"), ("The answer is none", "0"),
        ("The answer is one or two", "1"), ("#### 12 cm", "12 m"), ("#### 5 perhaps", "5"),
        ("#### 5 tens", "5"), ("#### 5 always", "5"), ("#### 5 pairs", "5"), ("#### 5 less", "5"),
        ("#### 5 times as many", "5"), ("#### 5 eggs less", "5"), ("#### 5 minus eggs", "5"),
        ("#### 5 or so", "5"), ("#### at least 5", "5"), ("#### 5+", "5"), ("#### 5-6", "5"),
        ("#### 5 6", "56"), (r"\boxed{2^{10}}", "210"), (r"\boxed{X^2}", "x^2"),
        (r"\boxed{(2,1)}", "(1,2)"), (r"\boxed{(1,2)}", "1,2"), (r"\boxed{(1,2)}", r"\{1,2\}"),
        (r"\boxed{[1,2]}", "(1,2)"), (r"\boxed{1,2}", "1,2,3"), (r"\boxed{1,2,\ldots}", "1,2"),
        (r"\boxed{x=2, y=3}", "(2,3)"), (r"\boxed{x=2}", "y=2"), (r"\boxed{x\le 5}", "5"),
        (r"\boxed{x\ge 5}", "x>5"), (r"\boxed{12 \pmod{13}}", "12"), (r"\boxed{17'}", "17"),
        (r"\boxed{5 = 6}", "6"), (r"\boxed{3+4 = 8}", "8"), (r"\boxed{\approx 5}", "5"),
        (r"\boxed{1\frac{3}{2}}", "5/2"), (r"\boxed{3:4}", "3/4"), (r"\boxed{50\%}", "1/2"),
        (r"\boxed{\frac{1}{2}}", r"50\%"),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        ("#### 3:30 a.m.", "3:30 PM"), ("Answer: (A) 5", "B"), ("Answer: B or C", "B"),
        ("Answer: B, C", "B"), ("Answer: both A and B", "A"), ("Option B", "B"),
        ("Answer: not A", "A"), ("Answer: none", "A"), (r"\boxed{777_8}", "777_9"),
        (r"\boxed{777_{16}}", "777"), (r"\boxed{\text{no}}", "yes"), ("The answer is A.", "a"),
        (r"\boxed{\pm 3}", "3"), (r"\boxed{4\pi}", "4"), (r"\boxed{4\pi \text{ cm}^2}", r"4\pi"),
    ],
}


@pytest.mark.parametrize("topic", RIGHT)
def test_right(topic):
    assert not [case for case in RIGHT[topic] if not grading.correct(*case)]


@pytest.mark.parametrize("topic", WRONG)
def test_a_wrong_answer_never_counts(topic):
    assert not [case for case in WRONG[topic] if grading.correct(*case)]


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
@pytest.mark.parametrize("right", [True, False])
def test_reported_forms(right):
    assert not [case for case in REPORTED[right] if grading.correct(*case) is not right]


JUDGED_OTHERWISE = [  # another verdict than a public report names or a reader may expect, and why
    # 10_2 is two, and the answer 10 may be ten. A base that the answer has and the response leaves
    # out is understood: 2516 for 2516_8.
    (r"\boxed{2516_8}", "2516", False), (r"\boxed{10_2}", "10", False),
    (r"\boxed{2516}", "2516_8", True),
    # What stands before the = of one of them is not cut out of the other.
    (r"\boxed{3 + x = 5}", "y = 3 + 5", False), (r"\boxed{2x + y = 3}", "x = 2x + 3", False),
    ("\\boxed{}, \\boxed{}\n#### Step 1\nThe answer is 5.", "5", True),
    # Seventeen is 17: number words count, as they do for "The answer is two."
    ("#### seventeen", "17", True), ("#### seventeen", "18", False),
]


def test_verdicts_judged_otherwise():
    for response, answer, right in JUDGED_OTHERWISE:
        assert grading.correct(response, answer) is right, (response, answer)


def test_where_in_doubt_the_core_says_wrong():
    """Whatever paper/grading.py calls wrong, the core must not call right."""
    wrong = [case for cases in WRONG.values() for case in cases] + REPORTED[False] + FORMS[False]
    assert len(wrong) > 200 and not [case for case in wrong if data.correct(*case)]


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
def test_latex_in_threads():
    """math-verify's own time limit works in the main thread alone."""
    pairs = [(r"\boxed{\frac{1}{\sqrt2}}", r"\frac{\sqrt{2}}{2}"), (r"\boxed{\sqrt{4}}", "2"),
             (r"\boxed{\sqrt{4}}", r"\sqrt{5}")]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda pair: grading.correct(*pair), pairs * 4))
    assert found == [True, True, False] * 4


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
def test_a_formula_without_end_is_given_up(monkeypatch):
    """Also in one product of large integers, which no signal interrupts; the next one is read."""
    monkeypatch.setattr(grading, "SECONDS", 1)
    with ThreadPoolExecutor(1) as pool:
        bomb = r"\boxed{9^{9^{9^{9^{9}}}}}", r"\sqrt{2}"
        assert not pool.submit(grading.correct, *bomb).result(timeout=60)
    monkeypatch.setattr(grading, "SECONDS", 10)
    assert grading.correct(r"\boxed{\sqrt{4}}", "2")


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
        assert grading.correct(rf"\boxed{{{found}}}", answer) is right, (found, answer)


def test_without_math_verify_latex_is_text_and_that_is_said_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # its import fails
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")  # as Python has it outside pytest
        for found, answer, _ in MEANING:
            assert not grading.correct(rf"\boxed{{{found}}}", answer)
        assert grading.correct(r"\boxed{\sqrt{2}}", r"\sqrt2")
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
                assert grading.correct(form.format(text), answer), (form, text)
                if form[0] != "T" and text in (answer, f"{n:,}", f"{n}.0", f"{n:03}"):
                    assert data.correct(form.format(text), answer), (form, text)
            for text in wrong:
                assert not grading.correct(form.format(text), answer), (form, text)
                assert not data.correct(form.format(text), answer), (form, text)


def test_any_text_is_graded_without_an_exception():
    pieces = ["#### ", "\\boxed{", "}", "{", "$", "answer is ", "1", ",", ".", "/", "\\frac", " ",
              "-", "a", "ab ", "%", "\n", "(A) ", "\\text{", "^", "∞", "٣", "="]
    rng = random.Random(0)
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 14))) for _ in range(1500)]
    # Long ones too: a pattern that backtracks without end would hang here.
    texts += ["#### " + "1" * 10000, "#### " + "1," * 5000, "\\boxed{" * 1000,
              "#### 1 " + "aa " * 5000, "#### 1 " + "aaa" * 60, "$" * 9999,
              "#### 1" + " " * 20000 + "!", "#### \\text{" + " " * 20000, "answer is " * 3000,
              "a" + "\n" * 50_000 + "b", "#### " + "x=" * 20_000 + "5", "\n**Q" * 20_000,
              "\\boxed{1} and " * 5000, "The answer is " + "a+" * 20_000, "**" * 20_000,
              "#### 1\n" + "but " * 20_000, "#### 1" + "\n" * 50_000, "<answer>" * 20_000,
              "[think]" * 20_000, "1" + "\n#" * 20_000, "\\boxed{1}" + " no" * 20_000]
    for text in texts:
        for correct in (data.correct, grading.correct):
            assert correct(text, "9217") is False
            correct(text, text)
