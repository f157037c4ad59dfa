r"""Does a response state this answer? LaTeX, units, letters, and "the answer is" in words.

correct() takes what data.correct takes and knows more forms: evaluate(..., grade=grading.correct).
In doubt an answer is wrong. LaTeX is compared by math-verify, if that is installed.
"""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import warnings
from fractions import Fraction

import data

# ---- Which text of a response is its answer

PHRASE = re.compile(  # "the answer is", "Answer:", and the same in other languages
    r"(?:(?<!this )\b(?:answer(?: to (?:the|this) \w+)?|correct (?:option|choice)|antwort|ответ|"
    r"(?:réponse|respuesta|resposta|risposta)(?: \w+)?|antwoord|svaret|svar|odpowiedź|cevap|उत्तर|"
    r"الجواب|الإجابة)\b|答案|答え|정답|答|답)[\s*)]*"
    r"(?:[:：]|—(?=\s)|(?:is|ist|lautet|est|es|é|è|är|er|to|هو|هي|है|是|为|為|は|은|는)"
    r"(?![a-z'’])\s*[:：]?)[\s*:]*",
    re.IGNORECASE)
END = re.compile(r"\n|(?<!\b[Rr]s)[.!?](?=\s)|[。।]|です|입니다| है")  # of a sentence, but "Rs. 5"
TAGGED = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
REMARK = re.compile(r"(?:correct|right|consistent|reasonable|valid|verified|in simplest|"
                    r"an? (?:\w+ )?(?:integer|number))\b", re.IGNORECASE)
WITHDRAWN = re.compile(r"\b(?:wait|actually|hmm|sorry|correction|i mean|or rather|let me re\w+)\b"
                       rf"|\bno[,:.]|{data.WITHDRAWN.pattern}", re.IGNORECASE)  # prose alone


def final_answer(response):
    r"""The final answer that a response states, stripped; "" if it states none.

    A `####` or a box counts before any prose. Without them <answer>...</answer> counts, then "the
    answer is ...", then a last line that is a choice letter, then the only bold text of the last
    line.
    """
    text = re.sub(r"\\f?box(ed)? *{\s*}", "", data.conclusion(response))  # empty boxes
    marks = list(data.MARK.finditer(text))
    if marks:
        found, rest = data.final_answer(text), text[marks[-1].end():]
        if marks[-1][0] == "####" and number(found) is None:  # perhaps a Markdown heading
            return stated(rest) or found
        return found
    tagged = list(TAGGED.finditer(text))
    if tagged:
        return "" if WITHDRAWN.search(text, tagged[-1].end()) else tagged[-1][1].strip()
    last_line = text.strip().rpartition("\n")[2]
    bold = re.findall(r"\*\*(.+?)\*\*", last_line)
    if PHRASE.search(text):
        return stated(text)
    if re.fullmatch(r"[(*]*[A-J][)*.]*", last_line):
        return last_line
    return bold[0].rstrip(".") if len(bold) == 1 else ""


def stated(text):
    """What the last "the answer is" of a text says, but for remarks such as "is correct".

    "" if it says nothing, or if what follows may withdraw it.
    """
    for phrase in reversed(list(PHRASE.finditer(text))):
        rest = text[phrase.end():phrase.end() + 1000]
        line_before = text[:phrase.end()].rpartition("\n")[2]
        if line_before.count("**") % 2:  # **Answer: B** because ...
            rest = rest.partition("**")[0]
        end = END.search(rest)
        found = rest[:end.start()] if end else rest
        if found.strip() and not REMARK.match(found):
            return "" if WITHDRAWN.search(text, phrase.end()) else found.strip().rstrip(".")
    return ""


# ---- What an answer is

TYPESETTING = [  # (pattern, replacement): other ways to write the same
    (r"\\(?:text|math|mbox)\w*\s*{([^{}]*)}", r" \1"),
    (r"\\(?:left|right|displaystyle)\b|\\[,!;:()\[\]]|(?<=\d)~", ""),
    (r"\\ |\\quad\b|(?<=[\w})])~", " "),
    (r"^\s*\$((?:\\\$|[^$])*)\$\s*$", r"\1"),
    (r"\\([$%])", r"\1"),
    (r"°|\^ ?{?\\circ}?|\\degree\b", " degrees"),
    (r"\\[dt]frac", r"\\frac"),
    (r"{(,)}|{(\w)}(?!\d)", r"\1\2"),  # 1{,}000, x^{2}
    ("[−–]", "-"), ("²", "^2"), ("³", "^3"),
    (r"(?<=[ap])\. ?m\b\.?", "m"),  # p.m.
    (r"\s+", " "),
    (r" ?([^\w$€£¥₹₩ ]) ?", r"\1"),
]
SAME_UNIT = {"$": "dollars", "usd": "dollars", "dollar": "dollars", "us dollars": "dollars",
             "€": "euros", "eur": "euros", "euro": "euros", "£": "pounds", "gbp": "pounds",
             "pound": "pounds", "₹": "rupees", "¢": "cents", "cent": "cents", "¥": "yen",
             "₩": "won", "원": "won", "r$": "reais", "rs": "rupees", "rs.": "rupees",
             "%": "percent", "hour": "hours", "minute": "minutes", "day": "days",
             "cm": "centimeters", "m": "meters", "km": "kilometers", "kg": "kilograms",
             "g": "grams", "ft": "feet", "mile": "miles", "cup": "cups",
             "in": "inches", "meter": "meters", "foot": "feet", "inch": "inches"}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# No unit with one of these is read: scales, parts, pairs, digits, and "about", "more", "not".
SCALES_IN_CHINESE = "万萬亿億兆京垓千百十拾佰仟半倍多余餘来來几幾割成打双雙对對点點又零一二三四五六七八九两兩以左不非"
# A plural, or one of a few other words, is a unit: "17 more", "17 times" and "17 xyz" are not 17.
UNIT = (r"(?:(?:square|cubic|sq\.?|cu\.?) ?)?"
        r"(?!(?:times|dozens|halves|thirds|quarters|tens|hundreds|thousands|\w+illi(?:on|ard)s|"
        r"scores|pairs|couples|trios|grosses|myriads|lakhs|lacs|crores|twos|threes|fours|fives|"
        r"sixes|sevens|eights|nines|doubles|triples|perhaps|always|besides|does|"
        r"\w+(?<!mon)ths)\b)"
        r"(?:[a-z]{2,}[^\W\dsiu_]s|glass(?:es)?|percent|people|children|day|hour|minute|cup|dollar|"
        r"euro|pound|cent|mile|meter|foot|feet|inch|usd|us dollars|eur|gbp|[ckm]m|[km]g|ml|ft|in|"
        r"lb|mph|per [a-z]+|(?<= )[mg]|chf|[%¢€£₹¥₩원]|(?:(?!次方|[" + SCALES_IN_CHINESE
        + r"])[一-鿿])+)"
        r"(?:(?:/| per | of )[a-z]+| left| in total)?(?:\^[23])?")
NUMBER = re.compile(  # an option's letter may stand before it
    rf"(?:\([a-j]\))?(?P<sign>[-+]?)(?P<money>(?:r\$|rs\.?|chf|[$€£₹¥₩])?) ?(?P<minus>-?)"
    rf"(?P<value>\d+/0*[1-9]\d*|\d*\.?\d+|"
    rf"\d{{1,3}}(?:(?P<comma>[, '’])\d{{3}})(?:(?P=comma)\d{{3}})*(?:\.\d+)?|"
    rf"\d{{1,2}}(?:,\d{{2}})+,\d{{3}})"
    rf"(?: (?P<scale>{'|'.join(SCALES)}))?(?:[ -]?(?P<unit>{UNIT}))?(?:_{{?(?P<base>\d+)}}?)?")
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: Fraction(i) for i, word in enumerate(ONES)}
WORDS |= {ten: Fraction(10 * i) for i, ten in enumerate(TENS, 2)}
WORDS |= {f"{ten}-{one}": WORDS[ten] + WORDS[one] for ten in TENS for one in ONES[1:10]}
WORDS |= {"one-half": Fraction(1, 2), "a half": Fraction(1, 2), "half": Fraction(1, 2),
          "one-third": Fraction(1, 3), "two-thirds": Fraction(2, 3), "one-quarter": Fraction(1, 4),
          "one-fourth": Fraction(1, 4), "three-quarters": Fraction(3, 4),
          "three-fourths": Fraction(3, 4)}


def plain(text):
    """An answer without its typesetting: markdown, LaTeX's spaces and fonts."""
    for pattern, replacement in TYPESETTING:
        text = re.sub(pattern, replacement, text)
    return text.lstrip("*` ").rstrip("*`.,; ")


def number(text):
    """(value, unit or "", base or "") of an answer that is one number, else None.

    The value is exact. Whatever might change it (5x, 5!, 5 or 6, 5 dozen) makes it no number.
    """
    if re.search(r"\d,(?:\s|\\ )", text) or re.search(r"\d [MG]\b", plain(text)):
        return None  # a list, or a scale: 5 M is not 5 m
    text = plain(text).lower()
    word = WORDS.get(text) or WORDS.get(text.replace(" ", "-"))
    if word is not None:
        return word, "", ""
    text = re.sub(r"(?<!\d)\\frac ?({-?\d+}|\d)({\d+}|\d)(?!\d)", r"\1/\2", text)
    found = NUMBER.fullmatch(re.sub(r"[{}]", "", text)) if len(text) < 1000 else None
    if not found or found["sign"] and found["minus"]:
        return None
    value = Fraction(re.sub("[, '’]", "", found["value"])) * SCALES.get(found["scale"], 1)
    unit = found["money"] or found["unit"] or ""
    if "-" in (found["sign"], found["minus"]):
        value = -value
    return value, SAME_UNIT.get(unit, unit), found["base"] or ""


def same_number(found, gold):
    """Are two numbers equal? A missing unit agrees with any; the digits' base may be understood."""
    (value, unit, base), (gold_value, gold_unit, gold_base) = found, gold
    units = unit == gold_unit or not unit or not gold_unit
    return value == gold_value and units and base in ("", gold_base)


def same_choice(found, letter):
    """Is an answer this letter? B, (b), B) Paris, option B because ... are it; B) or C) is not."""
    rest = r"(?:[).:,](?!.*\b[A-J]\b).*| because .*)?"
    return bool(re.fullmatch(rf"(?i:(?:option|choice) ?)?\(?(?i:{letter}){rest}", found))


# ---- Formulas

UNREAD = re.compile(  # what math-verify reads as less than it says, or as something else
    r"(?<![\\a-zA-Z{])(?:[a-zA-Z]{3,}|[A-Z]{2})|\d_|\d\s+\d|[-+]\s*[-+]|[^\x00-\x7f]|[%'\"?~#:@`$]|"
    r"\\(?:[lcd]?dots|[pb]?mod|text\w*|math(?:rm|bf|it)|angle|triangle|over\w+|bar|vec|hat|prime|"
    r"not|sim|approx)(?![a-zA-Z])")
RELATION = re.compile(r"=|<|>|\\(?:leq?|geq?|lt|gt|neq?|in)(?![a-zA-Z])")
SECONDS = 5  # after which a comparison is given up
VERIFIER = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from math_verify import LatexExtractionConfig, parse, verify
for line in sys.stdin:
    found, gold = (parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)
                   for text in json.loads(line))
    print(verify(gold, found, float_rounding=12, timeout_seconds=None), flush=True)
"""


class Verifier:
    """A process of its own that compares formulas by math-verify.

    math-verify ends a formula without end, such as 9^(9^(9^9)), by signals. They work in the main
    thread alone, and not within one product of large integers. A process can always be ended.
    """

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def same(self, found, gold):
        """Are two LaTeX formulas equal in meaning? What takes too long is not."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", VERIFIER], text=True, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                self.answer("1", "1", 20 * SECONDS)  # until its imports are done
            return self.answer(found, gold, SECONDS) == "True\n"

    def answer(self, found, gold, seconds):
        """The line that the process prints; "" if it has ended, or is ended after these seconds."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            print(json.dumps([found, gold]), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        timer.cancel()
        if not line:
            self.process.kill()
            self.process.wait()
        return line


verifier = Verifier()


def same_formula(found, gold):
    """Are two formulas equal in meaning? One that math-verify may misread is not."""
    if shape(found) != shape(gold) or None in (shape(found), shape(gold)):
        return False
    if importlib.util.find_spec("math_verify") is None:
        warnings.warn("LaTeX answers must match as text; pip install math-verify compares meaning")
        return False
    return verifier.same(found, gold)


def shape(formula):
    """What equal formulas share: letters, relations, kind of brackets; None if it is not read.

    math-verify takes X for x, x = 2, y = 3 for (2, 3), and (1, 2) for {1, 2}.
    """
    mixed = re.findall(r"\d\s*\\[dt]?frac\s*{?(\d+)}?\s*{?(\d+)", formula)  # 1 1/2, but not 1 3/2
    improper = any(int(numerator) >= int(denominator) for numerator, denominator in mixed)
    if UNREAD.search(formula) or improper or len(formula) > 1000:
        return None
    without_commands = re.sub(r"\\(?:begin|end) *{\w+}|\\[a-zA-Z]+", "", formula)
    letters = set(re.findall("[a-zA-Z]", without_commands))
    relations = len(RELATION.findall(formula))
    brackets = re.fullmatch(r"(\(|\[|\\{).*(\)|\]|\\})", formula.strip(), re.DOTALL)
    kind = brackets[1] + brackets[2] if brackets else ""
    if kind == "()" and "," not in formula or kind == r"\{\}" and "," in formula:
        kind = ""  # (x + 1), and a set may be a list
    return letters, relations, kind


# ---- Together

LEFT = re.compile(r"\s*([a-zA-Z]+(?:_\w)?(?:\([a-zA-Z]\))?|[a-zA-Z](?:\s*\+\s*[a-zA-Z])+)\s*"
                  r"(?:=|\\in\b|∈)(?=.)")  # y = ..., f(x) = ..., m+n = ..., x \in ...
FORMS = re.compile(r"=|\\text\s*{\s*or\s*}|\bor\b")
DELIMITER = re.compile(r"^\s*(?:\$+|\\[(\[])|(?:\$+|\\[)\]])\s*$|\\(?:left|right)\b")


def correct(response, answer):
    """Does the final answer of a response mean this one? In doubt it does not.

    Choice letters compare as letters, numbers as numbers (a missing unit agrees with any), formulas
    by math-verify if that is installed, and the rest as text.
    """
    found, answer = final_answer(response), answer.strip()
    if not found or not answer or len(found) > 500:
        return found != "" and found == answer
    return same(found, answer)


def same(found, gold):
    """Do two answers mean the same? One in several forms (7/2 = 3.5) must mean it in each."""
    plain_found, plain_gold = plain(found), plain(gold)
    if not plain_found:
        return False
    letter = plain_gold.strip("()")
    if re.fullmatch("[A-J]", letter):
        return same_choice(plain_found, letter)
    numbers = number(found), number(gold)
    if None not in numbers:
        return same_number(*numbers)
    if plain_found == plain_gold or same_words(plain_found, plain_gold):
        return True
    left, gold_left = LEFT.match(found), LEFT.match(gold)
    if left and gold_left and left[1] != gold_left[1]:
        return False
    if left or gold_left:
        right, gold_right = (text[side.end():] if side else text
                             for text, side in ((found, left), (gold, gold_left)))
        return same(right, gold_right)
    exact = re.split(r"\\approx\b|≈", found)[0]
    forms = FORMS.split(exact)
    if len(forms) > 1 and not FORMS.search(gold):
        return all(same(form, gold) for form in forms)
    if exact != found:
        return same(exact, gold)
    return same_formula(DELIMITER.sub("", found), DELIMITER.sub("", gold))


def same_words(found, gold):
    """Do two texts differ in capitals alone? In words that is nothing, in variables it is."""
    return found.casefold() == gold.casefold() and bool(re.search(r"[^\W\d]{2}", found))
