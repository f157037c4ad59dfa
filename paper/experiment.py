"""What the scripts measure with: variants of the model, and the answers that they give.

Answers (JSONL) and learned corrections (safetensors) are kept in the folder --out and read from it
by the next run. The name of such a file ends in a hash of all that its content depends on, so a
file from before a change is never read after it: settings, model, data files, and the source code.
"""

import hashlib
import inspect
import json
import os
import re
import time
import zlib
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

import caprese
import data
import distill
import sample
from paper.scores import read_row, scores, summary

TOP_P = 0.95  # the paper's, where it samples
BUNDLED_CATS_DENSITY = 0.05  # at 0.2 and above CATS costs so small a model nothing
METHODS = {"griffin": "GRIFFIN", "griffin-all": "GRIFFIN all layers", "cats": "CATS",
           "int4": "4-bit"}  # --method: name in the tables
LAYERWISE, E2E, BOTH_STAGES = ("layer-wise",), ("E2E",), ("layer-wise", "E2E")
PROJECT = Path(__file__).resolve().parents[1]
SOURCES = [PROJECT / f"{name}.py" for name in ("model", "caprese", "data", "sample", "distill")]
SOURCES += [Path(__file__), PROJECT / "paper" / "scores.py"]


def digest(about):
    """A short hash of what `about` looks like in Python."""
    return hashlib.sha256(repr(about).encode(errors="surrogatepass")).hexdigest()[:12]


@dataclass(frozen=True)
class Variant:
    """A row of a table: a sparse method and how its correction is learned, or an adapter.

    Without a method and an adapter it is the full model.
    """
    name: str
    method: str | None = None
    density: float = 1.0
    rank: int = 0
    stages: tuple = ()           # of distillation, in order
    block: type = caprese.SparseFF
    adapter: str | None = None   # a file of distill.py, which says all of the above
    reselect: int | None = None  # rho, in tokens
    layers: str | None = None    # "all", or None for the paper's choice


class Experiment:
    """What scripts measure with: settings, model, training samples, problems, kept answers.

    contents is {input file: hash}. count and reused are how many answers the rows are made of, and
    how many of these are from earlier runs. Loading raises OSError or ValueError on what does not
    fit the model.
    """

    def __init__(self, args, contents, load=True):
        self.args, self.contents, self.count, self.reused = args, contents, 0, 0
        # The code that this process runs, also if a file is edited in the meantime.
        self.code = digest([file.read_bytes() for file in SOURCES])
        self.rank = args.rank or (distill.DEFAULTS if args.model else distill.BUNDLED)["rank"]
        self.trainable = bool(args.train) or not args.model
        if not load:
            return
        self.model, self.tokenizer = sample.load(args)
        for file in args.adapter:
            caprese.load_adapter(self.model, file)
        if self.trainable:
            caprese.attach(self.model, rank=self.rank)
            self.samples = distill.training_samples(self.recipe(), self.tokenizer)
        caprese.detach(self.model)

    def recipe(self, rank=None):
        """distill.py's settings for the samples of --train, or of the bundled model."""
        args = self.args
        flags = ["--seed", args.seed, "--rank", rank or self.rank]
        for flag, value in (("--samples", args.samples), ("--model", args.model),
                            ("--e2e-lr", args.e2e_lr), ("--e2e-epochs", args.e2e_epochs)):
            flags += [flag, value] if value else []
        for file in args.train:
            flags += ["--data", file]
        return distill.arguments([str(flag) for flag in flags])

    def problem_sets(self):
        """{name: problems} of --data, or the bundled model's held-out ones."""
        args, seed = self.args, distill.EVALUATION_SEED
        if args.data:
            boxed = bool(args.model)  # the bundled model marks its answers by `####`
            return {Path(file).stem: data.read_problems(file, args.limit, evaluation=True,
                                                        boxed=boxed, parse=read_row)
                    for file in args.data}
        half = -(-args.limit // 2)
        return {"maths": data.problems("maths", args.limit, seed, evaluation=True),
                "reading": data.problems("reading", half, seed, evaluation=True)}

    def graded(self):
        """(name, problems) of the first set whose answers are right or wrong."""
        for name, problems in self.problem_sets().items():
            if problems[0].kind not in ("passage", "summary"):
                return name, problems
        raise ValueError("this needs problems whose answers are right or wrong, not F1 or ROUGE: "
                         "give other --data")

    def sparse(self, method):
        """The variant of a sparse method without a correction."""
        density = self.args.density or 0.5
        if method == "cats" and not self.args.model:
            density = self.args.density or BUNDLED_CATS_DENSITY
        layers = "all" if method == "griffin-all" else None
        return Variant(METHODS[method], method.removesuffix("-all"),
                       1.0 if method == "int4" else density, layers=layers)

    def learned(self, variant, stages, name=None):
        """A variant with a correction that is learned in these stages."""
        name = name or f"{variant.name} + {stages[-1]}"
        return replace(variant, name=name, rank=variant.rank or self.rank, stages=stages)

    def variants(self, methods, stages=(LAYERWISE, BOTH_STAGES)):
        """The full model, each method alone and after each of these stages, --adapter files."""
        found = [Variant("full")]
        for method in self.args.method or methods:
            alone = self.sparse(method)
            found.append(alone)
            if self.trainable:
                found += [self.learned(alone, last) for last in stages]
        return found + self.adapters()

    def adapters(self):
        """The variants of the --adapter files."""
        return [Variant(Path(file).stem, adapter=file) for file in self.args.adapter]

    def file(self, name, variant, settings, suffix):
        """The file in --out for what depends on the variant, these settings and nothing else."""
        about = [replace(variant, name="", adapter=self.contents.get(variant.adapter)), settings,
                 caprese.fingerprint(self.model), self.model.dtype, self.tokenizer.template,
                 self.code, Path(inspect.getsourcefile(variant.block)).read_bytes()]
        if variant.stages:
            recipe = vars(self.recipe(variant.rank)) | {"device": None, "model": None, "data": None}
            about += [recipe, [self.contents[file] for file in self.args.train]]
        words = [name, variant.method or variant.name, *variant.stages]
        stem = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
        return Path(self.args.out) / f"{stem}-{digest(about)}.{suffix}"

    def prepare(self, variant):
        """Attach a variant; L and R are read from --out, or learned and kept there.

        Returns the model.
        """
        model = caprese.detach(self.model)
        variant = replace(variant, reselect=None)
        if variant.adapter:
            return caprese.load_adapter(model, variant.adapter)
        if variant.method is None:
            return model
        if not variant.stages:
            torch.manual_seed(self.args.seed)
            layers = range(len(model.model.layers)) if variant.layers == "all" else None
            return caprese.attach(model, variant.method, variant.density, layers, variant.rank,
                                  variant.block)
        file = self.file("", variant, None, "safetensors")
        if file.exists():
            return caprese.load_adapter(model, file, block=variant.block)
        self.prepare(replace(variant, stages=variant.stages[:-1]))
        train = distill.layerwise if variant.stages[-1] == "layer-wise" else distill.end_to_end
        train(model, self.samples, self.recipe(variant.rank))
        caprese.save_adapter(model, file)
        return model

    def answers(self, variant, name, problems):
        """A dictionary for each of args.runs answers to each problem of the set `name`, in order.

        Those in the variant's JSONL file are read from it. The batches that lack one are decoded
        and appended to it. What a batch draws depends on its first answer alone, so a run that was
        killed continues to the same answers.
        """
        args = self.args
        settings = [args.seed, args.temperature, args.max_new_tokens, args.batch_size, args.device,
                    [self.contents[file] for file in args.data if Path(file).stem == name]]
        file = self.file(name, variant, settings, "jsonl")
        done = {}
        for answer in read_answers(file):
            i = answer["problem"]
            if i < len(problems) and answer["question"] == problems[i].question:
                done[i, answer["run"]] = answer
        jobs = [(i, run) for i in range(len(problems)) for run in range(args.runs)]
        missing = []
        for batch in batches(jobs, args.batch_size, args.runs):
            if not all(job in done for job in batch):
                missing.append(batch)
        self.count += len(jobs)
        self.reused += len(jobs) - sum(len(batch) for batch in missing)
        if missing:
            self.prepare(variant)
            if args.batch_size == 1:
                self.answer(variant, problems, [(0, 0)], name)  # warm-up, whose time does not count
        bar = tqdm(missing, desc=f"{name} {variant.name}", leave=False, disable=None)
        with open(file, "a", encoding="utf-8") as out:
            for batch in bar:
                lines = self.answer(variant, problems, batch, name)
                done |= dict(zip(batch, lines))
                out.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                out.flush()
        return [done[job] for job in jobs]

    def score_columns(self, variant):
        """The scores of a variant on every problem set, as columns of a table."""
        columns = {}
        for name, problems in self.problem_sets().items():
            columns |= summary(self.answers(variant, name, problems), f"{name} ")
        return columns

    def answer(self, variant, problems, batch, name):
        """Decode a batch of (problem's index, run): its answers with their scores and seconds."""
        seed = zlib.crc32(f"{self.args.seed} {batch[0]}".encode())
        start = time.perf_counter()
        questions = [data.ask(problems[i]) for i, _ in batch]
        responses = self.decode(questions, variant.reselect, seed)
        seconds = (time.perf_counter() - start) / len(batch)
        lines = []
        for (i, run), (response, tokens) in zip(batch, responses):
            lines.append({"set": name, "variant": variant.name, "problem": i, "run": run,
                          "question": problems[i].question, "answer": problems[i].answer,
                          "response": response, **scores(problems[i], response),
                          "tokens": tokens, "seconds": seconds})
        return lines

    def decode(self, questions, reselect, seed):
        """[(response, number of tokens)] of questions answered side by side by the attached model.

        One question several times is sampled that often from one prefill.
        """
        args, model, tokenizer = self.args, self.model, self.tokenizer
        settings = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature,
                    "top_p": TOP_P if args.temperature else 1.0, "reselect": reselect,
                    "generator": torch.Generator(model.device).manual_seed(seed)}
        if len(set(questions)) > 1:
            responses = sample.respond(model, tokenizer, questions, batch_size=len(questions),
                                       **settings)
            return [(response, tokens) for _, response, tokens in sorted(responses)]
        prompt = torch.tensor([tokenizer.prompt_ids(questions[0])], device=model.device)
        new = sample.generate(model, prompt, stop_ids=tokenizer.stop_ids, samples=len(questions),
                              **settings)
        responses = [data.until_stop(ids, tokenizer.stop_ids) for ids in new.tolist()]
        return [(tokenizer.decode(ids), len(ids)) for ids in responses]


def read_answers(file):
    """The answers in a JSONL file; a last line that a kill cut short is removed from it."""
    if not file.exists():
        return []
    complete = file.read_bytes()
    complete = complete[:complete.rfind(b"\n") + 1]
    os.truncate(file, len(complete))
    return [json.loads(line) for line in complete.decode().split("\n")[:-1]]


def batches(jobs, batch_size, runs):
    """Batches of (problem, run): of different problems with one run each, else of one problem."""
    groups = [jobs]
    if runs > 1:
        groups = [list(group) for _, group in groupby(jobs, key=lambda job: job[0])]
    found = []
    for group in groups:
        found += [group[i:i + batch_size] for i in range(0, len(group), batch_size)]
    return found
