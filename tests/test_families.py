"""Every family against transformers' own numbers, stored in fixtures/.

Run: python -m pytest tests/test_families.py
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

import data
from model import Config, Transformer, read_json
from sample import generate

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = sorted(f.parent.name for f in FIXTURES.glob("*/expected.safetensors"))
CONFIGS = sorted(f"{f.parent.name}/{f.name}" for f in FIXTURES.glob("*/config*.json"))
SMOLLM2 = Path(os.environ.get("CAPRESE_SMOLLM2",
                              "~/.cache/caprese/SmolLM2-135M-Instruct")).expanduser()
# The same float32 products, added in another order by the fused attention, differ by up to 2e-5 at
# logits of size 10 to 25 (float32 has 2e-6 there). The smallest mistake, a window off by one in one
# layer, shows at 1e-2 or more: test_each_trait_matters. 1e-4 lies well between.
CLOSE = {"rtol": 0, "atol": 1e-4}


def load(name, device="cpu"):
    """A fixture's model in float32, and transformers' tokens, logits and greedy continuation."""
    model = Transformer.from_pretrained(FIXTURES / name, device, torch.float32)
    return model, load_file(FIXTURES / name / "expected.safetensors", device)


def test_all_families_have_fixtures():
    assert {read_json(FIXTURES / name / "config.json")["model_type"] for name in FAMILIES} == {
        "llama", "mistral", "qwen2", "qwen3", "gemma2"}
    for name in FAMILIES:
        with safe_open(FIXTURES / name / "expected.safetensors", "pt") as f:
            assert f.metadata()["transformers"]


@pytest.mark.parametrize("config", CONFIGS)
def test_logits(config, tmp_path, device):
    """Both styles of config.json, and every known trap, give the logits of transformers."""
    name, file = config.split("/")
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    shutil.copy(FIXTURES / name / file, tmp_path / "config.json")
    expected = load_file(tmp_path / "expected.safetensors", device)
    model = Transformer.from_pretrained(tmp_path, device, torch.float32)
    assert_close(model(expected["tokens"]), expected["logits"], **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_continuation(name, device):
    """24 tokens with the cache, past the windows."""
    model, expected = load(name, device)
    new = generate(model, expected["tokens"], expected["greedy"].shape[1])
    assert new.tolist() == expected["greedy"].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_decode_steps(name, device):
    """The same without sample.py: a prefill, then one decode step after the other."""
    model, expected = load(name, device)
    tokens, length = expected["tokens"], expected["greedy"].shape[1]
    cache = model.new_cache(len(tokens), tokens.shape[1] + length)
    logits = model.logits(model.model(tokens, cache)[:, -1])
    new = []
    for _ in range(length):
        new.append(logits.argmax(dim=-1))
        logits = model.decode(new[-1], cache)
    assert torch.stack(new, dim=1).tolist() == expected["greedy"].tolist()


@pytest.mark.parametrize("name, change", [
    ("mistral", {"windows": (7, 7)}), ("mistral", {"windows": (6, 5)}),
    ("qwen3", {"windows": (6, 6, 6)}), ("gemma2", {"windows": (None, 6, None)}),
    ("gemma2", {"attn_logit_softcapping": None}), ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": None}), ("gemma2", {"hidden_act": "silu"}),
    ("gemma2", {"scale_embeddings": False}), ("gemma2", {"norm_plus_one": False}),
    ("llama-tied", {"rope_scaling": None}), ("llama-tied", {"rope_theta": 10000.0}),
    ("llama-tied", {"rope_scaling": {"high_freq_factor": 2.0}}),
    ("llama-tied", {"rope_scaling": {"low_freq_factor": 2.0}}),
    ("llama-tied", {"rms_norm_eps": 1e-2}),
])
def test_each_trait_matters(name, change):
    """The fixtures can tell: without any one of these the logits are off far more than allowed."""
    model, expected = load(name)
    if change.get("rope_scaling"):
        change = {"rope_scaling": model.config.rope_scaling | change["rope_scaling"]}
    other = Transformer(replace(model.config, **change))
    other.load_state_dict(model.state_dict())
    assert (other(expected["tokens"]) - expected["logits"]).abs().max() > 100 * CLOSE["atol"]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_absent_keys_mean_what_they_mean_in_transformers(family):
    known = read_json(FIXTURES / "defaults.json")
    config = Config.from_dict({"model_type": family} | known["sizes"])
    for key, value in known["families"][family].items():
        assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_key_value_heads_as_heads_where_their_number_is_null(name):
    raw = read_json(FIXTURES / name / "config.json") | {"num_key_value_heads": None}
    config = Config.from_dict(raw)
    assert config.num_key_value_heads == config.num_attention_heads


def refused(change, name="llama-tied"):
    with pytest.raises(ValueError) as e:
        Config.from_dict(read_json(FIXTURES / name / "config.json") | change)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("change, says", [
    ({"model_type": "phi3"}, "'phi3'"),
    ({"model_type": None}, "model_type None"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
    ({"rope_scaling": None, "rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
    ({"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
     "per layer type"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "relu"}, "'relu'"),
    ({"torch_dtype": "float8_e4m3fn"}, "'float8_e4m3fn'"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"quantization": {"bits": 4, "group_size": 64}}, "quantization is not"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
    ({"hidden_size": None}, "'hidden_size'"),
    ({"vocab_size": "72"}, "vocab_size is '72'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": "two"}, "cannot be used"),
    ({"num_key_value_heads": 3}, "num_key_value_heads does not divide"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
])
def test_refused_by_name(change, says):
    assert says in refused(change)


def test_bidirectional_gemma_is_refused():
    assert "use_bidirectional_attention" in refused({"use_bidirectional_attention": True}, "gemma2")


def smollm2():
    if not (SMOLLM2 / "model.safetensors").exists():
        pytest.skip(f"no SmolLM2-135M-Instruct at {SMOLLM2}; set CAPRESE_SMOLLM2 to its folder")
    return Transformer.from_pretrained(SMOLLM2, dtype=torch.float32), data.Tokenizer(SMOLLM2)


def test_smollm2_knows_the_capital_of_france():
    model, tokenizer = smollm2()
    prompt = torch.tensor([tokenizer.prompt_ids("What is the capital of France?")])
    new = generate(model, prompt, 24, stop_ids=tokenizer.stop_ids)[0].tolist()
    assert "Paris" in tokenizer.decode(new)
    assert new[-1] in tokenizer.stop_ids


def test_smollm2_logits():
    """transformers' logits of six tokens after a paragraph, as fixtures/smollm2.json has them."""
    model, tokenizer = smollm2()
    known = json.loads((FIXTURES / "smollm2.json").read_text())
    ids = tokenizer.encode(known["text"])
    assert ids == known["ids"]
    last = model(torch.tensor([ids]))[0, -1]
    # 30 layers at logits of size 20: float32 sums in another order differ by a few 1e-5
    assert_close(last[torch.tensor(known["top"])], torch.tensor(known["logits"]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_keys_that_a_familys_own_code_ignores_change_nothing(family):
    """Only Qwen's reads these; Mistral's reads no attention_bias either."""
    raw = read_json(FIXTURES / ("llama-tied" if family == "llama" else family) / "config.json")
    expected = Config.from_dict(raw | {"sliding_window": 6})
    ignored = {"use_sliding_window": family == "llama", "max_window_layers": 1}
    if family == "mistral":
        ignored["attention_bias"] = True
    assert Config.from_dict(raw | {"sliding_window": 6} | ignored) == expected
