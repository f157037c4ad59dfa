"""The full model's own answer, drafted by the sparse one: python -m beyond.lossless [prompt]

A reselection runs the full model over the last tokens once more (section 4.1.1). That one pass also
gives its probabilities of each of them. So it can verify them: drafted tokens stand as long as the
rule of speculative decoding accepts them (Leviathan et al., 2023), and the pass adds a token of its
own. At temperature 0 the answer is the full model's, token for token up to rounding. Above, it has
the same distribution. What L and R are worth is then how many drafted tokens stand.

--time SHAPE answers nothing. It measures what draft steps and passes take, on random weights.
"""

import json
import sys
from collections import Counter
from functools import partial

import torch
from torch.utils.benchmark import Timer

import bench
import caprese
import data
import sample

SURE = 0.9  # a draft ends where the sparse model's likeliest token has less probability than this
# With --time:
CONTEXT = 128                  # tokens of the prompt
PASSES = (2, 4, 8, 16)         # tokens of a pass
ACCEPTANCES = (0.8, 0.9, 1.0)  # probabilities that a drafted token stands


# ---- draft, verify

@torch.no_grad()
def stream(model, tokens, max_new_tokens, rho, temperature=0.0, top_p=1.0, stop_ids=(),
           generator=None, counts=None):
    """Yield the next tokens [1] int64 of the full model, most of them drafted by the sparse one.

    tokens are one prompt [1, S] int64. A pass of the full model takes rho tokens, or fewer where
    the draft was unsure of one. The answer ends with a token of stop_ids, or where the context is
    full. counts, a collections.Counter, counts passes, the tokens drafted and accepted, and the
    tokens that passes have yielded. Raises ValueError on settings out of range, on several rows, on
    a model without a sparse method, on a prompt that fills the context, and on logits that are not
    finite.
    """
    sample.check_decoding(max_new_tokens, temperature, top_p, rho)
    prompt_lengths = sample.check_context(model, tokens)
    if len(tokens) > 1:
        raise ValueError(f"there are {len(tokens)} prompts, but verified decoding takes one row")
    if not caprese.sparse_layers(model):
        raise ValueError("no sparse method is attached that could draft; see caprese.attach")
    counts = Counter() if counts is None else counts
    limit = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, limit - tokens.shape[1])
    cache, logits = sample.prefill(model, tokens, max_new_tokens, prompt_lengths)
    token = sample.choose(logits, temperature, top_p, generator)
    yield token
    missing = max_new_tokens - 1
    while missing > 0 and token.item() not in stop_ids:
        drafted, q = draft(model, token, cache, min(rho, missing) - 1, temperature, top_p, stop_ids,
                           generator)
        cache.advance(-len(drafted))
        logits, activations = run_full(model, torch.stack([token, *drafted], dim=1), cache)
        p = sample.distribution(logits, temperature, top_p)
        accepted, last = verify(p, q, drafted, generator)
        cache.advance(accepted - len(drafted))  # back to the last token that stands
        count_and_select(activations, accepted + 1)
        counts.update(passes=1, drafted=len(drafted), accepted=accepted)
        for token in [*drafted[:accepted], last]:
            yield token
            counts["tokens"] += 1
            if token.item() in stop_ids:
                return
        missing -= accepted + 1


def generate(*args, **settings):
    """All of stream() at once: new tokens [1, <= max_new_tokens] int64."""
    return torch.stack(list(stream(*args, **settings)), dim=1)


def draft(model, token, cache, most, temperature=0.0, top_p=1.0, stop_ids=(), generator=None):
    """Decode at most so many tokens after `token` [1] by the sparse model.

    Returns the tokens, each [1], and the probabilities [1, V] that each was drawn with.
    """
    drafted, q = [], []
    while len(drafted) < most and token.item() not in stop_ids:
        with caprese.phase(model, "decode"):
            logits = model.decode(token, cache)
        q.append(sample.distribution(logits, temperature, top_p))
        token = sample.draw(q[-1], generator)
        drafted.append(token)
        if logits.softmax(dim=-1).amax() < SURE:
            break
    return drafted, q


def verify(p, q, drafted, generator=None):
    """How many of the n - 1 drafted tokens [1] stand, and the token [1] after them.

    p [n, V] are the full model's probabilities, q the draft's, [1, V] for each token. Token i
    stands with probability min(1, p_i / q_i). In place of the first that does not, one is drawn
    from (p - q)+. If all stand, the last row of p gives one more (Leviathan et al., 2023).
    """
    for i, token in enumerate(drafted):
        ratio = p[i, token] / q[i][0, token]
        if torch.rand(1, device=p.device, generator=generator) >= ratio:
            excess = (p[i:i + 1] - q[i]).clamp_min(0)
            if not excess.any():  # p and q differ by rounding alone
                excess = p[i:i + 1]
            return i, sample.draw(excess, generator)
    return len(drafted), sample.draw(p[-1:], generator)


# ---- only tokens that stand are counted, and which do is known after the pass

def run_full(model, tokens, cache):
    """Run tokens [1, n] through the full model, and count nothing.

    Returns the logits [n, V], and {ff: [x, act(x Wg), Z]} of each sparse layer, noted by hooks: to
    compute them anew for the tokens that stand would read Wg and W1 a second time.
    """
    activations, hooks = {}, []
    for ff in caprese.sparse_layers(model).values():
        hooks.append(ff.gate_proj.register_forward_hook(partial(keep_gate, activations, ff)))
        hooks.append(ff.down_proj.register_forward_pre_hook(partial(keep_z, activations, ff)))
    try:
        hidden_states = model.model(tokens, cache)
    finally:
        for hook in hooks:
            hook.remove()
    return model.logits(hidden_states[0]), activations


def keep_gate(activations, ff, gate_proj, inputs, output):
    """A forward hook of gate_proj."""
    activations[ff] = [inputs[0], ff.act_fn(output)]


def keep_z(activations, ff, down_proj, inputs):
    """A forward pre-hook of down_proj."""
    activations[ff].append(inputs[0])


def count_and_select(activations, standing):
    """Count the first `standing` tokens of a pass in each sparse layer, and select anew."""
    for ff, tensors in activations.items():
        x, gate, z = (tensor[:, :standing] for tensor in tensors)
        ff.count(x, gate, z, None)
        ff.select()


def ratios(model, counts):
    """What stream() counted, as ratios; {} if there was no pass.

    bytes_to_full are those of the weights that a token reads, the full model's being 1. A pass and
    a draft step read each of theirs once.
    """
    if not counts["passes"]:
        return {}
    full, sparse = bench.weights_read(model)
    drafts = counts["drafted"] * sparse / full
    return {"acceptance": round(counts["accepted"] / max(1, counts["drafted"]), 3),
            "tokens_per_pass": round(counts["tokens"] / counts["passes"], 2),
            "bytes_to_full": round((counts["passes"] + drafts) / counts["tokens"], 3)}


# ---- python -m beyond.lossless

def print_answer(args, out):
    """Answer the prompt; returns what --json prints."""
    model, tokenizer = sample.load(args)
    print(f"Answering as {args.model or 'the bundled model'} does on {args.device}: at most "
          f"{args.max_new_tokens} tokens, temperature {args.temperature}.", file=out)
    question, gold = (args.prompt, None) if args.model else sample.bundled_question(args, out)
    if args.adapter:
        caprese.load_adapter(model, args.adapter, args.density, args.method)
    else:
        caprese.attach(model, args.method or "griffin", args.density or 0.5)
    print(f"\nDrafted by: {sample.describe(model)}", file=out)
    prompt = torch.tensor([tokenizer.prompt_ids(question)], dtype=torch.long, device=model.device)
    generator, counts = torch.Generator(model.device).manual_seed(args.seed), Counter()
    steps = stream(model, prompt, args.max_new_tokens, args.reselect, args.temperature, args.top_p,
                   tokenizer.stop_ids, generator, counts)
    ids = [token.item() for token in sample.print_steps(steps, tokenizer, out, reference=())]
    response = tokenizer.decode(ids)
    row = {"tokens": len(ids)} | ratios(model, counts)
    if gold:
        row["correct"] = data.correct(response, gold)
    print(f"\n{sample.format_table([row])}", file=out)
    return {"prompt": question, "response": response} | row


def print_times(args, out):
    """Print a table of times for a shape of bench.py; returns what --json prints.

    A method is attached in the paper's layers, then in all. If each drafted token stands with
    probability a, a pass over n tokens yields 1 + a + ... + a^(n-1) tokens.
    """
    sample.check_device(args.device)
    args.shape, args.config = args.time, bench.SHAPES[args.time]
    print(f"Timing {args.time}, random weights, on {args.device} with {torch.get_num_threads()} "
          f"CPU threads: a prompt of {CONTEXT} tokens.\n", file=out)
    model = bench.make_model(args)
    shape = (1, CONTEXT + max(PASSES))
    tokens = torch.randint(model.config.vocab_size, shape, device=model.device)
    full, rows = time_parts(model, tokens)[0], []
    for layers in (None, "all"):
        caprese.attach(model, args.method or "griffin", args.density or 0.5, layers,
                       rank=min(256, model.config.hidden_size // 8))
        step, passes = time_parts(model, tokens)
        for n, one_pass in zip(PASSES, passes):
            row = {"layers": len(caprese.sparse_layers(model)), "n": n, "ms per draft step": step,
                   "ms per pass": one_pass}
            for a in ACCEPTANCES:
                yielded = sum(a ** i for i in range(n))
                row[f"ms per token at {a:.0%}"] = (one_pass + (n - 1) * step) / yielded
            rows.append(row | {"full ms per token": full})
    print(sample.format_table(rows), file=out)
    return {"dtype": str(model.dtype).removeprefix("torch."), "rows": rows}


def time_parts(model, tokens):
    """Milliseconds of a step that drafts, and of a pass for each of PASSES, after CONTEXT tokens.

    A pass includes its selection.
    """
    prompt_lengths = torch.tensor([CONTEXT], device=model.device)
    cache, _ = sample.prefill(model, tokens[:, :CONTEXT], max(PASSES), prompt_lengths)

    def draft_one():
        draft(model, tokens[:, CONTEXT], cache, most=1)
        cache.advance(-1)

    def run_pass(n):
        logits, activations = run_full(model, tokens[:, CONTEXT:CONTEXT + n], cache)
        sample.distribution(logits)
        cache.advance(-n)
        count_and_select(activations, n)
    return median_ms(draft_one), [median_ms(partial(run_pass, n)) for n in PASSES]


def median_ms(operation):
    """The median of the milliseconds that operation() takes; on a GPU until it is done there."""
    timer = Timer("operation()", globals={"operation": operation},
                  num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=0.5).median


def arguments(argv=None):
    """The command line; ValueError for flags that do not go together."""
    parser = sample.ArgumentParser(prog="python -m beyond.lossless",
                                   description=__doc__.splitlines()[0])
    sample.method_arguments(sample.common_arguments(parser))
    add = parser.add_argument
    add("prompt", nargs="?", help="default: a hard problem for the bundled model")
    add("--reselect", type=sample.positive, help="rho: at most so many tokens a pass")
    add("--adapter", help="what drafts (default for the bundled model, without --method, --block "
        "and --density: its GRIFFIN adapter)")
    add("--density", type=float, help="kept neurons, in (0, 1] (default: the adapter's, or 0.5)")
    add("--temperature", type=float, default=0.0, help="default: %(default)s")
    add("--top-p", type=float, default=1.0, help="default: %(default)s")
    add("--max-new-tokens", type=sample.positive, default=512, help="default: %(default)s")
    add("--plain", action="store_true", help="ask the bundled model without its instruction")
    add("--graphs", action="store_true", help="on a GPU: a draft step is one CUDA graph")
    add("--time", metavar="SHAPE", choices=bench.SHAPES, help="print times for a shape of bench.py")
    args = parser.parse_args(argv)
    drafts = args.adapter or args.method or args.density
    if args.density is not None and not 0 < args.density <= 1:
        raise ValueError(f"--density is {args.density}, but it must lie in (0, 1]")
    if args.time:
        if args.prompt or args.model or args.adapter or args.reselect:
            raise ValueError("--time has random weights: no prompt, --model, --adapter, --reselect")
        return args
    if not args.reselect:
        raise ValueError("give --reselect N, the tokens of a pass")
    if args.model and not (args.prompt and drafts):
        raise ValueError("--model needs a prompt, and for the drafts --adapter, --method or "
                         "--density")
    if not drafts:
        args.adapter = sample.BUNDLED / "griffin.safetensors"
    if args.adapter:
        caprese.read_adapter(args.adapter)  # a missing one is noticed before the model loads
    sample.check_decoding(args.max_new_tokens, args.temperature, args.top_p)
    return args


def main():
    args = arguments()
    out = sys.stderr if args.json else sys.stdout
    result = print_times(args, out) if args.time else print_answer(args, out)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sample.run_command(main)
