"""Prefill, select, decode, reselect; and the command line around them: python sample.py [prompt]

Without a prompt it answers one hard problem three ways: full model, sparse, sparse + Caprese.
"""

import argparse
import importlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import caprese
import data
from model import DTYPES, Transformer, resolve

BUNDLED = Path(__file__).resolve().parent / "models" / "tiny-math"
HARD_SEED = 1  # of the problem that is answered without a prompt
SHRINK = 0.75  # a batch drops its finished rows when at most this part of its rows is unfinished


# ---- prefill, select, decode, reselect

@torch.no_grad()
def stream(model, tokens, max_new_tokens, temperature=0.0, top_p=1.0, reselect=None, stop_ids=(),
           prompt_lengths=None, samples=1, generator=None):
    """Yield the next tokens [B * samples] int64, step by step, until every row has ended.

    These are max_new_tokens steps at most. tokens are [B, S] int64; prompts of different lengths
    are padded on the right, and prompt_lengths [B] are given. Each prompt is continued `samples`
    times. A row that has drawn one of stop_ids yields it again until the others have ended; a row
    whose context is full yields -1. reselect is rho: after every rho tokens the full model runs
    over them again, which rewrites their cache entries, and GRIFFIN selects its neurons anew
    (section 4.1.1). One stream of a model at a time: the next one takes over the selection. Raises
    ValueError on settings out of range, on a prompt that fills the context, and on logits that are
    not finite.
    """
    check_decoding(max_new_tokens, temperature, top_p, reselect, samples)
    lengths = check_context(model, tokens, prompt_lengths)
    context = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, context - int(lengths.min()))
    cache, logits = prefill(model, tokens, max_new_tokens, lengths, samples)
    lengths = lengths.repeat_interleave(samples)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=tokens.device)
    output = torch.zeros_like(lengths)                       # [B * samples], the newest tokens
    finished = torch.zeros_like(lengths, dtype=torch.bool)
    rows = torch.arange(len(lengths), device=tokens.device)  # those that are still decoded
    since_selection = []  # tokens since the last selection; the newest is not in the cache yet
    for step in range(1, max_new_tokens + 1):
        token = choose(logits, temperature, top_p, generator)  # [rows]
        output[rows] = torch.where(finished[rows], output[rows], token)
        yield output.clone()
        finished |= torch.isin(output, stops)
        context_is_full = ~finished & (lengths + step >= context)
        output[context_is_full] = -1
        finished |= context_is_full
        if step == max_new_tokens or finished.all():
            return
        since_selection.append(token)
        if (~finished[rows]).sum() <= SHRINK * len(rows):  # much of the batch would be wasted
            going_on = (~finished[rows]).nonzero().flatten()
            reorder(model, cache, going_on)
            rows = rows[going_on]
            since_selection = [earlier[going_on] for earlier in since_selection]
        if len(since_selection) == reselect:
            logits = reselect_neurons(model, cache, torch.stack(since_selection, dim=1))
            since_selection = []
        else:
            with caprese.phase(model, "decode"):
                logits = model.decode(since_selection[-1], cache)


def check_decoding(max_new_tokens, temperature, top_p, reselect=None, samples=1):
    """ValueError, in one line, for settings out of range."""
    if not (temperature == 0 or 1e-6 <= temperature < math.inf):
        raise ValueError(f"temperature {temperature} must be 0, for the best token, or above 1e-6")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must lie in (0, 1]")
    if max_new_tokens < 1 or samples < 1 or (reselect is not None and reselect < 1):
        raise ValueError("max_new_tokens, samples and reselect must be at least 1")


def check_context(model, tokens, prompt_lengths=None):
    """The lengths [B] of the prompts in tokens [B, S]; ValueError if one fills the context."""
    if prompt_lengths is None:
        prompt_lengths = [tokens.shape[1]] * len(tokens)
    lengths = caprese.check_lengths(tokens, prompt_lengths)
    most = model.config.max_position_embeddings - 1
    if lengths.max() > most:
        raise ValueError(f"{lengths.max()} prompt tokens; the context holds 1 to {most}")
    return lengths


def prefill(model, tokens, max_new_tokens, prompt_lengths, samples=1):
    """Run the prompts [B, S] of so many tokens [B] through the full model, and select.

    Returns a cache with room for max_new_tokens, and the logits [B * samples, V] of the next token.
    """
    cache = model.new_cache(len(tokens), tokens.shape[1] + max_new_tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    caprese.reset(model)
    hidden_states = count_and_select(model, tokens, cache, positions < prompt_lengths[:, None])
    cache.set_lengths(prompt_lengths)
    rows = torch.arange(len(tokens), device=tokens.device)
    logits = model.logits(hidden_states[rows, prompt_lengths - 1])
    if samples > 1:
        rows = rows.repeat_interleave(samples)
        logits = logits[rows]
        reorder(model, cache, rows)
    return cache, logits


def count_and_select(model, tokens, cache, counted=None):
    """Run tokens [B, T] through the full model, which counts them where counted [B, T], and select.

    Returns the hidden states [B, T, D].
    """
    with caprese.phase(model, "count", counted=counted):
        hidden_states = model.model(tokens, cache)
    caprese.select(model)
    return hidden_states


def reselect_neurons(model, cache, tokens):
    """Run the last rho tokens [B, rho] through the full model again: logits [B, V] of the next one.

    This one pass rewrites their cache entries and adds them to the statistic; then the neurons are
    selected anew (section 4.1.1). The last of the tokens has not been fed before, so that rho = 1
    is the full model.
    """
    cache.advance(1 - tokens.shape[1])  # back to before the first of them
    return model.logits(count_and_select(model, tokens, cache)[:, -1])


def reorder(model, cache, rows):
    """Keep these rows [n] int64 of the batch, in this order; a row may occur several times."""
    caprese.reorder(model, rows)
    cache.reorder(rows)


def generate(model, tokens, max_new_tokens, temperature=0.0, top_p=1.0, reselect=None,
             stop_ids=(), **settings):
    """All of stream() at once: new tokens [B * samples, <= max_new_tokens] int64."""
    steps = stream(model, tokens, max_new_tokens, temperature, top_p, reselect, stop_ids,
                   **settings)
    return torch.stack(list(steps), dim=1)


# ---- the next token

def distribution(logits, temperature=0.0, top_p=1.0):
    """The probabilities [B, V] that tokens are drawn with, from logits [B, V].

    At temperature 0 the best token has all of it. top_p keeps the smallest set of most likely
    tokens whose probabilities add up to at least top_p. Raises ValueError if a row is not finite.
    """
    check_finite(logits)
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    p = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        descending, order = p.sort(dim=-1, descending=True)
        # Drop a token if those before it already add up to top_p.
        descending[descending.cumsum(dim=-1) - descending >= top_p] = 0
        p = torch.zeros_like(p).scatter(1, order, descending)
    return p / p.sum(dim=-1, keepdim=True)


def draw(p, generator=None):
    """Tokens [B] int64 from probabilities [B, V], by one random number a row."""
    cumulative = p.cumsum(dim=-1)
    uniform = torch.rand(len(p), 1, device=p.device, dtype=p.dtype, generator=generator)
    # 1 - uniform is never 0, so a token of probability 0 is never drawn.
    return torch.searchsorted(cumulative, cumulative[:, -1:] * (1 - uniform)).squeeze(1)


def choose(logits, temperature=0.0, top_p=1.0, generator=None):
    """Next tokens [B] int64 from logits [B, V]: the best ones at temperature 0, else drawn."""
    if temperature == 0:
        check_finite(logits)
        return logits.argmax(dim=-1)
    return draw(distribution(logits, temperature, top_p), generator)


def check_finite(logits):
    """ValueError if the best of a row of logits [B, V] is infinite or no number."""
    if not logits.amax(dim=-1).isfinite().all():
        raise ValueError(f"the logits are not finite in {logits.dtype}: the dtype overflows (try "
                         "--dtype bfloat16 or float32), or weights or L and R are damaged")


# ---- many questions

def respond(model, tokenizer, questions, max_new_tokens=512, batch_size=128, **settings):
    """Yield (index, response, number of tokens) for each question of a list.

    They are decoded in batches of similar prompt lengths, so the indices come in another order. A
    question that fills the context is named on stderr and gets an empty response. A `<think>` with
    which the prompt ends begins the response. settings are those of stream().
    """
    if isinstance(questions, str):
        raise ValueError("questions must be a list of questions, not one text")
    prompts = [tokenizer.prompt_ids(question) for question in questions]
    fitting = []
    for i, prompt in enumerate(prompts):
        if 0 < len(prompt) < model.config.max_position_embeddings:
            fitting.append(i)
        else:
            print(f"note: question {i + 1} has {len(prompt)} tokens, which the context cannot "
                  f"hold, and gets no answer: {questions[i][:60]!r}", file=sys.stderr)
            yield i, "", 0
    # batch_indices takes samples, which are lists of parts; here the prompt is the only part.
    for indices in data.batch_indices([[prompts[i]] for i in fitting], batch_size):
        batch = [fitting[index] for index in indices]
        tokens, lengths = data.pad([prompts[i] for i in batch], model.device)
        new = generate(model, tokens, max_new_tokens, stop_ids=tokenizer.stop_ids,
                       prompt_lengths=lengths, **settings)
        for i, ids in zip(batch, new.tolist()):
            ids = answer_ids(ids, tokenizer)
            response = tokenizer.decode(ids)
            if tokenizer.prompt(questions[i]).rstrip().endswith("<think>"):
                response = "<think>" + response
            yield i, response, len(ids)


def answer_ids(ids, tokenizer):
    """The ids of one row of generate(), up to its stop id or to the end of its context."""
    return data.until_stop([token for token in ids if token >= 0], tokenizer.stop_ids)


def evaluate(model, tokenizer, problems, grade=data.correct, **settings):
    """(accuracy, its standard error), both in [0, 1], of greedy answers to data.Problems.

    grade(response, answer) says whether a response is right; settings are those of respond().
    """
    if not problems:
        raise ValueError("there are no problems to evaluate")
    questions = [data.ask(problem) for problem in problems]
    right = 0
    responses = respond(model, tokenizer, questions, **settings)
    for i, response, _ in progress(responses, problems[0].kind, len(problems)):
        right += grade(response, problems[i].answer)
    accuracy = right / len(problems)
    return accuracy, standard_error(accuracy, len(problems))


def standard_error(fraction, count):
    """The standard error of a fraction of `count` answers, by Wilson: above 0 at 0 and at 1 too."""
    return math.sqrt(fraction * (1 - fraction) / count + 1 / (4 * count ** 2)) / (1 + 1 / count)


# ======== The paper ends here. Below: flags, tables and messages ========

# ---- what the scripts share

class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but an error is one line, printed by run_command, without the usage."""

    def error(self, message):
        raise ValueError(message)


def positive(text):
    """The whole number above 0 that a flag gives; argparse reports anything else."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def whole_number(text):
    """A number that torch takes as a seed; argparse reports anything else."""
    if not -2 ** 63 <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} does not fit into 64 bits")
    return int(text)


def common_arguments(parser):
    """Add the flags that every script takes; returns the parser."""
    add = parser.add_argument
    add("--model", help="folder in the official layout or hub repo id; most scripts have a "
        "default, the bundled model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: %(default)s")
    add("--dtype", choices=DTYPES, help="default: that of the weights, or what this CPU does best")
    add("--seed", type=whole_number, default=0)
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    return parser


def method_arguments(parser, default=None):
    """Add the flags that choose a sparse method; args.method becomes a name or a class."""
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--method", choices=caprese.METHODS, default=default)
    one_of.add_argument("--block", dest="method", type=import_block, metavar="MODULE:CLASS",
                        help="a method of your own, a subclass of caprese.SparseFF")


def import_block(text):
    """The class that --block names; argparse reports anything else."""
    module, _, name = text.partition(":")
    if not module or not name or module.endswith(".py"):
        raise argparse.ArgumentTypeError(f"{text} is not module:Class; the class Mine in the file "
                                         "mine.py is mine:Mine")
    try:
        block = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not module:Class ({error})") from None
    if not (isinstance(block, type) and issubclass(block, caprese.SparseFF)):
        raise argparse.ArgumentTypeError(f"{text} must be a subclass of caprese.GRIFFIN, CATS or "
                                         "SparseFF")
    return block


def read_about(args):
    """What the metadata of --adapter say; ValueError if its class is not given by --block."""
    about = caprese.read_adapter(args.adapter)[1]
    if args.method is None and about["method"] not in caprese.METHODS:
        raise ValueError(f"{args.adapter} was learned by a class of its own: give --block "
                         f"{about['method']}")
    return about


def check_output(file, inputs):
    """ValueError if a file cannot be written where it is to be, or would overwrite an input."""
    path = Path(file)
    check_overwriting(file, inputs)
    if not file or path.exists() and not path.is_file():
        raise ValueError(f"--out {str(file)!r} must be the name of an ordinary file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"the folder of --out {file} does not exist or cannot be written to")


def check_overwriting(file, inputs):
    """ValueError if an output, or what is written beside it for a while, is one of the inputs."""
    written = [Path(f"{file}{ending}").resolve() for ending in ("", ".state", ".tmp")]
    for name in inputs:
        if Path(name).resolve() in written:
            raise ValueError(f"--out {file} would overwrite the input {name}")


def choose_dtype(args):
    """The dtype that --dtype asks for, else that of the weights (None) or what the CPU does best.

    A CPU gets bfloat16 where it has instructions for it, else float32. The bundled model gets
    float32 there.
    """
    if args.dtype:
        return DTYPES[args.dtype]
    if torch.device(args.device).type != "cpu":
        return None
    capabilities = torch.cpu.get_capabilities()
    bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if args.model and bfloat16 else torch.float32


def check_device(device):
    """ValueError, in one line, for a device that cannot compute here.

    A GPU that this build of torch cannot use is named on stderr.
    """
    try:
        torch.empty(1, device=device).item()  # the meta device holds no numbers, so it fails
        if torch.device(device).index is not None:
            torch.accelerator.set_device_index(torch.device(device).index)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device!r} is not available; try --device cpu") from None
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        print("note: there is an NVIDIA GPU here, but this torch is the CPU build; the CUDA build: "
              "pip install --force-reinstall torch==2.13.0", file=sys.stderr)


def load(args):
    """(model, tokenizer) for the common flags."""
    check_device(args.device)
    folder = resolve(args.model or BUNDLED)
    model = Transformer.from_pretrained(folder, args.device, choose_dtype(args))
    if getattr(args, "graphs", False):
        from beyond.cuda_graphs import Graphed
        model = Graphed(model)
    return model, data.Tokenizer(folder)


class Lines:
    """A file for tqdm where there is no terminal: each state of the bar becomes a line."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress(steps, name, total, **settings):
    """tqdm's bar over `steps`, on stderr; elsewhere than on a terminal a line every 5%."""
    if not sys.stderr.isatty():
        settings |= {"file": Lines(), "ncols": 0, "miniters": max(1, total // 20),
                     "delay": 5, "mininterval": 5, "maxinterval": math.inf}
    return tqdm(steps, desc=name, total=total, leave=False, **settings)


def format_cell(value):
    """A value as the text of a table."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


def format_table(rows):
    """Dictionaries of equal keys as aligned text."""
    cells = [list(rows[0])] + [[format_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        line[0] = line[0].ljust(widths[0])
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def run_command(main):
    """Call main(). Bad input ends in one line on stderr and exit code 2, an interrupt in 130."""
    for stream in (sys.stdout, sys.stderr):
        if stream:  # None where it is closed
            stream.reconfigure(errors="replace")  # of characters that the terminal cannot show
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower():
            raise
        print("error: out of memory; take fewer or smaller batches, samples or tokens",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted {interrupt}", file=sys.stderr)
        sys.exit(130)


# ---- python sample.py [prompt]

def describe(model):
    """One line on what is attached."""
    layers = caprese.sparse_layers(model)
    if not layers:
        return "full model"
    ff = next(iter(layers.values()))
    added = caprese.added_parameters(model)
    correction = f", x L R of {added:.1%} more parameters" if added else ""
    return (f"{caprese.method_name(type(ff))}, {ff.density:.0%} of the neurons in {len(layers)} "
            f"of {len(caprese.decoder(model).layers)} layers{correction}")


def print_steps(steps, tokenizer, out, reference):
    """Print the text of one answer as its tokens come, and pass the tokens on.

    A caret below the answer points at the first token that is not the one of the reference.
    """
    ids, text, column = [], "", None
    for token in steps:
        yield token
        ids.append(token.item())
        whole = tokenizer.decode(answer_ids(ids, tokenizer))
        if reference and column is None and ids != reference[:len(ids)]:
            new = whole[len(text):]
            column = len(text) + len(new) - len(new.lstrip())
        if not whole.endswith("\ufffd"):  # else the bytes of a character are still to come
            print(whole[len(text):], end="", file=out, flush=True)
            text = whole
    print(whole[len(text):], file=out)
    if column is not None:
        print("^".rjust(column + 1), file=out)


def answer(model, tokenizer, question, args, out, reference=()):
    """Print one answer as it comes, or args.n samples when they are done.

    reference are the token ids of the full model's answer, if this one is to be compared with it.
    Returns a row for --json and the ids of the (last) answer. tokens_per_second is of all samples
    together, after the first token of each.
    """
    prompt = torch.tensor([tokenizer.prompt_ids(question)], dtype=torch.long, device=model.device)
    generator = torch.Generator(model.device).manual_seed(args.seed)
    reselect = args.reselect if caprese.sparse_layers(model) else None
    steps = stream(model, prompt, args.max_new_tokens, args.temperature, args.top_p, reselect,
                   tokenizer.stop_ids, samples=args.n, generator=generator)
    if args.n == 1:
        steps = print_steps(steps, tokenizer, out, reference)
    columns, times, samples = [], [], []
    for tokens in steps:
        columns.append(tokens.tolist())
        times.append(time.perf_counter())
    for number, ids in enumerate(zip(*columns), 1):
        ids = answer_ids(ids, tokenizer)
        samples.append({"response": tokenizer.decode(ids), "tokens": len(ids)})
        if args.n > 1:
            print(f"[{number}] {samples[-1]['response']}", file=out)
    total = sum(sample["tokens"] for sample in samples)
    rate = (total - args.n) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    row = samples[0] if args.n == 1 else {"samples": samples, "tokens": total}
    return row | {"tokens_per_second": round(rate, 1)}, ids


def bundled_question(args, out):
    """(question, its answer or None): the prompt as the bundled model was taught, or a problem."""
    if args.prompt is None:
        problem = data.problems("maths", 1, HARD_SEED, evaluation=True, steps=8)[0]
        print(f"{data.ask(problem)}\nHeld out from training; the answer is {problem.answer}.",
              file=out)
        return data.ask(problem), problem.answer
    if args.plain:
        return args.prompt, None
    print(f"Asked with {data.INSTRUCTION!r} before it; --plain asks without.", file=out)
    return f"{data.INSTRUCTION} {args.prompt}", None


def print_answers(args, about, out):
    """Answer the prompt by each variant; returns what --json prints. about is the adapter's."""
    model, tokenizer = load(args)
    print(f"Answering with {args.model or 'the bundled model'} on {args.device}: at most "
          f"{args.max_new_tokens} tokens, temperature {args.temperature}.", file=out)
    question, gold = (args.prompt, None) if args.model else bundled_question(args, out)
    rows, reference = [], ()
    for name in variants(args):
        if name == "sparse":
            method = args.method or about.get("method", "griffin")
            density = args.density or about.get("density", 0.5)
            caprese.attach(model, method, density, about.get("layers"))
        if name == "sparse + Caprese":
            caprese.load_adapter(model, args.adapter, args.density, args.method)
        print(f"\n{name}: {describe(model)}", file=out)
        row, ids = answer(model, tokenizer, question, args, out, reference)
        if name == "full" and args.n == 1:
            reference = ids
        verdict = ""
        if gold and args.n == 1:
            row["correct"] = data.correct(row["response"], gold)
            verdict = ", right" if row["correct"] else ", wrong"
        print(f"[{row['tokens']} tokens, {row['tokens_per_second']} tokens/s{verdict}]", file=out)
        rows.append({"method": name} | row)
    return {"prompt": question, "rows": rows}


def variants(args):
    """The names of what answers."""
    if args.compare:
        return ["full", "sparse", "sparse + Caprese"] if args.adapter else ["full", "sparse"]
    if args.adapter:
        return ["sparse + Caprese"]
    return ["sparse"] if args.method or args.density else ["full"]


def arguments():
    """The command line; ValueError for flags that do not go together."""
    parser = common_arguments(ArgumentParser(description=__doc__.splitlines()[0]))
    method_arguments(parser)
    add = parser.add_argument
    add("prompt", nargs="?", help="default: a hard problem, which the bundled model answers 3 ways")
    add("--density", type=float, help="kept neurons, in (0, 1] (default: the adapter's, or 0.5)")
    add("--adapter", help="file written by distill.py")
    add("--compare", action="store_true", help="answer by full, sparse and, if learned, Caprese")
    add("--reselect", type=positive, help="rho: reselect every so many tokens (default: never)")
    add("-n", type=positive, default=1, help="samples of each prompt (default: %(default)s)")
    add("--temperature", type=float, help="default: 0, or the paper's 0.6 with -n above 1")
    add("--top-p", type=float, help="default: 1, or the paper's 0.95 with -n above 1")
    add("--max-new-tokens", type=positive, default=512, help="default: %(default)s")
    add("--plain", action="store_true", help="ask the bundled model without its instruction")
    add("--graphs", action="store_true", help="on a GPU: a decode step is one CUDA graph")
    args = parser.parse_args()
    several = args.n > 1
    args.temperature = (0.6 if several else 0.0) if args.temperature is None else args.temperature
    args.top_p = (0.95 if several else 1.0) if args.top_p is None else args.top_p
    check_decoding(args.max_new_tokens, args.temperature, args.top_p)
    if args.density is not None and not 0 < args.density <= 1:
        raise ValueError(f"--density is {args.density}, but it must lie in (0, 1]")
    if args.prompt is None:
        if args.model:
            raise ValueError("give a prompt: only the bundled model has a problem of its own")
        args.compare = True
    bundled_adapter = BUNDLED / f"{args.method or 'griffin'}.safetensors"
    if args.compare and not (args.model or args.adapter) and bundled_adapter.exists():
        args.adapter = bundled_adapter
    if args.reselect and not (args.compare or args.method or args.density or args.adapter):
        raise ValueError("--reselect is for a sparse model: give --method, --density or --adapter")
    return args


def main():
    args = arguments()
    # A missing adapter is noticed before the model loads.
    about = read_about(args) if args.adapter else {}
    out = sys.stderr if args.json else sys.stdout
    result = print_answers(args, about, out)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
