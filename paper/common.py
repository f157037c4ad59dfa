"""What the scripts of this folder share: flags, variants of a model, kept answers, table, picture.

A script reads its flags (`arguments`), makes an Experiment where it needs a model, asks it for
variants and for their answers, and shows the rows of its table (`show`).

Answers and learned corrections are kept in the folder --out. Its settings.json says what made
them; a run with other settings is refused. What varies within a folder stands in the names of its
files: the problem set, the variant of the model, the batch size, the temperature. A method is
edited and tried again, so part of a variant's name is a hash of the files of its class and of that
class's bases: caprese.py, and the file of a --block. Only these files are hashed, no others; when
others may have changed, a note names the commit.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

import caprese
import data
import distill
import sample
from model import read_json
from paper.int4 import Int4FF
from paper.lora import LoRAFF
from paper.scores import SCORES, right_or_wrong, scores, summary

TOP_P = 0.95  # the paper's, where it samples
BUNDLED_CATS_DENSITY = 0.05  # at 0.2 and above CATS costs so small a model nothing
METHODS = {  # --method: name in the tables, class, layers
    "griffin": ("GRIFFIN", caprese.GRIFFIN, None),
    "griffin-all": ("GRIFFIN all layers", caprese.GRIFFIN, "all"),
    "cats": ("CATS", caprese.CATS, None),
    "int4": ("4-bit", Int4FF, None),
}
DEFAULTS = {  # without and with --full; samples None: as many as distill.py takes
    "limit": (100, 500), "runs": (1, 1), "batch_size": (128, 128), "temperature": (0.0, 0.0),
    "samples": (1000, None),
}
RECIPE = ("samples", "layerwise", "loss", "e2e_lr", "e2e_epochs", "e2e_batch_size")
TEXTS = ("set", "variant", "kind", "question", "answer", "response")  # of a kept answer
NUMBERS = ("problem", "run", "tokens")
LABELS = ("method", "model", "set", "layer", "density", "rank", "rho", "n", "K", "generated")
RESULTS = Path(__file__).resolve().parent / "results.tsv"


class CannotRun(ValueError):
    """A script needs what is not given; `python -m paper` leaves it out."""


# ---- flags

def arguments(script, description, argv=None, **defaults):
    """The command line of a script, defaults filled in; says in two lines what is about to be done.

    script is how python -m calls it. defaults are the script's own, as in DEFAULTS. Raises
    ValueError, in one line, for bad flags.
    """
    parser = sample.common_arguments(sample.ArgumentParser(
        prog=f"python -m {script}", description=" ".join(description.split("\n\n")[0].split())))
    add, files = parser.add_argument, {"action": "append", "default": [], "metavar": "FILE"}
    add("--data", help="problems to answer (default: the bundled model's)", **files)
    add("--train", help="with --model: samples to learn L and R from", **files)
    add("--adapter", help="one more row, of this adapter as it was learned", **files)
    add("--method", action="append", choices=METHODS, help="default: those of the paper's table")
    add("--block", action="append", default=[], type=sample.import_block, metavar="MODULE:CLASS",
        help="one more method, a subclass of caprese.SparseFF")
    add("--density", type=float, help="kept neurons, as a fraction in (0, 1] (default: 0.5; the "
        f"bundled model's CATS: {BUNDLED_CATS_DENSITY})")
    add("--limit", type=sample.positive, help="problems of each set, at most")
    add("--runs", type=sample.positive, help="answers to each problem")
    add("--batch-size", type=sample.positive, help="answers decoded side by side")
    add("--temperature", type=float, help=f"above 0 tokens are drawn, with top-p {TOP_P}")
    add("--max-new-tokens", type=sample.positive, help="default: 2048; bundled model: 128")
    distill.recipe_arguments(parser)
    add("--full", action="store_true", help="more problems, samples and runs; this takes hours")
    add("--out", default="runs", metavar="FOLDER", help="keeps answers and adapters, which the "
        "next run uses again (default: %(default)s)")
    add("--plot", metavar="FOLDER", help="draw FOLDER/NAME.png (needs matplotlib)")
    add("--log", action="store_true", help="append each figure to paper/results.tsv")
    parser.set_defaults(script=script, title=parser.description,
                        max_tokens=2048, micro_batch=16, save_every=20)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", script, *(sys.argv[1:] if argv is None else argv)])
    fill_defaults(args, DEFAULTS | defaults)
    check(args)
    for block in BLOCKS + args.block:
        distill.source_digest(block)  # of the code that was imported, before anybody edits its file
    if args.plot:
        Path(args.plot).mkdir(parents=True, exist_ok=True)
    where = f"on {args.device}, {torch.get_num_threads()} CPU threads"
    print(f"\n{args.title}\n{args.command}  # {where}\n",
          file=sys.stderr if args.json else sys.stdout, flush=True)
    return args


def fill_defaults(args, defaults):
    """Give the flags that are None their values. With --paper the recipe is the paper's."""
    values = {name: full if args.full else quick for name, (quick, full) in defaults.items()}
    values["max_new_tokens"] = 2048 if args.model else 128
    for name, value in values.items():
        given = getattr(args, name, None) is not None
        if not given and not (args.paper and name in distill.RECIPES):
            setattr(args, name, value)
    distill.fill_recipe(args)


def check(args):
    """ValueError, in one line, for what cannot be served."""
    sample.check_decoding(args.max_new_tokens, args.temperature, TOP_P)
    if args.runs > 1 and args.temperature == 0:
        raise ValueError("--runs of the same greedy answer tell nothing; "
                         "give a --temperature above 0")
    if args.density is not None and not 0 < args.density <= 1:
        raise ValueError(f"--density is {args.density}, but it must lie in (0, 1]")
    if args.train and not args.model:
        raise ValueError("--train is for a --model; the bundled one has its own samples")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    blocks = [block.__name__ for block in args.block]
    for names in ([Path(file).stem for file in args.data],
                  [Path(file).stem for file in args.adapter], blocks):
        if len(set(names)) < len(names):
            raise ValueError(f"two of {', '.join(names)} have one name, by which the table tells "
                             "them apart; rename one")


def digest(content):
    """A short hash of bytes."""
    return hashlib.sha256(content).hexdigest()[:12]


def write(file, content, mode="wb"):
    """Write bytes to a file, or append them by mode "ab"; OSError names the file."""
    try:
        with open(file, mode) as opened:
            opened.write(content)
    except OSError as error:
        raise OSError(f"cannot write {file} ({error.strerror}); make room, or name another "
                      "place") from None


def commit():
    """The commit of this folder, "-dirty" if files differ from it, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # there is no git
        return "unknown"


# ---- variants of a model

@dataclass(frozen=True)
class Variant:
    """A row of a table: a sparse method and how its correction is learned, or an adapter.

    Without a method and an adapter it is the full model. An adapter's method only names its files.
    """
    name: str
    method: type | None = None  # a subclass of caprese.SparseFF
    density: float = 1.0
    layers: str | None = None   # "all", or None for the paper's choice
    rank: int = 0
    stages: tuple = ()          # of distillation, in order: "layer-wise", "E2E"
    reselect: int | None = None  # rho, in tokens
    adapter: str | None = None  # a file of distill.py, which says all of the above

    def file_name(self):
        """What the names of its files begin with: all that tells it from other variants."""
        words = ["full"]
        if self.adapter:
            words = ["adapter", Path(self.adapter).stem]
        elif self.method:
            words = [caprese.method_name(self.method), self.layers, f"density {self.density}"]
            if self.rank:
                words += [f"rank {self.rank}", *self.stages]
        if self.method:
            words.insert(1, distill.source_digest(self.method))
        if self.reselect:
            words.append(f"rho {self.reselect}")
        return re.sub(r"[^\w.]+", "-", " ".join(word for word in words if word))


BLOCKS = [block for _, block, _ in METHODS.values()] + [LoRAFF]


def sparse(args, method):
    """The variant without a correction of a name in METHODS, or of a class."""
    name, block, layers = METHODS.get(method, (getattr(method, "__name__", None), method, None))
    density = args.density or 0.5
    if block is caprese.CATS and not args.model:
        density = args.density or BUNDLED_CATS_DENSITY
    return Variant(name, block, 1.0 if block is Int4FF else density, layers)


def learned(args, variant, stages):
    """A variant with a correction, which is learned in these stages."""
    return replace(variant, name=f"{variant.name} + {stages[-1]}", rank=args.rank, stages=stages)


def stages(args):
    """The stages of both equations, as far as the flags ask for them."""
    asked = {"layer-wise": args.layerwise != "none", "E2E": args.e2e_epochs > 0}
    return tuple(stage for stage in asked if asked[stage])


def variants(args, methods, each_stage=True):
    """The full model; each method alone, and learned; --adapter.

    methods are names in METHODS, for which --method stands in; those of --block come after them.
    each_stage: a row after each stage of distillation, not only after the last one.
    """
    found = [Variant("full")]
    learning = [stages(args)[:i + 1] for i in range(len(stages(args)))] if trainable(args) else []
    for method in (args.method or list(methods)) + args.block:
        alone = sparse(args, method)
        found.append(alone)
        for some in learning if each_stage else learning[-1:]:
            found.append(learned(args, alone, some))
    return found + [Variant(Path(file).stem, adapter_method(args, file), adapter=file)
                    for file in args.adapter]


def adapter_method(args, file):
    """The class of an adapter, also one of this folder or of --block; None if it is another."""
    named = {caprese.method_name(block): block for block in BLOCKS + args.block}
    return named.get(caprese.read_adapter(file)[1]["method"])


def three_ranks(args, model):
    """r/2, r and 2r, as the paper has 128, 256 and 512; at most the hidden size."""
    return sorted({max(1, args.rank // 2), args.rank,
                   min(2 * args.rank, model.config.hidden_size)})


def trainable(args):
    """Are there samples to learn L and R from? The bundled model has its own."""
    return bool(args.train) or not args.model


# ---- kept answers and corrections

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
        raise CannotRun("this needs problems whose answers are right or wrong, not F1 or ROUGE: "
                        "give other --data")

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
        done = {job: answer for job, answer in read_answers(file).items()
                if is_to(answer, problems)}
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

    def score_columns(self, variant):
        """The scores of a variant on every problem set, as columns of a table."""
        columns = {}
        for name, problems in self.sets.items():
            columns |= summary(self.answers(variant, name, problems), f"{name} ")
        return columns


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


# ---- table, picture, log

def show(args, rows, draw, paper=(), experiment=None, title=""):
    """Print the table and the paper's numbers, {title: rows}; with the flags for it: draw, log.

    draw(figure, rows) draws the rows onto a matplotlib figure. Returns what --json prints.
    """
    out = sys.stderr if args.json else sys.stdout
    result = {"script": args.script, "rows": rows, "paper": dict(paper)}
    print(sample.format_table(rows), file=out)
    if experiment:
        title = title or experiment.title
        result |= {"answers": experiment.count, "reused": experiment.reused}
    if experiment and experiment.count:
        print(f"\n{experiment.reused} of {experiment.count} answers are from earlier runs, read "
              f"from {args.out}.", file=out)
    for name, numbers in result["paper"].items():
        print(f"\nThe paper, {name}:\n{sample.format_table(numbers)}", file=out)
    if args.plot:
        save_picture(Path(args.plot) / f"{args.script.rpartition('.')[2]}.png", draw, rows, title)
    if args.log:
        log(args, rows, experiment.sets if experiment else ())
    if args.json:
        print(json.dumps(result))
    return result


def log(args, rows, sets):
    """Append each figure of the rows to results.tsv: a line with what made it, and its error."""
    header = "commit date machine command model method set metric value error".split()
    made_by = [commit(), date.today().isoformat(), machine(args.device), args.command]
    lines = [] if RESULTS.exists() else [header]
    for row in rows:
        labels = [f"{name} {row[name]}" for name in LABELS[3:] if row.get(name) is not None]
        method = ", ".join([row.get("method") or "", *labels]).removeprefix(", ")
        model = row.get("model") or args.model or "models/tiny-math"
        for column, value in row.items():
            if column in LABELS or column.endswith("±") or value is None:
                continue
            of = next((name for name in sets if column.startswith(f"{name} ")), row.get("set", ""))
            error = row.get(error_name(column))
            metric = column.removeprefix(f"{of} ")
            lines.append([*made_by, model, method, of, metric, f"{value:.6g}",
                          "" if error is None else f"{error:.6g}"])
    text = "".join("\t".join(" ".join(cell.split()) for cell in line) + "\n" for line in lines)
    write(RESULTS, text.encode(), "ab")


def machine(device):
    """The processor, or the GPU, that numbers were measured on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", cpuinfo) or [platform.processor()]
    return f"{names[0]}, {torch.get_num_threads()} threads"


def save_picture(file, draw, rows, title):
    """Draw rows into a PNG, under a temporary name that is then changed."""
    import matplotlib
    from matplotlib.figure import Figure
    sizes = {"font.size": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8}
    with matplotlib.rc_context(sizes):
        figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
        figure.suptitle(title, fontsize=9)
        draw(figure, rows)
        handles = {}  # of all panels, each label once
        for axes in figure.axes:
            lines, labels = axes.get_legend_handles_labels()
            handles |= dict(zip(labels, lines))
        if handles:
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
        figure.savefig(f"{file}.tmp", format="png")
    os.replace(f"{file}.tmp", file)


def colors(rows):
    """{method: colour} of a table; the full model is black."""
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] != "full")
    return {"full": "black"} | {method: f"C{i}" for i, method in enumerate(methods)}


def error_name(column):
    """The name of the column with the errors of this one."""
    return column.removesuffix(" %") + " ±"


def errors(rows, column):
    """The standard errors of a column; None if it has none."""
    name = error_name(column)
    return [row[name] or 0 for row in rows] if rows and name in rows[0] else None


def draw_line(axes, rows, x, y, label, color, **style):
    """A line of column y over column x with error bars."""
    axes.errorbar([row[x] for row in rows], [row[y] for row in rows], errors(rows, y), label=label,
                  **{"color": color, "marker": "o", "markersize": 3, "capsize": 2} | style)


def draw_bars(axes, rows, column):
    """A horizontal bar for each method with its error; the full model is a dashed line."""
    bars = [row for row in rows if row["method"] != "full"]
    axes.barh([row["method"] for row in bars], [row[column] or 0 for row in bars], capsize=2,
              xerr=errors(bars, column), color=[colors(rows)[row["method"]] for row in bars])
    axes.axvline(rows[0][column] or 0, color="black", linestyle="--", label="full")
    axes.yaxis.set_inverted(True)
    axes.set_xlabel(column)


def draw_scores(figure, rows):
    """Bars for each score in percent, side by side."""
    columns = [column for column in rows[0] if error_name(column) in rows[0] and "%" in column]
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns):
        draw_bars(axes, rows, column)
