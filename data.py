"""From text to batches of tokens: problems, samples, tokenizer, grading, data sets.

A generated problem is held out if a hash of its question says so. Training and evaluation can
therefore never share one, whatever their seeds are.
"""

import json
import math
import random
import re
import sys
import time
import zlib
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path

import torch

INSTRUCTION = "Please reason step by step."  # section 4: precedes maths questions
REPLACED = "\N{REPLACEMENT CHARACTER}"


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
THINGS = ("apples books coins cards shells stamps marbles pencils stickers buttons beads "
          "cookies").split()
FACTS = {  # a fact about a person: the question that asks for it, and its values
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
SENTENCES = {  # of each operation; "/2" and "*2" have further ones for n = 2
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
    who, thing, value = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 50)
    story, chain = [f"{who} has {value} {thing}."], []
    for _ in range(steps):
        op, n = rng.choice(possible_steps(value, rng))
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


def possible_steps(value, rng):
    """[(op, n)], one for each operation that keeps the number whole and in 1..MAX_VALUE."""
    limits = [("+", 1, min(40, MAX_VALUE - value)), ("-", 1, min(40, value - 1)),
              ("*", 2, min(9, MAX_VALUE // value))]
    steps = [(op, rng.randint(low, high)) for op, low, high in limits if low <= high]
    divisors = [n for n in range(2, 10) if value % n == 0]
    if divisors:
        steps.append(("/", rng.choice(divisors)))
    return steps


def make_passage(rng, people, facts):
    """A text with `facts` facts about `people` people, and [(question, response, answer)] on it.

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
    passage = re.sub(r", ([^,.]*\.)", r" and \1", passage)  # the last comma of a sentence
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


# ---- Samples and batches

def ask(problem):
    """The user's turn: the question, in maths and multiple choice after the paper's instruction."""
    if problem.kind in ("maths", "choice"):
        return f"{INSTRUCTION} {problem.question}"
    return problem.question


@dataclass
class Batch:
    """Samples side by side, padded on the right: tokens [B, T] and both lengths [B], all int64."""
    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor  # of prompt and response together

    def __post_init__(self):
        """Set the masks `generated` and `response`, bool [B, T].

        generated is True for all that follows the prompt. It includes the padding: the tokens that
        are not generated are counted for the selection, and padding must not be counted.
        """
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        self.generated = position >= self.prompt_lengths[:, None]
        self.response = self.generated & (position < self.lengths[:, None])


def encode_samples(problems, tokenizer, max_tokens=2048):
    """Problems -> [(prompt_ids, response_ids)]. No stop id is added, as it is never fed back.

    Samples of more than max_tokens tokens are left out; a line on stderr says how many they are.
    Raises ValueError if none is left, or if the tokenizer is not data.Tokenizer.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError("samples are encoded by data.Tokenizer(folder), which knows the chat "
                         f"template, not by a {type(tokenizer).__name__} of another library")
    samples = []
    for problem in problems:
        response = without_opening(tokenizer.prompt(ask(problem)), problem.response)
        samples.append((tokenizer.prompt_ids(ask(problem)), tokenizer.encode(response)))
    lengths = [len(prompt) + len(response) for prompt, response in samples]
    short = [sample for sample, length in zip(samples, lengths) if length <= max_tokens]
    if not short:
        raise ValueError(f"no sample has at most {max_tokens} tokens, the shortest has "
                         f"{min(lengths, default=0)}; raise --max-tokens")
    if len(short) < len(samples):
        print(f"too long: left out {len(samples) - len(short)} of {len(samples)} samples with over "
              f"{max_tokens} tokens; the longest has {max(lengths)}", file=sys.stderr)
    return short


def without_opening(prompt, response):
    """A response without the `<think>` with which the prompt already ends."""
    opening = re.search(r"<think>\s*$", prompt)
    if not opening or not response.lstrip().startswith("<think>"):
        return response
    return response.lstrip().removeprefix("<think>").removeprefix(opening[0][len("<think>"):])


def pad(sequences, device="cpu"):
    """B lists of ids -> (tokens [B, T] int64, padded by zeros on the right; lengths [B] int64)."""
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    tensors = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device), lengths


def batch_indices(samples, batch_size, seed=None):
    """One epoch of batches: lists of indices, each index once, similar lengths together.

    Without a seed the batches go from short to long. With a seed they come in random order, and
    batches of neighbouring lengths have exchanged samples. So each seed gives other batches.
    """
    rng = random.Random(seed)
    order = list(range(len(samples)))
    if seed is not None:
        rng.shuffle(order)  # the sort leaves samples of equal length in this order
    order.sort(key=lambda i: sum(map(len, samples[i])))
    if seed is not None:  # each sample moves by less than a batch
        places = {i: place + batch_size * rng.random() for place, i in enumerate(order)}
        order.sort(key=places.get)
    found = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    if seed is not None:
        rng.shuffle(found)
    return found


def collate(samples, indices, device="cpu", with_response=True):
    """The samples of these indices as a Batch; with_response=False empties its response mask."""
    tokens, lengths = pad([samples[i][0] + samples[i][1] for i in indices], device)
    prompt_lengths = torch.tensor([len(samples[i][0]) for i in indices], device=device)
    return Batch(tokens, prompt_lengths, lengths if with_response else prompt_lengths)


def batches(samples, batch_size, device="cpu"):
    """All encoded samples once, as Batches of at most batch_size."""
    for indices in batch_indices(samples, batch_size):
        yield collate(samples, indices, device)


# ======== What the paper's reader needs ends here. Below: tokenizer, grading, data sets ========

# ---- Tokenizer and chat template

class Tokenizer:
    """tokenizer.json, the chat template and the stop ids of a model folder.

    prompt_ids() gives a user's question in the form that the model expects. encode() and decode()
    are for plain text. Raises OSError or ValueError in one line that names the file.
    """

    def __init__(self, folder):
        import tokenizers
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there; {advice(file, 'fetch it')}")
        content = file.read_bytes()
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as e:  # the library raises nothing narrower
            raise ValueError(f"{file} is not a readable tokenizer ({e}); "
                             f"{advice(file, 'fetch it again')}") from None
        self.tokenizer.no_truncation()  # training settings that some checkpoints carry along
        self.tokenizer.no_padding()
        # Older models have a special_tokens_map.json.
        entries = read_objects(folder, "special_tokens_map.json", "tokenizer_config.json")
        self.special_tokens = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = entries.get(name, "")
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str):
                raise ValueError(f"{name} of {folder}/tokenizer_config.json or of "
                                 f"special_tokens_map.json is {entries[name]!r:.60}, not text")
            self.special_tokens[name] = token
        self.template = read_template(folder, entries.get("chat_template"))
        stop = read_objects(folder, "config.json", "generation_config.json").get("eos_token_id", [])
        self.stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)
        if not all(type(i) is int for i in self.stop_ids):
            raise ValueError(f"eos_token_id of {folder}/generation_config.json or of config.json "
                             f"is {stop!r:.60}, not the id of a token nor a list of ids")

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
        """The ids of a text. Raises ValueError if it holds what is no character."""
        check_characters(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids):
        """The text of ids without special tokens.

        U+FFFD stands for bytes that are not UTF-8, and for ids that the tokenizer does not have:
        many embeddings have more rows than their tokenizer has tokens.
        """
        text = ""
        for known, run in groupby(ids, lambda i: self.tokenizer.id_to_token(i) is not None):
            run = list(run)
            text += self.tokenizer.decode(run) if known else REPLACED * len(run)
        return text


def until_stop(ids, stop_ids):
    """The ids up to and including the first stop id."""
    for i, token in enumerate(ids):
        if token in stop_ids:
            return ids[:i + 1]
    return ids


def check_characters(text):
    """ValueError for what is no character: Python keeps it in a str, but no tokenizer knows it.

    A byte of the command line that is not text in the locale's encoding becomes U+DC80 to U+DCFF.
    JSON can hold half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        what = "half of a surrogate pair"
        if "\udc80" <= text[e.start] <= "\udcff":
            what = "not valid UTF-8; set PYTHONUTF8=1, or the terminal's encoding to UTF-8"
        raise ValueError(f"character {e.start + 1} is {what}: "
                         f"{text[max(0, e.start - 20):e.start + 20]!a}") from None


def advice(file, otherwise):
    """What to do about a file that cannot be read: what beyond/foreign_files.py says, if it can."""
    try:
        from beyond.foreign_files import explain
    except ImportError:
        return otherwise
    return explain(file) or otherwise


def read_text(file):
    """The text of a file; ValueError if it is not UTF-8."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is no text in UTF-8 (byte {e.start + 1}); "
                         f"{advice(file, 'save it as UTF-8')}") from None


def parse_json(text, file, place=""):
    """The value of a JSON text; ValueError names its file and its place in the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}{place} is not valid JSON ({e}); "
                         f"{advice(file, 'correct or fetch it again')}") from None


def read_objects(folder, *names):
    """The entries, without nulls, of those JSON files that exist. A later file's entries win."""
    found = {}
    for file in [folder / name for name in names if (folder / name).exists()]:
        entries = parse_json(read_text(file), file)
        if not isinstance(entries, dict):
            raise ValueError(f"{file} is not a JSON object")
        found |= {key: value for key, value in entries.items() if value is not None}
    return found


def read_template(folder, template):
    """The chat template: a file of its own, or this entry of tokenizer_config.json; may be None."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    if isinstance(template, list):  # several templates, each with a name
        named = {str(entry.get("name")): entry.get("template") for entry in template
                 if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise ValueError(f"{folder} has a chat template for {', '.join(named)}, but none named "
                             f"default; write the one to use to {file}")
    return template


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


# ---- Grading. LaTeX, units, letters and "the answer is" are paper/grading.py

MARK = re.compile(r"####|\\(?:boxed|fbox|framebox)(?![a-zA-Z])")
THOUGHT = re.compile(r"[<[◁]\|?(/|end_of_)?(?:begin_of_)?(?:think(?:ing)?|thoughts?|reasoning)"
                     r"\|?[]>▷]", re.IGNORECASE)
PERHAPS_ANSWER = re.compile(r"\d|####|\\f?box|\*\*|(?i:answer)|答|\b[B-HJ]\b|^\(?\w+\)?\.?(?=\n)")
NEXT_QUESTION = re.compile(r"<\|im_(?:start|end)\|>|"  # a chat's turns, "Question:", "### Question"
                           r"\n[^\w\n]{0,9}(?:question|problem|exercise|instruction|q|user|human|"
                           r"frage|aufgabe|pregunta|вопрос|задача|问题|题目|問題|문제)[ \d]*\**"
                           r"(?:[:：]|(?<=\d)\.)|"
                           r"\n#+ *(?:question|problem|exercise|instruction|user|human)[ \d]*\n",
                           re.IGNORECASE)
WITHDRAWN = re.compile(  # at the beginning of a clause; after "however" only with another answer
    r"(?:^|\n|[^\w\s])\s{0,9}(?:(?:oh|ah|hmm|well|so|but|or|and|no)\b\W{0,9})?(?:no[,:.!]|(?:wait|"
    r"hmm+|actually|sorry|oops|correction|scratch that|on second thought|i mean|or rather)\b|"
    r"let me re-?(?:do|calc|comp|consider|think|start|work|write|eval|exam)|"
    r"(?:however|but)\b[^.\n]{0,60}?\b(?:\d|(?-i:[B-HJ]\b)))", re.IGNORECASE)
SEVERAL = re.compile(r"box(?:ed)? *{[^{}]*}[\s$]*(?:,|;|and|or)(?:[\s$]|[a-zA-Z] *=)*$")
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.))(?:\.\d+|/0*[1-9]\d*)?")


def conclusion(response):
    """A response without its thoughts, up to where a base model asks itself a new question.

    Thoughts that do not end have no conclusion: "". A question that is only restated, before
    anything that may be an answer, is not a new one.
    """
    text = response.strip()
    for thought in THOUGHT.finditer(response):
        text = response[thought.end():].strip() if thought[1] else ""
    answer = PERHAPS_ANSWER.search(text)
    question = NEXT_QUESTION.search(text, answer.end()) if answer else None
    return text[:question.start()] if question else text


def final_answer(response):
    r"""What the last `#### N` or \boxed{N} of a response holds, stripped; "" if there is none.

    Marks with nothing behind them do not count, nor boxes that are cut off. Several boxes side by
    side are no clear answer, nor is one that is withdrawn ("No, wait: 6."): "".
    """
    text = conclusion(response)
    for mark in reversed(list(MARK.finditer(text))):
        rest = text[mark.end():].lstrip()
        found = rest.split("\n")[0] if mark[0] == "####" else argument(rest)
        if found.strip():
            several = SEVERAL.search(text[max(0, mark.start() - 200):mark.start()])
            withdrawn = WITHDRAWN.search(rest.partition(found)[2])
            return "" if several or withdrawn else found.strip().rstrip(".")
    return ""


def argument(text):
    """The argument of a LaTeX command at the start of a text: {...}, or a word; "" if cut off."""
    if not text.startswith("{"):
        return re.match(r"[^\s$]*", text)[0]
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[:1000]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[1:brace.start()]
    return ""


def number(text):
    """The exact value of a text such as 1,000 or 2.5 or 1/3; None if it is not a number."""
    if len(text) > 1000 or not NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def correct(response, answer):
    """Is the response's final answer equal to this one, as text or as a number? In doubt, no."""
    found, answer = final_answer(response), answer.strip()
    if number(found) is None or number(answer) is None:
        return found != "" and found == answer
    return number(found) == number(answer)


# ---- Data sets

COLUMNS = set("question prompt messages response answer kind level id block right".split())
NEEDED = "a row needs question and answer, prompt and response, or messages"
KINDS = ("maths", "reading", "choice", "passage", "summary", "text")
BOXED = {"maths": r"Put your final answer within \boxed{}.",  # what an official model is told
         "choice": r"Put the letter of your answer within \boxed{}."}


def public_datasets(what):
    """The module paper/datasets.py, which knows the hub and other columns.

    `what` is the reason to need it. Without the module this reason becomes a ValueError.
    """
    try:
        from paper import datasets
    except ImportError:
        raise ValueError(f"{what}; without paper/datasets.py {NEEDED}") from None
    return datasets


def read_rows(file):
    """Yield (place, row) for each row of a JSONL file or of one JSON list.

    The place is "line 3", or "row 3" of a list. A file of a hub data set is named
    hf://datasets/OWNER/NAME/PATH. Raises OSError, or ValueError in one line that names the place.
    """
    if str(file).startswith("hf://"):
        file = public_datasets(f"{file} is on the hub").download(file)
    text = read_text(file)
    if text.lstrip().startswith("["):
        for i, row in enumerate(parse_json(text, file), 1):
            yield f"row {i}", row
    else:
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {i}", parse_json(line, file, f", line {i} (one whole object)")


def text_of(row, column):
    """The text of a column, "" if it is absent. An answer may also be a finite number."""
    value = row.get(column, "")
    if column == "answer" and type(value) in (int, float) and abs(value) < math.inf:
        value = format(Decimal(str(value)), "f")
    if not isinstance(value, str):
        raise ValueError(f"{column} is {value!r:.60}, not text, nor a finite number as an answer")
    return value


def first_exchange(messages):
    """The first user's turn of a chat as prompt, and the assistant's turn after it as response.

    A system turn stands before the user's text.
    """
    try:
        roles = [turn["role"] for turn in messages]
        user = roles.index("user")
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"messages is {messages!r:.60}, not a list of turns with role and "
                         "content, one of them the user's") from None
    asked = [turn for turn in messages[:user + 1] if turn["role"] in ("system", "user")]
    row = {"prompt": "\n\n".join(text_of(turn, "content") for turn in asked)}
    if roles[user + 1:user + 2] == ["assistant"]:
        row["response"] = text_of(messages[user + 1], "content")
    return row


def problem_from_row(row):
    r"""A row of a data set as a Problem. Raises ValueError that says why it cannot be one.

    columns                  | what it is
    question, answer         | GSM8K: the answer is a worked solution, which ends in `#### N`
    question, response       | what beyond/own_answers.py writes
    prompt, response         | maths if the response marks its final answer, else text
    messages                 | the same; later exchanges are left out
    Each may also have answer, kind and level. The column answer counts more than the answer that
    the response marks. Null or empty columns are absent. paper/datasets.py knows other columns.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, not {row!r:.40}; {NEEDED}")
    row = {column: value for column, value in row.items()
           if value not in (None, [], {}) and str(value).strip()}
    if set(row) - COLUMNS or len({"question", "prompt", "messages"} & set(row)) != 1:
        row = public_datasets(f"its columns are {', '.join(row)}").translate(row)
    if "messages" in row:
        row = first_exchange(row["messages"]) | row
    question = text_of(row, "question") or text_of(row, "prompt")
    response, answer, level = text_of(row, "response"), text_of(row, "answer"), row.get("level")
    if "question" in row and "response" not in row:
        response, steps = re.subn(r"<<[^<>\n]*=[^<>\n]*>>", "", answer)  # GSM8K's calculator
        level = steps or level
    marked = re.search(r"####[^\n]*\s*$|\\f?box(ed)?\b", response)
    kind = row.get("kind", "maths" if "question" in row or answer or marked else "text")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r:.40}, not one of {', '.join(KINDS)}")
    if kind == "maths":
        answer = final_answer(answer) or answer or final_answer(response)
    check_characters(question + response + answer)
    return Problem(question, response, answer, kind, level)


def read_problems(file, count=None, evaluation=False, boxed=False):
    """The problems of a file that read_rows can read, the first `count` at most.

    Each must have a response to learn from; with evaluation, an answer instead. boxed: the question
    asks for the answer in a box, as an official model needs it. Raises OSError, or ValueError in
    one line that names the file and the row.
    """
    found = []
    for place, row in islice(read_rows(file), count):
        try:
            problem = problem_from_row(row)
            for field in ("question", "answer" if evaluation else "response"):
                if not getattr(problem, field).strip():
                    raise ValueError(f"no {field} in the columns {', '.join(row)}; {NEEDED}")
        except ValueError as e:
            raise ValueError(f"{file}, {place}: {e}") from None
        request = BOXED.get(problem.kind) if boxed else None
        if request and request not in problem.question:
            problem.question += "\n" + request
        found.append(problem)
    if not found:
        raise ValueError(f"{file} holds no problems")
    return found
