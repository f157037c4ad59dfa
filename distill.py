"""Learn L and R: python distill.py

Layer-wise first (every FF block on its own, inputs from the full model, equation (7); for real models block by block,
inputs from the blocks fitted before), then end-to-end (all blocks together, equation (8)). The base weights stay
frozen. Without arguments: the embedded model, and a table at the end.
On several devices: torchrun --nproc_per_node=N distill.py ... (--fsdp where one device cannot hold the base).
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import caprese
import data
import sample

# What a flag means where it is not given. The paper's recipe (section 4), ours for real models (RESULTS.md says what
# was measured), and what suits the embedded model.
PAPER = {"density": 0.5, "samples": 20000, "rank": 256, "layerwise": "adam", "rank_budget": False,
         "correction": "linear", "loss": "mse", "e2e_lr": 1e-4, "e2e_epochs": 3, "e2e_batch": 16, "recompute": True}
OURS = PAPER | {"layerwise": "sequential", "rank_budget": True, "loss": "kl"}
EMBEDDED = OURS | {"layerwise": "closed", "density": sample.EMBEDDED_DENSITY, "samples": 6000, "rank": 32,
                   "e2e_lr": 3e-3, "e2e_epochs": 1, "e2e_batch": 32, "recompute": False}
EVALUATION_SEED = 1234  # of the held-out problems
RESIDUAL_SAMPLES = 256  # training samples that the table's residual_left, the mean over the layers, is taken on
KL_CHUNK = 1024         # tokens whose logits are alive at once
WAITING = 1 << 20       # tokens whose states wait between two blocks, at most: for D = 4096 in bfloat16 17 GB


# ---- processes: with torchrun each holds the same L and R and takes its share of the rows of every batch

def world():
    """(rank, number) of this process; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(*tensors):
    """Sum each tensor over all processes, in place."""
    if world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def share(pairs, chunk, args, device):
    """This process's rows of a batch of sample indices, as Batches of at most args.rows; equally many everywhere."""
    rank, number = world()
    for at in range(0, len(chunk), args.rows * number):
        mine = chunk[at:at + args.rows * number][rank::number]
        yield data.collate(pairs, mine or chunk[:1], device, counted=bool(mine))


def start_processes(args):
    """Join the other processes of torchrun, if it started this one; each takes the device of its rank."""
    if "WORLD_SIZE" not in os.environ:
        if args.fsdp:
            raise ValueError("--fsdp is for several processes: torchrun --nproc_per_node=N distill.py --fsdp ...")
        return
    cuda = args.device.startswith("cuda")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    if world()[0]:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def shard(model, device):
    """Spread the weights of every block over the devices (FSDP), one block at a time; the rest is whole on each.

    What attach() adds later stays whole as well. Returns the share of the weights that this process holds.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    count = lambda: sum(getattr(p, "to_local", lambda: p)().numel() for p in model.parameters())
    total, mesh = count(), init_device_mesh(torch.device(device).type, (world()[1],))
    for block in model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for name in ("embed_tokens", "norm"):
        model.model[name].to(device)
    if hasattr(model, "lm_head"):
        model.lm_head.to(device)
    return count() / total


# ---- interruption: what must survive a kill

class Progress:
    """Where the work stands: the stage, its step, the stage's tensors and the rows of the table so far.

    Written to `file` every `every` steps, after a stage and when the process is told to stop; a resumed run goes on
    from there, on the CPU to bit-identical results. `settings` must be the same for both, or it is refused with a
    ValueError. Without a file nothing is written.
    """

    def __init__(self, file=None, every=100, settings=None, resume=False):
        self.file, self.every, self.settings, self.rows = file, every, settings, []
        self.stage, self.step, self.seconds, self.tensors, self.stop = None, 0, 0.0, {}, False
        if resume and not os.path.exists(file):
            raise FileNotFoundError(f"there is nothing to resume: {file} does not exist")
        if resume:
            self.tensors, about = caprese.load_tensors(file)
            differ = [k for k, v in settings.items() if (about or {}).get("settings", {}).get(k) != v]
            if differ:
                raise ValueError(f"{file} is of a run with another {', '.join(differ)}; resume with the same settings")
            self.stage, self.step, self.seconds, self.rows = (about[k] for k in ("stage", "step", "seconds", "rows"))
        elif file and os.path.exists(file):
            raise ValueError(f"{file} is left of an interrupted run; continue it with --resume, or delete it")

    def catch_signals(self):
        """SIGTERM and Ctrl-C end the run after the step at hand, with all saved; a second one ends it at once."""
        def ask_to_stop(number, frame):
            self.stop = True
            signal.signal(number, signal.default_int_handler)

        signal.signal(signal.SIGTERM, ask_to_stop)
        signal.signal(signal.SIGINT, ask_to_stop)

    @torch.no_grad()
    def steps(self, stage, total, tensors, sums=False, every=None):
        """Yield the steps of a stage that are left, after the saved state, if it is this stage's, went into `tensors`.

        tensors {name: tensor} are what the caller updates in place; sums: each process holds an addend of them. every:
        steps between checkpoints, where these steps are of another length than most.
        """
        self.first, before = (self.step, self.seconds) if self.stage == stage else (0, 0.0)
        if self.stage == stage:
            for name, tensor in tensors.items():
                tensor.copy_(self.tensors[name] if world()[0] == 0 or not sums else torch.zeros_like(tensor))
            torch.set_rng_state(self.tensors["rng"])  # no step draws from it; a fork's may
        start, self.stage, self.tensors = time.perf_counter() - before, stage, {}
        self.bar = tqdm(range(self.first, total), initial=self.first, total=total, desc=stage, disable=None)
        for step in self.bar:
            yield step
            self.step, self.seconds = step + 1, time.perf_counter() - start
            stop = torch.tensor(float(self.stop), device=next(iter(tensors.values())).device)
            add_up(stop)  # all processes stop if one is told to
            if self.file and (stop or self.step % (every or self.every) == 0 or self.step == total):
                if sums:
                    add_up(*tensors.values())
                self.save(tensors)
                if sums and world()[0]:
                    for tensor in tensors.values():
                        tensor.zero_()  # process 0 has all of it now
            if stop:
                raise KeyboardInterrupt(f"the state is in {self.file}, --resume continues")
        if sums:
            add_up(*tensors.values())

    def save(self, tensors):
        """Write the state; ValueError, with the last good one left alone, if it holds a number that is none."""
        if not all(t.isfinite().all() for t in tensors.values()):
            raise ValueError(f"{self.stage} diverged at step {self.step}; try a smaller learning rate")
        if world()[0] == 0:
            about = {k: getattr(self, k) for k in ("stage", "step", "seconds", "rows", "settings")}
            tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            caprese.save_tensors(tensors | {"rng": torch.get_rng_state()}, self.file, about)


# ---- layer-wise

@torch.no_grad()
def walk(model, batch, visit):
    """One pass of the ORIGINAL model over a batch; visit(ff, x, e) at each sparse layer in turn.

    x [B, T, D] are the layer's inputs, e [B, T, D] = FF(x) - FF_sparse(x). One layer's activations are alive at a
    time, and the pass ends after the last sparse layer.
    """
    def instead(ff):
        def forward(x, generated=None):
            full, e = ff.residual(x, batch.generated)
            visit(ff, x, e)
            return full
        return forward

    layers, all_layers = caprese.sparse_layers(model), model.model["layers"]
    try:
        for ff in layers.values():
            ff.forward = instead(ff)  # on the object, over the method of its class
        model.model["layers"] = all_layers[:max(layers) + 1]
        model.hidden(batch.tokens)
    finally:
        model.model["layers"] = all_layers
        for ff in layers.values():
            del ff.forward


@torch.no_grad()
def moments(model, pairs, args, progress=None):
    """{layer: (A, C, energy, m)}: sums of x^T x [D, D], x^T e [D, D], |e|^2 and x [D] over response tokens, float64."""
    layers = caprese.sparse_layers(model)
    sums = {ff: new_sums(model) for ff in layers.values()}
    chunks = data.chunks(pairs, args.rows * world()[1])
    named = {f"{i}.{name}": t for i, ff in layers.items() for name, t in zip("A C energy m".split(), sums[ff])}
    for step in (progress or Progress()).steps("layer-wise", len(chunks), named, sums=True):
        for batch in share(pairs, chunks[step], args, model.device):
            walk(model, batch, lambda ff, x, e: add_moments(sums[ff], x[batch.response], e[batch.response]))
    return {i: sums[ff] for i, ff in layers.items()}


def new_sums(model):
    """Zeros for x^T x [D, D], x^T e [D, D], |e|^2 and the sum of x [D], float64."""
    D = model.config.hidden_size
    return [torch.zeros(shape, dtype=torch.float64, device=model.device) for shape in ((D, D), (D, D), (), (D,))]


def add_moments(sums, x, e):
    """Add tokens x [N, D] and e [N, D] to new_sums()."""
    x, e = x.float(), e.float()
    for total, addend in zip(sums, (x.T @ x, x.T @ e, e.square().sum(), x.sum(0))):
        total += addend


def closed_form(A, C, rank, eps=1e-6):
    """The minimiser of (7): reduced-rank regression of e on x from their moments A and C, both [D, D].

    B = (A + eps I)^-1 C is the full-rank solution. Among all rank-r maps the best is B V V^T, where V are the top-r
    eigenvectors of B^T A B, the covariance of what B predicts. Returns L = B V [D, r], R = V^T [r, D], and all
    eigenvalues, largest first: each says how much residual energy one more rank takes away.
    """
    B = torch.linalg.solve(A + ridge(A, eps), C)
    values, V = torch.linalg.eigh(B.T @ A @ B)
    V = V[:, -rank:].flip(1)
    return B @ V, V.T, values.flip(0)


def ridge(A, eps=1e-6):
    """eps I of the closed form, in units of A's mean diagonal: it decides where the data say nothing."""
    return eps * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)


def open_gate(A, m, act):
    """The direction g [D] with x g as close as can be to the constant c at which act(c) = 1, from sums A and m.

    So gated neurons start as the linear ones of (9), "gate one". It works well because normalised inputs share a
    direction: in the embedded model x g strays from c by 1 to 5% of its energy.
    """
    c = torch.linspace(0, 3, 30001, dtype=A.dtype, device=A.device)
    c = c[(act(c) - 1).abs().argmin()]
    return c * torch.linalg.solve(A + ridge(A), m)


def split_ranks(gains, total):
    """{layer: rank}: a budget of `total` ranks, each given where its gain {layer: [D], largest first} is largest."""
    least = torch.cat(list(gains.values())).sort(descending=True).values[total - 1]
    return {i: int((values >= least).sum()) for i, values in gains.items()}


def layerwise_closed(model, pairs, args, progress=None):
    """Layer-wise stage in one pass: every sparse layer gets the optimum of (7), of equal ranks or of a split budget."""
    layers = caprese.sparse_layers(model)
    sums = moments(model, pairs, args, progress)
    solved = {i: closed_form(A, C, len(A)) for i, (A, C, *_) in sums.items()}
    ranks = dict.fromkeys(layers, args.rank)
    if args.rank_budget:
        # by the share of its own layer's residual: by plain energy the late layers, where all is larger, take too much
        gains = {i: values / sums[i][2] for i, (_, _, values) in solved.items()}
        ranks = split_ranks(gains, args.rank * len(layers))
    for i, (L, R, _) in solved.items():  # in order of their eigenvalues
        adopt(layers[i], L[:, :ranks[i]], R[:ranks[i]], sums[i])


def adopt(ff, L, R, sums):
    """Make L [D, r] and R [r, D] the correction of ff; a gated one gets open gates, from the same sums."""
    ff.put(L=L, R=R)
    if ff.correction == "gated":
        ff.put(G=open_gate(sums[0], sums[3], ff.act)[:, None].repeat(1, L.shape[1]))


@torch.no_grad()
def layerwise_sequential(model, pairs, args, progress=None):
    """Layer-wise stage block by block (ours): each fit sees the inputs that the fits before it make, and its target is
    not its own residual alone, but what takes the block's output to the full model's. So it mends what those before
    it have left, too.

    One pass. Between blocks the states of both models wait in the host's memory, in bfloat16 4 D bytes a token; so
    where there are more tokens than WAITING, every n-th sample must do.
    """
    layers, fitted = caprese.sparse_layers(model), {}
    pairs = pairs[::-(-sum(len(prompt) + len(response) for prompt, response in pairs) // WAITING)]
    for i, ff in layers.items():
        ff.R.zero_()  # what is not fitted yet corrects nothing
        fitted |= {f"{i}.{name}": p for name, p in ff.learned().items()}
    batches = [batch for chunk in data.chunks(pairs, args.rows * world()[1])
               for batch in share(pairs, chunk, args, model.device)]
    full = [model.embed(batch.tokens).cpu() for batch in batches]  # the full model's states [B, T, D]
    sparse = list(full)
    at = 0  # the block that they have come to
    for step in (progress or Progress()).steps("layer-wise", max(layers) + 1, fitted, every=1):
        while at <= step:  # a resumed run first goes through the blocks that were fitted before
            if at == step and at in layers:
                sums = block_moments(model, at, batches, full, sparse)
                adopt(layers[at], *closed_form(*sums[:2], args.rank)[:2], sums)
                fitted |= {f"{at}.{name}": p for name, p in layers[at].learned().items()}
            for j, batch in enumerate(batches):  # one by one, so that old and new states are not all there at once
                full[j] = run_block(model, at, batch, full[j]).cpu()
                sparse[j] = run_block(model, at, batch, sparse[j], batch.generated).cpu()
            at += 1


def run_block(model, i, batch, x, generated=None):
    """Block i on its input states x [B, T, D], as Transformer.hidden runs it."""
    return model.layers[i](x.to(model.device), *model.context(batch.tokens)[i], None, generated)


def block_moments(model, i, batches, full, sparse):
    """(A, C, energy, m) as moments() has them, of the sparse model's inputs to FF i and what its output lacks.

    That is the difference of the blocks' outputs; where a norm stands between (Gemma 2), of the FFs' outputs.
    full and sparse are the block's input states in the two models, a list with one [B, T, D] for each batch.
    """
    ff, sums = model.layers[i].mlp, new_sums(model)
    for batch, x_full, x_sparse in zip(batches, full, sparse):
        calls = []
        hook = ff.register_forward_hook(lambda ff, given, output: calls.append((given[0], output)))
        try:
            e = run_block(model, i, batch, x_full) - run_block(model, i, batch, x_sparse, batch.generated)
        finally:
            hook.remove()
        (_, ff_full), (x, ff_sparse) = calls
        if model.config.post_norms:
            e = ff_full - ff_sparse
        add_moments(sums, x[batch.response], e[batch.response])
    add_up(*sums)
    return sums


def layerwise_loss(model, batch, tokens):
    """Equation (7), summed over the layers, which share no parameter: each trains as if alone. Runs backward.

    Like e2e_loss, returns this batch's part of the mean over `tokens` response tokens.
    """
    total = 0.0

    def visit(ff, x, e):
        nonlocal total
        with torch.enable_grad():
            loss = (e - ff.correct(x))[batch.response].float().square().sum() / tokens  # (7)
            loss.backward()
        total += loss.item()

    walk(model, batch, visit)
    return total


@torch.no_grad()
def residual_left(model, pairs, args):
    """{layer: share of the residual energy of (7) that the correction leaves} on samples; {} with nothing attached."""
    sums = {}

    def visit(ff, x, e):
        left = torch.stack([(e - ff.correct(x))[batch.response].float().square().sum(),
                            e[batch.response].float().square().sum()]).double()
        sums[ff] = sums.get(ff, 0) + left

    for batch in data.batches(pairs, args.rows, model.device) if caprese.sparse_layers(model) else ():
        walk(model, batch, visit)
    return {i: float(sums[ff][0] / sums[ff][1]) for i, ff in caprese.sparse_layers(model).items()}


# ---- end-to-end

def e2e_loss(model, batch, tokens, kind="mse"):
    """Equation (8): MSE between the final embeddings of the full and of the sparse model; or the KL divergence of
    their next-token distributions, in nats, which is ours. Runs backward."""
    here = batch.response
    with torch.no_grad():
        teacher = model.hidden(batch.tokens)[here]  # [N, D], the full model: the same weights
    student = model.hidden(batch.tokens, generated=batch.generated)[here]
    if kind == "mse":
        loss = (student - teacher).float().square().mean(-1).sum() / tokens  # (8)
    else:
        pieces = zip(student.split(KL_CHUNK), teacher.split(KL_CHUNK))
        loss = sum(checkpoint(divergence, model, s, t, use_reentrant=False) for s, t in pieces) / tokens
    loss.backward()
    return loss.item()


def divergence(model, student, teacher):
    """Sum over tokens of KL(full || sparse), from final embeddings [N, D] each."""
    full, sparse = (model.logits(h).float().log_softmax(-1) for h in (teacher, student))
    return F.kl_div(sparse, full, log_target=True, reduction="sum")


def train(model, pairs, loss_and_backward, lr, epochs, batch, args, stage, progress=None):
    """Adam on the correction with a linear schedule and 2% warm-up, as in the paper, for the given loss."""
    learned = {f"{i}.{name}": p for i, ff in caprese.sparse_layers(model).items() for name, p in ff.learned().items()}
    optimizer = torch.optim.Adam(learned.values(), lr=lr)
    state = dict(learned)
    for name, p in learned.items():  # made here, not at the first step, so that a resumed run can fill it
        moments_ = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = moments_
        state |= {f"{name}.{key}": value for key, value in moments_.items()}
    an_epoch = -(-len(pairs) // batch)
    total = epochs * an_epoch
    warm = max(1, round(0.02 * total))
    progress = progress or Progress()
    for step in progress.steps(stage, total, state):
        epoch, at = divmod(step, an_epoch)
        if at == 0 or step == progress.first:
            chunks = data.chunks(pairs, batch, seed=args.seed + epoch)
        chunk = chunks[at]
        tokens = sum(len(pairs[i][1]) for i in chunk)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm, (total - step) / (total - warm + 1))
        optimizer.zero_grad()
        loss = torch.tensor(sum(loss_and_backward(model, b, tokens) for b in share(pairs, chunk, args, model.device)))
        loss = loss.to(model.device)
        add_up(loss, *(p.grad for p in learned.values()))
        if not loss.isfinite():
            raise ValueError(f"the {stage} loss is {loss} at step {step}; try a smaller learning rate")
        optimizer.step()
        progress.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)


def layerwise(model, pairs, args, progress=None):
    """The layer-wise stage as args.layerwise says: the closed form of (7), block by block, or the paper's Adam."""
    if args.layerwise == "adam":
        train(model, pairs, layerwise_loss, args.layerwise_lr, args.layerwise_epochs, args.layerwise_batch, args,
              "layer-wise", progress)
    else:
        fit = {"closed": layerwise_closed, "sequential": layerwise_sequential}[args.layerwise]
        fit(model, pairs, args, progress)


def end_to_end(model, pairs, args, progress=None):
    """The end-to-end stage."""
    model.recompute = args.recompute
    train(model, pairs, partial(e2e_loss, kind=args.loss), args.e2e_lr, args.e2e_epochs, args.e2e_batch, args,
          "E2E", progress)
    model.recompute = False


# ---- the command

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
    def read(file, count):
        return data.encode_samples(data.read_samples(file, count, args.skip_bad), tokenizer, args.max_tokens)

    unseen = {Path(file).stem: read(file, args.eval_samples) for file in args.eval_data}

    def measure():
        return {f"{name} {key}": value for name, pairs in unseen.items()
                for key, value in sample.fidelity(model, pairs).items()}

    return [pair for file in args.data for pair in read(file, args.samples)], measure


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


def arguments(argv=None):
    """The command line, with the defaults of PAPER, OURS or EMBEDDED filled in."""
    default = lambda key: f"(default: {OURS[key]}; embedded model: {EMBEDDED[key]})"
    parser = sample.common_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    add = parser.add_argument
    add("--data", action="append", default=[], metavar="FILE",
        help="training samples, JSONL or JSON, local or hf://datasets/OWNER/NAME/FILE; may be repeated")
    add("--eval-data", action="append", default=[], metavar="FILE",
        help="unseen samples to measure the KL to the full model on; may be repeated")
    add("--samples", type=int, help=f"training samples of each file at most {default('samples')}")
    add("--eval-samples", type=int, default=500, help="evaluation samples at most (default: %(default)s)")
    add("--max-tokens", type=int, default=2048, help="drop longer samples (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave out lines that are no samples, and say which")
    add("--paper", action="store_true", help="the paper's choices wherever a flag is not given")
    add("--method", choices=caprese.METHODS, default="griffin")
    add("--density", type=float, help=f"share of neurons kept, in (0, 1] {default('density')}")
    add("--layers", default="paper", help="paper (griffin: the first half, others: all), all, or 0,1,2")
    add("--rank", type=int, help=f"r {default('rank')}")
    add("--rank-budget", action=argparse.BooleanOptionalAction, help="split r x layers by the eigenvalues of the "
        f"closed form, with --layerwise closed {default('rank_budget')}")
    add("--correction", choices=caprese.CORRECTIONS, help=default("correction"))
    add("--layerwise", choices=("closed", "sequential", "adam", "none"), help="closed form of (7), the same block by "
        f"block, or Adam {default('layerwise')}")
    add("--layerwise-lr", type=float, default=1e-3, help="of adam (default: %(default)s)")
    add("--layerwise-epochs", type=int, default=20, help="of adam (default: %(default)s)")
    add("--layerwise-batch", type=int, default=128, help="of adam (default: %(default)s)")
    add("--loss", choices=("mse", "kl"), help=f"end-to-end: on the final embedding, or the logits {default('loss')}")
    add("--e2e-lr", type=float, help=default("e2e_lr"))
    add("--e2e-epochs", type=int, help=f"0: no end-to-end stage {default('e2e_epochs')}")
    add("--e2e-batch", type=int, help=default("e2e_batch"))
    add("--rows", type=int, default=16, help="samples that pass through the model at once (default: %(default)s)")
    add("--recompute", action=argparse.BooleanOptionalAction, help="activation checkpointing, for memory "
        + default("recompute"))
    add("--fsdp", action="store_true", help="under torchrun: shard the base weights over the devices")
    add("--save-every", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint of an interrupted run, --out's name + .state")
    add("--out", default="adapter.safetensors", help="adapter file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    asked_for_budget = args.rank_budget
    for key, value in (EMBEDDED if not args.model else OURS).items():
        if args.paper and key in ("layerwise", "rank_budget", "correction", "loss"):
            value = PAPER[key]
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.layerwise in ("closed", "sequential") and args.correction == "lora":
        raise ValueError("LoRA has no closed form; with --correction lora give --layerwise adam or none")
    if args.fsdp and args.method == "int4":
        raise ValueError("int4 rounds whole weights; it does not run with --fsdp")
    if asked_for_budget and args.layerwise != "closed":
        raise ValueError("--rank-budget splits by the eigenvalues of the closed form; it needs --layerwise closed")
    if bool(args.model) != bool(args.data):
        raise ValueError("--model and --data go together: the samples that teach another model than the embedded one")
    for key in ("samples", "eval_samples", "rank", "e2e_batch", "layerwise_batch", "rows", "save_every"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} is {getattr(args, key)}, but must be at least 1")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"the folder of --out {args.out} does not exist")
    return args


def settings(args):
    """What a resumed run must share with the interrupted one: every flag that changes the result."""
    free = ("device", "json", "resume", "save_every", "fsdp", "recompute")
    return {k: v for k, v in vars(args).items() if k not in free}


def main():
    args = arguments()
    start_processes(args)
    torch.manual_seed(args.seed)
    out = sys.stderr if args.json else sys.stdout
    progress = Progress(f"{args.out}.state", args.save_every, settings(args), args.resume)
    progress.catch_signals()
    model, tokenizer = sample.load(args, "cpu" if args.fsdp else args.device)
    where = f"{world()[1]} x {args.device}"
    if args.fsdp:
        where += f", each with {shard(model, args.device):.0%} of the base weights"
    attach = lambda: caprese.attach(model, args.method, args.density, layer_list(args.layers, model), args.rank,
                                    args.correction)
    caprese.detach(attach())  # bad settings end here, before any work
    pairs, measure = (file_task if args.model else embedded_task)(model, tokenizer, args)
    print(f"Distilling {args.method} at density {args.density}, {args.correction} correction of rank {args.rank}, "
          f"into {args.model or 'the embedded model'} on {where}:\n{len(pairs)} samples, "
          f"layer-wise {args.layerwise}, end-to-end {args.e2e_epochs} epochs by {args.loss}.", file=out)
    rows = progress.rows

    def record(method, seconds=0.0):
        if method in [row["method"] for row in rows]:
            return
        left = residual_left(model, pairs[:RESIDUAL_SAMPLES], args).values()
        rows.append({"method": method, **measure(), "recovered": None, "residual_left": sum(left) / max(1, len(left)),
                     "seconds": seconds,
                     "added_parameters_percent": 100 * caprese.added_parameters(model) if len(rows) > 1 else 0.0})
        rows[-1]["recovered"] = recovered(rows)

    record("full")
    attach()
    record(args.method)
    stages = {"layer-wise": layerwise} if args.layerwise != "none" else {}
    stages |= {"E2E": end_to_end} if args.e2e_epochs else {}
    for name, fit in stages.items():
        if progress.stage == "E2E" and name == "layer-wise":
            for i, ff in caprese.sparse_layers(model).items():  # its result is in the checkpoint
                ff.put(**{key: progress.tensors[f"{i}.{key}"] for key in ff.learned()})
            continue
        fit(model, pairs, args, progress)
        record(f"+ {name}", progress.seconds)
    if world()[0] == 0:
        caprese.save_adapter(model, args.out)
        Path(progress.file).unlink(missing_ok=True)
    print(f"\n{table(rows)}\n\nwrote {args.out}; try: python sample.py --adapter {args.out}"
          + (f" --model {args.model} 'your question'" if args.model else ""), file=out)
    if args.json:
        print(json.dumps({"rows": rows, "adapter": args.out}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sample.run(main)
