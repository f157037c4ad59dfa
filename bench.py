"""The latency table: python bench.py latency"""

import argparse
import json
import statistics
import sys
import time

import torch

import caprese
import sample
from model import Config, Transformer, resolve

_llama = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0,
          "max_position_embeddings": 131072}
_sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {  # config.json, as far as sizes go
    name: family | dict(zip(_sizes, sizes)) for name, (family, *sizes) in {
        "qwen2.5-14b": ({"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768},
                        5120, 13824, 48, 40, 8),
        "llama-3.2-1b": (_llama | {"tie_word_embeddings": True}, 2048, 8192, 16, 32, 8),
        "llama-3.1-8b": (_llama, 4096, 14336, 32, 32, 8),
        "gemma-2-9b": ({"model_type": "gemma2", "vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192},
                       3584, 14336, 42, 16, 8),
        "smollm2-135m": (_llama | {"tie_word_embeddings": True, "vocab_size": 49152, "rope_theta": 100000.0,
                                   "max_position_embeddings": 8192}, 576, 1536, 30, 9, 3),
    }.items()}

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
LATENCY_PAPER = """Qwen 2.5 14B, L40, time to next token: full 41 ms, GRIFFIN 34, GRIFFIN + LoRA 37, + Caprese 34 (2048 + 256 tokens: 10.5, 8.7, 9.5, 8.7 s)"""


def latency(args):
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
        caprese.attach(model, way["method"], args.density, layers, rank if "correction" in way else 0,
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
    rounds = times[name, n]
    per_token = [(total - prefill) / (n - 1) for prefill, total in rounds]
    full = [(total - prefill) / (n - 1) for prefill, total in times.get(("full", n), [])]
    seconds, bound = statistics.median(per_token), about["bytes"] / speed
    # Compared within each round, and then the median: noise that lasts is in both.
    ratio = statistics.median(a / b for a, b in zip(per_token, full)) if full else None
    by_bytes = about["bytes"] / about["full_bytes"]
    return {"row": name, "generated": n,
            "prefill s": statistics.median(prefill for prefill, _ in rounds),
            "total s": statistics.median(total for _, total in rounds),
            "ms per token": 1e3 * seconds, "min": 1e3 * min(per_token), "max": 1e3 * max(per_token),
            "tokens/s": 1 / seconds, "active M": about["active"] / 1e6, "MB per token": about["bytes"] / 1e6,
            "GB/s": about["bytes"] / seconds / 1e9, "bound ms": 1e3 * bound, "of bound": bound / seconds,
            "ratio": ratio, "by bytes": by_bytes,
            "of saving": (1 - ratio) / (1 - by_bytes) if ratio and by_bytes < 1 else None,
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
    full = weights - (0 if config.tie_word_embeddings else model.model["embed_tokens"].weight.numel())
    F_, active = config.intermediate_size, full
    for ff in ffs:
        matrices = {"griffin": 3, "cats": 2}[ff.method]  # that are read in part: CATS needs all of the gate
        active -= round(matrices * config.hidden_size * (F_ - ff.kept))
        for name, p in ff.learned().items():  # LoRA's factors lose the dropped neurons as well
            active += p.numel() * ff.kept // F_ if F_ in p.shape and ff.method == "griffin" else p.numel()
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
    if args.model:
        return sample.load(args)[0]
    shape = latency_shape(args)
    with torch.device("meta"):
        model = Transformer(Config.from_dict(SHAPES[shape]))
    dtype = getattr(torch, args.dtype) if args.dtype else sample.default_dtype(torch.device(args.device), shape)
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
    config = (transformers.AutoConfig.from_pretrained(resolve(args.model)) if args.model
              else transformers.AutoConfig.for_model(**SHAPES[latency_shape(args)]))
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


def latency_shape(args):
    return args.shape or ("qwen2.5-14b" if torch.device(args.device).type == "cuda" else "llama-3.2-1b")


def show_latency(rows, args, out):
    """The table, memory, and what there is to say of the goals."""
    columns = {"prefill s": "{:.2f}", "total s": "{:.2f}", "ms per token": "{:.2f}", "min": "{:.2f}", "max": "{:.2f}",
               "tokens/s": "{:.1f}", "active M": "{:.0f}", "MB per token": "{:.0f}", "GB/s": "{:.1f}",
               "bound ms": "{:.2f}", "of bound": "{:.0%}", "ratio": "{:.3f}", "by bytes": "{:.3f}",
               "of saving": "{:.0%}"}
    memory = {"weights MB": "{:.0f}", "copies MB": "{:.0f}", "cache MB": "{:.0f}"}
    for formats in (columns, memory):
        show = lambda row: ["-" if row[key] is None else form.format(row[key]) for key, form in formats.items()]
        cells = [["row", "generated", *formats]] + [[row["row"], str(row["generated"]), *show(row)] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells)]
        for line in cells:
            print("  ".join([line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])]), file=out)
        print(file=out)
    found = {(row["row"], row["generated"]): row["ms per token"] for row in rows}
    for n in dict.fromkeys(row["generated"] for row in rows):
        for layers in ("", " all layers"):
            pair = [found.get((f"GRIFFIN{more}{layers}", n)) for more in (" + Caprese", "")]
            if all(pair):
                print(f"Caprese over GRIFFIN{layers}, {n} generated: {pair[0] / pair[1]:.3f}", file=out)
        if (PEER, n) in found and ("full", n) in found:
            print(f"{PEER} over full, {n} generated: {found[PEER, n] / found['full', n]:.2f}", file=out)


def draw_latency(rows, file):
    """Time to the next token and its bound, a pair of bars for each row."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure, ax = plt.subplots(figsize=(7, 0.5 * len(rows) + 1), layout="constrained")
    names = [f"{row['row']}, {row['generated']} generated" for row in rows]
    ax.barh(names, [row["ms per token"] for row in rows], label="measured", color="tab:blue")
    ax.barh(names, [row["bound ms"] for row in rows], height=0.3, label="bytes at the memory's speed", color="black")
    ax.invert_yaxis()
    ax.set_xlabel("ms to the next token")
    figure.legend(loc="outside upper right", ncols=2, fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def latency_flags(parser):
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="random weights of this shape (default: llama-3.2-1b, on a GPU qwen2.5-14b)")
    add("--prompt", type=int, help="prompt tokens (default: 128, on a GPU 2048)")
    add("--generate", type=int, nargs="+", help="generated tokens, one or several numbers (default: 32, on a GPU 256)")
    add("--density", type=float, default=0.5, help="default: %(default)s")
    add("--rank", type=int, help="r (default: 256, or an eighth of a small model's hidden_size)")
    add("--reselect", type=int, help="rho: reselect every so many tokens (default: never)")
    add("--repeats", type=int, default=3, help="rounds; the table shows medians (default: %(default)s)")
    add("--only", nargs="+", metavar="ROW", choices=LATENCY_ROWS, help="these rows only: " + ", ".join(LATENCY_ROWS))
    add("--peer", choices=[PEER], help="a row of Hugging Face generate on the same weights")
    add("--plot", metavar="FILE", help="draw the rows (needs matplotlib)")


COMMANDS = {"latency": (latency, latency_flags)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, flags) in COMMANDS.items():
        flags(sample.common_arguments(commands.add_parser(name, help=function.__doc__.splitlines()[0])))
    args = parser.parse_args()
    out = sys.stderr if args.json else sys.stdout
    for key in ("prompt", "rank", "reselect", "repeats"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key} is {getattr(args, key)}, but must be at least 1")
    if any(n < 2 for n in args.generate or []):
        raise ValueError("--generate must be at least 2: the first token comes from the prefill")
    what = args.model or f"{latency_shape(args)} with random weights"
    print(f"Time to the next token of {what}, batch 1, on {args.device} with {torch.get_num_threads()} CPU threads:\n"
          f"medians of {args.repeats} interleaved rounds.\n", file=out)
    rows = COMMANDS[args.command][0](args)
    show_latency(rows, args, out)
    if args.plot:
        draw_latency(rows, args.plot)
    print(f"\nThe paper: {LATENCY_PAPER}", file=out)
    if args.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    sample.run(main)
