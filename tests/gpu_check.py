"""All that needs a GPU, in one command of at most 8 minutes: python tests/gpu_check.py

It needs torch, numpy and this repository only; the test suite is one of its parts and needs pytest,
safetensors and tokenizers. It prints lines on stderr as it goes, and at the end one JSON object: an
entry for each part with its result or its error, and its seconds. A part that fails does not stop
the others, but the exit code is 1 then. With --out the object is also written to a file after each
part, so that nothing is lost if the machine goes away. --device cpu is a dry run on tiny shapes:
there plain steps stand in for graphs.
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
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


class Bar:
    """In place of tqdm's bar."""

    def __init__(self, steps, *args, **settings):
        self.steps = steps

    def __iter__(self):
        return iter(self.steps)

    def set_postfix(self, **settings):
        pass


try:
    import tqdm  # noqa: F401
except ImportError:  # a bare machine: bars are not needed
    sys.modules["tqdm"] = types.SimpleNamespace(tqdm=Bar)
try:
    import safetensors  # noqa: F401
except ImportError:  # nor are files
    sys.modules["safetensors"] = types.SimpleNamespace(SafetensorError=OSError, safe_open=None)
    sys.modules["safetensors.torch"] = types.SimpleNamespace(save_file=None)

import torch  # noqa: E402

import bench  # noqa: E402
import caprese  # noqa: E402
import data  # noqa: E402
import distill  # noqa: E402
import sample  # noqa: E402
import tiny  # noqa: E402

METHODS = ("full", *caprese.METHODS)
SUITE_SECONDS = 240


def say(line):
    print(line, file=sys.stderr, flush=True)


def on_gpu(args):
    return args.device.startswith("cuda")


def graphed(model):
    """The model whose decode steps are graphs; on a CPU the model itself."""
    if model.device.type != "cuda":
        return model
    from beyond.cuda_graphs import Graphed
    return Graphed(model)


def environment(args):
    """What this is: torch, card, driver."""
    about = {"torch": torch.__version__, "device": args.device}
    if on_gpu(args):
        card = torch.cuda.get_device_properties(args.device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        about |= {"card": card.name, "memory_GB": card.total_memory / 1e9, "driver": driver,
                  "cuda": torch.version.cuda}
    say(f"  {about}")
    return about


# ---- graphs against plain steps

def answers(model, method):
    """Greedy tokens of two prompts with reselections, by two adapters of different ranks."""
    found = []
    for rank in (6, 4):
        if method != "full":
            tiny.fill(caprese.attach(model, method, 0.4, rank=rank))
        for seed in (2, 3):
            prompt = tiny.tokens(1, 9, seed=seed, device=model.device)
            found.append(sample.generate(model, prompt, 24, reselect=7).tolist())
    return found


def capture(args):
    """Tokens by captured graphs against tokens by plain steps: every family and method."""
    failures = []
    for family, changes in tiny.VARIANTS.items():
        for method in METHODS:
            try:
                model = tiny.model(device=args.device, **changes)
                plain = answers(model, method)
                if answers(graphed(tiny.model(device=args.device, **changes)), method) != plain:
                    failures.append(f"{family} {method}: other tokens than by plain steps")
            except Exception as error:
                failures.append(f"{family} {method}: {type(error).__name__}: {error}")
    compared = len(tiny.VARIANTS) * len(METHODS)
    say(f"  graphs give the tokens of plain steps in {compared - len(failures)} of {compared} "
        "pairs of family and method")
    for failure in failures:
        say(f"  {failure}")
    return {"compared": compared, "failures": failures}


def decoding(args):
    """Plain steps, graphs, bandwidth and GRIFFIN + Caprese in bfloat16 at batch 1."""
    shape, length, generated, repeats = ("qwen2.5-14b", "2048", 128, 3)
    if not on_gpu(args):
        shape, length, generated, repeats = ("smollm2-135m", "16", 4, 1)
    settings = bench.arguments(["--shape", shape, "--device", args.device, "--dtype", "bfloat16",
                                "--prompt", length])
    model = bench.make_model(settings)
    kinds = {"plain steps": model, "graphs": graphed(model)}  # the same weights
    prompt = bench.make_prompt(model, settings)
    rows = bench.variants(settings)
    names = ("full", "GRIFFIN", "GRIFFIN + Caprese")
    runs = {(f"{name}, {kind}", generated): partial(
                bench.run_row, kinds[kind], rows[name], prompt, generated, None)
            for name in names for kind in kinds}
    rounds = bench.take_turns(runs, repeats, model.device)
    results = {name: bench.result(name, n, rounds) for name, n in runs}

    def ratio(one, other):
        return bench.median_ratio(rounds[one, generated], rounds[other, generated])

    ratios = {"graphs over plain steps": ratio("full, graphs", "full, plain steps")}
    for kind in kinds:
        full, sparse = f"full, {kind}", f"GRIFFIN + Caprese, {kind}"
        ratios[f"GRIFFIN + Caprese over full, {kind}"] = ratio(sparse, full)
        ratios[f"GRIFFIN + Caprese over GRIFFIN, {kind}"] = ratio(sparse, f"GRIFFIN, {kind}")
        row = results[full]
        say(f"  {full}: {row['ms per token']:.2f} ms per token on the {shape} shape; at the "
            f"memory's {row['memory GB/s']:.0f} GB/s of a copy its bytes take "
            f"{row['bound ms']:.2f}, so {row['bandwidth reached']:.0%} of it is reached")
    allowed = results["GRIFFIN + Caprese, plain steps"]["ratio bytes allow"]
    for name, value in ratios.items():
        say(f"  time per token, {name}: {value:.3f}")
    say(f"  the bytes allow GRIFFIN + Caprese over full: {allowed:.3f}")
    row = results["GRIFFIN + Caprese, plain steps"]
    say(f"  the selection takes {row['selection s'] / row['prefill s']:.1%} of a prefill of "
        f"{length} tokens")
    return {"shape": shape, "ratios": ratios, "rows": results}


def compiled(args):
    """Tokens of transformers by a static cache, whose step a GPU compiles, against plain ones."""
    try:
        import transformers
    except ImportError:
        say("  transformers is not installed: left out")
        return {"left_out": "transformers is not installed"}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**tiny.CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config).to(args.device).eval()
    tiny.fill(caprese.attach(model, "griffin", 0.4, rank=6))
    prompt, found = tiny.tokens(1, 9, device=args.device), []
    for cache in (None, "static"):
        found.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0,
                                    max_new_tokens=24, min_new_tokens=24, do_sample=False,
                                    cache_implementation=cache).tolist())
    say(f"  transformers {transformers.__version__}: "
        f"{'equal' if found[0] == found[1] else 'OTHER'} tokens by a static cache")
    return {"failures": [] if found[0] == found[1] else found}


# ---- distillation

def random_samples(model, count, length):
    """`count` samples of `length` tokens, of which a sixteenth are the prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (count, length), generator=generator).tolist()
    return [(row[:length // 16], row[length // 16:]) for row in ids]


def learning(args):
    """The distance from a tiny full model, before and after each stage; it must fall."""
    model = caprese.attach(tiny.model(device=args.device), "griffin", rank=8)
    samples = random_samples(model, 64, 48)
    distances = {"sparse": distill.kl_to_full(model, samples)}
    distill.fit_closed_form(model, list(data.batches(samples, 16, model.device)))
    distances["closed form"] = distill.kl_to_full(model, samples)
    distill.train_end_to_end(model, samples, lr=3e-3, epochs=4, batch_size=16, loss="kl")
    distances["closed form + E2E"] = distill.kl_to_full(model, samples)
    say("  KL to the full model: " + ", ".join(f"{name} {distances[name]:.4f}"
                                               for name in distances))
    if not distances["sparse"] > distances["closed form"] > distances["closed form + E2E"] > 0:
        raise ValueError(f"the distance did not fall: {distances}")
    return distances


def memory(args):
    """(7) in closed form, and a step of (8) with gradient checkpointing: peak memory, seconds."""
    shape, length, count, rank = ("llama-3.1-8b", 2048, 4, 256)
    if not on_gpu(args):
        shape, length, count, rank = ("smollm2-135m", 64, 2, 16)
    model = bench.random_model(bench.SHAPES[shape], args.device, torch.bfloat16)
    caprese.attach(model, "griffin", rank=rank)
    samples = random_samples(model, count, length)
    weights = sum(p.nbytes for p in model.parameters())
    about = {"shape": shape, "tokens": count * length, "weights_GB": weights / 1e9}
    batches = list(data.batches(samples, 1, model.device))
    stages = {
        "closed form": partial(distill.fit_closed_form, model, batches),
        "E2E": partial(distill.train_end_to_end, model, samples, epochs=1, batch_size=count,
                       micro_batch=count, gradient_checkpointing=True)}
    for name, stage in stages.items():
        if on_gpu(args):
            torch.cuda.reset_peak_memory_stats(model.device)
        seconds = bench.seconds(model.device, stage, 1)[0]
        peak = torch.cuda.max_memory_allocated(model.device) / 1e9 if on_gpu(args) else None
        about[name] = {"seconds": seconds, "tokens_per_second": count * length / seconds,
                       "peak_GB": peak}
        known = f"{peak:.1f} GB" if on_gpu(args) else "unknown"
        say(f"  {name}, {about['tokens']} tokens on the {shape} shape: {seconds:.1f} s, peak "
            f"memory {known}, weights {weights / 1e9:.1f} GB")
    return about


# ---- the tests

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
    for line in [*failed, lines[-1]]:
        say(f"  {line}")
    return {"exit_code": exit_code, "last_line": lines[-1], "failed": failed,
            "output": "\n".join(lines)[-4000:] if failed else ""}


PARTS = (environment, capture, compiled, learning, decoding, memory, suite)


def has_failed(result):
    """Does the result of a part say that something is wrong?"""
    return bool("error" in result or result.get("failures") or result.get("exit_code", 0) != 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="file to write after each part as well")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS])
    args = parser.parse_args()
    sample.check_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results = {}
    for part in PARTS:
        if args.parts and part.__name__ not in args.parts:
            continue
        say(f"{part.__name__}: {part.__doc__.splitlines()[0]}")
        start = time.perf_counter()
        try:
            result = part(args)
        except Exception as error:  # every failure is reported, and the rest goes on
            result = {"error": f"{type(error).__name__}: {error}",
                      "traceback": traceback.format_exc()[-3000:]}
            say(f"  {result['error']}")
        seconds = round(time.perf_counter() - start, 1)
        results[part.__name__] = {"seconds": seconds, "result": result}
        verdict = "FAILED" if has_failed(result) else "passed"
        say(f"{part.__name__}: {verdict} in {seconds} s")
        if args.out:
            temporary = Path(f"{args.out}.tmp")
            temporary.write_text(json.dumps(results), encoding="utf-8")
            temporary.replace(args.out)
    print(json.dumps(results))
    sys.exit(any(has_failed(entry["result"]) for entry in results.values()))


if __name__ == "__main__":
    sample.run_command(main)
