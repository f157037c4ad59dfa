"""A model under test: its variants, their answers and learned corrections, which a folder keeps.

Answers and corrections are kept in the folder --out. Its settings.json says what made them; a run
with other settings is refused. What varies within a folder stands in the names of its files: the
problem set, the variant of the model, the batch size, the temperature. A method is edited and tried
again, so part of a variant's name is a hash of the files that its class and those of its bases that
are SparseFFs stand in: caprese.py, and the file of a --block. No other files are hashed; when
others may have changed, a note names the commit.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch

import caprese
import data
import distill
import sample
from model import read_json
from paper.common import TOP_P, CannotRun, adapter_method, trainable
from paper.report import commit, write
from paper.scores import SCORES, differences, right_or_wrong, scores, summary

TEXTS = ("set", "variant", "kind", "question", "answer", "response")  # of a kept answer
NUMBERS = ("problem", "run", "tokens")
RECIPE = ("samples", "layerwise", "loss", "e2e_lr", "e2e_epochs", "e2e_batch_size")


class Experiment:
    """A model, the samples that teach it, the problems, and the folder of what is kept.

    count and reused are how many answers were asked for, and how many of these earlier runs gave.
    Raises CannotRun if a flag that the script needs is missing, OSError or ValueError on what does
    not fit.
    """

    def __init__(self, args, problems=True, samples=False):
        if problems and args.model and not args.data:
            raise CannotRun("--model needs problems to answer: give --data FILE")
        if samples and not trainable(args):
            raise CannotRun("this needs samples to learn from: give --train FILE, or no --model")
        self.args, self.folder = args, Path(args.out)
        self.count = self.reused = 0
        self.scored = {}  # {(variant, name of the set): its answers}
        contents = input_digests(args)  # all files are read before the model is loaded
        self.sets = problem_sets(args)
        self.model, self.tokenizer = sample.load(args)
        for file in args.adapter:
            self.load_adapter(file)  # does it fit?
        if trainable(args):
            caprese.attach(self.model, rank=args.rank)  # is the rank in range?
            recipe = argparse.Namespace(**vars(args) | {"data": args.train})
            self.samples = distill.training_samples(recipe, self.tokenizer)
        caprese.detach(self.model)
        hidden_size = self.model.config.hidden_size
        self.title = f"{args.model or 'bundled model'}: D = {hidden_size}, r = {args.rank}"
        self.open_folder(contents)

    def open_folder(self, contents):
        """Create the folder of kept work; if it is there, the same settings must have made it."""
        args, file = self.args, self.folder / "settings.json"
        settings = contents | {
            "model": caprese.fingerprint(self.model), "dtype": str(self.model.dtype),
            "device": args.device, "seed": args.seed, "max_new_tokens": args.max_new_tokens,
            "chat template": digest(repr(self.tokenizer.template).encode())}
        if trainable(args):
            settings |= {name: getattr(args, name) for name in RECIPE}
        self.folder.mkdir(parents=True, exist_ok=True)
        if not file.exists() and any(self.folder.glob("*.jsonl")):
            raise ValueError(f"{args.out} holds answers without a settings.json that says what "
                             "made them; give another --out")
        begun = file.exists()
        saved = read_json(file) if begun else {"commit": commit()}
        if not isinstance(saved, dict):
            raise ValueError(f"{file} does not say what made the answers beside it; give another "
                             "--out")
        differ = [name for name in settings if saved.get(name, settings[name]) != settings[name]]
        if differ:
            raise ValueError(f"{args.out} holds the work of a run with another "
                             f"{', '.join(differ)}; give another --out")
        if saved.get("commit") != commit() or begun and commit().endswith("-dirty"):
            print(f"note: {args.out} was begun at commit {saved.get('commit')}, and this is "
                  f"{commit()}; if more than the files of a method has changed, give another --out",
                  file=sys.stderr)
        temporary = file.with_suffix(".tmp")
        write(temporary, (json.dumps(saved | settings, indent=1) + "\n").encode())
        temporary.replace(file)

    def graded(self):
        """(name, problems) of the first set whose answers are right or wrong."""
        for name, problems in self.sets.items():
            if right_or_wrong(problems[0]):
                return name, problems
        raise CannotRun("this needs problems whose answers are right or wrong, not passages or "
                        "articles: give other --data")

    def load_adapter(self, file):
        """Attach an adapter, as it was learned."""
        return caprese.load_adapter(self.model, file, method=adapter_method(self.args, file))

    def prepare(self, variant):
        """Attach a variant and return the model; its correction is read from the folder, or learned
        and kept there."""
        args, model = self.args, caprese.detach(self.model)
        if variant.adapter:
            return self.load_adapter(variant.adapter)
        if variant.method is None:
            return model
        if not variant.stages:
            torch.manual_seed(args.seed)
            return caprese.attach(model, variant.method, variant.density, variant.layers,
                                  variant.rank)
        name = replace(variant, reselect=None).file_name()
        file = self.folder / f"{name}.safetensors"
        if file.exists():
            return caprese.load_adapter(model, file, method=variant.method)
        self.prepare(replace(variant, stages=variant.stages[:-1]))
        checkpoint = distill.Checkpoint(f"{file}.state", {"variant": name})
        if variant.stages[-1] == "layer-wise":
            distill.layerwise_stage(model, self.samples, args, checkpoint)
        else:
            distill.train_end_to_end(
                model, self.samples, args.e2e_lr, args.e2e_epochs, args.e2e_batch_size, args.loss,
                micro_batch=args.micro_batch, seed=args.seed, checkpoint=checkpoint,
                save_every=args.save_every)
        caprese.save_adapter(model, file)
        checkpoint.file.unlink(missing_ok=True)
        return model

    def answers(self, variant, name, problems):
        """A dictionary for each of --runs answers to each problem of the set `name`, in order.

        Those that the folder holds are read. Batches that lack one are decoded and appended. What a
        batch draws depends on its first answer alone, so that a killed run goes on to the same.
        """
        args = self.args
        file = self.folder / (f"{name}-{variant.file_name()}-batch-{args.batch_size}"
                              f"-temperature-{args.temperature:g}.jsonl")
        done = {job: answer | scores(problems[job[0]], answer["response"])  # by today's scores
                for job, answer in read_answers(file).items() if is_to(answer, problems)}
        jobs = [(i, run) for i in range(len(problems)) for run in range(args.runs)]
        batches = [jobs[i:i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
        missing = [batch for batch in batches if not done.keys() >= set(batch)]
        self.count += len(jobs)
        self.reused += len(jobs) - sum(map(len, missing))
        if missing:
            if file.exists():
                os.truncate(file, len(complete_lines(file)))
            self.prepare(variant)
            if args.batch_size == 1:
                self.decode(variant, problems, [(0, 0)])  # a warm-up, whose time does not count
        for batch in sample.progress(missing, f"{name}, {variant.name}", len(missing)):
            answers = self.decode(variant, problems, batch)
            done |= dict(zip(batch, answers))
            lines = [json.dumps({"set": name} | answer, ensure_ascii=False) for answer in answers]
            write(file, "".join(f"{line}\n" for line in lines).encode(), "ab")
        return [done[job] for job in jobs]

    def decode(self, variant, problems, batch):
        """The answers of the attached model to a batch of (problem's index, run), in order."""
        args, found = self.args, {}
        seed = zlib.crc32(f"{args.seed} {batch[0]}".encode())
        questions = [data.ask(problems[i]) for i, _ in batch]
        start = time.perf_counter()
        responses = list(sample.respond(
            self.model, self.tokenizer, questions, args.max_new_tokens, len(batch),
            temperature=args.temperature, top_p=TOP_P if args.temperature else 1.0,
            reselect=variant.reselect,
            generator=torch.Generator(self.model.device).manual_seed(seed)))
        seconds = (time.perf_counter() - start) / len(batch)
        for index, response, tokens in responses:
            i, run = batch[index]
            found[index] = {
                "variant": variant.name, "problem": i, "run": run, "kind": problems[i].kind,
                "question": problems[i].question, "answer": problems[i].answer,
                "response": response, **scores(problems[i], response), "tokens": tokens,
                "ended": 0 < tokens < self.room(questions[index]), "seconds": seconds}
        return [found[index] for index in range(len(batch))]

    def room(self, question):
        """How many tokens an answer may have. One that has as many was cut off, or nearly so."""
        context = self.model.config.max_position_embeddings
        return min(self.args.max_new_tokens, context - len(self.tokenizer.prompt_ids(question)))

    def answer_alone(self, problems, generate):
        """Answer one problem after the other by generate(prompt [1, S]) -> new tokens [1, N].

        Returns for each problem its token ids, its text, and its seconds. Nothing is kept.
        """
        prompts = [torch.tensor([self.tokenizer.prompt_ids(data.ask(problem))],
                                device=self.model.device) for problem in problems]
        generate(prompts[0])  # a warm-up, whose time does not count
        answers, seconds = [], []
        for prompt in sample.progress(prompts, "answers", len(prompts)):
            start = time.perf_counter()
            ids = generate(prompt)[0].tolist()
            seconds.append(time.perf_counter() - start)
            answers.append(sample.answer_ids(ids, self.tokenizer))
        return answers, [self.tokenizer.decode(ids) for ids in answers], seconds

    def rows(self, variants):
        """A row for each variant: the parameters that it adds, and its scores."""
        found = []
        for variant in variants:
            added = 100 * caprese.added_parameters(self.prepare(variant))
            row = {"method": variant.name, "added parameters %": added}
            found.append(row | self.score_columns(variant))
        return found

    def score_columns(self, variant):
        """The scores of a variant on every problem set, as columns of a table."""
        columns = {}
        for name, problems in self.sets.items():
            answers = self.answers(variant, name, problems)
            self.scored[variant, name] = answers
            columns |= summary(answers, f"{name} ")
        return columns

    def difference_row(self, variant, other):
        """A row: how many points a variant scores above another, of which both have been scored."""
        row = {"method": f"{variant.name} against {other.name}"}
        for name in self.sets:
            row |= differences(self.scored[variant, name], self.scored[other, name], f"{name} ")
        return row


def input_digests(args):
    """{name of an input: hash of its content}; OSError or ValueError if a file cannot be read."""
    found = {}
    for file in args.adapter:
        caprese.read_adapter(file)
        found[f"adapter {Path(file).stem}"] = digest(Path(file).read_bytes())
    contents = {file: digest(repr(list(data.read_rows(file))).encode())
                for file in args.data + args.train}
    found |= {f"data {Path(file).stem}": contents[file] for file in args.data}
    if trainable(args):
        found["training data"] = [contents[file] for file in args.train]
    return found


def digest(content):
    """A short hash of bytes."""
    return hashlib.sha256(content).hexdigest()[:12]


def problem_sets(args):
    """{name: problems} of --data, or the bundled model's held-out ones."""
    if args.data:
        boxed = bool(args.model)  # the bundled model marks its answers by `####`
        return {Path(file).stem: data.read_problems(file, args.limit, evaluation=True, boxed=boxed)
                for file in args.data}
    counts = {"maths": args.limit, "reading": (args.limit + 1) // 2}
    return {kind: data.problems(kind, count, distill.EVALUATION_SEED, evaluation=True)
            for kind, count in ({} if args.model else counts).items()}


def is_to(answer, problems):
    """Is a kept answer one to the problem that has its index now?"""
    i = answer["problem"]
    return i < len(problems) and (answer["question"], answer["answer"]) == (
        problems[i].question, problems[i].answer)


def complete_lines(file):
    """The bytes of a file without a last line that a kill cut short."""
    content = file.read_bytes()
    return content[:content.rfind(b"\n") + 1]


def read_answers(file):
    """{(problem, run): answer} of a JSONL file, which may be missing.

    Raises ValueError, which names the file and the line, if a line is no answer of this folder.
    """
    lines = complete_lines(file).split(b"\n")[:-1] if file.exists() else []
    answers = {}
    for number, line in enumerate(lines, 1):
        answer = parse_answer(line)
        if answer is None:
            raise ValueError(f"{file}, line {number} is not a kept answer; delete the line, and it "
                             "is answered anew")
        answers[answer["problem"], answer["run"]] = answer
    return answers


def parse_answer(line):
    """The dictionary in a line of kept answers, or None if the line is damaged."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(answer, dict) and "ended" in answer):
        return None
    values = [answer[score] for score in SCORES if score in answer]
    whole = (all(isinstance(answer.get(name), str) for name in TEXTS)
             and all(type(answer.get(name)) is int for name in NUMBERS)
             and values and all(isinstance(value, (int, float)) for value in values))
    return answer if whole else None
