"""How every script of this folder runs: command line, checks, table, picture.

A script is a module that has
    NEEDS                 of this: "model", "problems", "graded", "samples", "corrections",
                          "transformers"
    PAPER                 {title: rows}, the paper's numbers, if it prints any
    QUICK, FULL           settings of its own, without and with --full, if it has any
    measure(experiment)   returns the rows of the table, dictionaries of equal keys
    draw(figure, rows)    draws them onto a matplotlib figure
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

import caprese
import data
import distill
import sample
from paper.experiment import BUNDLED_CATS_DENSITY, METHODS, TOP_P, Experiment, digest
from paper.scores import read_row

QUICK = {"limit": 100, "runs": 1, "batch_size": 128, "temperature": 0.0, "samples": 1000}
FULL = QUICK | {"limit": 500, "samples": None}  # None: as many as distill.py takes


# ---- the command line

def main(*names):
    """Run the scripts of these names as the command line says."""
    sample.run_command(partial(run, names))


def run(names, argv=None):
    """Check all inputs, then run the scripts. Returns what --json prints: {name: result}."""
    scripts = {name: importlib.import_module(f"paper.{name}") for name in names}
    args = arguments(argv, scripts[names[0]] if len(names) == 1 else sys.modules["paper"])
    settings = {}
    for name, script in scripts.items():
        lacking = missing_flag(args, script.NEEDS)
        if lacking and len(names) == 1:
            raise ValueError(lacking)
        if lacking:
            print(f"{name} is left out: {lacking}", file=sys.stderr)
        else:
            settings[name] = fill_defaults(args, script)
    contents = read_inputs(args)
    needs = [need for name in settings for need in scripts[name].NEEDS]
    experiment = Experiment(next(iter(settings.values())), contents, load=bool(needs))
    for name in settings:
        experiment.args = settings[name]
        if "graded" in scripts[name].NEEDS:
            experiment.graded()
    for folder in (args.out if needs else None, args.plot):
        if folder:
            make_folder(folder)
    results = {}
    for name in settings:
        experiment.args = settings[name]
        results[name] = run_script(name, scripts[name], experiment)
    if args.json:
        print(json.dumps(results))
    return results


def run_script(name, script, experiment):
    """Measure, print and draw what one script shows; returns its part of what --json prints."""
    args, paper = experiment.args, getattr(script, "PAPER", {})
    out = sys.stderr if args.json else sys.stdout
    model = f"{args.model or 'the bundled model'}, " if script.NEEDS else ""
    print(f"\n{first_paragraph(script)}\npython -m paper.{name} on {model}{args.device}, "
          f"{torch.get_num_threads()} CPU threads\n", file=out)
    experiment.count = experiment.reused = 0
    start = time.perf_counter()
    rows = script.measure(experiment)
    seconds = time.perf_counter() - start
    print(sample.format_table(rows), file=out)
    if experiment.count:
        print(f"\n{experiment.reused} of {experiment.count} answers are from earlier runs, read "
              f"from {args.out}.", file=out)
    for title, paper_rows in paper.items():
        print(f"\nThe paper, {title}:\n{sample.format_table(paper_rows)}", file=out)
    if args.plot:
        save_picture(Path(args.plot) / f"{name}.png", script.draw, rows)
    print(f"[{seconds:.0f} s]", file=out)
    return {"rows": rows, "paper": paper, "seconds": seconds,
            "answers": experiment.count, "reused": experiment.reused}


def first_paragraph(module):
    """The first paragraph of a module's docstring, as one line."""
    return " ".join(module.__doc__.split("\n\n")[0].split())


def arguments(argv, module):
    """The flags, None where one is not given; module is what --help describes."""
    parser = sample.common_arguments(sample.ArgumentParser(
        prog=f"python -m {module.__name__}", description=first_paragraph(module),
        epilog="Other defaults: QUICK and FULL, in paper/common.py and in the script."))
    add, files = parser.add_argument, {"action": "append", "default": [], "metavar": "FILE"}
    add("--data", help="problems to answer, JSONL (default: the bundled model's)", **files)
    add("--train", help="with --model: samples to learn L and R from, JSONL", **files)
    add("--adapter", help="one more row, of this adapter", **files)
    add("--method", action="append", choices=METHODS, help="default: those of the paper's table")
    add("--density", type=float, help="kept neurons, as a fraction in (0, 1] (default: 0.5; the "
        f"bundled model's CATS: {BUNDLED_CATS_DENSITY})")
    add("--rank", type=sample.positive, help=f"r (default: {distill.DEFAULTS['rank']}; "
        f"bundled model: {distill.BUNDLED['rank']})")
    add("--samples", type=sample.positive, help="training samples of each file, at most")
    add("--e2e-lr", type=float, help="default: that of distill.py")
    add("--e2e-epochs", type=sample.positive, help="default: that of distill.py")
    add("--limit", type=sample.positive, help="problems of each set, at most")
    add("--runs", type=sample.positive, help="answers to each problem")
    add("--batch-size", type=sample.positive, help="answers decoded side by side")
    add("--temperature", type=float, help=f"above 0 tokens are drawn, with top-p {TOP_P}")
    add("--max-new-tokens", type=sample.positive, help="default: 2048; bundled model: 128")
    add("--full", action="store_true", help="more problems, samples and runs; this takes hours")
    add("--out", default="runs", metavar="FOLDER", help="keeps answers and adapters, which the "
        "next run uses again (default: %(default)s)")
    add("--plot", metavar="FOLDER", help="draw FOLDER/NAME.png (needs matplotlib)")
    return parser.parse_args(argv)


def fill_defaults(args, script):
    """The settings of one script; ValueError, in one line, for what cannot be served."""
    values = {"max_new_tokens": 2048 if args.model else 128}
    values |= FULL | getattr(script, "FULL", {}) if args.full else (
        QUICK | getattr(script, "QUICK", {}))
    given = {key: value for key, value in vars(args).items() if value is not None}
    filled = argparse.Namespace(**vars(args) | values | given)
    if not 0 <= filled.temperature < math.inf:
        raise ValueError(f"--temperature is {filled.temperature}, but must be at least 0")
    if filled.runs > 1 and filled.temperature == 0:
        raise ValueError("--runs of the same greedy answer tell nothing; "
                         "give a --temperature above 0")
    if args.density is not None and not 0 < args.density <= 1:
        raise ValueError(f"--density is {args.density}, but it must lie in (0, 1]")
    if args.train and not args.model:
        raise ValueError("--train is for a --model; the bundled one has its own samples")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    return filled


def missing_flag(args, needs):
    """What to give so that a script with these NEEDS can run; None if nothing is missing."""
    trainable = args.train or not args.model
    if "transformers" in needs and not importlib.util.find_spec("transformers"):
        return "this needs transformers: pip install transformers"
    if {"problems", "graded"} & set(needs) and args.model and not args.data:
        return "--model needs problems to answer: give --data FILE"
    if "samples" in needs and not trainable:
        return "this needs samples to learn from: give --train FILE, or no --model"
    if "corrections" in needs and not trainable and not args.adapter:
        return "there is no L R to look at: give --adapter or --train FILE, or no --model"
    return None


def read_inputs(args):
    """{file: hash of its content} of all input files; OSError or ValueError if one is bad."""
    contents = {}
    for files in (args.data, args.adapter):
        if len({Path(file).stem for file in files}) < len(files):
            raise ValueError(f"two files have one name, {' '.join(files)}, but the table tells "
                             "them apart by name; rename one")
    for file in args.adapter:
        caprese.read_adapter(file)
        contents[file] = digest(Path(file).read_bytes())
    for file in args.data:
        data.read_problems(file, args.limit or FULL["limit"], evaluation=True, parse=read_row)
    for file in args.train:
        data.read_problems(file, args.samples)
    for file in args.data + args.train:
        contents[file] = digest(list(data.read_rows(file)))
    return contents


def make_folder(folder):
    """Create a folder; ValueError if it cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made a folder ({error.strerror})") from None


# ---- pictures

COLORS = {  # a hue for each method, darker with each stage of distillation
    "full": "black", "oracle top-k": "#525252",
    "GRIFFIN": "#9ecae1", "GRIFFIN + layer-wise": "#4292c6", "GRIFFIN + E2E": "#08519c",
    "CATS": "#fdd0a2", "CATS + layer-wise": "#fd8d3c", "CATS + E2E": "#a63603",
    "4-bit": "#c7e9c0", "4-bit + layer-wise": "#74c476", "4-bit + E2E": "#006d2c",
    "GRIFFIN + LoRA, E2E alone": "#9e6ebd", "GRIFFIN + L R, E2E alone": "#2a9d8f"}


def color(name):
    """The colour of a variant in all pictures; that of an adapter is grey."""
    return COLORS.get(name, "#969696")


def save_picture(file, draw, rows):
    """Draw rows into a PNG, under a temporary name that is then changed."""
    import matplotlib
    from matplotlib.figure import Figure
    sizes = {"font.size": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8}
    with matplotlib.rc_context(sizes):
        figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
        draw(figure, rows)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(f"{file}.tmp", format="png")
    os.replace(f"{file}.tmp", file)


def deviations(rows, column):
    """The standard deviations of a column in percent; None if it has none."""
    name = column.replace("%", "±")
    return [row[name] for row in rows] if name != column and name in rows[0] else None


def draw_line(axes, rows, x, y, name, **style):
    """A line of column y over column x with error bars; the full model's is dashed."""
    style = {"color": color(name), "linestyle": "--" if name == "full" else "-"} | style
    axes.errorbar([row[x] for row in rows], [row[y] for row in rows], deviations(rows, y),
                  label=name, marker="o", markersize=3, capsize=2, **style)


def draw_bars(axes, rows, column):
    """A horizontal bar for each method with its error; the full model is a dashed line."""
    sparse = [row for row in rows if row["method"] != "full"]
    axes.barh([row["method"] for row in sparse], [row[column] or 0 for row in sparse], capsize=2,
              xerr=deviations(sparse, column), color=[color(row["method"]) for row in sparse])
    axes.axvline(rows[0][column] or 0, color="black", linestyle="--", label="full")
    axes.yaxis.set_inverted(True)
    axes.set_xlabel(column)


def draw_scores(figure, rows):
    """Bars for each score in percent, side by side."""
    columns = [column for column in rows[0] if column.endswith(" %") and "added" not in column]
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0],
                            columns):
        draw_bars(axes, rows, column)
