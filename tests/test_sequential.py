"""Layer-wise block by block. Run: python -m pytest tests/test_sequential.py"""

import signal

import pytest
import tiny
import torch
from test_distill import (NonLinear, OwnStatistic, attached, energy, kill_and_resume, learned,
                          one_by_one, overflowing, samples, svd_solution)

import caprese
import data
import distill
from beyond import sequential


def block_regression(model, i, device):
    """(x, what the block's output lacks) of layer i, token by token, over all samples.

    Computed sample by sample, without padding, through the whole model.
    """
    layer, xs, es = model.model.layers[i], [], []
    for tokens, generated in one_by_one(samples(), device):
        seen = []
        hooks = [layer.mlp.register_forward_hook(lambda m, args, out: seen.append((args[0], out))),
                 layer.register_forward_hook(lambda m, args, out: seen.append(out))]
        with torch.no_grad():
            model.model(tokens)
            with caprese.phase(model, "teacher_forced", generated=generated):
                model.model(tokens)
        for hook in hooks:
            hook.remove()
        (_, ff_full), full, (x, ff_sparse), sparse = seen
        lacks = ff_full - ff_sparse if model.config.post_norms else full - sparse
        xs.append(x[generated].double())
        es.append(lacks[generated].double())
    return torch.cat(xs), torch.cat(es)


@pytest.mark.parametrize("method, family", [("griffin", {}), ("cats", {}), (OwnStatistic, {}),
                                            ("griffin", {"model_type": "gemma2"})])
def test_each_fit_is_the_optimum_given_those_before_it(method, family, device):
    model = attached(method, device, **family)
    sequential.fit(model, samples(), 3)
    for i, ff in caprese.sparse_layers(model).items():
        L, R = ff.L.detach().clone(), ff.R.detach().clone()
        ff.set_adapter(L, torch.zeros_like(R))
        x, e = block_regression(model, i, device)
        ff.set_adapter(L, R)
        found, best = energy(x, e, L.double(), R.double()), energy(x, e, *svd_solution(x, e, 6))
        assert found < best * 1.001  # what states in float32 and the ridge cost
        assert found < 0.99 * e.square().sum()


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_it_comes_closer_to_the_full_model_than_closed_than_none(method, device):
    batch = next(data.batches(samples(), 40, device))
    errors = {}
    for layerwise in ("none", "closed", "sequential"):
        model = attached(method, device)
        if layerwise == "closed":
            distill.fit_closed_form(model, data.batches(samples(), 3, device))
        if layerwise == "sequential":
            sequential.fit(model, samples(), 3)
        errors[layerwise] = distill.e2e_backward(model, batch, distill.mse)
    assert errors["sequential"] < errors["closed"] < errors["none"]


def test_the_first_block_has_the_closed_form_s_fit(device):
    """No block before it is sparse, and its output lacks what its FF's output lacks."""
    fits = []
    for sequentially in (True, False):
        model = attached("griffin", device)
        if sequentially:
            sequential.fit(model, samples(), 3)
        else:
            distill.fit_closed_form(model, data.batches(samples(), 3, device))
        ff = caprese.sparse_layers(model)[0]
        fits.append(ff.L @ ff.R)
    # L and R alone are free up to a sign. The residual is a difference of outputs of size 10.
    torch.testing.assert_close(fits[0], fits[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layers, passes", [([0, 1, 2, 3], [3, 3, 3, 2]), ([0, 1], [3, 2, 0, 0]),
                                            ([1, 3], [2, 3, 2, 2])])
def test_no_block_is_passed_more_often_than_it_must(layers, passes, device):
    """The full and the sparse states pass, and the sparse ones again with the fit, if needed."""
    model = attached("griffin", device, layers)
    calls = [0] * 4

    def count(i):
        def hook(module, args, output):
            calls[i] += 1
        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(count(i))
    sequential.fit(model, samples(), 10)
    assert calls == [4 * n for n in passes]  # 4 batches


def test_every_nth_sample_is_taken_where_not_all_fit(monkeypatch, device):
    total = sum(len(prompt) + len(response) for prompt, response in samples())
    fits = []
    for used, limit in ((samples(), -(-total // 2)), (samples()[::2], total), (samples(), total)):
        monkeypatch.setattr(sequential, "MAX_WAITING_TOKENS", limit)
        model = attached("griffin", device)
        sequential.fit(model, used, 3)
        fits.append(learned(model)["0.L"])
    assert torch.equal(fits[0], fits[1]) and not torch.equal(fits[0], fits[2])


def test_what_was_learned_before_does_not_count(device):
    fits = []
    for filled in (True, False):
        model = attached("griffin", device)
        if filled:
            tiny.fill(model)
        sequential.fit(model, samples(), 3)
        fits.append(learned(model))
    assert all(torch.equal(p, fits[1][name]) for name, p in fits[0].items())


@pytest.mark.parametrize("calls, num_fitted", [(6, 0), (14, 1), (26, 2), (40, 3)])
def test_an_interrupted_fit_loses_at_most_a_block_and_ends_with_the_same_bits(
        tmp_path, monkeypatch, device, calls, num_fitted):
    """4 batches pass a block 3 times, the last one twice: 12, 12, 12 and 8 calls."""
    file, whole = tmp_path / "state", attached("griffin", device)
    sequential.fit(whole, samples(), 10)
    run_layer, made = sequential.run_layer, []

    def interrupted(*args):
        made.append(args)
        if len(made) == calls:
            raise KeyboardInterrupt
        return run_layer(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "run_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sequential.fit(attached("griffin", device), samples(), 10,
                           distill.Checkpoint(file, {}))
    tensors, about = caprese.load_tensors(file)
    assert about["step"] == num_fitted
    assert [bool(tensors[f"{i}.R"].any()) for i in range(4)] == [i < num_fitted for i in range(4)]
    model = attached("griffin", device)
    sequential.fit(model, samples(), 10, distill.Checkpoint(file, {}))
    assert all(torch.equal(p, learned(model)[name]) for name, p in learned(whole).items())
    assert caprese.load_tensors(file)[1]["step"] == 4


def test_a_finished_fit_is_taken_up_without_any_pass(tmp_path, monkeypatch, device):
    """As when a run was killed while it measured the row of this stage."""
    whole, file = attached("griffin", device), tmp_path / "state"
    sequential.fit(whole, samples(), 10, distill.Checkpoint(file, {}))
    monkeypatch.setattr(sequential, "run_layer", lambda *args: pytest.fail("a block is passed"))
    model = attached("griffin", device)
    sequential.fit(model, samples(), 10, distill.Checkpoint(file, {}))
    assert all(torch.equal(p, learned(model)[name]) for name, p in learned(whole).items())


def test_a_correction_that_is_not_x_L_R_is_refused(device):
    with pytest.raises(ValueError, match="NonLinear is not x L R.*--layerwise adam"):
        sequential.fit(attached(NonLinear, device), samples(), 3)


def test_a_model_of_transformers_is_refused(device):
    model = attached("griffin", device)
    model.generate = None  # what tells such a model from ours
    with pytest.raises(ValueError, match="transformers"):
        sequential.fit(model, samples(), 3)


def test_overflow_is_called_overflow(device):
    with pytest.raises(ValueError, match="overflow.*float16"):
        sequential.fit(overflowing(device), samples(), 10)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path):
    kill_and_resume(tmp_path, "sequential",
                    [(("layer-wise", 2), signal.SIGINT), (("E2E", 5), signal.SIGTERM)])
