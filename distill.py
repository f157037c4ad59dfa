"""Learn L and R: python distill.py

Layer-wise first, equation (7), by its exact minimiser; then end-to-end, equation (8), by Adam. The
base weights stay frozen. Without arguments: the bundled model, and a table. --paper takes Adam for
(7) as well, with the paper's epochs and batch sizes. What we found to be better on real models, and
the paper has not, is asked for by name: --layerwise sequential, --loss kl.
"""

import hashlib
import inspect
import json
import math
import shlex
import signal
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_later

import caprese
import data
import sample
from model import resolve

# The default of a flag for (the bundled model, --model, --paper). The layer-wise Adam's own numbers
# are the defaults of train_layerwise.
RECIPES = {
    "samples": (6000, 20000, 20000),
    "rank": (40, 256, 256),
    "layerwise": ("closed", "closed", "adam"),
    "e2e_lr": (3e-3, 1e-4, 1e-4),
    "e2e_epochs": (1, 3, 3),
    "e2e_batch_size": (32, 16, 16),
}
EVALUATION_SEED = 1234     # of the held-out problems
UNEXPLAINED_SAMPLES = 256  # training samples that the table's column is measured on
LOGIT_CHUNK = 1024         # tokens whose logits are in memory at once
TOKENS_PER_WIDTH = 4       # fewer response tokens than so many hidden sizes: a note warns


# ---- layer-wise, equation (7), in closed form

@torch.no_grad()
def visit_residuals(model, batch, visit):
    """Run the full model over a batch; at each sparse layer, call visit(ff, x, e).

    x [N, D] is the FF's input and e [N, D] the residual FF(x) - FF_sparse(x), of the N response
    tokens: they alone go through the sparse FF. No x or e outlives its visit.
    """
    def hook(ff, inputs, output):
        x = inputs[0]
        e = ff.residual(x, batch.generated)  # computes the FF again, so that forward stays plain
        visit(ff, x[batch.response], e[batch.response])

    hooks = [ff.register_forward_hook(hook) for ff in caprese.sparse_layers(model).values()]
    try:
        with caprese.phase(model, "full"):
            embeddings(model, batch.tokens)  # for the hooks alone
    finally:
        for registered in hooks:
            registered.remove()


def fit_closed_form(model, batches):
    """Give L and R of every sparse layer the exact minimiser of (7) over these data.Batches.

    All layers are fitted in one pass of the full model. Raises ValueError if the correction is not
    x L R, or if the model's numbers overflow its dtype.
    """
    check_closed_form(model)
    moments = {ff: new_moments(ff) for ff in caprese.sparse_layers(model).values()}

    def visit(ff, x, e):
        add_moments(*moments[ff], x, e)

    batches = list(batches)
    for batch in sample.progress(batches, "closed form", len(batches)):
        visit_residuals(model, batch, visit)
    for ff, (A, C) in moments.items():
        fit(ff, A, C)


def check_closed_form(model):
    """ValueError if the correction of the sparse layers is not x L R; all are of one class."""
    for ff in list(caprese.sparse_layers(model).values())[:1]:
        if not caprese.has_closed_form(ff):
            raise ValueError(f"the correction of {caprese.method_name(type(ff))} is not x L R, so "
                             "(7) has no closed form; take --layerwise adam")


def new_moments(ff):
    """Zeros for A = sum x^T x and C = sum x^T e, both [D, D].

    They are sums in float64 of products in float32, which are fast and exact enough.
    """
    D, device = ff.gate_proj.in_features, ff.L.device
    return torch.zeros(2, D, D, dtype=torch.float64, device=device).unbind()


def add_moments(A, C, x, e):
    """Add the tokens x [N, D] and e [N, D] to A and C, in place."""
    x, e = x.float(), e.float()
    A += x.T @ x
    C += x.T @ e


@torch.no_grad()
def fit(ff, A, C):
    """Set L and R of a sparse layer to the minimiser of (7) of their rank."""
    all_reduce(A, C)
    if not (A.isfinite().all() and C.isfinite().all()):
        raise overflow(ff.gate_proj.weight.dtype)
    L, R = closed_form(A, C, ff.R.shape[0])
    ff.L.copy_(L)
    ff.R.copy_(R)


def closed_form(A, C, rank, eps=1e-6):
    """The minimiser of (7): reduced-rank regression of e on x from their moments A and C [D, D].

    Exactly, it minimises sum |e - x L R|^2 + ridge |L R|^2, where the ridge is eps times the mean
    of A's diagonal. M = (A + ridge I)^-1 C is the solution of full rank. Among all maps of rank r
    the best is M V V^T, where V are the top r eigenvectors of C^T M = M^T (A + ridge I) M.
    Returns L = M V [D, r] and R = V^T [r, D], best directions first.
    """
    ridge = eps * A.diagonal().mean().clamp_min(1e-30)
    M = torch.linalg.solve(A + ridge * torch.eye(len(A), dtype=A.dtype, device=A.device), C)
    eigenvectors = torch.linalg.eigh(C.T @ M).eigenvectors  # smallest eigenvalues first
    V = eigenvectors.flip(1)[:, :rank]
    return M @ V, V.T


def squared_error(ff, x, e):
    """|FF(x) - FF_sparse(x) - x L R|^2 of (7), summed over the tokens x [N, D].

    (7) is its mean; train() divides by the number of tokens.
    """
    return (e - ff.correction(x)).float().square().sum()  # (7)


def unexplained(model, samples, micro_batch=16):
    """The fraction of the residual's energy in (7) that x L R misses, as a mean over the layers."""
    energies = {ff: torch.zeros(2, dtype=torch.float64)
                for ff in caprese.sparse_layers(model).values()}
    if not energies:  # the full model
        return 0.0

    def visit(ff, x, e):
        energies[ff] += torch.stack([squared_error(ff, x, e), e.float().square().sum()]).cpu()

    batches = list(data.batches(samples, micro_batch, model.device))
    for batch in sample.progress(batches, "unexplained", len(batches)):
        visit_residuals(model, batch, visit)
    fractions = [float(missed / total.clamp_min(1e-30)) for missed, total in energies.values()]
    return sum(fractions) / len(fractions)


# ---- the losses that Adam minimises, summed over the response tokens; *_backward run backward too

def layerwise_backward(model, batch):
    """Equation (7), summed over the layers, which share no parameter. Returns the sum."""
    losses = []

    def visit(ff, x, e):
        with torch.enable_grad():
            loss = squared_error(ff, x, e)
        loss.backward()
        losses.append(loss.detach())

    visit_residuals(model, batch, visit)
    return sum(losses)


def e2e_backward(model, batch, distance):
    """Backward of the distance between the final embeddings of the sparse and of the full model.

    The one model plays both parts, by its phase. Returns the distance.
    """
    with torch.no_grad(), caprese.phase(model, "full"):
        teacher = embeddings(model, batch.tokens)[batch.response]  # [N, D]
    with caprese.phase(model, "teacher_forced", generated=batch.generated):
        student = embeddings(model, batch.tokens)[batch.response]  # [N, D]
        loss = distance(student, teacher)
        loss.backward()  # within the phase, for checkpointing runs the blocks again
    return loss.detach()


def mse(student, teacher):
    """Equation (8): the MSE between final embeddings [N, D], summed over the tokens as in (7)."""
    return (student.float() - teacher.float()).square().mean(-1).sum()  # (8)


# ---- Adam

def train_layerwise(model, samples, lr=1e-3, epochs=20, batch_size=128, **settings):
    """Equation (7) as the paper minimises it, by Adam. settings are those of train()."""
    train(model, samples, layerwise_backward, "layer-wise", lr, epochs, batch_size, **settings)


def train_end_to_end(model, samples, lr=1e-4, epochs=3, batch_size=16, loss="mse",
                     gradient_checkpointing=False, **settings):
    """Equation (8) by Adam, or with loss="kl" ours. settings are those of train().

    loss may also be a function of your own, from final embeddings (student, teacher), [N, D] each.
    gradient_checkpointing computes activations again in the backward pass, to save memory.
    """
    distance = {"mse": mse, "kl": partial(kl_divergence, model)}.get(loss, loss)
    if not callable(distance):
        raise ValueError(f"loss is {loss!r}, but it must be mse, kl or a function")
    recompute_activations(model, gradient_checkpointing)
    try:
        train(model, samples, partial(e2e_backward, distance=distance), "E2E", lr, epochs,
              batch_size, **settings)
    finally:
        recompute_activations(model, False)


def train(model, samples, backward, name, lr, epochs, batch_size, micro_batch=16, seed=0,
          checkpoint=None, save_every=20):
    """Adam on L and R, with the paper's linear schedule and 2% warm-up.

    samples are [(prompt_ids, response_ids)], as data.encode_samples gives them; micro_batch of them
    pass through the model at once. checkpoint is a Checkpoint, which is read at the start and
    written every save_every steps. Raises ValueError if the loss or a gradient is not finite.
    """
    model.requires_grad_(False)
    learned = caprese.adapter_parameters(model)
    for parameter in learned.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(learned.values(), lr=lr)
    state = learned | adam_memory(optimizer, learned)  # what a resumed run restores
    schedule = []
    for epoch in range(epochs):
        schedule += data.batch_indices(samples, batch_size, seed + epoch)  # new ones each epoch
    total = len(schedule)
    warm_up = max(1, round(0.02 * total))
    first = checkpoint.restore(name, state) if checkpoint else 0
    bar = sample.progress(range(first, total), name, total, initial=first)
    for step in bar:
        for parameter in learned.values():
            parameter.grad = torch.zeros_like(parameter)
        loss = torch.zeros((), device=model.device)
        for batch in micro_batches(samples, schedule[step], micro_batch, model.device):
            loss += backward(model, batch)
        num_tokens = sum(len(samples[i][1]) for i in schedule[step])
        gradients = [parameter.grad for parameter in learned.values()]
        all_reduce(loss, *gradients)
        for gradient in gradients:
            gradient /= num_tokens  # the mean of (7), (8); in float16 a mean's gradient may vanish
        if not all(tensor.isfinite().all() for tensor in (loss, *gradients)):
            raise overflow(model.dtype)
        rise = (step + 1) / warm_up                     # to 1, over the first 2% of the steps
        fall = (total - step) / (total - warm_up + 1)   # from 1, over the others
        optimizer.param_groups[0]["lr"] = lr * min(rise, fall)
        optimizer.step()
        bar.set_postfix(loss=f"{loss / num_tokens:.4f}", refresh=False)
        if checkpoint and ((step + 1) % save_every == 0 or step + 1 == total):
            checkpoint.save(name, step + 1, state)


def overflow(dtype):
    """The error for numbers that are inf or NaN."""
    if dtype == torch.float16:
        return ValueError("overflow: a number is inf or NaN in torch.float16; try --dtype bfloat16")
    return ValueError(f"a number is inf or NaN in {dtype}: the weights are damaged, or Adam's "
                      "learning rate is too high")


# ======== The paper ends here. Below: KL, models of others, processes, files, flags ========

# ---- ours: KL in place of (8), and to measure by

def kl_divergence(model, student, teacher):
    """Ours, in place of (8): KL(full || sparse) of the next-token distributions, in nats.

    Summed over the tokens of the final embeddings [N, D].
    """
    chunks = zip(student.split(LOGIT_CHUNK), teacher.split(LOGIT_CHUNK))
    return sum(recompute_later(kl_of_chunk, model, s, t, use_reentrant=False) for s, t in chunks)


def kl_of_chunk(model, student, teacher):
    """The same of so few tokens that their logits fit into memory."""
    full = logits(model, teacher).float().log_softmax(-1)  # [N, V]
    sparse = logits(model, student).float().log_softmax(-1)
    return F.kl_div(sparse, full, log_target=True, reduction="sum")


@torch.no_grad()
def kl_to_full(model, samples, micro_batch=4):
    """Mean KL(full || sparse) in nats over the response positions that predict a response token."""
    total, num_tokens = 0.0, 0
    batches = data.batch_indices(samples, micro_batch)
    for indices in sample.progress(batches, "KL", len(batches)):
        batch = data.collate(samples, indices, model.device)
        followed = batch.response[:, :-1] & batch.response[:, 1:]
        with caprese.phase(model, "full"):
            full = embeddings(model, batch.tokens)[:, :-1][followed]  # [N, D]
        with caprese.phase(model, "teacher_forced", generated=batch.generated):
            sparse = embeddings(model, batch.tokens)[:, :-1][followed]
        total += float(kl_divergence(model, sparse, full))
        num_tokens += len(full)
    if not math.isfinite(total):
        raise overflow(model.dtype)
    if num_tokens == 0:
        raise ValueError("no response of an evaluation file has two tokens, so it has no KL")
    return total / num_tokens


# ---- the model's parts, ours or transformers'

def embeddings(model, tokens):
    """The final embeddings, after the last norm: tokens [B, T] int64 -> [B, T, D]."""
    if caprese.of_transformers(model):
        from beyond import in_transformers
        return in_transformers.embeddings(model, tokens)
    return model.model(tokens)


def logits(model, hidden_states):
    """The language-model head on final embeddings: [N, D] -> [N, V]."""
    if caprese.of_transformers(model):
        from beyond import in_transformers
        return in_transformers.logits(model, hidden_states)
    return model.logits(hidden_states)


def recompute_activations(model, wanted):
    """Gradient checkpointing: compute activations again in the backward pass, or keep them."""
    if caprese.of_transformers(model):
        from beyond import in_transformers
        in_transformers.recompute_activations(model, wanted)
    else:
        model.model.gradient_checkpointing = wanted


# ---- several processes: beyond/several_devices.py starts them; here there is one

def process_group():
    """(the number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(*tensors):
    """Sum each tensor over all processes, in place."""
    if process_group()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def micro_batches(samples, indices, micro_batch, device):
    """This process's part of a batch of sample indices, as Batches; equally many in each process.

    A process without samples of its own gets one whose response does not count.
    """
    process, num_processes = process_group()
    size = micro_batch * num_processes
    for start in range(0, len(indices), size):
        own = indices[start:start + size][process::num_processes]
        yield data.collate(samples, own or indices[:1], device, with_response=bool(own))


# ---- interruption

def adam_memory(optimizer, parameters):
    """{name: tensor} of what Adam remembers of {name: parameter}: zeros, which a resume fills."""
    memory = {}
    for name, p in parameters.items():
        optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
        memory |= {f"{name}.{key}": value for key, value in optimizer.state[p].items()}
    return memory


class Checkpoint:
    """What an interrupted run leaves: the tensors of its stage, the step, the table, the settings.

    The same settings go on from the file, on a CPU to the same bits. Raises ValueError if the file
    is of a run with other settings; it names those.
    """

    def __init__(self, file, settings):
        self.file, self.tensors = Path(file), {}
        self.about = {"settings": settings, "stage": None, "step": 0, "seconds": 0.0, "rows": []}
        self.start = time.perf_counter()
        if self.file.exists():
            self.tensors, about = caprese.load_tensors(self.file)
            if not isinstance(about, dict) or "settings" not in about:
                raise ValueError(f"{file} is not what an interrupted run leaves; move it away")
            self.about = about
            saved = self.about["settings"]
            differ = [key for key in settings if saved.get(key) != settings[key]]
            if differ:
                raise ValueError(f"{file} is of an interrupted run with another "
                                 f"{', '.join(differ)}; repeat its command, or start --fresh")

    def restore(self, stage, tensors):
        """Fill the tensors with those saved in this stage, and return the step; 0 if none were."""
        if self.about["stage"] != stage:
            self.tensors = {}  # those of an earlier stage, if any
            self.start = time.perf_counter()
            self.save(stage, 0, tensors)
        for name, tensor in tensors.items():
            tensor.detach().copy_(self.tensors.get(name, tensor))
        self.start = time.perf_counter() - self.about["seconds"]
        return self.about["step"]

    def save(self, stage, step, tensors):
        """Write all of it. Several processes hold the same, so the first one writes."""
        self.about |= {"stage": stage, "step": step, "seconds": time.perf_counter() - self.start}
        if process_group()[0] == 0:
            caprese.save_tensors(tensors, self.file, self.about)


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
    return data.encode_samples(data.read_problems(file, count), tokenizer, args.max_tokens)


def print_samples(samples, model, out):
    """Print how many tokens teach; a warning if x L R may memorise them."""
    count = sum(len(response) for _, response in samples)
    print(f"{len(samples)} samples, {count} response tokens.", file=out)
    hidden_size = caprese.decoder(model).config.hidden_size
    if count < TOKENS_PER_WIDTH * hidden_size:
        print(f"note: {count} response tokens are fewer than {TOKENS_PER_WIDTH} times the "
              f"hidden_size, {hidden_size}: x L R may memorise them", file=sys.stderr)


def layerwise_stage(model, samples, args, checkpoint):
    """Equation (7): in closed form, by the paper's Adam, or block by block (ours)."""
    if args.layerwise == "adam":
        train_layerwise(model, samples, micro_batch=args.micro_batch, seed=args.seed,
                        checkpoint=checkpoint, save_every=args.save_every)
        return
    if args.layerwise == "sequential":
        from beyond import sequential
        sequential.fit(model, samples, args.micro_batch, checkpoint)
        return
    learned = caprese.adapter_parameters(model)
    if checkpoint.restore("layer-wise", learned) == 0:
        by_length = data.batch_indices(samples, len(samples))[0]  # all of them, as one batch
        fit_closed_form(model, list(micro_batches(samples, by_length, args.micro_batch,
                                                  model.device)))
        checkpoint.save("layer-wise", 1, learned)


def measure(model, tokenizer, unseen, args):
    """Columns of the table: the bundled model's accuracies on held-out problems, with their errors.

    And the KL to the full model on each of the unseen sets {name: samples}.
    """
    row = {}
    if not args.model:
        counts = {"maths": args.eval_samples, "reading": (args.eval_samples + 1) // 2}
        for kind, column in (("maths", "math"), ("reading", "reading")):
            problems = data.problems(kind, counts[kind], EVALUATION_SEED, evaluation=True)
            row[f"{column}_accuracy"], row[f"{column}_error"] = sample.evaluate(
                model, tokenizer, problems, max_new_tokens=128)
    is_full = not caprese.sparse_layers(model)
    for name, samples in unseen.items():
        row[f"{name} kl"] = 0.0 if is_full else kl_to_full(model, samples, args.micro_batch)
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


def parse_layers(text):
    """What --layers gives: "all", or indices; argparse reports anything else."""
    return text if text == "all" else [int(i) for i in text.split(",")]


def recipe_arguments(parser):
    """Add the flags that say how L and R are learned; fill_recipe gives those left out a value."""
    recipe = "; ".join(f"{flag} {', '.join(map(str, values))}" for flag, values in RECIPES.items())
    parser.epilog = f"Defaults for the bundled model, an own model, --paper: {recipe}"
    add = parser.add_argument
    add("--paper", action="store_true", help="the paper's recipe, but for the flags given")
    add("--samples", type=sample.positive, help="training samples of each file at most")
    add("--rank", type=sample.positive, help="r")
    add("--layerwise", choices=("closed", "adam", "sequential", "none"),
        help="(7) in closed form, by the paper's Adam, block by block (ours), or not at all")
    add("--loss", choices=("mse", "kl"), default="mse", help="(8), or KL (default: %(default)s)")
    add("--e2e-lr", type=float)
    add("--e2e-epochs", type=int, help="0: no end-to-end stage")
    add("--e2e-batch-size", type=sample.positive)


def fill_recipe(args):
    """Set the flags of RECIPES that were not given."""
    for flag, (bundled, own, paper) in RECIPES.items():
        value = own if args.model else bundled
        if args.paper and (args.model or flag != "rank"):  # the bundled model has no room for 256
            value = paper
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def arguments(argv=None, parents=(), prog=None):
    """The command line, the recipe filled in; ValueError for flags that do not go together.

    parents are parsers of further flags, prog is what the help calls the command.
    """
    parser = sample.common_arguments(sample.ArgumentParser(
        prog=prog, description="Learn L and R by distillation, (7) and (8).", parents=parents))
    sample.method_arguments(parser, default="griffin")
    add, files = parser.add_argument, {"action": "append", "default": [], "metavar": "FILE"}
    add("--density", type=float, default=0.5, help="kept neurons, in (0, 1] (default: %(default)s)")
    add("--layers", type=parse_layers, help="all, or numbers as 0,1,2 (default: as in the paper)")
    add("--data", help="training samples: JSONL, JSON, hf://datasets/OWNER/NAME/FILE", **files)
    add("--eval-data", help="unseen samples to measure the KL to the full model on", **files)
    add("--eval-samples", type=sample.positive, default=500, help="default: %(default)s")
    add("--max-tokens", type=int, default=2048, help="drop longer samples (default: %(default)s)")
    recipe_arguments(parser)
    add("--micro-batch", type=sample.positive, default=16, help="samples at once (default: 16)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--save-every", type=sample.positive, default=20, help="steps (default: %(default)s)")
    add("--resume", action="store_true", help="only go on, if an interrupted run left a checkpoint")
    add("--fresh", action="store_true", help="start anew where an interrupted run left one")
    add("--out", default="adapter.safetensors", help="adapter to write (default: %(default)s)")
    args = parser.parse_args(argv)
    fill_recipe(args)
    if bool(args.model) != bool(args.data):
        raise ValueError("--model and --data go together: a model and the samples that teach it")
    if args.layerwise == "none" and args.e2e_epochs <= 0:
        raise ValueError("nothing is learned: give --layerwise or --e2e-epochs above 0")
    if args.e2e_epochs > 0 and not 0 < args.e2e_lr < math.inf:
        raise ValueError(f"--e2e-lr is {args.e2e_lr}, but it must be a number above 0")
    if len({Path(file).stem for file in args.eval_data}) < len(args.eval_data):
        raise ValueError("two --eval-data files have one name, as columns; rename one")
    sample.check_output(args.out, args.data + args.eval_data)
    if Path(args.out).exists() and not is_adapter(args.out):
        raise ValueError(f"--out {args.out} exists and is not an adapter; give another name")
    return args


def is_adapter(file):
    """Is this a file that may be replaced by a new adapter?"""
    try:
        caprese.read_adapter(file)
    except ValueError:
        return False
    return True


def describe(args):
    """The two lines at the start."""
    method = caprese.method_name(caprese.METHODS.get(args.method, args.method))
    stages = []
    if args.layerwise != "none":
        stages.append(f"(7), layer-wise: {args.layerwise}.")
    if args.e2e_epochs > 0:
        stages.append(f"(8), end-to-end: {args.loss}, {args.e2e_epochs} epochs in batches of "
                      f"{args.e2e_batch_size}, Adam at {args.e2e_lr:g}.")
    return (f"Distilling {method}, density {args.density}, x L R of rank {args.rank}, into "
            f"{args.model or 'the bundled model (by default about 2 minutes on 2 cores)'} on "
            f"{process_group()[1]} x {args.device}.\n{' '.join(stages)}")


def settings_of(args, model, samples, unseen):
    """What a run depends on, {name: value}, for its Checkpoint: flags, contents of data, model."""
    changes_nothing = ("device", "json", "resume", "fresh", "save_every", "gradient_checkpointing",
                       "out", "model", "data", "eval_data")
    settings = {key: value for key, value in vars(args).items() if key not in changes_nothing}
    block = caprese.METHODS.get(args.method, args.method)
    settings |= {"method": caprese.method_name(block), "source of the method": source_digest(block)}
    contents = {"training samples": samples, "evaluation samples": unseen}
    settings |= {name: hashlib.sha256(repr(content).encode()).hexdigest()[:16]
                 for name, content in contents.items()}
    return settings | {"model": caprese.fingerprint(model)}


@cache
def source_digest(block):
    """A short hash of the files that a method's class and its bases stand in, as first read."""
    ours = [base for base in block.__mro__ if issubclass(base, caprese.SparseFF)]
    try:
        files = sorted({inspect.getsourcefile(base) for base in ours})
        content = b"".join(Path(file).read_bytes() for file in files)
    except (TypeError, OSError) as error:
        raise ValueError(f"the source files of {caprese.method_name(block)} cannot be read: "
                         f"{error}") from None
    return hashlib.sha256(content).hexdigest()[:16]


def open_checkpoint(args, settings, out):
    """The Checkpoint beside --out; says so if it goes on from an interrupted run."""
    file = Path(f"{args.out}.state")
    if args.fresh and file.exists():
        caprese.load_tensors(file)  # ValueError if it is something else
        file.unlink()
    if args.resume and not file.exists():
        raise ValueError(f"there is nothing to resume: no interrupted run has left {file}, and a "
                         f"finished one has written {args.out}")
    checkpoint = Checkpoint(file, settings)
    if file.exists():
        about = checkpoint.about
        print(f"Going on from {file}: {about['stage'] or 'the start'}, step {about['step']}; "
              "--fresh would start anew.", file=out)
    return checkpoint


def distill(args, load=sample.load, shard=None, measure=measure, command=("sample.py",)):
    """Both stages and the table, as args say; writes the adapter.

    load, shard, measure and command are others in beyond/in_transformers.py and
    beyond/several_devices.py. shard(model) spreads the base weights over devices.
    """
    torch.manual_seed(args.seed)
    out = sys.stderr if args.json else sys.stdout
    print(describe(args), file=out, flush=True)
    tokenizer = data.Tokenizer(resolve(args.model or sample.BUNDLED))
    samples = training_samples(args, tokenizer)
    unseen = {Path(file).stem: read_samples(file, args.eval_samples, args, tokenizer)
              for file in args.eval_data}
    model, _ = load(args)  # takes long, so a file that is missing is noticed before
    caprese.attach(model, args.method, args.density, args.layers, args.rank)  # do the flags fit?
    if args.layerwise in ("closed", "sequential"):
        check_closed_form(model)
    caprese.detach(model)
    settings = settings_of(args, model, samples, unseen)
    checkpoint = open_checkpoint(args, settings, out)
    print_samples(samples, model, out)
    if shard:
        shard(model)
    rows = checkpoint.about["rows"]
    for row in rows:
        print_row(row, out, first=row is rows[0])

    def record(method, seconds=0.0, added=0.0):
        row = {"method": method, **measure(model, tokenizer, unseen, args)}
        missed = unexplained(model, samples[:UNEXPLAINED_SAMPLES], args.micro_batch)
        rows.append(row | {"unexplained": missed, "seconds": seconds,
                           "added_parameters_percent": added})
        rows[-1]["recovered"] = recovered(rows)
        print_row(rows[-1], out, first=len(rows) == 1)

    if not rows:
        record("full")
    caprese.attach(model, args.method, args.density, args.layers, args.rank)
    if len(rows) == 1:
        record(settings["method"])
    added = 100 * caprese.added_parameters(model)
    if args.layerwise != "none" and "+ layer-wise" not in [row["method"] for row in rows]:
        layerwise_stage(model, samples, args, checkpoint)
        record("+ layer-wise", checkpoint.about["seconds"], added)
    if args.e2e_epochs > 0:
        train_end_to_end(model, samples, args.e2e_lr, args.e2e_epochs, args.e2e_batch_size,
                         args.loss, args.gradient_checkpointing, micro_batch=args.micro_batch,
                         seed=args.seed, checkpoint=checkpoint, save_every=args.save_every)
        record("+ E2E", checkpoint.about["seconds"], added)
    if process_group()[0] == 0:
        caprese.save_adapter(model, args.out, settings["model"])
        checkpoint.file.unlink(missing_ok=True)
    question = ["--model", args.model, "your question"] if args.model else []
    block = ["--block", settings["method"]] if ":" in settings["method"] else []
    command = ["python", *command, "--adapter", args.out, *block, *question]
    print(f"\nwrote {args.out}; try: {shlex.join(command)}", file=out)
    if args.json:
        print(json.dumps({"rows": rows, "adapter": args.out}))


def print_row(row, out, first):
    """Print a row of the table as soon as it is measured, below the names if it is the first."""
    cells = [sample.format_cell(value) for value in row.values()]
    for line in [list(row), cells] if first else [cells]:
        widths = [24] + [max(9, len(name)) for name in row][1:]
        line[0] = line[0].ljust(24)
        print("  ".join(map(str.rjust, line, widths)), file=out, flush=True)


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    try:
        distill(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("(the same command goes on from the checkpoint, if any)") from None


if __name__ == "__main__":
    sample.run_command(main)
