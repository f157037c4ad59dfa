"""The sparse methods, phases, L and R, both paths, adapters.

Run: python -m pytest tests/test_caprese.py
"""

import copy

import pytest
import tiny
import torch
from torch.testing import assert_close

import caprese
from sample import generate, prefill

# Both paths and the full model add the same float32 products in other orders: differences of a few
# 1e-6 at logits of size 1 to 10. A wrong neuron, row or layer shows at 1e-2 and more.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
METHODS = list(caprese.METHODS)
COMPACT = ("gate_k", "up_k", "down_k")


def attached(device, method, density=0.4, layers=None, rank=0, dtype=torch.float32):
    """A tiny model with a sparse method; L and R hold numbers that matter."""
    model = tiny.model(device=device).to(dtype)
    return tiny.fill(caprese.attach(model, method, density, layers, rank))


def first_layer(model):
    return next(iter(caprese.sparse_layers(model).values()))


def decode_logits(model, prompt, tokens, compact=True):
    """Logits of `tokens` [B, T] fed one by one after a prefill of `prompt` [B, S]."""
    for ff in caprese.sparse_layers(model).values():
        ff.gathers = compact and ff.gathers
    cache, _ = prefill(model, prompt, tokens.shape[1], full_lengths(prompt))
    logits = []
    for token in tokens.unbind(1):
        with caprese.phase(model, "decode"):
            logits.append(model.decode(token, cache).clone())
    return torch.stack(logits, dim=1)


def full_lengths(tokens):
    """The lengths [B] of prompts without padding."""
    return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)


def random_inputs(device, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


# ---- phases

@pytest.mark.parametrize("method", METHODS)
def test_density_one_is_the_full_model(method, device):
    model, tokens = tiny.model(device=device), tiny.tokens(2, 12, device=device)
    full = model(tokens)
    caprese.attach(model, method, density=1.0)
    assert_close(caprese.teacher_forced(model, tokens, [5, 7]), full, **CLOSE)
    assert_close(decode_logits(model, tokens[:1, :5], tokens[:1, 5:]), full[:1, 5:], **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_teacher_forced_is_sparse_after_each_rows_prompt(method, device):
    tokens = tiny.tokens(2, 12, device=device)
    model = attached(device, method, 0.3)
    full = tiny.model(device=device)(tokens)
    sparse = caprese.teacher_forced(model, tokens, [5, 7])
    for row, length in enumerate([5, 7]):
        assert_close(sparse[row, :length], full[row, :length], **CLOSE)
        assert (sparse[row, length:] - full[row, length:]).abs().max() > 0.05
        alone = caprese.teacher_forced(model, tokens[row:row + 1], torch.tensor([length]))
        assert_close(sparse[row:row + 1], alone, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_call_is_always_the_full_model(method, device):
    """Also after decoding, after teacher forcing, and after an exception within a phase."""
    tokens = tiny.tokens(2, 12, device=device)
    model = attached(device, method, rank=6)
    full = tiny.model(device=device)(tokens)
    assert_close(model(tokens), full, **CLOSE)
    generate(model, tokens[:1], 4, reselect=2)
    assert_close(model(tokens), full, **CLOSE)
    caprese.teacher_forced(model, tokens, [5, 7])
    assert_close(model(tokens), full, **CLOSE)
    with pytest.raises(IndexError):
        with caprese.phase(model, "decode"):
            raise IndexError
    assert_close(model(tokens), full, **CLOSE)


def test_a_phase_gives_back_the_one_before(device):
    tokens = tiny.tokens(2, 12, device=device)
    model = attached(device, "griffin")
    call, mask = first_layer(model).call, torch.ones(2, 12, dtype=torch.bool, device=device)
    assert (call.phase, call.counted, call.generated) == ("full", None, None)
    with caprese.phase(model, "count", mask):
        caprese.teacher_forced(model, tokens, [5, 7])
        assert call.phase == "count" and call.counted is mask and call.generated is None
        with pytest.raises(ValueError):  # no such token
            caprese.teacher_forced(model, tokens + 97, [5, 7])
        assert call.phase == "count" and call.counted is mask and call.generated is None
    assert (call.phase, call.counted, call.generated) == ("full", None, None)


def test_teacher_forced_records_no_gradients_while_activations_are_recomputed(device):
    """The backward pass would run the layers again, after the phase has ended."""
    model, tokens = attached(device, "griffin", rank=6), tiny.tokens(2, 12, device=device)
    expected = caprese.teacher_forced(model, tokens, [5, 7])
    model.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="no_grad"):
        caprese.teacher_forced(model, tokens, [5, 7])
    with torch.no_grad():
        assert_close(caprese.teacher_forced(model, tokens, [5, 7]), expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_only_the_correction(method, device):
    """Also with activations recomputed, if the phase lies around the backward pass as well."""
    model, tokens = attached(device, method, rank=6), tiny.tokens(2, 12, device=device)
    expected = {f"model.layers.{i}.mlp.{name}" for i in caprese.sparse_layers(model)
                for name in "LR"}
    generated = torch.arange(12, device=device) >= torch.tensor([[5], [7]], device=device)
    found = []
    for model.model.gradient_checkpointing in (False, True):
        model.zero_grad()
        with caprese.phase(model, "teacher_forced", generated=generated):
            model(tokens).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert found[-1].keys() == expected
        assert all(gradient.abs().max() > 0 for gradient in found[-1].values())
    assert_close(*found, **CLOSE)


def test_decoding_leaves_nothing_that_training_cannot_change(device):
    """The buffers that generate() allocates are filled again outside of it, and trained against."""
    model, tokens = attached(device, "griffin", rank=4), tiny.tokens(1, 9, device=device)
    generate(model, tokens[:, :5], 4)
    with caprese.phase(model, "count"):
        model(tokens)
    caprese.select(model)
    with caprese.phase(model, "decode"):
        model(tokens)
    caprese.teacher_forced(model, tokens, [5]).sum().backward()


# ---- both paths

@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_correction_is_the_method_alone(method, device):
    model, tokens = tiny.model(device=device), tiny.tokens(2, 12, device=device)
    alone = caprese.teacher_forced(caprese.attach(model, method, 0.4), tokens, [5, 7])
    caprese.attach(model, method, 0.4, rank=6)
    assert_close(caprese.teacher_forced(model, tokens, [5, 7]), alone, **CLOSE)
    filled = caprese.teacher_forced(tiny.fill(model), tokens, [5, 7])
    assert (filled - alone).abs().max() > 0.05


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("method", METHODS)
def test_teacher_forced_equals_decoding(method, rank, device):
    """Masked = compact: one row of griffin decodes on gathered buffers, else by a selection."""
    model, tokens = attached(device, method, rank=rank), tiny.tokens(1, 14, device=device)
    masked = caprese.teacher_forced(model, tokens, [6])[:, 6:]
    for compact in (True, False):
        found = decode_logits(model, tokens[:, :6], tokens[:, 6:], compact)
        assert_close(found, masked, **CLOSE)
        assert getattr(first_layer(model), "compact", False) == (compact and method == "griffin")


@pytest.mark.parametrize("reselect", [None, 1, 3])
@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_decodes_each_row_as_alone(method, rank, reselect, device):
    """Rows keep their own selection (masked path) and equal the compact path of each row alone.

    In float64, where another order of summation does not carry a gate across CATS' threshold.
    """
    model, tokens = attached(device, method, 0.3, rank=rank, dtype=torch.float64), tiny.tokens(3, 9)
    tokens, lengths = tokens.to(device), [6, 9, 4]
    together = generate(model, tokens, 14, reselect=reselect, prompt_lengths=lengths)
    assert not getattr(first_layer(model), "compact", False)
    for row, length in enumerate(lengths):
        alone = generate(model, tokens[row:row + 1, :length], 14, reselect=reselect)
        assert torch.equal(together[row], alone[0])


def test_rows_that_agree_decode_on_the_compact_path(device):
    """The same prompt several times, or many samples of it; rows that differ leave that path."""
    model = attached(device, "griffin", rank=6, dtype=torch.float64)
    prompt, other = tiny.tokens(1, 7, device=device), tiny.tokens(1, 7, seed=9, device=device)
    alone, of_other = generate(model, prompt, 8), generate(model, other, 8)
    same = generate(model, prompt.expand(3, -1), 8)
    assert first_layer(model).compact and first_layer(model).gate_k.shape == (32, 32)
    assert torch.equal(same, alone.expand(3, -1))
    mixed = generate(model, torch.cat((prompt, other, prompt)), 8)
    assert not any(ff.compact for ff in caprese.sparse_layers(model).values())
    assert first_layer(model).up_k is None  # its memory is free again
    assert torch.equal(mixed, torch.cat((alone, of_other, alone)))
    many = generate(model, prompt, 8, samples=4)
    assert all(ff.compact for ff in caprese.sparse_layers(model).values())
    assert torch.equal(many, alone.expand(4, -1))


def test_each_layer_takes_its_own_path(device):
    """If the rows agree in one layer and differ in another, the first alone is compact."""
    model = attached(device, "griffin")
    first, second = caprese.sparse_layers(model).values()
    s = random_inputs(device, 2, 80).abs()
    first.s, second.s = s[:1].expand(2, -1), s
    caprese.select(model)
    assert first.compact and not second.compact


def test_fused_equals_unfused(device):
    """Equations (9)(10) against FF_sparse(x) + x L R."""
    model, x = attached(device, "griffin", rank=6), random_inputs(device, 1, 3, 32)
    ff = first_layer(model)
    with caprese.phase(model, "count"):
        ff(x)
    ff.gather(ff.top_neurons(ff.s)[0])
    ff.compact = True
    assert ff.up_k.shape == (ff.num_kept + 6, 32) and ff.down_k.shape == (32, ff.num_kept + 6)
    assert ff.num_kept == 32  # 0.4 of 80
    with caprese.phase(model, "decode"):
        fused = ff(x)
    z = ff.act_fn(ff.gate_proj(x)) * ff.up_proj(x)
    dropped = ff.s[0].topk(48, largest=False).indices
    z[..., dropped] = 0
    assert_close(fused, ff.down_proj(z) + x @ ff.L @ ff.R, **CLOSE)


@pytest.mark.parametrize("method, batch_size, names", [
    ("griffin", 1, COMPACT), ("griffin", 2, ("kept",)), ("cats", 1, ("tau",)),
    ("cats", 2, ("tau",))])
def test_buffers_keep_their_addresses(method, batch_size, names, device):
    """A captured graph stays valid across prompts and reselections, yet what it reads is new."""
    model = attached(device, method, rank=6)
    addresses, contents = set(), []
    for seed in range(3):
        prompts = tiny.tokens(batch_size, 6, seed=seed, device=device)
        generate(model, prompts, 8, reselect=3)
        buffers = [getattr(ff, name) for ff in caprese.sparse_layers(model).values()
                   for name in names]
        addresses.add(tuple(buffer.data_ptr() for buffer in buffers))
        contents.append(buffers[0].clone())
    assert len(addresses) == 1
    assert not torch.equal(contents[0], contents[1])


@pytest.mark.parametrize("method, name", [("griffin", "s"), ("cats", "prompt_tau")])
def test_a_padded_prefill_computes_no_sparse_ff(method, name, device, monkeypatch):
    """Padding is a part of the prompt: the full FF serves it, and it is not counted."""
    model, tokens = attached(device, method, rank=6), tiny.tokens(2, 9, device=device)
    calls = []
    block = caprese.METHODS[method]
    for forbidden in ("sparse", "sparsify", "decode", "correction", "teacher_forced"):
        monkeypatch.setattr(block, forbidden, lambda *args, name=forbidden: calls.append(name))
    prefill(model, tokens, 4, torch.tensor([9, 5], device=device))
    padded = {i: getattr(ff, name) for i, ff in caprese.sparse_layers(model).items()}
    for row, length in enumerate([9, 5]):
        alone = tokens[row:row + 1, :length]
        prefill(model, alone, 4, full_lengths(alone))
        for i, ff in caprese.sparse_layers(model).items():
            assert_close(padded[i][row:row + 1], getattr(ff, name), **CLOSE)
    assert not calls


# ---- the methods

def test_statistic_is_equation_3(device):
    ff, z = first_layer(attached(device, "griffin")), random_inputs(device, 2, 5, 7)
    counted = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool, device=device)
    for row in range(2):
        zbar = torch.stack([z_i.abs() / z_i.norm() for z_i in z[row][counted[row]]])
        expected = torch.stack([zbar[:, j].norm() for j in range(7)])
        assert_close(ff.statistic(None, None, z, counted)[row], expected)
    zeros = torch.zeros(1, 2, 3, device=device)  # a dead token counts nothing and breaks nothing
    assert ff.statistic(None, None, zeros).eq(0).all()


def test_incremental_statistic_equals_one_pass(device):
    """sqrt(s^2 + s_G^2) of section 4.1.1, over parts of any length."""
    model, x = attached(device, "griffin"), random_inputs(device, 2, 111, 32)
    ff = first_layer(model)
    with caprese.phase(model, "count"):
        ff(x)
        whole = ff.s
        caprese.reset(model)
        for part in x.split([4, 1, 106], dim=1):
            ff(part)
    assert_close(ff.s, whole)
    z = ff.neurons(x)[1].double()
    assert_close(whole, ff.statistic(x, None, z).float())


def test_reselection_rewrites_the_cache_and_the_selection(device):
    """After rho tokens the KV entries are the full model's, and s counts prompt and response."""
    model, prompt = tiny.model(device=device), tiny.tokens(1, 6, device=device)
    full = generate(model, prompt, 12)
    caprese.attach(model, "griffin", density=0.2)
    assert torch.equal(generate(model, prompt, 12, reselect=1), full)  # uses no sparse result
    assert not torch.equal(generate(model, prompt, 12), full)

    caches, new_cache = [], model.new_cache

    def kept_cache(*shape):
        caches.append(new_cache(*shape))
        return caches[-1]
    model.new_cache = kept_cache
    new = generate(model, prompt, 9, reselect=4)  # 8 tokens fed; the second reselection comes last
    found = first_layer(model).s
    truth = new_cache(1, 14)
    caprese.reset(model)
    with caprese.phase(model, "count"):
        model.model(torch.cat([prompt, new[:, :8]], dim=1), truth)
    for layer in range(4):
        assert_close(caches[0].k[layer][:, :, :14], truth.k[layer], **CLOSE)
        assert_close(caches[0].v[layer][:, :, :14], truth.v[layer], **CLOSE)
    assert_close(found, first_layer(model).s)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_quantile_equals_torchs(size, q, device):
    generator = torch.Generator().manual_seed(size)
    for values in (torch.rand(size, generator=generator),
                   torch.randn(size, generator=generator).abs() * 1e-3,
                   torch.randint(0, 3, (size,), generator=generator).float()):
        values = values.to(device)
        assert_close(caprese.quantile(values, q), torch.quantile(values, q))


def test_quantile_beyond_torchs_limit(device):
    order = torch.randperm(17_000_001, generator=torch.Generator().manual_seed(0))
    values = order.to(device).float() / 2 ** 24  # kthvalue is slow on descending values alone
    assert caprese.quantile(values, 0.25) == 4_250_000 / 2 ** 24


def test_cats_threshold_comes_from_the_prompt_alone(device):
    """(5): tau is the (1 - density) quantile over prompt positions and neurons together.

    So the fraction of them that stays is the density.
    """
    model, x = attached(device, "cats", 0.3), random_inputs(device, 2, 12, 32)
    ff, lengths = first_layer(model), [5, 8]
    gates = ff.act_fn(ff.gate_proj(x))
    counted = torch.arange(12, device=device) < torch.tensor(lengths, device=device)[:, None]
    with caprese.phase(model, "count", counted):
        ff(x)
    for row, length in enumerate(lengths):
        prompt = gates[row, :length].abs()
        assert_close(ff.prompt_tau[row], torch.quantile(prompt, 0.7))
        kept = (prompt >= ff.prompt_tau[row]).float().mean().item()
        assert kept == pytest.approx(0.3, abs=1 / prompt.numel())
    ff.select()
    before = ff.tau.clone()
    with caprese.phase(model, "count"):  # a later full pass, as at reselection
        ff(random_inputs(device, 2, 3, 32, seed=1))
    ff.select()
    assert torch.equal(ff.tau, before)
    z = ff.neurons(x)[1]
    kept = ff.sparsify(x, gates, z, ff.tau)  # (6)
    large = gates.abs() >= before[:, None, None]
    assert torch.equal(kept[large], z[large]) and kept[~large].eq(0).all()


@pytest.mark.parametrize("method", METHODS)
def test_residual_is_what_the_sparse_ff_lacks(method, device):
    """Equation (7): FF(x) = FF_sparse(x) + residual at the generated tokens."""
    model, x = attached(device, method), random_inputs(device, 2, 9, 32)
    ff = first_layer(model)
    generated = torch.arange(9, device=device) >= torch.tensor([[4], [6]], device=device)
    with caprese.phase(model, "teacher_forced", generated=generated):
        sparse = ff(x)
    lacking = ff(x) - sparse
    assert_close(ff.residual(x, generated)[generated], lacking[generated], **CLOSE)
    assert lacking[generated].abs().max() > 0.01 and lacking[~generated].abs().max() < 1e-4


# ---- attach and detach

def test_attach_chooses_the_papers_layers_and_is_idempotent(device):
    model, tokens = tiny.model(device=device), tiny.tokens(2, 12, device=device)
    full, names = model(tokens), set(model.state_dict())
    for method, layers in (("griffin", [0, 1]), ("cats", [0, 1, 2, 3])):
        assert list(caprese.sparse_layers(caprese.attach(model, method))) == layers
    caprese.attach(model, "griffin", 0.4, [1])
    once = caprese.teacher_forced(model, tokens, [5, 7])
    caprese.attach(model, "griffin", 0.4, [1])
    assert torch.equal(caprese.teacher_forced(model, tokens, [5, 7]), once)
    assert names < set(model.state_dict())  # the base weights keep their official names
    caprese.detach(model)
    assert set(model.state_dict()) == names
    assert_close(caprese.teacher_forced(model, tokens, [5, 7]), full)


@pytest.mark.parametrize("bad, says", [
    ({"method": "magic"}, "unknown method 'magic'"), ({"density": 0.0}, "density is 0.0"),
    ({"density": 1.5}, "density is 1.5"), ({"density": "half"}, "density is 'half'"),
    ({"layers": [4]}, r"layers are \[4\]"), ({"layers": []}, "layers are"),
    ({"layers": [0, 0]}, "different numbers"),
    ({"layers": "some"}, "layers are some"), ({"method": int}, "unknown method"),
    ({"rank": -1}, "rank is -1"),
    ({"rank": 33}, "rank is 33")])
def test_attach_refuses(bad, says):
    model = tiny.model()
    with pytest.raises(ValueError, match=says):
        caprese.attach(model, **bad)
    assert not caprese.sparse_layers(model)


# ---- adapters

def test_adapter_round_trip(tmp_path, device):
    """Ranks may differ by layer, as in the bundled adapter."""
    tokens, file = tiny.tokens(2, 12, device=device), tmp_path / "a.safetensors"
    model = attached(device, "griffin", layers=[0, 2], rank=6)
    ff = caprese.sparse_layers(model)[2]
    ff.set_adapter(L=ff.L[:, :3], R=ff.R[:3])
    expected = caprese.teacher_forced(model, tokens, [5, 7])
    caprese.save_adapter(model, file)
    again = caprese.load_adapter(tiny.model(device=device), file)
    assert torch.equal(caprese.teacher_forced(again, tokens, [5, 7]), expected)
    assert [ff.L.shape[1] for ff in caprese.sparse_layers(again).values()] == [6, 3]
    masked = caprese.teacher_forced(again, tokens[:1], [6])[:, 6:]
    assert_close(decode_logits(again, tokens[:1, :6], tokens[:1, 6:]), masked, **CLOSE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    base = sum(p.numel() for p in tiny.model().parameters())
    assert caprese.added_parameters(again) == pytest.approx(2 * 32 * (6 + 3) / base)
    caprese.load_adapter(again, file, density=0.7)
    assert [ff.num_kept for ff in caprese.sparse_layers(again).values()] == [56, 56]


def rewritten(tmp_path, change):
    """A saved adapter of rank 6 for layers 0 and 1, spoilt by change(tensors, metadata)."""
    file = tmp_path / "a.safetensors"
    caprese.save_adapter(attached("cpu", "griffin", rank=6), file)
    tensors, about = caprese.read_adapter(file)
    change(tensors, about)
    caprese.save_tensors(tensors, file, about)
    return file


def test_adapters_of_version_0_1_still_load(tmp_path):
    """Their fingerprint is the first part of today's, and a key says that they are linear."""
    def age(tensors, about):
        about.update({"correction": "linear", "model": about["model"].split("-")[0]})
    file = rewritten(tmp_path, age)
    assert first_layer(caprese.load_adapter(tiny.model(), file)).L.shape == (32, 6)
    for old in (caprese.fingerprint(tiny.model())[:8], ""):
        file = rewritten(tmp_path, lambda tensors, about: about.update({"model": old}))
        with pytest.raises(ValueError, match="another model"):
            caprese.load_adapter(tiny.model(), file)


def test_the_fingerprint_covers_every_layer():
    model = tiny.model()
    before = caprese.fingerprint(model)
    assert caprese.fingerprint(tiny.model().bfloat16()) == before
    for name in ("layers.3.mlp.down_proj", "layers.0.self_attn.q_proj", "layers.2.mlp.gate_proj",
                 "layers.1.input_layernorm"):
        weight = model.model.get_submodule(name).weight
        kept = weight.clone()
        weight.view(-1)[len(weight.view(-1)) // 2:] *= 1.3  # also far behind the first of them
        assert caprese.fingerprint(model) != before
        weight.copy_(kept)
    model.lm_head.weight[0, 0] += 1
    assert caprese.fingerprint(model) != before
    model.lm_head.weight[0, 0] -= 1
    assert caprese.fingerprint(caprese.attach(model, "cats", rank=3)) == before


L0, R1 = "model.layers.0.mlp.L", "model.layers.1.mlp.R"


@pytest.mark.parametrize("tensors, about, says", [
    ({R1: None}, {}, "lacks a tensor"),
    ({R1: torch.ones(6, 31)}, {}, "must have the shapes"),
    ({L0: torch.ones(32)}, {}, "must have the shapes"),
    ({L0: torch.ones(32, 5)}, {}, "must have the shapes"),
    ({R1: torch.full((6, 32), torch.nan)}, {}, "finite values"),
    ({}, {"layers": "first"}, "layers are first"),
    ({}, {"layers": 2}, "does not fit"),
    ({}, {"layers": [7]}, r"layers are \[7\]"),
    ({}, {"layers": None}, "layers are"),
    ({}, {"density": "half"}, "density is 'half'"),
    ({}, {"method": "magic:Wand"}, "made for the method magic:Wand"),
    ({}, {"model": "0123456789abcdef"}, "another model"),
])
def test_a_bad_adapter_is_refused_in_one_line(tensors, about, says, tmp_path):
    def spoil(saved, metadata):
        for name, value in tensors.items():
            saved[name] = value
            if value is None:
                del saved[name]
        metadata.update(about)
    file, model, prompt = rewritten(tmp_path, spoil), tiny.model(), tiny.tokens(1, 6)
    full = model(prompt)
    with pytest.raises(ValueError, match=says) as error:
        caprese.load_adapter(model, file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert not caprese.sparse_layers(model) and torch.equal(model(prompt), full)


def test_adapter_files_that_are_none(tmp_path):
    model, file = tiny.model(), tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="no sparse method"):
        caprese.save_adapter(model, file)
    with pytest.raises(FileNotFoundError, match="a.safetensors"):
        caprese.load_adapter(model, file)
    caprese.save_adapter(caprese.attach(model, "griffin", 0.4, rank=6), file)
    with pytest.raises(ValueError, match="another model"):
        caprese.load_adapter(tiny.model(seed=5), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable"):
        caprese.load_adapter(model, file)
    for about in (None, [], {"density": 0.5}):
        caprese.save_tensors({"x": torch.zeros(1)}, file, about)
        with pytest.raises(ValueError, match="not a Caprese adapter"):
            caprese.load_adapter(model, file)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = rewritten(tmp_path, lambda tensors, about: None)
    before = file.read_bytes()

    def full_disk(*names):
        raise OSError("no space left on device")
    monkeypatch.setattr(caprese.Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        caprese.save_adapter(attached("cpu", "griffin", rank=2), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# ---- forks: a change takes effect, or it is refused

class NoCorrection(caprese.GRIFFIN):
    def correction(self, x):
        return torch.zeros_like(x)


class NothingKept(caprese.GRIFFIN):
    def sparsify(self, x, gate, z, kept):
        return torch.zeros_like(z)


class GatedCorrection(caprese.GRIFFIN):
    def correction(self, x):
        return torch.nn.functional.gelu(x @ self.L.to(x.dtype)) @ self.R.to(x.dtype)


class Bias(caprese.GRIFFIN):
    """A correction without L and R."""
    def new_adapter(self, rank):
        self.b = torch.nn.Parameter(torch.zeros(self.gate_proj.in_features))

    def set_adapter(self, b):
        self.b = torch.nn.Parameter(b.float().clone())

    def correction(self, x):
        return self.b.to(x.dtype).expand_as(x)


class Dense(caprese.GRIFFIN):
    """Overrides both paths, alike: it keeps its compact path."""
    def sparsify(self, x, gate, z, kept):
        return 2 * z * kept[:, None]

    def fused(self, x):
        return super().fused(x) * 2 - self.correction(x)


@pytest.mark.parametrize("block", [NoCorrection, NothingKept, GatedCorrection, Bias])
def test_a_subclass_changes_single_prompts_and_batches_alike(block, device, capsys):
    model, tokens = tiny.model(device=device), tiny.tokens(2, 14, device=device)
    plain = tiny.fill(caprese.attach(model, "griffin", 0.4, rank=6))
    before = decode_logits(plain, tokens[:1, :6], tokens[:1, 6:])
    tiny.fill(caprese.attach(model, block, 0.4, rank=6))
    assert "takes the masked path" in capsys.readouterr().err
    single = decode_logits(model, tokens[:1, :6], tokens[:1, 6:])
    assert not first_layer(model).compact
    batch = decode_logits(model, tokens[:, :6], tokens[:, 6:])
    assert_close(single, batch[:1], **CLOSE)
    forced = caprese.teacher_forced(model, tokens, [6, 6])[:, 6:]
    assert_close(batch, forced, **CLOSE)
    assert (single - before).abs().max() > 0.05


@pytest.mark.parametrize("name, change", [
    ("correction", lambda ff, x: torch.zeros_like(x)),
    ("sparsify", lambda ff, x, gate, z, kept: torch.zeros_like(z))])
def test_a_changed_line_of_the_class_itself_takes_effect(name, change, device, monkeypatch):
    """As an editor changes it: the next attach() notices that the compact path differs."""
    model, tokens = tiny.model(device=device), tiny.tokens(1, 14, device=device)
    monkeypatch.setattr(caprese.GRIFFIN, name, change)
    tiny.fill(caprese.attach(model, "griffin", 0.4, rank=6))
    found = decode_logits(model, tokens[:, :6], tokens[:, 6:])
    assert not first_layer(model).compact
    assert_close(found, caprese.teacher_forced(model, tokens, [6])[:, 6:], **CLOSE)


def test_a_subclass_that_overrides_both_paths_keeps_the_compact_one(device, capsys):
    model, tokens = tiny.model(device=device), tiny.tokens(1, 14, device=device)
    tiny.fill(caprese.attach(model, Dense, 0.4, rank=6))
    found = decode_logits(model, tokens[:, :6], tokens[:, 6:])
    assert first_layer(model).compact and capsys.readouterr().err == ""
    assert_close(found, caprese.teacher_forced(model, tokens, [6])[:, 6:], **CLOSE)


def test_a_statistic_of_its_own_brings_its_own_merge(device):
    class MeanAbs(caprese.GRIFFIN):
        """The mean of |z| over the tokens, as a sum and a count, for it to merge."""
        def statistic(self, x, gate, z, counted=None):
            return z.abs().sum(1) if counted is None else (z.abs() * counted[..., None]).sum(1)

        def merge(self, s, s_G):
            return s + s_G

    model, x = caprese.attach(tiny.model(device=device), MeanAbs), random_inputs(device, 2, 9, 32)
    ff = first_layer(model)
    with caprese.phase(model, "count"):
        ff(x[:, :5])
        ff(x[:, 5:])
    assert_close(ff.s, ff.neurons(x)[1].abs().sum(1))


def test_a_statistic_that_is_no_number_is_refused(device):
    model, tokens = attached(device, "griffin"), tiny.tokens(1, 5, device=device)
    with caprese.phase(model, "count"):
        model(tokens)
    first_layer(model).s[0, 3] = torch.nan
    with pytest.raises(ValueError, match="inf or NaN"):
        caprese.select(model)


@pytest.mark.parametrize("method", METHODS)
def test_what_nothing_was_counted_for_is_refused_in_words(method, device):
    model, tokens = attached(device, method), tiny.tokens(1, 5, device=device)
    with pytest.raises(ValueError, match="no prompt selects"):
        caprese.select(model)
    with pytest.raises(ValueError, match="no prompt selects"), caprese.phase(model, "decode"):
        model(tokens)


def test_trying_a_class_draws_no_number(device):
    model = tiny.model(device=device)
    torch.manual_seed(0)
    caprese.attach(model, "griffin", rank=6)
    L = first_layer(model).L.detach().clone()
    torch.manual_seed(0)
    assert torch.equal(L, torch.randn(32, 6, device=device) * 32 ** -0.5)


@pytest.mark.parametrize("block, linear", [
    (caprese.GRIFFIN, True), (caprese.CATS, True), (NothingKept, True), (GatedCorrection, False),
    (NoCorrection, False), (Bias, False)])
def test_only_x_L_R_has_a_closed_form(block, linear, device):
    model = caprese.attach(tiny.model(device=device), block, rank=6)
    assert caprese.has_closed_form(first_layer(model)) == linear


def test_an_adapter_of_a_class_needs_that_class(tmp_path, device):
    """It is refused under GRIFFIN's name, and no name in a file is imported."""
    file, tokens = tmp_path / "a.safetensors", tiny.tokens(2, 12, device=device)
    model = tiny.fill(caprese.attach(tiny.model(device=device), GatedCorrection, 0.4, rank=6))
    expected = caprese.teacher_forced(model, tokens, [5, 7])
    caprese.save_adapter(model, file)
    for method in (None, "griffin", NoCorrection):
        with pytest.raises(ValueError, match="GatedCorrection"):
            caprese.load_adapter(model, file, method=method)
    caprese.load_adapter(model, file, method=GatedCorrection)
    assert torch.equal(caprese.teacher_forced(model, tokens, [5, 7]), expected)
    caprese.save_adapter(caprese.attach(model, "griffin", rank=6), file)
    with pytest.raises(ValueError, match="for the method griffin"):
        caprese.load_adapter(model, file, method=GatedCorrection)


def test_a_copy_works_as_its_original(device):
    tokens = tiny.tokens(1, 6, device=device)
    model = attached(device, "griffin", rank=6)
    expected = generate(model, tokens, 8, reselect=3)
    copied = copy.deepcopy(model)
    with caprese.phase(model, "decode"):  # the copy has a phase of its own
        assert torch.equal(generate(copied, tokens, 8, reselect=3), expected)
    caprese.detach(copied)
    assert torch.equal(generate(model, tokens, 8, reselect=3), expected)
    assert torch.equal(generate(copied, tokens, 8), generate(tiny.model(device=device), tokens, 8))


def test_what_runs_in_inference_mode_can_be_trained_afterwards(device):
    model, tokens = attached(device, "griffin", rank=6), tiny.tokens(1, 9, device=device)
    expected = generate(model, tokens[:, :5], 4)
    with torch.inference_mode():
        assert torch.equal(generate(model, tokens[:, :5], 4), expected)
    caprese.teacher_forced(model, tokens, [5]).sum().backward()
    assert torch.equal(generate(model, tokens[:, :5], 4), expected)


@pytest.mark.parametrize("lengths", [[0, 5], [5, 13], [5], [[5, 5]], [5.0, 5.0]])
def test_prompt_lengths_lie_in_the_tokens(lengths, device):
    model, tokens = attached(device, "griffin"), tiny.tokens(2, 12, device=device)
    with pytest.raises(ValueError, match="prompt_lengths must be 2 whole numbers in 1..12"):
        caprese.teacher_forced(model, tokens, lengths)
