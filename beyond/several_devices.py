"""Distil on several devices: torchrun --nproc_per_node=N -m beyond.several_devices ...

It takes the flags of distill.py. Each process holds the same L and R, takes its part of every batch
and adds its sums to those of the others, so that they learn what one process learns. With --fsdp
the base weights are spread over the devices, for where one device cannot hold them.
"""

import os
import sys

import torch
import torch.distributed as dist

import data
import distill
import sample
from model import Transformer, resolve


def arguments(argv=None):
    """(the flags of distill.py, is --fsdp given); ValueError for bad ones, or without torchrun."""
    parser = sample.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--fsdp", action="store_true")
    own, others = parser.parse_known_args(argv)
    args = distill.arguments(others)
    if "WORLD_SIZE" not in os.environ:
        raise ValueError("start it by torchrun --nproc_per_node=N -m beyond.several_devices ...")
    return args, own.fsdp


def load_onto_cpu(args):
    """(model, tokenizer) as sample.load gives them, but with the weights on the CPU."""
    sample.check_device(args.device)
    folder = resolve(args.model or sample.BUNDLED)
    model = Transformer.from_pretrained(folder, "cpu", sample.choose_dtype(args))
    return model, data.Tokenizer(folder)


def shard(model, device):
    """Spread the weights of every layer over the devices; what is no layer is whole on each.

    Returns the fraction of the layers' weights that this process holds.
    """
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    model.to(device)  # the part of each layer that this process holds, and the rest
    weights = list(model.model.layers.parameters())
    return sum(p.to_local().numel() for p in weights) / sum(p.numel() for p in weights)


def run(args, fsdp):
    """distill.distill() in one of torchrun's processes."""
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group()  # gloo for tensors on a CPU, nccl on CUDA

    def begin(model):
        dist.barrier()  # no process writes a checkpoint before all have looked for one
        if fsdp:
            held = shard(model, args.device)
            print(f"The first device holds {held:.0%} of the layers' weights.",
                  file=sys.stderr if args.json else sys.stdout)

    load = load_onto_cpu if fsdp else sample.load
    distill.distill(args, load, begin)
    dist.destroy_process_group()


def main():
    """Run; the first process prints, and the others print their errors alone.

    No process ends in Python's usual way. After an error it must end at once, for the others wait
    for it, and torchrun ends them then. At Python's own end gloo's threads may abort a process that
    has done all its work (PyTorch #190489).
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")
    args, fsdp = arguments()
    try:
        run(args, fsdp)
    except Exception as error:
        message = f"error in rank {rank}: {type(error).__name__}: {error}"
        print(message, file=sys.__stderr__, flush=True)
        os._exit(2)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sample.run_command(main)
