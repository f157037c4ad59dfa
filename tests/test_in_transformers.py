"""Our sparse FF in the models of transformers. Run: python -m pytest tests/test_in_transformers.py

Both implementations run on the same weights in float64 and must give the very same tokens.
"""

import copy
import functools
import io
import json
import sys
import threading

import pytest
import tiny
import torch
from test_families import FIXTURES
from test_families import FAMILIES as WITH_FIXTURES
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import caprese
import data
import distill
import sample
from model import Transformer
from paper.int4 import Int4FF
from paper.oracle import OracleFF

transformers = pytest.importorskip("transformers", reason="pip install transformers")
from beyond import in_transformers

METHODS = {"griffin": {}, "griffin all": {"layers": "all"}, "cats": {"method": "cats"},
           "topk": {"method": OracleFF}, "int4": {"method": Int4FF}}
NEW = 12


# ---- against our own model.py, on the fixtures


def load(name, dtype=torch.float64):
    """(our model, transformers' model) of a fixture."""
    ours = Transformer.from_pretrained(FIXTURES / name, dtype=dtype)
    # Before 5.21 sdpa, which is the default, leaves the soft-capping of Gemma 2's scores out.
    attention = "eager" if name.startswith("gemma2") else None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / name, dtype=dtype, attn_implementation=attention)
    theirs.generation_config.eos_token_id = None  # no answer ends early
    return ours, theirs.eval()


def attach(models, method, rank):
    """Attach the same method, and the same random correction, to all models."""
    for model in models:
        settings = {"method": "griffin", "density": 0.4, "rank": rank} | METHODS[method]
        tiny.fill(caprese.attach(model, **settings))


def prompt(model, batch_size=1, length=9, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch_size, length), generator=generator)


def generate(theirs, tokens, new=NEW, **settings):
    """The new tokens of transformers' generate, greedy if not said otherwise."""
    mask = settings.pop("attention_mask", torch.ones_like(tokens))
    found = theirs.generate(tokens, attention_mask=mask, max_new_tokens=new,
                            pad_token_id=0, **{"do_sample": False} | settings)
    return found[:, tokens.shape[1]:]


@pytest.fixture
def pair():
    """A fixture's two models, with GRIFFIN and a random correction."""
    models = load("llama-tied")
    attach(models, "griffin", 4)
    return models


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WITH_FIXTURES)
def test_greedy_tokens_are_ours(name, method, rank):
    """One prompt, a second one after it, several samples of it, and a static cache."""
    ours, theirs = load(name)
    attach((ours, theirs), method, rank)
    assert caprese.fingerprint(ours) == caprese.fingerprint(theirs)
    full = generate(caprese.detach(load(name)[1]), prompt(ours))
    for seed in (2, 3):
        tokens = prompt(ours, seed=seed)
        expected = sample.generate(ours, tokens, NEW)
        assert torch.equal(generate(theirs, tokens), expected)
        if seed == 2 and method.startswith("griffin"):
            assert not torch.equal(full, expected)  # else the sparse FF would not show
    several = generate(theirs, tokens, num_return_sequences=3, do_sample=True, top_k=1)
    assert torch.equal(several, expected.expand(3, -1))
    assert torch.equal(generate(theirs, tokens, cache_implementation="static"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WITH_FIXTURES)
def test_rows_of_a_left_padded_batch_are_as_if_alone(name, method):
    # In float64 transformers' own Gemma 2 gives NaN for padding: its softmax is in float32.
    dtype = torch.float32 if name.startswith("gemma2") else torch.float64
    ours, theirs = load(name, dtype)
    attach((ours, theirs), method, 4)
    lengths = (9, 4, 6)
    tokens, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, 9 - length:] = prompt(ours, length=length, seed=row)
        mask[row, 9 - length:] = 1
    for settings in ({}, {"cache_implementation": "static"}):
        found = generate(theirs, tokens, attention_mask=mask, **settings)
        for row, length in enumerate(lengths):
            alone = sample.generate(ours, prompt(ours, length=length, seed=row), NEW)
            assert torch.equal(found[row], alone[0])


def test_samples_of_one_prompt_share_the_compact_path(pair):
    ours, theirs = pair
    tokens = prompt(ours)
    found = generate(theirs, tokens, num_return_sequences=4, do_sample=True, top_k=1)
    assert torch.equal(found, sample.generate(ours, tokens, NEW).expand(4, -1))
    assert all(ff.compact for ff in caprese.sparse_layers(theirs).values())


def test_one_new_token_streaming_and_beams(pair):
    ours, theirs = pair
    tokens = prompt(ours)
    expected = sample.generate(ours, tokens, NEW)
    assert torch.equal(generate(theirs, tokens, 1), expected[:, :1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample.BUNDLED)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generate, args=(theirs, tokens),
                              kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected[0])
    beams = generate(theirs, tokens, num_beams=3)
    assert best_of_beams(ours, tokens, 3, NEW) == beams[0].tolist()


def best_of_beams(ours, tokens, width, new):
    """Beam search by teacher-forced logits of our model, in the definition's own words."""
    beams = [([], 0.0)]
    for _ in range(new):
        grown = []
        for ids, score in beams:
            text = torch.cat([tokens[0], torch.tensor(ids, dtype=torch.int64)])[None]
            logits = caprese.teacher_forced(ours, text, [tokens.shape[1]])[0, -1]
            for token, p in enumerate(logits.log_softmax(-1).tolist()):
                grown.append(([*ids, token], score + p))
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return beams[0][0]


@pytest.mark.parametrize("method", ["griffin", "topk"])
@pytest.mark.parametrize("chunk", [3, 5])
def test_a_prompt_in_chunks(method, chunk):
    ours, theirs = load("qwen3")
    attach((ours, theirs), method, 4)
    tokens = prompt(ours)
    found = generate(theirs, tokens, prefill_chunk_size=chunk)
    assert torch.equal(found, sample.generate(ours, tokens, NEW))


@pytest.mark.parametrize("chunk", [2, 4])
def test_a_last_chunk_of_one_token_counts_as_decoded(pair, chunk):
    """Nothing in the call tells the two apart; Watcher says so."""
    ours, theirs = pair
    tokens = prompt(ours)
    cache, _ = sample.prefill(ours, tokens[:, :-1], NEW + 1, torch.tensor([tokens.shape[1] - 1]))
    token, expected = tokens[:, -1], []
    for _ in range(NEW):
        with caprese.phase(ours, "decode"):
            token = ours.decode(token, cache).argmax(-1)
        expected.append(token)
    found = generate(theirs, tokens, prefill_chunk_size=chunk)
    assert torch.equal(found, torch.stack(expected, dim=1))


def test_cats_refuses_a_prompt_in_chunks():
    _, theirs = load("llama-tied")
    caprese.attach(theirs, "cats")
    with pytest.raises(ValueError, match="whole prompt"):
        generate(theirs, prompt(theirs), prefill_chunk_size=4)


@pytest.mark.parametrize("name", WITH_FIXTURES)
def test_teacher_forced_logits_are_ours(name):
    ours, theirs = load(name)
    attach((ours, theirs), "griffin", 4)
    tokens = prompt(ours, 2, 14)
    with torch.no_grad():
        found = caprese.teacher_forced(theirs, tokens, [5, 9])
        # transformers computes norms and softmax in float32 whatever the model's dtype is.
        assert_close(found, caprese.teacher_forced(ours, tokens, [5, 9]), rtol=0, atol=1e-4)


def test_an_adapter_serves_both(pair, tmp_path):
    ours, theirs = pair
    tokens = prompt(ours)
    for source, target in ((ours, theirs), (theirs, ours)):
        caprese.save_adapter(source, tmp_path / "a.safetensors")
        caprese.detach(target)
        caprese.load_adapter(target, tmp_path / "a.safetensors")
        assert torch.equal(generate(theirs, tokens), sample.generate(ours, tokens, NEW))


def test_detached_it_is_the_model_of_before(pair):
    _, theirs = pair
    tokens = prompt(theirs)
    expected = load("llama-tied")[1](tokens).logits
    caprese.detach(theirs)
    assert torch.equal(theirs(tokens).logits, expected)
    assert_untouched(theirs)


def test_what_would_score_the_full_model_is_refused(pair):
    _, theirs = pair
    tokens = prompt(theirs)
    for call in (lambda: theirs(tokens), lambda: generate(theirs, tokens, use_cache=False)):
        with pytest.raises(ValueError, match="teacher_forced"):
            call()
    cache = transformers.DynamicCache(config=theirs.config)
    with caprese.phase(theirs, "full"):
        theirs(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="of another prompt than this KV cache"):
        theirs(tokens[:, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match="eval"):
        theirs.train()(tokens, past_key_values=transformers.DynamicCache(config=theirs.config))


def test_assisted_generation_with_a_sparse_target_is_refused(pair):
    _, theirs = pair
    _, assistant = load("llama-tied")
    with pytest.raises(ValueError, match="assisted generation"):
        generate(theirs, prompt(theirs), assistant_model=assistant)


def test_a_phase_set_by_hand_stays(pair):
    _, theirs = pair
    tokens = prompt(theirs)
    full = load("llama-tied")[1]
    with caprese.phase(theirs, "full"):
        assert torch.equal(theirs(tokens).logits, full(tokens).logits)
        assert torch.equal(generate(theirs, tokens), generate(full, tokens))
    with pytest.raises(ValueError):
        theirs(tokens)


def test_a_subclass_of_a_model_of_transformers_is_watched_too():
    class Own(transformers.LlamaForCausalLM):
        pass

    ours, _ = load("llama-tied")
    theirs = Own.from_pretrained(FIXTURES / "llama-tied", dtype=torch.float64).eval()
    attach((ours, theirs), "griffin", 4)
    tokens = prompt(ours)
    assert torch.equal(generate(theirs, tokens), sample.generate(ours, tokens, NEW))


def test_a_failed_call_leaves_the_model_full(pair):
    _, theirs = pair
    tokens = prompt(theirs)
    cache = transformers.DynamicCache(config=theirs.config)
    with pytest.raises(IndexError):
        theirs(tokens + theirs.config.vocab_size, past_key_values=cache)
    call = next(iter(caprese.sparse_layers(theirs).values())).call
    assert call.phase == "full" and call.counted is None


def test_after_a_failed_selection_nothing_decodes_with_the_prompt_before(pair, monkeypatch):
    _, theirs = pair
    tokens = prompt(theirs)
    good = transformers.DynamicCache(config=theirs.config)
    theirs(tokens, past_key_values=good)
    failed = transformers.DynamicCache(config=theirs.config)
    monkeypatch.setattr(caprese, "select", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        theirs(tokens, past_key_values=failed)
    assert next(iter(caprese.sparse_layers(theirs).values())).call.phase == "full"
    for cache in (good, failed):
        with pytest.raises(ValueError, match="of another prompt than this KV cache"):
            theirs(tokens[:, :1], past_key_values=cache)
    monkeypatch.undo()
    fresh = transformers.DynamicCache(config=theirs.config)
    theirs(tokens, past_key_values=fresh)
    with pytest.raises(ValueError):  # a refused call leaves the good cache usable
        theirs(tokens[:, :1], past_key_values=good)
    theirs(tokens[:, :1], past_key_values=fresh)


def assert_untouched(model):
    """Nothing of ours is left in a model."""
    for module in model.modules():
        assert not isinstance(module, caprese.SparseFF)
        assert not module._forward_pre_hooks and not module._forward_hooks


# ---- every family, on tiny random models

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
         "tie_word_embeddings": False}
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "global_head_dim": 8,
          "num_kv_shared_layers": 2, "num_hidden_layers": 4, "use_double_wide_mlp": True,
          "layer_types": ["sliding_attention", "full_attention"] * 2}
QWEN3_5 = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
           "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
FAMILIES = dict.fromkeys("""smollm3 olmo2 olmo3 seed_oss hunyuan_v1_dense ernie4_5 exaone4 llama
    mistral qwen2 qwen3 gemma2""".split(), {}) | {
    "gemma3_text": KINDS, "gemma4_text": GEMMA4, "qwen3_5_text": QWEN3_5, "ministral3": {},
    "granite": {"logits_scaling": 0.3, "residual_multiplier": 0.7},
    "cohere2": KINDS | {"logit_scale": 2.0},
    "cwm": KINDS,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8,
          "num_attention_heads": 2, "num_key_value_heads": 2, "image_size": 16, "patch_size": 8}
NESTED = {  # family: (its text part, its vision part)
    "gemma3": ("gemma3_text", "siglip_vision_model"), "gemma4": ("gemma4_text", "gemma4_vision"),
    "mistral3": ("mistral", "pixtral"),
}


def build(model):
    """A model with weights that are large enough for FF errors to show, in float64."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.15)
    model.generation_config.eos_token_id = None
    return model.double().eval()


def family(name, **changes):
    """A tiny random model of a family of transformers."""
    if name not in NESTED:
        config = transformers.AutoConfig.for_model(name, **SIZES | FAMILIES.get(name, {}) | changes)
        return build(transformers.AutoModelForCausalLM.from_config(config))
    text, vision = NESTED[name]
    config = transformers.AutoConfig.for_model(
        name, text_config=SIZES | FAMILIES[text] | {"model_type": text},
        vision_config=VISION | {"model_type": vision}, audio_config=None)
    return build(transformers.AutoModelForImageTextToText.from_config(config))


def some_samples(count=24, vocab_size=97):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, vocab_size, (count, 16), generator=generator).tolist()
    return [(row[:8], row[8:]) for row in ids]


@pytest.mark.parametrize("name", [*FAMILIES, *NESTED])
def test_every_family(name, tmp_path):
    model = family(name)
    tokens, mark = torch.arange(20, 31)[None], caprese.fingerprint(model)
    full = generate(model, tokens)
    caprese.attach(model, density=1.0, layers="all")
    assert torch.equal(generate(model, tokens), full)
    assert caprese.fingerprint(model) == mark

    tiny.fill(caprese.attach(model, density=0.4, layers="all", rank=4))
    new = generate(model, tokens)
    assert not torch.equal(new, full)
    text = torch.cat([tokens, new], dim=1)
    with torch.no_grad():
        forced = caprese.teacher_forced(model, text[:, :-1], [tokens.shape[1]])
    assert torch.equal(forced[:, -NEW:].argmax(-1), new)

    caprese.save_adapter(model, tmp_path / "a.safetensors")
    caprese.detach(model)
    assert_untouched(model)
    caprese.load_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(generate(model, tokens), new)

    with torch.no_grad(), caprese.phase(model, "full"):
        found = distill.logits(model, distill.embeddings(model, text)[0])
        assert torch.equal(found, model(text).logits[0])

    samples = some_samples()
    caprese.attach(model, density=0.4, layers="all", rank=8)
    distill.fit_closed_form(model, list(data.batches(samples, 8)))
    assert distill.unexplained(model, samples) < 0.9  # 1 without a correction
    (batch,) = data.batches(samples, len(samples))
    before = distill.e2e_backward(model, batch, distill.mse)
    distill.train_end_to_end(model, samples, lr=1e-3, epochs=2, batch_size=24)
    assert distill.e2e_backward(model, batch, distill.mse) < before


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_both_roads_learn_the_same(name, loss):
    """Closed form, two end-to-end steps, and KL: on model.py and on transformers."""
    learned = []
    for model in load(name):
        samples = some_samples(24, model.config.vocab_size)
        caprese.attach(model, density=0.4, rank=4)
        distill.fit_closed_form(model, list(data.batches(samples, 8)))
        distill.train_end_to_end(model, samples, 1e-3, 2, 24, loss, micro_batch=8)
        learned.append([*caprese.adapter_parameters(model).values(),
                        torch.tensor(distill.kl_to_full(model, samples))])
    # transformers computes norms and softmax in float32 whatever the model's dtype is.
    for ours, theirs in zip(*learned):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma4_text", "qwen3_5_text"])
def test_gradient_checkpointing(name, monkeypatch):
    """The gradients are the same, and each block runs twice; afterwards it is off."""
    forced, calls, gradients = caprese.GRIFFIN.teacher_forced, [], []

    def counting(ff, x, generated):
        calls.append(ff)
        return forced(ff, x, generated)

    monkeypatch.setattr(caprese.GRIFFIN, "teacher_forced", counting)
    model = family(name, attention_dropout=0.5)
    tiny.fill(caprese.attach(model, density=0.4, layers="all", rank=4)).eval()
    (batch,) = data.batches(some_samples(8), 8)
    for wanted in (False, True):
        calls.clear()
        distill.recompute_activations(model, wanted)
        distill.e2e_backward(model, batch, distill.mse)
        assert len(calls) == (1 + wanted) * len(model.model.layers)
        gradients.append([p.grad for p in caprese.adapter_parameters(model).values()])
        model.zero_grad()
    assert_close(*gradients, rtol=1e-4, atol=1e-9)
    distill.train_end_to_end(model, some_samples(8), epochs=1, gradient_checkpointing=True)
    assert not any(module.training for module in model.modules())
    distill.e2e_backward(model, batch, distill.mse)
    assert len(calls) == (2 + 2 + 1) * len(model.model.layers)


def test_a_model_without_gradient_checkpointing_says_so():
    model = family("llama")
    layer = model.model.layers[0]
    layer.__class__ = type("Layer", (nn.Module,), {"forward": type(layer).forward})
    caprese.attach(model, rank=4)
    with pytest.raises(ValueError, match="no gradient checkpointing"):
        distill.train_end_to_end(model, some_samples(8), gradient_checkpointing=True)
    distill.train_end_to_end(model, some_samples(8), epochs=1)


def test_a_model_in_training_mode_does_not_teach():
    model = caprese.attach(family("llama"), rank=4).train()
    with pytest.raises(ValueError, match="eval"):
        distill.fit_closed_form(model, list(data.batches(some_samples(8), 8)))


# ---- what cannot be replaced is refused, and the model is as before

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 16}


@pytest.mark.parametrize("name, changes, message", [
    ("phi3", {}, "layer 0.* must have gate_proj.* it has gate_up_proj"),
    ("glm4", {}, "it has gate_up_proj, down_proj"),
    ("apertus", {}, "it has up_proj, down_proj, act_fn"),
    ("nanochat", {}, "it has .*fc1, fc2"),
    ("llama4_text", {"intermediate_size_mlp": 32} | EXPERTS, "mixture of experts"),
    ("lfm2", {}, "must have an mlp; it has self_attn, feed_forward"),
    ("mixtral", EXPERTS, "layer 0 .*mixture of experts"),
    ("qwen3_moe", EXPERTS, "mixture of experts"),
    ("gemma4_text", {"enable_moe_block": True, "top_k_experts": 2} | EXPERTS, "mixture of experts"),
    ("llama", {"mlp_bias": True}, "layer 0.* has a bias"),
    ("gpt2", {}, "GPT2LMHeadModel has no model.layers"),
])
def test_other_architectures(name, changes, message):
    model = family(name, **changes)
    with pytest.raises(ValueError, match=message) as error:
        caprese.attach(model)
    assert "\n" not in str(error.value)
    assert_untouched(model)


class Lora(nn.Module):
    """What a live layer of PEFT looks like."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight, self.bias = base_layer.weight, None

    def forward(self, x):
        return self.base_layer(x)


class Linear4bit(nn.Linear):
    """A Linear whose weight is not its numbers."""


def change_linear(change):
    """A change of up_proj in an MLP."""
    def change_mlp(mlp):
        mlp.up_proj = change(mlp.up_proj)
    return change_mlp


def to_int8(linear):
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return linear


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: output)
    return module


def patch_forward(change):
    """A change of an MLP whose forward is `change` of the original one's function."""
    def change_mlp(mlp):
        mlp.forward = functools.partial(change, mlp, mlp.forward)
    return change_mlp


def clipped(mlp, forward, x):
    gate = mlp.act_fn(mlp.gate_proj(x)).clamp(max=7)
    return mlp.down_proj(gate * mlp.up_proj(x))


@pytest.mark.parametrize("change, message", [
    (change_linear(Lora), "up_proj in layer 1 .*PEFT.*merge_and_unload"),
    (change_linear(lambda linear: Linear4bit(32, 80, bias=False)), "Linear4bit.*unquantised"),
    (change_linear(lambda linear: linear.to("meta")), "layer 1 .*meta device"),
    (change_linear(to_int8), "unquantised"), (change_linear(lambda linear: nn.ReLU()), "a ReLU"),
    (change_linear(hooked), "layer 1 .*hooks"),
    (hooked, "layer 1 .*hooks"),
    (patch_forward(lambda mlp, forward, x: forward(x) * 1.01), "MLP of layer 1 .*compute"),
    (patch_forward(lambda mlp, forward, x: forward(x) + x), "compute"),
    (patch_forward(clipped), "compute"),
    (patch_forward(lambda mlp, forward, x: (forward(x), None)), "compute"),
    (lambda mlp: setattr(mlp.up_proj, "forward", lambda x: 2 * F.linear(x, mlp.up_proj.weight)),
     "compute"),
])
def test_mlps_that_are_more_than_three_matrices(change, message):
    model = family("llama")
    change(model.model.layers[1].mlp)
    before = [dict(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=message) as error:
        caprese.attach(model, layers="all")
    assert "\n" not in str(error.value)
    assert [dict(module._forward_hooks) for module in model.modules()] == before
    assert not caprese.sparse_layers(model)
    caprese.attach(model, layers=[0])  # the other layer can be replaced


@pytest.mark.parametrize("settings, message", [
    ({"rank": 33}, "rank"), ({"rank": -1}, "rank"), ({"layers": [2]}, "layers"),
    ({"method": caprese.SparseFF}, "lacks")])
def test_after_a_refused_setting_no_hook_is_left(settings, message):
    model = family("llama")
    with pytest.raises(ValueError, match=message):
        caprese.attach(model, **settings)
    assert_untouched(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mlps_are_tried_in_every_dtype(dtype):
    caprese.attach(family("llama").to(dtype))


# ---- what people do with a model

@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_a_deep_copy_is_a_model_of_its_own(method):
    ours, theirs = load("llama-tied")
    attach((ours, theirs), method, 4)
    tokens = prompt(ours)
    expected = sample.generate(ours, tokens, NEW)
    for model in (ours, theirs):
        answer = sample.generate if model is ours else generate
        twin = copy.deepcopy(model)
        assert torch.equal(answer(twin, tokens, NEW), expected)
        for ff in caprese.sparse_layers(model).values():
            ff.R.data.zero_()  # the copy has a correction of its own
        assert not torch.equal(answer(model, tokens, NEW), expected)
        assert torch.equal(answer(twin, tokens, NEW), expected)
        caprese.detach(model)
        assert torch.equal(answer(twin, tokens, NEW), expected)
        caprese.detach(twin)
        assert torch.equal(answer(twin, tokens, NEW), answer(model, tokens, NEW))
    assert_untouched(twin)


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_a_used_model_can_be_written_by_torch_save(method):
    """Whole, as torch.save(model, file) does; what is read answers as before."""
    model = tiny.fill(caprese.attach(family("llama"), method, 0.4, "all", 4))
    tokens = torch.arange(3, 14)[None]
    expected = generate(model, tokens)
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    read = torch.load(written, weights_only=False)
    assert torch.equal(generate(read, tokens), expected)
    assert torch.equal(generate(model, tokens), expected)


def test_a_copy_does_not_go_on_with_the_cache_of_another_model():
    model = caprese.attach(family("llama"), layers="all")
    cache = transformers.DynamicCache(config=model.config)
    model(torch.arange(3, 14)[None], past_key_values=cache)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="another prompt than this KV cache"):
        twin(torch.tensor([[5]]), past_key_values=cache)
    model(torch.tensor([[5]]), past_key_values=cache)  # its own goes on


@pytest.mark.parametrize("method", [
    "griffin", pytest.param("cats", marks=pytest.mark.slow)])
def test_a_compiled_decode_step(method):
    """Equal tokens, and what the first decode steps compile serves all others.

    The hooks are left alone: nothing else than they breaks the graph.
    """
    model = tiny.fill(caprese.attach(family("llama"), method, 0.4, "all", 4))
    tokens = torch.arange(3, 14)[None]
    expected = generate(model, tokens)
    compiled = transformers.CompileConfig(backend="eager")
    compiled._compile_all_devices = True
    counters, frames = torch._dynamo.utils.counters, []
    torch._dynamo.reset()
    counters.clear()

    def count_frames(ids, scores, **settings):
        """A criterion that never stops: it is called after each step."""
        frames.append(counters["frames"]["total"])
        return torch.zeros(len(ids), dtype=torch.bool)

    found = generate(model, tokens, cache_implementation="static", compile_config=compiled,
                     stopping_criteria=[count_frames])
    assert torch.equal(found, expected)
    assert len(frames) == NEW and frames[2] == frames[-1] > 0
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"])


@pytest.mark.slow
def test_torch_compile_around_the_model():
    model = tiny.fill(caprese.attach(family("llama"), "griffin", 0.4, "all", 4))
    tokens = torch.arange(3, 14)[None]
    expected = generate(model, tokens)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, tokens), expected)


@pytest.mark.parametrize("method", ["griffin", "cats"])
@pytest.mark.parametrize("rows", [1, 2])
def test_inference_mode_and_then_without(method, rows):
    models = load("llama-tied")
    attach(models, method, 4)
    tokens = prompt(models[0], rows)
    for model, answer in zip(models, (sample.generate, generate)):
        with torch.inference_mode():
            expected = answer(model, tokens, NEW)
        assert torch.equal(answer(model, tokens, NEW), expected)


def test_attached_in_inference_mode_it_learns():
    model = family("llama")
    with torch.inference_mode():
        caprese.attach(model, rank=4)
    distill.fit_closed_form(model, list(data.batches(some_samples(8), 8)))
    distill.train_end_to_end(model, some_samples(8), epochs=1)


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_autocast(method):
    """Under autocast to bfloat16: density 1 is the full model, and float32 sums select."""
    for model, answer in ((tiny.model(), sample.generate), (family("llama").float(), generate)):
        tokens = torch.arange(3, 14)[None]
        with torch.autocast("cpu", torch.bfloat16):
            full = answer(model, tokens, NEW)
            caprese.attach(model, method, 1.0, "all")
            assert torch.equal(answer(model, tokens, NEW), full)
            caprese.attach(model, method, 0.4, "all")
            assert not torch.equal(answer(model, tokens, NEW), full)
        for ff in caprese.sparse_layers(model).values():
            for name in ("s", "tau") if method == "griffin" else ("tau",):
                assert getattr(ff, name, torch.zeros(1)).dtype == torch.float32


def test_layers_on_two_devices():
    """A layer on another device gets its masks there, and selects there (meta: only shapes)."""
    model = tiny.fill(caprese.attach(family("qwen3"), "griffin", 0.4, "all", 4))
    tokens = torch.arange(3, 14).repeat(2, 1)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0

    def to_meta(module, args, kwargs):
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"),
                                                 (args, kwargs))

    for part in (model.model.layers[1], model.model.norm, model.lm_head):
        part.to("meta").register_forward_pre_hook(to_meta, with_kwargs=True)
    here, there = caprese.sparse_layers(model).values()
    with torch.no_grad():
        logits = caprese.teacher_forced(model, tokens, [5, 9])
        assert logits.is_meta and logits.shape == (2, 11, 97)
        with caprese.phase(model, "count", counted=mask.bool()):
            model(tokens)
    assert not here.s.is_meta and there.s.is_meta
    assert there.top_neurons(there.s).shape == (2, there.num_kept)
    here.select()
    assert here.kept.sum(-1).tolist() == [here.num_kept] * 2


# ---- the README

def test_the_lines_for_transformers_run(tmp_path, monkeypatch):
    """Up to the harness, which is no package of the tests; then generate() runs sparse."""
    readme = (FIXTURES.parents[1] / "README.md").read_text(encoding="utf-8")
    block = readme.split("```python\nfrom transformers import")[1].split("import lm_eval")[0]
    rows = [{"question": p.question, "answer": p.response} for p in data.problems("maths", 8, 0)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {}
    monkeypatch.chdir(tmp_path)
    exec("from transformers import" + block.replace('"models', f'"{sample.BUNDLED.parent}'), names)
    model = names["model"]
    for ff in caprese.sparse_layers(model).values():
        assert ff.R.abs().sum() > 0
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert all(ff.compact for ff in caprese.sparse_layers(model).values())
    assert caprese.read_adapter(tmp_path / "mine.safetensors")[1]["method"] == "griffin"


# ---- the commands

def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["in_transformers", *map(str, arguments)])
    in_transformers.main()


@pytest.fixture
def rows_of_data(tmp_path):
    """A file of a few of the bundled model's problems."""
    file = tmp_path / "maths.jsonl"
    rows = [{"question": p.question, "response": p.response, "answer": p.answer}
            for p in data.problems("maths", 8, 0, steps=2)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_distill_and_answer(monkeypatch, tmp_path, capsys, rows_of_data):
    """The bundled model in transformers: the table, the adapter, three answers; as distill.py."""
    out = tmp_path / "a.safetensors"
    flags = ["--model", sample.BUNDLED, "--data", rows_of_data, "--eval-data", rows_of_data,
             "--eval-samples", 4, "--rank", 4, "--e2e-epochs", 1, "--json", "--out", out]
    command(monkeypatch, "distill", *flags, "--problems", rows_of_data, "--max-new-tokens", 40)
    theirs = json.loads(capsys.readouterr().out)["rows"]
    monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, flags)])
    distill.distill(distill.arguments())
    ours = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in theirs] == ["full", "griffin", "+ layer-wise", "+ E2E"]
    for our_row, their_row in zip(ours, theirs):
        assert their_row["maths kl"] == pytest.approx(our_row["maths kl"], rel=1e-3, abs=1e-6)
        assert their_row["unexplained"] == pytest.approx(our_row["unexplained"], rel=1e-3)
    assert theirs[0]["maths right"] == 1.0 and theirs[0]["maths error"] > 0

    question = data.ask(data.problems("maths", 1, 0, steps=2)[0])
    command(monkeypatch, "answer", "--model", sample.BUNDLED, "--adapter", out, question, "--json",
            "--max-new-tokens", 40)
    answers = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in answers] == ["full", "sparse", "sparse + Caprese"]
    model, tokenizer = Transformer.from_pretrained(sample.BUNDLED), data.Tokenizer(sample.BUNDLED)
    for row in answers:
        if row["method"] == "sparse":
            caprese.attach(model)
        elif row["method"] != "full":
            caprese.load_adapter(model, out)
        ((_, response, _),) = sample.respond(model, tokenizer, [question], max_new_tokens=40)
        assert row["response"] == response


@pytest.mark.parametrize("arguments, message", [
    ([], "distill,answer"), (["learn"], "choose from .?distill.?, .?answer"),
    (["distill"], "--model is needed"),
    (["answer", "--adapter", "a.safetensors", "prompt"], "--model is needed"),
    (["distill", "--model", "x", "--data", "y", "--layerwise", "sequential"], "our own model.py"),
    (["answer", "--model", "x", "--adapter", "missing.safetensors", "prompt"],
     "missing.safetensors does not exist"),
    (["distill", "--model", str(FIXTURES), "--data", "y"], "holds no readable model"),
])
def test_wrong_commands_end_in_one_line(monkeypatch, arguments, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        command(monkeypatch, *arguments)
    assert "\n" not in str(error.value)


def test_a_model_that_transformers_cannot_load_is_one_line(monkeypatch, tmp_path, rows_of_data):
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((sample.BUNDLED / name).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="transformers cannot load") as error:
        command(monkeypatch, "distill", "--model", tmp_path, "--data", rows_of_data)
    assert "\n" not in str(error.value)
