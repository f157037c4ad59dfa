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
    """Some converters store a tied head, and old ones the rotary table."""
    folder = shutil.copytree(FIXTURES / "llama-tied", tmp_path / "tied")

    def add(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    rewrite(folder / "model.safetensors", add)
    expected = load_file(folder / "expected.safetensors")
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model(expected["tokens"]), expected["logits"], rtol=0, atol=1e-4)
    assert "lm_head.weight" not in model.state_dict()


def test_missing_tensor(folder, sharded):
    rewrite(folder / "model.safetensors", lambda state: state.pop(NAME))
    says = failure(folder)
    assert str(folder) in says and f"lacks 1 tensors, {NAME} first" in says
    count = len(load_file(sharded / SHARD))
    first = next(iter(load_file(sharded / SHARD)))

    def keep_first(state):
        for name in set(state) - {first}:
            del state[name]
    rewrite(sharded / SHARD, keep_first)
    assert f"lacks {count - 1} tensors" in failure(sharded)


@pytest.mark.parametrize("name, tensor, says", [
    ("model.layers.2.mlp.up_proj.weight", torch.ones(2), ["unexpected tensor"]),
    (NAME, torch.ones(24, 32), ["float32 [24, 32]", "must be floats [32, 24]"]),
    (NAME, torch.ones(32, 24, dtype=torch.int8), ["int8 [32, 24]", "must be floats [32, 24]"]),
])
def test_a_wrong_tensor_is_named(folder, name, tensor, says):
    rewrite(folder / "model.safetensors", lambda state: state.update({name: tensor}))
    line = failure(folder)
    assert all(words in line for words in ["model.safetensors", name, *says])


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_shard(sharded, keep):
    """Cut before the header's length, within it, within the header, within the last tensor."""
    whole = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(whole[:keep])
    says = failure(sharded)
    assert SHARD in says and "damaged" in says


def test_a_missing_shard(sharded):
    """All model*.safetensors are read, whatever the index says; the first missing tensor tells."""
    lost = load_file(sharded / SHARD)
    (sharded / SHARD).unlink()
    says = failure(sharded)
    assert str(sharded) in says and f"lacks {len(lost)} tensors" in says
    assert any(f"{name} first; is a file missing?" in says for name in lost)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert "no model*.safetensors" in failure(folder, FileNotFoundError)


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert str(folder / "config.json") in failure(folder, FileNotFoundError)


@pytest.mark.parametrize("text, says", [
    (b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[]", "'list' object")])
def test_bad_json(folder, text, says):
    (folder / "config.json").write_bytes(text)
    assert f"{folder / 'config.json'}" in failure(folder) and says in failure(folder)


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


def test_only_what_is_needed_is_fetched(monkeypatch, tmp_path):
    calls = hub(monkeypatch, str(tmp_path))
    assert resolve("Qwen/Qwen2.5-1.5B-Instruct") == tmp_path
    (args, kwargs), = calls
    assert args == ("Qwen/Qwen2.5-1.5B-Instruct",)
    needed = ["config.json", "generation_config.json", "model.safetensors",
              "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json",
              "chat_template.jinja"]
    others = ["model.safetensors.index.json", "pytorch_model.bin",
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
    if path == "":  # the current folder, which holds no config
        assert "config.json" in failure(path, FileNotFoundError)
    else:
        assert "is not a folder" in failure(path, FileNotFoundError, resolve)
    assert not calls


def test_a_file_is_not_a_folder(folder):
    assert "is not a folder" in failure(folder / "model.safetensors", OSError, resolve)


def test_a_folder_comes_before_the_hub(monkeypatch, tmp_path):
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    calls = hub(monkeypatch, "elsewhere")
    assert resolve("someone/model") == Path("someone/model")
    assert not calls
