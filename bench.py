"""Time to the next token at batch 1, beside what its bytes allow: python bench.py

Each generated token reads every weight that it uses, once. So these bytes, divided by the memory's
speed, bound the time from below. The memory's speed is measured in the same run. The rows of the
table take turns, and ratios are taken within a round, so that what else the machine does hits all
rows alike. Without --model the weights are random: their values make no difference to the time.

CATS saves no time here. It selects neurons token by token, and plain PyTorch has no product that
reads single rows of a matrix and is faster than the full one. So all neurons are computed, and the
bytes in its row are those that the method itself needs.
"""

import importlib.util
import json
import statistics
import sys
import timeit
from functools import partial

import torch
from tqdm import tqdm

import caprese
import sample
from model import Config, Transformer, read_json, resolve

PEER = "transformers"  # the rows of Hugging Face generate
PASSES = (2, 4, 8, 16)         # tokens of a verifying pass
ACCEPTANCES = (0.8, 0.9, 1.0)  # of a drafted token
TABLES = {  # title: columns, beside the row's name and its number of generated tokens
    "Time": ("prefill s", "total s", "ms per token", "bound ms", "bandwidth reached"),
    "Ratios": ("ratio to full", "ratio bytes allow", "saving reached", "ratio to uncorrected"),
    "Memory": ("MB per token", "memory GB/s", "weights MB", "copies MB", "cache MB"),
}


# ---- the models

SIZES = ("model_type", "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size",
         "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
# config.json, as far as sizes go, of the paper's models and of a small one.
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
DEFAULT_SHAPE = "llama-3.2-1b"


def make_model(args):
    """The model of --model, or one with random weights for --shape."""
    dtype = sample.choose_dtype(args)
    if args.shape:
        return random_model(args.config, args.device, dtype or torch.bfloat16)
    return Transformer.from_pretrained(args.model, args.device, dtype)


def random_model(config, device, dtype):
    """A Transformer with random weights, made in place on its device."""
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


def make_peer(model, config):
    """transformers' model of config.json's dictionary, on the very same weights in memory."""
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    peer.load_state_dict(model.state_dict(), strict=False, assign=True)
    peer.tie_weights()
    # What follows from the config is in no checkpoint, so it is still on the meta device.
    with torch.device(model.device):
        peer.model.rotary_emb = type(peer.model.rotary_emb)(config)
        if hasattr(peer.model.embed_tokens, "embed_scale"):  # Gemma
            peer.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size ** 0.5)
    return peer


# ---- what a step reads

def account(model, prompt_length, generated, reselect=None):
    """What the variant that is attached reads for each token, as columns of the tables.

    The count is of what the method needs, however it is run. A step reads the keys and values that
    it attends to: on average over the steps, the prompt's and half of the generated ones. Every
    reselect tokens, a pass that reads the full model takes the place of a step.
    """
    config, itemsize = model.config, model.dtype.itemsize
    full, active = caprese.weights_read(model)
    position = 2 * config.num_key_value_heads * config.head_dim * itemsize  # bytes in one layer
    filled = prompt_length + generated / 2
    cache_read = sum(position * min(filled, window or filled) for window in config.windows)
    steps = generated - 1  # the first token comes from the prefill
    passes = steps // reselect if reselect else 0
    weights_read = full * passes / steps + active * (1 - passes / steps)
    read = weights_read * itemsize + cache_read
    weights = sum(p.nbytes for p in model.parameters())
    copies = sum(b.nbytes for b in model.buffers())  # the gathered neurons
    cache = position * config.num_hidden_layers * (prompt_length + generated)
    return {"MB per token": read / 1e6, "ratio bytes allow": read / (full * itemsize + cache_read),
            "weights MB": weights / 1e6, "copies MB": copies / 1e6, "cache MB": cache / 1e6}


def memory_speed(device, size=1 << 29):
    """Bytes per second over `size` bytes: of a sum on a CPU, for decoding only reads.

    On a GPU it is that of a copy, read and write together.
    """
    block = torch.ones(size // 4, device=device)
    if device.type == "cuda":
        return 2 * size / min(seconds(device, block.clone, 7))
    return size / min(seconds(device, block.sum, 7))


# ---- the measurement

def clock(device):
    """Seconds; on a GPU, once all that was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return timeit.default_timer()


def seconds(device, operation, repeats):
    """How long operation() takes, each of so many times."""
    return timeit.repeat(operation, timer=partial(clock, device), repeat=repeats, number=1)


def time_model(model, prompt, generated, reselect):
    """(seconds to the first token, seconds to the last) of sample.stream."""
    start = clock(model.device)
    steps = sample.stream(model, prompt, generated, reselect=reselect)
    next(steps)
    first = clock(model.device)
    list(steps)
    return first - start, clock(model.device) - start


def time_peer(peer, prompt, generated):
    """The same of transformers' generate, in two calls: for the first token, and for all."""
    marks = [clock(prompt.device)]
    for n in (1, generated):
        peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n,
                      min_new_tokens=n, do_sample=False, pad_token_id=0)
        marks.append(clock(prompt.device))
    return marks[1] - marks[0], marks[2] - marks[1]


def variants(args):
    """{name of a row: the arguments of caprese.attach, or None for the full model}.

    Raises ValueError if the flags do not fit this model.
    """
    config = Config.from_dict(args.config)
    total = args.prompt + max(*args.generate, *PASSES)
    if total > config.max_position_embeddings:
        raise ValueError(f"{total} tokens exceed the context of {config.max_position_embeddings}")
    methods = {"GRIFFIN": ("griffin", None), "CATS": ("cats", None),
               "GRIFFIN all layers": ("griffin", range(config.num_hidden_layers))}
    rank = args.rank or min(256, config.hidden_size // 8)
    rows = {"full": None}
    for name, (method, layers) in methods.items():
        rows[name] = {"method": method, "density": args.density, "layers": layers}
        rows[f"{name} + Caprese"] = rows[name] | {"rank": rank}
    with torch.device("meta"):  # without memory: bad numbers end here
        caprese.attach(Transformer(config), **rows["CATS + Caprese"])
    if not set(args.only or []) <= set(rows):
        raise ValueError(f"--only must name rows of these: {', '.join(rows)}")
    return {name: rows[name] for name in args.only or rows}


def measure(model, rows, args, peer=None):
    """A dictionary of results for each row and each of args.generate numbers of tokens.

    rows is what variants() returns, possibly with more of the kind. peer adds rows of its own.
    """
    torch.manual_seed(args.seed)
    prompt = torch.randint(model.config.vocab_size, (1, args.prompt), device=model.device)
    models = [model, peer] if peer else [model]
    if peer:
        rows = rows | {PEER: None}
        if "GRIFFIN + Caprese" in rows:
            rows[f"{PEER}, GRIFFIN + Caprese"] = rows["GRIFFIN + Caprese"]
    rounds = {(name, n): [] for n in args.generate for name in rows}
    for _ in tqdm(range(args.repeats), desc="rounds", leave=False, disable=None):
        speed = memory_speed(model.device)
        for name, n in rounds:
            for each in models:
                caprese.detach(each)
                if rows[name]:
                    caprese.attach(each, **rows[name])
            # transformers' own loop does not reselect.
            reselect = args.reselect if rows[name] and not name.startswith(PEER) else None
            # The first run warms up. On a GPU it records the graphs, so it takes as many tokens.
            for tokens in (n if prompt.is_cuda else min(n, 3), n):
                if name.startswith(PEER):
                    prefill, total = time_peer(peer, prompt, tokens)
                else:
                    prefill, total = time_model(model, prompt, tokens, reselect)
            rounds[name, n].append(account(model, args.prompt, n, reselect) | {
                "prefill s": prefill, "total s": total, "memory GB/s": speed / 1e9,
                "ms per token": 1e3 * (total - prefill) / (n - 1)})
    for each in models:
        caprese.detach(each)
    return [result(name, n, rounds) for name, n in rounds]


def median_ratio(rounds, others):
    """Of the times per token, within each round: noise that lasts is in both. Or None."""
    ratios = [one["ms per token"] / other["ms per token"] for one, other in zip(rounds, others)]
    return statistics.median(ratios) if ratios else None


def result(name, n, rounds):
    """One row of the tables: medians of its rounds, and what follows from them."""
    own = rounds[name, n]
    row = {column: statistics.median(one[column] for one in own) for column in own[0]}
    row |= {"row": name, "generated": n, "saving reached": None}
    row["bound ms"] = row["MB per token"] / row["memory GB/s"]  # 1e6 / 1e9 s
    row["bandwidth reached"] = row["bound ms"] / row["ms per token"]
    row["ratio to full"] = median_ratio(own, rounds.get(("full", n), ()))
    if row["ratio to full"] and row["ratio bytes allow"] < 1:
        row["saving reached"] = (1 - row["ratio to full"]) / (1 - row["ratio bytes allow"])
    uncorrected = name.rpartition(" + ")[0]  # empty if this is no corrected row
    row["ratio to uncorrected"] = median_ratio(own, rounds.get((uncorrected, n), ()))
    return row


def verify(model, step, tokens):
    """A pass of the full model over tokens [1, n]; the cache is then as before."""
    model.logits(sample.count_and_select(model, step, tokens))
    step.cache.advance(-tokens.shape[1])


def time_passes(model, rows, results, args):
    """Rows of a table on lossless decoding: the time per token for some numbers n and acceptances.

    A pass of the full model over n tokens verifies n - 1 that were drafted, each by one step of
    `results`. If each is accepted with probability a, the pass yields (1 - a^n) / (1 - a) tokens.
    """
    steps = {row["row"]: row["ms per token"] for row in results}
    shape = (1, args.prompt + max(PASSES))
    tokens = torch.randint(model.config.vocab_size, shape, device=model.device)
    table = []
    for name in [name for name in rows if name.startswith("GRIFFIN")]:
        caprese.attach(model, **rows[name])
        step, _ = sample.prefill(model, tokens[:, :args.prompt], max(PASSES))
        for n in PASSES:
            operation = partial(verify, model, step, tokens[:, args.prompt:args.prompt + n])
            times = seconds(model.device, operation, args.repeats + 1)[1:]  # the first warms up
            row = {"row": name, "n": n, "ms per draft step": steps[name],
                   "ms per pass": 1e3 * statistics.median(times)}
            total = row["ms per pass"] + (n - 1) * steps[name]
            for acceptance in ACCEPTANCES:
                yielded = sum(acceptance ** i for i in range(n))  # (1 - a^n) / (1 - a)
                row[f"ms per token at {acceptance:.0%}"] = total / yielded
            table.append(row | {"full ms per token": steps.get("full")})
    caprese.detach(model)
    return table


# ---- python bench.py

def arguments(argv=None):
    """The command line, its defaults filled in; ValueError for what cannot be measured."""
    parser = sample.ArgumentParser(description=__doc__.splitlines()[0], conflict_handler="resolve")
    add = sample.common_arguments(parser).add_argument
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--model", help="folder in the official layout or hub repo id")
    group.add_argument("--shape", choices=SHAPES, help=f"random weights (default: {DEFAULT_SHAPE})")
    add("--prompt", type=sample.positive, default=128, help="prompt tokens (default: %(default)s)")
    add("--generate", type=int, nargs="+", default=[32], help="generated tokens (default: 32)")
    add("--reselect", type=sample.positive, help="rho: reselect every so many tokens")
    add("--repeats", type=sample.positive, default=5, help="rounds (default: %(default)s)")
    add("--only", nargs="+", metavar="ROW", help="only these rows, by their names in the table")
    add("--peer", choices=[PEER], help="rows of Hugging Face generate on the same weights")
    add("--verify", action="store_true", help="a table on lossless decoding as well")
    add("--density", type=float, default=0.5, help="kept neurons in (0, 1] (default: %(default)s)")
    add("--rank", type=sample.positive, help="r (default: 256, or an eighth of the hidden size)")
    args = parser.parse_args(argv)
    if min(args.generate) < 2:
        raise ValueError("--generate must be at least 2: the first token comes from the prefill")
    if args.verify and args.reselect:
        raise ValueError("--verify takes the time of a draft step, so give it without --reselect")
    if args.peer and not importlib.util.find_spec("transformers"):
        raise ValueError("--peer transformers needs it: pip install transformers")
    sample.check_device(args.device)
    if not args.model:  # choose_dtype takes a run without --model for the bundled model
        args.model = args.shape = args.shape or DEFAULT_SHAPE
    args.config = SHAPES.get(args.shape) or read_json(resolve(args.model) / "config.json")
    return args


def main():
    args = arguments()
    rows = variants(args)
    out = sys.stderr if args.json else sys.stdout
    print(f"Timing {args.model} on {args.device} with {torch.get_num_threads()} CPU threads: "
          f"a prompt of {args.prompt} tokens, medians of {args.repeats} rounds.", file=out)
    model = make_model(args)
    peer = make_peer(model, args.config) if args.peer else None
    results = measure(model, rows, args, peer)
    for title, columns in TABLES.items():
        cells = [{name: row[name] for name in ("row", "generated", *columns)} for row in results]
        print(f"\n{title}\n{sample.format_table(cells)}", file=out)
    passes = time_passes(model, rows, results, args) if args.verify else []
    if passes:
        print(f"\nLossless decoding\n{sample.format_table(passes)}", file=out)
    if args.json:
        print(json.dumps({"dtype": str(model.dtype).removeprefix("torch."), "rows": results,
                          "passes": passes}))


if __name__ == "__main__":
    sample.run_command(main)
