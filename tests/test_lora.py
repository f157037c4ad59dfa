"""LoRA, the paper's baseline and the example of a fork. Run: python -m pytest tests/test_lora.py"""

import pytest
import tiny
import torch

import caprese
import distill
import sample
from paper.lora import MATRICES, LoRAFF

FACTORS = {f"{name}_{factor}" for name in MATRICES for factor in "AB"}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # float64, in which two orders of summation hardly differ


def attached(device, rank=21, block=LoRAFF):
    """A small model in float64 with LoRA in all layers; with rank 21 its q is 4."""
    model = tiny.model(device=device).double()
    return caprese.attach(model, block, 0.4, "all", rank)


def decoded(model, prompt, new, gathers):
    """Logits [B, T, V] of decode steps that are fed the tokens new [B, T]."""
    for ff in caprese.sparse_layers(model).values():
        ff.gathers = gathers
    lengths = torch.tensor([prompt.shape[1]] * len(prompt), device=prompt.device)
    cache, _ = sample.prefill(model, prompt, new.shape[1], lengths)
    logits = []
    for tokens in new.unbind(1):
        with caprese.phase(model, "decode"), torch.no_grad():
            logits.append(model.decode(tokens, cache).clone())
    return torch.stack(logits, dim=1)


def test_lora_is_w_plus_a_b(device):
    """Against matrices that hold W + A B, with GRIFFIN's mask of their own products."""
    model = tiny.fill(attached(device))
    x = torch.randn(2, 5, 32, dtype=torch.float64).to(device)
    for ff in caprese.sparse_layers(model).values():
        gate, z = ff.neurons(x)
        kept = ff.selection(x, gate, z, None)
        merged = {}
        for name in MATRICES:
            A, B = getattr(ff, f"{name}_A"), getattr(ff, f"{name}_B")
            merged[name] = getattr(ff, f"{name}_proj").weight.T + (A @ B).double()
        z = ff.act_fn(x @ merged["gate"]) * (x @ merged["up"])
        z = torch.where(kept[:, None], z, 0)
        # A B is summed in float32 here, in float64 there; its entries are of about 0.1.
        torch.testing.assert_close(ff.sparse(x, gate, None, kept), z @ merged["down"],
                                   rtol=1e-4, atol=1e-5)


def test_a_fresh_lora_is_griffin_without_a_correction(device):
    tokens = tiny.tokens(2, 12, device=device)
    alone = attached(device, 0, caprese.GRIFFIN)
    expected = caprese.teacher_forced(alone, tokens, [4, 7])
    found = caprese.teacher_forced(attached(device), tokens, [4, 7])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    filled = caprese.teacher_forced(tiny.fill(attached(device)), tokens, [4, 7])
    assert (filled - expected).abs().max() > 0.01


def test_masked_compact_and_teacher_forced_decoding_agree(device):
    model = tiny.fill(attached(device))
    prompt, new = tiny.tokens(1, 7, device=device), tiny.tokens(1, 4, seed=3, device=device)
    masked = decoded(model, prompt, new, gathers=False)
    assert not any(ff.compact for ff in caprese.sparse_layers(model).values())
    fused = decoded(model, prompt, new, gathers=True)
    assert all(ff.compact for ff in caprese.sparse_layers(model).values())
    torch.testing.assert_close(fused, masked, **TOLERANCE)
    forced = caprese.teacher_forced(model, torch.cat((prompt, new), dim=1), [7])
    torch.testing.assert_close(forced[:, 7:], masked, **TOLERANCE)


def test_attach_takes_the_compact_path_of_lora(device, capsys):
    """caprese.may_gather has found that both paths compute the same, and says nothing."""
    assert all(ff.gathers for ff in caprese.sparse_layers(attached(device)).values())
    assert capsys.readouterr().err == ""


def test_prompt_tokens_use_the_full_model(device):
    tokens = tiny.tokens(1, 9, device=device)
    model = tiny.fill(attached(device))
    forced = caprese.teacher_forced(model, tokens, [5])
    torch.testing.assert_close(forced[:, :5], model(tokens)[:, :5], **TOLERANCE)


@pytest.mark.parametrize("rank, q", [(21, 4), (1, 1), (20, 4), (0, 0)])
def test_lora_has_as_many_parameters_as_l_and_r(rank, q, device):
    """3 q (D + F) against 2 D r, D 32 and F 80: equal at r = 21, else the nearest q above 0."""
    ff = caprese.sparse_layers(attached(device, rank))[0]
    parameters = ff.adapter_parameters()
    assert set(parameters) == FACTORS and ff.gate_A.shape == (32, q)
    count = sum(p.numel() for p in parameters.values())
    assert count == 3 * q * (32 + 80)
    if rank == 21:
        assert count == 2 * 32 * rank


def test_an_adapter_survives_the_disk(tmp_path, device):
    file, tokens = tmp_path / "lora.safetensors", tiny.tokens(1, 9, device=device)
    model = tiny.fill(attached(device))
    expected = caprese.teacher_forced(model, tokens, [4])
    caprese.save_adapter(model, file)
    assert caprese.read_adapter(file)[1]["method"] == "paper.lora:LoRAFF"
    caprese.load_adapter(caprese.detach(model), file, method=LoRAFF)
    torch.testing.assert_close(caprese.teacher_forced(model, tokens, [4]), expected,
                               rtol=0, atol=0)
    with pytest.raises(ValueError, match="paper.lora:LoRAFF"):
        caprese.load_adapter(model, file)
    linear = tmp_path / "linear.safetensors"
    caprese.save_adapter(caprese.attach(model, "griffin", rank=3), linear)
    with pytest.raises(ValueError, match="griffin"):
        caprese.load_adapter(model, linear, method=LoRAFF)


@pytest.mark.parametrize("name, change", [
    ("up_A", torch.zeros(33, 4)), ("up_A", torch.zeros(4)), ("down_B", torch.zeros(3, 32)),
    ("gate_B", torch.full((4, 80), float("nan")))])
def test_factors_that_do_not_fit_are_refused(name, change, device):
    ff = caprese.sparse_layers(attached(device))[0]
    before = ff.adapter_parameters()
    with pytest.raises(ValueError, match=name):
        ff.set_adapter(**before | {name: change.to(device)})
    assert all(ff.adapter_parameters()[key] is before[key] for key in FACTORS)


def test_gradients_reach_the_factors_and_nothing_else(device):
    model = tiny.fill(attached(device))
    tokens = tiny.tokens(2, 10, device=device)
    caprese.teacher_forced(model, tokens, [4, 6]).square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 6 and {name.split(".")[-1] for name in trained} == FACTORS
    for name, parameter in trained.items():
        assert parameter.grad.abs().sum() > 0, name


def test_a_layer_wise_stage_is_refused(device):
    model = attached(device)
    samples = [(row[:4].tolist(), row[4:].tolist()) for row in tiny.tokens(4, 9)]
    with pytest.raises(ValueError, match="closed form"):
        distill.fit_closed_form(model, [])
    with pytest.raises(ValueError, match="--layerwise none"):
        distill.train_layerwise(model, samples, epochs=1)
    assert distill.unexplained(model, samples) == 1  # but the table of distill.py is measured


def test_active_parameters_are_those_of_the_gathered_buffers(device):
    """What a decode step reads of the block: nine buffers, and nothing else."""
    model = tiny.fill(attached(device))
    ff = caprese.sparse_layers(model)[0]
    decoded(model, tiny.tokens(1, 7, device=device), tiny.tokens(1, 1, device=device), True)
    assert ff.compact
    assert ff.active_parameters() == sum(buffer.numel() for name, buffer in ff.named_buffers()
                                         if name.endswith("_k"))


def test_buffers_keep_their_addresses_from_prompt_to_prompt(device):
    model = tiny.fill(attached(device))
    addresses, kept = [], []
    for seed in (2, 3):
        decoded(model, tiny.tokens(1, 8, seed, device), tiny.tokens(1, 1, device=device), True)
        buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("_k")}
        addresses.append({name: tensor.data_ptr() for name, tensor in buffers.items()})
        kept.append({name: tensor.clone() for name, tensor in buffers.items()})
    assert len(addresses[0]) == 4 * 9 and addresses[0] == addresses[1]
    name = "model.layers.0.mlp.down_A_k"
    assert not torch.equal(kept[0][name], kept[1][name])  # other neurons, at the same place
