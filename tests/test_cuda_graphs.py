"""beyond/cuda_graphs.py, and what a GPU punishes in a decode step, found without one.

A captured graph replays kernels on fixed addresses. So a step must not wait for the device, must
not make a tensor whose size depends on values, and must not mix devices. Run:
python -m pytest tests/test_cuda_graphs.py
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import caprese
import sample
from beyond import cuda_graphs
from beyond.cuda_graphs import GraphCache, Graphed, keys_to_read
from model import Transformer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
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


# ---- without a GPU: a graph that does with plain PyTorch what a captured one does

class FakeGraph:
    """Replays a step on the cache's tensors of the time of its capture, into the same logits."""

    def __init__(self, graphed, cache, num_keys):
        self.graphed, self.num_keys = graphed, num_keys
        self.cache = copy.copy(cache)
        self.cache.k, self.cache.v = list(cache.k), list(cache.v)
        self.cache.max_length = -10 ** 6  # nothing on the host may matter
        self.logits = torch.empty(len(cache.tokens), graphed.config.vocab_size,
                                  device=cache.tokens.device, dtype=graphed.dtype)

    def replay(self):
        has_run = self.graphed.watch.has_run  # a real graph runs no hook
        self.logits.copy_(self.graphed.fixed_step(self.cache, self.num_keys))
        self.graphed.watch.has_run = has_run


@pytest.fixture
def graphed(monkeypatch, device):
    """A function: Transformer -> Graphed, with fake graphs; `captures` of it is their number."""
    def capture(self, cache, num_keys):
        make.captures += 1
        self.first_step(cache, num_keys)
        graph = FakeGraph(self, cache, num_keys)
        return graph, graph.logits

    def make(model):
        with monkeypatch.context() as context:
            context.setattr(Transformer, "device", SimpleNamespace(type="cuda"))
            return Graphed(model)
    make.captures = 0
    monkeypatch.setattr(Graphed, "capture", capture)
    return make


def attach(model, method, density=0.4, rank=6):
    """Set up one of METHODS, its correction filled with numbers that matter."""
    if method != "full":
        tiny.fill(caprese.attach(model, method, density, rank=rank))
    return model


def prefilled(model, lengths, device, capacity=20):
    """A GraphCache that holds prompts of these lengths, from which the model has selected."""
    prompts = tiny.tokens(len(lengths), max(lengths), device=device)
    cache = GraphCache(model.config, len(lengths), capacity, model.device, model.dtype)
    lengths = torch.tensor(lengths, device=device)
    caprese.reset(model)
    counted = torch.arange(prompts.shape[1], device=device) < lengths[:, None]
    with caprese.phase(model, "count", counted=counted):
        model.model(prompts, cache)
    cache.set_lengths(lengths)
    caprese.select(model)
    return cache


def test_a_model_that_is_not_on_cuda_is_refused():
    with pytest.raises(ValueError, match="on a CUDA device, and this one is on cpu"):
        Graphed(tiny.model())


# ---- the step that is captured

@pytest.mark.parametrize("lengths", [[9], [9, 5, 7]], ids=["alone", "ragged"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.VARIANTS)
def test_a_step_of_fixed_num_keys_equals_the_ordinary_one(family, method, lengths, graphed, device):
    """Positions from the device, a fixed number of keys, a mask; and nothing moves."""
    model = attach(tiny.model(device=device, **tiny.VARIANTS[family]), method)
    steps = graphed(model)
    found = []
    for num_keys in (None, 20):
        cache = prefilled(model, lengths, device)
        read = [cache.k[0], cache.v[-1], cache.lengths, cache.tokens]
        addresses = [tensor.data_ptr() for tensor in read]
        logits = []
        for tokens in tiny.tokens(len(lengths), 6, seed=4, device=device).T:
            cache.tokens.copy_(tokens)
            with caprese.phase(model, "decode"):
                if num_keys:
                    logits.append(steps.fixed_step(cache, num_keys))
                else:
                    logits.append(model.decode(tokens, cache))
        found.append(torch.stack(logits))
        read = [cache.k[0], cache.v[-1], cache.lengths, cache.tokens]
        assert addresses == [tensor.data_ptr() for tensor in read]
        assert cache.lengths.tolist() == [length + 6 for length in lengths]
        assert cache.fixed_num_keys is None and cache.ragged == (len(lengths) > 1)
    assert_close(*found, **CLOSE)


@pytest.mark.parametrize("lengths", [[9], [9, 5, 7]], ids=["alone", "ragged"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.VARIANTS)
def test_a_step_waits_for_nothing(family, method, lengths, graphed, device):
    model = attach(tiny.model(device=device, **tiny.VARIANTS[family]), method)
    steps, cache = graphed(model), prefilled(model, lengths, device)
    with caprese.phase(model, "decode"), NoWaiting() as mode:
        steps.fixed_step(cache, num_keys=20)
    assert mode.count > 50  # the operations were seen


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 0],
    lambda x: torch.equal(x, x)])
def test_the_guard_sees_what_waits(wait):
    with NoWaiting(), pytest.raises(AssertionError, match="a decode step"):
        wait(torch.ones(3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.VARIANTS)
def test_a_step_stays_on_the_models_device(family, method, graphed):
    """The meta device refuses to meet tensors of the CPU, as a GPU does."""
    model = attach(tiny.model(**tiny.VARIANTS[family]), method)
    prefilled(model, [9], "cpu")
    model.to("meta")
    cache = GraphCache(model.config, 1, 20, model.device, model.dtype)
    with caprese.phase(model, "decode"):
        ordinary = model.decode(torch.zeros(1, dtype=torch.long, device="meta"), cache)
        fixed = graphed(model).fixed_step(cache, num_keys=20)
    assert ordinary.device.type == fixed.device.type == "meta"
    assert ordinary.shape == fixed.shape == (1, tiny.CONFIG["vocab_size"])


def test_a_step_that_fails_leaves_the_cache_as_it_was(graphed, monkeypatch):
    model = tiny.model()
    cache = GraphCache(model.config, 2, 20, model.device, model.dtype)
    cache.tokens[0] = 1000
    with pytest.raises(ValueError, match="1000"):
        graphed(model).fixed_step(cache, 20)
    assert cache.fixed_num_keys is None and not cache.ragged and cache.max_length == 0


def test_num_keys_follow_the_cache_closely():
    """Never too few, at most an eighth too many beyond 2048, and few different numbers."""
    seen = []
    for length in range(1, 33001, 7):
        seen.append(keys_to_read(length, 33000))
        assert length <= seen[-1] <= min(33000, max(length + 255, length * 1.13))
    assert len(set(seen)) < 50


def test_what_does_not_fit_the_cache_is_refused(graphed):
    model = graphed(tiny.model(max_position_embeddings=16))
    cache = model.new_cache(1, 12)
    assert cache.capacity == 16
    model.model(tiny.tokens(1, 15), cache)
    model.decode(tiny.tokens(1, 1)[0], cache)
    with pytest.raises(ValueError, match="room for 16 "):
        model.decode(tiny.tokens(1, 1)[0], cache)
    assert cache.max_length == 16


# ---- the whole

def test_in_all_else_it_is_the_transformer(graphed, device):
    model = tiny.model(device=device)
    other = graphed(model)
    tokens = tiny.tokens(2, 5, device=device)
    assert torch.equal(other(tokens), model(tokens))
    assert other.config is model.config and other.model is model.model
    assert other.dtype == model.dtype and other.device == model.device
    with pytest.raises(AttributeError):
        other.absent


@pytest.mark.parametrize("reselect", [None, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [
    family if family in ("mistral", "gemma2") else pytest.param(family, marks=pytest.mark.slow)
    for family in tiny.VARIANTS])
def test_graphs_generate_the_same_tokens(family, method, reselect, graphed, device):
    """Alone, in a ragged batch, several samples; the second prompt on the memory of the first."""
    model = attach(tiny.model(device=device, **tiny.VARIANTS[family]), method)
    steps = graphed(model)
    batch, lengths = tiny.tokens(3, 9, device=device), torch.tensor([9, 5, 7], device=device)
    for seed in (2, 3):
        prompt = tiny.tokens(1, 9, seed=seed, device=device)
        for settings in ({"tokens": prompt}, {"tokens": prompt, "samples": 3},
                         {"tokens": batch, "prompt_lengths": lengths}):
            settings |= {"max_new_tokens": 8, "reselect": reselect}
            expected = sample.generate(model, **settings)
            assert torch.equal(sample.generate(steps, **settings), expected)
    assert graphed.captures


def test_rows_that_leave_are_recorded_anew(graphed, device):
    model, tokens = tiny.model(device=device), tiny.tokens(3, 6, device=device)
    steps = graphed(model)
    plain, cache = model.new_cache(3, 12), steps.new_cache(3, 12)
    for rows in (None, [2, 0], [1]):
        for each in (plain, cache):
            if rows is None:
                model.model(tokens, each)
            else:
                each.reorder(torch.tensor(rows, device=device))
        for new in range(2):
            fed = tokens[:len(cache.tokens), new]
            assert_close(steps.decode(fed, cache), model.decode(fed, plain), **CLOSE)
    assert graphed.captures == 3  # one for each number of rows
    assert cache.lengths.tolist() == [12]
    assert steps.last is None  # nobody holds the memory of the three rows


@pytest.mark.parametrize("phase", ["full", "decode"])
def test_a_graph_is_of_one_phase(phase, graphed, device):
    """The full model's step never replays what was recorded of the sparse one."""
    model = attach(tiny.model(device=device), "griffin")
    steps = graphed(model)
    cache = prefilled(model, [9], device)
    token = tiny.tokens(1, 1, device=device)[0]
    found = {}
    for name in ("decode", "full", phase):
        with caprese.phase(model, name):
            found[name] = steps.decode(token, cache).clone()
            cache.advance(-1)
            assert_close(found[name], model.decode(token, cache), **CLOSE)
            cache.advance(-1)
    assert not torch.allclose(found["decode"], found["full"], atol=1e-2)
    assert graphed.captures == 2


def test_what_counts_is_never_a_graph(graphed, device):
    model = attach(tiny.model(device=device), "griffin")
    steps, cache = graphed(model), prefilled(model, [9], device)
    with caprese.phase(model, "count"):
        steps.decode(tiny.tokens(1, 1, device=device)[0], cache)
    assert graphed.captures == 0 and cache.max_length == 10


# ---- memory and graphs serve again, where that is right

def test_a_cache_serves_again_only_where_it_fits(graphed, device):
    """The same number of rows, enough room, nobody else holds it; and it starts from nothing."""
    model = graphed(attach(tiny.model(device=device, max_position_embeddings=3000), "griffin"))
    prompt = tiny.tokens(1, 6, device=device)
    expected = sample.generate(model, prompt, 8)
    memory, captures = model.last.k[0].data_ptr(), graphed.captures
    assert model.last.capacity == 1024
    for _ in range(2):  # another model run between, so that old keys lie in the memory
        sample.generate(model, tiny.tokens(1, 12, seed=5, device=device), 8)
        assert torch.equal(sample.generate(model, prompt, 8), expected)
    assert model.last.k[0].data_ptr() == memory
    cache = model.new_cache(1, 1024)
    assert cache.k[0].data_ptr() == memory and cache.max_length == 0 and not cache.ragged
    assert cache.lengths.tolist() == [0] and cache.graphs is model.last.graphs
    second = model.new_cache(1, 20)  # the first is in use
    assert second.k[0].data_ptr() != memory and second.graphs is not cache.graphs
    del second
    gc.collect()
    assert model.new_cache(1, 1025).capacity == 2048
    assert model.new_cache(2, 20).lengths.tolist() == [0, 0]
    assert model.new_cache(1, 4000).capacity == 4000  # beyond the context, which sample.py refuses
    assert graphed.captures >= captures


def test_two_streams_do_not_mix(graphed, device):
    model = graphed(tiny.model(device=device))
    prompts = [tiny.tokens(1, 9, seed=seed, device=device) for seed in (2, 3)]
    expected = [sample.generate(model, prompt, 6).flatten().tolist() for prompt in prompts]
    streams = [sample.stream(model, prompt, 6) for prompt in prompts]
    found = [[int(token) for token in tokens] for tokens in zip(*streams)]
    assert [list(tokens) for tokens in zip(*found)] == expected


def load_other_weights(model):
    attach(model, "griffin")  # as it was
    other = attach(tiny.model(seed=5, device=model.device), "griffin")
    model.load_state_dict(other.state_dict(), assign=True)


def set_other_rank(model):
    for ff in caprese.sparse_layers(model).values():
        ff.set_adapter(L=torch.ones(32, 3), R=torch.ones(3, 32))


def replace_a_norm(model):
    model.model.norm = copy.deepcopy(model.model.norm)


class Doubled(torch.nn.Module):
    """Another function of the same weights."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def replace_a_module_alone(model):
    model.model.layers[3].mlp = Doubled(model.model.layers[3].mlp)


@pytest.mark.parametrize("change", [
    set_other_rank, load_other_weights, caprese.detach, replace_a_norm, replace_a_module_alone,
    lambda model: attach(model, "griffin", 0.7), lambda model: attach(model, "cats")])
def test_a_graph_does_not_outlive_what_it_reads(change, graphed, device):
    model, prompt = attach(tiny.model(device=device), "griffin"), tiny.tokens(1, 6, device=device)
    steps = graphed(model)
    sample.generate(steps, prompt, 8)
    captures, version = graphed.captures, steps.version
    change(model)
    expected = sample.generate(model, prompt, 8)
    assert torch.equal(sample.generate(steps, prompt, 8), expected)
    assert graphed.captures == captures + 1 and steps.version > version
    assert {key[0] for key in steps.last.graphs} == {steps.version}  # the old ones are let go


def test_a_tensor_that_no_step_reads_may_change(graphed, device):
    """GRIFFIN's statistic, and L and R of the compact path: a step reads copies of them."""
    model, prompt = attach(tiny.model(device=device), "griffin"), tiny.tokens(1, 6, device=device)
    steps = graphed(model)
    sample.generate(steps, prompt, 8)
    ff = caprese.sparse_layers(model)[0]
    ff.set_adapter(L=ff.L * 2, R=ff.R)  # of the same shape
    expected = sample.generate(model, prompt, 8)
    assert torch.equal(sample.generate(steps, prompt, 8), expected)
    assert graphed.captures == 1


@pytest.mark.parametrize("method", ["full", "griffin"])
def test_a_selection_keeps_what_graphs_read(method, graphed, device):
    """A prefill and a reselection write their choice where the last one stood."""
    model = attach(tiny.model(device=device), method)
    steps = graphed(model)
    for seed in (2, 3, 4):
        sample.generate(steps, tiny.tokens(1, 7, seed=seed, device=device), 8, reselect=3)
    assert graphed.captures == 1


def test_a_graphs_tensors_keep_their_storage(graphed, device):
    """So no new tensor can have an old address and pass for the one that the graph reads."""
    model, prompt = attach(tiny.model(device=device), "griffin"), tiny.tokens(1, 6, device=device)
    steps = graphed(model)
    sample.generate(steps, prompt, 3)
    read = steps.read
    addresses = {tensor.data_ptr() for tensor in read}
    ff = caprese.sparse_layers(model)[0]
    assert {ff.gate_k.data_ptr(), ff.up_k.data_ptr(), ff.down_k.data_ptr(),
            model.model.embed_tokens.weight.data_ptr()} <= addresses
    before = ff.up_k.clone()
    del ff
    for _ in range(3):
        attach(model, "griffin")
        sample.generate(model, prompt, 3)
        for ff in caprese.sparse_layers(model).values():
            assert not {ff.L.data_ptr(), ff.R.data_ptr(), ff.up_k.data_ptr()} & addresses
        del ff
    assert any(t.shape == before.shape and torch.equal(t, before) for t in read)


# ---- what capture asks of torch.cuda

class Stream:
    def __init__(self, device, log):
        self.device, self.log = device, log

    def wait_stream(self, other):
        self.log.append(("wait", self.device, other.device))


@pytest.mark.parametrize("index", [0, 1])
def test_a_step_is_captured_on_the_models_device(monkeypatch, index):
    """--device cuda:1: stream, warm-up and capture, with another device current before."""
    log, current = [], [0]

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device.index)

        def __exit__(self, *error):
            current.pop()

    def make_stream():
        return Stream(current[-1], log)

    def on_graph(graph, stream):
        log.append(("graph", current[-1], stream.device))
        return nullcontext()
    monkeypatch.setattr(Transformer, "device", torch.device("cuda", index))
    monkeypatch.setattr(cuda_graphs.torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(cuda_graphs.torch.cuda, "device", On)
    monkeypatch.setattr(cuda_graphs.torch.cuda, "Stream", make_stream)
    monkeypatch.setattr(cuda_graphs.torch.cuda, "current_stream", make_stream)
    monkeypatch.setattr(cuda_graphs.torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(cuda_graphs.torch.cuda, "graph", on_graph)
    model = tiny.model()
    cache = GraphCache(model.config, 2, 20, "cpu", torch.float32)
    model.model(tiny.tokens(2, 5), cache)
    graph, logits = Graphed(model).capture(cache, 20)
    assert graph == "graph" and logits.shape == (2, tiny.CONFIG["vocab_size"])
    assert log == [("wait", index, index), ("wait", index, index), ("graph", index, index)]
    assert current == [0]
    # Here the second step runs in earnest too. On a GPU it is recorded and lengths stay 5.
    assert cache.max_length == 5 and cache.lengths.tolist() == [6, 6]


# ---- tests/gpu_check.py

@pytest.mark.slow
def test_the_gpu_check_runs_on_a_cpu(tmp_path):
    """There a step is never captured. A card that is not there is one line, before any part."""
    script, file = Path(__file__).with_name("gpu_check.py"), tmp_path / "found.json"
    flags = ["--parts", "environment", "capture", "--out", str(file)]
    done = subprocess.run([sys.executable, str(script), "--device", "cpu", *flags],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads(file.read_text()) and list(results) == flags[1:3]
    pairs = len(tiny.VARIANTS) * len(METHODS)
    assert results["capture"]["result"] == {"compared": pairs, "failures": []}
    done = subprocess.run([sys.executable, str(script), "--device", "cuda:99", *flags],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_the_gpu_check_reports_failures_and_goes_on(monkeypatch, capsys):
    import gpu_check

    def broken(args):
        """A part that fails."""
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_check, "PARTS", (broken, gpu_check.environment))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    results = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and list(results) == ["broken", "environment"]
    assert results["broken"]["result"]["error"] == "RuntimeError: no kernel image"
    assert "torch" in results["environment"]["result"]


@pytest.mark.slow
def test_a_suite_that_takes_too_long_keeps_what_it_printed(monkeypatch):
    import gpu_check
    monkeypatch.setattr(gpu_check, "SUITE_SECONDS", 25)
    found = gpu_check.suite(argparse.Namespace(device="cpu"))
    assert found["exit_code"] is None and "tests/test_" in found["last_line"]
