"""Weights and hub ids: what loads, what it costs, what each failure says.

Run: python -m pytest tests/test_loading.py
"""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from data import Tokenizer
from model import Config, Transformer, read_json, resolve

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SHARD = "model-00002-of-00003.safetensors"
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in one file, to be spoilt."""
    return Path(shutil.copytree(FIXTURES / "r1-distill-llama", tmp_path / "single"))


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in three files and an index, to be spoilt."""
    return Path(shutil.copytree(FIXTURES / "llama-bias", tmp_path / "sharded"))


def failure(path, error=ValueError, load=Transformer.from_pretrained):
    """The one line that loading ends in."""
    with pytest.raises(error) as e:
        load(path)
    assert "\n" not in str(e.value)
    return str(e.value)


def rewrite(file, change):
    """Load a safetensors file, let `change` spoil its tensors, and write it again."""
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(state)
    save_file(state, file)


@pytest.mark.parametrize("name", ["r1-distill-llama", "llama-bias", "gemma2"])
def test_every_tensor_arrives(name):
    """Single-file, sharded, tied: the official names, the file's values and dtype, none twice."""
    on_disk = {}
    for file in (FIXTURES / name).glob("model*.safetensors"):
        on_disk |= load_file(file)
    model = Transformer.from_pretrained(FIXTURES / name)
    state = model.state_dict()
    assert state.keys() == on_disk.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, on_disk[key]) and tensor.dtype == torch.bfloat16
    assert hasattr(model, "lm_head") == (name != "gemma2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(folder, dtype):
    model = Transformer.from_pretrained(str(folder), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} == {model.dtype}
    assert model(torch.tensor([[1, 2, 3]])).dtype == dtype


def test_changing_the_weights_leaves_the_file_alone(folder):
    """On the CPU in its own dtype the model is a view of the file, but a private one."""
    before = (folder / "model.safetensors").read_bytes()
    Transformer.from_pretrained(folder).model.embed_tokens.weight.fill_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_what_follows_from_the_rest_is_passed_over(tmp_path):
    """Some converters store a tied head as well, and old ones the rotary table."""
    folder = shutil.copytree(FIXTURES / "llama-tied", tmp_path / "tied")

    def add(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    rewrite(folder / "model.safetensors", add)
    expected = load_file(folder / "expected.safetensors")
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model(expected["tokens"]), expected["logits"], rtol=0, atol=1e-4)
    assert "lm_head.weight" not in model.state_dict()


def tied_head(folder, change):
    """Store change(embedding) as lm_head.weight beside the embedding."""
    def add(state):
        state["lm_head.weight"] = change(state["model.embed_tokens.weight"])
    rewrite(folder / "model.safetensors", add)


@pytest.fixture
def tied(tmp_path):
    return Path(shutil.copytree(FIXTURES / "llama-tied", tmp_path / "tied"))


def same_as_stored(folder):
    """The model of a folder gives the logits that its fixture had, in float32."""
    expected = load_file(folder / "expected.safetensors")
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model(expected["tokens"]), expected["logits"], rtol=0, atol=1e-4)
    return model


@pytest.mark.parametrize("name", ["llama-tied", "qwen2.5", "qwen3", "gemma2-uncapped"])
def test_a_tied_model_under_the_heads_name_alone(tmp_path, name):
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / "tied"))

    def rename(state):
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    rewrite(folder / "model.safetensors", rename)
    model = same_as_stored(folder)
    assert model.config.tie_word_embeddings and "lm_head.weight" not in model.state_dict()


@pytest.mark.parametrize("change", [
    lambda embedding: -embedding, lambda embedding: embedding + 2 ** -6,
    lambda embedding: torch.cat((embedding[:-1], 1 - embedding[-1:]))])
def test_a_head_that_differs_from_the_tied_embedding_is_used(tied, change):
    """As in transformers: what is stored counts, whatever config.json says."""
    tied_head(tied, change)
    model = Transformer.from_pretrained(tied, dtype=torch.float32)
    state = load_file(tied / "model.safetensors")
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"].float())
    assert torch.equal(model.model.embed_tokens.weight, state["model.embed_tokens.weight"].float())
    tokens = torch.arange(8)[None]
    hidden_states = model.model(tokens)
    expected = hidden_states @ state["lm_head.weight"].float().T
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert not model.config.tie_word_embeddings


def test_a_head_of_another_shape_is_refused(tied):
    tied_head(tied, lambda embedding: embedding[:-1].clone())
    says = failure(tied)
    assert "lm_head.weight" in says and "[71, 24]" in says and "[72, 24]" in says


# ---- which files are read

def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def spoilt(state):
    """Weights of the same names and shapes with other values."""
    return {name: -tensor for name, tensor in state.items()}


def stale_shards(folder):
    """Shards of an older save, in other numbers."""
    state = spoilt(load_file(FIXTURES / "llama-bias" / SHARD))
    for name in ("model-00001-of-00002", "model-00002-of-00002"):
        save_file(state, folder / f"{name}.safetensors")


def stale_single(folder):
    save_file(spoilt(load_file(FIXTURES / "llama-bias" / SHARD)), folder / "model.safetensors")


def stale_variant(folder):
    for file in sorted(FIXTURES.glob("llama-bias/model-*.safetensors")):
        name = file.name.replace("model-", "model.fp16-")
        save_file(spoilt(load_file(file)), folder / name)


def damaged_neighbour(folder):
    (folder / "model-extra.safetensors").write_bytes(b"cut")


@pytest.mark.parametrize("add", [stale_shards, stale_single, stale_variant, damaged_neighbour])
def test_what_the_index_does_not_name_is_not_read(sharded, add):
    add(sharded)
    same_as_stored(sharded)


def test_the_index_names_files_whatever_they_are_called(sharded):
    weight_map = {}
    for i, file in enumerate(sorted(sharded.glob("model-*.safetensors"))):
        weight_map |= dict.fromkeys(load_file(file), f"part{i}.safetensors")
        file.rename(sharded / f"part{i}.safetensors")
    write_index(sharded, weight_map)
    same_as_stored(sharded)


def test_a_tied_head_alone_in_shards(tied):
    state = load_file(tied / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tied / file)
    (tied / "model.safetensors").unlink()
    write_index(tied, {name: file for file, part in parts.items() for name in part})
    same_as_stored(tied)


@pytest.mark.parametrize("variant", ["model.fp16.safetensors", "model.bf16.safetensors",
                                     "model.fp16-00001-of-00001.safetensors", "model2.safetensors",
                                     "model-00001-of-00001.safetensors"])
def test_a_variant_beside_the_plain_file_is_not_read(folder, variant):
    save_file(spoilt(load_file(folder / "model.safetensors")), folder / variant)
    same_as_stored(folder)


def test_a_variant_alone_is_read(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    same_as_stored(folder)


def test_shards_without_an_index_are_read(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    same_as_stored(sharded)


@pytest.mark.parametrize("add", [stale_shards, stale_variant])
def test_files_that_do_not_belong_together_are_refused(sharded, add):
    (sharded / "model.safetensors.index.json").unlink()
    add(sharded)
    says = failure(sharded)
    assert "needs model.safetensors.index.json to say which" in says and SHARD in says


def test_a_tensor_in_two_files_is_refused(sharded):
    first = sharded / SHARD.replace("00002-of", "00001-of")
    name = next(iter(load_file(sharded / SHARD)))
    rewrite(first, lambda state: state.update({name: torch.ones(2)}))
    assert f"{sharded / SHARD}: {name} is in another file as well" in failure(sharded)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": null}', '{"weight_map": []}',
                                     '{"weight_map": "x"}', '{"weight_map": {"a": 3}}',
                                     '{"weight_map": {"a": ["b"]}}'])
def test_an_index_without_a_weight_map(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    says = failure(sharded)
    assert "model.safetensors.index.json has no weight_map" in says and "fetch it again" in says


@pytest.mark.parametrize("files", [
    ["adapter_config.json", "adapter_model.safetensors"],
    ["adapter_config.json", "config.json", "model.safetensors"],
    ["config.json", "tiny-q4_k_m.gguf"], ["config.json", "pytorch_model.bin"],
    ["config.json", "consolidated.safetensors"],
    ["config.json", "tokenizer.json"], ["tokenizer.model"], ["model.safetensors"], [],
])
@pytest.mark.parametrize("load", [Transformer.from_pretrained, resolve])
@pytest.mark.parametrize("alone", [False, True])
def test_a_folder_of_another_kind_is_refused(monkeypatch, tmp_path, files, load, alone):
    """Whether beyond/foreign_files.py is there or not, which says more of it."""
    if alone:
        monkeypatch.setitem(sys.modules, "beyond.foreign_files", None)  # its import fails
    for name in files:
        (tmp_path / name).write_text("{}")
    line = failure(tmp_path, OSError, load)
    assert line.startswith(f"{tmp_path} holds no readable model: ")
    if alone:
        assert "must hold config.json and model*.safetensors, and no adapter_config.json" in line


def test_other_weights_beside_the_safetensors_do_no_harm(folder):
    for name in ("pytorch_model.bin", "original.pth", "tiny.gguf", "training_args.bin"):
        (folder / name).touch()
    same_as_stored(folder)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("said", ["float64", "float32"])
def test_a_checkpoint_in_float64(folder, said, dtype):
    config = read_json(folder / "config.json") | {"torch_dtype": said}
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder / "model.safetensors",
            lambda state: state.update({name: t.double() for name, t in state.items()}))
    model = Transformer.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or getattr(torch, said)}
    expected = load_file(folder / "expected.safetensors")
    if dtype != torch.bfloat16:
        torch.testing.assert_close(model(expected["tokens"]).float(), expected["logits"], rtol=0,
                                   atol=1e-4)


# ---- what is missing or damaged

def test_missing_tensor(folder, sharded):
    rewrite(folder / "model.safetensors", lambda state: state.pop(NAME))
    says = failure(folder)
    assert f"{folder} does not fit its config.json: is a file missing" in says
    assert f'Missing key(s) in state_dict: "{NAME}"' in says
    names = set(load_file(sharded / SHARD))
    first = next(iter(load_file(sharded / SHARD)))

    def keep_first(state):
        for name in set(state) - {first}:
            del state[name]
    rewrite(sharded / SHARD, keep_first)
    says = failure(sharded)
    assert f"{sharded} does not fit its config.json" in says
    assert any(f'Missing key(s) in state_dict: "{name}"' in says for name in names - {first})


def test_a_missing_head(folder):
    rewrite(folder / "model.safetensors", lambda state: state.pop("lm_head.weight"))
    assert 'Missing key(s) in state_dict: "lm_head.weight"' in failure(folder)


@pytest.mark.parametrize("name, tensor, says", [
    ("model.layers.2.mlp.up_proj.weight", torch.ones(2), ["Unexpected key(s)", "config.json"]),
    (NAME, torch.ones(24, 32), ["size mismatch", "[24, 32]", "[32, 24]", "config.json"]),
    (NAME, torch.ones(32, 24, dtype=torch.int8), ["model.safetensors", "int8", "only weights in"]),
    (NAME, torch.ones(32, 24).to(torch.float8_e4m3fn), ["float8_e4m3fn", "only weights in"]),
    (NAME + "_scale", torch.ones(32, 1), ["Unexpected key(s)", "config.json"]),
])
def test_a_wrong_tensor_is_named(folder, name, tensor, says):
    rewrite(folder / "model.safetensors", lambda state: state.update({name: tensor}))
    line = failure(folder)
    assert all(words in line for words in [str(folder), name, *says])


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_shard(sharded, keep):
    """Cut before the header's length, within it, within the header, within the last tensor."""
    whole = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(whole[:keep])
    says = failure(sharded)
    assert SHARD in says and "cut off" in says and "fetch it again" in says


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"PK\x03\x04" + bytes(60)])
def test_a_file_of_another_format(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    says = failure(folder)
    assert str(folder / "model.safetensors") in says and "no safetensors file" in says


def test_a_missing_shard(sharded):
    (sharded / SHARD).unlink()
    says = failure(sharded)
    assert f"{sharded / SHARD} is absent" in says and "No such file" in says
    assert "fetch it again" in says


def test_a_missing_shard_without_an_index(sharded):
    lost = load_file(sharded / SHARD)
    (sharded / SHARD).unlink()
    (sharded / "model.safetensors.index.json").unlink()
    says = failure(sharded)
    assert any(f'Missing key(s) in state_dict: "{name}"' in says for name in lost)
    assert "is a file missing" in says


@pytest.mark.parametrize("text, says", [
    (b"{", "is not valid JSON (Expecting property name"), (b"", "is not valid JSON"),
    (b"<html>", "is not valid JSON"), (b"\xff", "is not text in UTF-8"),
    ('{"model_type": "llama"}'.encode("utf-16"), "is not text in UTF-8"),
    (b"[" * 100_000, "is not valid JSON"),
    (b"[]", "must be a JSON object"), (b"3", "must be a JSON object"),
    (b"null", "must be a JSON object")])
def test_bad_json(folder, text, says):
    (folder / "config.json").write_bytes(text)
    assert f"{folder / 'config.json'}" in failure(folder) and says in failure(folder)


def test_json_with_a_byte_order_mark(folder):
    """As editors on Windows save it."""
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    same_as_stored(folder)


def test_refused_config_names_the_folder(folder):
    config = read_json(folder / "config.json") | {"model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))
    assert str(folder) in failure(folder) and "'bert'" in failure(folder)


def test_tokenizer_files(folder):
    assert str(folder / "tokenizer.json") in failure(folder, FileNotFoundError, Tokenizer)
    (folder / "tokenizer.json").write_text("{}")
    assert str(folder / "tokenizer.json") in failure(folder, ValueError, Tokenizer)
    shutil.copy(FIXTURES / "tokenizer.json", folder)
    (folder / "generation_config.json").write_text("{")
    assert str(folder / "generation_config.json") in failure(folder, ValueError, Tokenizer)


# A process of its own, for its peak must be that of loading. VmHWM counts pages of the mapped file.
MEASURE = """
import json, sys, torch
from model import Transformer
def memory():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {k: int(status[k].split()[0]) * 1024 for k in ("VmHWM", "RssAnon")}
Transformer.from_pretrained(sys.argv[1], dtype=torch.float32)  # whatever a first load costs once
for dtype in ("bfloat16", "float32"):
    open("/proc/self/clear_refs", "w").write("5")              # VmHWM starts at the present size
    before = memory()
    model = Transformer.from_pretrained(sys.argv[2], dtype=getattr(torch, dtype))
    checksum = sum(p.sum().item() for p in model.parameters())  # every page is touched
    after = memory()
    seen = {key: after[key] - before[key] for key in after}
    print(json.dumps(seen | {"weights": sum(p.nbytes for p in model.parameters())}))
    del model
"""


def make_checkpoint(folder):
    """A tied checkpoint in bfloat16, all ones; returns its folder."""
    raw = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048,
           "num_hidden_layers": 8, "num_attention_heads": 8, "tie_word_embeddings": True,
           "torch_dtype": "bfloat16"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = {k: t.shape for k, t in Transformer(Config.from_dict(raw)).state_dict().items()}
    tensors = {k: torch.ones(shape, dtype=torch.bfloat16) for k, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK),
                    reason="peak memory is read from /proc (Linux)")
def test_peak_memory(tmp_path):
    """At most 1.15 times the weights.

    So there is no second copy, no file beside its cast, and no doubled tied head.
    """
    big = make_checkpoint(tmp_path / "big")
    done = subprocess.run([sys.executable, "-c", MEASURE, FIXTURES / "llama-tied", big], check=True,
                          capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    bfloat16, float32 = [json.loads(line) for line in done.stdout.splitlines()]
    for seen in (bfloat16, float32):
        assert seen["weights"] > 65e6
        assert seen["VmHWM"] <= 1.15 * seen["weights"], seen
    # A view of the file: the pages are the file's, shared with other processes.
    assert bfloat16["RssAnon"] <= 0.15 * bfloat16["weights"], bfloat16


# ---- hub ids

def make_cache(home):
    """A hub cache as huggingface_hub lays it out: refs, snapshots of links, blobs."""
    repo = home / "hub" / "models--someone--tiny-1.5B"
    snapshot = repo / "snapshots" / ("0" * 40)
    for part in (repo / "refs", repo / "blobs", snapshot):
        part.mkdir(parents=True)
    (repo / "refs" / "main").write_text(snapshot.name)
    for file in [*(FIXTURES / "llama-tied").iterdir(), FIXTURES / "tokenizer.json"]:
        shutil.copy(file, repo / "blobs" / f"blob-of-{file.name}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob-of-{file.name}"))


@pytest.mark.slow
def test_offline_cache(tmp_path):
    """Offline, a repo id comes from the local cache; one that is not there ends in one line."""
    make_cache(tmp_path)
    script = """
import data, model
loaded = model.Transformer.from_pretrained("someone/tiny-1.5B")
data.Tokenizer(model.resolve("someone/tiny-1.5B"))
print(loaded.config.vocab_size)
try:
    model.resolve("someone/absent")
except OSError as e:
    print(e)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True,
                          text=True, cwd=ROOT, env=env)
    lines = done.stdout.splitlines()
    assert lines[0] == "72" and len(lines) == 2
    assert lines[1].startswith("someone/absent is no folder here") and "HF_HUB_OFFLINE" in lines[1]


def hub(monkeypatch, answer):
    """Let snapshot_download raise or return `answer`; the calls it gets are collected."""
    calls = []

    def snapshot_download(*args, **kwargs):
        calls.append((args, kwargs))
        if isinstance(answer, Exception):
            raise answer
        return answer
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def without_response(error):
    """An error of huggingface_hub without the web response that its constructor wants."""
    return error.__new__(error)


@pytest.mark.parametrize("error, says", [
    (without_response(errors.GatedRepoError), "GatedRepoError"),
    (without_response(errors.RepositoryNotFoundError), "RepositoryNotFoundError"),
    (errors.LocalEntryNotFoundError("many\nlines"), "many"),
    (RuntimeError("a proxy said no\nand more"), "a proxy said no"),
])
def test_hub_errors(monkeypatch, error, says):
    """Whatever the hub's client raises, one line names it and says what to do."""
    hub(monkeypatch, error)
    line = failure("someone/model", OSError, resolve)
    assert line.startswith("someone/model is ") and says in line
    for advice in ("spelling", "network", "gated", "hf auth login"):
        assert advice in line


def test_no_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "huggingface_hub" in failure("someone/model", OSError, resolve)


def test_only_what_is_needed_is_fetched(monkeypatch, folder):
    calls = hub(monkeypatch, str(folder))
    assert resolve("Qwen/Qwen2.5-1.5B-Instruct") == folder
    (args, kwargs), = calls
    assert args == ("Qwen/Qwen2.5-1.5B-Instruct",)
    needed = ["config.json", "generation_config.json", "model.safetensors",
              "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json",
              "chat_template.jinja", "model.safetensors.index.json", "adapter_config.json"]
    others = ["pytorch_model.bin",
              "pytorch_model.bin.index.json", "consolidated.safetensors",
              "tokenizer.model", "original/consolidated.00.pth", "model.onnx", "modeling_custom.py",
              "README.md", "training_args.bin"]
    patterns = kwargs["allow_patterns"]
    for file in needed + others:
        assert any(fnmatch.fnmatch(file, p) for p in patterns) == (file in needed), file


@pytest.mark.parametrize("path", ["./absent", "../absent/model", "/absent/model", "~/absent/model",
                                  "a/b/c", "absent", Path("someone/model"), "someone/", ""])
def test_a_path_is_not_looked_up_on_the_hub(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    calls = hub(monkeypatch, str(tmp_path))
    if path == "":  # the current folder, which holds no model
        assert failure(path, FileNotFoundError).startswith(". holds no readable model")
    else:
        assert "is not a folder" in failure(path, FileNotFoundError, resolve)
    assert not calls


def test_a_file_is_not_a_folder(folder):
    assert "is not a folder" in failure(folder / "model.safetensors", OSError, resolve)


def test_a_folder_comes_before_the_hub(monkeypatch, tmp_path):
    shutil.copytree(FIXTURES / "llama-tied", tmp_path / "someone" / "model")
    monkeypatch.chdir(tmp_path)
    calls = hub(monkeypatch, "elsewhere")
    assert resolve("someone/model") == Path("someone/model")
    assert not calls
