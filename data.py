"""Problems, data sets, prompts, tokenizer, grading: text in, token batches out.

A generated problem is held out if a hash of its question says so. Training and evaluation can
therefore never share one, whatever their seeds are.
"""

import json
import random
import re
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import torch

INSTRUCTION = "Please reason step by step."  # section 4: precedes every training question


@dataclass
class Problem:
    """One question with its worked response; `answer` is what grading compares."""
    question: str
    response: str
    answer: str
    kind: str = "maths"
    level: int | str | None = None  # the steps of its solution, or what the data set says


# ---- Generated problems. The bundled model learned exactly these: keep every call of rng in place

NAMES = "Tom Ann Ben Eva Max Lily Sam Mia Leo Zoe Dan Ivy Jack Rosa Omar Nina".split()
THINGS = "apples books coins cards shells stamps marbles pencils stickers buttons beads cookies"
FACTS = {  # what is told of a person: the question that asks for it, and the values
    "lives in {}": ("Where does {} live?", "Paris London Rome Cairo Oslo Lima Delhi Tokyo"),
    "likes {}": ("What does {} like?", "rice soup bread cheese fish pasta salad cake"),
    "works as a {}": ("What does {} work as?", "baker doctor nurse farmer pilot painter tailor"),
    "plays the {}": ("What does {} play?", "piano guitar violin flute drums harp cello"),
    "was born in {}": ("When was {} born?", "January March April May June July August"),
    "has a {}": ("What animal does {} have?", "dog cat horse rabbit parrot turtle snake mouse"),
    "wears a {} hat": ("What color is the hat of {}?", "red blue green yellow black white"),
    "speaks {}": ("What language does {} speak?", "Greek Hindi Dutch Welsh Polish Latin"),
    "studies {}": ("What does {} study?", "law art music physics history biology medicine"),
    "swims on {}": ("When does {} swim?", "Monday Tuesday Wednesday Thursday Friday Sunday"),
    "drinks {}": ("What does {} drink?", "tea coffee milk water juice cocoa lemonade"),
    "drives a {}": ("What does {} drive?", "van truck bus tractor taxi scooter jeep"),
    "grows {}": ("What does {} grow?", "roses tulips beans corn grapes onions lemons"),
    "fears {}": ("What does {} fear?", "spiders ghosts storms wolves bees fire sharks"),
    "collects {}": ("What does {} collect?", "maps rings masks clocks keys posters kites"),
    "visits {}": ("What country does {} visit?", "Norway Chile Kenya Spain Japan Canada Peru"),
}
MAX_VALUE = 99
SENTENCES = {
    "+": ["{who} buys {n} more.", "{who} finds {n} {thing}.", "A friend gives {who} {n} {thing}.",
          "{other} has {n} more than {who}."],
    "-": ["{who} loses {n}.", "{who} gives away {n} {thing}.", "{who} sells {n} of them.",
          "{other} has {n} fewer than {who}."],
    "*": ["{who} trades each of them for {n}.", "{other} has {n} times as many as {who}."],
    "/": ["{who} splits them into {n} equal piles and keeps one.",
          "{other} and friends, {n} in all, share them equally."],
    "/2": ["{who} gives away half."],
    "*2": ["{who} doubles them.", "{other} has double what {who} has."],
}


def held_out(question):
    """One question in eight, chosen by a hash of its text, belongs to evaluation."""
    return zlib.crc32(question.encode()) % 8 == 0


def make_maths(rng, steps=None):
    """A word problem of 2 to 8 steps, its chain of thought, and the final `#### N`.

    One running number in 1..99 changes step by step. Some steps hand it on to another person.
    """
    steps = steps or rng.randint(2, 8)
    who, thing, value = rng.choice(NAMES), rng.choice(THINGS.split()), rng.randint(2, 50)
    story, chain = [f"{who} has {value} {thing}."], []
    for _ in range(steps):
        op, n = rng.choice(_moves(value, rng))
        result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]
        other = rng.choice([name for name in NAMES if name != who])
        sentence = rng.choice(SENTENCES[op] + SENTENCES.get(f"{op}{n}", []))
        story.append(sentence.format(who=who, other=other, n=n, thing=thing))
        chain.append(f"{value} {op} {n} = {result}.")
        if sentence.startswith("{other}"):
            who = other
        value = result
    question = " ".join(story) + f" How many {thing} does {who} have?"
    return Problem(question, " ".join(chain) + f" #### {value}", str(value), level=steps)


def _moves(value, rng):
    """One (op, n) for each operation that keeps the running number a whole one in 1..MAX_VALUE."""
    limits = [("+", 1, min(40, MAX_VALUE - value)), ("-", 1, min(40, value - 1)),
              ("*", 2, min(9, MAX_VALUE // value))]
    moves = [(op, rng.randint(low, high)) for op, low, high in limits if low <= high]
    divisors = [n for n in range(2, 10) if value % n == 0]
    if divisors:
        moves.append(("/", rng.choice(divisors)))
    return moves


def make_passage(rng, people, facts):
    """So many facts about so many people: the text, and [(question, response, answer)] on it.

    No two facts are of one kind, so that the kind alone tells which fact a question asks for.
    """
    names = rng.sample(NAMES, people)
    told = {who: [] for who in names}
    questions = []
    for number, kind in enumerate(rng.sample(list(FACTS), facts)):
        who = names[number % people]
        question, values = FACTS[kind]
        value = rng.choice(values.split())
        told[who].append(kind.format(value))
        questions.append((question.format(who), f"{who} {told[who][-1]}. #### {value}", value))
    passage = " ".join(f"{who} {', '.join(told[who])}." for who in names)
    passage = re.sub(r", ([^,.]*\.)", r" and \1", passage)  # for the last comma of a sentence
    return passage, questions


def make_reading(rng):
    """14 to 16 facts about 5 to 8 people, and a question that one of them answers."""
    passage, questions = make_passage(rng, rng.randint(5, 8), rng.randint(14, 16))
    question, response, answer = rng.choice(questions)
    return Problem(f"{passage} {question}", response, answer, "reading")


def problems(kind, count, seed, evaluation=False, **kwargs):
    """`count` different problems of a kind, "maths" or "reading"; evaluation: held-out ones."""
    make = {"maths": make_maths, "reading": make_reading}[kind]
    rng, found = random.Random(f"{kind} {seed}"), {}
    while len(found) < count:
        problem = make(rng, **kwargs)
        if held_out(problem.question) == evaluation:
            found.setdefault(problem.question, problem)
    return list(found.values())


# ---- Tokenizer and chat template

class Tokenizer:
    """tokenizer.json, the chat template and the stop ids of a model folder.

    prompt_ids() is what a model expects to see of a user's question; encode() and decode() are for
    plain text. Raises FileNotFoundError or ValueError in one line that names the file.
    """

    def __init__(self, folder):
        import tokenizers
        folder = Path(folder)
        file = folder / "tokenizer.json"
        content = file.read_bytes()
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as e:  # the library raises nothing narrower
            raise ValueError(f"{file} is not a readable tokenizer: {e}") from None
        self.tokenizer.no_truncation()  # training settings that some checkpoints carry along
        self.tokenizer.no_padding()
        # Older models have a special_tokens_map.json.
        names = read_objects(folder, "special_tokens_map.json", "tokenizer_config.json")
        self.special_tokens = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = names.get(name, "")
            self.special_tokens[name] = token["content"] if isinstance(token, dict) else token
        self.template = names.get("chat_template")
        if isinstance(self.template, list):  # several templates, each with a name
            self.template = {t["name"]: t["template"] for t in self.template}.get("default")
        if (folder / "chat_template.jinja").exists():
            self.template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        stop = read_objects(folder, "config.json", "generation_config.json").get("eos_token_id", [])
        self.stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)

    def prompt(self, question):
        """The prompt string of one user question; without a chat template, the question itself."""
        if not self.template:
            return question
        try:
            return compile_template(self.template).render(
                messages=[{"role": "user", "content": question}], tools=None, documents=None,
                add_generation_prompt=True, **self.special_tokens)
        except Exception as e:  # a template may fail in any way that Python can
            raise ValueError(f"the chat template fails: {' '.join(str(e).split())}") from None

    def prompt_ids(self, question):
        """The prompt's ids. A template writes the bos itself; without one the tokenizer adds it."""
        return self.encode(self.prompt(question), add_special_tokens=not self.template)

    def encode(self, text, add_special_tokens=False):
        text.encode()  # JSON can hold half of a surrogate pair; that is a ValueError
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def read_objects(folder, *names):
    """The entries that are not null of those JSON files that exist; a later file's replace."""
    found = {}
    for file in [folder / name for name in names if (folder / name).exists()]:
        try:
            entries = json.loads(file.read_text(encoding="utf-8")).items()
        except (ValueError, AttributeError) as e:  # AttributeError: valid JSON, but no object
            raise ValueError(f"{file} is not a JSON object: {e}") from None
        found |= {key: value for key, value in entries if value is not None}
    return found


@lru_cache(maxsize=4)
def compile_template(template):
    """A chat template with the names that transformers gives it, sandboxed: it is foreign code."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes HTML
    env.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
    # {% generation %} ... {% endgeneration %} stands for its content, as {% with %} does.
    return env.from_string(re.sub(r"({%[-+]?\s*(?:end)?)generation\b", r"\1with", template))


def ask(problem):
    """The user's turn: the paper's instruction precedes maths and multiple choice, no other."""
    if problem.kind in ("maths", "choice"):
        return f"{INSTRUCTION} {problem.question}"
    return problem.question


# ---- Grading

MARK = re.compile(r"####|\\boxed\s*(?={)|\banswer\W*(?:is\b|:)[\s*:]*"
                  r"|^(?=[(*]*[A-J][)*.]*\s*\Z)", re.IGNORECASE | re.MULTILINE)
TYPESETTING = [  # (pattern, replacement): other ways to write the same
    (r"\\?[$%]|°|\^ ?{?\\circ}?|\\(?:left|right)\b|(?<!\\)\\[!,;: ()\[\]]|(?<=\d)~", ""),
    (r"\\(?:text|math|mbox)\w*\s*{([^{}]*)}", r" \1"),
    (r"\\[dt]frac", r"\\frac"),
    (r"{(,)}|{(\d)}(?!\d)", r"\1\2"),  # 1{,}000, x^{2}
    ("−", "-"),
    (r"\s+", " "),
    (r" ?([^\w ]) ?", r"\1"),
]
# A plural, or one of a few other words, is a unit: "17 more", "17 times" and "17 xyz" are not 17.
UNIT = (r"(?!(?:less|plus|minus|times|dozens|halves|thirds|\w+(?<!mon)ths|thousands|\w+illions)\b)"
        r"(?:[a-z]{3,}s|percent|people|children|feet|day|hour|cup|[ckm]m|[km]g|ml|ft|in|lb|"
        r"per [a-z]+)(?:(?:/| per )[a-z]+)?(?:\^[23])?")
# Before the number an option's letter, or the left side of an equation, may stand.
NUMBER = re.compile(rf"(?:\([a-j]\)|[a-z+]+=)?(-?\d*\.?\d+|-?\d+/[1-9]\d*)(?: ?({UNIT}))?")


def final_answer(text):
    r"""The final answer that a response states, stripped; "" if it states none.

    Marks are `#### N`, \boxed{...} with nested braces, "the answer is ...", "Answer: ..." and a
    last line that is a choice letter; the last mark counts.
    """
    for mark in reversed(list(MARK.finditer(text))):
        rest = text[mark.end():mark.end() + 1000].lstrip()
        if mark[0] == "####":
            found = rest.split("\n")[0]
        elif mark[0].startswith("\\"):
            found = _braced(rest)
        else:
            found = re.split(r"\n|\.\s", rest)[0]  # the sentence
        if found.strip():
            return found.strip().rstrip(".")
    return ""


def _braced(text):
    """What the brace at the start of a text encloses, "" if nothing closes it."""
    for brace in re.finditer("}", text):
        inside = text[1:brace.start()]
        if inside.count("{") == inside.count("}"):
            return inside
    return ""


def plain(text):
    """An answer without its typesetting: markdown, signs of units, LaTeX's spaces and fonts."""
    for pattern, replacement in TYPESETTING:
        text = re.sub(pattern, replacement, text)
    return text.lstrip("*` ").rstrip("*`.,; ")


def number(text):
    """(value, unit or None) of a plain answer that is one number and perhaps a unit, else None.

    The value is exact. Whatever might change it (5x, 5!, 5 or 6, 5 dozen) makes it no number.
    """
    text = re.sub(r"(?<!\d)\\frac ?({-?\d+}|\d)({\d+}|\d)(?!\d)", r"\1/\2", text.lower())
    found = NUMBER.fullmatch(re.sub(r"[{}]|(?<=\d),(?=\d{3}(?!\d))", "", text))  # 1,000
    return (Fraction(found[1]), found[2]) if found else None


def same_latex(found, gold):
    """Are two LaTeX formulas equal in meaning? One with a word or a number base is not read."""
    both = f"{found} {gold}"
    if not re.search(r"[\\{]", both) or re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|\d_", both):
        return False
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        warnings.warn("LaTeX answers must match as text; pip install math-verify compares meaning")
        return False
    found, gold = (parse(f"${text}$", [LatexExtractionConfig()]) for text in (found, gold))
    return verify(gold, found, float_rounding=12)


def correct(response, answer):
    """Does the final answer of a response mean this one? In doubt it does not.

    Choice letters compare as letters, numbers as numbers (a missing unit agrees with any), LaTeX by
    math-verify if that is installed, and the rest as text.
    """
    found, gold = plain(final_answer(response)), plain(answer)
    if not found:
        return False
    letter = gold.strip("()")
    if re.fullmatch("[A-J]", letter):  # right are B, (b) and B) Paris, but not B) or C)
        return bool(re.fullmatch(rf"\(?(?i:{letter})(?:[).:](?!.*\b[A-J]\b).*)?", found))
    if number(found) and number(gold):
        (value, unit), (gold_value, gold_unit) = number(found), number(gold)
        return value == gold_value and (unit == gold_unit or not unit or not gold_unit)
    return found.casefold() == gold.casefold() or same_latex(found, gold)


# ---- Data sets

ROW = "it needs question and answer, problem and solution, prompt and response, or messages"
BOXED = {"maths": r"Put your final answer within \boxed{}.",  # what an evaluation asks for besides
         "choice": r"Put the letter of your answer within \boxed{}."}


def read_rows(file):
    """[(number from 1, row)] of a JSONL file, as lines of text, or of a JSON list, as objects.

    A file of a hub data set is named hf://datasets/OWNER/NAME/PATH. Raises OSError or ValueError.
    """
    try:
        text = Path(local(file)).read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    except ValueError as e:
        raise ValueError(f"{file} is not valid JSON: {e}") from None
    return [(number, row) for number, row in enumerate(rows, 1) if row != ""]


def local(file):
    """The path itself, or of a file of a hub data set its local copy; OSError if that fails."""
    found = re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+)", str(file))
    if not found:
        return file
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(found[1], found[2], repo_type="dataset")
    except Exception as e:  # of several libraries
        raise OSError(f"cannot fetch {file}: {(str(e) or repr(e)).splitlines()[0]}") from None


def problem_from_row(row):
    r"""What a row of a data set is, as a Problem. Any exception means that it is none.

    kind     | fields                                                   | sets
    maths    | question, answer (ending in `#### N`)                    | GSM8K
             | problem, answer or solution (and level)                  | MATH, AMC, AIME, SVAMP
             | query, response                                          | MetaMathQA
             | question, response (and answer)                          | sample.py
    choice   | question, options or choices, answer (letter, position)  | multiple choice
    passage  | context, question, answer or answers                     | reading
    summary  | prompt, reference                                        | XSum
    text     | prompt, response; messages                               | chats
             | instruction, output (and input)                          | Alpaca
    Text is maths if its response ends in `#### N` or holds \boxed{...}. Of messages the first turn
    of the user and of the assistant count. GSM8K's calculator marks <<...>> are left out.
    """
    if "messages" in row:
        turns = {turn["role"]: turn["content"] for turn in reversed(row["messages"])}
        row = {"prompt": turns["user"], "response": turns["assistant"]}
    if "instruction" in row:
        prompt = f"{row['instruction']}\n{row.get('input') or ''}".strip()
        row = {"prompt": prompt, "response": row["output"]}
    question = row.get("question") or row.get("problem") or row.get("query") or row["prompt"]
    answer = row["answers"][0] if "answers" in row else row.get("answer")
    response = row.get("response") or row.get("solution") or row.get("reference", "")
    kind, lines = "maths", [question]
    options = row.get("options") or row.get("choices")
    if options:
        kind, letters = "choice", "ABCDEFGHIJ"[:len(options)]
        if answer not in list(letters):
            answer = dict(enumerate(letters))[answer]
        lines += [f"({letter}) {text}" for letter, text in zip(letters, options, strict=True)]
    elif "context" in row:
        kind, lines = "passage", [row["context"], question]
    elif "reference" in row:
        kind, answer = "summary", response
    elif "prompt" in row and not re.search(r"####[^\n]*\s*$|\\boxed\s*{", response):
        kind = "text"
    answer = "" if answer is None else str(answer)
    if "question" in row and not response:
        response = answer  # GSM8K's holds the worked solution
    response, steps = re.subn(r"<<[^<>\n]*=[^<>\n]*>>", "", response)
    if kind == "maths":
        answer = final_answer(answer) or answer or final_answer(response)
    return Problem("\n".join(lines), response, answer, kind, row.get("level", steps or None))


def read_problems(file, count=None, skip_bad=False, evaluation=False, boxed=False,
                  parse=problem_from_row):
    """The problems of a file that read_rows can read, the first `count` at most.

    Each must have a response to learn from; with evaluation, an answer instead. boxed: the question
    asks for the answer in a box, as an official model needs it. parse: what a row is. skip_bad
    names bad rows on stderr and leaves them out. Raises OSError, or ValueError in one line that
    names the file and the row.
    """
    found = []
    for number, row in read_rows(file):
        if len(found) == count:
            break
        try:
            problem = parse(json.loads(row) if isinstance(row, str) else row)
            (problem.question + problem.response).encode()  # ValueError for half a surrogate pair
            for field in ("question", "answer" if evaluation else "response"):
                if not getattr(problem, field).strip():
                    raise ValueError(f"no {field}")
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            message = f"{file}, line {number}: not a problem ({type(e).__name__}: {e}); {ROW}"
            if not skip_bad:
                raise ValueError(message) from None
            print("left out:", message, file=sys.stderr)
            continue
        if boxed and problem.kind in BOXED:
            problem.question += "\n" + BOXED[problem.kind]
        found.append(problem)
    if not found:
        raise ValueError(f"{file} holds no problems")
    return found


# ---- Batches

@dataclass
class Batch:
    """Samples side by side, padded on the right, all int64: tokens [B, T], the lengths [B]."""
    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor  # of prompt and response together

    def __post_init__(self):
        """The masks, bool [B, T]: generated is whatever follows the prompt, padding included."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        self.generated = position >= self.prompt_lengths[:, None]
        self.response = self.generated & (position < self.lengths[:, None])


def pad(sequences, device="cpu"):
    """Lists of ids -> (tokens [B, T] int64, zeros on the right, and lengths [B] int64)."""
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    tensors = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device), lengths


def until_stop(ids, stop_ids):
    """The ids up to and including the first stop id."""
    ends = [i + 1 for i, token in enumerate(ids) if token in stop_ids]
    return ids[:ends[0]] if ends else ids


def encode_samples(problems, tokenizer, max_tokens=2048):
    """Problems -> [(prompt_ids, response_ids)]. No stop id is added, as it is never fed back.

    Longer samples than max_tokens are dropped, and their number is said on stderr. ValueError if
    none is left.
    """
    samples = [(tokenizer.prompt_ids(ask(p)), tokenizer.encode(p.response)) for p in problems]
    short = [sample for sample in samples if sum(map(len, sample)) <= max_tokens]
    if len(short) < len(samples):
        print(f"too long: dropped {len(samples) - len(short)} of {len(samples)}", file=sys.stderr)
    if not short:
        raise ValueError(f"no sample has at most {max_tokens} tokens; raise --max-tokens")
    return short


def batch_indices(samples, batch_size, seed=None):
    """Lists of indices, one epoch of batches, similar lengths together; shuffled by a seed."""
    order = sorted(range(len(samples)), key=lambda i: sum(map(len, samples[i])))
    found = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    if seed is not None:
        random.Random(seed).shuffle(found)
    return found


def collate(samples, indices, device="cpu", counted=True):
    """The samples of these indices as a Batch; counted=False leaves its response mask empty."""
    tokens, lengths = pad([samples[i][0] + samples[i][1] for i in indices], device)
    prompt_lengths = torch.tensor([len(samples[i][0]) for i in indices], device=device)
    return Batch(tokens, prompt_lengths, lengths if counted else prompt_lengths)


def batches(samples, batch_size, device="cpu"):
    """All encoded samples once, as Batches of at most batch_size."""
    for indices in batch_indices(samples, batch_size):
        yield collate(samples, indices, device)
