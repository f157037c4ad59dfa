"""Learn L and R: python distill.py

Layer-wise first (every FF block on its own, inputs from the full model, equation (7)), then end-to-end (all blocks
together, equation (8)). The base weights stay frozen. Without arguments: the embedded model, and a table at the end.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import caprese
import data
import sample

# What a flag means where it is not given: the paper's settings (section 4), and what suits the embedded model.
PAPER = {"density": 0.5, "samples": 20000, "rank": 256, "e2e_lr": 1e-4, "e2e_epochs": 3, "e2e_batch": 16}
EMBEDDED = {"density": sample.EMBEDDED_DENSITY, "samples": 6000, "rank": 32, "e2e_lr": 3e-3, "e2e_epochs": 1,
            "e2e_batch": 32}
CLOSED_BATCH = 64       # rows a pass of the closed form takes at once; the result does not depend on it
EVALUATION_SEED = 1234  # of the held-out problems


def walk(model, batch, visit):
    """One pass of the ORIGINAL model over a batch; visit(ff, x, e) at each sparse layer in turn.

    x [N, D] are the layer's inputs at the N response tokens, e [N, D] = FF(x) - FF_sparse(x) there. One layer's
    activations are alive at a time.
    """
    here = batch.response

    def hook(ff, inputs):
        x = inputs[0]
        visit(ff, x[here], ff.residual(x, batch.generated)[here])

    handles = [ff.register_forward_pre_hook(hook) for ff in caprese.sparse_layers(model).values()]
    try:
        with torch.no_grad():
            model.hidden(batch.tokens)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def moments(model, batches):
    """{layer: (A, C, energy)}: sums of x^T x [D, D], x^T e [D, D] and |e|^2 over all response tokens, float64."""
    sums = {}

    def visit(ff, x, e):
        x, e = x.double(), e.double()
        new = (x.T @ x, x.T @ e, e.square().sum())
        sums[ff] = tuple(a + b for a, b in zip(sums[ff], new)) if ff in sums else new

    for batch in batches:
        walk(model, batch, visit)
    return {i: sums[ff] for i, ff in caprese.sparse_layers(model).items()}


def closed_form(A, C, rank, eps=1e-6):
    """The minimiser of (7): reduced-rank regression of e on x from their moments A and C, both [D, D].

    B = (A + eps I)^-1 C is the full-rank solution. Among all rank-r maps the best is B V V^T, where V are the top-r
    eigenvectors of B^T A B, the covariance of what B predicts. Returns L = B V [D, r], R = V^T [r, D], and all
    eigenvalues, largest first: each says how much residual energy one more rank takes away.
    """
    ridge = eps * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)
    B = torch.linalg.solve(A + ridge, C)
    values, V = torch.linalg.eigh(B.T @ A @ B)
    V = V[:, -rank:].flip(1)
    return B @ V, V.T, values.flip(0)


def layerwise_closed(model, pairs, args):
    """Layer-wise stage in one pass: every sparse layer gets the optimum of (7)."""
    bar = tqdm(data.batches(pairs, CLOSED_BATCH, model.device), total=-(-len(pairs) // CLOSED_BATCH), desc="layer-wise",
               disable=None)
    for (A, C, _), ff in zip(moments(model, bar).values(), caprese.sparse_layers(model).values()):
        L, R, _ = closed_form(A, C, ff.rank)
        ff.L.data.copy_(L)
        ff.R.data.copy_(R)


def train(model, pairs, loss_and_backward, lr, epochs, batch, seed, desc):
    """Adam on L and R with a linear schedule and 2% warm-up, as in the paper, for the given loss."""
    parameters = [p for ff in caprese.sparse_layers(model).values() for p in (ff.L, ff.R)]
    total = epochs * -(-len(pairs) // batch)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    warm = max(1, round(0.02 * total))
    shape = lambda i: min((i + 1) / warm, (total - i) / (total - warm + 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    bar = tqdm(total=total, desc=desc, disable=None)
    for epoch in range(epochs):
        for b in data.batches(pairs, batch, model.device, seed=seed + epoch):
            optimizer.zero_grad()
            loss = loss_and_backward(model, b)
            if not math.isfinite(loss):
                raise ValueError(f"the {desc} loss is {loss}; nothing was written, try a smaller learning rate")
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
    bar.close()


def layerwise_loss(model, batch):
    """Equation (7), summed over the layers, which share no parameter: each trains as if alone. Runs backward."""
    total = 0.0

    def visit(ff, x, e):
        nonlocal total
        with torch.enable_grad():
            loss = (e - ff.correct(x)).square().sum(-1).mean()  # (7)
            loss.backward()
        total += loss.item()

    walk(model, batch, visit)
    return total


def e2e_loss(model, batch):
    """Equation (8): MSE between the final embeddings of the full and of the sparse model. Runs backward."""
    here = batch.response
    with torch.no_grad():
        teacher = model.hidden(batch.tokens)[here]  # [N, D], the full model: the same weights
    student = model.hidden(batch.tokens, generated=batch.generated)[here]
    loss = (student - teacher).square().mean()  # (8)
    loss.backward()
    return loss.item()


def layerwise_sgd(model, pairs, args):
    """The paper's own layer-wise recipe: Adam 1e-3, batch 128, 20 epochs, linear schedule."""
    train(model, pairs, layerwise_loss, args.layerwise_lr, args.layerwise_epochs,
          args.layerwise_batch, args.seed, "layer-wise")


@torch.no_grad()
def residual_left(model, pairs, size=64):
    """{layer: share of the residual energy that x L R leaves} on samples, for any L and R."""
    sums = {}

    def visit(ff, x, e):
        new = torch.stack([(e - ff.correct(x)).square().sum(), e.square().sum()]).double()
        sums[ff] = sums.get(ff, 0) + new

    for batch in data.batches(pairs, size, model.device):
        walk(model, batch, visit)
    return {i: float(sums[ff][0] / sums[ff][1]) for i, ff in caprese.sparse_layers(model).items()}


@torch.no_grad()
def respond_twice(model, batch):
    """Final embeddings [B, R, D] of the responses by the full and by the sparse model, after one shared prefill."""
    responses, _ = batch.responses()
    longest = int(batch.prompt_lengths.max())
    cache = model.new_cache(len(responses), longest + responses.shape[1])
    caprese.reset(model)
    model.hidden(batch.tokens[:, :longest], cache, batch.generated[:, :longest])
    cache.set_lengths(batch.prompt_lengths)
    caprese.select(model)
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


def embedded_task(model, tokenizer, args):
    """Training pairs for the embedded model, and a function that measures it on held-out problems."""
    share = args.samples // 8  # some reading, so that the correction learns to leave it alone
    samples = data.problems("maths", args.samples - share, args.seed) + data.problems("reading", share, args.seed)
    held_out = [data.problems("maths", args.eval_samples, EVALUATION_SEED, evaluation=True),
                data.problems("reading", -(-args.eval_samples // 2), EVALUATION_SEED, evaluation=True, distinct=True)]

    def measure():
        (maths, tokens), (reading, _) = (sample.evaluate(model, tokenizer, p, max_new_tokens=128) for p in held_out)
        return {"math_accuracy": maths, "reading_accuracy": reading, "mean_response_tokens": tokens}

    return data.encode_samples(samples, tokenizer), measure


def file_task(model, tokenizer, args):
    """Training pairs from --data, and a function that measures the KL to the full model on each --eval-data."""
    read = lambda file, count: data.encode_samples(data.read_samples(file, count), tokenizer, args.max_tokens)
    unseen = {Path(file).stem: read(file, args.eval_samples) for file in args.eval_data}

    def measure():
        return {f"{name} {key}": value for name, pairs in unseen.items()
                for key, value in fidelity(model, pairs).items()}

    return read(args.data, args.samples), measure


def recovered(rows):
    """Share of what the sparse method lost that the last row has back: 1.0 is all, None if nothing was lost.

    Of the maths accuracy, or else of the KL (whose value for the full model is 0) on the first evaluation file.
    """
    key = next((k for k in rows[0] if k == "math_accuracy" or k.endswith(" kl")), None)
    if key is None or len(rows) < 3 or rows[0][key] == rows[1][key]:
        return None
    return (rows[-1][key] - rows[1][key]) / (rows[0][key] - rows[1][key])


def table(rows):
    """Rows of equal keys as aligned text."""
    show = lambda v: "-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v)
    cells = [list(rows[0])] + [[show(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.rjust(w) if j else c.ljust(w) for j, (c, w) in enumerate(zip(line, widths)))
                     for line in cells)


def layer_list(text, model):
    """--layers as indices, or None for the paper's choice."""
    if text in ("paper", "all"):
        return None if text == "paper" else range(len(model.layers))
    try:
        return [int(i) for i in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers is {text!r}; give paper, all, or indices such as 0,1,2") from None


def arguments():
    """The command line, with the defaults of PAPER or EMBEDDED filled in."""
    default = lambda key: f"(default: {PAPER[key]}; embedded model: {EMBEDDED[key]})"
    parser = sample.common_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--data", help="JSONL of training samples (default: the embedded model's own problems)")
    parser.add_argument("--eval-data", action="append", default=[], metavar="JSONL",
                        help="unseen samples to measure the KL to the full model on; may be repeated")
    parser.add_argument("--samples", type=int, help=f"training samples at most {default('samples')}")
    parser.add_argument("--eval-samples", type=int, default=500,
                        help="evaluation samples at most (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=2048, help="drop longer samples (default: %(default)s)")
    parser.add_argument("--method", choices=caprese.METHODS, default="griffin")
    parser.add_argument("--density", type=float, help=f"share of neurons kept, in (0, 1] {default('density')}")
    parser.add_argument("--layers", default="paper", help="paper (griffin: the first half, others: all), all, or 0,1,2")
    parser.add_argument("--rank", type=int, help=f"r {default('rank')}")
    parser.add_argument("--layerwise", choices=("closed", "sgd", "none"), default="closed",
                        help="closed form of (7), the paper's Adam, or nothing (default: %(default)s)")
    parser.add_argument("--layerwise-lr", type=float, default=1e-3, help="of sgd (default: %(default)s)")
    parser.add_argument("--layerwise-epochs", type=int, default=20, help="of sgd (default: %(default)s)")
    parser.add_argument("--layerwise-batch", type=int, default=128, help="of sgd (default: %(default)s)")
    parser.add_argument("--e2e-lr", type=float, help=default("e2e_lr"))
    parser.add_argument("--e2e-epochs", type=int, help=f"0: no end-to-end stage {default('e2e_epochs')}")
    parser.add_argument("--e2e-batch", type=int, help=default("e2e_batch"))
    parser.add_argument("--out", default="adapter.safetensors", help="adapter file to write (default: %(default)s)")
    args = parser.parse_args()
    for key, value in (PAPER if args.model else EMBEDDED).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if bool(args.model) != bool(args.data):
        raise ValueError("--model and --data go together: the samples that teach another model than the embedded one")
    for key in ("samples", "eval_samples", "rank", "e2e_batch", "layerwise_batch"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} is {getattr(args, key)}, but must be at least 1")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"the folder of --out {args.out} does not exist")
    return args


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    out = sys.stderr if args.json else sys.stdout
    model, tokenizer = sample.load(args)
    attach = lambda: caprese.attach(model, args.method, args.density, layer_list(args.layers, model), args.rank)
    caprese.detach(attach())  # bad settings end here, before any work
    pairs, measure = (file_task if args.model else embedded_task)(model, tokenizer, args)
    rows = []

    def record(method, seconds=0.0):
        rows.append({"method": method, **measure(), "recovered": None, "seconds": seconds,
                     "added_parameters_percent": 100 * caprese.added_parameters(model) if len(rows) > 1 else 0.0})
        rows[-1]["recovered"] = recovered(rows)

    def stage(method, fit):
        start = time.perf_counter()
        fit()
        record(method, time.perf_counter() - start)

    print(f"Distilling {args.method} at density {args.density}, rank {args.rank}, "
          f"into {args.model or 'the embedded model'} on {args.device}:\n"
          f"{len(pairs)} samples, layer-wise {args.layerwise}, end-to-end epochs {args.e2e_epochs}.", file=out)
    record("full")
    attach()
    record(args.method)
    if args.layerwise != "none":
        fit = layerwise_closed if args.layerwise == "closed" else layerwise_sgd
        stage("+ layer-wise", lambda: fit(model, pairs, args))
    if args.e2e_epochs:
        stage("+ E2E", lambda: train(model, pairs, e2e_loss, args.e2e_lr, args.e2e_epochs, args.e2e_batch, args.seed,
                                     "end-to-end"))
    caprese.save_adapter(model, args.out)
    print(f"\n{table(rows)}\n\nwrote {args.out}; try: python sample.py --adapter {args.out}"
          + (f" --model {args.model} 'your question'" if args.model else ""), file=out)
    if args.json:
        print(json.dumps({"rows": rows, "adapter": args.out}))


if __name__ == "__main__":
    sample.run(main)
