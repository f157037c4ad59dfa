"""Time to the next token at batch 1, beside what its bytes allow: python bench.py

Each generated token reads every weight that it uses, once. So these bytes, divided by the memory's
speed, bound the time from below. The memory's speed is measured in the same run. The rows of the
table take turns, and ratios are taken within a round, so that other work of the machine slows all
rows alike. Without --model the weights are random: their values make no difference to the time.
The column "selection s" is the time of choosing and copying the neurons (`caprese.select`), which
is a part of the prefill. The time of counting the statistic before that is in the prefill alone.

CATS saves no time here. It selects neurons token by token, and plain PyTorch has no product that
reads single rows of a matrix and is faster than the full one. So all neurons are computed, and the
bytes in its row are those that the method itself needs.
"""

import argparse
import json
import statistics
import sys
import timeit
from functools import partial

import torch

import caprese
import sample
from model import Config, Transformer, read_json, resolve

TABLES = {  # title: columns besides the row's name and its number of generated tokens
    "Time": ("prefill s", "selection s", "total s", "ms per token", "bound ms",
             "bandwidth reached"),
    "Ratios": ("ratio to full", "ratio bytes allow", "saving reached", "ratio to uncorrected"),
    "Memory": ("MB per token", "memory GB/s", "weights MB", "copies MB", "cache MB"),
}


# ---- what a decode step reads

def active_parameters(model):
    """Parameters that one generated token uses: without dropped neurons, with the correction."""
    active = sum(p.numel() for p in model.parameters())
    for ff in caprese.sparse_layers(model).values():
        active += ff.active_parameters() - sum(p.numel() for p in ff.parameters())
    return active


def weights_read(model):
    """How many weights a decode step reads: (of the full model, of the sparse one).

    Of an embedding table that is not also the head, a step reads one row, which is not counted.
    """
    unread = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    full = sum(p.numel() for p in model.parameters())
    full -= sum(p.numel() for p in caprese.adapter_parameters(model).values())
    return full - unread, active_parameters(model) - unread


def account(model, prompt_length, generated, reselect=None):
    """Bytes that a generated token must read, by the method's definition, as columns of the tables.

    A step reads the weights that it uses, and the keys and values that it attends to: on average
    over the steps, the prompt's and half of the generated ones. With reselect, one step in every
    `reselect` is a pass of the full model.
    """
    config, itemsize = model.config, model.dtype.itemsize
    full, active = weights_read(model)
    kv_bytes = 2 * config.num_key_value_heads * config.head_dim * itemsize  # a token in one layer
    attended = prompt_length + generated / 2
    cache_read = sum(kv_bytes * min(attended, window or attended) for window in config.windows)
    steps = generated - 1  # the first token comes from the prefill
    passes = steps // reselect if reselect else 0
    weights_per_token = (full * passes + active * (steps - passes)) / steps
    bytes_per_token = weights_per_token * itemsize + cache_read
    weights = sum(p.nbytes for p in model.parameters())
    cache = kv_bytes * config.num_hidden_layers * (prompt_length + generated)
    return {"MB per token": bytes_per_token / 1e6,
            "ratio bytes allow": bytes_per_token / (full * itemsize + cache_read),
            "weights MB": weights / 1e6, "copies MB": copies(model) / 1e6, "cache MB": cache / 1e6}


def copies(model):
    """Bytes that the sparse layers hold besides the weights: gathered neurons and the selection."""
    layers = caprese.sparse_layers(model).values()
    return sum(b.nbytes for ff in layers for b in ff.buffers(recurse=False))


# ---- the measurement

def clock(device):
    """The present time in seconds; a GPU first ends its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return timeit.default_timer()


def seconds(device, operation, repeats):
    """The seconds that each of `repeats` calls of operation() takes, as a list."""
    return timeit.repeat(operation, timer=partial(clock, device), repeat=repeats, number=1)


def memory_speed(device, size=1 << 29):
    """The memory's speed in bytes per second, by the fastest of 7 runs over `size` bytes.

    On a CPU a run is a sum, as decoding only reads. On a GPU it is a copy: a read and a write.
    """
    block = torch.ones(size // 4, device=device)
    if device.type == "cuda":
        return 2 * size / min(seconds(device, block.clone, 7))
    return size / min(seconds(device, block.sum, 7))


def time_model(model, prompt, generated, reselect=None):
    """(seconds to the first token, seconds to the last) of sample.stream."""
    start = clock(model.device)
    steps = sample.stream(model, prompt, generated, reselect=reselect)
    next(steps)
    first = clock(model.device)
    list(steps)
    return first - start, clock(model.device) - start


def set_method(model, settings):
    """Attach by settings, the arguments of caprese.attach; None is the full model."""
    caprese.detach(model)
    if settings:
        caprese.attach(model, **settings)


def run_row(model, settings, prompt, generated, reselect):
    """One row of one round: attach, warm up, measure."""
    set_method(model, settings)
    reselect = reselect if settings else None
    # On a GPU the first run records the graphs, so it must be as long as the measured one.
    time_model(model, prompt, generated if prompt.is_cuda else min(generated, 3), reselect)
    prefill, total = time_model(model, prompt, generated, reselect)
    columns = account(model, prompt.shape[1], generated, reselect)
    return columns | times(model, prefill, total, generated)


def times(model, prefill, total, generated):
    """The measured seconds as columns of the tables; for one of them, select() runs once more."""
    selection = seconds(model.device, partial(caprese.select, model), 1)[0]
    return {"prefill s": prefill, "selection s": selection, "total s": total,
            "ms per token": 1e3 * (total - prefill) / (generated - 1)}


def take_turns(runs, repeats, device):
    """Call each of runs, {(name, generated): function() -> columns}, once in each round.

    Returns {(name, generated): [its columns in each round]}.
    """
    rounds = {key: [] for key in runs}
    for _ in sample.progress(range(repeats), "rounds", repeats):
        speed = memory_speed(device)
        for key, run in runs.items():
            rounds[key].append(run() | {"memory GB/s": speed / 1e9})
    return rounds


def make_prompt(model, args):
    """A random prompt [1, --prompt] int64."""
    torch.manual_seed(args.seed)
    return torch.randint(model.config.vocab_size, (1, args.prompt), device=model.device)


def measure(model, rows, args):
    """A dictionary of results for each row and each of args.generate numbers of tokens.

    rows is {name: settings}, as variants() returns it.
    """
    prompt = make_prompt(model, args)
    runs = {(name, generated): partial(run_row, model, settings, prompt, generated, args.reselect)
            for generated in args.generate for name, settings in rows.items()}
    rounds = take_turns(runs, args.repeats, model.device)
    caprese.detach(model)
    return [result(name, generated, rounds) for name, generated in runs]


def median_ratio(rounds, others):
    """The median over rounds of the ratio of two rows' times per token; None without the other.

    Both times are of one round, so a machine that is slow for a while slows both.
    """
    ratios = [one["ms per token"] / other["ms per token"] for one, other in zip(rounds, others)]
    return statistics.median(ratios) if ratios else None


def result(name, generated, rounds):
    """One row of the tables: medians of its rounds, and what follows from them."""
    own = rounds[name, generated]
    row = {column: statistics.median(one[column] for one in own) for column in own[0]}
    row |= {"row": name, "generated": generated, "saving reached": None}
    row["bound ms"] = row["MB per token"] / row["memory GB/s"]  # 1e6 / 1e9 s
    row["bandwidth reached"] = row["bound ms"] / row["ms per token"]
    row["ratio to full"] = median_ratio(own, rounds.get(("full", generated), ()))
    if row["ratio to full"] and row["ratio bytes allow"] < 1:
        row["saving reached"] = (1 - row["ratio to full"]) / (1 - row["ratio bytes allow"])
    uncorrected = name.rpartition(" + ")[0]  # empty if the row has no correction
    row["ratio to uncorrected"] = median_ratio(own, rounds.get((uncorrected, generated), ()))
    return row


# ======== The measurement ends here. Below: shapes and flags ========

# ---- the models

SIZES = ("model_type", "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size",
         "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
# The sizes in config.json of the paper's models and of a small one.
SHAPES = {name: dict(zip(SIZES, sizes)) for name, *sizes in (
    ("r1-distill-qwen-1.5b", "qwen2", 151936, 131072, 1536, 8960, 28, 12, 2, False),
    ("r1-distill-qwen-7b", "qwen2", 152064, 131072, 3584, 18944, 28, 28, 4, False),
    ("r1-distill-qwen-14b", "qwen2", 152064, 131072, 5120, 13824, 48, 40, 8, False),
    ("qwen2.5-14b", "qwen2", 152064, 32768, 5120, 13824, 48, 40, 8, False),
    ("llama-3.2-1b", "llama", 128256, 131072, 2048, 8192, 16, 32, 8, True),
    ("llama-3.2-3b", "llama", 128256, 131072, 3072, 8192, 28, 24, 8, True),
    ("llama-3.1-8b", "llama", 128256, 131072, 4096, 14336, 32, 32, 8, False),
    ("gemma-2-2b", "gemma2", 256000, 8192, 2304, 9216, 26, 8, 4, True),
    ("gemma-2-9b", "gemma2", 256000, 8192, 3584, 14336, 42, 16, 8, True),
    ("smollm2-135m", "llama", 49152, 8192, 576, 1536, 30, 9, 3, True),
)}


def make_model(args):
    """The model of --model, or random weights for --shape; with --graphs it decodes by graphs."""
    # Random weights of a shape get the dtype that a model's own weights would get.
    named = argparse.Namespace(**vars(args) | {"model": args.model or args.shape})
    dtype = sample.choose_dtype(named)
    if args.model:
        model = Transformer.from_pretrained(args.model, args.device, dtype)
    else:
        model = random_model(args.config, args.device, dtype or torch.bfloat16)
    if args.graphs:
        from beyond.cuda_graphs import Graphed
        return Graphed(model)
    return model


def random_model(config, device, dtype):
    """A Transformer with random weights, made in place on its device.

    config is config.json's dictionary.
    """
    with torch.device("meta"):
        model = Transformer(Config.from_dict(config))
    model = model.to(dtype).to_empty(device=device)
    # One block of numbers fills all matrices; its length is prime, so that no two rows are alike.
    block = torch.randn(1_000_003, device=device).mul_(0.02).to(dtype)
    for parameter in model.parameters():
        values = block if parameter.dim() > 1 else torch.ones_like(parameter)
        for part in parameter.data.view(-1).split(len(values)):
            part.copy_(values[:len(part)])
    return model.requires_grad_(False).eval()


# ---- python bench.py

def variants(args):
    """{name of a row: the arguments of caprese.attach, or None for the full model}.

    Raises ValueError if the flags do not fit this model.
    """
    config = Config.from_dict(args.config)
    total = args.prompt + max(args.generate)
    if total > config.max_position_embeddings:
        raise ValueError(f"{total} tokens exceed the context of {config.max_position_embeddings}")
    methods = {block.__name__: (name, None) for name, block in caprese.METHODS.items()}
    methods["GRIFFIN all layers"] = ("griffin", "all")
    if isinstance(args.method, str):  # --method
        methods = {row: method for row, method in methods.items() if method[0] == args.method}
    elif args.method:  # --block
        methods[caprese.method_name(args.method)] = (args.method, None)
    rank = args.rank or min(256, config.hidden_size // 8)
    rows = {"full": None}
    for name, (method, layers) in methods.items():
        rows[name] = {"method": method, "density": args.density, "layers": layers}
        rows[f"{name} + Caprese"] = rows[name] | {"rank": rank}
    unknown = [name for name in args.only or [] if name not in rows]
    if unknown:
        raise ValueError(f"--only {unknown[0]!r} is not a row; the rows are: {', '.join(rows)}")
    with torch.device("meta"):
        without_memory = Transformer(config)
    for settings in rows.values():  # ValueError for bad numbers and broken blocks
        set_method(without_memory, settings)
    return {name: rows[name] for name in args.only or rows}


def arguments(argv=None, description=__doc__.splitlines()[0]):
    """The command line, its defaults filled in; ValueError for what cannot be measured."""
    # "resolve", of argparse: the second --model replaces the one of common_arguments.
    parser = sample.ArgumentParser(description=description, conflict_handler="resolve")
    add = sample.common_arguments(parser).add_argument
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--model", help="folder in the official layout or hub repo id")
    weights.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b",
                         help="without --model: random weights (default: %(default)s)")
    sample.method_arguments(parser)
    add("--prompt", type=sample.positive, default=128, help="prompt tokens (default: %(default)s)")
    add("--generate", type=int, nargs="+", default=[32], help="generated tokens (default: 32)")
    add("--reselect", type=sample.positive, help="rho: reselect after every rho tokens")
    add("--repeats", type=sample.positive, default=5, help="rounds (default: %(default)s)")
    add("--only", nargs="+", metavar="ROW", help="only these rows, by their names in the table")
    add("--density", type=float, default=0.5, help="kept neurons in (0, 1] (default: %(default)s)")
    add("--rank", type=sample.positive, help="r (default: 256, or an eighth of the hidden size)")
    add("--graphs", action="store_true", help="on a GPU: a decode step is one CUDA graph")
    args = parser.parse_args(argv)
    if min(args.generate) < 2:
        raise ValueError("--generate must be at least 2: the first token comes from the prefill")
    sample.check_device(args.device)
    if args.graphs and torch.device(args.device).type != "cuda":
        raise ValueError(f"--graphs needs a GPU, but --device is {args.device}")
    folder = resolve(args.model) if args.model else None
    args.config = read_json(folder / "config.json") if folder else SHAPES[args.shape]
    return args


def announce(args, out):
    """Say in two lines what is about to be measured."""
    weights = args.model or f"{args.shape} with random weights"
    print(f"Timing {weights} on {args.device} with {torch.get_num_threads()} CPU threads: "
          f"a prompt of {args.prompt} tokens, medians of {args.repeats} rounds.", file=out)
    step = "one CUDA graph" if args.graphs else "plain PyTorch"
    print(f"A decode step is {step}; times of a token are those after the first.", file=out)


def report(model, results, args, out):
    """Print the tables, and with --json the object."""
    for title, names in TABLES.items():
        cells = [{name: row[name] for name in ("row", "generated", *names)} for row in results]
        print(f"\n{title}\n{sample.format_table(cells)}", file=out)
    if args.json:
        dtype = str(model.dtype).removeprefix("torch.")
        print(json.dumps({"dtype": dtype, "graphs": args.graphs, "rows": results}))


def main():
    args = arguments()
    rows = variants(args)
    out = sys.stderr if args.json else sys.stdout
    announce(args, out)
    model = make_model(args)
    report(model, measure(model, rows, args), args, out)


if __name__ == "__main__":
    sample.run_command(main)
