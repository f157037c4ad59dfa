"""The sparse methods, L and R, both paths, adapters. Run: python -m pytest tests/test_caprese.py"""

import pytest
import tiny
import torch
from torch.testing import assert_close

import caprese
from sample import generate

# Both paths and the full model add the same float32 products in other orders: differences of a few 1e-6 at
# logits of size 1 to 10. A wrong neuron, row or layer shows at 1e-2 and more.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
METHODS = caprese.METHODS
SPARSE = [m for m in METHODS if m != "int4"]  # what has a density
# rank 0 is the bare method; lora does not stand on int4, and the oracle's top-k of changed neurons is another oracle
CORRECTED = [(m, c, r) for m in METHODS for c, r in (("linear", 0), ("linear", 6), ("gated", 6), ("lora", 6))
             if (m, c) != ("int4", "lora")]


def decode_logits(model, prompt, tokens):
    """Logits of `tokens` [B, T] fed one by one after a prefill of `prompt` [B, S]."""
    cache = model.new_cache(len(prompt), prompt.shape[1] + tokens.shape[1])
    caprese.reset(model)
    model.hidden(prompt, cache, generated=False)
    caprese.select(model)
    return torch.stack([model.logits(model.hidden(t[:, None], cache, generated=True))[:, 0] for t in tokens.T], dim=1)


@pytest.mark.parametrize("method", SPARSE)
def test_density_one_is_the_full_model(method):
    model, tokens = tiny.model(), tiny.tokens(2, 12)
    full = model(tokens)
    caprese.attach(model, method, density=1.0)
    assert_close(model(tokens, [5, 7]), full, **CLOSE)
    assert_close(decode_logits(model, tokens[:1, :5], tokens[:1, 5:]), full[:1, 5:], **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_sparse_differs_from_full_only_after_the_prompt(method):
    model, tokens = tiny.model(), tiny.tokens(2, 12)
    full = model(tokens)
    caprese.attach(model, method, density=0.3)
    sparse = model(tokens, [5, 7])
    for row, length in enumerate([5, 7]):
        assert_close(sparse[row, :length], full[row, :length], **CLOSE)
        assert (sparse[row, length:] - full[row, length:]).abs().max() > 0.05
    assert_close(model(tokens), full, **CLOSE)  # prompt_lengths None: everything is full


@pytest.mark.parametrize("method, correction, rank", CORRECTED)
def test_a_fresh_correction_is_the_bare_method(method, correction, rank):
    model, tokens = tiny.model(), tiny.tokens(2, 12)
    bare = caprese.attach(model, method, density=0.4)(tokens, [5, 7])
    caprese.attach(model, method, 0.4, rank=rank or 1, correction=correction)
    assert_close(model(tokens, [5, 7]), bare, **CLOSE)
    assert (tiny.fill(model)(tokens, [5, 7]) - bare).abs().max() > 0.05


@pytest.mark.parametrize("method, correction, rank", CORRECTED)
def test_teacher_forced_equals_decoding(method, correction, rank, monkeypatch):
    """This is masked = compact: one row decodes on griffin's gathered buffers, and on the rows that cats chooses."""
    monkeypatch.setattr(caprese, "ROW_BYTES", 0)
    model, tokens = tiny.model(), tiny.tokens(1, 14)
    tiny.fill(caprese.attach(model, method, density=0.4, rank=rank, correction=correction))
    masked = model(tokens, [6])[:, 6:]
    assert_close(decode_logits(model, tokens[:, :6], tokens[:, 6:]), masked, **CLOSE)
    ff = next(iter(caprese.sparse_layers(model).values()))
    assert ff.compact == (method == "griffin" or (method == "cats" and correction != "lora"))


@pytest.mark.parametrize("reselect", [None, 1, 3])
@pytest.mark.parametrize("method, correction, rank", CORRECTED)
def test_a_batch_decodes_each_row_as_alone(method, correction, rank, reselect, monkeypatch):
    """Rows keep their own selection (masked path), and equal the compact path, before and after reselections.

    In float64, where another order of summation does not carry a gate across CATS' threshold."""
    monkeypatch.setattr(caprese, "ROW_BYTES", 0)
    model, tokens, lengths = tiny.model().double(), tiny.tokens(3, 9), torch.tensor([6, 9, 4])
    tiny.fill(caprese.attach(model, method, density=0.3, rank=rank, correction=correction).double())
    together = generate(model, tokens, 14, reselect=reselect, prompt_lengths=lengths)
    for row, length in enumerate(lengths):
        alone = generate(model, tokens[row:row + 1, :length], 14, reselect=reselect)
        assert torch.equal(together[row], alone[0])


def test_the_selection_is_per_row():
    model, tokens = tiny.model(), tiny.tokens(3, 12)
    caprese.attach(model, "griffin", density=0.3)
    together = model(tokens, [5, 8, 6])
    masks = caprese.sparse_layers(model)[0].mask
    assert not torch.equal(masks[0], masks[1])
    for row, length in enumerate([5, 8, 6]):
        assert_close(together[row:row + 1], model(tokens[row:row + 1], [length]), **CLOSE)


@pytest.mark.parametrize("correction", ["linear", "gated"])
def test_fused_equals_unfused(correction):
    """Equations (9)(10) against FF_sparse(x) + x L R; r gated neurons are k + r neurons of one kind."""
    model, x = tiny.model(), torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    ff = caprese.sparse_layers(tiny.fill(caprese.attach(model, "griffin", 0.4, rank=6, correction=correction)))[0]
    ff(x[:1], generated=False)
    ff.select()
    assert ff.up_k.shape == (ff.kept + 6, 32) and ff.down_k.shape == (32, ff.kept + 6)
    fused = ff(x, generated=True)
    ff.select(compact=False)
    gate, z = ff.neurons(x)
    more = x @ ff.L * (1 if correction == "linear" else torch.nn.functional.silu(x @ ff.G)) @ ff.R
    assert_close(fused, ff.down_proj(ff.sparsify(gate, z)) + more, **CLOSE)


def test_lora_is_w_plus_a_b():
    """Appendix C: the same as attaching the method to a model whose matrices are W + A B (the statistic aside)."""
    model, x = tiny.model(), torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    ff = caprese.sparse_layers(tiny.fill(caprese.attach(model, "cats", 0.4, rank=6, correction="lora")))[0]
    ff(x, generated=False)
    ff.select()
    ours, linear = ff(x, generated=True), ff.correct(x) + ff.bare(x, *ff.neurons(x))
    for name in ("gate", "up", "down"):
        getattr(ff, f"{name}_proj").weight.data += (getattr(ff, f"{name}_A") @ getattr(ff, f"{name}_B")).T.detach()
    assert_close(ours, ff.bare(x, *ff.neurons(x)), **CLOSE)
    assert_close(ours, linear, **CLOSE)
    counts = [sum(p.numel() for p in ff.learned().values()), 2 * 32 * 6]
    assert abs(counts[0] - counts[1]) <= 3 * (32 + 80) / 2  # equal, as nearly as a whole rank allows


def test_four_bits():
    """16 levels a group, the extremes exact, no weight off by more than half a step."""
    w = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    q = caprese.quantise(w, group=32)
    for ours, theirs in zip(q.view(5, 4, 32).flatten(0, 1), w.view(5, 4, 32).flatten(0, 1)):
        step = (theirs.max() - theirs.min()) / 15
        assert len(ours.unique()) <= 16 and (ours - theirs).abs().max() <= step / 2 * 1.0001
        assert_close(ours.aminmax(), theirs.aminmax())
    model, tokens = tiny.model(), tiny.tokens(2, 12)
    full = model(tokens)
    off = (caprese.attach(model, "int4", rank=6)(tokens, [5, 7]) - full)[:, 7:].abs().mean()
    assert list(caprese.sparse_layers(model)) == [0, 1, 2, 3]  # all layers
    assert 0.01 < off < (caprese.attach(model, "griffin", 0.5, range(4))(tokens, [5, 7]) - full)[:, 7:].abs().mean()


@pytest.mark.parametrize("method, correction", [("griffin", "linear"), ("griffin", "gated"), ("griffin", "lora"),
                                                ("cats", "linear"), ("cats", "lora")])
def test_buffers_keep_their_addresses(method, correction):
    """A captured graph must stay valid across prompts and reselections."""
    model = caprese.attach(tiny.model(), method, density=0.4, rank=6, correction=correction)
    ff = caprese.sparse_layers(model)[0]
    seen = set()
    for seed in range(3):
        generate(model, tiny.tokens(1, 6, seed=seed), 8, reselect=3)
        assert caprese.fixed(model)
        seen.add(tuple(t.data_ptr() for name, t in vars(ff).items() if name.endswith("_k")))
    assert len(seen) == 1 and all(seen)
    generate(model, tiny.tokens(2, 6), 3)
    assert not caprese.fixed(model)  # rows with masks of their own get new ones each time


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_products_of_chosen_rows(dtype, count):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((700, 96), (1, 96)))
    rows = torch.randperm(700, generator=generator)[:count].sort().values
    z = torch.randn(count, generator=generator, dtype=torch.float64)
    close = {"rtol": 0.02, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    weight, x, z = weight.to(dtype), x.to(dtype), z.to(dtype)
    dot, total = caprese.dot_rows(weight, rows, x), caprese.add_rows(weight, rows, z)
    assert dot.dtype == total.dtype == dtype
    assert_close(dot.double(), weight[rows].double() @ x[0].double(), **close)
    assert_close(total.double(), z.double() @ weight[rows].double(), **close)


def test_statistic_is_equation_3():
    z = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    for row in range(2):
        zbar = torch.stack([z_i.abs() / z_i.norm() for z_i in z[row][prompt[row]]])
        assert_close(caprese.statistic(z, prompt)[row], torch.stack([zbar[:, j].norm() for j in range(7)]))
    assert caprese.statistic(torch.zeros(1, 2, 3)).eq(0).all()  # a dead token counts nothing and breaks nothing


def test_incremental_statistic_equals_one_pass():
    """sqrt(s^2 + s_G^2) of section 4.1.1."""
    model, x = tiny.model(), torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    ff = caprese.sparse_layers(caprese.attach(model, "griffin", density=0.4))[0]
    ff(x, generated=False)
    whole = ff.s
    ff.reset()
    for part in x.split([4, 1, 6], dim=1):
        ff(part, generated=False)
    assert_close(ff.s, whole)


def test_reselection_rewrites_the_cache_and_the_selection():
    """After rho tokens the KV entries are those of the full model, and s counts prompt and response."""
    model, prompt = tiny.model(), tiny.tokens(1, 6)
    full = generate(model, prompt, 12)
    caprese.attach(model, "griffin", density=0.2)
    assert torch.equal(generate(model, prompt, 12, reselect=1), full)  # rho = 1 never uses a sparse result
    assert not torch.equal(generate(model, prompt, 12), full)

    caches, new_cache = [], model.new_cache
    model.new_cache = lambda *shape: caches.append(new_cache(*shape)) or caches[-1]
    new = generate(model, prompt, 9, reselect=4)  # 8 tokens fed: two reselections, the second just happened
    sequence = torch.cat([prompt, new[:, :8]], dim=1)
    truth = new_cache(1, 14)
    caprese.reset(model)
    model.hidden(sequence, truth, generated=False)
    for layer in range(4):
        assert_close(caches[0].k[layer][:, :, :14], truth.k[layer], **CLOSE)
        assert_close(caches[0].v[layer][:, :, :14], truth.v[layer], **CLOSE)
    expected = caprese.sparse_layers(model)[1].s
    generate(model, prompt, 9, reselect=4)
    assert_close(caprese.sparse_layers(model)[1].s, expected)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_quantile_equals_torchs(size, q):
    generator = torch.Generator().manual_seed(size)
    for values in (torch.rand(size, generator=generator), torch.randn(size, generator=generator).abs() * 1e-3,
                   torch.randint(0, 3, (size,), generator=generator).float()):
        assert_close(caprese.quantile(values, q), torch.quantile(values, q))


def test_quantile_beyond_torchs_limit():
    values = torch.arange(17_000_001).float().flip(0) / 2 ** 24
    assert caprese.quantile(values, 0.25) == 4_250_000 / 2 ** 24


def test_cats_threshold_comes_from_the_prompt_alone():
    """(5): tau is the (1 - density) quantile over prompt positions and neurons; that share of them is zeroed."""
    model, tokens = tiny.model(), tiny.tokens(2, 12)
    ff = caprese.sparse_layers(caprese.attach(model, "cats", density=0.3))[0]
    gates = []
    observe = ff.observe
    ff.observe = lambda gate, z, prompt=None: gates.append(gate) or observe(gate, z, prompt)
    model(tokens, [5, 8])
    for row, length in enumerate([5, 8]):
        prompt = gates[0][row, :length].abs()
        assert_close(ff.tau[row], torch.quantile(prompt, 0.7))
        assert (prompt >= ff.tau[row]).float().mean() == pytest.approx(0.3, abs=1 / prompt.numel())
    before = ff.tau.clone()
    ff(torch.randn(2, 3, 32), generated=False)  # a later full pass, as at reselection
    assert torch.equal(ff.tau, before)


def test_oracle_topk_keeps_the_largest():
    model, x = tiny.model(), torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    ff = caprese.sparse_layers(caprese.attach(model, "topk", density=0.25))[0]
    gate = ff.act(ff.gate_proj(x))
    z = gate * ff.up_proj(x)
    kept = ff.sparsify(gate, z)
    assert (kept != 0).sum(-1).eq(20).all()
    assert (z - kept).abs().amax(-1).le(z.abs().sort(-1, descending=True).values[..., 19]).all()


@pytest.mark.parametrize("method, correction, rank", [c for c in CORRECTED if c[2]])
def test_gradients_reach_only_the_correction(method, correction, rank):
    model, tokens = tiny.model(), tiny.tokens(2, 12)
    tiny.fill(caprese.attach(model, method, density=0.4, rank=rank, correction=correction))
    model(tokens, [5, 7]).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    names = {"linear": "L R", "gated": "G L R", "lora": "gate_A gate_B up_A up_B down_A down_B"}[correction].split()
    assert with_gradient == {f"model.layers.{i}.mlp.{n}" for i in caprese.sparse_layers(model) for n in names}
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


def test_attach_chooses_the_papers_layers_and_is_idempotent():
    model, tokens = tiny.model(), tiny.tokens(2, 12)
    full, names = model(tokens), set(model.state_dict())
    assert list(caprese.sparse_layers(caprese.attach(model, "griffin"))) == [0, 1]
    assert list(caprese.sparse_layers(caprese.attach(model, "cats"))) == [0, 1, 2, 3]
    once = caprese.attach(model, "griffin", 0.4, [1])(tokens, [5, 7])
    assert_close(caprese.attach(model, "griffin", 0.4, [1])(tokens, [5, 7]), once)
    assert names < set(model.state_dict())  # the base weights keep their official names
    caprese.detach(model)
    assert set(model.state_dict()) == names
    assert_close(model(tokens, [5, 7]), full)


@pytest.mark.parametrize("bad", [{"method": "magic"}, {"density": 0.0}, {"density": 1.5}, {"layers": [4]}, {"rank": -1},
                                 {"rank": 33}, {"correction": "magic"}, {"method": "int4", "correction": "lora"}])
def test_attach_refuses(bad):
    model = tiny.model()
    with pytest.raises(ValueError):
        caprese.attach(model, **bad)
    assert not caprese.sparse_layers(model)


@pytest.mark.parametrize("correction", caprese.CORRECTIONS)
def test_adapter_round_trip(tmp_path, correction):
    model, tokens, file = tiny.model(), tiny.tokens(2, 12), tmp_path / "a.safetensors"
    tiny.fill(caprese.attach(model, "griffin", 0.4, [0, 2], rank=6, correction=correction))
    expected = model(tokens, [5, 7])
    caprese.save_adapter(model, file)
    again = caprese.load_adapter(tiny.model(), file)
    assert torch.equal(again(tokens, [5, 7]), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    base = sum(p.numel() for p in tiny.model().parameters())
    if correction == "linear":
        assert caprese.added_parameters(again) == pytest.approx(4 * 6 * 32 / base)


def test_adapter_refusals(tmp_path):
    model, file = tiny.model(), tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="no sparse method"):
        caprese.save_adapter(model, file)
    caprese.save_adapter(caprese.attach(model, "griffin", 0.4, rank=6), file)
    with pytest.raises(ValueError, match="another model"):
        caprese.load_adapter(tiny.model(seed=5), file)
    with pytest.raises(ValueError, match="for griffin"):
        caprese.load_adapter(caprese.attach(tiny.model(), "cats", 0.4), file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        caprese.load_adapter(tiny.model(), tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable"):
        caprese.load_adapter(tiny.model(), tmp_path / "cut.safetensors")
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a Caprese adapter"):
        caprese.load_adapter(tiny.model(), tmp_path / "other.safetensors")
