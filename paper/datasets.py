r"""Public data sets: their columns, and their files on the hub.

data.py hands a row here whose columns it does not know, and gets it back under its own names:

| columns, in any capitals                            | sets
| problem, solution or answer (and level)             | MATH, AMC, AIME, BRUMO
| query, response                                     | MetaMathQA
| problem, generated_solution, expected_answer        | OpenMathInstruct
| messages (and answer, problem, prompt)              | OpenR1-Math, NuminaMath, UltraChat
| Body, Question, Answer                              | SVAMP
| question, options or choices, answer (letter,       | multiple choice, MMLU
|     position from 0, or text)                       |
| question, choices of text and label, answerKey      | ARC, CommonsenseQA
| question, options, rationale, correct               | AQuA-RAT
| Question, Correct Answer, Incorrect Answer 1 to 3   | GPQA
| context or passage, question, answer or answers     | SQuAD, reading
| document, summary; article, highlights              | XSum, CNN/DailyMail
| prompt, reference                                   | GRIFFIN's XSum
| instruction, output (and input)                     | Alpaca
| instruction, response (and context)                 | Dolly
| prompt, completion                                  | TRL
| conversations of from and value (and system)        | ShareGPT, OpenThoughts
| system_prompt, question, response                   | OpenOrca

Other columns say nothing of the problem, but for those that CONTENT names: a question is not asked
without its picture.
"""

import random
import re

import data

CONTENT = re.compile(r"(?:^|_)(?:images?|pictures?|figures?|audio|video|tables?|tools|functions|"
                     r"hints?|facts|premise|hypothesis|inputs?|documents|paragraphs|endings|"
                     r"candidates)(?:_?\d+)?(?:_|$)")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "chatgpt": "assistant", "model": "assistant", "system": "system"}
SUMMARIZE = "Summarize the above article in 1 sentence."  # GRIFFIN's prompt


# ---- Files

def download(file):
    """The local copy of hf://datasets/OWNER/NAME/PATH; OSError if that fails."""
    found = re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+)", file)
    if not found:
        raise OSError(f"{file} is not hf://datasets/OWNER/NAME/PATH")
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(found[1], found[2], repo_type="dataset")
    except Exception as e:  # of several libraries
        raise OSError(f"cannot fetch {file}: {(str(e) or repr(e)).splitlines()[0]}") from None


# ---- Rows

def translate(row):
    """A row of a public data set under the names of data.problem_from_row.

    ValueError names the columns of a row that is of none.
    """
    columns = [column.strip().lower().replace(" ", "_") for column in row]
    if len(set(columns)) < len(columns):
        raise ValueError(f"two columns have one name: {', '.join(row)}")
    row = dict(zip(columns, row.values()))
    content = [column for column, value in row.items()
               if CONTENT.search(column) and value is not False
               and not (column == "input" and "instruction" in row)]
    if content:
        raise ValueError(f"{', '.join(content)} may belong to the question, and is not read; put "
                         f"what is to be asked into the question, or leave the column out")
    found = chat(row) or summary(row) or instruction(row) or question(row)
    if not found:
        raise ValueError(f"no data set is known with the columns {', '.join(row)}; {data.NEEDED}")
    for column in ("kind", "level"):
        if column in row:
            found[column] = row[column]
    return found


def only(row, *columns):
    """The one of these columns that a row has, None if it has none; ValueError if it has more."""
    found = [column for column in columns if column in row]
    if len(found) > 1:
        raise ValueError(f"it has the columns {' and '.join(found)}, of which one can be meant")
    return found[0] if found else None


def chat(row):
    """A chat as messages, from messages, conversations, or prompt and completion; else None."""
    column = only(row, "messages", "conversations")
    turns = row.get(column)
    if column is None and isinstance(row.get("prompt"), list):  # TRL's, of turns
        completion = row.get("completion", [])
        turns = row["prompt"] + completion if isinstance(completion, list) else completion
    if turns is None:
        return None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a chat is a list of turns with role and content, or from and value")
    messages = [{"role": "system", "content": row["system"]}] if "system" in row else []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        if role not in tuple(ROLES):
            raise ValueError(f"a turn is by {role!r:.40}, not by one of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": turn.get("content", turn.get("value"))})
    return {"messages": messages, "answer": row.get("answer", "")}


def summary(row):
    """An article and its summary; else None."""
    if {"prompt", "reference"} <= set(row):
        text, reference = data.text_of(row, "prompt"), data.text_of(row, "reference")
    else:
        article = only(row, "document", "article", "dialogue")
        short = only(row, "summary", "highlights")
        if not article or not short:
            return None
        text, reference = f"{data.text_of(row, article)}\n\n{SUMMARIZE}", data.text_of(row, short)
    return {"question": text, "response": reference, "answer": reference, "kind": "summary"}


def instruction(row):
    """An instruction with its input or context and its output; prompt and completion; else None."""
    response = only(row, "output", "completion", "response")
    prompt = only(row, "instruction", "prompt")
    if not prompt or not response:
        return None
    more = only(row, "input", "context")
    parts = [data.text_of(row, prompt)] + ([data.text_of(row, more)] if more else [])
    found = {"prompt": "\n".join(parts), "response": data.text_of(row, response)}
    return found | ({"answer": row["answer"]} if "answer" in row else {})


def question(row):
    """A question, perhaps with a passage or options, and its answer or solution; else None."""
    asked = only(row, "question", "problem", "query", "prompt")
    if not asked:
        return None
    passage = only(row, "context", "passage", "article", "body", "system_prompt")
    text = data.text_of(row, asked)
    if passage:
        before = data.text_of(row, passage)
        if passage == "body":  # SVAMP
            text = f"{before.rstrip()}{'' if before.rstrip()[-1] in '.?!' else '.'} {text}"
        else:
            text = f"{before}\n{text}"
    worked = only(row, "response", "solution", "generated_solution", "rationale")
    response = data.text_of(row, worked) if worked else ""
    if "correct_answer" in row:
        row = gpqa(row)
    options = only(row, "options", "choices")
    if options:
        letters, texts = read_options(row[options])
        answer = letter(row.get(only(row, "answer", "answerkey", "correct")), letters, texts)
        lines = [text] + [f"({a}) {b}" for a, b in zip("ABCDEFGHIJ", texts)]
        return {"question": "\n".join(lines), "response": response or answer, "answer": answer,
                "kind": "choice"}
    answer = row.get(only(row, "answer", "answers", "expected_answer"), "")
    if "answers" in row:
        answer = first_answer(answer)
    found = {asked if asked == "prompt" else "question": text, "answer": answer}
    if passage in ("context", "passage", "article"):
        return found | {"response": response or data.text_of(found, "answer"), "kind": "passage"}
    if passage == "system_prompt":
        return {"prompt": text, "response": response, "answer": answer}
    if worked or asked != "question" or passage:
        found["response"] = response
    return found


def first_answer(answers):
    """The first of several right answers: of a list, or of SQuAD's object with text."""
    texts = answers.get("text") if isinstance(answers, dict) else answers
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"answers is {answers!r:.60}, not texts in a list or under text")
    return texts[0]


# ---- Multiple choice

def gpqa(row):
    """GPQA's four answers as options, in an order that the question decides."""
    options = [row["correct_answer"]] + [row.get(f"incorrect_answer_{i}") for i in (1, 2, 3)]
    random.Random(data.text_of(row, "question")).shuffle(options)
    return {"options": options, "answer": options.index(row["correct_answer"])}


def read_options(options):
    """(labels, texts) of a list of texts, of {label: text}, or of {"text": [], "label": []}."""
    if isinstance(options, dict) and set(options) == {"text", "label"}:
        labels, texts = options["label"], options["text"]
    elif isinstance(options, dict):
        labels, texts = list(options), list(options.values())
    else:
        labels, texts = list("ABCDEFGHIJ"), options
    if not isinstance(texts, list) or not isinstance(labels, list) or not 2 <= len(texts) <= 10:
        raise ValueError(f"options are {options!r:.60}, not a list of 2 to 10 texts, nor an object")
    labels = labels[:len(texts)]
    if len(labels) < len(texts) or not all(isinstance(text, str) for text in texts + labels):
        raise ValueError(f"options are {options!r:.60}, of which each must be a text")
    stripped = [re.sub(rf"^\(?{re.escape(label)}[).:]\s*", "", text)
                for label, text in zip(labels, texts)]
    return labels, stripped if all(a != b for a, b in zip(stripped, texts)) else texts


def letter(answer, labels, texts):
    """The letter A to J of an option that is named by its label, its text, or its position from 0.

    ValueError if that names none, or more than one.
    """
    if type(answer) is int and 0 <= answer < len(texts):
        return "ABCDEFGHIJ"[answer]
    if not isinstance(answer, str):
        raise ValueError(f"answer is {answer!r:.40}, not an option's letter, position or text")
    labels = [label.upper() for label in labels]
    named = answer.strip().strip("().").upper()
    folded = answer.strip().casefold()
    same = {i for i, text in enumerate(texts) if text.strip().casefold() == folded}
    same |= {labels.index(named)} if named in labels else set()
    if not same and named.isdecimal() and int(named) < len(texts):
        same = {int(named)}
    if len(same) != 1:
        raise ValueError(f"the answer {answer!r:.40} is that of {len(same)} of the options")
    return "ABCDEFGHIJ"[same.pop()]
