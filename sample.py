"""Prefill, select, decode, reselect; and the command line around them: python sample.py [prompt]

Without a prompt it answers one hard problem three ways: full model, sparse, sparse + Caprese.
"""

import argparse
import json
import math
import sys
import time
from collections import deque
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import caprese
import data
from model import Transformer, generated_mask, resolve

EMBEDDED = Path(__file__).resolve().parent / "models" / "tiny-math"
EMBEDDED_DENSITY = 0.6  # where GRIFFIN costs the embedded model its maths but not its reading; the paper's is 0.5
HARD_SEED = 1           # of the problem that is answered without a prompt
LAG = {"cuda": 8}       # steps that a device may be ahead of the host, which learns that late that a row is done
SHRINK = 0.75           # once no more than this share of a batch's rows is not done, the others leave it


def choose(logits, temperature=0.0, top_p=1.0, generator=None):
    """Next tokens [B] int64 from logits [B, V]: the best one at temperature 0, else a draw.

    top_p keeps the smallest set of most likely tokens whose probabilities add up to at least top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = torch.softmax(logits.float() / temperature, dim=-1)
    p, order = p.sort(dim=-1, descending=True)
    p[p.cumsum(dim=-1) - p >= top_p] = 0  # what comes before a token already suffices
    p = p.cumsum(dim=-1)
    draw = p[:, -1:] * torch.rand(len(p), 1, device=p.device, generator=generator)  # one number a row, not V of them
    return order.gather(1, torch.searchsorted(p, draw)).squeeze(1)


@torch.no_grad()
def stream(model, tokens, max_new_tokens, temperature=0.0, top_p=1.0, reselect=None, stop_ids=(),
           prompt_lengths=None, samples=1, generator=None):
    """Yield the next tokens [B * samples] int64, one step at a time, until every row has met a stop id.

    A row that has met one repeats stop_ids[0] until the others are done.
    tokens [B, S] int64; prompts of different lengths are padded on the right and prompt_lengths [B] given.
    samples continues each prompt that often (one prompt: all share its selection). reselect is rho: every so many
    tokens the full model reruns those since the last time (section 4.1.1). Raises ValueError on bad settings.
    """
    limit = model.config.max_position_embeddings
    B, S = tokens.shape
    if S >= limit:
        raise ValueError(f"the prompt has {S} tokens, but the model's context ends at {limit}; shorten it")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, not {temperature} and {top_p}")
    if min(max_new_tokens, samples, 1 if reselect is None else reselect) < 1:
        raise ValueError(f"max_new_tokens, samples and reselect must be at least 1, not {max_new_tokens}, {samples} "
                         f"and {reselect}")
    max_new_tokens = min(max_new_tokens, limit - S)
    step, logits = prefill(model, tokens, max_new_tokens, prompt_lengths, samples)
    device, stops = tokens.device, torch.tensor(stop_ids, dtype=torch.long, device=tokens.device)
    here = torch.arange(B * samples)  # the rows still in the batch; on the host, as over is
    over = torch.zeros_like(here, dtype=torch.bool)
    live, token, done = here.to(device), here.to(device), over.to(device)
    since, ahead = [], deque()  # tokens fed since the last reselection; steps that the host has not looked at
    for i in range(1, max_new_tokens + 1):
        token = token.index_copy(0, live, choose(logits, temperature, top_p, generator))
        if stop_ids:
            token = torch.where(done, stops[0], token)
            done = done | torch.isin(token, stops)
        ahead.append((token, on_host(done) if stop_ids else lambda: over))
        while len(ahead) > (LAG.get(device.type, 0) if stop_ids and i < max_new_tokens else 0):
            ready, ended = ahead.popleft()
            yield ready
            over = ended()
            if over.all():
                return
        if i == max_new_tokens:
            return
        stay = (~over[here]).nonzero().flatten()
        if len(stay) <= SHRINK * len(here):  # rows that are done leave
            here, live = here[stay], here[stay].to(device)
            step = take(model, step, stay.to(device))
        since.append(token)
        if len(since) == reselect:
            # The full model takes these tokens again in one pass, which rewrites their KV entries, adds them to
            # the statistic, and gives the logits of the next token; so rho = 1 is the full model.
            step.cache.move(1 - reselect)
            again = torch.stack(since, dim=1)[live]
            logits = model.logits(model.hidden(again, step.cache, generated=False)[:, -1])
            select(model, step)
            since = []
        else:
            logits = step(token[live])


def prefill(model, tokens, room, prompt_lengths=None, samples=1):
    """Run the prompts [B, S] through the full model and select: a Step with room for so many tokens, logits [B, V]."""
    step = model.new_step(len(tokens), tokens.shape[1] + room)
    caprese.reset(model)
    if prompt_lengths is None:
        last = model.hidden(tokens, step.cache, generated=False)[:, -1]
    else:
        prompt_lengths = torch.as_tensor(prompt_lengths, device=tokens.device)
        hidden = model.hidden(tokens, step.cache, generated_mask(tokens, prompt_lengths))
        last = hidden[torch.arange(len(tokens)), prompt_lengths - 1]
        step.cache.set_lengths(prompt_lengths)
    select(model, step)
    logits = model.logits(last)
    if samples > 1:
        each = torch.arange(len(tokens), device=tokens.device).repeat_interleave(samples)
        logits, step = logits[each], take(model, step, each)
    return step, logits


def select(model, step):
    """Take the selection, and see whether decoding by it can be recorded as a graph."""
    caprese.select(model)
    step.capture = step.tokens.is_cuda and caprese.fixed(model)


def take(model, step, rows):
    """Continue with these rows [n] only (or with some of them several times): a new Step."""
    caprese.take(model, rows)
    return step.take(rows)


def on_host(flag):
    """A function that returns flag on the host. On CUDA its copy is on the way meanwhile, behind the steps so far."""
    if not flag.is_cuda:
        return lambda: flag
    copy, arrived = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()
    return lambda: arrived.synchronize() or copy


def generate(model, tokens, max_new_tokens, temperature=0.0, top_p=1.0, reselect=None, stop_ids=(), **kwargs):
    """All of stream() at once: new tokens [B * samples, <= max_new_tokens] int64."""
    steps = stream(model, tokens, max_new_tokens, temperature, top_p, reselect, stop_ids, **kwargs)
    return torch.stack(list(steps), dim=1)


def respond(model, tokenizer, questions, max_new_tokens=512, batch=128, **kwargs):
    """Yield (index, response, token count) for many questions, decoded in batches of similar prompt lengths."""
    prompts = [tokenizer.prompt_ids(q) for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch):
        rows = order[at:at + batch]
        tokens, lengths = data.pad([prompts[i] for i in rows], model.device)
        new = generate(model, tokens, max_new_tokens, stop_ids=tokenizer.stop_ids, prompt_lengths=lengths, **kwargs)
        for i, ids in zip(rows, new.tolist()):
            ids = data.until_stop(ids, tokenizer.stop_ids)
            yield i, tokenizer.decode(ids), len(ids)


def evaluate(model, tokenizer, problems, **kwargs):
    """Accuracy in [0, 1] and mean response length in tokens of greedy answers to data.Problem items."""
    right, tokens, start = 0, 0, time.perf_counter()
    bar = tqdm(respond(model, tokenizer, [data.ask(p) for p in problems], **kwargs), total=len(problems),
               desc=problems[0].kind, leave=False, disable=None)
    for done, (i, text, count) in enumerate(bar, 1):
        right += data.correct(text, problems[i].answer)
        tokens += count
        bar.set_postfix(accuracy=f"{right / done:.3f}", tokens_per_second=round(tokens / (time.perf_counter() - start)),
                        refresh=False)
    return right / len(problems), tokens / len(problems)


@torch.no_grad()
def respond_twice(model, batch):
    """Final embeddings [B, R, D] of the responses by the full and by the sparse model, after one shared prefill."""
    responses, _ = batch.responses()
    longest = int(batch.prompt_lengths.max())
    cache = model.new_cache(len(responses), longest + responses.shape[1])
    caprese.reset(model)
    model.hidden(batch.tokens[:, :longest], cache, batch.generated[:, :longest])
    cache.set_lengths(batch.prompt_lengths)
    caprese.select(model, compact=False)  # the masked path, which serves rows of any kind, and sharded weights
    full = model.hidden(responses, cache)
    if not caprese.sparse_layers(model):
        return full, full
    cache.move(-responses.shape[1])
    return full, model.hidden(responses, cache, generated=True)


@torch.no_grad()
def fidelity(model, pairs, size=4):
    """How close the sparse model's next-token distributions are to the full model's, on given responses.

    Returns kl (mean KL(full || sparse) in nats), agreement (share of equal top-1 tokens) and perplexity (of the
    sparse model), over all positions that the sparse FF serves and that have a next token.
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    bar = tqdm(data.batches(pairs, size, model.device), total=-(-len(pairs) // size), desc="KL", leave=False,
               disable=None)
    for batch in bar:
        responses, real = batch.responses()
        here, target = real[:, 1:], responses[:, 1:][real[:, 1:]]  # position i has a next token if i + 1 is real
        full, sparse = (model.logits(h[:, :-1][here]).float().log_softmax(-1) for h in respond_twice(model, batch))
        kl = F.kl_div(sparse, full, log_target=True, reduction="sum")
        same = (full.argmax(-1) == sparse.argmax(-1)).sum()
        sums += torch.stack([kl, same, F.nll_loss(sparse, target, reduction="sum")]).double().cpu()
        count += len(target)
        bar.set_postfix(kl=f"{sums[0] / count:.3f}")
    kl, agreement, loss = (sums / count).tolist()
    return {"kl": kl, "agreement": agreement, "perplexity": math.exp(loss)}


def common_arguments(parser):
    """The flags that every script takes."""
    parser.add_argument("--model", help="folder in the official layout or hub repo id (default: the embedded model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: the checkpoint's own; on a CPU bfloat16 if it has instructions for it, else "
                        "float32; for the embedded model float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")
    return parser


def default_dtype(device, model):
    """Without --dtype: the checkpoint's own (None), but on a CPU what is fastest there.

    That is bfloat16 where the CPU has instructions for it, else float32; float32 also for the embedded model (None).
    """
    if device.type != "cpu":
        return None
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if model and (able.get("avx512_bf16") or able.get("amx_bf16")) else torch.float32


def load(args, onto=None):
    """(model, tokenizer) for the common flags; the weights go onto another device than args.device if one is given."""
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {args.device!r} is not available here; try --device cpu") from None
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device, args.model)
    folder = args.model or EMBEDDED
    model = Transformer.from_pretrained(folder, onto or device, dtype)
    return model, data.Tokenizer(resolve(folder))


def run(main):
    """Call main(); bad input ends in one line on stderr and exit code 2, an interrupt in exit code 130."""
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print("interrupted" + f"; {e}" * bool(e.args), file=sys.stderr)
        sys.exit(130)


def attach(model, method, density, adapter, default_density):
    """Set the model up for one answer, with the adapter's method and density where none is asked for."""
    caprese.detach(model)
    if method or (density and not adapter):
        caprese.attach(model, method or "griffin", density or default_density)
    if adapter:
        caprese.load_adapter(model, adapter, density)


def describe(model):
    """One line on what is attached."""
    layers = caprese.sparse_layers(model)
    if not layers:
        return "full model"
    ff = next(iter(layers.values()))
    return f"{ff.method}, {ff.density:.0%} of the neurons in {len(layers)} of {len(model.layers)} layers" + (
        f", L and R of rank {ff.rank}" if ff.rank else "")


def answer(model, tokenizer, question, args, out):
    """Stream one answer to `out`; returns its text, tokens and tokens per second (first token excluded)."""
    from tokenizers.decoders import DecodeStream
    prompt = torch.tensor([tokenizer.prompt_ids(question)], device=model.device)
    decoder, ids, times = DecodeStream(skip_special_tokens=True), [], []
    for token in stream(model, prompt, args.max_new_tokens, args.temperature, args.top_p, args.reselect,
                        tokenizer.stop_ids, generator=seeded(model, args)):
        ids.append(token.item())
        times.append(time.perf_counter())
        print(decoder.step(tokenizer.tokenizer, ids[-1]) or "", end="", file=out, flush=True)
    print(file=out)
    rate = (len(ids) - 1) / (times[-1] - times[0]) if len(ids) > 1 else 0.0
    return {"response": tokenizer.decode(ids), "tokens": len(ids), "tokens_per_second": round(rate, 1)}


def answer_often(model, tokenizer, question, args, out):
    """args.n samples of one prompt, decoded side by side on one selection; tokens per second of all together."""
    prompt, start = torch.tensor([tokenizer.prompt_ids(question)], device=model.device), time.perf_counter()
    new = generate(model, prompt, args.max_new_tokens, args.temperature, args.top_p, args.reselect, tokenizer.stop_ids,
                   samples=args.n, generator=seeded(model, args))
    seconds, samples = time.perf_counter() - start, []
    for i, ids in enumerate(new.tolist()):
        ids = data.until_stop(ids, tokenizer.stop_ids)
        samples.append({"response": tokenizer.decode(ids), "tokens": len(ids)})
        print(f"[{i + 1}] {samples[-1]['response']}", file=out)
    tokens = sum(s["tokens"] for s in samples)
    return {"samples": samples, "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}


def seeded(model, args):
    return torch.Generator(model.device).manual_seed(args.seed)


def arguments():
    parser = common_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("prompt", nargs="?", help="default: a hard problem for the embedded model, answered three ways")
    parser.add_argument("--method", choices=caprese.METHODS, help="sparse method (default: the adapter's, else none)")
    parser.add_argument("--density", type=float, help="share of neurons kept, in (0, 1] (default: the adapter's, else "
                        f"the paper's 0.5, for the embedded model {EMBEDDED_DENSITY})")
    parser.add_argument("--adapter", help="file written by distill.py")
    parser.add_argument("--reselect", type=int, help="rho: reselect every so many tokens (default: never)")
    parser.add_argument("-n", type=int, default=1, help="samples of the one prompt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    args = parser.parse_args()
    if args.density is not None and not 0 < args.density <= 1:
        raise ValueError(f"--density is {args.density}, but it must lie in (0, 1]")
    if args.prompt is None and args.model:
        raise ValueError("give a prompt: only the embedded model comes with a problem of its own")
    return args


def main():
    args = arguments()
    out = sys.stderr if args.json else sys.stdout
    model, tokenizer = load(args)
    if args.prompt is None:
        problem = data.problems("maths", 1, HARD_SEED, evaluation=True, steps=8)[0]
        question, method = data.ask(problem), args.method or "griffin"
        ways = {"full": (None, None, None), "sparse": (method, args.density, None),
                "sparse + Caprese": (method, args.density, args.adapter or EMBEDDED / f"{method}.safetensors")}
        print(f"A problem of 8 steps, held out from training, answered {len(ways)} ways on {args.device}; "
              f"the answer is {problem.answer}.\n{question}", file=out)
    else:
        problem, question = None, args.prompt
        way = (args.method, args.density, args.adapter)
        ways = {"sparse" if any(way) else "full": way}
        print(f"Answering with {args.model or 'the embedded model'} on {args.device}: "
              f"at most {args.max_new_tokens} tokens, temperature {args.temperature}.", file=out)
    rows = []
    for name, way in ways.items():
        attach(model, *way, default_density=0.5 if args.model else EMBEDDED_DENSITY)
        print(f"\n{name}: {describe(model)}", file=out)
        row = {"method": name} | (answer if args.n == 1 else answer_often)(model, tokenizer, question, args, out)
        if problem and args.n == 1:
            row["correct"] = data.correct(row["response"], problem.answer)
        verdict = {True: ", right", False: ", wrong"}.get(row.get("correct"), "")
        print(f"[{row['tokens']} tokens, {row['tokens_per_second']} tokens/s{verdict}]", file=out)
        rows.append(row)
    if args.json:
        print(json.dumps({"prompt": question, "rows": rows}))


if __name__ == "__main__":
    run(main)
