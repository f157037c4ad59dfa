"""Prefill, select, decode, reselect; and the command line around them: python sample.py [prompt]

Without a prompt it answers one hard problem three ways: full model, sparse, sparse + Caprese.
With --questions FILE --out FILE the full model writes an open training set.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import caprese
import data
from model import DTYPES, Transformer, resolve

BUNDLED = Path(__file__).resolve().parent / "models" / "tiny-math"
BUNDLED_DENSITY = 0.6  # where GRIFFIN costs the bundled model its maths but not its reading
HARD_SEED = 1          # of the problem that is answered without a prompt
SHRINK = 0.75          # a batch drops its finished rows once so few are unfinished


# ---- decoding

def choose(logits, temperature=0.0, top_p=1.0, generator=None):
    """Next tokens [B] int64 from logits [B, V]: the best ones at temperature 0, else drawn.

    top_p keeps the smallest set of most likely tokens whose probabilities add up to at least top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = torch.softmax(logits.float() / temperature, dim=-1)
    p, order = p.sort(dim=-1, descending=True)
    p[p.cumsum(dim=-1) - p >= top_p] = 0  # the tokens before this one already suffice
    cumulative = p.cumsum(dim=-1)
    uniform = torch.rand(len(p), 1, device=p.device, generator=generator)  # one number a row
    drawn = torch.searchsorted(cumulative, cumulative[:, -1:] * uniform)
    return order.gather(1, drawn).squeeze(1)


@torch.no_grad()
def stream(model, tokens, max_new_tokens, temperature=0.0, top_p=1.0, reselect=None, stop_ids=(),
           prompt_lengths=None, samples=1, generator=None):
    """Yield the next tokens [B * samples] int64, step by step, until every row has met a stop id.

    A row that has met one repeats stop_ids[0] until the others have. tokens are [B, S] int64;
    prompts of different lengths are padded on the right, and prompt_lengths [B] are given.
    samples continues each prompt that often. reselect is rho: after every rho tokens the full model
    runs over them again, which rewrites their cache entries, and GRIFFIN selects its neurons anew
    (section 4.1.1). One stream of a model at a time: the next one takes over cache and selection.
    Raises ValueError on settings out of range and on a prompt that fills the context.
    """
    limit = model.config.max_position_embeddings
    if not 0 < tokens.shape[1] < limit:
        raise ValueError(f"the prompt has {tokens.shape[1]} tokens, but the model's context holds "
                         f"1 to {limit - 1} before an answer")
    check_decoding(max_new_tokens, temperature, top_p, reselect, samples)
    max_new_tokens = min(max_new_tokens, limit - tokens.shape[1])
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
        if count == max_new_tokens or stop_ids and done.all():
            return
        if stop_ids:
            unfinished = (~done[active]).nonzero().flatten()
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
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be at least 0, top_p {top_p} in (0, 1]")
    for name, value in (("max_new_tokens", max_new_tokens), ("samples", samples),
                        ("reselect", reselect)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")


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
    with caprese.phase(model, "prompt", mask):
        hidden_states = model.model(tokens, step.cache)
    step.cache.set_lengths(lengths)
    caprese.select(model)
    step.check_graphs()
    logits = model.logits(hidden_states[rows, lengths - 1])
    if samples > 1:
        rows = rows.repeat_interleave(samples)
        logits, step = logits[rows], reorder(model, step, rows)
    return step, logits


def reselect_neurons(model, step, tokens):
    """Run the last rho tokens [B, rho] through the full model again: logits [B, V] of the next one.

    This one pass rewrites their cache entries and adds them to the statistic; then the neurons are
    selected anew (section 4.1.1). The last of the tokens has not been fed before, so that rho = 1
    is the full model.
    """
    step.cache.advance(1 - tokens.shape[1])
    with caprese.phase(model, "prompt"):
        hidden_states = model.model(tokens, step.cache)
    caprese.select(model)
    step.check_graphs()
    return model.logits(hidden_states[:, -1])


def reorder(model, step, rows):
    """Continue with these rows [n] int64 of the batch, or with some several times: a new Step."""
    caprese.reorder(model, rows)
    return step.reorder(rows)


def generate(model, tokens, max_new_tokens, temperature=0.0, top_p=1.0, reselect=None,
             stop_ids=(), **kwargs):
    """All of stream() at once: new tokens [B * samples, <= max_new_tokens] int64."""
    steps = stream(model, tokens, max_new_tokens, temperature, top_p, reselect, stop_ids, **kwargs)
    return torch.stack(list(steps), dim=1)


# ---- many questions

def respond(model, tokenizer, questions, max_new_tokens=512, batch_size=128, **kwargs):
    """Yield (index, response, number of tokens) for each question.

    They are decoded in batches of similar prompt lengths, so the indices come in another order.
    """
    prompts = [tokenizer.prompt_ids(question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        indices = order[start:start + batch_size]
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
    parser.add_argument("--model", help="folder in the official layout or hub repo id "
                        "(default: the bundled model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own; on a CPU "
                        "bfloat16 if it has instructions for it, else float32; for the bundled "
                        "model float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true",
                        help="one JSON object on stdout, everything else on stderr")
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
    """ValueError, in one line, for a device that cannot compute here."""
    try:
        torch.empty(1, device=device).item()  # the meta device holds no numbers, so it fails
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device!r} is not available; try --device cpu") from None


def load(args, onto=None):
    """(model, tokenizer) for the common flags; onto is another device for the weights."""
    check_device(args.device)
    folder = resolve(args.model or BUNDLED)
    model = Transformer.from_pretrained(folder, onto or args.device, choose_dtype(args))
    return model, data.Tokenizer(folder)


def format_table(rows):
    """Dictionaries of equal keys as aligned text."""
    lines = [list(rows[0])]
    for row in rows:
        cells = []
        for value in row.values():
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            cells.append("-" if value is None else text)
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        line[1:] = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        line[0] = line[0].ljust(widths[0])
    return "\n".join("  ".join(line) for line in lines)


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


def answer(model, tokenizer, question, args, out):
    """Stream one answer to `out`, or print args.n samples when they are done; a row for --json.

    tokens_per_second is of all samples together, after the first token of each.
    """
    from tokenizers.decoders import DecodeStream
    prompt = torch.tensor([tokenizer.prompt_ids(question)], device=model.device)
    decoder, steps, times = DecodeStream(skip_special_tokens=True), [], []
    generator = torch.Generator(model.device).manual_seed(args.seed)
    for tokens in stream(model, prompt, args.max_new_tokens, args.temperature, args.top_p,
                         args.reselect, tokenizer.stop_ids, samples=args.n, generator=generator):
        steps.append(tokens.tolist())
        times.append(time.perf_counter())
        if args.n == 1:
            text = decoder.step(tokenizer.tokenizer, steps[-1][0]) or ""
            print(text, end="", file=out, flush=True)
    samples = []
    for number, ids in enumerate(zip(*steps), 1):
        ids = data.until_stop(list(ids), tokenizer.stop_ids)
        samples.append({"response": tokenizer.decode(ids), "tokens": len(ids)})
        print(f"[{number}] {samples[-1]['response']}" if args.n > 1 else "", file=out)
    tokens = sum(sample["tokens"] for sample in samples)
    rate = (tokens - args.n) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    row = samples[0] if args.n == 1 else {"samples": samples, "tokens": tokens}
    return row | {"tokens_per_second": round(rate, 1)}


def variants(args):
    """{name: (method, density, layers, adapter)} of the answers; ValueError for a bad adapter."""
    method, adapter, layers = args.method, args.adapter, None
    default_density = 0.5 if args.model else BUNDLED_DENSITY
    if args.prompt is None and not adapter:
        method = method or "griffin"
        adapter = BUNDLED / f"{method}.safetensors"
        if not adapter.exists():
            raise ValueError(f"the bundled model comes without an adapter for {method}; "
                             f"python distill.py --method {method} makes one for --adapter")
    if adapter:
        about = caprese.read_adapter(adapter)[1]
        if method not in (None, about["method"]):
            raise ValueError(f"{adapter} is for {about['method']}, not for {method}")
        method, layers, default_density = about["method"], about.get("layers"), about.get("density")
    elif args.density:
        method = method or "griffin"
    density = args.density or default_density
    if args.prompt is None:
        return {"full": (None, None, None, None), "sparse": (method, density, layers, None),
                "sparse + Caprese": (method, density, layers, adapter)}
    return {"sparse" if method else "full": (method, density, layers, adapter)}


def print_answers(args, variant_settings, model, tokenizer, out):
    """Answer the prompt, or without one the hard problem by every variant; rows for --json."""
    if args.prompt is None:
        problem = data.problems("maths", 1, HARD_SEED, evaluation=True, steps=8)[0]
        question = data.ask(problem)
        print(f"A problem of 8 steps, held out from training, answered {len(variant_settings)} "
              f"ways on {args.device}; the answer is {problem.answer}.\n{question}", file=out)
    else:
        problem, question = None, args.prompt
        print(f"Answering with {args.model or 'the bundled model'} on {args.device}: at most "
              f"{args.max_new_tokens} tokens, temperature {args.temperature}.", file=out)
    rows = []
    for name, (method, density, layers, adapter) in variant_settings.items():
        caprese.detach(model)
        if adapter:
            caprese.load_adapter(model, adapter, density)
        elif method:
            caprese.attach(model, method, density, layers)
        print(f"\n{name}: {describe(model)}", file=out)
        row = {"method": name} | answer(model, tokenizer, question, args, out)
        verdict = ""
        if problem and args.n == 1:
            row["correct"] = data.correct(row["response"], problem.answer)
            verdict = ", right" if row["correct"] else ", wrong"
        print(f"[{row['tokens']} tokens, {row['tokens_per_second']} tokens/s{verdict}]", file=out)
        rows.append(row)
    return {"prompt": question, "rows": rows}


# ---- python sample.py --questions FILE --out FILE: the paper's training set is private, so let the
# full model write an open one

def write_training_set(args, problems, model, tokenizer):
    """Answer each question args.n times; append the answers to args.out, JSONL.

    Written block by block. What a block draws depends on the settings and on the number of its
    first question alone. So a rerun drops the last block, which may be incomplete, and continues as
    if never interrupted.
    """
    size = max(1, args.batch_size // args.n)  # questions of a block
    written, first = read_complete_blocks(args.out)
    count = len(written)
    print(f"Asking {args.model or 'the bundled model'} on {args.device} {len(problems)} questions, "
          f"{args.n} times each.\n{count} samples are in {args.out} already.", file=sys.stderr)
    bar = tqdm(range(first, len(problems), size), desc="blocks", disable=None)
    with open(args.out, "a", encoding="utf-8") as out:
        for start in bar:
            asked = [p for p in problems[start:start + size] for _ in range(args.n)]
            lines = answer_block(args, model, tokenizer, asked, start)
            out.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            out.flush()
            count += len(lines)
            bar.set_postfix(samples=count)
    return {"samples": count, "file": args.out}


def answer_block(args, model, tokenizer, problems, block):
    """The training samples of one block, in order; without answers that do not show how to end."""
    generator = torch.Generator(model.device).manual_seed(args.seed * 1_000_003 + block)
    responses = respond(model, tokenizer, [data.ask(problem) for problem in problems],
                        args.max_new_tokens, args.batch_size, temperature=args.temperature,
                        top_p=args.top_p, generator=generator)
    lines = []
    for i, response, tokens in sorted(responses):
        right = data.correct(response, problems[i].answer)
        if tokens < args.max_new_tokens and (right or not args.only_right):
            lines.append({"question": problems[i].question, "response": response,
                          "answer": problems[i].answer, "right": right, "block": block})
    return lines


def read_complete_blocks(file):
    """(the lines of all blocks but the last, the last block's number); the last one is cut off.

    ValueError, and the file stays as it is, if it is no training set.
    """
    path = Path(file)
    if not path.exists():
        return [], 0
    *complete, cut_line = path.read_text(encoding="utf-8").split("\n")
    try:
        lines = [json.loads(text) for text in complete]
        last = lines[-1]["block"] if lines else 0
        lines = [line for line in lines if line["block"] < last]
        foreign = not '{"question"'.startswith(cut_line[:11])
    except (ValueError, KeyError, TypeError):
        foreign = True
    if foreign:
        raise ValueError(f"{file} is no training set of sample.py; give another --out")
    temporary = path.with_name(f"{path.name}.tmp")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return lines, last


def arguments():
    """The command line; ValueError for flags that do not go together."""
    parser = common_arguments(ArgumentParser(description=__doc__.splitlines()[0]))
    add = parser.add_argument
    add("prompt", nargs="?",
        help="default: a hard problem for the bundled model, answered three ways")
    add("--method", choices=caprese.METHODS, help="sparse method (default: the adapter's, or none)")
    add("--density", type=float, help="kept neurons, as a fraction in (0, 1] (default: the "
        f"adapter's, or the paper's 0.5, or {BUNDLED_DENSITY} for the bundled model)")
    add("--adapter", help="file written by distill.py")
    add("--reselect", type=positive, help="rho: reselect every so many tokens (default: never)")
    add("-n", type=positive, default=1, help="samples of each prompt (default: %(default)s)")
    add("--temperature", type=float, help="default: 0, or the paper's 0.6 with -n above 1")
    add("--top-p", type=float, help="default: 1, or the paper's 0.95 with -n above 1")
    add("--max-new-tokens", type=positive, default=512, help="default: %(default)s")
    add("--questions", metavar="FILE", help="write a training set: answer the questions of this "
        "JSONL file by the full model")
    add("--out", metavar="FILE", help="with --questions: the JSONL file to write or to continue")
    add("--only-right", action="store_true", help="with --questions: keep only right answers")
    add("--batch-size", type=positive, default=64,
        help="with --questions: answers decoded side by side (default: %(default)s)")
    args = parser.parse_args()
    several = args.n > 1
    args.temperature = (0.6 if several else 0.0) if args.temperature is None else args.temperature
    args.top_p = (0.95 if several else 1.0) if args.top_p is None else args.top_p
    if args.density is not None and not 0 < args.density <= 1:
        raise ValueError(f"--density is {args.density}, but it must lie in (0, 1]")
    if bool(args.questions) != bool(args.out):
        raise ValueError("--questions and --out go together: the file to read, the file to write")
    if args.questions and (args.prompt or args.method or args.adapter or args.density):
        raise ValueError("--questions asks the full model; it takes no prompt, --method, "
                         "--density or --adapter")
    if args.prompt is None and args.model and not args.questions:
        raise ValueError("give a prompt: only the bundled model comes with a problem of its own")
    check_decoding(args.max_new_tokens, args.temperature, args.top_p)
    return args


def main():
    args = arguments()
    out = sys.stderr if args.json else sys.stdout
    if args.questions:
        problems = data.read_problems(args.questions, evaluation=True, boxed=bool(args.model))
        model, tokenizer = load(args)
        result = write_training_set(args, problems, model, tokenizer)
        print(f"{result['samples']} samples are in {args.out}", file=out)
    else:
        variant_settings = variants(args)  # a missing adapter is noticed before the model loads
        model, tokenizer = load(args)
        result = print_answers(args, variant_settings, model, tokenizer, out)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
