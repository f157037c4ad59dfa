"""The closed form, both stages, the command. Run: python -m pytest tests/test_distill.py"""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from torch.testing import assert_close

import caprese
import data
import distill
import model as models
import sample

ROOT = Path(__file__).resolve().parents[1]


def samples(count=40, seed=0):
    """Random (prompt ids, response ids) of differing lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size):
        return torch.randint(low, high, (size,), generator=generator).tolist()

    found = []
    for _ in range(count):
        prompt = draw(0, 97, draw(3, 9, 1)[0])
        found.append((prompt, draw(0, 97, draw(2, 12, 1)[0])))
    return found


def settings(**changes):
    args = distill.arguments([])
    vars(args).update({"micro_batch": 3, "rank": 6} | changes)
    return args


def attached(method, device, layers=range(4), **changes):
    return caprese.attach(tiny.model(device=device, **changes), method, 0.4, layers, rank=6)


def learned(model):
    found = {}
    for i, ff in caprese.sparse_layers(model).items():
        for name, p in ff.adapter_parameters().items():
            found[f"{i}.{name}"] = p.detach().clone()
    return found


def generated_mask(prompt, response, device):
    """(tokens [1, T], which of them are generated [1, T]) of one sample, without padding."""
    tokens = torch.tensor([prompt + response], device=device)
    return tokens, torch.arange(tokens.shape[1], device=device)[None] >= len(prompt)


# ---- the closed form

def regression(N=300, D=12, seed=0):
    """x [N, D] with correlated columns, e [N, D] partly linear in x: the shape of problem (7)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(N, D) @ draw(D, D)
    return x, x @ draw(D, D) * 0.3 + draw(N, D)


def energy(x, e, L, R):
    return (e - x @ L @ R).square().sum()


def svd_solution(x, e, rank):
    """Least squares, then the best rank-r approximation of its predictions (Eckart and Young)."""
    B = torch.linalg.lstsq(x, e).solution
    V = torch.linalg.svd(x @ B, full_matrices=False).Vh[:rank].T
    return B @ V, V.T


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_closed_form_equals_the_svd_solution(rank):
    x, e = regression()
    L, R = distill.closed_form(x.T @ x, x.T @ e, rank, eps=0)
    L_svd, R_svd = svd_solution(x, e, rank)
    assert_close(L @ R, L_svd @ R_svd)


def test_the_first_columns_are_the_optimum_of_a_lower_rank():
    x, e = regression()
    L, R = distill.closed_form(x.T @ x, x.T @ e, 12, eps=0)
    for rank in range(1, 13):
        L_svd, R_svd = svd_solution(x, e, rank)
        assert_close(L[:, :rank] @ R[:rank], L_svd @ R_svd)


def test_closed_form_is_the_optimum():
    """No perturbation of L or R and no Adam run on the same data does better."""
    x, e = regression()
    L, R = distill.closed_form(x.T @ x, x.T @ e, 3)
    best = energy(x, e, L, R)
    generator = torch.Generator().manual_seed(1)

    def noisy(t, scale):
        noise = torch.randn(t.shape, generator=generator, dtype=t.dtype)
        return t + scale * t.std() * noise

    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(25):
            assert energy(x, e, noisy(L, scale), noisy(R, scale)) > best
    for seed in range(2):
        torch.manual_seed(seed)
        L_adam = torch.nn.Parameter(torch.randn(12, 3, dtype=torch.float64) * 0.3)
        R_adam = torch.nn.Parameter(torch.zeros(3, 12, dtype=torch.float64))
        adam = torch.optim.Adam([L_adam, R_adam], lr=2e-2)
        for _ in range(1500):
            adam.zero_grad()
            energy(x, e, L_adam, R_adam).backward()
            adam.step()
        # The ridge costs the closed form a millionth. Adam gets near, so the comparison is fair.
        assert best * 0.999999 <= energy(x, e, L_adam, R_adam) < best * 1.05


# ---- layer-wise

@pytest.mark.parametrize("method", caprese.METHODS)
def test_moments_are_sums_over_response_tokens_of_the_full_model(method, device):
    model = attached(method, device)
    layers = caprese.sparse_layers(model)
    expected = {ff: distill.new_moments(model) for ff in layers.values()}
    for prompt, response in samples(7):  # sample by sample, without padding
        tokens, generated = generated_mask(prompt, response, device)
        seen = {}
        hooks = [ff.register_forward_pre_hook(lambda ff, args: seen.update({ff: args[0]}))
                 for ff in layers.values()]
        model(tokens)
        for hook in hooks:
            hook.remove()
        for ff, x in seen.items():
            with torch.no_grad(), caprese.phase(model, "mixed", generated):
                sparse = ff(x)
            e = (ff(x) - sparse)[generated].double()
            x = x[generated].double()
            expected[ff][0].add_(x.T @ x)
            expected[ff][1].add_(x.T @ e)
    found = {ff: distill.new_moments(model) for ff in layers.values()}
    for batch in data.batches(samples(7), 3, device):
        for ff, x, residual, _ in distill.stream_residuals(model, batch):
            distill.add_moments(*found[ff], x, residual)
    for ff in layers.values():  # the products are summed in float32, entries are of about 10
        assert_close(found[ff], expected[ff], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", caprese.METHODS)
def test_the_closed_form_leaves_no_more_than_adam(method, device, monkeypatch):
    for key, value in {"lr": 1e-2, "batch_size": 16}.items():
        monkeypatch.setitem(distill.ADAM, key, value)
    model, found = attached(method, device), {}
    args = settings(micro_batch=16)
    without = distill.unexplained(model, samples(), args)
    assert list(without.values()) == pytest.approx([1] * 4)  # R is zero
    for layerwise in ("adam", "closed"):
        distill.layerwise(model, samples(), settings(layerwise=layerwise, micro_batch=16))
        found[layerwise] = distill.unexplained(model, samples(), args)
    for i in range(4):
        assert found["closed"][i] < found["adam"][i] < 0.99


def block_regression(model, i, device):
    """(x, what the block's output lacks) of layer i without its correction, token by token.

    Computed sample by sample, without padding, through the whole model.
    """
    layer, xs, es = model.model.layers[i], [], []
    for prompt, response in samples():
        tokens, generated = generated_mask(prompt, response, device)
        seen = []
        hooks = [layer.mlp.register_forward_hook(lambda m, args, out: seen.append((args[0], out))),
                 layer.register_forward_hook(lambda m, args, out: seen.append(out))]
        with torch.no_grad():
            model.model(tokens)
            with caprese.phase(model, "mixed", generated):
                model.model(tokens)
        for hook in hooks:
            hook.remove()
        (_, ff_full), full, (x, ff_sparse), sparse = seen
        lacks = ff_full - ff_sparse if model.config.post_norms else full - sparse
        xs.append(x[generated].double())
        es.append(lacks[generated].double())
    return torch.cat(xs), torch.cat(es)


@pytest.mark.parametrize("method, family", [("griffin", {}), ("cats", {}), ("int4", {}),
                                            ("griffin", {"model_type": "gemma2"})])
def test_each_sequential_fit_is_the_optimum_given_those_before_it(method, family, device):
    model = attached(method, device, **family)
    distill.layerwise(model, samples(), settings(layerwise="sequential"))
    for i, ff in caprese.sparse_layers(model).items():
        L, R = ff.L.detach().clone(), ff.R.detach().clone()
        ff.set_adapter(L, torch.zeros_like(R))
        x, e = block_regression(model, i, device)
        ff.set_adapter(L, R)
        found, best = energy(x, e, L.double(), R.double()), energy(x, e, *svd_solution(x, e, 6))
        assert found < best * 1.001  # what states in float32 and the ridge cost
        assert found < 0.99 * e.square().sum()


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_sequential_comes_closer_to_the_full_model_than_closed_than_none(method, device):
    batch = next(data.batches(samples(), 40, device))
    errors = {}
    for layerwise in ("none", "closed", "sequential"):
        model = attached(method, device)
        if layerwise != "none":
            distill.layerwise(model, samples(), settings(layerwise=layerwise))
        errors[layerwise] = distill.e2e_backward(model, batch, int(batch.response.sum()))
    assert errors["sequential"] < errors["closed"] < errors["none"]


@pytest.mark.parametrize("layers, passes", [([0, 1, 2, 3], [3, 3, 3, 2]), ([0, 1], [3, 2, 0, 0]),
                                            ([1, 3], [2, 3, 2, 2])])
def test_sequential_passes_no_block_more_often_than_it_must(layers, passes, device):
    """The full and the sparse states pass, and the sparse ones again with the fit, if needed."""
    model = attached("griffin", device, layers)
    calls = [0] * 4

    def count(i):
        def hook(module, args, output):
            calls[i] += 1
        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(count(i))
    distill.layerwise(model, samples(), settings(layerwise="sequential", micro_batch=10))
    assert calls == [4 * n for n in passes]  # 4 batches


def test_sequential_takes_every_nth_sample_where_not_all_fit(monkeypatch, device):
    total = sum(len(prompt) + len(response) for prompt, response in samples())
    fits = []
    for used, limit in ((samples(), -(-total // 2)), (samples()[::2], total), (samples(), total)):
        monkeypatch.setattr(distill, "MAX_WAITING_TOKENS", limit)
        model = attached("griffin", device)
        distill.layerwise(model, used, settings(layerwise="sequential"))
        fits.append(learned(model)["0.L"])
    assert torch.equal(fits[0], fits[1]) and not torch.equal(fits[0], fits[2])


@pytest.mark.parametrize("layerwise, blocks", [("sequential", 1), ("closed", 0)])
def test_an_interrupted_layerwise_stage_goes_on_and_ends_with_the_same_bits(
        tmp_path, monkeypatch, device, layerwise, blocks):
    """Block by block, the block at hand is dropped and those before it are in the state."""
    args = settings(layerwise=layerwise, micro_batch=10)  # 4 batches
    file, whole = tmp_path / "state", attached("griffin", device)
    distill.layerwise(whole, samples(), args)
    run_layer, calls = distill.run_layer, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 14:  # in the second block, or in the fourth batch
            raise KeyboardInterrupt
        return run_layer(*args)

    monkeypatch.setattr(distill, "run_layer", interrupted)
    for resume in (False, True):
        model = attached("griffin", device)
        progress = distill.Progress(file, {}, resume)
        with contextlib.nullcontext() if resume else pytest.raises(KeyboardInterrupt):
            distill.layerwise(model, samples(), args, progress)
        tensors, about = caprese.load_tensors(file)
        assert about["step"] == (blocks if not resume else {1: 4, 0: 1}[blocks])
        assert tensors["0.R"].any() == (resume or blocks == 1)
        assert tensors["3.R"].any() == resume
    for name, p in learned(whole).items():
        assert torch.equal(p, learned(model)[name])


# ---- end-to-end

@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_e2e_starts_from_the_sparse_method_lowers_its_loss_and_touches_only_L_and_R(loss, device):
    model = attached("griffin", device, [0, 1])
    frozen = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith((".L", ".R")):
            frozen[name] = tensor.clone()
    batch = next(data.batches(samples(), 40, device))
    with torch.no_grad():
        full = model.model(batch.tokens)[batch.response]
        with caprese.phase(model, "mixed", batch.generated):
            sparse = model.model(batch.tokens)[batch.response]
    if loss == "mse":
        before = (full - sparse).square().mean().item()
    else:
        p, q = model.logits(full).softmax(-1), model.logits(sparse).softmax(-1)
        before = (p * (p / q).log()).sum(-1).mean().item()
    count = int(batch.response.sum())
    first = distill.e2e_backward(model, batch, count, loss)
    assert first == pytest.approx(before, rel=1e-4)  # R = 0
    args = settings(loss=loss, e2e_lr=1e-2, e2e_epochs=20, e2e_batch_size=10, micro_batch=10)
    distill.end_to_end(model, samples(), args)
    assert distill.e2e_backward(model, batch, count, loss) < 0.8 * before
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_gradient_checkpointing_changes_memory_and_not_gradients(loss, monkeypatch, device):
    """The same gradients, though layers run again in the backward pass; far fewer bytes kept."""
    monkeypatch.setattr(distill, "LOGIT_CHUNK", 16)
    batch, gradients, kept = next(data.batches(samples(), 40, device)), [], []
    for checkpointing in (False, True):
        model = tiny.fill(attached("griffin", device))
        model.model.gradient_checkpointing, sizes = checkpointing, []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            distill.e2e_backward(model, batch, 100, loss)
        named = model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
        kept.append(sum(sizes))
    assert len(gradients[0]) == 8
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)  # float32, summed in chunks
    assert kept[1] < kept[0] / 2


def test_end_to_end_switches_gradient_checkpointing_on_and_off(monkeypatch, device):
    e2e_loss, seen = distill.e2e_backward, []

    def loss(model, *args, **kwargs):
        seen.append(model.model.gradient_checkpointing)
        return e2e_loss(model, *args, **kwargs)

    monkeypatch.setattr(distill, "e2e_backward", loss)
    model = attached("griffin", device)
    for checkpointing in (True, False):
        args = settings(gradient_checkpointing=checkpointing, micro_batch=9, e2e_epochs=1)
        distill.end_to_end(model, samples(9), args)
        assert not model.model.gradient_checkpointing
    assert seen == [True, False]


def test_micro_batches_do_not_change_the_step(device):
    """Gradients are sums over the parts of a batch, each divided by the tokens of the whole."""
    after = []
    for micro_batch in (40, 3):
        model = tiny.fill(attached("griffin", device))
        args = settings(micro_batch=micro_batch, e2e_lr=1e-2, e2e_epochs=2, e2e_batch_size=20)
        distill.end_to_end(model, samples(), args)
        after.append(learned(model))
    # Adam divides by the size of the gradient, so rounding errors show where it is small.
    assert_close(after[0], after[1], rtol=1e-3, atol=1e-4)


# ---- the distance to the full model

def test_kl_to_full_is_0_for_the_full_model_and_falls_with_density(device):
    model = tiny.model(device=device)
    assert distill.kl_to_full(model, samples()) == pytest.approx(0, abs=1e-5)
    kl = []
    for density in (0.9, 0.5, 0.1):
        caprese.attach(model, "topk", density)
        kl.append(distill.kl_to_full(model, samples()))
    assert 1e-6 < kl[0] < kl[1] < kl[2]


@pytest.mark.parametrize("method", caprese.METHODS)
def test_kl_to_full_equals_a_plain_computation(method, device):
    """From the logits of each sample alone, in the definition's own words."""
    model = tiny.fill(attached(method, device))
    kl = []
    for prompt, response in samples(9):
        tokens, _ = generated_mask(prompt, response, device)
        with torch.no_grad():
            sparse = caprese.teacher_forced(model, tokens, [len(prompt)])[0].softmax(-1)
            full = model(tokens)[0].softmax(-1)
        for t in range(len(prompt), tokens.shape[1] - 1):
            kl.append((full[t] * (full[t] / sparse[t]).log()).sum().item())
    assert distill.kl_to_full(model, samples(9)) == pytest.approx(sum(kl) / len(kl), rel=1e-4)


def test_responses_of_one_token_have_no_kl(device):
    with pytest.raises(ValueError, match="two tokens"):
        distill.kl_to_full(tiny.model(device=device), [([1, 2, 3], [4]), ([5, 6], [7])])


def test_kl_to_full_ignores_padding_and_the_chunks_of_logits(device, monkeypatch):
    model = attached("griffin", device)
    alone = distill.kl_to_full(model, samples(9), 1)
    assert distill.kl_to_full(model, samples(9), 9) == pytest.approx(alone, rel=1e-4)
    monkeypatch.setattr(distill, "LOGIT_CHUNK", 5)
    assert distill.kl_to_full(model, samples(9), 9) == pytest.approx(alone, rel=1e-4)


# ---- what must survive

def test_a_step_that_is_no_number_ends_the_training_and_keeps_the_last_good_state(tmp_path, device,
                                                                                  monkeypatch):
    model = attached("griffin", device)
    progress = distill.Progress(tmp_path / "state")
    e2e_backward, calls = distill.e2e_backward, []

    def backward(*args, **kwargs):
        loss = e2e_backward(*args, **kwargs)
        calls.append(loss)
        if len(calls) > 3:
            for p in caprese.correction_parameters(model).values():
                p.grad *= math.nan
        return loss

    monkeypatch.setattr(distill, "e2e_backward", backward)
    args = settings(micro_batch=10, e2e_batch_size=10, e2e_epochs=2, e2e_lr=1e-3, save_every=1)
    with pytest.raises(ValueError, match="learning rate"):
        distill.end_to_end(model, samples(), args, progress)
    assert len(calls) == 4
    tensors, about = caprese.load_tensors(tmp_path / "state")
    assert about["step"] == 3 and all(tensor.isfinite().all() for tensor in tensors.values())
    with pytest.raises(ValueError, match="diverged"):
        progress.save({"x": torch.tensor(float("inf"))})
    assert caprese.load_tensors(tmp_path / "state")[1]["step"] == 3


def test_a_full_disk_keeps_the_last_good_state(tmp_path):
    """The new file does not fit: one line, the old one untouched, no temporary file left."""
    resource = pytest.importorskip("resource")
    progress = distill.Progress(tmp_path / "state")
    progress.save({"x": torch.ones(3)})
    before = (tmp_path / "state").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as on a disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write"):
            progress.save({"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


# ---- the command

def test_recovered():
    rows = [{"math_accuracy": accuracy} for accuracy in (0.9, 0.1, 0.5)]
    assert distill.recovered(rows) == pytest.approx(0.5)
    assert distill.recovered(rows[:2]) is None and distill.recovered([rows[0]] * 3) is None
    assert distill.recovered([{"x kl": kl} for kl in (0.0, 2.0, 0.5)]) == pytest.approx(0.75)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run distill.py in this process: command(*words) -> (exit code, stdout, stderr)."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, words)])
        capsys.readouterr()
        try:
            sample.run_command(distill.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


QUICK = ("--device", "cpu", "--samples", "16", "--eval-samples", "1", "--layerwise", "closed",
         "--e2e-epochs", "0")


def problem_file(file, count=16):
    """Write problems of the bundled model's kind as JSONL; returns the file."""
    lines = []
    for problem in data.problems("maths", count, 0):
        lines.append(json.dumps({"question": problem.question, "response": problem.response}))
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_command_prints_the_table_and_writes_an_adapter(tmp_path, command):
    file = tmp_path / "a.safetensors"
    code, out, err = command("--samples", 96, "--eval-samples", 16, "--e2e-epochs", 1, "--json",
                             "--out", file)
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["full", "griffin", "+ layer-wise", "+ E2E"]
    assert set(rows[0]) == {"method", "math_accuracy", "reading_accuracy", "mean_response_tokens",
                            "recovered", "unexplained", "seconds", "added_parameters_percent"}
    assert sample.format_table(rows) in err
    assert rows[0]["added_parameters_percent"] == rows[1]["added_parameters_percent"] == 0
    assert 0 < rows[2]["added_parameters_percent"] <= 2
    assert rows[0]["math_accuracy"] > rows[1]["math_accuracy"] + 0.3
    assert rows[3]["recovered"] > 0
    assert rows[0]["unexplained"] == 0 and rows[1]["unexplained"] == pytest.approx(1)
    assert rows[2]["unexplained"] < 0.7
    model = models.Transformer.from_pretrained(sample.BUNDLED)
    assert list(caprese.sparse_layers(caprese.load_adapter(model, file))) == [0, 1, 2, 3]
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]


def test_another_model_is_measured_by_its_distance_to_the_full_one(tmp_path, command):
    words = ("--model", sample.BUNDLED, "--data", problem_file(tmp_path / "seen.jsonl"),
             "--eval-data", problem_file(tmp_path / "unseen.jsonl"), "--rank", 8, "--dtype",
             "float32", "--density", 0.3, "--eval-samples", 8, "--out", tmp_path / "a")
    code, out, err = command(*QUICK, *words, "--json")
    assert code == 0, err
    full, sparse, corrected = json.loads(out)["rows"]
    assert full["unseen kl"] == pytest.approx(0, abs=1e-5)
    assert sparse["unseen kl"] > corrected["unseen kl"] > 0
    assert corrected["recovered"] == pytest.approx(1 - corrected["unseen kl"] / sparse["unseen kl"])


def flags_of_runs(tmp_path):
    model = ("--model", sample.BUNDLED, "--rank", 8, "--data")
    return {"cats": ("--method", "cats"), "all": ("--layers", "all"),
            "indices": ("--layers", "0,2"), "density": ("--density", 0.3),
            "model": (*model, problem_file(tmp_path / "problems.jsonl"))}


@pytest.mark.parametrize("name", ["cats", "all", "indices", "density", "model"])
def test_the_command_printed_at_the_end_runs_as_it_stands(tmp_path, command, name, monkeypatch,
                                                          capsys):
    out = tmp_path / "an adapter.safetensors"
    words = flags_of_runs(tmp_path)[name]
    code, stdout, err = command(*QUICK, "--out", out, *words)
    assert code == 0, err
    printed = shlex.split(stdout.rpartition("try: ")[2])
    assert printed[:2] == ["python", "sample.py"]
    monkeypatch.setattr(sys, "argv", printed[1:])
    sample.run_command(sample.main)
    text = capsys.readouterr().out
    about = caprese.read_adapter(out)[1]
    expected = {"all": "in 8 of 8 layers", "indices": "in 2 of 8 layers",
                "density": "30% of the neurons", "cats": "cats, 50%", "model": "50% of the neurons"}
    assert expected[name] in text and about["method"] in text
    assert name == "model" or "sparse + Caprese" in text


@pytest.mark.parametrize("words, ours", [
    ((), {"rank": 40}),  # the bundled model has no room for 256
    (("--rank", "8", "--loss", "kl"), {"rank": 8, "loss": "kl"}),
    (("--samples", "5", "--e2e-epochs", "1"), {"samples": 5, "rank": 40, "e2e_epochs": 1}),
])
def test_paper_is_the_paper_s_recipe_but_for_the_flags_given(words, ours):
    args = distill.arguments(["--paper", *words])
    expected = distill.PAPER | ours
    assert {key: getattr(args, key) for key in expected} == expected
    assert args.density == 0.5


def test_the_two_starting_lines_say_what_will_be_done():
    args = distill.arguments(["--method", "cats", "--density", "0.7", "--e2e-lr", "2e-3"])
    text = distill.describe(args, samples(3))
    assert len(text.splitlines()) == 2
    for part in ("cats, density 0.7", "rank 40", "the bundled model", "1 x ",
                 "sequential, 3 samples", "kl, 3 samples", "1 epochs", "batches of 32", "0.002"):
        assert part in text
    args = distill.arguments(["--paper", "--loss", "kl", "--dtype", "float32"])
    text = distill.describe(args, samples(3))
    assert text.endswith("Not the paper's: rank 40, loss kl, torch.float32.")
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_a_missing_file_is_noticed_before_the_model_is_loaded(tmp_path, command, flag, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda *args: pytest.fail("the model is loaded"))
    files = {"--data": problem_file(tmp_path / "problems.jsonl"), flag: tmp_path / "none.jsonl"}
    words = []
    for key, file in files.items():
        words += [key, file]
    code, _, err = command("--model", sample.BUNDLED, *words, "--out", tmp_path / "a")
    assert code == 2 and "none.jsonl" in err and len(err.splitlines()) == 1


def test_resuming_the_wrong_thing_is_refused(tmp_path, command, monkeypatch):
    words = (*QUICK, "--out", tmp_path / "a")
    code, _, err = command(*words, "--resume")
    assert code == 2 and "nothing to resume" in err

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # told to stop within the first step
        patch.setattr(distill, "closed_form", stop)
        code, _, err = command(*words)
    assert code == 130 and "--resume" in err
    for changes, message in (((), "--resume"), (("--resume", "--rank", 8), "rank")):
        code, _, err = command(*words, *changes)
        assert code == 2 and message in err and len(err.splitlines()) == 1
    assert command(*words, "--resume")[0] == 0


@pytest.mark.parametrize("words, message", [
    (["--model", "nowhere"], "--data"),
    (["--model", "nowhere", "--data", "nothing.jsonl"], "nowhere"),
    (["--density", "0"], "density"),
    (["--layers", "9"], "layers"),
    (["--layers", "some"], "--layers"),
    (["--out", "no/such/folder/a.safetensors"], "folder"),
    (["--samples", "0"], "samples"),
    (["--rank", "1000"], "rank"),
    (["--device", "nowhere"], "device"),
    (["--fsdp"], "torchrun"),
    (["--layerwise", "none", "--e2e-epochs", "0"], "nothing is learned"),
    (["--eval-data", "a/x.jsonl", "--eval-data", "b/x.jsonl"], "one name"),
    (["--fsdp", "--method", "int4"], "int4"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, command, words, message):
    code, _, err = command("--out", tmp_path / "a", "--eval-samples", 1, "--samples", 16, *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# ---- processes that are killed, and several of them

def run(*words, launcher=("distill.py",), **kwargs):
    return subprocess.run([sys.executable, *launcher, "--device", "cpu", *map(str, words)],
                          cwd=ROOT, capture_output=True, text=True, **kwargs)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# Both stages, 1 and 48 steps, a checkpoint before the first and after each.
SHORT = ("--samples", "96", "--eval-samples", "2", "--micro-batch", "8", "--e2e-batch-size", "2",
         "--save-every", "1")


def interrupt(at, how, *words, file):
    """Start the command and send the signal once the state is at (stage, step): its exit code."""
    stages = ["layer-wise", "E2E"]
    process = subprocess.Popen([sys.executable, "distill.py", "--device", "cpu", *words], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            about = caprese.load_tensors(f"{file}.state")[1]
            if (stages.index(about["stage"]), about["step"]) >= (stages.index(at[0]), at[1]):
                process.send_signal(how)
                break
        except (ValueError, OSError, RuntimeError):  # not there yet, or replaced meanwhile
            pass
        time.sleep(0.005)
    return process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("layerwise, points", [
    ("closed", [(("layer-wise", 0), signal.SIGKILL), (("E2E", 2), signal.SIGKILL)]),
    ("sequential", [(("layer-wise", 0), signal.SIGINT), (("E2E", 5), signal.SIGTERM)]),
])
def test_killed_and_resumed_is_bit_identical(tmp_path, layerwise, points):
    """Whatever stage the signals meet: each resumed run goes on from the last checkpoint."""
    whole, file = tmp_path / "whole", tmp_path / "a.safetensors"
    short = (*SHORT, "--layerwise", layerwise)
    assert run(*short, "--out", whole).returncode == 0
    resume = ()
    for at, how in points:
        code = interrupt(at, how, *short, "--out", str(file), *resume, file=file)
        assert code == (-how if how == signal.SIGKILL else 130)
        assert not file.exists()
        resume = ("--resume",)
    done = run(*short, "--out", file, "--resume")
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == whole.read_bytes()
    assert {found.name for found in tmp_path.iterdir()} == {"whole", "a.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("--layerwise", "closed"),
    ("--layerwise", "sequential"),
    ("--layerwise", "sequential", "--fsdp"),
    ("--layerwise", "adam", "--fsdp", "--gradient-checkpointing"),
], ids=["closed", "sequential", "sequential-fsdp", "adam-fsdp"])
def test_two_processes_learn_what_one_does(tmp_path, words):
    """Over gloo, both stages; an odd number of samples leaves one process an empty batch.

    What Python does at the end of a process is not waited for: gloo's threads may abort it.
    """
    words = ("--samples", "41", "--eval-samples", "2", "--e2e-batch-size", "8", *words)
    alone = [word for word in words if word != "--fsdp"]
    assert run(*alone, "--out", tmp_path / "one").returncode == 0
    abort_late = "import atexit, os\nif 'RANK' in os.environ: atexit.register(os.abort)\n"
    (tmp_path / "sitecustomize.py").write_text(abort_late)  # Python imports it at its start
    done = run(*words, "--out", tmp_path / "two", launcher=(*TORCHRUN, "distill.py"),
               env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    if "--fsdp" in words:
        assert int(re.search(r"holds (\d+)% of the layers' weights", done.stdout)[1]) < 60
    one, about_one = caprese.load_tensors(tmp_path / "one")
    two, about_two = caprese.load_tensors(tmp_path / "two")
    assert about_one == about_two
    for i in range(3):
        name = f"model.layers.{i}.mlp"
        map_one = one[f"{name}.L"] @ one[f"{name}.R"]  # L and R alone are free up to a sign
        map_two = two[f"{name}.L"] @ two[f"{name}.R"]
        # Adam divides by the size of the gradient, which carries a rounding error to the size of a
        # step where a gradient is close to zero.
        assert (map_one - map_two).norm() < 0.02 * map_one.norm()


FAILING = """
import os, sys
sys.path.insert(0, {root!r})
import distill, sample

end_to_end = distill.end_to_end

def fail_on_rank_1(*args):
    if os.environ["RANK"] == "1":
        raise RuntimeError("no such luck")
    end_to_end(*args)

distill.end_to_end = fail_on_rank_1
sample.run_command(distill.main)
"""


@pytest.mark.slow
def test_an_error_in_another_rank_is_printed_and_ends_all(tmp_path):
    """Rank 0 waits for the gradients of rank 1 meanwhile; a run that hung would time out."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT)), encoding="utf-8")
    done = run(*SHORT, "--out", tmp_path / "a", launcher=(*TORCHRUN, str(script)), timeout=60)
    assert done.returncode != 0
    assert "rank 1: RuntimeError: no such luck" in done.stderr
    assert not (tmp_path / "a").exists()
