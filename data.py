"""Problems, datasets, prompts, tokenizer, grading: text in, token batches out. Imports no other file here,
except that `python data.py generate` runs the model.

A problem is held out if a hash of its question says so, so that training and evaluation can never share one,
whatever the seeds.
"""

import argparse
import json
import random
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

INSTRUCTION = "Please reason step by step."  # section 4: precedes every training question
NAMES = "Tom Ann Ben Eva Max Lily Sam Mia Leo Zoe Dan Ivy Jack Rosa Omar Nina".split()
THINGS = "apples books coins cards shells stamps marbles pencils stickers buttons beads cookies".split()
PLACES = "Paris London Rome Cairo Oslo Lima Delhi Tokyo Boston Berlin".split()
FOODS = "rice soup bread cheese fish pasta salad cake".split()
PETS = "dog cat horse rabbit parrot turtle snake mouse".split()
COLORS = "red blue green yellow black white brown purple".split()
MAX_VALUE = 99


@dataclass
class Problem:
    """One question with its worked response; `answer` is what grading compares."""
    question: str
    response: str
    answer: str
    kind: str = "maths"
    level: int | str | None = None  # difficulty: steps of a chain of thought, or what the data set says


def held_out(question):
    """One question in eight, chosen by a hash of its text, belongs to evaluation and never to training."""
    return zlib.crc32(question.encode()) % 8 == 0


def make_maths(rng, steps=None):
    """A word problem of 2 to 8 steps, its chain of thought, and the final `#### N`.

    One running number in 1..99 is changed step by step; some steps hand it on to another person.
    """
    steps = steps or rng.randint(2, 8)
    who, thing, value = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 50)
    story, chain = [f"{who} has {value} {thing}."], []
    for _ in range(steps):
        op, n = rng.choice(_moves(value, rng))
        result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]
        other = rng.choice([name for name in NAMES if name != who])
        sentence = rng.choice(_SENTENCES[op] + (_SENTENCES["half"] if (op, n) == ("/", 2) else [])
                              + (_SENTENCES["twice"] if (op, n) == ("*", 2) else []))
        story.append(sentence.format(who=who, other=other, n=n, thing=thing))
        who = other if sentence.startswith("{other}") else who
        chain.append(f"{value} {op} {n} = {result}.")
        value = result
    question = " ".join(story) + f" How many {thing} does {who} have?"
    return Problem(question, " ".join(chain) + f" #### {value}", str(value), level=steps)


def _moves(value, rng):
    """One (op, n) for each operation that keeps the running number a whole one in 1..MAX_VALUE."""
    moves = []
    if value < MAX_VALUE:
        moves.append(("+", rng.randint(1, min(40, MAX_VALUE - value))))
    if value > 1:
        moves.append(("-", rng.randint(1, min(40, value - 1))))
    if value * 2 <= MAX_VALUE:
        moves.append(("*", rng.randint(2, min(9, MAX_VALUE // value))))
    divisors = [n for n in range(2, 10) if value % n == 0]
    if divisors:
        moves.append(("/", rng.choice(divisors)))
    return moves


_SENTENCES = {
    "+": ["{who} buys {n} more.", "{who} finds {n} {thing}.", "A friend gives {who} {n} {thing}.",
          "{other} has {n} more than {who}."],
    "-": ["{who} loses {n}.", "{who} gives away {n} {thing}.", "{who} sells {n} of them.",
          "{other} has {n} fewer than {who}."],
    "*": ["{who} trades each of them for {n}.", "{other} has {n} times as many as {who}."],
    "/": ["{who} splits them into {n} equal piles and keeps one.",
          "{other} and friends, {n} in all, share them equally."],
    "half": ["{who} gives away half."],
    "twice": ["{who} doubles them.", "{other} has double what {who} has."],
}


def make_reading(rng, distinct=False):
    """Facts about three to five people and a question that one of them answers: the fact, then `#### answer`.

    distinct: three facts, no two of one kind, so that the verb alone tells which one is asked for.
    """
    facts = []
    for i, who in enumerate(rng.sample(NAMES, 3 if distinct else rng.randint(3, 5))):
        place, food, pet, color = rng.choice(PLACES), rng.choice(FOODS), rng.choice(PETS), rng.choice(COLORS)
        kinds = [
            (f"{who} lives in {place}.", f"Where does {who} live?", place),
            (f"{who} likes {food}.", f"What does {who} like?", food),
            (f"{who} has a {color} {pet}.", f"What color is the {pet} of {who}?", color),
            (f"{who} has a {color} {pet}.", f"What animal does {who} have?", pet),
        ]
        facts.append(rng.choice([kinds[:1], kinds[1:2], kinds[2:]][i] if distinct else kinds))
    fact, question, answer = rng.choice(facts)
    if distinct:
        rng.shuffle(facts)
    passage = " ".join(f for f, _, _ in facts)
    return Problem(f"{passage} {question}", f"{fact} #### {answer}", answer, "reading")


def problems(kind, count, seed, evaluation=False, **kwargs):
    """`count` different problems of a kind ("maths", "reading"), from the training or the held-out side."""
    rng, seen, out = random.Random(f"{kind} {seed}"), set(), []
    make = {"maths": make_maths, "reading": make_reading}[kind]
    while len(out) < count:
        problem = make(rng, **kwargs)
        if held_out(problem.question) == evaluation and problem.question not in seen:
            seen.add(problem.question)
            out.append(problem)
    return out


class Tokenizer:
    """tokenizer.json, the chat template and the stop ids of a model folder.

    prompt_ids() is what a model wants to see of a user's question; encode and decode are for plain text.
    Raises FileNotFoundError or ValueError in one line that names the file.
    """

    def __init__(self, folder):
        import tokenizers
        self.folder, file = Path(folder), Path(folder) / "tokenizer.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; the folder must be in the official layout")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises nothing narrower
            raise ValueError(f"{file} is not a readable tokenizer: {e}") from None
        self.tokenizer.no_truncation()  # training settings that some checkpoints carry along
        self.tokenizer.no_padding()
        config = self._read("special_tokens_map.json") | self._read("tokenizer_config.json")
        self.template = self._template(config.get("chat_template"))
        named = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        self.special = {k: v for k, v in named.items() if isinstance(v, str)}
        stop = self._read("generation_config.json").get("eos_token_id")
        stop = self._read("config.json").get("eos_token_id") if stop is None else stop
        self.stop_ids = tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,)

    def _read(self, name):
        """The object in a JSON file of the folder, {} if there is none."""
        file = self.folder / name
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as e:
            raise ValueError(f"{file} is not valid JSON: {e}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds a {type(found).__name__}, not an object")
        return found

    def _template(self, template):
        """The chat template: a file of its own comes first; of several named ones, the default."""
        file = self.folder / "chat_template.jinja"
        if file.exists():
            return file.read_text(encoding="utf-8")
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default")
        return template

    def prompt(self, question):
        """The prompt string of one user question; without a chat template, the question itself."""
        if not self.template:
            return question
        return render(self.template, messages=[{"role": "user", "content": question}], tools=None, documents=None,
                      add_generation_prompt=True, **self.special)

    def prompt_ids(self, question):
        """The prompt's token ids. A template writes the bos itself; a base model has the tokenizer add it."""
        return self.tokenizer.encode(self.prompt(question), add_special_tokens=not self.template).ids

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@lru_cache(maxsize=4)
def compile_template(template):
    """A chat template with the surroundings that transformers gives it, in a sandbox: it is a stranger's program."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):  # jinja2 would let `{{ x.__class__ }}` pass as an empty string
            raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} is unsafe")

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what to train on; here it is only its content."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja2's escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda f: datetime.now().strftime(f)}
    return env.from_string(template)


def render(template, **variables):
    """Fill in a chat template; ValueError in one line if it fails, or tries something that it should not."""
    try:
        return compile_template(template).render(variables)
    except ImportError:
        raise ValueError("this model's chat template needs jinja2: pip install jinja2") from None
    except Exception as e:  # a template may fail in any way that Python can
        what = "is refused" if type(e).__name__ == "SecurityError" else "fails"
        raise ValueError(f"the chat template {what}: {' '.join(str(e).split()) or type(e).__name__}") from None


def ask(problem):
    """The user's turn: maths and science are preceded by the paper's instruction, reading questions stand alone."""
    return f"{INSTRUCTION} {problem.question}" if problem.kind in ("maths", "choice") else problem.question


def pad(rows, device="cpu", value=0):
    """Lists of token ids -> (tokens [B, T] int64 padded on the right, lengths [B] int64)."""
    lengths = torch.tensor([len(r) for r in rows])
    tokens = torch.full((len(rows), int(lengths.max())), value)
    for i, r in enumerate(rows):
        tokens[i, :len(r)] = torch.tensor(r)
    return tokens.to(device), lengths.to(device)


def until_stop(ids, stop_ids):
    """The ids up to and including the first stop id."""
    return ids[:next((i + 1 for i, t in enumerate(ids) if t in stop_ids), len(ids))]


MARKS = re.compile(r"####|\\boxed\s*(?={)|\banswer[\s*]*(?:\bis\b|:)[\s*:]*", re.IGNORECASE)
OPTION = re.compile(r"\(?([A-J])(?:[).:]+(?:\s+(.*))?)?")  # a multiple choice letter, perhaps with the option's text
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"(-?)\s*([$£€]?)\s*(-?)(?:(\d+)\s+(?=\d+\s*/))?({DIGITS})(?:\s*/\s*(\d+))?(?![\d.,/])(.*)",
                    re.ASCII)  # sign, money, sign, whole part, digits, denominator, what follows
FRACTION = re.compile(r"\\frac\s*(?:{\s*(-?\d+)\s*}|(\d))\s*(?:{\s*(\d+)\s*}|(\d))", re.ASCII)
MONEY = {"$": "dollar", "£": "pound", "€": "euro"}
SCALE = {"thousand": 10 ** 3, "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12}
SHORT_UNITS = set("mm cm km kg mg ml ft in lb hr am pm mph of".split())  # words of one or two letters may be variables
NO_UNITS = set("""and or nor but not to plus minus times over divided multiplied squared cubed power root sqrt factorial
    base mod choose sin cos tan log more less fewer than between either neither if out wrong incorrect impossible dozen
    half quarter third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth halve hundred point repeating
    recurring remainder zero one two three four five six seven eight nine ten eleven twelve twenty""".split())


def final_answer(text):
    r"""The final answer that a response states, or None: what its last mark introduces, stripped.

    Marks are `#### N`, \boxed{...} with nested braces, "the answer is ..." and "Answer: ..."; without any of them, a
    last line that is a choice letter and nothing else. A number that is not marked is no answer.
    """
    for mark in reversed(list(MARKS.finditer(text))):
        if mark[0].startswith("\\"):
            found = _braced(text[mark.end():mark.end() + 1000])
        else:
            line = text[mark.end():].lstrip().split("\n")[0]
            found = line if mark[0] == "####" else re.split(r"\.(?=\s|$)", line)[0]
        if found and found.strip():
            return found.strip().rstrip(".")
    last = plain((text.strip().splitlines() or [""])[-1])
    return last if re.fullmatch(r"\(?[A-J]\)?", last) else None


def _braced(text):
    """What the brace at the start of text encloses, or None if it is never closed."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[1:i]
    return None


def plain(text):
    """An answer without what only sets its type: markdown, dollar signs around it, LaTeX's spaces and fonts."""
    text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", re.sub("[−–]", "-", text))  # **bold**, and not 2**3
    text = text.replace("\\$", "\0").replace("{,}", ",")
    text = re.sub(r"\$([^$]*)\$", r"\1", text).replace("\0", "$").replace("\\%", "%")
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*{([^{}]*)}", r" \1 ", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,()\[\]]", "", text))
    text = re.sub(r"\^\s*{?\s*\\circ\s*}?|\\degree", "°", re.sub(r"\\quad|\\[;: ]|(?<=\w)~|\xa0", " ", text))
    return re.sub(r" (?=\^)", "", " ".join(text.split()).lstrip(" `").rstrip(" .,;`"))


def number(text):
    """(value, unit) of an answer that is one number and nothing but a unit beside it, exact, else None.

    1,000 and 1000.0, 3/4, \\frac34, 1 1/2, -$5, 5 million; the unit in the singular, "" if there is none.
    """
    text = re.sub(r"^\(?[A-J]\)\s*", "", plain(text))  # an option's letter before its value
    text = FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text).strip()
    text = re.sub(r"^\(([^()]*)\)$", r"\1", text)
    found = NUMBER.fullmatch(text) if len(text) < 200 else None
    if not found or (found[1] and found[3]) or (found[6] and int(found[6]) == 0):
        return None
    minus, value = found[1] or found[3], Fraction(found[5].replace(",", "")) / int(found[6] or 1)
    if found[4]:  # a mixed number
        if value >= 1:
            return None
        value += int(found[4])
    rest = _unit(found[7], MONEY.get(found[2], ""))
    return rest and ((-1 if minus else 1) * value * rest[0], rest[1])


def _unit(text, money):
    """(scale, unit) of what follows a number, or None if it may change its meaning: 5x, 5 or 6, 5 dozen."""
    words = text.casefold().replace("per cent", "percent").replace("%", " percent ").replace("°", " degrees ").split()
    scale = SCALE.get(words[0], 1) if words else 1
    words = [w.removesuffix("s") for w in words[scale > 1:]]
    if len(words) > 5 or (text[:1].isalpha() and words and words[0] not in SHORT_UNITS):
        return None
    for i, word in enumerate(words):
        letters = re.fullmatch(r"([a-z]+)(?:/[a-z]+)?(?:\^{?[23]}?|²|³)?", word)
        if not letters or letters[1] in NO_UNITS | SCALE.keys() or word in NO_UNITS:
            return None
        if len(letters[1]) < (3 if i == 0 else 2) and word not in SHORT_UNITS | {"a"}:
            return None
    if words[:1] == ["percent"]:
        return scale, "percent"
    return scale, " ".join([money] * (bool(money) and words[:1] != [money]) + words)


def same_number(a, b):
    """Do two results of number() agree? A missing unit agrees with any; 50% is 50 of them, and 0.5."""
    (x, u), (y, v) = a, b
    if {u, v} == {"percent", ""} and (x / 100 if u else x) == (y / 100 if v else y):
        return True
    return x == y and (u == v or not u or not v)


def choice(text):
    """The letter A..J of a multiple choice answer such as B, (B), B. or (B) Paris; None if it is not one of them."""
    found = OPTION.fullmatch(re.sub(r"^([a-j]|\([a-j]\))$", lambda m: m[1].upper(), plain(text)))
    more = found and re.search(r"^(?:and|or|nor|but|not|is)\b|^[,/&]|^[A-J](?:$|[).:])|\([A-J]\)", found[2] or "")
    return found[1] if found and not more else None


@lru_cache
def math_verify():
    """The package that compares LaTeX by its meaning, or None, said once: then LaTeX is compared as text."""
    try:
        import math_verify
    except ImportError:
        print("math-verify is not installed, so LaTeX answers must match as text; pip install math-verify",
              file=sys.stderr)
        return None
    return math_verify


def same_latex(a, b):
    """Are two LaTeX expressions equal in meaning? Only for pure formulas: prose among them compares as text."""
    # words, number bases, \frac123 (which is 3/2), factorials and sentences
    doubtful = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|\d_|\\frac\d{3}|[.?!]$")
    if doubtful.search(a) or doubtful.search(b) or not math_verify():
        return False
    config = [math_verify().LatexExtractionConfig()]
    gold, found = (math_verify().parse(f"${text}$", extraction_config=config) for text in (a, b))
    return bool(gold and found and math_verify().verify(gold, found, float_rounding=12))


def correct(text, answer):
    """Does a response's final answer mean this one? In doubt it does not: a wrong answer never counts as right.

    Choice letters compare as letters, numbers as numbers (see number), LaTeX by math-verify, the rest as text.
    """
    found, answer = final_answer(text), plain(answer)
    if not found or not answer:
        return False
    found = plain(found)
    if found.count("=") == 1 and "=" not in answer:  # x = 5, m+n = 33
        found = re.sub(r"^[A-Za-z][A-Za-z+_{}()]*\s*=\s*", "", found)
    if re.fullmatch("[A-J]", answer):
        return choice(found) == answer
    if number(answer) and number(found):
        return same_number(number(found), number(answer))
    tidy = lambda s: re.sub(r"{(\w)}", r"\1", re.sub(r"\s*([^\w\s])\s*", r"\1", s.casefold()))
    return tidy(found) == tidy(answer) or ("\\" in found + answer and same_latex(answer, found))


def words(text):
    """Lower-case words and numbers, without punctuation: what F1 and ROUGE count."""
    return re.findall(r"\w+", text.lower())


def _f(overlap, a, b):
    """The harmonic mean of overlap/a and overlap/b."""
    return 2 * overlap / (a + b) if a + b else 0.0


def f1(text, reference):
    """SQuAD's F1 in [0, 1]: words shared by an answer and its reference, articles left out."""
    a, b = ([w for w in words(t) if w not in ("a", "an", "the")] for t in (text, reference))
    return _f((Counter(a) & Counter(b)).total(), len(a), len(b))


def rouge(text, reference):
    """ROUGE-1, -2 and -L in [0, 1]: F-measures of shared words, word pairs, and the longest common subsequence."""
    a, b = words(text), words(reference)
    pairs = [Counter(zip(w, w[1:])) for w in (a, b)]
    row = [0] * (len(b) + 1)  # row[j]: longest common subsequence of a so far and b[:j]
    for w in a:
        previous = row
        row = [0]
        for j, v in enumerate(b):
            row.append(previous[j] + 1 if v == w else max(previous[j + 1], row[j]))
    return {"rouge1": _f((Counter(a) & Counter(b)).total(), len(a), len(b)),
            "rouge2": _f((pairs[0] & pairs[1]).total(), pairs[0].total(), pairs[1].total()),
            "rougeL": _f(row[-1], len(a), len(b))}


def scores(problem, text):
    """What a response earns, by the problem's kind: {"accuracy"}, {"f1"} or {"rouge1", "rouge2", "rougeL"}."""
    if problem.kind == "summary":
        return rouge(text.split("###")[0], problem.answer)  # a base model goes on with the next article
    if problem.kind == "passage":
        return {"f1": f1(final_answer(text) or text, problem.answer)}
    return {"accuracy": float(correct(text, problem.answer))}


BOXED = {"maths": r"Put your final answer within \boxed{}.",  # what an evaluation asks for beyond the question
         "choice": r"Put the letter of your answer within \boxed{}."}


def read_problems(file, count=None):
    """Evaluation problems from a JSONL file or a JSON list, the first `count` at most, without their responses.

    GSM8K: question, answer (ending in `#### N`). MATH, AMC, AIME, SVAMP, MultiArith: problem, answer (and level).
    Multiple choice: question, options (a list), answer (a letter or a position); or GPQA's own columns, their options
    in an order that follows from the question. Reading: context, question, answer(s). Summaries: prompt, reference.
    Raises OSError, or ValueError naming the bad line.
    """
    out = []
    for n, row in rows(file):
        if len(out) == count:
            break
        try:
            question, answer, kind, level = _problem(json.loads(row) if isinstance(row, str) else row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{file}, line {n}: not a problem ({type(e).__name__}: {e}); it needs question and "
                             "answer, problem and answer, question, options and answer, context, question and "
                             "answer, or prompt and reference") from None
        out.append(Problem(f"{question}\n{BOXED[kind]}" if kind in BOXED else question, "", answer, kind, level))
    if not out:
        raise ValueError(f"{file} holds no problems")
    return out


def _problem(row):
    """(question, answer, kind, level) of one row."""
    if "reference" in row:
        return row["prompt"], row["reference"], "summary", None
    if "context" in row:
        answer = row["answers"][0] if "answers" in row else row["answer"]
        return f"{row['context']}\n{row['question']}", str(answer), "passage", None
    if "Correct Answer" in row:  # GPQA
        options = [row["Correct Answer"]] + [row[f"Incorrect Answer {i}"] for i in (1, 2, 3)]
        random.Random(row["Question"]).shuffle(options)
        row = {"question": row["Question"], "options": options, "answer": options.index(row["Correct Answer"])}
    question, answer = row["question"] if "question" in row else row["problem"], row["answer"]
    options = row.get("options") or row.get("choices")
    if options:
        letters = "ABCDEFGHIJ"[:len(options)]
        answer = letters[answer] if isinstance(answer, int) else letters[letters.index(answer)]
        lines = (f"({letter}) {option}" for letter, option in zip(letters, options))
        return "\n".join([question, *lines]), answer, "choice", None
    level = row.get("level", answer.count("<<") or None)  # MATH's own, or the steps of GSM8K's solution
    return question, final_answer(answer) or answer, "maths", level


@dataclass
class Batch:
    """Samples side by side, padded on the right: tokens [B, T] int64, prompt_lengths [B], lengths [B] (both int64)."""
    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor

    def __post_init__(self):
        at = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        self.generated = at >= self.prompt_lengths[:, None]               # bool [B, T]: whatever follows the prompt
        self.response = self.generated & (at < self.lengths[:, None])     # bool [B, T]: the same without the padding

    def responses(self):
        """The responses alone, moved to column 0: tokens [B, R] int64, and bool [B, R], False on padding."""
        counts = (self.lengths - self.prompt_lengths)[:, None]
        columns = torch.arange(int(counts.max()), device=self.tokens.device)
        at = (self.prompt_lengths[:, None] + columns).clamp_max(self.tokens.shape[1] - 1)
        return self.tokens.gather(1, at), columns < counts


def encode_samples(samples, tokenizer, max_tokens=2048):
    """Problems -> [(prompt ids, response ids)]; the response without a stop id, as that is never fed back.

    Longer ones than max_tokens are dropped, and their number is said on stderr; ValueError if none is left.
    """
    pairs = [(tokenizer.prompt_ids(ask(p)), tokenizer.encode(p.response)) for p in samples]
    short = [pair for pair in pairs if sum(map(len, pair)) <= max_tokens]
    if len(short) < len(pairs):
        print(f"dropped {len(pairs) - len(short)} of {len(pairs)} samples of over {max_tokens} tokens", file=sys.stderr)
    if not short:
        raise ValueError(f"no sample of at most {max_tokens} tokens is left; raise --max-tokens or give other data")
    return short


# Field names of the common sets: (question, response); the first pair that a row has is taken.
FIELDS = [("question", "response"), ("question", "answer"), ("problem", "solution"), ("query", "response"),
          ("prompt", "response"), ("prompt", "reference"), ("instruction", "output")]


def read_samples(file, count=None, skip_bad=False):
    """Problems from a JSONL file, or a JSON list, of rows with one of FIELDS or `messages`; the first `count` at most.

    GSM8K's calculator marks <<...>> are left out. Raises OSError, or ValueError naming the first bad line; skip_bad
    leaves bad ones out and names them on stderr.
    """
    out, bad = [], []
    for number, row in rows(file):
        if len(out) == count:
            break
        try:
            out.append(_sample(json.loads(row) if isinstance(row, str) else row))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            if not skip_bad:
                raise ValueError(f"{file}, line {number}: not a sample ({e}); it needs question and answer, problem "
                                 "and solution, query and response, prompt and response, or messages "
                                 "(--skip-bad leaves such lines out)") from None
            bad.append(number)
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        print(f"{file}: left out {len(bad)} bad lines: {', '.join(map(str, bad[:10]))}{more}", file=sys.stderr)
    if not out:
        raise ValueError(f"{file} holds no samples")
    return out


def rows(file):
    """Yield (number from 1, row) of a JSONL file, as text, or of a JSON list, parsed.

    A file of a hub data set is named hf://datasets/OWNER/NAME/PATH. Raises OSError or ValueError.
    """
    with open(local(file), encoding="utf-8", newline="\n") as lines:  # JSON may hold other line ends inside a string
        first = lines.readline()
        lines.seek(0)
        if not first.lstrip().startswith("["):
            yield from ((i, line) for i, line in enumerate(lines, 1) if line.strip())
            return
        try:
            yield from enumerate(json.load(lines), 1)
        except ValueError as e:
            raise ValueError(f"{file} is not valid JSON: {e}") from None


def local(file):
    """The path itself, or that of a hub data set's file after fetching it; OSError in one line if that fails."""
    found = re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+)", str(file))
    if not found:
        return file
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(found[1], found[2], repo_type="dataset")
    except Exception as e:  # of several libraries
        raise OSError(f"cannot fetch {file}: {(str(e) or repr(e)).splitlines()[0]}") from None


def _sample(row):
    if "messages" in row:
        turns = {m["role"]: m["content"] for m in reversed(row["messages"])}  # the first turn of each role
        question, response, kind = turns["user"], turns["assistant"], "maths"
    else:
        names = next((pair for pair in FIELDS if all(row.get(name) for name in pair)), None)
        if names is None:
            raise KeyError("unknown fields " + ", ".join(row))
        question, response = (row[name] for name in names)
        kind = "text" if names[0] == "prompt" else "maths"
    response = re.sub(r"<<.*?>>", "", response)
    return Problem(question, response, str(final_answer(response) or row.get("answer", "")), kind)


def chunks(pairs, size, seed=None):
    """Indices of one epoch's batches of encoded pairs, similar lengths together; shuffled if a seed is given."""
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    out = [order[i:i + size] for i in range(0, len(order), size)]
    if seed is not None:
        random.Random(seed).shuffle(out)
    return out


def collate(pairs, chunk, device="cpu", counted=True):
    """The pairs of these indices as a Batch; counted=False leaves its response mask empty."""
    tokens, lengths = pad([pairs[i][0] + pairs[i][1] for i in chunk], device)
    prompt_lengths = torch.tensor([len(pairs[i][0]) for i in chunk], device=device)
    return Batch(tokens, prompt_lengths, lengths if counted else prompt_lengths)


def batches(pairs, size, device="cpu"):
    """All encoded pairs once, as Batches of up to `size`."""
    for chunk in chunks(pairs, size):
        yield collate(pairs, chunk, device)


# ---- python data.py generate: the paper's training set is private, so let the full model write an open one

def generate(args):
    """The full model answers questions; its answers become the training samples in args.out (JSONL).

    Written block by block. A block's random numbers depend on --seed and its number alone, so a rerun drops the last
    block, which may be incomplete, and goes on from there as if never interrupted.
    """
    import sample  # here alone this file needs the model
    model, tokenizer = sample.load(args)
    asked = read_problems(args.data) if args.data else problems("maths", args.samples, args.seed)
    size = max(1, args.batch // args.n)  # questions to a block
    kept = _complete_blocks(args.out)
    first = kept[-1]["block"] + 1 if kept else 0
    print(f"Asking {args.model or 'the embedded model'} on {args.device} {len(asked)} questions, {args.n} times each, "
          f"at temperature {args.temperature}:\nup to {args.samples} samples for {args.out}, {len(kept)} there already.",
          file=sys.stderr)
    written, tried = len(kept), 0
    bar = tqdm(range(first, -(-len(asked) // size)), desc="blocks", disable=None)
    with open(args.out, "a", encoding="utf-8") as out:
        for block in bar:
            here = [p for p in asked[block * size:(block + 1) * size] for _ in range(args.n)]
            generator = torch.Generator(model.device).manual_seed(args.seed * 1_000_003 + block)
            answers = sample.respond(model, tokenizer, [ask(p) for p in here], args.max_new_tokens, args.batch,
                                     temperature=args.temperature, top_p=args.top_p, generator=generator)
            lines = []
            for i, text, count in sorted(answers):
                right = correct(text, here[i].answer)
                tried += 1
                if count < args.max_new_tokens and (right or not args.only_right):  # a cut answer teaches no ending
                    lines.append({"question": here[i].question, "response": text, "answer": here[i].answer,
                                  "right": right, "block": block})
            lines = lines[:args.samples - written]
            out.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            out.flush()
            written += len(lines)
            bar.set_postfix(samples=written, kept=f"{(written - len(kept)) / tried:.2f}")
            if written == args.samples:
                break
    print(json.dumps({"samples": written, "file": args.out}) if args.json else f"{written} samples are in {args.out}")


def _complete_blocks(file):
    """Rows of all blocks in the file but the last, having cut that off the file; [] if there is no file."""
    if not Path(file).exists():
        return []
    rows = []
    for line in Path(file).read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
            rows[-1]["block"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} exists and is not of data.py generate; give another --out") from None
    rows = [row for row in rows if row["block"] < rows[-1]["block"]]
    Path(f"{file}.tmp").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    Path(f"{file}.tmp").replace(file)
    return rows


def main():
    import sample
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    add = sample.common_arguments(commands.add_parser("generate", help=generate.__doc__.splitlines()[0])).add_argument
    add("--data", help="questions with their answers, JSONL, as for bench.py (default: the embedded model's own)")
    add("--out", default="generated.jsonl", help="default: %(default)s")
    add("--samples", type=int, default=20000, help="stop at so many (default: %(default)s, as in the paper)")
    add("--n", type=int, default=1, help="answers to each question (default: %(default)s)")
    add("--only-right", action="store_true", help="keep answers that the grading accepts")
    add("--temperature", type=float, default=0.6)
    add("--top-p", type=float, default=0.95)
    add("--max-new-tokens", type=int, default=1024, help="longer answers are left out (default: %(default)s)")
    add("--batch", type=int, default=64, help="answers written side by side (default: %(default)s)")
    args = parser.parse_args()
    if min(args.samples, args.n, args.batch) < 1:
        raise ValueError("--samples, --n and --batch must be at least 1")
    generate(args)


if __name__ == "__main__":
    from sample import run
    run(main)
