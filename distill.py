"""Learn L and R: python distill.py

Layer-wise first, equation (7): in closed form, each FF block on the inputs that the fits before it
make. Then end-to-end, equation (8): all blocks together. The base weights stay frozen. Without
arguments: the bundled model, and a table.
On several devices: torchrun --nproc_per_node=N distill.py ...; with --fsdp where one device cannot
hold the base weights.
"""

import argparse
import json
import math
import os
import shlex
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
from model import resolve

# What a flag means where it is not given: the paper's recipe (section 4), ours for real models
# (RESULTS.md says what was measured), and what suits the bundled model.
PAPER = {"samples": 20000, "rank": 256, "layerwise": "adam", "loss": "mse", "e2e_lr": 1e-4,
         "e2e_epochs": 3, "e2e_batch_size": 16}
DEFAULTS = PAPER | {"layerwise": "sequential", "loss": "kl", "gradient_checkpointing": True}
BUNDLED = DEFAULTS | {"samples": 6000, "rank": 40, "e2e_lr": 3e-3, "e2e_epochs": 1,
                      "e2e_batch_size": 32, "gradient_checkpointing": False}
ADAM = {"lr": 1e-3, "epochs": 20, "batch_size": 128}  # the paper's layer-wise stage
EVALUATION_SEED = 1234       # of the held-out problems
UNEXPLAINED_SAMPLES = 256    # training samples that the table's column is measured on
LOGIT_CHUNK = 1024           # tokens whose logits are in memory at once
MAX_WAITING_TOKENS = 1 << 20  # whose states wait between two blocks: 17 GB at D = 4096, bfloat16


# ---- processes: under torchrun each holds the same L and R and takes its part of every batch

def process_group():
    """(rank, world_size) of this process; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(*tensors):
    """Sum each tensor over all processes, in place."""
    if process_group()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def micro_batches(samples, indices, args, device):
    """This process's part of a batch of sample indices, as Batches; equally many on every rank.

    A rank without samples of its own gets one whose response does not count.
    """
    rank, world_size = process_group()
    size = args.micro_batch * world_size
    for start in range(0, len(indices), size):
        own = indices[start:start + size][rank::world_size]
        yield data.collate(samples, own or indices[:1], device, counted=bool(own))


def shard(model, device):
    """Spread the weights of every layer over the devices (FSDP); the rest is whole on each.

    Returns the fraction of the layers' weights that this process holds.
    """
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(torch.device(device).type, (process_group()[1],))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    model.to(device)  # what is not sharded
    weights = list(model.model.layers.parameters())
    return sum(p.to_local().numel() for p in weights) / sum(p.numel() for p in weights)


# ---- interruption: what must survive a kill

class Progress:
    """Where the work stands: `state` holds stage, step, seconds, the table and the settings.

    It is written to `file`, together with the stage's tensors, at the start of a stage and every so
    many steps. A resumed run continues from there, on a CPU to the same bits. Without a file
    nothing is written. Raises ValueError for a file that does not fit.
    """

    def __init__(self, file=None, settings=None, resume=False):
        self.file, self.tensors = file, {}
        self.first, self.bar = 0, None  # of steps(): the step that it began with, its tqdm bar
        self.state = {"stage": None, "step": 0, "seconds": 0.0, "rows": [], "settings": settings}
        exists = bool(file) and os.path.exists(file)
        if resume != exists:
            wrong = "exists; add --resume or delete it" if exists else "is gone: nothing to resume"
            raise ValueError(f"{file}, which an interrupted run leaves, {wrong}")
        if resume:
            self.tensors, self.state = caprese.load_tensors(file)
            saved = (self.state or {}).get("settings", {})
            differ = [key for key, value in settings.items() if saved.get(key) != value]
            if differ:
                raise ValueError(f"{file} is of a run with another {', '.join(differ)}")

    @torch.no_grad()
    def steps(self, stage, total, tensors, save_every=1):
        """Yield the remaining steps of a stage, once a saved state of it is back in `tensors`.

        tensors {name: tensor} are what the caller updates in place. The caller's grad mode holds
        between the steps.
        """
        if self.state["stage"] == stage:
            for name, tensor in tensors.items():
                tensor.copy_(self.tensors.pop(name))
        else:
            self.state |= {"stage": stage, "step": 0, "seconds": 0.0}
        self.save(tensors)
        self.first, start = self.state["step"], time.perf_counter() - self.state["seconds"]
        self.bar = tqdm(range(self.first, total), stage, total, initial=self.first, disable=None)
        for step in self.bar:
            yield step
            self.state |= {"step": step + 1, "seconds": time.perf_counter() - start}
            if (step + 1) % save_every == 0 or step + 1 == total:
                self.save(tensors)

    def save(self, tensors):
        """Write the state. ValueError, and the last good one is kept, if a value is not finite."""
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{self.state['stage']} diverged; lower the learning rate")
        if self.file and process_group()[0] == 0:
            caprese.save_tensors(tensors, self.file, self.state)


# ---- layer-wise, streaming: inputs from the full model, one pass for all blocks

@torch.no_grad()
def run_layer(model, i, batch, x, phase="full", with_residual=False):
    """Layer i on its input states x in a phase of the model.

    Returns its output, and of its FF the input, the residual FF(x) - FF_sparse(x) if that is asked
    for, else None, and the output, all [B, T, D].
    """
    seen = []

    def hook(ff, inputs, output):  # within the layer's call: there FSDP has its weights together
        residual = ff.residual(inputs[0], batch.generated) if with_residual else None
        seen.extend([inputs[0], residual, output])

    layer, inputs = model.model.layers[i], model.model.layer_inputs(batch.tokens)[i]
    with layer.mlp.register_forward_hook(hook), caprese.phase(model, phase, batch.generated):
        output = layer(x.to(model.device), *inputs)
    return output, *seen


@torch.no_grad()
def stream_residuals(model, batch):
    """One pass of the full model; yields (ff, x, residual, output) at each sparse layer in turn.

    x are the inputs of the FF, residual is FF(x) - FF_sparse(x), output is FF(x), each [N, D] over
    the response tokens. Nothing is kept, and the pass ends after the last sparse layer.
    """
    layers = caprese.sparse_layers(model)
    states = model.model.embed(batch.tokens)
    for i in range(max(layers, default=-1) + 1):
        states, *seen = run_layer(model, i, batch, states, "full", i in layers)
        if i in layers:
            yield layers[i], *[t[batch.response] for t in seen]


def new_moments(model):
    """Zeros for A = sum x^T x and C = sum x^T e, both [D, D] in float64."""
    D = model.config.hidden_size
    return torch.zeros(2, D, D, dtype=torch.float64, device=model.device).unbind()


def add_moments(A, C, x, e):
    """Add the tokens x [N, D] and e [N, D] to A and C."""
    x, e = x.float(), e.float()
    A += x.T @ x
    C += x.T @ e


def closed_form(A, C, rank, eps=1e-6):
    """The minimiser of (7): reduced-rank regression of e on x from their moments A and C [D, D].

    B = (A + eps I)^-1 C is the full-rank solution, eps in units of A's mean diagonal. Among all
    maps of rank r the best is B V V^T, where V are the top r eigenvectors of B^T A B, the
    covariance of what B predicts. Returns L = B V [D, r] and R = V^T [r, D], best directions first.
    """
    ridge = eps * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)
    B = torch.linalg.solve(A + ridge, C)
    V = torch.linalg.eigh(B.T @ A @ B).eigenvectors  # smallest eigenvalues first
    V = V[:, -rank:].flip(1)
    return B @ V, V.T


def fit(ff, A, C):
    """Set L and R of a sparse layer to the minimiser of (7) of their rank, in place."""
    all_reduce(A, C)
    L, R = closed_form(A, C, len(ff.R))
    ff.L.copy_(L)
    ff.R.copy_(R)


@torch.no_grad()
def layerwise_closed(model, batches, progress):
    """Give every sparse layer the optimum of (7), in one pass of the full model."""
    moments = {ff: new_moments(model) for ff in caprese.sparse_layers(model).values()}
    for _ in progress.steps("layer-wise", 1, caprese.correction_parameters(model)):
        for batch in tqdm(batches, "closed form", leave=False, disable=None):
            for ff, x, residual, _ in stream_residuals(model, batch):
                add_moments(*moments[ff], x, residual)  # e of (7) is the residual
        for ff, (A, C) in moments.items():
            fit(ff, A, C)


def squared_error(ff, x, residual):
    """Sum over the tokens x [N, D] of |FF(x) - FF_sparse(x) - x L R|^2, as in equation (7)."""
    return (residual - ff.correction(x)).float().square().sum()  # (7)


def layerwise_backward(model, batch, num_tokens):
    """Equation (7), summed over the layers, which share no parameter. Runs backward.

    Returns this batch's part of the mean over num_tokens response tokens.
    """
    total = 0.0
    for ff, x, residual, _ in stream_residuals(model, batch):
        loss = squared_error(ff, x, residual) / num_tokens
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def unexplained(model, samples, args):
    """{layer: fraction of the residual's energy in (7) that the correction does not explain}."""
    layers = caprese.sparse_layers(model)
    energies = {ff: torch.zeros(2, dtype=torch.float64) for ff in layers.values()}
    for batch in data.batches(samples, args.micro_batch, model.device):
        for ff, x, residual, _ in stream_residuals(model, batch):
            energy = residual.float().square().sum()
            energies[ff] += torch.stack([squared_error(ff, x, residual), energy]).cpu()
    return {i: float(energies[ff][0] / energies[ff][1].clamp_min(1e-30))
            for i, ff in layers.items()}


# ---- layer-wise, block by block: inputs from the sparse model as fitted so far (ours)

@torch.no_grad()
def layerwise_sequential(model, batches, progress):
    """Fit block by block, each on the inputs that the fits before it make.

    The target is what takes the block's output to the full model's, so a fit mends what those
    before it could not. Between two blocks the states of both models wait on the host. A resumed
    run takes them through the blocks that were fitted before.
    """
    layers = caprese.sparse_layers(model)
    for ff in layers.values():
        ff.R.zero_()  # what is not fitted yet corrects nothing
    full = [model.model.embed(batch.tokens).cpu() for batch in batches]  # [B, T, D] each
    sparse = list(full)
    for i in progress.steps("layer-wise", max(layers) + 1, caprese.correction_parameters(model)):
        for fitted in range(i if i == progress.first else 0):  # in a resumed run
            fit_block(model, fitted, batches, full, sparse, learn=False)
        fit_block(model, i, batches, full, sparse, learn=i in layers)


def samples_that_fit(samples):
    """Every n-th sample, so that at most MAX_WAITING_TOKENS tokens wait between two blocks."""
    tokens = sum(len(prompt) + len(response) for prompt, response in samples)
    return samples[::math.ceil(tokens / MAX_WAITING_TOKENS)]


def fit_block(model, i, batches, full, sparse, learn):
    """Fit L and R of layer i to what the sparse block's output lacks, if it is to learn.

    That is the difference of the blocks' outputs, or of the FFs' outputs where a norm stands
    between (Gemma 2). The full states are taken through layer i, in place, and the sparse states,
    which need the fit before, through layer i - 1.
    """
    A, C = new_moments(model)
    for j, batch in enumerate(batches):
        if i > 0:
            sparse[j] = run_layer(model, i - 1, batch, sparse[j], "mixed")[0].cpu()
        full_output, _, _, ff_full = run_layer(model, i, batch, full[j])
        full[j] = full_output.cpu()
        if learn:
            output, x, _, ff_output = run_layer(model, i, batch, sparse[j], "mixed")
            e = ff_full - ff_output if model.config.post_norms else full_output - output
            add_moments(A, C, x[batch.response], e[batch.response])
    if learn:
        fit(model.model.layers[i].mlp, A, C)


# ---- end-to-end

def e2e_backward(model, batch, num_tokens, loss="mse"):
    """Equation (8): the MSE between the final embeddings of the full and of the sparse model.

    Or, ours, the KL divergence of their next-token distributions, in nats. Runs backward. Returns
    this batch's part of the mean over num_tokens response tokens.
    """
    with torch.no_grad():
        teacher = model.model(batch.tokens)[batch.response]  # [N, D]; the weights are the same
    with caprese.phase(model, "mixed", batch.generated):  # around backward, which may recompute
        student = model.model(batch.tokens)[batch.response]
        if loss == "mse":
            total = (student - teacher).float().square().mean(-1).sum()  # (8)
        else:
            total = kl_divergence(model, student, teacher)
        mean = total / num_tokens
        mean.backward()
    return mean.item()


def kl_divergence(model, student, teacher):
    """Sum over tokens of KL(full || sparse) in nats, from final embeddings [N, D] each."""
    chunks = zip(student.split(LOGIT_CHUNK), teacher.split(LOGIT_CHUNK))
    return sum(checkpoint(kl_of_chunk, model, s, t, use_reentrant=False) for s, t in chunks)


def kl_of_chunk(model, student, teacher):
    """The same of so few tokens that their logits fit into memory."""
    full = model.logits(teacher).float().log_softmax(-1)  # [N, V]
    sparse = model.logits(student).float().log_softmax(-1)
    return F.kl_div(sparse, full, log_target=True, reduction="sum")


@torch.no_grad()
def kl_to_full(model, samples, micro_batch=4):
    """Mean KL(full || sparse) in nats over all response positions that have a next token."""
    total, count = 0.0, 0
    for indices in tqdm(data.batch_indices(samples, micro_batch), "KL", leave=False, disable=None):
        batch = data.collate(samples, indices, model.device)
        followed = batch.response[:, :-1] & batch.response[:, 1:]
        full = model.model(batch.tokens)[:, :-1][followed]  # [N, D]
        with caprese.phase(model, "mixed", batch.generated):
            sparse = model.model(batch.tokens)[:, :-1][followed]
        total += kl_divergence(model, sparse, full).item()
        count += len(full)
    if count == 0:
        raise ValueError("no response of an evaluation file has two tokens, so it has no KL")
    return total / count


# ---- Adam, and the two stages

def adam_memory(optimizer, parameters):
    """{name: tensor} of what Adam remembers of {name: parameter}, made now: a resume fills it."""
    memory = {}
    for name, p in parameters.items():
        optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
        memory |= {f"{name}.{key}": value for key, value in optimizer.state[p].items()}
    return memory


def train(model, samples, backward, args, stage, progress, lr, epochs, batch_size):
    """Adam on the correction with a linear schedule and 2% warm-up, as in the paper."""
    learned = caprese.correction_parameters(model)
    optimizer = torch.optim.Adam(learned.values(), lr=lr)
    state = learned | adam_memory(optimizer, learned)
    schedule = []
    for epoch in range(epochs):
        schedule += data.batch_indices(samples, batch_size, seed=args.seed + epoch)
    total = len(schedule)
    warm_up = max(1, round(0.02 * total))
    for step in progress.steps(stage, total, state, args.save_every):
        num_tokens = sum(len(samples[i][1]) for i in schedule[step])
        decay = (total - step) / (total - warm_up + 1)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm_up, decay)
        optimizer.zero_grad()
        loss = torch.zeros((), device=model.device)
        for batch in micro_batches(samples, schedule[step], args, model.device):
            loss += backward(model, batch, num_tokens)
        all_reduce(loss, *(p.grad for p in learned.values()))
        optimizer.step()
        progress.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)


def layerwise(model, samples, args, progress=None):
    """The layer-wise stage: (7) block by block, in closed form, or by the paper's Adam."""
    progress = progress or Progress()
    if args.layerwise == "adam":
        train(model, samples, layerwise_backward, args, "layer-wise", progress, **ADAM)
        return
    if args.layerwise == "sequential":
        samples = samples_that_fit(samples)
    by_length = data.batch_indices(samples, len(samples))[0]
    batches = list(micro_batches(samples, by_length, args, model.device))
    fit_layers = layerwise_sequential if args.layerwise == "sequential" else layerwise_closed
    fit_layers(model, batches, progress)


def end_to_end(model, samples, args, progress=None):
    """The end-to-end stage, (8)."""
    model.model.gradient_checkpointing = args.gradient_checkpointing
    backward = partial(e2e_backward, loss=args.loss)
    train(model, samples, backward, args, "E2E", progress or Progress(), args.e2e_lr,
          args.e2e_epochs, args.e2e_batch_size)
    model.model.gradient_checkpointing = False


# ---- the command

def training_samples(args, tokenizer):
    """Encoded training samples: those of --data, or the bundled model's problems."""
    if args.model:
        return [s for file in args.data for s in read_samples(file, args.samples, args, tokenizer)]
    reading = args.samples // 8  # some, so that the correction learns to do no harm there
    problems = data.problems("maths", args.samples - reading, args.seed)
    problems += data.problems("reading", reading, args.seed)
    return data.encode_samples(problems, tokenizer)


def read_samples(file, count, args, tokenizer):
    """The first `count` encoded samples of a file."""
    problems = data.read_problems(file, count, args.skip_bad)
    return data.encode_samples(problems, tokenizer, args.max_tokens)


def measure(model, tokenizer, unseen, args):
    """Columns of the table: the bundled model's accuracy on held-out problems, and the KL to the
    full model on each of the unseen sets {name: samples}."""
    row, half = {}, math.ceil(args.eval_samples / 2)
    if not args.model:
        maths = data.problems("maths", args.eval_samples, EVALUATION_SEED, evaluation=True)
        reading = data.problems("reading", half, EVALUATION_SEED, evaluation=True)
        row["math_accuracy"], row["mean_response_tokens"] = sample.evaluate(
            model, tokenizer, maths, max_new_tokens=128)
        row["reading_accuracy"], _ = sample.evaluate(model, tokenizer, reading, max_new_tokens=128)
    for name, samples in unseen.items():
        row[f"{name} kl"] = kl_to_full(model, samples, args.micro_batch)
    return row


def recovered(rows):
    """The fraction of what the sparse method lost that the last row regained; None without a loss.

    Of the maths accuracy, or else of the KL on the first evaluation file, 0 for the full model.
    """
    keys = [key for key in rows[0] if key == "math_accuracy" or key.endswith(" kl")]
    if not keys or len(rows) < 3:
        return None
    full, sparse, current = (row[keys[0]] for row in (rows[0], rows[1], rows[-1]))
    return None if full == sparse else (current - sparse) / (full - sparse)


def layer_indices(text):
    """What --layers gives: "all", or indices; argparse reports anything else."""
    return text if text == "all" else [int(i) for i in text.split(",")]


def arguments(argv=None):
    """The command line, the defaults filled in; ValueError for flags that do not go together."""
    parser = sample.common_arguments(sample.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.epilog = f"Defaults: {DEFAULTS}; bundled model: {BUNDLED}; with --paper: {PAPER}"
    add, files = parser.add_argument, {"action": "append", "default": [], "metavar": "FILE"}
    add("--data", help="training samples: JSONL, JSON, hf://datasets/OWNER/NAME/FILE", **files)
    add("--eval-data", help="unseen samples to measure the KL to the full model on", **files)
    add("--samples", type=sample.positive, help="training samples of each file at most")
    add("--eval-samples", type=sample.positive, default=500, help="default: %(default)s")
    add("--max-tokens", type=int, default=2048, help="drop longer samples (default: %(default)s)")
    add("--skip-bad", action="store_true", help="drop lines that are no samples, and name them")
    add("--paper", action="store_true", help="the paper's recipe, but for the flags given")
    add("--method", choices=caprese.METHODS, default="griffin")
    add("--density", type=float, default=0.5, help="kept neurons, in (0, 1] (default: %(default)s)")
    add("--layers", type=layer_indices, help="all, or numbers as 0,1,2 (default: as in the paper)")
    add("--rank", type=sample.positive, help="r")
    add("--layerwise", choices=("sequential", "closed", "adam", "none"),
        help="(7) block by block, for all blocks at once, by the paper's Adam, or not at all")
    add("--loss", choices=("mse", "kl"), help="end-to-end: on the final embedding or the logits")
    add("--e2e-lr", type=float)
    add("--e2e-epochs", type=int, help="0: no end-to-end stage")
    add("--e2e-batch-size", type=sample.positive)
    add("--micro-batch", type=sample.positive, default=16, help="samples at once (default: 16)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="saves memory")
    add("--fsdp", action="store_true", help="under torchrun: shard the base over the devices")
    add("--save-every", type=sample.positive, default=20, help="steps (default: %(default)s)")
    add("--resume", action="store_true", help="continue an interrupted run from --out's .state")
    add("--out", default="adapter.safetensors", help="adapter to write (default: %(default)s)")
    args = parser.parse_args(argv)
    recipe = DEFAULTS if args.model else BUNDLED
    if args.paper:  # the bundled model has no room for a rank of 256
        recipe = recipe | PAPER | {"rank": recipe["rank"]}
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    if args.fsdp and ("WORLD_SIZE" not in os.environ or args.method == "int4"):
        raise ValueError("--fsdp needs torchrun --nproc_per_node=N, and a method other than int4")
    if bool(args.model) != bool(args.data):
        raise ValueError("--model and --data go together: a model and the samples that teach it")
    if args.layerwise == "none" and args.e2e_epochs <= 0:
        raise ValueError("nothing is learned: give --layerwise or --e2e-epochs above 0")
    if len({Path(file).stem for file in args.eval_data}) < len(args.eval_data):
        raise ValueError("two --eval-data files have one name, as columns; rename one")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"the folder of --out {args.out} does not exist")
    return args


def describe(args, samples):
    """The two lines at the start."""
    kept = "weights of 4 bits" if args.method == "int4" else f"density {args.density}"
    base = args.model or "the bundled model (by default about 2 minutes on 2 cores)"
    fitting = samples_that_fit(samples) if args.layerwise == "sequential" else samples
    text = (f"Distilling {args.method}, {kept}, x L R of rank {args.rank}, into {base} on "
            f"{process_group()[1]} x {args.device}.\nLayer-wise: {args.layerwise}, {len(fitting)} "
            f"samples. End-to-end: {args.loss}, {len(samples)} samples, {args.e2e_epochs} epochs "
            f"in batches of {args.e2e_batch_size}, Adam at {args.e2e_lr:g}.")
    if args.paper:
        ours = [f"{key} {getattr(args, key)}" for key in PAPER if getattr(args, key) != PAPER[key]]
        if sample.choose_dtype(args) not in (None, torch.bfloat16):
            ours.append(str(sample.choose_dtype(args)))
        text += f" Not the paper's: {', '.join(ours) or 'nothing'}."
    return text


def distill(args):
    """Both stages and the table, as args say; writes the adapter."""
    torch.manual_seed(args.seed)
    out = sys.stderr if args.json else sys.stdout
    may_differ = ("device", "json", "resume", "save_every", "fsdp", "gradient_checkpointing")
    settings = {key: value for key, value in vars(args).items() if key not in may_differ}
    progress = Progress(f"{args.out}.state", settings, args.resume)
    tokenizer = data.Tokenizer(resolve(args.model or sample.BUNDLED))
    samples = training_samples(args, tokenizer)
    unseen = {Path(file).stem: read_samples(file, args.eval_samples, args, tokenizer)
              for file in args.eval_data}
    print(describe(args, samples), file=out)
    model, _ = sample.load(args, "cpu" if args.fsdp else args.device)
    if args.fsdp:
        held = shard(model, args.device)
        print(f"Each device holds {held:.0%} of the layers' weights.", file=out)
    layers = range(len(model.model.layers)) if args.layers == "all" else args.layers
    caprese.attach(model, args.method, args.density, layers, args.rank)
    rows = progress.state["rows"]

    def record(method):
        fractions = unexplained(model, samples[:UNEXPLAINED_SAMPLES], args).values()
        added = 100 * caprese.added_parameters(model) if len(rows) > 1 else 0.0
        rows.append({"method": method, **measure(model, tokenizer, unseen, args),
                     "unexplained": sum(fractions) / max(1, len(fractions)),
                     "seconds": progress.state["seconds"], "added_parameters_percent": added})
        rows[-1]["recovered"] = recovered(rows)

    if not rows:
        caprese.detach(model)
        record("full")
        caprese.attach(model, args.method, args.density, layers, args.rank)
        record(args.method)
    if progress.state["stage"] != "E2E" and args.layerwise != "none":
        layerwise(model, samples, args, progress)
        record("+ layer-wise")
    if args.e2e_epochs > 0:
        end_to_end(model, samples, args, progress)
        record("+ E2E")
    question = ["--model", args.model, "your question"] if args.model else []
    command = ["python", "sample.py", "--adapter", args.out, *question]
    if process_group()[0] == 0:
        caprese.save_adapter(model, args.out)
        Path(progress.file).unlink(missing_ok=True)
    print(f"\n{sample.format_table(rows)}\n", file=out)
    print(f"wrote {args.out}; try: {shlex.join(command)}", file=out)
    if args.json:
        print(json.dumps({"rows": rows, "adapter": args.out}))


def distill_together(args):
    """distill() in one of torchrun's processes, which ends with it; rank 0 alone prints."""
    try:
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group()  # gloo for tensors on a CPU, nccl on CUDA
        if dist.get_rank() > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        distill(args)
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # at Python's own end gloo's threads may abort the process (PyTorch #190489)
    except Exception as error:
        print(f"error in rank {os.environ['RANK']}: {type(error).__name__}: {error}",
              file=sys.__stderr__, flush=True)
        os._exit(2)  # at once: the others may wait for this process, and torchrun then ends them


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    run = distill_together if "WORLD_SIZE" in os.environ else distill
    try:
        run(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("(--resume goes on from the last checkpoint, if any)") from None


if __name__ == "__main__":
    sample.run_command(main)
