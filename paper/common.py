"""What every script of this folder begins with: its flags, and the variants of a model.

A script reads its flags (`arguments`), asks for variants of the model, the rows of its table, makes
an Experiment (experiment.py) where it needs a model, and shows the rows (`show` in report.py).
"""

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import caprese
import distill
import sample
from paper.int4 import Int4FF
from paper.lora import LoRAFF

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


class CannotRun(ValueError):
    """A script needs what is not given; `python -m paper` leaves it out."""


# ---- flags

def arguments(script, description, argv=None, refuses=(), **defaults):
    """The command line of a script, defaults filled in; says in two lines what is about to be done.

    script is how python -m calls it. refuses are the flags that choose rows, if the script's rows
    are fixed. defaults are the script's own, as in DEFAULTS. Raises ValueError, in one line, for
    bad flags, CannotRun for those refused.
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
    parser.epilog += f"; without --full and --paper, --samples {DEFAULTS['samples'][0]}"
    args = parser.parse_args(argv)
    for flag in refuses:
        if getattr(args, flag):
            raise CannotRun(f"its rows are fixed, so it takes no --{flag}")
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
    if issubclass(block, caprese.CATS) and not args.model:
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
