"""What a GPU punishes in a decode step, found without one. Run: python -m pytest tests/test_step.py

A captured graph replays kernels on fixed addresses. So a step must not wait for the device, must
not make a tensor whose size depends on values, and must not mix devices.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import caprese
import sample
from model import Step

METHODS = ["full", *caprese.METHODS]
# What reads a value on the host, or has an output whose size depends on values.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero",
           "equal", "bincount", "repeat_interleave.Tensor")


class NoWaiting(TorchDispatchMode):
    """Refuses every operation that a captured graph could not hold; counts the others."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.removesuffix(".default")
        if name in WAITING or name.split(".")[0] in WAITING:
            raise AssertionError(f"a decode step waits for the device: {name}")
        if name.startswith("index"):
            tensors = [t for arg in args if isinstance(arg, (list, tuple)) for t in arg]
            if any(t is not None and t.dtype == torch.bool for t in tensors
                   if t is None or isinstance(t, torch.Tensor)):
                raise AssertionError(f"a decode step indexes by a mask: {name}")
        self.count += 1
        return function(*args, **kwargs or {})


def attach(model, method):
    if method != "full":
        tiny.fill(caprese.attach(model, method, 0.4, rank=6))
    return model


@pytest.mark.parametrize("lengths", [[9], [9, 5, 7]], ids=["alone", "ragged"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.VARIANTS)
def test_a_step_waits_for_nothing(family, method, lengths, device):
    model = attach(tiny.model(device=device, **tiny.VARIANTS[family]), method)
    step, _ = sample.prefill(model, tiny.tokens(len(lengths), 9, device=device), 11, lengths)
    token = torch.zeros(len(lengths), dtype=torch.long, device=device)
    with caprese.phase(model, "sparse"), NoWaiting() as mode:
        step.tokens[:, 0] = token
        step.run(num_keys=20)
    assert mode.count > 50  # the operations were seen


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 0],
    lambda x: torch.equal(x, x)])
def test_the_guard_sees_what_waits(wait):
    with NoWaiting(), pytest.raises(AssertionError, match="a decode step"):
        wait(torch.ones(3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.VARIANTS)
def test_a_step_stays_on_the_models_device(family, method):
    """The meta device refuses to meet tensors of the CPU, as a GPU does."""
    model = attach(tiny.model(**tiny.VARIANTS[family]), method)
    sample.prefill(model, tiny.tokens(1, 9), 11)
    model.to("meta")
    step = Step(model, model.new_cache(1, 20))
    with caprese.phase(model, "sparse"):
        logits = step(torch.zeros(1, dtype=torch.long, device="meta"))
        assert logits.device.type == step.run(num_keys=20).device.type == "meta"
    assert logits.shape == (1, tiny.CONFIG["vocab_size"])


@pytest.mark.slow
def test_the_gpu_check_reports_failures_and_goes_on(tmp_path):
    """On a CPU, where a step is never captured; a card that is not there is one part's error."""
    script, file = Path(__file__).with_name("gpu_check.py"), tmp_path / "found.json"
    flags = ["--parts", "environment", "capture", "--out", str(file)]
    for device, failing in (("cpu", False), ("cuda:99", True)):
        done = subprocess.run([sys.executable, str(script), "--device", device, *flags],
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout)
        assert results == json.loads(file.read_text()) and list(results) == flags[1:3]
        assert ("error" in results["environment"]["result"]) == failing
        capture = results["capture"]["result"]
        assert capture["compared"] == 25 and len(capture["failures"]) == (25 if failing else 0)


@pytest.mark.slow
def test_a_suite_that_takes_too_long_keeps_what_it_printed(monkeypatch):
    import gpu_check
    monkeypatch.setattr(gpu_check, "SUITE_SECONDS", 25)
    found = gpu_check.suite(argparse.Namespace(device="cpu"))
    assert found["exit_code"] is None and "tests/test_" in found["last_line"]
