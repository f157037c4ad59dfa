"""Every table and figure of the paper, one command each: python bench.py accuracy

A command is a function (bench, args) -> rows, dictionaries of equal keys, and a function that draws them; COMMANDS
lists all. Without --model they run on the embedded model, and what they compare is trained on the way. The adapters
and every answer stay in the folder --out: to be read later, and so that an interrupted run goes on where it was.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
import textwrap
import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

import caprese
import data
import distill
import sample
from model import Config, Transformer, resolve

# Rows of a table: name, caprese's method, all layers instead of the paper's choice, density on the embedded model.
METHODS = {"griffin": ("GRIFFIN", "griffin", False, sample.EMBEDDED_DENSITY),
           "griffin-all": ("GRIFFIN all layers", "griffin", True, sample.EMBEDDED_DENSITY),
           "cats": ("CATS", "cats", False, 0.05),  # at 50% it costs so small a model nothing
           "int4": ("4-bit", "int4", False, 1.0)}
ALL = ("all", "ratio to full")  # rows of length that are no difficulty
SCORES = ("accuracy", "f1", "rouge1", "rouge2", "rougeL")
RHO = {True: (32, 16, 8, 4), False: (1024, 256, 64)}  # the embedded model's answers have some 45 tokens
DENSITIES = (0.2, 0.4, 0.6, 0.8)

_llama = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0,
          "max_position_embeddings": 131072}
_tied = _llama | {"tie_word_embeddings": True}
_gemma = {"model_type": "gemma2", "vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192}
_qwen = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072}
_smol = _tied | {"vocab_size": 49152, "rope_theta": 100000.0, "max_position_embeddings": 8192}
_sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {  # config.json, as far as sizes go, of the paper's models and of a small one
    name: family | dict(zip(_sizes, sizes)) for name, (family, *sizes) in {
        "r1-distill-qwen-1.5b": (_qwen | {"vocab_size": 151936}, 1536, 8960, 28, 12, 2),
        "r1-distill-qwen-7b": (_qwen, 3584, 18944, 28, 28, 4),
        "r1-distill-qwen-14b": (_qwen, 5120, 13824, 48, 40, 8),
        "qwen2.5-14b": (_qwen | {"max_position_embeddings": 32768}, 5120, 13824, 48, 40, 8),
        "llama-3.2-1b": (_tied, 2048, 8192, 16, 32, 8),
        "llama-3.2-3b": (_tied, 3072, 8192, 28, 24, 8),
        "llama-3.1-8b": (_llama, 4096, 14336, 32, 32, 8),
        "gemma-2-2b": (_gemma, 2304, 9216, 26, 8, 4),
        "gemma-2-9b": (_gemma, 3584, 14336, 42, 16, 8),
        "smollm2-135m": (_smol, 576, 1536, 30, 9, 3),
    }.items()}

PAPER = {  # their numbers, beside ours; accuracies in percent
    "accuracy": """
        R1-Distill-Qwen       MATH-500  AIME 24  AMC 23  BRUMO 25  GPQA
        1.5B full             79.40     30.00    60.83   25.83     18.69
        1.5B GRIFFIN          42.00     2.50     16.88   1.67      11.62
        1.5B + layer-wise     47.20     2.50     28.13   0.00      13.13
        1.5B + E2E            60.40     6.67     34.38   4.17      16.67
        1.5B CATS             72.00     11.67    37.50   10.83     11.62
        1.5B + layer-wise     73.80     15.83    48.13   13.33     16.67
        1.5B + E2E            74.80     20.83    47.50   20.00     22.22
        7B full               90.20     47.50    75.00   45.83     38.38
        7B GRIFFIN            80.60     21.67    62.50   25.00     21.72
        7B + layer-wise       84.80     29.17    64.38   27.50     27.78
        7B + E2E              85.40     30.00    71.88   29.17     23.74
        7B CATS               89.20     34.17    62.50   37.50     32.83
        7B + layer-wise       87.00     35.00    70.00   39.17     38.38
        7B + E2E              90.00     33.33    78.13   47.50     35.86

        GSM8K         full   GRIFFIN  + layer-wise  + E2E  CATS   + layer-wise  + E2E
        Llama 3.2 1B  22.44  7.13     13.72         21.00  19.18  18.65         20.39
        Llama 3.2 3B  51.55  28.96    40.18         44.66  41.24  45.49         46.85
        Llama 3.1 8B  53.98  20.47    37.60         51.40  50.95  51.93         58.00
        Gemma 2 2B    51.02  33.74    42.53         48.14  34.42  46.32         46.17
        Gemma 2 9B    78.17  59.21    76.72         76.65  76.50  77.18         77.18""",
    "reselect": """
        AMC 23, GRIFFIN + E2E  none   rho 1024  rho 256  rho 64  full
        R1-Distill-Qwen 1.5B   34.38  41.87     45.00    58.75   60.83
        R1-Distill-Qwen 7B     71.88  69.25     73.13    73.75   75.00
        R1-Distill-Qwen 14B    84.38  88.13     88.75    91.88   90.63""",
    "params": """
        r = 256 adds  percent of all parameters  percent of the FF parameters
        their models  0.8 to 1.3                 1.2 to 2""",
    "latency": """
        Qwen 2.5 14B on an L40  full    GRIFFIN  + LoRA  + Caprese
        ms to the next token    41      34       37      34
        2048 + 256 tokens       10.5 s  8.7 s    9.5 s   8.7 s
        2048 + 2048 tokens      84.4 s  70.3 s   76.5 s  70.4 s
        2048 + 8192 tokens      344.9 s 287.7 s  312.5 s 288.8 s""",
    "length": """
        against the full model  mean response length
        Caprese                 up to 8.5% shorter
        GRIFFIN, CATS           longer""",
}


@dataclass(frozen=True)
class Way:
    """One row: a sparse method and how its correction came about; without a method or an adapter, the full model."""
    name: str
    method: str | None = None
    layers: tuple | None = None   # None: the paper's choice
    density: float = 1.0
    rank: int = 0
    stage: str | None = None      # None: bare; else the last stage of distillation, "layer-wise" or "E2E"
    correction: str = "linear"
    adapter: str | None = None    # a file of distill.py, instead of all the above
    reselect: int | None = None   # rho, tokens

    def stem(self):
        """The beginning of its files' names."""
        return " ".join(filter(None, (self.method or self.name, self.stage, self.correction * (self.rank > 0))))


class Bench:
    """What the commands share: the model, its training pairs and its problems, each loaded when first asked for."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.trainable = not args.model or bool(args.train)

    @cached_property
    def loaded(self):
        return sample.load(self.args)

    model = property(lambda self: self.loaded[0])
    tokenizer = property(lambda self: self.loaded[1])

    def recipe(self, rank=None, correction="linear"):
        """distill.py's settings: both stages as it has them; a correction without a closed form goes to E2E at once."""
        args = self.args
        flags = ["--seed", args.seed, "--correction", correction]
        flags += [] if correction == "linear" else ["--layerwise", "none"]
        for flag, value in (("--samples", args.samples), ("--rank", rank or args.rank)):
            flags += [flag, value] if value else []
        flags += ["--model", args.model, *(f for file in args.train for f in ("--data", file))] if args.model else []
        return distill.arguments(list(map(str, flags)))

    @cached_property
    def pairs(self):
        """Training pairs of token ids: the embedded model's problems, or the samples of --train."""
        if not self.trainable:
            raise ValueError("this needs samples to learn from: give --train FILE, or no --model")
        task = distill.file_task if self.args.model else distill.embedded_task
        return task(self.model, self.tokenizer, self.recipe())[0]

    def problems(self, args):
        """{name: problems} of --data, or the embedded model's held-out ones."""
        if args.data:
            return {Path(file).stem: data.read_problems(file, args.limit) for file in args.data}
        if args.model:
            raise ValueError("--model needs problems to answer: --data FILE, JSONL, may be repeated")
        reading = data.problems("reading", -(-args.limit // 2), distill.EVALUATION_SEED, True, distinct=True)
        return {"maths": data.problems("maths", args.limit, distill.EVALUATION_SEED, True), "reading": reading}

    def ways(self, args, stages=("layer-wise", "E2E"), lora=False):
        """The rows: full, each method bare and after these stages, LoRA beside GRIFFIN, and --adapter files."""
        yield Way("full")
        for name, method, everywhere, share in (METHODS[key] for key in args.method):
            layers = tuple(range(len(self.model.layers))) if everywhere else None
            bare = Way(name, method, layers, args.density or (0.5 if args.model else share))
            yield bare
            if self.trainable:
                learned = replace(bare, rank=self.recipe().rank)
                for stage in stages:
                    yield replace(learned, name=f"{name} + {stage}", stage=stage)
                if lora and name == "GRIFFIN":
                    yield replace(learned, name=f"{name} + LoRA", stage="E2E", correction="lora")
        for file in args.adapter:
            yield Way(Path(file).stem, adapter=file)

    def identity(self, way):
        """Everything that an adapter or an answer depends on, for the names of their files."""
        about = asdict(way) | {"name": None, "model": caprese.fingerprint(self.model), "dtype": str(self.model.dtype)}
        if way.adapter:
            about["adapter"] = hashlib.sha256(Path(way.adapter).read_bytes()).hexdigest()
        if way.stage:
            about["recipe"] = {k: v for k, v in vars(self.recipe(way.rank, way.correction)).items()
                               if k not in ("model", "device", "json", "dtype")}
        return about

    def file(self, stem, about, suffix):
        """A file in --out for something that depends on `about` and on nothing else."""
        self.out.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        return self.out / f"{re.sub(r'[^a-z0-9]+', '-', stem.lower())}-{key}.{suffix}"

    def prepare(self, way):
        """Attach a row's method. L and R are read from a file, or learned now and kept. Returns the model."""
        model = caprese.detach(self.model)
        if way.adapter:
            return caprese.load_adapter(model, way.adapter)
        if not way.method:
            return model
        torch.manual_seed(self.args.seed)
        caprese.attach(model, way.method, way.density, way.layers, way.rank, way.correction)
        if not way.stage:
            return model
        recipe = self.recipe(way.rank, way.correction)
        file = self.file(way.stem(), self.identity(replace(way, reselect=None)), "safetensors")
        if file.exists():
            return caprese.load_adapter(model, file)
        if way.stage == "layer-wise":
            distill.layerwise(model, self.pairs, recipe)
        else:
            if recipe.layerwise != "none":
                self.prepare(replace(way, stage="layer-wise"))
            distill.end_to_end(model, self.pairs, recipe)
        caprese.save_adapter(model, file)
        return model

    def decode(self, problems, way, args, seed):
        """[(response, its tokens)] of problems answered side by side; one problem many times is sampled that often."""
        model, tokenizer, questions = self.model, self.tokenizer, [data.ask(p) for p in problems]
        settings = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p,
                    "reselect": way.reselect, "generator": torch.Generator(model.device).manual_seed(seed)}
        if len(set(questions)) > 1:
            found = {i: answer for i, *answer in sample.respond(model, tokenizer, questions, batch=len(questions),
                                                                **settings)}
            return [found[i] for i in range(len(questions))]
        prompt = torch.tensor([tokenizer.prompt_ids(questions[0])], device=model.device)  # all on one selection
        new = sample.generate(model, prompt, stop_ids=tokenizer.stop_ids, samples=len(questions), **settings)
        rows = [data.until_stop(ids, tokenizer.stop_ids) for ids in new.tolist()]
        return [(tokenizer.decode(ids), len(ids)) for ids in rows]

    def answers(self, way, name, problems, args):
        """One dictionary for each of args.runs answers to each problem, in that order.

        Those in the way's JSONL file are taken from it; the others are decoded, batch by batch, and appended to it.
        What a batch draws depends on its first answer alone, so a run that was killed gives the same ones.
        """
        model = self.prepare(way)
        about = self.identity(way) | {k: getattr(args, k) for k in ("seed", "temperature", "top_p", "max_new_tokens")}
        file = self.file(f"{name} {way.stem()}", about | {"timed": args.device * (args.batch == 1)}, "jsonl")
        done = {(a["problem"], a["run"]): a for a in read_answers(file)
                if a["problem"] < len(problems) and a["question"] == problems[a["problem"]].question}
        missing = [(i, run) for i in range(len(problems)) for run in range(args.runs) if (i, run) not in done]
        if args.batch == 1 and missing:
            self.decode(problems[:1], way, args, 0)  # warm-up, not timed
        total = len(problems) * args.runs
        bar = tqdm(total=total, initial=total - len(missing), desc=f"{name} {way.name}", leave=False, disable=None)
        with bar, open(file, "a", encoding="utf-8") as out:
            for chunk in batches(missing, args.batch, args.runs):
                seed, start = zlib.crc32(f"{args.seed} {chunk[0]}".encode()), time.perf_counter()
                texts = self.decode([problems[i] for i, _ in chunk], way, args, seed)
                seconds = (time.perf_counter() - start) / len(chunk)
                for (i, run), (text, tokens) in zip(chunk, texts):
                    done[i, run] = {"problem": i, "run": run, "question": problems[i].question, "response": text,
                                    "answer": problems[i].answer, **data.scores(problems[i], text), "tokens": tokens,
                                    "seconds": seconds}
                out.write("".join(json.dumps(done[job], ensure_ascii=False) + "\n" for job in chunk))
                out.flush()
                bar.update(len(chunk))
                metric = metrics(next(iter(done.values())))[0]
                bar.set_postfix({metric: f"{statistics.fmean(a[metric] for a in done.values()):.3f}"})
        caprese.reset(model)
        return [done[i, run] for i in range(len(problems)) for run in range(args.runs)]


def read_answers(file):
    """The answers in a JSONL file; a last line that a kill cut short is removed from it."""
    if not file.exists():
        return []
    whole = file.read_bytes()
    whole = whole[:whole.rfind(b"\n") + 1]
    os.truncate(file, len(whole))
    return [json.loads(line) for line in whole.decode().split("\n")[:-1]]


def batches(jobs, size, runs):
    """Batches of (problem, run): of different problems if each has one run, else of one problem's runs."""
    groups = [jobs] if runs == 1 else [list(group) for _, group in groupby(jobs, key=lambda job: job[0])]
    for group in groups:
        yield from (group[at:at + size] for at in range(0, len(group), size))


def metrics(answer):
    """The names of the scores that an answer carries."""
    return [key for key in SCORES if key in answer]


def summary(answers, prefix=""):
    """Columns of a table: each score in [0, 1], its standard deviation, and the mean response length in tokens.

    The deviation is that of the runs' means if there are several, else that of the mean: binomial for accuracies.
    """
    runs = [[a for a in answers if a["run"] == run] for run in sorted({a["run"] for a in answers})]
    row = {}
    for metric in metrics(answers[0]):
        means = [statistics.fmean(a[metric] for a in run) for run in runs]
        alone = statistics.pstdev(a[metric] for a in answers) / math.sqrt(len(answers))
        row |= {f"{prefix}{metric}": statistics.fmean(means),
                f"{prefix}{metric} ±": statistics.stdev(means) if len(runs) > 1 else alone}
    return row | {f"{prefix}tokens": statistics.fmean(a["tokens"] for a in answers)}


def active_parameters(model):
    """Parameters that one generated token uses: without dropped neurons, with the correction.

    CATS needs all of Wg to choose; the oracle needs all of everything.
    """
    active = sum(p.numel() for p in model.parameters())
    for ff in caprese.sparse_layers(model).values():
        F_, D, dropped = ff.gate_proj.out_features, ff.gate_proj.in_features, ff.gate_proj.out_features - ff.kept
        active -= {"griffin": 3, "cats": 2}.get(ff.method, 0) * D * dropped
        if ff.method == "griffin":  # LoRA's factors lose the dropped neurons as well
            active -= sum(p.numel() // F_ * dropped for p in ff.learned().values() if F_ in p.shape)
    return active


def accuracy(bench, args):
    """Tables 1, 4, 6 and 7: every method on every data set."""
    rows, sets = [], bench.problems(args)
    for way in bench.ways(args, lora=True):
        row = {"method": way.name, "active parameters (M)": active_parameters(bench.prepare(way)) / 1e6}
        for name, problems in sets.items():
            row |= summary(bench.answers(way, name, problems, args), f"{name} ")
        rows.append(row)
    return rows


def first(sets):
    """(name, problems) of the first data set whose answers are right or wrong; ValueError if there is none."""
    for name, problems in sets.items():
        if problems[0].kind not in ("passage", "summary"):
            return name, problems
    raise ValueError("this needs problems whose answers are right or wrong, not F1 or ROUGE: give other --data")


def timing(answers):
    """Seconds for an answer alone in its batch, prefill and reselection included, and for one that is right."""
    seconds, right = sum(a["seconds"] for a in answers), sum(a[metrics(answers[0])[0]] for a in answers)
    return {"ms per token": 1e3 * seconds / sum(a["tokens"] for a in answers), "seconds": seconds / len(answers),
            "seconds to a right answer": seconds / right if right else None}


def runtime(bench, args, rhos=(None,)):
    """Time to a right answer: a method that answers longer, or wrongly, is not faster. The paper has no such table."""
    rows, (name, problems) = [], first(bench.problems(args))
    for way in bench.ways(args, ["E2E"]):
        for rho in rhos if way.method or way.adapter else [None]:
            answers = bench.answers(replace(way, reselect=rho), name, problems, args)
            rows.append({"method": way.name, "rho": rho, **summary(answers), **timing(answers)})
    return rows


def reselect(bench, args):
    """Table 3: accuracy and time against rho, the tokens between two reselections."""
    return runtime(bench, args, (None, *RHO[not args.model]))


def pass_at_k(n, right, k):
    """Unbiased estimate, from n samples of which some are right, that at least one of k is: 1 - C(n-c, k) / C(n, k)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def coverage(bench, args):
    """Figure 3: pass@K with an oracle verifier, against the relative compute K times the active share of parameters."""
    rows, (name, problems) = [], first(bench.problems(args))
    full = active_parameters(bench.prepare(Way("full")))
    for way in bench.ways(args, ["E2E"]):
        answers = bench.answers(way, name, problems, args)
        right = [sum(a["accuracy"] for a in answers if a["problem"] == i) for i in range(len(problems))]
        share = active_parameters(bench.prepare(way)) / full
        for k in (k for k in (1, 2, 5, 10, 20, 50, 100) if k <= args.runs):
            passed = [pass_at_k(args.runs, int(c), k) for c in right]
            rows.append({"method": way.name, "K": k, "compute": k * share, "coverage": statistics.fmean(passed),
                         "coverage ±": statistics.pstdev(passed) / math.sqrt(len(passed))})
    return rows


@torch.no_grad()
def residual_moments(model, pairs, size):
    """{layer: (x^T x, x^T e, e^T e, sum of |FF(x)|^2)}, the first three [D, D], over response tokens, float64."""
    sums = {}
    for batch in data.batches(pairs, size, model.device):
        def visit(ff, x, e):
            full = ff.down_proj(ff.neurons(x)[1])
            x, e, full = (t[batch.response].float() for t in (x, e, full))
            new = tuple(t.double() for t in (x.T @ x, x.T @ e, e.T @ e, full.square().sum()))
            sums[ff] = tuple(a + b for a, b in zip(sums[ff], new)) if ff in sums else new
        distill.walk(model, batch, visit)
    return {i: sums[ff] for i, ff in caprese.sparse_layers(model).items()}


def best_rank_left(E):
    """[D + 1]: what the best rank-r approximation of a residual leaves of its energy, r = 0..D, from E = e^T e [D, D].

    It leaves the squares of all but the r largest singular values of e (Eckart and Young).
    """
    squares = torch.linalg.eigvalsh(E).clamp_min(0)  # smallest first
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def linear_left(A, C, E, M):
    """|e - x M|^2 from the moments A = x^T x, C = x^T e, E = e^T e and a linear map M, all [D, D]."""
    return E.trace() - 2 * (M * C).sum() + (M * (A @ M)).sum()


def residual(bench, args):
    """Figure 2: relative error of the FF output against density, mean over all layers.

    Of the sparse FF alone; with the best rank-r approximation of its residual, which no method can know beforehand;
    and with the L R of rank r that the closed form learns, measured on samples that it has not seen.
    """
    rows, pairs, recipe = [], bench.pairs[::3 if args.quick else 1], bench.recipe()
    unseen, rest = pairs[::5], [pair for i, pair in enumerate(pairs) if i % 5]  # of every kind in either
    ranks = (recipe.rank // 2, recipe.rank, 2 * recipe.rank)
    for method in ("topk", "griffin", "cats"):
        for share in tqdm(DENSITIES, desc=method, leave=False, disable=None):
            model = caprese.attach(bench.model, method, share, range(len(bench.model.layers)))
            seen = distill.moments(model, rest, recipe)
            errors = {}
            for i, (A, C, E, total) in residual_moments(model, unseen, recipe.rows).items():
                L, R, _ = distill.closed_form(*seen[i][:2], max(ranks))
                best = best_rank_left(E)
                left = {"alone": E.trace()} | {f"best rank {r}": best[r] for r in ranks}
                left |= {f"L R rank {r}": linear_left(A, C, E, L[:, :r] @ R[:r]) for r in ranks}
                for key, value in left.items():
                    errors.setdefault(key, []).append(math.sqrt(max(0.0, value / total)))
            rows.append({"method": method, "density": share} | {k: statistics.fmean(v) for k, v in errors.items()})
    return rows


def density(bench, args):
    """Figure 5: accuracy against density, bare and with three ranks (layer-wise alone if --quick)."""
    rows, (name, problems) = [], first(bench.problems(args))
    title, method, everywhere, _ = METHODS[args.method[0]]
    layers = tuple(range(len(bench.model.layers))) if everywhere else None
    rank, stage = bench.pairs and bench.recipe().rank, "layer-wise" if args.quick else "E2E"
    for share in DENSITIES:
        bare = Way(f"{title} {share}", method, layers, share)
        for r in (0, rank // 2, rank, 2 * rank):
            way = replace(bare, name=f"{bare.name} r{r}", rank=r, stage=stage) if r else bare
            answers = bench.answers(way, name, problems, args)
            rows.append({"method": title, "density": share, "rank": r, "stage": way.stage, **summary(answers)})
    return rows


def params(bench, args):
    """Figure 6: parameters that L and R add, in percent, for the models of the paper, from their configs alone."""
    rows, rank = [], args.rank or distill.PAPER["rank"]
    for name, config in SHAPES.items():
        with torch.device("meta"):
            model = Transformer(Config.from_dict(config))
        total = sum(p.numel() for p in model.parameters())
        ff = sum(p.numel() for layer in model.layers for p in layer.mlp.parameters())
        share = lambda **where: 100 * caprese.added_parameters(caprese.attach(model, rank=rank, **where))
        half, everywhere = share(), share(layers=range(len(model.layers)))
        rows.append({"model": name, "parameters (M)": total / 1e6, "FF share": ff / total, "rank": rank,
                     "added %, first half": half, "added %, all layers": everywhere,
                     "added % of FF, all layers": everywhere * total / ff})
    return rows


def length(bench, args):
    """Figures 4 and 7: mean response length in tokens by difficulty, and as a ratio to the full model's."""
    name, problems = first(bench.problems(args))
    tokens = {way.name: {} for way in bench.ways(args)}
    for way in bench.ways(args):
        for a in bench.answers(way, name, problems, args):
            for level in {problems[a["problem"]].level, "all"} - {None}:
                tokens[way.name].setdefault(level, []).append(a["tokens"])
    mean = lambda way, level: statistics.fmean(tokens[way][level])
    rows = [{"difficulty": level, "answers": len(tokens["full"][level])} | {way: mean(way, level) for way in tokens}
            for level in sorted(tokens["full"], key=lambda level: (level == "all", str(level).rjust(8)))]
    return rows + [{"difficulty": ALL[1], "answers": rows[-1]["answers"]}
                   | {way: mean(way, "all") / mean("full", "all") for way in tokens}]


def singular_values(L, R):
    """Those of L R [D, D] from two r x r factors, largest first."""
    return torch.linalg.svdvals(torch.linalg.qr(L.double()).R @ torch.linalg.qr(R.double().T).R.T)


def spectrum(bench, args):
    """Figure 8: singular values of L R per layer, the largest as 1; how many hold 90% of the sum of squares; and the
    share of the residual's energy that the correction leaves on training samples, where there are any."""
    rows = []
    for way in bench.ways(args):
        layers = caprese.sparse_layers(bench.prepare(way)) if way.correction == "linear" else {}
        learned = {i: ff for i, ff in layers.items() if ff.rank and ff.correction == "linear"}
        left = {}
        if learned and bench.trainable:
            left = distill.residual_left(bench.model, bench.pairs[::-(-len(bench.pairs) // 500)], bench.recipe())
        for i, ff in learned.items():
            values = singular_values(ff.L.data, ff.R.data)
            energy = values.square().cumsum(0) / values.square().sum()
            row = {"method": way.name, "layer": i, "rank": ff.rank, "σ1": values[0].item()}
            row |= {f"σ at {part}r": (values[max(1, round(part * ff.rank)) - 1] / values[0]).item()
                    for part in (0.125, 0.25, 0.5, 0.75, 1)}
            rows.append(row | {"ranks for 90%": int((energy < 0.9).sum()) + 1, "residual left": left.get(i)})
    if not rows:
        raise ValueError("there is no L R to look at: give --adapter FILE, or --train FILE, or no --model")
    return rows


# ---- latency: one token at a time, beside what its bytes allow

LATENCY_ROWS = {  # name: what caprese.attach takes; all: every layer, instead of the paper's choice for the method
    "full": None,
    "GRIFFIN": {"method": "griffin"},
    "GRIFFIN + LoRA": {"method": "griffin", "correction": "lora"},
    "GRIFFIN + Caprese": {"method": "griffin", "correction": "linear"},
    "GRIFFIN all layers": {"method": "griffin", "all": True},
    "GRIFFIN + Caprese all layers": {"method": "griffin", "correction": "linear", "all": True},
    "CATS": {"method": "cats"},
    "CATS + Caprese": {"method": "cats", "correction": "linear"},
}
PEER = "transformers"


def latency(bench, args):
    """Table 5: time to the next token at batch 1, beside what the bytes that it reads would take."""
    model = latency_model(args)
    on_gpu = model.device.type == "cuda"
    prompt_length = args.prompt or (2048 if on_gpu else 128)
    lengths = args.generate or ([256] if on_gpu else [32])
    prompt = torch.randint(model.config.vocab_size, (1, prompt_length), device=model.device,
                           generator=torch.Generator(model.device).manual_seed(args.seed))
    names = [name for name in LATENCY_ROWS if not args.only or name in args.only] + ([PEER] if args.peer else [])
    peer = transformers_peer(model, args) if args.peer else None
    times = {(name, n): [] for n in lengths for name in names}  # (prefill, total) in seconds, one for each round
    about, speeds = {}, []
    for _ in range(args.repeats):  # rows take turns, so that what else the machine does hits all alike
        speeds.append(memory_speed(model.device))
        for name, n in times:
            way = LATENCY_ROWS.get(name)
            attach_row(model, way, args)
            run = peer if name == PEER else ours
            run(model, prompt, n if on_gpu else 3, args.reselect)  # on a GPU: graphs for each length are recorded here
            times[name, n].append(run(model, prompt, n, args.reselect))
            about[name, n] = account(model, way, prompt_length, n, args.reselect)
    return [latency_row(name, n, times, about[name, n], statistics.median(speeds)) for name, n in times]


def attach_row(model, way, args):
    """Set the model up for one row."""
    caprese.detach(model)
    if way:
        layers = range(len(model.layers)) if way.get("all") else None
        rank = args.rank or min(256, model.config.hidden_size // 8)
        caprese.attach(model, way["method"], args.density or 0.5, layers, rank if "correction" in way else 0,
                       way.get("correction", "linear"))


def ours(model, prompt, generate, reselect):
    """(seconds to the first token, seconds to the last) of one prompt by sample.stream."""
    start = clock(model.device)
    steps = sample.stream(model, prompt, generate, reselect=reselect)
    next(steps)
    first = clock(model.device)
    for _ in steps:
        pass
    return first - start, clock(model.device) - start


def clock(device):
    """Seconds; on a GPU, once all that was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def latency_row(name, n, times, about, speed):
    """One row of the table from all rounds' times; speed in bytes per second."""
    rounds, step = times[name, n], lambda row: [(total - prefill) / (n - 1) for prefill, total in times[row, n]]
    per_token = step(name)
    seconds, bound = statistics.median(per_token), about["bytes"] / speed

    def over(other):
        """Compared within each round, and then the median: noise that lasts is in both."""
        return statistics.median(a / b for a, b in zip(per_token, step(other))) if (other, n) in times else None

    ratio, bare = over("full"), re.sub(r" \+ (Caprese|LoRA)", "", name)
    by_bytes = about["bytes"] / about["full_bytes"]
    return {"row": name, "generated": n,
            "prefill s": statistics.median(prefill for prefill, _ in rounds),
            "total s": statistics.median(total for _, total in rounds),
            "ms per token": 1e3 * seconds, "min": 1e3 * min(per_token), "max": 1e3 * max(per_token),
            "tokens/s": 1 / seconds, "active M": about["active"] / 1e6, "MB per token": about["bytes"] / 1e6,
            "GB/s": about["bytes"] / seconds / 1e9, "bound ms": 1e3 * bound, "of bound": bound / seconds,
            "ratio": ratio, "by bytes": by_bytes,
            "of saving": (1 - ratio) / (1 - by_bytes) if ratio and by_bytes < 1 else None,
            "over bare": over(bare) if bare != name else None,
            "weights MB": about["weights"] / 1e6, "copies MB": about["copies"] / 1e6, "cache MB": about["cache"] / 1e6}


def account(model, way, prompt, generate, reselect):
    """What a row reads for each token and what it holds, in parameters and bytes; the method's own need, however run.

    A reselection pass reads the full model once; the cache is read as far as it is filled, on average.
    """
    config, size = model.config, model.dtype.itemsize
    numbers = lambda tensors: sum(t.numel() for t in tensors)
    ffs = caprese.sparse_layers(model).values()
    learned = [p for ff in ffs for p in ff.learned().values()]
    weights = numbers(model.parameters()) - numbers(learned)
    table = 0 if config.tie_word_embeddings else model.model["embed_tokens"].weight.numel()  # of it one row is read
    full, active = weights - table, active_parameters(model) - table
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    read = position * (prompt + generate / 2)
    full_bytes, sparse_bytes = full * size + read, active * size + read
    rho = reselect if ffs else None
    copies = {t.data_ptr(): t.numel() * t.element_size() for ff in ffs for t in vars(ff).values()
              if isinstance(t, torch.Tensor)}  # parameters and buffers of a module are elsewhere
    return {"active": active, "full_bytes": full_bytes, "weights": weights * size,
            "bytes": (sparse_bytes * (rho - 1) + full_bytes) / rho if rho else sparse_bytes,
            "copies": sum(copies.values()) + 4 * numbers(learned), "cache": position * (prompt + generate)}


def memory_speed(device, size=1 << 29):
    """Bytes per second: on a GPU of a copy, read and write together; on a CPU of a sum, for decoding only reads."""
    block = torch.ones(size // 4, device=device)
    other = torch.empty_like(block) if device.type == "cuda" else None
    seconds = []
    for _ in range(7):
        start = clock(device)
        block.sum() if other is None else other.copy_(block)
        seconds.append(clock(device) - start)
    return size * (1 if other is None else 2) / min(seconds)


def latency_model(args):
    """The model of --model, or one of --shape with random weights, made in place in its device and dtype."""
    if not args.shape:
        return sample.load(args)[0]
    with torch.device("meta"):
        model = Transformer(Config.from_dict(SHAPES[args.shape]))
    dtype = getattr(torch, args.dtype) if args.dtype else sample.default_dtype(torch.device(args.device), args.shape)
    dtype = dtype or torch.bfloat16
    model = model.to(dtype).to_empty(device=args.device).requires_grad_(False).eval()
    block = torch.randn(1_000_003, device=args.device).mul_(0.02).to(dtype)  # a prime: no two rows are alike
    for p in model.parameters():
        for part in p.data.view(-1).split(len(block)):
            part.copy_(block[:len(part)] if p.dim() > 1 else torch.ones_like(part))
    return model


def transformers_peer(model, args):
    """A function like `ours` that runs Hugging Face generate on the very same weights, in the same memory."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--peer transformers needs it: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    config = (transformers.AutoConfig.from_pretrained(resolve(args.model)) if not args.shape
              else transformers.AutoConfig.for_model(**SHAPES[args.shape]))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    left = theirs.load_state_dict(model.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    if left.unexpected_keys or set(left.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"transformers names its weights differently: {left}")
    for name, table in list(theirs.named_buffers()):  # tables that follow from the config, and are in no checkpoint
        if table.is_meta:
            owner = theirs.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(name.rpartition(".")[2], peer_table(owner, name, config, model), persistent=False)

    def run(_, prompt, generate, reselect):
        marks = [clock(prompt.device)]
        for n in (1, generate):
            theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n,
                            do_sample=False, pad_token_id=0)
            marks.append(clock(prompt.device))
        return marks[1] - marks[0], marks[2] - marks[1]

    return run


def peer_table(owner, name, config, model):
    """A buffer of transformers' model that is in no checkpoint: rotary frequencies, Gemma's scale."""
    if name.endswith("embed_scale"):
        return torch.tensor(config.hidden_size ** 0.5, device=model.device)
    with torch.device(model.device):
        return getattr(type(owner)(config), name.rpartition(".")[2])


def latency_table(rows):
    """Times and bytes, then memory. `over bare` is the ratio to the same method without its correction."""
    times = {"prefill s": "{:.2f}", "total s": "{:.2f}", "ms per token": "{:.2f}", "min": "{:.2f}", "max": "{:.2f}",
             "tokens/s": "{:.1f}", "active M": "{:.0f}", "MB per token": "{:.0f}", "GB/s": "{:.1f}",
             "bound ms": "{:.2f}", "of bound": "{:.0%}", "ratio": "{:.3f}", "by bytes": "{:.3f}", "of saving": "{:.0%}",
             "over bare": "{:.3f}"}
    memory = {"weights MB": "{:.0f}", "copies MB": "{:.0f}", "cache MB": "{:.0f}"}
    return "\n\n".join(distill.table([{k: row[k] for k in ("row", "generated")}
                                      | {k: None if row[k] is None else f.format(row[k]) for k, f in formats.items()}
                                      for row in rows]) for formats in (times, memory))


# ---- pictures: rows onto matplotlib axes

def lines(x, y, by):
    """A line for each value of the column `by`, with error bars where there is a column of deviations."""
    def onto(ax, rows):
        for value in dict.fromkeys(r[by] for r in rows):
            mine = [r for r in rows if r[by] == value]
            at = [r[x] if isinstance(r[x], float) else str(r[x] or "none") for r in mine]
            ax.errorbar(at, [r[y] for r in mine], [r.get(f"{y} ±", 0) for r in mine], fmt="-o", ms=3,
                        label=f"{by} {value}" if isinstance(value, int) else value)
        ax.set(xlabel=x, ylabel=y)
    return onto


def columns(x, ylabel, of):
    """A line for each column of numbers, over column x, of the rows that `of` chooses."""
    def onto(ax, rows):
        rows = list(filter(of, rows))
        for key in (key for key in rows[0] if key not in (x, "method", "answers")):
            line = "--o" if "best" in key else "-o"
            ax.plot([str(r[x]) for r in rows], [r[key] for r in rows], line, ms=3, label=key)
        ax.set(xlabel=x, ylabel=ylabel)
    return onto


def bars(by, xlabel, chosen):
    """A group of horizontal bars for each row, of the columns that are chosen by name."""
    def onto(ax, rows):
        keys = list(filter(chosen, rows[0]))
        for j, key in enumerate(keys):
            at = [i + (j + 0.5) * 0.8 / len(keys) - 0.4 for i in range(len(rows))]
            ax.barh(at, [r[key] or 0 for r in rows], 0.8 / len(keys), xerr=[r.get(f"{key} ±", 0) for r in rows],
                    label=key)
        ax.set_yticks(range(len(rows)), [r[by] for r in rows])
        ax.invert_yaxis()
        ax.set(xlabel=xlabel)
    return onto


def spectra(ax, rows):
    """A line of singular values for each layer of the last method."""
    keys = [k for k in rows[0] if k.startswith("σ at")]
    for r in (r for r in rows if r["method"] == rows[-1]["method"]):
        ax.plot(keys, [r[k] for k in keys], "-o", ms=3, label=f"layer {r['layer']}")
    ax.set(title=rows[-1]["method"], ylabel="singular value over the largest")


def latency_bars(ax, rows):
    """Time to the next token and its bound, a pair of bars for each row."""
    names = [f"{row['row']}, {row['generated']} generated" for row in rows]
    ax.barh(names, [row["ms per token"] for row in rows], label="measured", color="tab:blue")
    ax.barh(names, [row["bound ms"] for row in rows], 0.3, label="its bytes at the memory's speed", color="black")
    ax.invert_yaxis()
    ax.set(xlabel="ms to the next token")


# What a flag means where it is not given: in general, and by command; with --quick the second of each two.
DEFAULTS = {"limit": (500, 100), "runs": (1, 1), "batch": (128, 128), "temperature": (0.0, 0.0),
            "method": (list(METHODS),) * 2}
ALONE = {"batch": (1, 1), "limit": (200, 40)}  # what is timed answers one question at a time
TWO = (["griffin", "cats"],) * 2
COMMANDS = {  # name: (function, what draws its rows, defaults of its own)
    "accuracy": (accuracy, bars("method", "score", lambda key: key.endswith(SCORES)), {}),
    "reselect": (reselect, lines("rho", "accuracy", "method"), ALONE | {"method": (["griffin"],) * 2}),
    "coverage": (coverage, lines("compute", "coverage", "method"),
                 {"limit": (140, 30), "runs": (100, 20), "temperature": (0.6, 0.6), "method": TWO}),
    "residual": (residual, columns("density", "relative error of the FF", lambda row: row["method"] == "topk"), {}),
    "density": (density, lines("density", "accuracy", "rank"), {}),
    "params": (params, bars("model", "parameters added, percent", lambda key: key.startswith("added %,")), {}),
    "length": (length, columns("difficulty", "response length, tokens", lambda row: row["difficulty"] not in ALL), {}),
    "spectrum": (spectrum, spectra, {"method": (["griffin", "cats", "griffin-all"],) * 2}),
    "runtime": (runtime, bars("method", "seconds", lambda key: key.startswith("seconds")),
                ALONE | {"method": TWO}),
    "latency": (latency, latency_bars, {"shape": (None, "smollm2-135m"), "repeats": (5, 3)}),
}
SHOW = {"latency": latency_table}  # how a table is printed, where not as distill.table does it
NEED_SAMPLES = ("residual", "density", "spectrum")  # `all` on a --model without --train goes without them


def settings(args, command):
    """The flags of one command, its defaults filled in; ValueError for several runs of the same greedy answer."""
    defaults = {k: v[args.quick] for k, v in (DEFAULTS | COMMANDS[command][2]).items()}
    mine = argparse.Namespace(**vars(args) | {k: v for k, v in defaults.items() if getattr(args, k) is None})
    if args.model:
        mine.shape = args.shape
    elif not mine.shape:
        mine.shape = "qwen2.5-14b" if torch.device(args.device).type == "cuda" else "llama-3.2-1b"
    if mine.runs > 1 and mine.temperature == 0:
        raise ValueError("--runs of the same greedy answer tell nothing; give a --temperature above 0")
    return mine


def draw(command, rows, file):
    """A picture of the rows, as a file that is complete or not there."""
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    COMMANDS[command][1](ax, rows)
    figure.legend(loc="outside right upper", fontsize=6)
    figure.savefig(f"{file}.tmp", format=Path(file).suffix[1:], dpi=110)
    plt.close(figure)
    os.replace(f"{file}.tmp", file)


def arguments(argv=None):
    parser = sample.common_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="; ".join(
        f"{name}: {f.__doc__.split(':')[0]}" for name, (f, _, _) in COMMANDS.items())))
    add = parser.add_argument
    add("command", choices=(*COMMANDS, "all"))
    add("--data", action="append", default=[], metavar="FILE", help="problems to answer, JSONL; may be repeated "
        "(default: the embedded model's held-out ones)")
    add("--train", action="append", default=[], metavar="FILE", help="samples with solutions, to learn L and R from; "
        "may be repeated (default: the embedded model's own)")
    add("--adapter", action="append", default=[], metavar="FILE", help="a row for this file of distill.py; repeatable")
    add("--method", action="append", choices=METHODS, help="methods to compare; may be repeated (default: by command)")
    add("--density", type=float, help="share of neurons kept (default: 0.5; embedded model: "
        + ", ".join(f"{key} {m[3]}" for key, m in METHODS.items()) + ")")
    add("--rank", type=int, help="r (default: 256, embedded model 32)")
    add("--samples", type=int, help="training samples at most (default: distill.py's; with --quick 1000)")
    add("--limit", type=int, help="problems of each set at most (default: 500, with --quick 100; less where timed)")
    add("--runs", type=int, help="answers to each problem (default: 1; coverage 100, with --quick 20)")
    add("--batch", type=int, help="answers decoded side by side (default: 128; 1 where timed)")
    add("--temperature", type=float, help="default: 0, coverage 0.6")
    add("--top-p", type=float, default=1.0)
    add("--max-new-tokens", type=int, help="default: 2048, embedded model 128")
    add("--quick", action="store_true", help="fewer problems, samples and runs")
    add("--out", default="runs", help="folder of answers and adapters, to be reused (default: %(default)s)")
    add("--plot", metavar="FILE", help="draw the rows (needs matplotlib); with all, FILE-command.png each")
    only = parser.add_argument_group("latency alone").add_argument
    only("--shape", choices=SHAPES, help="random weights of this shape (default, without --model: llama-3.2-1b, on a GPU "
         "qwen2.5-14b, with --quick smollm2-135m)")
    only("--prompt", type=int, help="prompt tokens (default: 128, on a GPU 2048)")
    only("--generate", type=int, nargs="+", help="generated tokens, one or several numbers (default: 32, on a GPU 256)")
    only("--reselect", type=int, help="rho: reselect every so many tokens (default: never)")
    only("--repeats", type=int, help="rounds; the table shows medians (default: 5, with --quick 3)")
    only("--only", nargs="+", metavar="ROW", choices=LATENCY_ROWS, help="these rows: " + ", ".join(LATENCY_ROWS))
    only("--peer", choices=[PEER], help="a row of Hugging Face generate on the same weights")
    args = parser.parse_args(argv)
    if min(args.generate or [2]) < 2:
        raise ValueError("--generate must be at least 2: the first token comes from the prefill")
    for key in ("prompt", "reselect", "repeats", "rank", "samples", "limit", "runs", "batch", "max_new_tokens"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} is {getattr(args, key)}, but must be at least 1")
    if args.train and not args.model:
        raise ValueError("--train is for a --model; the embedded one has its own problems")
    if args.plot:
        import importlib.util
        if not importlib.util.find_spec("matplotlib"):
            raise ValueError("--plot needs matplotlib: pip install matplotlib")
        if not Path(args.plot).absolute().parent.is_dir() or Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot {args.plot} must be a .png, .svg or .pdf in a folder that exists")
    args.samples = args.samples or (1000 if args.quick else None)
    args.max_new_tokens = args.max_new_tokens or (2048 if args.model else 128)
    return args


def main():
    args = arguments()
    bench, out, found = Bench(args), sys.stderr if args.json else sys.stdout, {}
    able = [name for name in COMMANDS if bench.trainable or name not in NEED_SAMPLES]
    for command in able if args.command == "all" else [args.command]:
        mine = settings(args, command)
        function = COMMANDS[command][0]
        what = " ".join(function.__doc__.split("\n\n")[0].split())
        shape = command == "latency" and mine.shape and f"{mine.shape} with random weights"
        print(f"\n{command}: {what}\nOn {shape or args.model or 'the embedded model'}, {args.device} "
              f"({torch.get_num_threads()} CPU threads); answers and adapters in {args.out}.\n", file=out)
        start = time.perf_counter()
        rows, theirs = function(bench, mine), textwrap.dedent(PAPER.get(command, ""))
        found[command] = {"rows": rows, "paper": theirs, "seconds": time.perf_counter() - start}
        print(SHOW.get(command, distill.table)(rows) + (theirs and f"\n\nThe paper's numbers, on its models:\n{theirs}"), file=out)
        if args.plot:
            plot = Path(args.plot)
            draw(command, rows, plot.with_stem(f"{plot.stem}-{command}") if args.command == "all" else plot)
        print(f"[{found[command]['seconds']:.0f} s]", file=out)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    sample.run(main)
