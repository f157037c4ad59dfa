"""The closed form, both losses, the command. Run: python -m pytest tests/test_distill.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.testing import assert_close

import caprese
import data
import distill

ROOT = Path(__file__).resolve().parents[1]


def pairs(count=40, seed=0):
    """Random (prompt ids, response ids) of differing lengths."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, size: torch.randint(low, high, (size,), generator=g).tolist()
    return [(draw(0, 97, draw(3, 9, 1)[0]), draw(0, 97, draw(2, 12, 1)[0])) for _ in range(count)]


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
    for i, (A, C, total) in distill.moments(model, data.batches(pairs(7), 3)).items():
        x, e = (torch.cat(t) for t in zip(*collected[i]))
        assert_close(A, x.T @ x, rtol=1e-4, atol=1e-4)
        assert_close(C, x.T @ e, rtol=1e-4, atol=1e-4)
        assert_close(total, e.square().sum(), rtol=1e-4, atol=1e-4)


def test_layerwise_closed_leaves_no_more_than_sgd():
    arguments = type("Args", (), {"layerwise_lr": 1e-2, "layerwise_epochs": 20, "layerwise_batch": 16, "seed": 0})
    model = caprese.attach(tiny.model(), "griffin", 0.4, rank=6)
    torch.manual_seed(0)
    bare = distill.residual_left(model, pairs())
    distill.layerwise_sgd(model, pairs(), arguments)
    sgd = distill.residual_left(model, pairs())
    distill.layerwise_closed(model, pairs(), arguments)
    closed = distill.residual_left(model, pairs())
    for i in closed:
        assert bare[i] == pytest.approx(1)
        assert closed[i] < sgd[i] < 0.99


def test_e2e_starts_from_the_sparse_method_lowers_8_and_touches_only_L_and_R():
    model = caprese.attach(tiny.model(), "griffin", 0.4, rank=6)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith((".L", ".R"))}
    batch = next(data.batches(pairs(), 40))
    full, sparse = model.hidden(batch.tokens), model.hidden(batch.tokens, generated=batch.generated)
    before = (full - sparse)[batch.response].square().mean().item()
    assert distill.e2e_loss(model, batch) == pytest.approx(before, rel=1e-5)  # R = 0
    distill.train(model, pairs(), distill.e2e_loss, lr=1e-2, epochs=20, batch=10, seed=0, desc="")
    assert distill.e2e_loss(model, batch) < 0.8 * before
    assert all(torch.equal(model.state_dict()[k], v) for k, v in frozen.items())


def test_fidelity_of_the_full_model_is_perfect_and_falls_with_density():
    model = tiny.model()
    perfect = distill.fidelity(model, pairs())
    assert perfect["kl"] == pytest.approx(0, abs=1e-5) and perfect["agreement"] == 1
    kl = [distill.fidelity(caprese.attach(model, "topk", d), pairs())["kl"] for d in (0.9, 0.5, 0.1)]
    assert 1e-6 < kl[0] < kl[1] < kl[2]


@pytest.mark.parametrize("method", caprese.METHODS)
def test_fidelity_runs_the_model_as_inference_does(method):
    """One shared prefill and both decodes equal two teacher-forced passes, row by row."""
    model = tiny.fill(caprese.attach(tiny.model(), method, 0.4, rank=6))
    batch = next(data.batches(pairs(5), 5))
    twice = distill.respond_twice(model, batch)
    forced = model.hidden(batch.tokens), model.hidden(batch.tokens, generated=batch.generated)
    for row, (start, end) in enumerate(zip(batch.prompt_lengths, batch.lengths)):
        for ours, theirs in zip(twice, forced):
            assert_close(ours[row, :end - start], theirs[row, start:end], rtol=1e-4, atol=1e-4)


def test_fidelity_ignores_padding():
    model = caprese.attach(tiny.model(), "griffin", 0.4)
    one, many = (distill.fidelity(model, pairs(9), size) for size in (1, 9))
    assert one == pytest.approx(many, rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_training():
    model = caprese.attach(tiny.model(), "griffin", 0.4, rank=6)
    with pytest.raises(ValueError, match="learning rate"):
        distill.train(model, pairs(), lambda model, batch: float("nan"), 1e-3, 1, 10, 0, "end-to-end")


def test_recovered():
    rows = [{"math_accuracy": a} for a in (0.9, 0.1, 0.5)]
    assert distill.recovered(rows) == pytest.approx(0.5)
    assert distill.recovered(rows[:2]) is None and distill.recovered([rows[0]] * 3) is None
    assert distill.recovered([{"x kl": k} for k in (0.0, 2.0, 0.5)]) == pytest.approx(0.75)


def run(*args):
    return subprocess.run([sys.executable, "distill.py", *args], cwd=ROOT, capture_output=True, text=True)


def test_command_prints_the_table_and_writes_an_adapter(tmp_path):
    file = tmp_path / "a.safetensors"
    done = run("--samples", "96", "--eval-samples", "16", "--e2e-epochs", "1", "--json", "--out", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [r["method"] for r in rows] == ["full", "griffin", "+ layer-wise", "+ E2E"]
    assert set(rows[0]) == {"method", "math_accuracy", "reading_accuracy", "mean_response_tokens", "recovered",
                            "added_parameters_percent", "seconds"}
    assert rows[0]["added_parameters_percent"] == 0 < rows[2]["added_parameters_percent"] <= 2
    assert rows[0]["math_accuracy"] > rows[1]["math_accuracy"] + 0.3
    assert rows[3]["recovered"] > 0
    import sample
    model = sample.Transformer.from_pretrained(sample.EMBEDDED)
    assert list(caprese.sparse_layers(caprese.load_adapter(model, file))) == [0, 1, 2]


@pytest.mark.parametrize("args, words", [
    (["--model", "nowhere"], "--data"),
    (["--model", "nowhere", "--data", "nothing.jsonl"], "nowhere"),
    (["--density", "0"], "density"),
    (["--layers", "9"], "layers"),
    (["--layers", "some"], "--layers"),
    (["--out", "no/such/folder/a.safetensors"], "folder"),
    (["--samples", "0"], "samples"),
])
def test_bad_input_is_one_line_and_exit_code_2(args, words):
    done = run("--eval-samples", "4", *args)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (ROOT / "adapter.safetensors").exists()
