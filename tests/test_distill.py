"""The closed form, both stages, the command. Run: python -m pytest tests/test_distill.py"""

import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
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


class OwnStatistic(caprese.GRIFFIN):
    """Another choice of neurons; its correction is x L R, so that (7) has a closed form."""

    def statistic(self, x, gate, z, counted=None):
        magnitude = z.abs()
        if counted is not None:
            magnitude = magnitude * counted[..., None]
        return magnitude.amax(dim=1)

    def merge(self, s, s_G):
        return torch.maximum(s, s_G)


class NonLinear(caprese.GRIFFIN):
    """A correction that is not x L R, so that (7) has no closed form."""
    gathers = False

    def correction(self, x):
        return super().correction(x).tanh()


METHODS = ["griffin", "cats", OwnStatistic]
DISTANCES = {"mse": lambda model: distill.mse,
             "kl": lambda model: partial(distill.kl_divergence, model)}


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


def attached(method, device, layers=range(4), **changes):
    return caprese.attach(tiny.model(device=device, **changes), method, 0.4, layers, rank=6)


def learned(model):
    return {name: p.detach().clone() for name, p in caprese.adapter_parameters(model).items()}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(samples, device):
    """(tokens [1, T], which of them are generated [1, T]) of each sample, without padding."""
    for prompt, response in samples:
        tokens = torch.tensor([prompt + response], device=device)
        yield tokens, torch.arange(tokens.shape[1], device=device)[None] >= len(prompt)


def plain_residuals(model, samples, device):
    """{ff: (x, e)}, both [N, D], as (7) defines them: by two calls of each block, no padding."""
    found = {ff: ([], []) for ff in caprese.sparse_layers(model).values()}
    for tokens, generated in one_by_one(samples, device):
        seen = {}
        hooks = [ff.register_forward_pre_hook(lambda ff, args: seen.update({ff: args[0]}))
                 for ff in found]
        model(tokens)
        for hook in hooks:
            hook.remove()
        for ff, x in seen.items():
            correction = ff.L, ff.R
            ff.set_adapter(ff.L, torch.zeros_like(ff.R))
            with torch.no_grad(), caprese.phase(model, "teacher_forced", generated=generated):
                sparse = ff(x)
            ff.L, ff.R = correction
            found[ff][0].append(x[generated])
            found[ff][1].append((ff.down_proj(ff.neurons(x)[1]) - sparse)[generated])
    return {ff: (torch.cat(xs), torch.cat(es)) for ff, (xs, es) in found.items()}


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


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_closed_form_is_the_minimiser_with_the_ridge(rank, eps):
    """The ridge is as more tokens: x = sqrt(ridge) I with e = 0. And the gradient is zero."""
    x, e = regression()
    A, C = x.T @ x, x.T @ e
    ridge = eps * A.diagonal().mean()
    L, R = distill.closed_form(A, C, rank, eps)
    more_x = torch.cat([x, ridge.sqrt() * torch.eye(12, dtype=x.dtype)])
    more_e = torch.cat([e, torch.zeros(12, 12, dtype=e.dtype)])
    L_svd, R_svd = svd_solution(more_x, more_e, rank)
    assert_close(L @ R, L_svd @ R_svd)
    L, R = L.requires_grad_(), R.requires_grad_()
    objective = energy(x, e, L, R) + ridge * (L @ R).square().sum()
    for gradient in torch.autograd.grad(objective, (L, R)):
        assert gradient.abs().max() < 1e-9 * C.abs().max()  # in float64


@pytest.mark.parametrize("rank", [2, 7])
def test_closed_form_is_the_former_one_where_the_ridge_is_negligible(rank):
    """B^T A B is the covariance of what B predicts; C^T B is that plus the ridge's share."""
    x, e = regression()
    A, C = x.T @ x, x.T @ e
    B = torch.linalg.solve(A + 1e-6 * A.diagonal().mean() * torch.eye(12, dtype=A.dtype), C)
    V = torch.linalg.eigh(B.T @ A @ B).eigenvectors[:, -rank:]
    L, R = distill.closed_form(A, C, rank)
    assert_close(L @ R, B @ V @ V.T, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("case", ["rank 0", "dead inputs", "few tokens", "one token", "no token",
                                  "equal inputs", "nothing to mend"])
def test_poor_data_end_in_a_finite_fit_that_does_no_harm(case):
    x, e = regression()
    rank = 0 if case == "rank 0" else 5
    x = {"dead inputs": x * (torch.arange(12) % 3 > 0), "few tokens": x[:4], "one token": x[:1],
         "no token": x[:0], "equal inputs": x[:, :1].expand(-1, 12)}.get(case, x)
    e = torch.zeros_like(e) if case == "nothing to mend" else e[:len(x)]
    L, R = distill.closed_form(x.T @ x, x.T @ e, rank)
    assert L.shape == (12, rank) and R.shape == (rank, 12)
    assert L.isfinite().all() and R.isfinite().all()
    best = energy(x, e, *svd_solution(x, e, rank)) if len(x) else 0.0
    total = e.square().sum()
    assert energy(x, e, L, R) <= best + 1e-4 * total  # what the ridge costs
    assert case not in ("no token", "nothing to mend") or not (L @ R).any()


# ---- layer-wise

@pytest.mark.parametrize("method", METHODS)
def test_moments_are_sums_over_response_tokens_of_the_full_model(method, device):
    model = tiny.fill(attached(method, device))  # L and R do not enter x and e
    expected = plain_residuals(model, samples(7), device)
    found = {ff: distill.new_moments(ff) for ff in expected}
    tokens = {ff: [] for ff in expected}

    def visit(ff, x, e):
        distill.add_moments(*found[ff], x, e)
        tokens[ff].append((x, e))

    for batch in data.batches(samples(7), 3, device):
        distill.visit_residuals(model, batch, visit)
    for ff, (x, e) in expected.items():  # the products are summed in float32, entries are about 10
        x, e = x.double(), e.double()
        assert_close(found[ff], (x.T @ x, x.T @ e), rtol=1e-4, atol=1e-4)
        assert sum(len(x) for x, _ in tokens[ff]) == len(x)
        assert e.abs().mean() > 0.01
    batch = data.collate(samples(7), [4], device)
    for parts in tokens.values():
        parts.clear()
    distill.visit_residuals(model, batch, visit)
    for ff, (x, e) in plain_residuals(model, samples(7)[4:5], device).items():  # token by token
        assert_close(tokens[ff][0], (x, e), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_fit_closed_form_is_the_optimum_of_every_block(method, device):
    model = tiny.fill(attached(method, device))
    distill.fit_closed_form(model, data.batches(samples(), 3, device))
    for ff, (x, e) in plain_residuals(model, samples(), device).items():
        x, e = x.double(), e.double()
        best = energy(x, e, *svd_solution(x, e, 6))
        found = energy(x, e, ff.L.double(), ff.R.double())
        assert found < best * 1.001  # what states in float32 and the ridge cost
        assert found < 0.99 * e.square().sum()


@pytest.mark.parametrize("method", caprese.METHODS)
def test_the_closed_form_leaves_no_more_than_adam(method, device):
    model = attached(method, device)
    assert distill.unexplained(model, samples()) == pytest.approx(1)  # R is zero
    distill.train_layerwise(model, samples(), lr=1e-2, epochs=10, batch_size=16)
    by_adam = {ff: ff_unexplained(model, ff) for ff in caprese.sparse_layers(model).values()}
    distill.fit_closed_form(model, data.batches(samples(), 16, device))
    for ff, fraction in by_adam.items():
        assert ff_unexplained(model, ff) < fraction < 0.99


def ff_unexplained(model, ff):
    """The fraction of the residual's energy that one block's x L R misses."""
    x, e = plain_residuals(model, samples(), model.device)[ff]
    return float(energy(x, e, ff.L.detach(), ff.R.detach()) / e.square().sum())


def test_unexplained_is_the_mean_over_the_layers(device):
    model = tiny.fill(attached("griffin", device))
    each = [ff_unexplained(model, ff) for ff in caprese.sparse_layers(model).values()]
    for micro_batch in (1, 7, 40):
        found = distill.unexplained(model, samples(), micro_batch)
        assert found == pytest.approx(sum(each) / 4, rel=1e-4)
    assert distill.unexplained(caprese.detach(model), samples()) == 0


@pytest.mark.parametrize("method", [*METHODS, NonLinear])
def test_the_layerwise_loss_is_7_and_its_gradients_reach_L_and_R_alone(method, device):
    model = tiny.fill(attached(method, device))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batch = data.collate(samples(9), range(9), device)
    loss = distill.layerwise_backward(model, batch)
    found = gradients(model)
    assert len(found) == 8 and all(name.endswith((".L", ".R")) for name in found)
    expected = 0.0
    for ff, (x, e) in plain_residuals(model, samples(9), device).items():
        error = (e.detach() - ff.correction(x.detach())).square().sum()
        wanted = torch.autograd.grad(error, (ff.L, ff.R))
        assert_close((ff.L.grad, ff.R.grad), wanted, rtol=1e-3, atol=1e-3)
        expected += error.item()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_a_correction_that_is_not_x_L_R_has_no_closed_form(device):
    model = attached(NonLinear, device)
    with pytest.raises(ValueError, match="NonLinear is not x L R.*--layerwise adam"):
        distill.fit_closed_form(model, data.batches(samples(), 3, device))
    before = distill.unexplained(model, samples())
    distill.train_layerwise(model, samples(), lr=1e-2, epochs=5, batch_size=16)
    assert distill.unexplained(model, samples()) < 0.95 * before


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
        with caprese.phase(model, "teacher_forced", generated=batch.generated):
            sparse = model.model(batch.tokens)[batch.response]
    if loss == "mse":
        before = (full - sparse).square().mean(-1).sum().item()
    else:
        p, q = model.logits(full).softmax(-1), model.logits(sparse).softmax(-1)
        before = (p * (p / q).log()).sum().item()
    first = distill.e2e_backward(model, batch, DISTANCES[loss](model))
    assert float(first) == pytest.approx(before, rel=1e-4)  # R = 0
    distill.train_end_to_end(model, samples(), lr=1e-2, epochs=10, batch_size=10, loss=loss)
    assert set(gradients(model)) == {f"model.layers.{i}.mlp.{name}" for i in (0, 1)
                                     for name in "LR"}
    assert distill.e2e_backward(model, batch, DISTANCES[loss](model)) < 0.8 * before
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_e2e_loss_and_gradients_equal_a_plain_computation(method, loss, device):
    """Sample by sample, without padding; the teacher is another model of the same weights."""
    model, teacher = tiny.fill(attached(method, device)), tiny.model(device=device)
    for parameter in caprese.adapter_parameters(model).values():
        parameter.requires_grad_(True)
    total = 0.0
    for prompt, response in samples(9):
        tokens, generated = next(one_by_one([(prompt, response)], device))
        with caprese.phase(model, "teacher_forced", generated=generated):
            student = model.model(tokens)[generated]
        target = teacher.model(tokens)[generated]
        if loss == "mse":
            total = total + ((student - target) ** 2).sum() / 32  # D
        else:
            p, q = model.logits(target).softmax(-1), model.logits(student).softmax(-1)
            total = total + (p * (p.log() - q.log())).sum()
    total.backward()
    wanted = gradients(model)
    model.zero_grad()
    found = distill.e2e_backward(model, data.collate(samples(9), range(9), device),
                                 DISTANCES[loss](model))
    assert float(found) == pytest.approx(total.item(), rel=1e-4)
    # Sums over the tokens in another order, in float32, of entries up to 100.
    assert_close(gradients(model), wanted, rtol=1e-3, atol=1e-3)
    assert len(wanted) == 8 and all(gradient.any() for gradient in wanted.values())


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_gradient_checkpointing_changes_memory_and_not_gradients(loss, monkeypatch, device):
    """The same gradients, though layers run again in the backward pass; far fewer bytes kept."""
    monkeypatch.setattr(distill, "LOGIT_CHUNK", 16)
    batch, found, kept = next(data.batches(samples(), 40, device)), [], []
    for checkpointing in (False, True):
        model = tiny.fill(attached("griffin", device))
        model.model.gradient_checkpointing, sizes = checkpointing, []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        for parameter in caprese.adapter_parameters(model).values():
            parameter.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            distill.e2e_backward(model, batch, DISTANCES[loss](model))
        found.append(gradients(model))
        kept.append(sum(sizes))
    assert len(found[0]) == 8
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)  # float32, summed in chunks
    assert kept[1] < kept[0] / 2


def test_end_to_end_switches_gradient_checkpointing_on_and_off(device):
    """Also with a loss of one's own."""
    model, seen = attached("griffin", device), []

    def watched(student, teacher):
        seen.append(model.model.gradient_checkpointing)
        return distill.mse(student, teacher)

    for checkpointing in (True, False):
        distill.train_end_to_end(model, samples(9), epochs=1, micro_batch=9, loss=watched,
                                 gradient_checkpointing=checkpointing)
        assert not model.model.gradient_checkpointing
    assert seen == [True, False]


# ---- Adam

def mean_loss(model, batch):
    """Equation (8) as a mean over a batch's response tokens, with a graph."""
    with torch.no_grad():
        teacher = model.model(batch.tokens)[batch.response]
    with caprese.phase(model, "teacher_forced", generated=batch.generated):
        student = model.model(batch.tokens)[batch.response]
    return (student - teacher).square().mean()


def test_training_equals_a_plain_loop(device):
    """Adam written out, on the mean of each batch; the learning rate rises, then falls linearly."""
    lr, epochs, batch_size, seed = 1e-2, 3, 4, 5
    model, plain = (tiny.fill(attached("griffin", device)) for _ in range(2))
    distill.train_end_to_end(model, samples(30), lr, epochs, batch_size, micro_batch=3, seed=seed)
    parameters = list(caprese.adapter_parameters(plain).values())
    for p in parameters:
        p.requires_grad_(True)
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    step, total = 0, 3 * 8
    for epoch in range(epochs):
        for indices in data.batch_indices(samples(30), batch_size, seed + epoch):
            step += 1
            loss = mean_loss(plain, data.collate(samples(30), indices, device))
            warm_up = 1  # 2% of 24 steps
            rate = lr * min(step / warm_up, (total - step + 1) / (total - warm_up + 1))
            with torch.no_grad():
                for i, gradient in enumerate(torch.autograd.grad(loss, parameters)):
                    m[i] = 0.9 * m[i] + 0.1 * gradient
                    v[i] = 0.999 * v[i] + 0.001 * gradient ** 2
                    m_hat, v_hat = m[i] / (1 - 0.9 ** step), v[i] / (1 - 0.999 ** step)
                    parameters[i] -= rate * m_hat / (v_hat.sqrt() + 1e-8)
    assert step == total
    # Adam divides by the size of the gradient, so rounding errors show where it is small.
    assert_close(learned(model), learned(plain), rtol=1e-3, atol=2e-4)


def watch_training(monkeypatch, model, count, batch_size, epochs, **settings):
    """Train with a loss that depends on nothing: [(sample indices, learning rate)] of each step."""
    steps, rates = [], []
    micro_batches, adam_step = distill.micro_batches, torch.optim.Adam.step

    def watch_batch(samples, indices, *args):
        steps.append(list(indices))
        return micro_batches(samples, indices, *args)

    def watch_step(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return adam_step(optimizer)

    def backward(model, batch):
        loss = sum(p.sum() for p in caprese.adapter_parameters(model).values())
        loss.backward()
        return loss.detach()

    monkeypatch.setattr(distill, "micro_batches", watch_batch)
    monkeypatch.setattr(torch.optim.Adam, "step", watch_step)
    distill.train(model, samples(count), backward, "watched", 1e-3, epochs, batch_size, **settings)
    return list(zip(steps, rates, strict=True))


def test_the_schedule_warms_up_for_2_percent_and_falls_linearly(monkeypatch, device):
    steps = watch_training(monkeypatch, attached("griffin", device), 100, 1, 3)
    rates = torch.tensor([rate for _, rate in steps])
    assert len(rates) == 300
    assert_close(rates[:6], torch.arange(1, 7) * 1e-3 / 6)  # 2% of 300 steps
    falls = rates[5:].diff()
    assert rates.max() == rates[5] and falls.max() < 0
    assert_close(falls, falls[:1].expand_as(falls), rtol=1e-3, atol=1e-8)
    assert 0 < rates[-1] < 1e-5


def test_every_epoch_has_each_sample_once_and_batches_of_its_own(monkeypatch, device):
    steps = watch_training(monkeypatch, attached("griffin", device), 40, 5, 3, seed=7)
    epochs = [[frozenset(indices) for indices, _ in steps[i:i + 8]] for i in (0, 8, 16)]
    for epoch in epochs:
        assert sorted(index for batch in epoch for index in batch) == list(range(40))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert epochs[one] != epochs[other]              # another order,
        assert set(epochs[one]) != set(epochs[other])    # and other batches
    monkeypatch.undo()
    again = watch_training(monkeypatch, attached("griffin", device), 40, 5, 3, seed=7)
    assert [indices for indices, _ in again] == [indices for indices, _ in steps]


def test_micro_batches_do_not_change_the_step(device):
    """Gradients are sums over the parts of a batch, divided by the tokens of the whole."""
    after = []
    for micro_batch in (40, 3):
        model = tiny.fill(attached("griffin", device))
        distill.train_end_to_end(model, samples(), 1e-2, 2, 20, micro_batch=micro_batch)
        after.append(learned(model))
    # Adam divides by the size of the gradient, so rounding errors show where it is small.
    assert_close(after[0], after[1], rtol=1e-3, atol=1e-4)


# ---- float16

@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_in_float16_gradients_do_not_vanish_however_many_tokens_a_step_has(loss, monkeypatch,
                                                                           device):
    """A batch is said to have a million tokens. Adam sees float32's gradients, only rounded."""
    seen = []

    def watch_step(optimizer):
        grads = [p.grad.flatten() for p in optimizer.param_groups[0]["params"]]
        seen.append(torch.cat(grads).double())

    class Long(list):
        """Ids that are said to be many."""
        def __len__(self):
            return 10 ** 6

    monkeypatch.setattr(torch.optim.Adam, "step", watch_step)
    monkeypatch.setattr(data, "batch_indices", lambda samples, size, seed=None: [[0, 1, 2, 3]])
    batch = data.collate(samples(4), range(4), device)
    monkeypatch.setattr(distill, "micro_batches", lambda *args: [batch])
    many = [(prompt, Long(response)) for prompt, response in samples(4)]
    for dtype in (torch.float32, torch.float16):
        model = tiny.fill(caprese.attach(tiny.model(device=device).to(dtype), "griffin", 0.4,
                                         rank=6))
        distill.train_end_to_end(model, many, epochs=1, loss=loss)
    single, half = seen
    assert half.count_nonzero() > 0.99 * len(half)
    assert torch.cosine_similarity(single, half, dim=0) > 0.99
    assert half.norm() / single.norm() == pytest.approx(1, rel=0.02)
    # The mean itself is beyond float16, so a loss divided before its backward pass has none left.
    assert (single / 10 ** 2).half().count_nonzero() < 0.5 * len(single)


def overflowing(device, dtype=torch.float16):
    """A model whose third layer makes numbers that float16 cannot hold."""
    model = tiny.model(device=device)
    model.model.layers[2].mlp.down_proj.weight.mul_(1e4)
    model.model.layers[2].mlp.up_proj.weight.mul_(1e3)
    return caprese.attach(model.to(dtype), "griffin", 0.4, "all", rank=6)


@pytest.mark.parametrize("fit", [
    lambda model: distill.fit_closed_form(model, data.batches(samples(), 9, model.device)),
    lambda model: distill.train_layerwise(model, samples(), epochs=1),
    lambda model: distill.train_end_to_end(model, samples(), epochs=1),
    lambda model: distill.train_end_to_end(model, samples(), epochs=1, loss="kl"),
], ids=["closed", "adam", "mse", "kl"])
def test_overflow_is_called_overflow(fit, device):
    with pytest.raises(ValueError, match="overflow.*float16.*--dtype bfloat16"):
        fit(overflowing(device))
    model = overflowing(device, torch.float32)
    fit(model)
    assert all(p.isfinite().all() for p in learned(model).values())


# ---- the distance to the full model

def test_kl_to_full_is_0_for_the_full_model_and_falls_with_density(device):
    model = tiny.model(device=device)
    assert distill.kl_to_full(model, samples()) == pytest.approx(0, abs=1e-5)
    kl = []
    for density in (0.9, 0.5, 0.1):
        caprese.attach(model, "griffin", density, "all")
        kl.append(distill.kl_to_full(model, samples()))
    assert 1e-6 < kl[0] < kl[1] < kl[2]


@pytest.mark.parametrize("method", METHODS)
def test_kl_to_full_equals_a_plain_computation(method, device):
    """From the logits of each sample alone, in the definition's own words."""
    model = tiny.fill(attached(method, device))
    kl = []
    for prompt, response in samples(9):
        tokens = torch.tensor([prompt + response], device=device)
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


# ---- what must survive an interruption

@pytest.mark.parametrize("stage, first", [("adam", 1), ("mse", 1), ("mse", 0), ("kl", 2)])
def test_interrupted_training_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch, device,
                                                                  stage, first):
    """4 batches an epoch of 2 parts each, a checkpoint every 3 steps; stopped before or after."""
    def train(checkpoint=None):
        model = tiny.fill(attached("griffin", device))
        settings = {"lr": 1e-2, "epochs": 2, "batch_size": 10, "micro_batch": 5}
        if stage == "adam":
            distill.train_layerwise(model, samples(), checkpoint=checkpoint, save_every=3,
                                    **settings)
        else:
            distill.train_end_to_end(model, samples(), loss=stage, checkpoint=checkpoint,
                                     save_every=3, **settings)
        return learned(model)

    whole, name = train(), "layerwise_backward" if stage == "adam" else "e2e_backward"
    backward, calls = getattr(distill, name), []

    def interrupted(*args, **settings):
        calls.append(args)
        if len(calls) == 6 * first + 4:  # in the second step after the checkpoint
            raise KeyboardInterrupt
        return backward(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(distill, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(distill.Checkpoint(tmp_path / "state", {}))
    assert caprese.load_tensors(tmp_path / "state")[1]["step"] == 3 * first
    found = train(distill.Checkpoint(tmp_path / "state", {}))
    assert all(torch.equal(p, found[name]) for name, p in whole.items())


def test_the_next_stage_does_not_take_up_what_an_earlier_one_had_saved(tmp_path):
    """An interrupted first stage is finished; then the second one begins where it has ended."""
    file = tmp_path / "state"
    distill.Checkpoint(file, {}).save("layer-wise", 2, {"L": torch.zeros(3)})
    checkpoint, tensors = distill.Checkpoint(file, {}), {"L": torch.ones(3)}
    assert checkpoint.restore("layer-wise", tensors) == 2 and not tensors["L"].any()
    tensors["L"] += 5
    memory = {"L.step": torch.tensor(0.0)}
    assert checkpoint.restore("E2E", tensors | memory) == 0
    assert torch.equal(tensors["L"], torch.full((3,), 5.0))
    saved, about = caprese.load_tensors(file)
    assert torch.equal(saved["L"], tensors["L"]) and about["stage"] == "E2E"


def test_seconds_and_rows_go_on_too(tmp_path):
    file = tmp_path / "state"
    first = distill.Checkpoint(file, {"a": 1})
    first.restore("E2E", {})
    first.start -= 100  # so long ago
    first.about["rows"].append({"method": "full"})
    first.save("E2E", 1, {})
    second = distill.Checkpoint(file, {"a": 1})
    assert second.restore("E2E", {}) == 1
    second.save("E2E", 2, {})
    assert 100 <= second.about["seconds"] < 110 and second.about["rows"] == [{"method": "full"}]
    second.restore("another", {})
    assert second.about["seconds"] < 10


def test_a_step_that_is_no_number_ends_the_training_and_keeps_the_last_good_state(tmp_path, device,
                                                                                  monkeypatch):
    model = attached("griffin", device)
    e2e_backward, calls = distill.e2e_backward, []

    def backward(*args, **settings):
        loss = e2e_backward(*args, **settings)
        calls.append(loss)
        if len(calls) > 3:
            for p in caprese.adapter_parameters(model).values():
                p.grad *= math.nan
        return loss

    monkeypatch.setattr(distill, "e2e_backward", backward)
    with pytest.raises(ValueError, match="inf or NaN in torch.float32.*learning rate"):
        distill.train_end_to_end(model, samples(), 1e-3, 2, 10, micro_batch=10, save_every=1,
                                 checkpoint=distill.Checkpoint(tmp_path / "state", {}))
    assert len(calls) == 4
    tensors, about = caprese.load_tensors(tmp_path / "state")
    assert about["step"] == 3 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_full_disk_keeps_the_last_good_state(tmp_path):
    """The new file does not fit: one line, the old one untouched, no temporary file left."""
    resource = pytest.importorskip("resource")
    checkpoint = distill.Checkpoint(tmp_path / "state", {})
    checkpoint.save("E2E", 1, {"x": torch.ones(3)})
    before = (tmp_path / "state").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as on a disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write"):
            checkpoint.save("E2E", 2, {"x": torch.ones(100_000)})
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
COLUMNS = {"method", "math_accuracy", "math_error", "reading_accuracy", "reading_error",
           "unexplained", "seconds", "added_parameters_percent", "recovered"}


def problem_file(file, count=16, seed=0):
    """Write problems of the bundled model's kind as JSONL; returns the file."""
    lines = []
    for problem in data.problems("maths", count, seed):
        lines.append(json.dumps({"question": problem.question, "response": problem.response}))
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def table(text):
    """The rows of a printed table, {name of the row: its cells}."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    width = next(len(cells) for cells in lines if cells[0] == "method")
    return {cells[0]: cells for cells in lines if len(cells) == width}


def test_command_prints_the_table_and_writes_an_adapter(tmp_path, command):
    file = tmp_path / "a.safetensors"
    code, out, err = command("--samples", 96, "--eval-samples", 10, "--e2e-epochs", 1, "--json",
                             "--out", file)
    assert code == 0
    rows = json.loads(out)["rows"]
    assert json.loads(out)["adapter"] == str(file)
    assert [row["method"] for row in rows] == ["full", "griffin", "+ layer-wise", "+ E2E"]
    assert all(set(row) == COLUMNS for row in rows)
    printed = table(err)
    assert printed["method"] == list(rows[0])
    for row in rows:
        assert printed[row["method"]] == [sample.format_cell(value) for value in row.values()]
    assert rows[0]["added_parameters_percent"] == rows[1]["added_parameters_percent"] == 0
    assert 0 < rows[2]["added_parameters_percent"] <= 2
    for row in rows:
        for kind, count in (("math", 10), ("reading", 5)):
            error = sample.standard_error(row[f"{kind}_accuracy"], count)
            assert row[f"{kind}_error"] == error > 0
    assert rows[0]["math_accuracy"] > rows[1]["math_accuracy"] + 0.3
    assert rows[3]["recovered"] > 0
    assert rows[0]["unexplained"] == 0 and rows[1]["unexplained"] == pytest.approx(1)
    assert rows[2]["unexplained"] < 0.7
    model = models.Transformer.from_pretrained(sample.BUNDLED)
    assert list(caprese.sparse_layers(caprese.load_adapter(model, file))) == [0, 1, 2, 3]
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]


def test_rows_are_printed_when_they_are_measured(tmp_path, command, monkeypatch, capsys):
    layerwise_stage, seen = distill.layerwise_stage, []

    def watched(*args):
        seen.append(capsys.readouterr().out)
        layerwise_stage(*args)

    monkeypatch.setattr(distill, "layerwise_stage", watched)
    code, out, _ = command(*QUICK, "--out", tmp_path / "a")
    assert code == 0
    assert set(table(seen[0])) == {"method", "full", "griffin"}
    assert "+ layer-wise" in out and "griffin" not in out.split("wrote")[0]


def test_without_a_terminal_progress_is_lines(tmp_path, command, monkeypatch):
    """They tell the stage, the share of its steps, the loss and the time that is left."""
    tqdm = sample.tqdm

    def at_once(steps, **settings):
        return tqdm(steps, **settings | {"miniters": 1, "mininterval": 0, "delay": 0})

    monkeypatch.setattr(sample, "tqdm", at_once)
    file = problem_file(tmp_path / "seen.jsonl", 8)
    code, _, err = command("--model", sample.BUNDLED, "--data", file, "--eval-data", file, "--rank",
                           8, "--e2e-epochs", 1, "--e2e-batch-size", 2, "--out", tmp_path / "a")
    assert code == 0 and "\r" not in err
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert all(re.match(r"(KL|closed form|E2E|unexplained): +\d+% ", line) for line in lines)
    e2e = [line for line in err.splitlines() if line.startswith("E2E")]
    assert [re.search(r"(\d+)%", line)[1] for line in e2e[:4]] == ["0", "25", "50", "75"]
    assert re.search(r"<\d\d:\d\d.*loss=\d", e2e[3])


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


@pytest.mark.parametrize("count, noted", [(2, True), (24, False)])
def test_few_response_tokens_are_named(tmp_path, command, count, noted):
    """One response has about 30 tokens, 24 have more than four times the hidden_size of 128."""
    file = problem_file(tmp_path / "seen.jsonl", count)
    code, out, err = command(*QUICK, "--model", sample.BUNDLED, "--data", file, "--rank", 8,
                             "--samples", count, "--out", tmp_path / "a")
    assert code == 0
    tokenizer = data.Tokenizer(sample.BUNDLED)
    tokens = sum(len(tokenizer.encode(p.response)) for p in data.problems("maths", count, 0))
    assert f"{count} samples, {tokens} response tokens" in out
    note = f"{tokens} response tokens are fewer than 4 times the hidden_size, 128"
    assert (note in err) == noted == (tokens < 512)


def flags_of_runs(tmp_path):
    model = ("--model", sample.BUNDLED, "--rank", 8, "--data")
    return {"cats": ("--method", "cats"), "all": ("--layers", "all"),
            "indices": ("--layers", "0,2"), "density": ("--density", 0.3),
            "model": (*model, problem_file(tmp_path / "problems.jsonl"))}


@pytest.mark.parametrize("name", [
    "model", *(pytest.param(name, marks=pytest.mark.slow)
               for name in ("cats", "all", "indices", "density"))])
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


@pytest.mark.parametrize("block, stages", [
    ("OwnStatistic", ("--e2e-epochs", 0)), ("NonLinear", ("--layerwise", "none"))])
def test_a_block_of_one_s_own_stands_in_the_table(tmp_path, command, monkeypatch, block, stages):
    """By its own name, beside the full model; what cannot be fitted in closed form, by Adam."""
    monkeypatch.syspath_prepend(ROOT / "tests")
    file = problem_file(tmp_path / "seen.jsonl", 8)
    words = ("--model", sample.BUNDLED, "--data", file, "--eval-data", file, "--rank", 8,
             "--e2e-epochs", 1, "--e2e-lr", 1e-3, "--block", f"test_distill:{block}", "--json")
    code, out, err = command(*words, *stages, "--out", tmp_path / "a")
    assert code == 0, err
    full, sparse, corrected = json.loads(out)["rows"]
    assert sparse["method"] == f"test_distill:{block}" and f"test_distill:{block}" in table(err)
    assert f"--adapter {tmp_path / 'a'} --block test_distill:{block} --model" in err  # what to try
    assert caprese.read_adapter(tmp_path / "a")[1]["method"] == f"test_distill:{block}"
    assert full["seen kl"] == 0 < corrected["seen kl"] < sparse["seen kl"]


def test_a_block_without_a_closed_form_is_refused_by_it(tmp_path, command, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    code, out, err = command(*QUICK, "--block", "test_distill:NonLinear", "--out", tmp_path / "a")
    assert code == 2 and "--layerwise adam" in err.splitlines()[-1]
    assert "full" not in out and list(tmp_path.iterdir()) == []  # before anything is measured


# ---- flags

def test_the_default_is_the_paper_s_two_equations():
    args = distill.arguments([])
    assert (args.layerwise, args.loss, args.rank, args.e2e_lr) == ("closed", "mse", 40, 3e-3)
    args = distill.arguments(["--model", "m", "--data", "d"])
    assert (args.layerwise, args.loss, args.rank, args.e2e_lr) == ("closed", "mse", 256, 1e-4)
    assert (args.samples, args.e2e_epochs, args.e2e_batch_size) == (20000, 3, 16)


@pytest.mark.parametrize("words, ours", [
    ((), {"rank": 40}),  # the bundled model has no room for 256
    (("--model", "m", "--data", "d"), {}),
    (("--rank", "8", "--loss", "kl"), {"rank": 8, "loss": "kl"}),
    (("--layerwise", "closed", "--e2e-lr", "1e-3"), {"rank": 40, "layerwise": "closed",
                                                     "e2e_lr": 1e-3}),
    (("--samples", "5", "--e2e-epochs", "1"), {"samples": 5, "rank": 40, "e2e_epochs": 1}),
])
def test_paper_is_the_paper_s_recipe_but_for_the_flags_given(words, ours):
    """Section 4 and appendix B: 20,000 samples, r = 256, Adam for both stages."""
    args = distill.arguments(["--paper", *words])
    expected = {"samples": 20000, "rank": 256, "layerwise": "adam", "loss": "mse", "e2e_lr": 1e-4,
                "e2e_epochs": 3, "e2e_batch_size": 16} | ours
    assert {key: getattr(args, key) for key in expected} == expected
    assert args.density == 0.5


def test_the_paper_s_layerwise_stage_is_adam_at_1e_3_for_20_epochs_of_128(monkeypatch, device):
    seen = []
    monkeypatch.setattr(distill, "train", lambda *args, **settings: seen.append(args[3:]))
    args = distill.arguments(["--paper"])
    distill.layerwise_stage(attached("griffin", device), samples(), args, None)
    assert seen == [("layer-wise", 1e-3, 20, 128)]


def test_the_two_starting_lines_say_what_will_be_done():
    args = distill.arguments(["--method", "cats", "--density", "0.7", "--e2e-lr", "2e-3"])
    text = distill.describe(args)
    assert len(text.splitlines()) == 2
    for part in ("cats, density 0.7", "rank 40", "the bundled model", "1 x ", "(7)", "closed",
                 "(8)", "mse", "1 epochs", "batches of 32", "0.002"):
        assert part in text
    text = distill.describe(distill.arguments(["--layerwise", "none"]))
    assert "layer-wise" not in text and "end-to-end" in text
    text = distill.describe(distill.arguments(["--e2e-epochs", "0"]))
    assert "layer-wise" in text and "end-to-end" not in text


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_a_missing_file_is_noticed_before_the_model_is_loaded(tmp_path, command, flag, monkeypatch):
    monkeypatch.setattr(models.Transformer, "from_pretrained",
                        lambda *args: pytest.fail("the model is loaded"))
    files = {"--data": problem_file(tmp_path / "problems.jsonl"), flag: tmp_path / "none.jsonl"}
    words = []
    for key, file in files.items():
        words += [key, file]
    code, _, err = command("--model", sample.BUNDLED, *words, "--out", tmp_path / "a")
    assert code == 2 and "none.jsonl" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("words, message", [
    (["--model", "nowhere"], "--data"),
    (["--data", "nothing.jsonl"], "--model"),
    (["--model", "nowhere", "--data", "nothing.jsonl"], "nowhere"),
    (["--density", "0"], "density"),
    (["--density", "nan"], "density"),
    (["--layers", "9"], "layers"),
    (["--layers", "0,0"], "layers"),
    (["--layers", "some"], "--layers"),
    (["--out", "no/such/folder/a.safetensors"], "folder"),
    (["--samples", "0"], "samples"),
    (["--rank", "1000"], "rank"),
    (["--device", "nowhere"], "device"),
    (["--method", "nothing"], "--method"),
    (["--block", "nothing:Nothing"], "nothing:Nothing"),
    (["--block", "caprese:attach"], "caprese:attach"),
    (["--fsdp"], "--fsdp"),
    (["--layerwise", "none", "--e2e-epochs", "0"], "nothing is learned"),
    (["--eval-data", "a/x.jsonl", "--eval-data", "b/x.jsonl"], "one name"),
    (["--resume"], "nothing to resume"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, command, words, message):
    code, _, err = command("--out", tmp_path / "a", "--eval-samples", 1, "--samples", 16, *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
@pytest.mark.parametrize("spelling", ["plain", "link", "relative"])
def test_an_output_that_is_an_input_is_refused(tmp_path, command, monkeypatch, flag, spelling):
    files = {name: problem_file(tmp_path / f"{name}.jsonl") for name in ("data", "eval")}
    used = files["data" if flag == "--data" else "eval"]
    before = used.read_bytes()
    (tmp_path / "link").symlink_to(used)
    monkeypatch.chdir(tmp_path)
    out = {"plain": used, "link": "link", "relative": f"./x/../{used.name}"}[spelling]
    (tmp_path / "x").mkdir()
    code, _, err = command("--model", sample.BUNDLED, "--data", files["data"], "--eval-data",
                           files["eval"], "--out", out)
    assert code == 2 and "would overwrite the input" in err and len(err.splitlines()) == 1
    assert used.read_bytes() == before


# ---- the same command after an interruption

def stop(*args, **settings):
    raise KeyboardInterrupt


def interrupted(command, monkeypatch, where, *words):
    """Run the command, which is told to stop where this function of distill is called."""
    with monkeypatch.context() as patch:
        patch.setattr(distill, where, stop)
        code, _, err = command(*words)
    assert code == 130 and "goes on" in err
    return err


def test_the_same_command_goes_on_by_itself(tmp_path, command, monkeypatch):
    """And ends as if it had not been interrupted; what was measured before is printed again."""
    file, whole, parts = (tmp_path / name for name in ("seen.jsonl", "whole", "parts"))
    problem_file(file, 6)
    words = ("--device", "cpu", "--model", sample.BUNDLED, "--data", file, "--eval-data", file,
             "--rank", 8, "--e2e-epochs", 1, "--e2e-batch-size", 2, "--save-every", 1)
    code, expected, _ = command(*words, "--json", "--out", whole)
    assert code == 0
    interrupted(command, monkeypatch, "closed_form", *words, "--out", parts)
    interrupted(command, monkeypatch, "e2e_backward", *words, "--out", parts)
    code, out, err = command(*words, "--json", "--out", parts, "--resume")
    assert code == 0
    assert f"Going on from {parts}.state: E2E, step 0" in err and "--fresh" in err
    assert whole.read_bytes() == parts.read_bytes()
    rows, wanted = json.loads(out)["rows"], json.loads(expected)["rows"]
    for row in rows + wanted:
        row.pop("seconds")
    assert rows == wanted
    assert list(table(err)) == ["method", "full", "griffin", "+ layer-wise", "+ E2E"]
    assert {found.name for found in tmp_path.iterdir()} == {"seen.jsonl", "whole", "parts"}


@pytest.mark.parametrize("changed, named", [
    (("--rank", 8), "rank"), (("--density", 0.4), "density"), (("--seed", 1), "seed"),
    (("--method", "cats"), "method"), (("--layers", "all"), "layers"),
    (("--dtype", "bfloat16"), "dtype"), (("--loss", "kl", "--rank", 8), "rank, loss"),
    (("--data", "other"), "training samples"), (("--samples", 8), "samples"),
    (("--eval-data", "other"), "evaluation samples"), (("--model", "other"), "model"),
])
def test_other_settings_or_data_do_not_go_on_and_are_named(tmp_path, command, monkeypatch, changed,
                                                           named):
    first, second = (problem_file(tmp_path / f"{seed}.jsonl", seed=seed) for seed in (0, 1))
    words = [*QUICK, "--model", sample.BUNDLED, "--data", first, "--out", tmp_path / "a",
             "--dtype", "float32", "--rank", 16]
    interrupted(command, monkeypatch, "closed_form", *words)
    if changed == ("--data", "other"):  # the file's content, under its name
        first.write_bytes(second.read_bytes())
        changed = ()
    if changed == ("--model", "other"):
        monkeypatch.setattr(caprese, "fingerprint", lambda model: "another")
        changed = ()
    changed = [second if word == "other" else word for word in changed]
    before = (tmp_path / "a.state").read_bytes()
    code, _, err = command(*words, *changed)
    assert code == 2 and len(err.splitlines()) == 1
    assert re.search(f"another .*{named}.*--fresh", err)
    assert (tmp_path / "a.state").read_bytes() == before


@pytest.fixture
def quick(tmp_path):
    """Flags of a run that measures little."""
    file = problem_file(tmp_path / "seen.jsonl", 4)
    return (*QUICK, "--model", sample.BUNDLED, "--data", file, "--rank", 16)


def test_what_changes_no_number_may_be_another_one(tmp_path, command, monkeypatch, quick):
    interrupted(command, monkeypatch, "closed_form", *quick, "--out", tmp_path / "a")
    (tmp_path / "seen.jsonl").rename(tmp_path / "moved.jsonl")
    monkeypatch.chdir(tmp_path)
    moved = [word if word != tmp_path / "seen.jsonl" else "moved.jsonl" for word in quick]
    code, _, err = command(*moved, "--out", "./a", "--json", "--save-every", 3,
                           "--gradient-checkpointing")
    assert code == 0 and "Going on" in err


def test_fresh_starts_anew(tmp_path, command, monkeypatch, quick):
    interrupted(command, monkeypatch, "closed_form", *quick, "--out", tmp_path / "a")
    code, out, _ = command(*quick, "--out", tmp_path / "a", "--rank", 8, "--fresh")
    assert code == 0 and "Going on" not in out
    assert not (tmp_path / "a.state").exists()
    tensors, _ = caprese.load_tensors(tmp_path / "a")
    assert tensors["model.layers.0.mlp.L"].shape == (128, 8)


def test_a_finished_run_says_so(tmp_path, command, quick):
    assert command(*quick, "--out", tmp_path / "a")[0] == 0
    before = (tmp_path / "a").read_bytes()
    code, _, err = command(*quick, "--out", tmp_path / "a", "--resume")
    assert code == 2 and len(err.splitlines()) == 1
    assert "nothing to resume" in err and "finished" in err
    assert (tmp_path / "a").read_bytes() == before


def test_a_damaged_state_is_one_line(tmp_path, command):
    (tmp_path / "a.state").write_bytes(b"no state")
    code, _, err = command(*QUICK, "--out", tmp_path / "a")
    assert code == 2 and "a.state" in err and len(err.splitlines()) == 1


# ---- processes that are killed

def run(*words, launcher=("distill.py",), **settings):
    return subprocess.run([sys.executable, *launcher, "--device", "cpu", *map(str, words)],
                          cwd=ROOT, capture_output=True, text=True, **settings)


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
def test_killed_and_resumed_is_bit_identical(tmp_path):
    kill_and_resume(tmp_path, "closed",
                    [(("layer-wise", 0), signal.SIGKILL), (("E2E", 2), signal.SIGKILL)])


def kill_and_resume(tmp_path, layerwise, points):
    """Whatever stage the signals meet: the same command goes on from the last checkpoint."""
    whole, file = tmp_path / "whole", tmp_path / "a.safetensors"
    short = (*SHORT, "--layerwise", layerwise)
    assert run(*short, "--out", whole).returncode == 0
    for at, how in points:
        code = interrupt(at, how, *short, "--out", str(file), file=file)
        assert code == (-how if how == signal.SIGKILL else 130)
        assert not file.exists()
    done = run(*short, "--out", file)
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == whole.read_bytes()
    assert {found.name for found in tmp_path.iterdir()} == {"whole", "a.safetensors"}
