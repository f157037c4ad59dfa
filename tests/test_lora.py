"""LoRA, the paper's baseline and the example of a fork. Run: python -m pytest tests/test_lora.py"""

import pytest
import tiny
import torch

import caprese
import sample
from paper.lora import MATRICES, LoRAFF

METHODS = ["griffin", "cats", "topk"]
FACTORS = {f"{name}_{factor}" for name in MATRICES for factor in "AB"}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # float64, in which two orders of summation hardly differ


def attached(method, device, rank=21, block=LoRAFF):
    """A small model in float64 with LoRA in all layers; with rank 21 its q is 4."""
    model = tiny.model(device=device).double()
    return caprese.attach(model, method, 0.4, range(4), rank, block)


def decoded(model, prompt, new, compact):
    """Logits [B, T, V] of decode steps that are fed the tokens new [B, T]."""
    step, _ = sample.prefill(model, prompt, new.shape[1])
    for ff in [] if compact else caprese.sparse_layers(model).values():
        ff.select_rows()
    step.check_graphs()
    logits = []
    for tokens in new.unbind(1):
        with caprese.phase(model, "sparse"):
            logits.append(step(tokens).clone())
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("method", METHODS)
def test_lora_is_w_plus_a_b(method, device):
    model = tiny.fill(attached(method, device))
    x = torch.randn(2, 5, 32, dtype=torch.float64).to(device)
    for ff in caprese.sparse_layers(model).values():
        with caprese.phase(model, "prompt"):
            ff(x)
        ff.select_rows()
        merged = {}
        for name in MATRICES:
            A, B = getattr(ff, f"{name}_A"), getattr(ff, f"{name}_B")
            merged[name] = getattr(ff, f"{name}_proj").weight.T + (A @ B).double()
        gate = ff.act_fn(x @ merged["gate"])
        z = ff.sparsify(gate, gate * (x @ merged["up"]), ff.selection)
        with caprese.phase(model, "sparse"):
            # A B is summed in float32 here, in float64 there; its entries are of about 0.1.
            torch.testing.assert_close(ff(x), z @ merged["down"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_lora_is_the_method_without_a_correction(method, device):
    tokens = tiny.tokens(2, 12, device=device)
    alone = attached(method, device, 0, caprese.SparseFF)
    expected = caprese.teacher_forced(alone, tokens, [4, 7])
    found = caprese.teacher_forced(attached(method, device), tokens, [4, 7])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    filled = caprese.teacher_forced(tiny.fill(attached(method, device)), tokens, [4, 7])
    assert (filled - expected).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_masked_compact_and_teacher_forced_decoding_agree(method, device):
    model = tiny.fill(attached(method, device))
    prompt, new = tiny.tokens(1, 7, device=device), tiny.tokens(1, 4, seed=3, device=device)
    masked = decoded(model, prompt, new, compact=False)
    fused = decoded(model, prompt, new, compact=True)
    compact = {ff.compact for ff in caprese.sparse_layers(model).values()}
    assert compact == {method == "griffin"}
    torch.testing.assert_close(fused, masked, **TOLERANCE)
    forced = caprese.teacher_forced(model, torch.cat((prompt, new), dim=1), [7])
    torch.testing.assert_close(forced[:, 7:], masked, **TOLERANCE)


def test_prompt_tokens_use_the_full_model(device):
    tokens = tiny.tokens(1, 9, device=device)
    model = tiny.fill(attached("griffin", device))
    forced = caprese.teacher_forced(model, tokens, [5])
    torch.testing.assert_close(forced[:, :5], model(tokens)[:, :5], **TOLERANCE)


@pytest.mark.parametrize("rank, q", [(21, 4), (1, 1), (20, 4), (0, 0)])
def test_lora_has_as_many_parameters_as_l_and_r(rank, q, device):
    """3 q (D + F) against 2 D r, D 32 and F 80: equal at r = 21, else the nearest q above 0."""
    ff = caprese.sparse_layers(attached("griffin", device, rank))[0]
    parameters = ff.adapter_parameters()
    assert set(parameters) == FACTORS and ff.gate_A.shape == (32, q)
    count = sum(p.numel() for p in parameters.values())
    assert count == 3 * q * (32 + 80)
    if rank == 21:
        assert count == 2 * 32 * rank


def test_an_adapter_survives_the_disk(tmp_path, device):
    file, tokens = tmp_path / "lora.safetensors", tiny.tokens(1, 9, device=device)
    model = tiny.fill(attached("griffin", device))
    expected = caprese.teacher_forced(model, tokens, [4])
    caprese.save_adapter(model, file)
    caprese.load_adapter(caprese.detach(model), file, block=LoRAFF)
    torch.testing.assert_close(caprese.teacher_forced(model, tokens, [4]), expected,
                               rtol=0, atol=0)
    with pytest.raises(ValueError, match="lora"):
        caprese.load_adapter(model, file)
    linear = tmp_path / "linear.safetensors"
    caprese.save_adapter(caprese.attach(model, "griffin", rank=3), linear)
    with pytest.raises(ValueError, match="linear"):
        caprese.load_adapter(model, linear, block=LoRAFF)


@pytest.mark.parametrize("name, change", [
    ("up_A", torch.zeros(33, 4)), ("up_A", torch.zeros(4)), ("down_B", torch.zeros(3, 32)),
    ("gate_B", torch.full((4, 80), float("nan")))])
def test_factors_that_do_not_fit_are_refused(name, change, device):
    ff = caprese.sparse_layers(attached("griffin", device))[0]
    before = ff.adapter_parameters()
    with pytest.raises(ValueError, match=name):
        ff.set_adapter(**before | {name: change.to(device)})
    assert all(ff.adapter_parameters()[key] is before[key] for key in FACTORS)


def test_int4_is_refused(device):
    model = tiny.model(device=device)
    with pytest.raises(ValueError, match="int4"):
        caprese.attach(model, "int4", rank=21, block=LoRAFF)
    assert not caprese.sparse_layers(model)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_factors_and_nothing_else(method, device):
    model = tiny.fill(attached(method, device))
    tokens = tiny.tokens(2, 10, device=device)
    caprese.teacher_forced(model, tokens, [4, 6]).square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 6 and {name.split(".")[-1] for name in trained} == FACTORS
    for name, parameter in trained.items():
        assert parameter.grad.abs().sum() > 0, name


def test_buffers_keep_their_addresses_from_prompt_to_prompt(device):
    model = tiny.fill(attached("griffin", device))
    addresses, kept = [], []
    for seed in (2, 3):
        sample.prefill(model, tiny.tokens(1, 8, seed, device), 2)
        buffers = dict(model.named_buffers())
        addresses.append({name: tensor.data_ptr() for name, tensor in buffers.items()})
        kept.append({name: tensor.clone() for name, tensor in buffers.items()})
    assert len(addresses[0]) == 4 * 9 and addresses[0] == addresses[1]
    name = "model.layers.0.mlp.down_A_k"
    assert not torch.equal(kept[0][name], kept[1][name])  # other neurons, at the same place
