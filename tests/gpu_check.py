"""All that needs a GPU, in one command of at most 8 minutes: python tests/gpu_check.py

It needs torch and this repository only; the test suite is one of its parts and needs pytest and
safetensors. It prints one JSON object: an entry for each part with its result or its error, and its
seconds. A part that fails does not stop the others. With --out the object is also written to a file
after each part, so that nothing is lost if the machine goes away.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
try:
    import tqdm  # noqa: F401
except ImportError:  # a bare machine: bars are not needed
    sys.modules["tqdm"] = types.SimpleNamespace(tqdm=lambda steps, *args, **kwargs: steps)

import torch  # noqa: E402

import bench  # noqa: E402
import caprese  # noqa: E402
import data  # noqa: E402
import distill  # noqa: E402
import sample  # noqa: E402
import tiny  # noqa: E402
from model import Step  # noqa: E402

METHODS = ("full", *caprese.METHODS)
SUITE_SECONDS = 240


def environment(args):
    """What this is: torch, card, driver."""
    about = {"torch": torch.__version__, "device": args.device}
    if args.device.startswith("cuda"):
        card = torch.cuda.get_device_properties(args.device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        about |= {"card": card.name, "memory_GB": card.total_memory / 1e9, "driver": driver,
                  "cuda": torch.version.cuda}
    return about


def suite(args):
    """The test suite on the device: pytest's last line, and the tests that failed so far."""
    command = [sys.executable, "-m", "pytest", "-v", "--maxfail=30", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=SUITE_SECONDS,
                              env=os.environ | {"CAPRESE_TEST_DEVICE": args.device})
        exit_code, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        exit_code, output, errors = None, stopped.stdout or b"", stopped.stderr or b""
    lines = output.decode().strip().splitlines() or [errors.decode().strip()[-2000:]]
    failed = [line for line in lines if re.search(r"::.* (FAILED|ERROR)", line)]
    return {"exit_code": exit_code, "last_line": lines[-1], "failed": failed,
            "output": "\n".join(lines)[-4000:] if failed else ""}


def eager(step, tokens):
    """A decode step that is never captured."""
    step.tokens[:, 0] = tokens
    return step.run()


def answers(family, method, device):
    """Greedy tokens of two prompts with reselections, by two adapters of different ranks."""
    model, found = tiny.model(device=device, **tiny.VARIANTS[family]), []
    for rank in (6, 4):
        if method != "full":
            tiny.fill(caprese.attach(model, method, 0.4, rank=rank))
        for seed in (2, 3):
            prompt = tiny.tokens(1, 9, seed=seed, device=device)
            found.append(sample.generate(model, prompt, 24, reselect=7).tolist())
    return found


def capture(args):
    """Tokens by captured graphs against tokens by eager steps: every family and method."""
    failures, captured_step = [], Step.__call__
    for family in tiny.VARIANTS:
        for method in METHODS:
            try:
                by_graphs = answers(family, method, args.device)
                Step.__call__ = eager
                if by_graphs != answers(family, method, args.device):
                    failures.append(f"{family} {method}: other tokens than by eager steps")
            except Exception as error:
                failures.append(f"{family} {method}: {type(error).__name__}: {error}")
            finally:
                Step.__call__ = captured_step
    return {"compared": len(tiny.VARIANTS) * len(METHODS), "failures": failures}


def latency(args):
    """bench.py's table of two shapes; on a CPU of the small one, shortened."""
    results = {}
    on_gpu = args.device.startswith("cuda")
    flags = ["--prompt", "2048", "--generate", "128"] if on_gpu else ["--generate", "4"]
    for shape in ("r1-distill-qwen-1.5b", "llama-3.1-8b") if on_gpu else ("smollm2-135m",):
        settings = bench.arguments(["--shape", shape, "--device", args.device, "--dtype",
                                    "bfloat16", "--repeats", "3" if on_gpu else "1", *flags])
        model = bench.make_model(settings)
        results[shape] = bench.measure(model, bench.variants(settings), settings)
        del model
    return results


def memory(args):
    """One end-to-end step with gradient checkpointing: peak memory and tokens per second."""
    on_gpu = args.device.startswith("cuda")
    shape, length, count = ("llama-3.1-8b", 2048, 4) if on_gpu else ("smollm2-135m", 64, 2)
    prompt_length = length // 16
    model = bench.random_model(bench.SHAPES[shape], args.device, torch.bfloat16)
    caprese.attach(model, "griffin", rank=256 if on_gpu else 16)
    ids = torch.randint(1000, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [(row[:prompt_length], row[prompt_length:]) for row in ids]
    batch = data.collate(samples, range(count), args.device)
    model.model.gradient_checkpointing = True
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = bench.clock(model.device)
    loss = distill.e2e_backward(model, batch, int(batch.response.sum()), "kl")
    seconds = bench.clock(model.device) - start
    weights = sum(p.nbytes for p in model.parameters())
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    return {"shape": shape, "tokens": count * length, "loss": loss, "seconds": seconds,
            "tokens_per_second": count * length / seconds, "weights_GB": weights / 1e9,
            "peak_GB": peak}


PARTS = (environment, capture, memory, latency, suite)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="file to write after each part as well")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS])
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results = {}
    for part in PARTS:
        if args.parts and part.__name__ not in args.parts:
            continue
        start = time.perf_counter()
        try:
            result = part(args)
        except Exception as error:  # every failure is reported, and the rest goes on
            result = {"error": f"{type(error).__name__}: {error}",
                      "traceback": traceback.format_exc()[-3000:]}
        seconds = round(time.perf_counter() - start, 1)
        results[part.__name__] = {"seconds": seconds, "result": result}
        print(f"{part.__name__}: {seconds} s", file=sys.stderr, flush=True)
        if args.out:
            temporary = Path(f"{args.out}.tmp")
            temporary.write_text(json.dumps(results), encoding="utf-8")
            temporary.replace(args.out)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
