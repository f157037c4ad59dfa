"""The closed form, both losses, the command. Run: python -m pytest tests/test_distill.py"""

import contextlib
import json
import re
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
import sample

ROOT = Path(__file__).resolve().parents[1]


def pairs(count=40, seed=0):
    """Random (prompt ids, response ids) of differing lengths."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, size: torch.randint(low, high, (size,), generator=g).tolist()
    return [(draw(0, 97, draw(3, 9, 1)[0]), draw(0, 97, draw(2, 12, 1)[0])) for _ in range(count)]


def settings(**changes):
    args = distill.arguments([])
    vars(args).update({"rows": 3, "rank_budget": False, "layerwise_lr": 1e-2, "layerwise_batch": 16} | changes)
    return args


def learned(model):
    return {f"{i}.{n}": p.detach().clone() for i, ff in caprese.sparse_layers(model).items()
            for n, p in ff.learned().items()}


def regression(N=300, D=12, seed=0):
    """x [N, D] with correlated columns, e [N, D] partly linear in x: the shape of problem (7)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x = draw(N, D) @ draw(D, D)
    return x, x @ draw(D, D) * 0.3 + draw(N, D)


def energy(x, e, L, R):
    return (e - x @ L @ R).square().sum()


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_closed_form_equals_the_svd_solution(rank):
    """Least squares, then the best rank-r approximation of its predictions: Eckart and Young in the metric of x."""
    x, e = regression()
    L, R, _ = distill.closed_form(x.T @ x, x.T @ e, rank, eps=0)
    B = torch.linalg.lstsq(x, e).solution
    V = torch.linalg.svd(x @ B, full_matrices=False).Vh[:rank].T
    assert_close(L @ R, B @ V @ V.T)


def test_eigenvalues_say_what_each_rank_buys():
    x, e = regression()
    left = [energy(x, e, *distill.closed_form(x.T @ x, x.T @ e, r, eps=0)[:2]) for r in range(1, 13)]
    values = distill.closed_form(x.T @ x, x.T @ e, 1, eps=0)[2]
    assert_close(torch.stack(left), e.square().sum() - values.cumsum(0))


def test_closed_form_is_the_optimum():
    """No perturbation of L or R and no Adam run on the same data does better."""
    x, e = regression()
    L, R, _ = distill.closed_form(x.T @ x, x.T @ e, 3)
    best = energy(x, e, L, R)
    g = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(25):
            noise = lambda t: t + scale * t.std() * torch.randn(t.shape, generator=g, dtype=t.dtype)
            assert energy(x, e, noise(L), noise(R)) > best
    for seed in range(3):
        torch.manual_seed(seed)
        l = torch.nn.Parameter(torch.randn(12, 3, dtype=torch.float64) * 0.3)
        r = torch.nn.Parameter(torch.zeros(3, 12, dtype=torch.float64))
        adam = torch.optim.Adam([l, r], lr=2e-2)
        for _ in range(1500):
            adam.zero_grad()
            energy(x, e, l, r).backward()
            adam.step()
        assert best * 0.999999 <= energy(x, e, l, r) < best * 1.05  # it gets near, so the comparison means something


@pytest.mark.parametrize("method", caprese.METHODS)
def test_moments_are_sums_over_response_tokens_of_the_full_model(method):
    model = caprese.attach(tiny.model(), method, 0.4)
    collected = {i: [] for i in caprese.sparse_layers(model)}
    for prompt, response in pairs(7):  # sample by sample, without padding
        tokens = torch.tensor([prompt + response])
        full = []
        handles = [m.mlp.register_forward_pre_hook(lambda ff, args: full.append(args[0])) for m in model.layers]
        model(tokens)
        for handle in handles:
            handle.remove()
        for i, ff in caprese.sparse_layers(model).items():
            x = full[i]
            generated = torch.arange(tokens.shape[1])[None] >= len(prompt)
            e = ff(x) - ff(x, generated)
            collected[i].append((x[0, len(prompt):].double(), e[0, len(prompt):].double()))
    for i, (A, C, total, m) in distill.moments(model, pairs(7), settings()).items():
        x, e = (torch.cat(t) for t in zip(*collected[i]))
        assert_close(A, x.T @ x, rtol=1e-4, atol=1e-4)
        assert_close(C, x.T @ e, rtol=1e-4, atol=1e-4)
        assert_close(total, e.square().sum(), rtol=1e-4, atol=1e-4)
        assert_close(m, x.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", caprese.METHODS)
def test_the_closed_form_leaves_no_more_than_adam(method):
    model, args = caprese.attach(tiny.model(), method, 0.4, rank=6), settings(rank=6)
    bare = distill.residual_left(model, pairs(), args)
    distill.layerwise(model, pairs(), settings(layerwise="adam"))
    adam = distill.residual_left(model, pairs(), args)
    distill.layerwise(model, pairs(), args)
    closed = distill.residual_left(model, pairs(), args)
    for i in closed:
        assert bare[i] == pytest.approx(1)
        assert closed[i] < adam[i] < 0.99


def final_error(model):
    """Of (8), on all samples."""
    with torch.enable_grad():
        return distill.e2e_loss(model, next(data.batches(pairs(), 40)), sum(len(r) for _, r in pairs()))


@pytest.mark.parametrize("method, family", [("griffin", {}), ("cats", {}), ("int4", {}),
                                            ("griffin", {"model_type": "gemma2"})])
def test_each_sequential_fit_is_the_optimum_given_those_before_it(method, family):
    model = caprese.attach(tiny.model(**family), method, 0.4, range(4), rank=6)
    distill.layerwise(model, pairs(), settings(rank=6, layerwise="sequential"))
    for i, ff in caprese.sparse_layers(model).items():
        L, R = ff.L.detach().double(), ff.R.detach().clone()
        ff.R.data.zero_()
        x, e = [], []
        for prompt, response in pairs():  # sample by sample, without padding, through the whole model
            tokens, seen = torch.tensor([prompt + response]), []
            generated = torch.arange(tokens.shape[1])[None] >= len(prompt)
            for which in (None, generated):
                hooks = [ff.register_forward_hook(lambda m, given, out: seen.append((given[0], out))),
                         model.layers[i].register_forward_hook(lambda m, given, out: seen.append(out))]
                model.hidden(tokens, generated=which)
                for hook in hooks:
                    hook.remove()
            (_, ff_full), full, (inputs, ff_sparse), sparse = seen
            lacks = ff_full - ff_sparse if family else full - sparse
            x.append(inputs[generated].double())
            e.append(lacks[generated].double())
        ff.R.data.copy_(R)
        x, e = torch.cat(x), torch.cat(e)
        B = torch.linalg.lstsq(x, e).solution
        V = torch.linalg.svd(x @ B, full_matrices=False).Vh[:6].T
        # The excess over the optimum that float32 states and the ridge cost.
        assert energy(x, e, L, R.double()) < energy(x, e, B @ V, V.T) * 1.001
        assert energy(x, e, L, R.double()) < 0.99 * e.square().sum()


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_sequential_fits_come_closer_to_the_full_model_than_the_plain_closed_form(method):
    left = {}
    for layerwise in ("none", "closed", "sequential"):
        model = caprese.attach(tiny.model(), method, 0.4, range(4), rank=6)
        if layerwise != "none":
            distill.layerwise(model, pairs(), settings(rank=6, layerwise=layerwise))
        left[layerwise] = final_error(model)
    assert left["sequential"] < left["closed"] < left["none"]


def test_sequential_takes_every_nth_sample_where_not_all_fit(monkeypatch):
    total = sum(len(prompt) + len(response) for prompt, response in pairs())
    fits = []
    for samples, limit in ((pairs(), (total + 1) // 2), (pairs()[::2], total), (pairs(), total)):
        monkeypatch.setattr(distill, "WAITING", limit)
        model = caprese.attach(tiny.model(), "griffin", 0.4, rank=6)
        distill.layerwise(model, samples, settings(rank=6, layerwise="sequential"))
        fits.append(learned(model)["0.L"])
    assert torch.equal(fits[0], fits[1]) and not torch.equal(fits[0], fits[2])


def test_sequential_resumes_within_the_stage(tmp_path, monkeypatch):
    """Told to stop after the first block and resumed, it ends with the same bits; it saves after each block."""
    ends, saved, save = [], [], distill.Progress.save
    monkeypatch.setattr(distill.Progress, "save", lambda self, tensors: (saved.append(self.step), save(self, tensors)))
    for resume in (None, False, True):
        model = caprese.attach(tiny.model(), "griffin", 0.4, range(4), rank=6)
        progress = distill.Progress(None if resume is None else str(tmp_path / "state"), 100, {}, resume)
        progress.stop = resume is False
        with pytest.raises(KeyboardInterrupt) if progress.stop else contextlib.nullcontext():
            distill.layerwise(model, pairs(), settings(rank=6, layerwise="sequential"), progress)
        assert progress.step == (1 if progress.stop else 4)
        ends.append(learned(model))
    whole, stopped, resumed = ends
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert torch.equal(whole["0.R"], stopped["0.R"]) and not stopped["3.R"].any()
    assert saved == [1, 2, 3, 4]


def test_an_open_gate_is_one_where_the_inputs_share_a_direction():
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    g = distill.open_gate(x.T @ x, x.sum(0), torch.nn.functional.silu)
    gate = torch.nn.functional.silu(x @ g)
    assert gate.mean() == pytest.approx(1, abs=0.02) and gate.std() < 0.1


def test_gated_neurons_start_from_the_closed_form():
    """On inputs with a shared direction they leave hardly more of the residual than the linear ones."""
    left = {}
    for correction in ("linear", "gated"):
        model = tiny.model()
        model.model["embed_tokens"].weight += 3
        caprese.attach(model, "griffin", 0.4, [0], rank=6, correction=correction)
        distill.layerwise(model, pairs(), settings(rank=6, correction=correction))
        left[correction] = distill.residual_left(model, pairs(), settings())[0]
    assert left["linear"] < left["gated"] < 0.5 * left["linear"] + 0.5


@pytest.mark.parametrize("correction", ["gated", "lora"])
def test_adam_teaches_the_other_corrections(correction):
    model, args = caprese.attach(tiny.model(), "griffin", 0.4, rank=6, correction=correction), settings()
    distill.layerwise(model, pairs(), settings(layerwise="adam"))
    assert all(left < 0.99 for left in distill.residual_left(model, pairs(), args).values())


def test_the_rank_budget_goes_where_the_energy_is():
    values = {0: torch.tensor([9.0, 4, 1]), 1: torch.tensor([5.0, 2, 1.5])}
    assert distill.split_ranks(values, 4) == {0: 2, 1: 2}
    assert distill.split_ranks(values, 3) == {0: 2, 1: 1}
    left = {}
    for budget in (False, True):  # and it leaves less of the residuals, as shares, than equal ranks
        model = caprese.attach(tiny.model(), "cats", 0.4, rank=6)
        distill.layerwise(model, pairs(), settings(rank=6, rank_budget=budget))
        assert sum(ff.rank for ff in caprese.sparse_layers(model).values()) == 24
        left[budget] = sum(distill.residual_left(model, pairs(), settings()).values())
    assert left[True] < left[False]


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_e2e_starts_from_the_sparse_method_lowers_its_loss_and_touches_only_L_and_R(kind):
    model = caprese.attach(tiny.model(), "griffin", 0.4, rank=6)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith((".L", ".R"))}
    batch = next(data.batches(pairs(), 40))
    full, sparse = (h[batch.response] for h in (model.hidden(batch.tokens),
                                                model.hidden(batch.tokens, generated=batch.generated)))
    if kind == "mse":
        before = (full - sparse).square().mean().item()
    else:
        p, q = (model.logits(h).softmax(-1) for h in (full, sparse))
        before = (p * (p / q).log()).sum(-1).mean().item()
    count = int(batch.response.sum())
    assert distill.e2e_loss(model, batch, count, kind) == pytest.approx(before, rel=1e-4)  # R = 0
    distill.end_to_end(model, pairs(), settings(loss=kind, e2e_lr=1e-2, e2e_epochs=20, e2e_batch=10))
    assert distill.e2e_loss(model, batch, count, kind) < 0.8 * before
    assert all(torch.equal(model.state_dict()[k], v) for k, v in frozen.items())


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_recomputing_changes_memory_and_not_gradients(kind, monkeypatch):
    """Activation checkpointing: the same gradients, and far fewer bytes kept for the way back."""
    monkeypatch.setattr(distill, "KL_CHUNK", 16)
    batch, gradients, kept = next(data.batches(pairs(), 40)), [], []
    for recompute in (False, True):
        model = tiny.fill(caprese.attach(tiny.model(), "griffin", 0.4, range(4), rank=6))
        model.recompute, sizes = recompute, []
        save = lambda t: sizes.append(t.numel()) or t
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            distill.e2e_loss(model, batch, 100, kind)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        kept.append(sum(sizes))
    for name in gradients[0]:
        assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-6)
    assert kept[1] < kept[0] / 2


def test_rows_at_once_do_not_change_the_step():
    """Gradients are sums over the parts of a batch, each divided by the tokens of the whole."""
    after = []
    for rows in (40, 3):
        model = tiny.fill(caprese.attach(tiny.model(), "griffin", 0.4, rank=6))
        distill.end_to_end(model, pairs(), settings(rows=rows, e2e_lr=1e-2, e2e_epochs=2, e2e_batch=20))
        after.append(learned(model))
    for name in after[0]:
        assert_close(after[0][name], after[1][name], rtol=1e-3, atol=1e-4)


def test_fidelity_of_the_full_model_is_perfect_and_falls_with_density():
    model = tiny.model()
    perfect = sample.fidelity(model, pairs())
    assert perfect["kl"] == pytest.approx(0, abs=1e-5) and perfect["agreement"] == 1
    kl = [sample.fidelity(caprese.attach(model, "topk", d), pairs())["kl"] for d in (0.9, 0.5, 0.1)]
    assert 1e-6 < kl[0] < kl[1] < kl[2]


@pytest.mark.parametrize("method", caprese.METHODS)
def test_fidelity_runs_the_model_as_inference_does(method):
    """One shared prefill and both decodes equal two teacher-forced passes, row by row."""
    model = tiny.fill(caprese.attach(tiny.model(), method, 0.4, rank=6))
    batch = next(data.batches(pairs(5), 5))
    twice = sample.respond_twice(model, batch)
    forced = model.hidden(batch.tokens), model.hidden(batch.tokens, generated=batch.generated)
    for row, (start, end) in enumerate(zip(batch.prompt_lengths, batch.lengths)):
        for ours, theirs in zip(twice, forced):
            assert_close(ours[row, :end - start], theirs[row, start:end], rtol=1e-4, atol=1e-4)


def test_fidelity_ignores_padding():
    model = caprese.attach(tiny.model(), "griffin", 0.4)
    one, many = (sample.fidelity(model, pairs(9), size) for size in (1, 9))
    assert one == pytest.approx(many, rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_training_and_keeps_the_last_good_state(tmp_path):
    model = caprese.attach(tiny.model(), "griffin", 0.4, rank=6)
    progress, count = distill.Progress(tmp_path / "state", every=1), iter(range(9))

    def loss(model, batch, tokens):
        value = distill.e2e_loss(model, batch, tokens)
        return value if next(count) < 3 else float("nan")

    with pytest.raises(ValueError, match="learning rate"):
        distill.train(model, pairs(), loss, 1e-3, 1, 10, settings(rows=10), "E2E", progress)
    tensors, about = caprese.load_tensors(tmp_path / "state")
    assert about["step"] == 3 and all(t.isfinite().all() for t in tensors.values())
    with pytest.raises(ValueError, match="diverged"):
        progress.save({"x": torch.tensor(float("inf"))})
    assert caprese.load_tensors(tmp_path / "state")[1]["step"] == 3


def test_a_full_disk_keeps_the_last_good_state(tmp_path):
    """The new file does not fit: one line, the old one untouched, no temporary file left."""
    progress = distill.Progress(tmp_path / "state", every=1)
    progress.save({"x": torch.ones(3)})
    before = (tmp_path / "state").read_bytes()
    code = ("import caprese, distill, torch, resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000));"
            f"caprese.save_tensors({{'x': torch.ones(100000)}}, {str(tmp_path / 'state')!r}, {{}})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "OSError: cannot write" in done.stderr.splitlines()[-1]
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [before]


def test_recovered():
    rows = [{"math_accuracy": a} for a in (0.9, 0.1, 0.5)]
    assert distill.recovered(rows) == pytest.approx(0.5)
    assert distill.recovered(rows[:2]) is None and distill.recovered([rows[0]] * 3) is None
    assert distill.recovered([{"x kl": k} for k in (0.0, 2.0, 0.5)]) == pytest.approx(0.75)


def run(*args, launcher=()):
    return subprocess.run([sys.executable, *launcher, "distill.py", *args], cwd=ROOT, capture_output=True, text=True)


def test_command_prints_the_table_and_writes_an_adapter(tmp_path):
    file = tmp_path / "a.safetensors"
    done = run("--samples", "96", "--eval-samples", "16", "--e2e-epochs", "1", "--json", "--out", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [r["method"] for r in rows] == ["full", "griffin", "+ layer-wise", "+ E2E"]
    assert set(rows[0]) == {"method", "math_accuracy", "reading_accuracy", "mean_response_tokens", "recovered", "residual_left",
                            "added_parameters_percent", "seconds"}
    assert rows[0]["added_parameters_percent"] == 0 < rows[2]["added_parameters_percent"] <= 2
    assert rows[0]["math_accuracy"] > rows[1]["math_accuracy"] + 0.3
    assert rows[3]["recovered"] > 0
    assert rows[0]["residual_left"] == 0 and rows[1]["residual_left"] == pytest.approx(1)
    assert rows[2]["residual_left"] < 0.7
    model = sample.Transformer.from_pretrained(sample.EMBEDDED)
    assert list(caprese.sparse_layers(caprese.load_adapter(model, file))) == [0, 1, 2]
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


# Both stages, 12 and 48 steps, a checkpoint after each: time enough to be killed in the middle.
SHORT = ("--samples", "96", "--eval-samples", "2", "--rows", "8", "--e2e-batch", "2", "--save-every", "1")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "a.safetensors"
    assert run(*SHORT, "--out", str(file)).returncode == 0
    return file.read_bytes()


def interrupt(file, at, how, *args):
    """Start the command, send the signal when the checkpoint is at (stage, step) or later; returns its exit code."""
    stages = ["layer-wise", "E2E"]
    process = subprocess.Popen([sys.executable, "distill.py", *SHORT, "--out", str(file), *args], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            about = caprese.load_tensors(f"{file}.state")[1]
            if (stages.index(about["stage"]), about["step"]) >= (stages.index(at[0]), at[1]):
                process.send_signal(how)
                break
        except (ValueError, FileNotFoundError, RuntimeError):  # not there yet, or replaced while we read it
            pass
        time.sleep(0.005)
    return process.wait()


@pytest.mark.parametrize("points", [
    [(("layer-wise", 3), signal.SIGKILL), (("layer-wise", 9), signal.SIGKILL), (("E2E", 2), signal.SIGKILL)],
    [(("layer-wise", 6), signal.SIGINT), (("E2E", 5), signal.SIGTERM)],
], ids=["kill", "ask"])
def test_killed_and_resumed_is_bit_identical(tmp_path, uninterrupted, points):
    """Whatever stage the signals meet: each resumed run goes on from the last checkpoint."""
    file, resume = tmp_path / "a.safetensors", ()
    for at, how in points:
        code = interrupt(file, at, how, *resume)
        assert code == (-how if how == signal.SIGKILL else 130)
        assert not file.exists()
        resume = ("--resume",)
    done = run(*SHORT, "--out", str(file), "--resume")
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == uninterrupted
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_resuming_the_wrong_thing_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    out = (*SHORT, "--out", str(file))
    assert "nothing to resume" in run(*out, "--resume").stderr
    interrupt(file, ("layer-wise", 2), signal.SIGTERM)
    for args, words in (((), "--resume"), (("--resume", "--rank", "8"), "rank")):
        done = run(*out, *args)
        assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize("args", [(), ("--layerwise", "sequential"), ("--fsdp", "--layerwise", "sequential"),
                                  ("--fsdp", "--recompute", "--layerwise", "adam", "--loss", "kl",
                                       "--layerwise-epochs", "1")])
def test_two_processes_learn_what_one_does(tmp_path, args):
    """Data-parallel over gloo, both stages; an odd number of samples leaves one process an empty batch."""
    common = ("--samples", "41", "--eval-samples", "2", "--e2e-batch", "8", "--layerwise-batch", "8", *args)
    two = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29511")
    one = [a for a in common if a != "--fsdp"]
    for name, arguments, launcher in (("one", one, ()), ("two", common, two)):
        done = run(*arguments, "--out", str(tmp_path / name), launcher=launcher)
        assert done.returncode == 0, done.stderr
    if "--fsdp" in args:
        assert int(re.search(r"each with (\d+)% of the base weights", done.stdout)[1]) < 60
    one, two = (caprese.load_tensors(tmp_path / name) for name in ("one", "two"))
    assert one[1] == two[1]
    maps = [[t[f"model.layers.{i}.mlp.L"] @ t[f"model.layers.{i}.mlp.R"] for i in range(3)] for t in (one[0], two[0])]
    for i in range(3):  # L R, as the closed form's L and R each are free up to a sign. Adam divides by the size of the
        # gradient, which carries a rounding error to the size of a step where a gradient is close to zero.
        assert (maps[0][i] - maps[1][i]).norm() < 0.02 * maps[0][i].norm()


@pytest.mark.parametrize("args, words", [
    (["--model", "nowhere"], "--data"),
    (["--model", "nowhere", "--data", "nothing.jsonl"], "nowhere"),
    (["--density", "0"], "density"),
    (["--layers", "9"], "layers"),
    (["--layers", "some"], "--layers"),
    (["--out", "no/such/folder/a.safetensors"], "folder"),
    (["--samples", "0"], "samples"),
    (["--correction", "lora", "--layerwise", "closed"], "--layerwise"),
    (["--rank-budget", "--layerwise", "adam"], "--rank-budget"),
    (["--rank-budget", "--layerwise", "sequential"], "--rank-budget"),
    (["--fsdp"], "torchrun"),
])
def test_bad_input_is_one_line_and_exit_code_2(args, words):
    done = run("--eval-samples", "4", *args)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (ROOT / "adapter.safetensors").exists()
