"""Our sparse FF in the models of transformers. Run: python -m pytest tests/test_transformers.py

Both implementations run on the same weights in float64 and must give the very same tokens.
"""

import threading

import pytest
import tiny
import torch
from test_families import FAMILIES, FIXTURES
from torch.testing import assert_close

import caprese
import sample
from model import Transformer

transformers = pytest.importorskip("transformers", reason="pip install transformers")
METHODS = {"griffin": {}, "griffin all": {"layers": "all"}, "cats": {"method": "cats"},
           "topk": {"method": "topk"}, "int4": {"method": "int4"}}
NEW = 12


def load(name, dtype=torch.float64):
    """(our model, transformers' model) of a fixture."""
    ours = Transformer.from_pretrained(FIXTURES / name, dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=dtype)
    theirs.generation_config.eos_token_id = None  # no answer ends early
    return ours, theirs.eval()


def attach(models, method, rank):
    """Attach the same method, and the same random correction, to all models."""
    for model in models:
        settings = {"method": "griffin", "density": 0.4, "rank": rank} | METHODS[method]
        if settings.get("layers") == "all":
            settings["layers"] = range(len(model.model.layers))
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
@pytest.mark.parametrize("name", FAMILIES)
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
@pytest.mark.parametrize("name", FAMILIES)
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
    """Nothing in the call tells the two apart; watch_calls says so."""
    ours, theirs = pair
    tokens = prompt(ours)
    step, _ = sample.prefill(ours, tokens[:, :-1], NEW + 1)
    token, expected = tokens[:, -1], []
    for _ in range(NEW):
        with caprese.phase(ours, "sparse"):
            token = step(token).argmax(-1)
        expected.append(token)
    found = generate(theirs, tokens, prefill_chunk_size=chunk)
    assert torch.equal(found, torch.stack(expected, dim=1))


def test_cats_refuses_a_prompt_in_chunks():
    _, theirs = load("llama-tied")
    caprese.attach(theirs, "cats")
    with pytest.raises(ValueError, match="whole prompt"):
        generate(theirs, prompt(theirs), prefill_chunk_size=4)


@pytest.mark.parametrize("name", FAMILIES)
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
    for module in (theirs, theirs.model):
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_what_would_score_the_full_model_is_refused(pair):
    _, theirs = pair
    tokens = prompt(theirs)
    for call in (lambda: theirs(tokens), lambda: generate(theirs, tokens, use_cache=False)):
        with pytest.raises(ValueError, match="teacher_forced"):
            call()
    cache = transformers.DynamicCache(config=theirs.config)
    with caprese.phase(theirs, "full"):
        theirs(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="filled this KV cache itself"):
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


def test_mlps_with_biases_are_refused():
    config = transformers.LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24,
                                      num_hidden_layers=2, num_attention_heads=2, mlp_bias=True)
    with pytest.raises(ValueError, match="biases"):
        caprese.attach(transformers.LlamaForCausalLM(config))


def test_a_failed_call_leaves_the_model_full(pair):
    _, theirs = pair
    tokens = prompt(theirs)
    cache = transformers.DynamicCache(config=theirs.config)
    with pytest.raises(IndexError):
        theirs(tokens + theirs.config.vocab_size, past_key_values=cache)
    shared = next(iter(caprese.sparse_layers(theirs).values())).phase
    assert shared.name == "full" and shared.mask is None


def test_after_a_failed_selection_nothing_decodes_with_the_prompt_before(pair, monkeypatch):
    _, theirs = pair
    tokens = prompt(theirs)
    good = transformers.DynamicCache(config=theirs.config)
    theirs(tokens, past_key_values=good)
    failed = transformers.DynamicCache(config=theirs.config)
    monkeypatch.setattr(caprese, "select", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        theirs(tokens, past_key_values=failed)
    shared = next(iter(caprese.sparse_layers(theirs).values())).phase
    assert shared.name == "full"
    for cache in (good, failed):
        with pytest.raises(ValueError, match="must have filled this KV cache itself"):
            theirs(tokens[:, :1], past_key_values=cache)
    monkeypatch.undo()
    fresh = transformers.DynamicCache(config=theirs.config)
    theirs(tokens, past_key_values=fresh)
    with pytest.raises(ValueError):  # a refused call leaves the good cache usable
        theirs(tokens[:, :1], past_key_values=good)
    theirs(tokens[:, :1], past_key_values=fresh)
