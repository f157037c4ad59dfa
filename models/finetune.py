"""Fine-tune all weights of a model on JSONL samples: python models/finetune.py --model FOLDER ...

Next-token training on the responses, one stop id at the end of each. A question of maths or of
multiple choice asks for a box, as the evaluation of a --model does, and its `#### N` becomes
\\boxed{N}. The weights are bfloat16 where the processor computes in it, beside a float32 copy that
AdamW changes. The same command goes on from where an interrupted run last wrote its state.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import caprese  # noqa: E402
import data  # noqa: E402
import distill  # noqa: E402
import sample  # noqa: E402
from model import resolve  # noqa: E402

WARM_UP = 0.03  # of the steps, until the learning rate is reached


def words(text):
    """The words and numbers of a text, without case, signs and spaces: what the check compares."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_samples(args, tokenizer):
    """Encoded samples [(prompt_ids, response_ids)] of --data, without any problem of --exclude."""
    excluded = set()
    for file in args.exclude:
        excluded |= {words(p.question) for p in data.read_problems(file, evaluation=True)}
    problems = []
    for file, count in zip(args.data, args.samples or [None] * len(args.data), strict=True):
        for problem in data.read_problems(file, count):
            if words(problem.question) in excluded:
                print(f"left out, as an evaluation has it: {problem.question}")
                continue
            if problem.kind in data.BOXED:
                problem.question += "\n" + data.BOXED[problem.kind]
                problem.response = re.sub(r"#### *(.*)", r"\\boxed{\1}", problem.response)
            problems.append(problem)
    stop = [tokenizer.stop_ids[0]]
    samples = data.encode_samples(problems, tokenizer, args.max_tokens)
    return [(prompt, response + stop) for prompt, response in samples]


def backward(model, samples, indices, num_tokens):
    """Cross-entropy of these samples' responses over num_tokens. Runs backward, returns a float."""
    batch = data.collate(samples, indices, model.device)
    learned = batch.response[:, 1:]  # position i predicts token i + 1
    hidden_states = model.model(batch.tokens[:, :-1])[learned]
    logits = model.logits(hidden_states).float()
    loss = F.cross_entropy(logits, batch.tokens[:, 1:][learned], reduction="sum") / num_tokens
    loss.backward()
    return loss.item()


def train(model, samples, args, checkpoint):
    """AdamW with warm-up and a linear decay to zero; one line of the loss curve every 20 steps."""
    weights = dict(model.named_parameters())
    master = {name: p.detach().float().clone() for name, p in weights.items()}
    optimizer = torch.optim.AdamW(master.values(), betas=(0.9, 0.98), weight_decay=0.0)
    state = master | distill.adam_memory(optimizer, master)
    schedule = []
    for epoch in range(args.epochs):
        schedule += data.batch_indices(samples, args.batch_size, seed=args.seed + epoch)
    losses, total = [], len(schedule)
    first = checkpoint.restore("fine-tuning", state)
    copy_weights(master, weights)
    bar = sample.progress(range(first, total), "fine-tuning", total, initial=first)
    for step in bar:
        indices = schedule[step]
        num_tokens = sum(len(samples[i][1]) for i in indices)
        losses.append(sum(backward(model, samples, indices[i:i + args.micro_batch], num_tokens)
                          for i in range(0, len(indices), args.micro_batch)))
        for name, p in weights.items():
            master[name].grad, p.grad = p.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(master.values(), 1.0)
        if not (math.isfinite(losses[-1]) and norm.isfinite()):
            raise distill.overflow(model.dtype)
        optimizer.param_groups[0]["lr"] = args.lr * min(
            (step + 1) / (WARM_UP * total), (total - step) / total)
        optimizer.step()
        copy_weights(master, weights)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)
            losses = []
        if (step + 1) % args.save_every == 0 or step + 1 == total:
            checkpoint.save("fine-tuning", step + 1, state)


@torch.no_grad()
def copy_weights(master, weights):
    """Round the float32 copy to the weights of the model."""
    for name, p in weights.items():
        p.copy_(master[name])


def save(model, source, folder):
    """Write the folder in the official layout: the source's files, and the weights in bfloat16.

    Returns the weights' SHA-256. Raises OSError, which names the folder, if that fails.
    """
    try:
        copy_settings(source, folder)
        return save_weights(model, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {folder} ({error}); the same command goes on from the end of "
                      "the training") from None


def copy_settings(source, folder):
    """Copy the config, the tokenizer and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*source.glob("*.json"), *source.glob("*.jinja")]:
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def save_weights(model, folder):
    """Write model.safetensors under a temporary name, then rename; returns its SHA-256."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.named_parameters()}
    file = folder / "model.safetensors"
    save_file(tensors, f"{file}.tmp", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", f"{file}.tmp")  # which is new here; safetensors: 0600
    os.replace(f"{file}.tmp", file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check(args, source):
    """ValueError, in one line, for a learning rate or an --out that cannot be; nothing is written.

    The folder --out must be new or empty. It may hold what an interrupted run has written, whose
    state then lies beside it.
    """
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr is {args.lr}, but it must be a number above 0")
    inputs, state = [source, *args.data, *args.exclude], Path(f"{args.out}.state")
    sample.check_overwriting(args.out, inputs)
    sample.check_output(state, inputs)
    if os.path.lexists(args.out) and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, but a folder is written; give another --out")
    going_on = state.exists() and not args.fresh
    if args.out.is_dir() and any(args.out.iterdir()) and not going_on:
        raise ValueError(f"--out {args.out} holds files already, which could be another model's; "
                         "give a new folder, or empty this one")


def main():
    parser = sample.common_arguments(sample.ArgumentParser(description=__doc__.splitlines()[0]))
    add, files = parser.add_argument, {"action": "append", "default": [], "metavar": "FILE"}
    add("--data", help="training samples, JSONL", required=True, **files)
    add("--exclude", help="evaluation problems, which are left out of the training", **files)
    add("--samples", type=sample.positive, action="append", help="of each --data, in order")
    add("--out", type=Path, required=True, help="folder to write")
    add("--epochs", type=sample.positive, default=1, help="default: %(default)s")
    add("--lr", type=float, default=3e-4, help="default: %(default)s")
    add("--batch-size", type=sample.positive, default=16, help="default: %(default)s")
    add("--micro-batch", type=sample.positive, default=8, help="default: %(default)s")
    add("--max-tokens", type=int, default=512, help="drop longer samples (default: %(default)s)")
    add("--save-every", type=sample.positive, default=50, help="steps (default: %(default)s)")
    add("--resume", action="store_true", help="only go on, if an interrupted run left a state")
    add("--fresh", action="store_true", help="start anew where an interrupted run left one")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    source = resolve(args.model or sample.BUNDLED)
    check(args, source)
    model, tokenizer = sample.load(args)
    samples = read_samples(args, tokenizer)
    checkpoint = distill.open_checkpoint(args, settings_of(args, model, samples), sys.stdout)
    print(f"Fine-tuning {source} ({model.dtype}) on {args.device}: {len(samples)} samples, "
          f"{args.epochs} epochs in batches of {args.batch_size}.", flush=True)
    model.requires_grad_(True)
    train(model, samples, args, checkpoint)
    checksum = save(model, source, args.out)
    checkpoint.file.unlink()
    print(json.dumps({"folder": str(args.out), "sha256": checksum}))


def settings_of(args, model, samples):
    """What a run depends on, {name: value}, for its Checkpoint: flags, contents of data, model."""
    flags = ("dtype", "seed", "epochs", "lr", "batch_size", "micro_batch")
    settings = {flag: getattr(args, flag) for flag in flags}
    settings["training samples"] = hashlib.sha256(repr(samples).encode()).hexdigest()[:16]
    return settings | {"model": caprese.fingerprint(model)}


if __name__ == "__main__":
    sample.run_command(main)
