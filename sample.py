"""Prefill, select, decode, reselect; and the command line around them: python sample.py [prompt]

Without a prompt it answers one hard problem three ways: full model, sparse, sparse + Caprese.
With --questions FILE --out FILE the full model writes an open training set.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import caprese
import data
from model import DTYPES, Transformer, resolve

BUNDLED = Path(__file__).resolve().parent / "models" / "tiny-math"
HARD_SEED = 1  # of the problem that is answered without a prompt
SHRINK = 0.75  # a batch drops its finished rows once so few are unfinished
SURE = 0.9     # where the draft gives its best token less than this, the pass follows
RED = "\033[31m{}\033[0m"  # a text in a terminal's escape codes


# ---- decoding

def distribution(logits, temperature=0.0, top_p=1.0):
    """The probabilities [B, V] that tokens are drawn with, from logits [B, V].

    At temperature 0 the best token has all of it. top_p keeps the smallest set of most likely
    tokens whose probabilities add up to at least top_p.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    p = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        descending, order = p.sort(dim=-1, descending=True)
        # The tokens before such a one already suffice.
        descending[descending.cumsum(dim=-1) - descending >= top_p] = 0
        p = torch.zeros_like(p).scatter(1, order, descending)
    return p / p.sum(dim=-1, keepdim=True)


def draw(p, generator=None):
    """Tokens [B] int64 from probabilities [B, V], by one random number a row."""
    cumulative = p.cumsum(dim=-1)
    uniform = torch.rand(len(p), 1, device=p.device, generator=generator)
    # 1 - uniform is never 0, so a token of probability 0 is never drawn.
    return torch.searchsorted(cumulative, cumulative[:, -1:] * (1 - uniform)).squeeze(1)


def choose(logits, temperature=0.0, top_p=1.0, generator=None):
    """Next tokens [B] int64 from logits [B, V]: the best ones at temperature 0, else drawn."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return draw(distribution(logits, temperature, top_p), generator)


@torch.no_grad()
def stream(model, tokens, max_new_tokens, temperature=0.0, top_p=1.0, reselect=None, stop_ids=(),
           prompt_lengths=None, samples=1, generator=None, verify=False, counts=None):
    """Yield the next tokens [B * samples] int64, step by step, until every row has met a stop id.

    A row that has met one repeats stop_ids[0] until the others have. tokens are [B, S] int64;
    prompts of different lengths are padded on the right, and prompt_lengths [B] are given.
    samples continues each prompt that often. reselect is rho: after every rho tokens the full model
    runs over them again, which rewrites their cache entries, and GRIFFIN selects its neurons anew
    (section 4.1.1). verify makes that pass a test: the output is then the full model's, see
    stream_verified, which counts in `counts`. One stream of a model at a time: the next one takes
    over cache and selection. Raises ValueError on settings out of range and on a prompt that fills
    the context.
    """
    limit = model.config.max_position_embeddings
    if not 0 < tokens.shape[1] < limit:
        raise ValueError(f"{tokens.shape[1]} prompt tokens; the context holds 1 to {limit - 1}")
    check_decoding(max_new_tokens, temperature, top_p, reselect, samples)
    max_new_tokens = min(max_new_tokens, limit - tokens.shape[1])
    if verify:
        if len(tokens) * samples > 1 or not reselect:
            raise ValueError("verify takes one row at a time, and reselect: the tokens of a pass")
        yield from stream_verified(model, tokens, max_new_tokens, temperature, top_p, reselect,
                                   stop_ids, prompt_lengths, generator, counts)
        return
    step, logits = prefill(model, tokens, max_new_tokens, prompt_lengths, samples)
    stops = torch.tensor(stop_ids, dtype=torch.long, device=tokens.device)
    token = torch.zeros(len(logits), dtype=torch.long, device=tokens.device)
    done = torch.zeros_like(token, dtype=torch.bool)
    active = torch.arange(len(token), device=tokens.device)  # rows that are still in the batch
    since_selection = []  # tokens fed since the last reselection
    for count in range(1, max_new_tokens + 1):
        token = token.index_copy(0, active, choose(logits, temperature, top_p, generator))
        if stop_ids:
            token = torch.where(done, stops[0], token)
            done = done | torch.isin(token, stops)
        yield token
        unfinished = (~done[active]).nonzero().flatten() if stop_ids else active
        if count == max_new_tokens or len(unfinished) == 0:
            return
        if len(unfinished) <= SHRINK * len(active):
            active = active[unfinished]
            step = reorder(model, step, unfinished)
        since_selection.append(token)
        if len(since_selection) == reselect:
            logits = reselect_neurons(model, step, torch.stack(since_selection, dim=1)[active])
            since_selection = []
        else:
            with caprese.phase(model, "sparse"):
                logits = step(token[active])


def check_decoding(max_new_tokens, temperature, top_p, reselect=None, samples=1):
    """ValueError, in one line, for settings out of range."""
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be at least 0, top_p {top_p} in (0, 1]")
    if max_new_tokens < 1 or samples < 1 or (reselect is not None and reselect < 1):
        raise ValueError("max_new_tokens, samples and reselect must be at least 1")


def prefill(model, tokens, max_new_tokens, prompt_lengths=None, samples=1):
    """Run the prompts [B, S] through the full model and select.

    Returns a Step with room for max_new_tokens, and the logits [B * samples, V] of the next token.
    """
    step = model.new_step(len(tokens), tokens.shape[1] + max_new_tokens)
    rows = torch.arange(len(tokens), device=tokens.device)
    lengths, mask = torch.full_like(rows, tokens.shape[1]), None
    if prompt_lengths is not None:
        lengths = torch.as_tensor(prompt_lengths, device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    caprese.reset(model)
    hidden_states = count_and_select(model, step, tokens, mask)
    step.cache.set_lengths(lengths)
    logits = model.logits(hidden_states[rows, lengths - 1])
    if samples > 1:
        rows = rows.repeat_interleave(samples)
        logits, step = logits[rows], reorder(model, step, rows)
    return step, logits


def count_and_select(model, step, tokens, mask=None):
    """Run tokens [B, T] through the full model, which are counted where mask [B, T], and select.

    Returns the hidden states [B, T, D].
    """
    with caprese.phase(model, "prompt", mask):
        hidden_states = model.model(tokens, step.cache)
    caprese.select(model)
    step.check_graphs()
    return hidden_states


def reselect_neurons(model, step, tokens):
    """Run the last rho tokens [B, rho] through the full model again: logits [B, V] of the next one.

    This one pass rewrites their cache entries and adds them to the statistic; then the neurons are
    selected anew (section 4.1.1). The last of the tokens has not been fed before, so that rho = 1
    is the full model.
    """
    step.cache.advance(1 - tokens.shape[1])
    return model.logits(count_and_select(model, step, tokens)[:, -1])


def stream_verified(model, tokens, max_new_tokens, temperature, top_p, rho, stop_ids,
                    prompt_lengths=None, generator=None, counts=None):
    """Yield the full model's own output, most of it drafted by the sparse model (ours).

    The pass of the full model that a reselection makes also gives its distribution of each token.
    So drafted tokens stand as long as verify_draft accepts them, and the pass adds its own. A pass
    takes rho tokens, or fewer where the draft was unsure of one. At temperature 0 the output is the
    full model's token for token, else it has the same distribution.
    counts, a collections.Counter, counts passes, tokens drafted and accepted, and tokens of passes.
    """
    counts = Counter() if counts is None else counts
    step, logits = prefill(model, tokens, max_new_tokens, prompt_lengths)
    token = choose(logits, temperature, top_p, generator)
    yield token
    missing = max_new_tokens - 1
    while missing > 0 and token.item() not in stop_ids:
        fed, q = [token], []
        while len(fed) < min(rho, missing) and fed[-1].item() not in stop_ids:
            with caprese.phase(model, "sparse"):
                logits = step(fed[-1])
            q.append(distribution(logits, temperature, top_p))
            fed.append(draw(q[-1], generator))
            if logits.softmax(dim=-1).amax() < SURE:
                break
        n = len(fed)  # tokens that the full model sees at once
        step.cache.advance(1 - n)
        hidden_states = count_and_select(model, step, torch.stack(fed, dim=1))
        p = distribution(model.logits(hidden_states[0]), temperature, top_p)  # [n, V]
        accepted, last = verify_draft(p, q, fed[1:], generator)
        step.cache.advance(accepted + 1 - n)  # back to the last token that stands
        counts.update(passes=1, drafted=n - 1, accepted=accepted)
        for token in [*fed[1:accepted + 1], last]:
            yield token
            counts["tokens"] += 1
            if token.item() in stop_ids:
                return
        missing -= accepted + 1


def verify_draft(p, q, drafted, generator=None):
    """How many of the drafted tokens stand, and the token after them (Leviathan et al., 2023).

    p [n, V] are the full model's probabilities, q the draft's n - 1 of [1, V], drafted the n - 1
    tokens [1]. Token i stands with probability min(1, p_i / q_i). In place of the first that does
    not, one is drawn from (p - q)+. If all stand, the last row of p gives one more.
    """
    for i, token in enumerate(drafted):
        ratio = p[i, token] / q[i][0, token]
        if torch.rand(1, device=p.device, generator=generator) >= ratio:
            return i, draw((p[i:i + 1] - q[i]).clamp_min(0), generator)
    return len(drafted), draw(p[-1:], generator)


def reorder(model, step, rows):
    """Continue with these rows [n] int64 of the batch, or with some several times: a new Step."""
    caprese.reorder(model, rows)
    return step.reorder(rows)


def generate(model, tokens, max_new_tokens, temperature=0.0, top_p=1.0, reselect=None,
             stop_ids=(), **settings):
    """All of stream() at once: new tokens [B * samples, <= max_new_tokens] int64."""
    steps = stream(model, tokens, max_new_tokens, temperature, top_p, reselect, stop_ids,
                   **settings)
    return torch.stack(list(steps), dim=1)


# ---- many questions

def respond(model, tokenizer, questions, max_new_tokens=512, batch_size=128, **kwargs):
    """Yield (index, response, number of tokens) for each question.

    They are decoded in batches of similar prompt lengths, so the indices come in another order.
    """
    prompts = [tokenizer.prompt_ids(question) for question in questions]
    for indices in data.batch_indices([[prompt] for prompt in prompts], batch_size):
        tokens, lengths = data.pad([prompts[i] for i in indices], model.device)
        new = generate(model, tokens, max_new_tokens, stop_ids=tokenizer.stop_ids,
                       prompt_lengths=lengths, **kwargs)
        for i, ids in zip(indices, new.tolist()):
            ids = data.until_stop(ids, tokenizer.stop_ids)
            yield i, tokenizer.decode(ids), len(ids)


def evaluate(model, tokenizer, problems, **kwargs):
    """(accuracy in [0, 1], mean response length in tokens) of greedy answers to data.Problems."""
    right, tokens = 0, 0
    responses = respond(model, tokenizer, [data.ask(problem) for problem in problems], **kwargs)
    bar = tqdm(responses, total=len(problems), desc=problems[0].kind, leave=False, disable=None)
    for done, (i, response, count) in enumerate(bar, 1):
        right += data.correct(response, problems[i].answer)
        tokens += count
        bar.set_postfix(accuracy=f"{right / done:.3f}", refresh=False)
    return right / len(problems), tokens / len(problems)


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


def common_arguments(parser):
    """Add the flags that every script takes; returns the parser."""
    add = parser.add_argument
    add("--model", help="folder in the official layout or hub repo id (default: the bundled model)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: %(default)s")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own, or what this CPU does best")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    return parser


def choose_dtype(args):
    """The dtype that --dtype asks for, else the checkpoint's own (None) or what the CPU does best.

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
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device!r} is not available; try --device cpu") from None
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        print("note: there is an NVIDIA GPU here, but this torch is the CPU build; the CUDA build: "
              "pip install --force-reinstall torch==2.13.0", file=sys.stderr)


def load(args, onto=None):
    """(model, tokenizer) for the common flags; onto is another device for the weights."""
    check_device(args.device)
    folder = resolve(args.model or BUNDLED)
    model = Transformer.from_pretrained(folder, onto or args.device, choose_dtype(args))
    return model, data.Tokenizer(folder)


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
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
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
    kept = "weights of 4 bits" if ff.method == "int4" else f"{ff.density:.0%} of the neurons"
    added = caprese.added_parameters(model)
    correction = f", x L R of {added:.1%} more parameters" if added else ""
    return f"{ff.method}, {kept} in {len(layers)} of {len(model.model.layers)} layers{correction}"


def choose_variants(args):
    """The names of the variants that answer; fills in args.method, density, layers and adapter.

    Raises OSError or ValueError for an adapter that cannot be used.
    """
    about, names = {}, ["sparse" if args.method or args.density else "full"]
    if args.prompt is None:
        if args.model:
            raise ValueError("give a prompt: only the bundled model has a problem of its own")
        args.adapter = args.adapter or BUNDLED / f"{args.method or 'griffin'}.safetensors"
    if args.adapter:
        about, names = caprese.read_adapter(args.adapter)[1], ["sparse + Caprese"]
        if args.method not in (None, about["method"]):
            raise ValueError(f"{args.adapter} is for {about['method']}, not for {args.method}")
    args.method = about.get("method", args.method or "griffin")
    args.density = args.density or about.get("density", 0.5)
    args.layers = about.get("layers")
    return ["full", "sparse", "sparse + Caprese"] if args.prompt is None else names


def print_steps(steps, tokenizer, out, full_ids):
    """Print the text of one answer as its tokens come, and pass the tokens on.

    From the first token on that is not the full model's, the text is red on a terminal. Elsewhere,
    and where NO_COLOR is set (no-color.org), a caret below the answer points at that token.
    """
    from tokenizers.decoders import DecodeStream
    decoder, text, column = DecodeStream(skip_special_tokens=True), "", None
    colored = out.isatty() and not os.environ.get("NO_COLOR")
    for number, token in enumerate(steps):
        new = decoder.step(tokenizer.tokenizer, token.item()) or ""
        if full_ids and column is None and token.item() != full_ids[number]:
            column = len(text) + len(new) - len(new.lstrip())
        text += new
        shown = RED.format(new) if colored and column is not None else new
        print(shown, end="", file=out, flush=True)
        yield token
    print(file=out)
    if column is not None and not colored:
        print("^".rjust(column + 1), file=out)


def answer(model, tokenizer, question, args, out, full_ids=()):
    """Stream one answer to `out`, or print args.n samples when they are done.

    full_ids are the tokens of the full model's answer, if this one is to be compared. Returns a row
    for --json and the tokens of the (last) answer. tokens_per_second is of all samples together,
    after the first token of each.
    """
    prompt = torch.tensor([tokenizer.prompt_ids(question)], device=model.device)
    generator = torch.Generator(model.device).manual_seed(args.seed)
    counts, is_sparse = Counter(), bool(caprese.sparse_layers(model))
    steps = stream(model, prompt, args.max_new_tokens, args.temperature, args.top_p,
                   args.reselect if is_sparse else None, tokenizer.stop_ids, samples=args.n,
                   generator=generator, verify=args.verify and is_sparse, counts=counts)
    if args.n == 1:
        steps = print_steps(steps, tokenizer, out, full_ids)
    columns, times, samples = [], [], []
    for tokens in steps:
        columns.append(tokens.tolist())
        times.append(time.perf_counter())
    for number, ids in enumerate(zip(*columns), 1):
        ids = data.until_stop(ids, tokenizer.stop_ids)
        samples.append({"response": tokenizer.decode(ids), "tokens": len(ids)})
        if args.n > 1:
            print(f"[{number}] {samples[-1]['response']}", file=out)
    total = sum(sample["tokens"] for sample in samples)
    rate = (total - args.n) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    differences = [i for i, (token, full) in enumerate(zip(ids, full_ids)) if token != full]
    row = samples[0] if args.n == 1 else {"samples": samples, "tokens": total}
    return row | {"tokens_per_second": round(rate, 1), **acceptance(model, counts),
                  "leaves_full_at": differences[0] if differences else None}, ids


def acceptance(model, counts):
    """What stream_verified counted, as ratios; {} if it has not run.

    Bytes are those of the weights. A pass of the full model and a step read each of theirs once.
    """
    if not counts["passes"]:
        return {}
    full, active = caprese.weights_read(model)
    steps = counts["drafted"] * active / full
    tokens = counts["tokens"]
    return {"acceptance": round(counts["accepted"] / max(1, counts["drafted"]), 3),
            "tokens_per_pass": round(tokens / counts["passes"], 2),
            "bytes_to_full": round((counts["passes"] + steps) / tokens, 3)}


def print_answers(args, out):
    """Answer the prompt, or without one the hard problem three ways; returns what --json prints."""
    variants = choose_variants(args)  # a missing adapter is noticed before the model loads
    model, tokenizer = load(args)
    print(f"Answering with {args.model or 'the bundled model'} on {args.device}: at most "
          f"{args.max_new_tokens} tokens, temperature {args.temperature}.", file=out)
    question, problem, full_ids, rows = args.prompt, None, (), []
    if question is None:
        problem = data.problems("maths", 1, HARD_SEED, evaluation=True, steps=8)[0]
        question = data.ask(problem)
        print(f"{question}\nHeld out from training; the answer is {problem.answer}.", file=out)
    for name in variants:
        if name == "sparse":
            caprese.attach(model, args.method, args.density, args.layers)
        if name == "sparse + Caprese":
            caprese.load_adapter(model, args.adapter, args.density)
        print(f"\n{name}: {describe(model)}", file=out)
        row, ids = answer(model, tokenizer, question, args, out, full_ids)
        verdict = ""
        if problem and args.n == 1:
            full_ids = full_ids or ids  # the full model answers first
            row["correct"] = data.correct(row["response"], problem.answer)
            verdict = ", right" if row["correct"] else ", wrong"
        if "acceptance" in row:
            verdict += (f"; acceptance {row['acceptance']:.0%}, {row['tokens_per_pass']} tokens "
                        f"a pass, {row['bytes_to_full']} of the full model's bytes")
        print(f"[{row['tokens']} tokens, {row['tokens_per_second']} tokens/s{verdict}]", file=out)
        rows.append({"method": name} | row)
    return {"prompt": question, "rows": rows}


# ---- python sample.py --questions FILE --out FILE: the paper's training set is private, so let the
# full model write an open one

def write_training_set(args, out):
    """Answer each question args.n times; append the answers to args.out, JSONL.

    Written block by block. What a block draws depends on the settings and on the number of its
    first answer alone. So a rerun drops the last block, which may be incomplete, and continues as
    if never interrupted.
    """
    problems = data.read_problems(args.questions, evaluation=True, boxed=bool(args.model))
    asked = [problem for problem in problems for _ in range(args.n)]
    first = cut_last_block(args.out)
    model, tokenizer = load(args)
    print(f"Asking {args.model or 'the bundled model'} on {args.device} {len(problems)} questions, "
          f"{args.n} times each.\n{first} answers are in {args.out} already or left out.", file=out)
    with open(args.out, "a", encoding="utf-8") as file:
        for start in tqdm(range(first, len(asked), args.batch_size), desc="blocks", disable=None):
            block = asked[start:start + args.batch_size]
            for line in answer_block(args, model, tokenizer, block, start):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    samples = Path(args.out).read_bytes().count(b"\n")
    print(f"{samples} samples are in {args.out}", file=out)
    return {"samples": samples, "file": args.out}


def answer_block(args, model, tokenizer, problems, number):
    """The training samples of one block, in order; without answers that do not show how to end."""
    generator = torch.Generator(model.device).manual_seed(args.seed * 1_000_003 + number)
    responses = respond(model, tokenizer, [data.ask(problem) for problem in problems],
                        args.max_new_tokens, args.batch_size, temperature=args.temperature,
                        top_p=args.top_p, generator=generator)
    for i, response, tokens in sorted(responses):
        right = data.correct(response, problems[i].answer)
        if tokens < args.max_new_tokens and (right or not args.only_right):
            yield {"block": number, "question": problems[i].question, "response": response,
                   "answer": problems[i].answer, "right": right}


def cut_last_block(file):
    """Cut the last block off a training set, and return its number, that of its first answer.

    A file that does not exist is made, and that is block 0. ValueError, and the file stays as it
    is, if it is no training set: there each line begins with the number of its block.
    """
    Path(file).touch()
    text = Path(file).read_bytes()
    if text and not re.match(rb'{"block": \d+, "question": ', text):
        raise ValueError(f"{file} is no training set of sample.py; give another --out")
    blocks = re.findall(rb'^{"block": (\d+), ', text, re.MULTILINE)
    last = max(map(int, blocks), default=0)
    os.truncate(file, len(text.partition(b'{"block": %d, ' % last)[0]))
    return last


def arguments():
    """The command line; ValueError for flags that do not go together."""
    parser = common_arguments(ArgumentParser(description=__doc__.splitlines()[0]))
    add = parser.add_argument
    add("prompt", nargs="?", help="default: a hard problem, which the bundled model answers 3 ways")
    add("--method", choices=caprese.METHODS, help="default: the adapter's, or none")
    add("--density", type=float, help="kept neurons, in (0, 1] (default: the adapter's, or 0.5)")
    add("--adapter", help="file written by distill.py")
    add("--reselect", type=positive, help="rho: reselect every so many tokens (default: never)")
    add("--verify", action="store_true", help="with --reselect: keep to the full model's answer")
    add("-n", type=positive, default=1, help="samples of each prompt (default: %(default)s)")
    add("--temperature", type=float, help="default: 0, or the paper's 0.6 with -n above 1")
    add("--top-p", type=float, help="default: 1, or the paper's 0.95 with -n above 1")
    add("--max-new-tokens", type=positive, default=512, help="default: %(default)s")
    add("--questions", metavar="FILE", help="let the full model answer these, for a training set")
    add("--out", metavar="FILE", help="with --questions: the JSONL file to write or to continue")
    add("--only-right", action="store_true", help="with --questions: keep only right answers")
    add("--batch-size", type=positive, default=64, help="with --questions (default: %(default)s)")
    args = parser.parse_args()
    several = args.n > 1
    args.temperature = (0.6 if several else 0.0) if args.temperature is None else args.temperature
    args.top_p = (0.95 if several else 1.0) if args.top_p is None else args.top_p
    check_decoding(args.max_new_tokens, args.temperature, args.top_p)
    if args.density is not None and not 0 < args.density <= 1:
        raise ValueError(f"--density is {args.density}, but it must lie in (0, 1]")
    chosen = args.method or args.density or args.adapter
    if args.reselect and args.prompt and not chosen:
        raise ValueError("--reselect is for a sparse model: give --method, --density or --adapter")
    if args.verify and (not args.reselect or args.n > 1):
        raise ValueError("--verify needs --reselect N, the tokens of a pass, and one sample, -n 1")
    if bool(args.questions) != bool(args.out):
        raise ValueError("--questions and --out go together: the file to read, the file to write")
    if args.questions and (args.prompt or chosen):
        raise ValueError("--questions asks the full model; give no prompt, method or adapter")
    return args


def main():
    args = arguments()
    out = sys.stderr if args.json else sys.stdout
    result = write_training_set(args, out) if args.questions else print_answers(args, out)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
