"""A training set of the full model's own answers: python -m beyond.own_answers

The paper's training set is private. So let the full model write an open one. --questions FILE holds
questions with answers, as data.read_problems reads them. --out FILE gets a JSON row for each answer
that counts, and distill.py --data FILE learns from them. An answer counts only if it ends with a
stop id: one that was cut by the context or by --max-new-tokens does not show how to end.

After an interrupt the same command continues, and the file gets the same bytes as without one.
FILE.about.json says by which questions, model and settings FILE was written, and how far it is.
"""

import hashlib
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

import caprese
import data
import sample
from model import read_json

SETTINGS = ("n", "temperature", "top_p", "max_new_tokens", "only_right", "batch_size", "seed")


# ---- the file

class Output:
    """A JSONL file that grows block by block, and beside it what it was made by: `about`.

    A block counts once `about` has been replaced. Until there are `total` answers, what stands
    behind the bytes that it names is of an interrupted block, and is overwritten. Raises
    ValueError, and both files stay as they are, if the file was made by other settings, or changed
    by other hands. Raises OSError, which names the file, if it cannot be written.
    """

    def __init__(self, file, settings, total):
        self.file, self.about_file = Path(file), Path(f"{file}.about.json")
        self.about = {"settings": settings, "answers": 0, "samples": 0, "bytes": 0}
        self.hash = hashlib.sha256()
        if self.file.exists() and self.about_file.exists():
            self.resume(settings, total)
        elif self.file.exists() and self.file.stat().st_size:
            raise ValueError(f"{file} is there, but no {self.about_file} that says what made it; "
                             "give another --out")
        else:
            self.save()
            self.file.touch()

    def resume(self, settings, total):
        """Take up the blocks that are in the file; ValueError if they are not by these settings."""
        about = read_json(self.about_file)
        try:
            earlier = about["settings"]
            changed = [f"{name} was {earlier.get(name)} and is {value}"
                       for name, value in settings.items() if earlier.get(name) != value]
            with open(self.file, "rb") as opened:
                self.hash.update(opened.read(about["bytes"]))
            more = about["answers"] >= total and self.file.stat().st_size > about["bytes"]
            intact = self.hash.hexdigest() == about["sha256"] and not more
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.about_file} does not say what made {self.file}; give another "
                             "--out") from None
        if changed:
            raise ValueError(f"{self.file} was made by other settings: {'; '.join(changed)}; "
                             "give another --out, or delete it")
        if not intact:
            raise ValueError(f"{self.file} has been changed since it was written; give another "
                             "--out, or delete it")
        self.about = about

    def append(self, rows, answers):
        """Write the samples of one block of so many answers."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with naming(self.file), open(self.file, "r+b") as opened:
            opened.seek(self.about["bytes"])
            opened.truncate()  # what an interrupted run has left
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        self.hash.update(text)
        self.about["answers"] += answers
        self.about["samples"] += len(rows)
        self.about["bytes"] += len(text)
        self.save()

    def save(self):
        """Write `about` under a temporary name, then rename it."""
        temporary = Path(f"{self.about_file}.tmp")
        about = self.about | {"sha256": self.hash.hexdigest()}
        with naming(self.about_file):
            temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.about_file)


@contextmanager
def naming(file):
    """Let an OSError within say which file could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {file} ({error.strerror}); the blocks before are kept, so "
                      "make room, and the same command goes on") from None


# ---- the answers

def write_answers(args, out):
    """Answer each question args.n times; returns what --json prints.

    What a block draws depends on the settings and on the number of its first answer alone. Raises
    ValueError if there is no sample in the end.
    """
    problems = data.read_problems(args.questions, evaluation=True, boxed=bool(args.model))
    model, tokenizer = sample.load(args)
    if not tokenizer.stop_ids:
        raise ValueError("the model names no eos_token_id, so none of its answers would end")
    grade = grader()
    questions = fitting(problems, tokenizer, model.config.max_position_embeddings)
    asked = [question for question in questions for _ in range(args.n)]
    output = Output(args.out, {name: getattr(args, name) for name in SETTINGS} | {
        "questions": digest(questions), "model": caprese.fingerprint(model),
        "dtype": str(model.dtype), "device": model.device.type,
        "graded by": grade.__module__}, len(asked))
    print(f"Asking {args.model or 'the bundled model'} on {args.device} {len(questions)} questions,"
          f" {args.n} times each; {grade.__module__} grades.\n{state(output, args, questions)}",
          file=out)
    starts = range(output.about["answers"], len(asked), args.batch_size)
    if starts:
        for start in sample.progress(starts, "blocks", len(starts)):
            block = asked[start:start + args.batch_size]
            generator = torch.Generator(model.device).manual_seed(args.seed * 1_000_003 + start)
            output.append(answer(model, tokenizer, block, generator, grade, args), len(block))
        print(state(output, args, questions), file=out)
    if not output.about["samples"]:
        raise ValueError(f"{args.out} is empty: none of {len(asked)} answers ended within the "
                         "context and --max-new-tokens" + " and was right" * args.only_right)
    return {"file": args.out, "answers": len(asked), "samples": output.about["samples"]}


def grader():
    """The function that grades: paper/'s, which reads LaTeX and units, or data.py's without it."""
    try:
        from paper.grading import correct
    except ImportError:
        return data.correct
    return correct


def fitting(problems, tokenizer, limit):
    """[(problem, its prompt's ids)] of those that the context can hold; others are named."""
    found = []
    for number, problem in enumerate(problems, 1):
        prompt = tokenizer.prompt_ids(data.ask(problem))
        if 0 < len(prompt) < limit:
            found.append((problem, prompt))
        else:
            print(f"note: question {number} has {len(prompt)} tokens, which the context cannot "
                  f"hold, and is left out: {problem.question[:60]!r}", file=sys.stderr)
    return found


def digest(questions):
    """A hash of all that is asked, and of how the tokenizer writes it."""
    content = json.dumps([[asdict(problem), prompt] for problem, prompt in questions])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def state(output, args, questions):
    """One line on how far the file is."""
    answered = output.about["answers"] // args.n
    line = (f"{args.out} holds the answers to {answered} of {len(questions)} questions, which gave "
            f"{output.about['samples']} samples")
    return f"{line}; it is finished." if answered == len(questions) else f"{line} so far."


def answer(model, tokenizer, block, generator, grade, args):
    """The rows of one block of (problem, prompt): of answers that end, and are not empty."""
    tokens, lengths = data.pad([prompt for _, prompt in block], model.device)
    new = sample.generate(model, tokens, args.max_new_tokens, args.temperature, args.top_p,
                          stop_ids=tokenizer.stop_ids, prompt_lengths=lengths, generator=generator)
    rows = []
    for (problem, _), ids in zip(block, new.tolist()):
        ids = sample.answer_ids(ids, tokenizer)
        response = tokenizer.decode(ids)
        right = grade(response, problem.answer)
        ends = ids[-1] in tokenizer.stop_ids and response.strip()
        if ends and (right or not args.only_right):
            rows.append({"question": problem.question, "response": response,
                         "answer": problem.answer, "kind": problem.kind, "right": right})
    return rows


# ---- python -m beyond.own_answers

def arguments(argv=None):
    """The command line; ValueError for flags that do not go together."""
    parser = sample.ArgumentParser(prog="python -m beyond.own_answers",
                                   description=__doc__.splitlines()[0])
    add = sample.common_arguments(parser).add_argument
    add("--questions", metavar="FILE", required=True, help="the questions, with their answers")
    add("--out", metavar="FILE", required=True, help="the training set to write or to continue")
    add("-n", type=sample.positive, default=1, help="answers to each (default: %(default)s)")
    add("--temperature", type=float, help="default: 0, or the paper's 0.6 with -n above 1")
    add("--top-p", type=float, help="default: 1, or the paper's 0.95 with -n above 1")
    add("--max-new-tokens", type=sample.positive, default=512, help="default: %(default)s")
    add("--only-right", action="store_true", help="keep only right answers")
    add("--batch-size", type=sample.positive, default=64, help="default: %(default)s")
    args = parser.parse_args(argv)
    several = args.n > 1
    args.temperature = (0.6 if several else 0.0) if args.temperature is None else args.temperature
    args.top_p = (0.95 if several else 1.0) if args.top_p is None else args.top_p
    sample.check_decoding(args.max_new_tokens, args.temperature, args.top_p)
    if several and args.temperature == 0:
        raise ValueError(f"-n {args.n} at temperature 0 would give {args.n} times the same answer")
    for file in (args.out, f"{args.out}.about.json"):
        sample.check_output(file, [args.questions])
    return args


def main():
    args = arguments()
    result = write_answers(args, sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sample.run_command(main)
