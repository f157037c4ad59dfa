"""What every script of this folder ends with: its table, a picture (--plot), its figures (--log).

Where a picture compares methods, each has one colour in all panels; the full model is black. Here
too: how files are written, and which commit, day and machine a figure is of.
"""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

import sample

LABELS = ("method", "model", "set", "layer", "density", "rank", "rho", "n", "K", "generated")
RESULTS = Path(__file__).resolve().parent / "results.tsv"


def show(args, rows, draw, paper=(), experiment=None, title="", differences=()):
    """Print the table and the paper's numbers, {title: rows}; with the flags for it: draw, log.

    draw(figure, rows) draws the rows onto a matplotlib figure. differences are the rows of a second
    table. Returns what --json prints.
    """
    out = sys.stderr if args.json else sys.stdout
    result = {"script": args.script, "rows": rows, "paper": dict(paper)}
    print(sample.format_table(rows), file=out)
    if differences:
        result["differences"] = differences
        print(f"\nProblem by problem:\n{sample.format_table(differences)}", file=out)
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
        log(args, [*rows, *differences], experiment.sets if experiment else ())
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
