"""Weights and hub ids: what loads, its cost, what each failure says. Run: python -m pytest tests/test_loading.py"""

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
from huggingface_hub import constants, errors
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
    state = load_file(file)
    state = {k: v.clone() for k, v in state.items()}
    change(state)
    save_file(state, file)


@pytest.mark.parametrize("name", ["r1-distill-llama", "llama-bias", "gemma2"])
def test_every_tensor_arrives(name):
    """Single-file, sharded, tied: the official names, the file's own values and dtype; nothing twice."""
    on_disk = {}
    for file in (FIXTURES / name).glob("model*.safetensors"):
        on_disk |= load_file(file)
    model = Transformer.from_pretrained(FIXTURES / name)
    state = model.state_dict()
    assert state.keys() == on_disk.keys()
    assert all(torch.equal(state[k], on_disk[k]) and state[k].dtype == torch.bfloat16 for k in state)
    assert hasattr(model, "lm_head") == (name != "gemma2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(folder, dtype):
    model = Transformer.from_pretrained(str(folder), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} == {model.dtype}
    assert model(torch.tensor([[1, 2, 3]])).dtype == dtype


def test_changing_the_weights_leaves_the_file_alone(folder):
    """On the CPU in its own dtype the model is a view of the file, but a private one."""
    before = (folder / "model.safetensors").read_bytes()
    Transformer.from_pretrained(folder).model["embed_tokens"].weight.fill_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_what_follows_from_the_rest_is_passed_over(tmp_path):
    """Some converters store a tied head, and old ones the rotary table."""
    folder = shutil.copytree(FIXTURES / "llama-tied", tmp_path / "tied")
    rewrite(folder / "model.safetensors", lambda state: state.update({
        "lm_head.weight": state["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    expected = load_file(folder / "expected.safetensors")
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model(expected["tokens"]), expected["logits"], rtol=0, atol=1e-4)
    assert "lm_head.weight" not in model.state_dict()


def test_missing_tensor(folder, sharded):
    rewrite(folder / "model.safetensors", lambda state: state.pop(NAME))
    says = failure(folder)
    assert str(folder / "model.safetensors") in says and NAME in says and "more" not in says
    rewrite(sharded / SHARD, lambda state: [state.pop(k) for k in list(state)[1:]])
    assert "model.safetensors.index.json lacks the tensor" in failure(sharded) and "more" in failure(sharded)


def test_unexpected_tensor(sharded):
    rewrite(sharded / SHARD, lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}))
    says = failure(sharded)
    assert SHARD in says and "unexpected tensor model.layers.2.mlp.up_proj.weight" in says


def test_wrong_shape(folder):
    rewrite(folder / "model.safetensors", lambda state: state.update({NAME: torch.ones(24, 32)}))
    says = failure(folder)
    assert "model.safetensors" in says and NAME in says and "[24, 32]" in says and "[32, 24]" in says


def test_quantised_weights(folder):
    rewrite(folder / "model.safetensors", lambda state: state.update({NAME: torch.ones(32, 24, dtype=torch.int8)}))
    assert NAME in failure(folder) and "I8" in failure(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_shard(sharded, keep):
    """Cut before the header's length, within it, within the header, within the last tensor."""
    whole = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(whole[:keep])
    says = failure(sharded)
    assert SHARD in says and "incomplete" in says


def test_index_names_a_missing_file(sharded):
    (sharded / SHARD).unlink()
    says = failure(sharded, FileNotFoundError)
    assert SHARD in says and "model.safetensors.index.json names it" in says


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert "safetensors files only" in failure(folder, FileNotFoundError)


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert str(folder / "config.json") in failure(folder, FileNotFoundError)


@pytest.mark.parametrize("text, says", [("{", "not valid JSON"), ("\xff", "not valid JSON"), ("[]", "holds a list")])
def test_bad_json(folder, text, says):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert f"{folder / 'config.json'}" in failure(folder) and says in failure(folder)


def test_refused_config_names_the_folder(folder):
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | {"model_type": "bert"}))
    assert str(folder) in failure(folder) and "'bert'" in failure(folder)


def test_tokenizer_files(folder):
    assert str(folder / "tokenizer.json") in failure(folder, FileNotFoundError, Tokenizer)
    (folder / "tokenizer.json").write_text("{}")
    assert str(folder / "tokenizer.json") in failure(folder, ValueError, Tokenizer)
    shutil.copy(FIXTURES / "tokenizer.json", folder)
    (folder / "generation_config.json").write_text("{")
    assert str(folder / "generation_config.json") in failure(folder, ValueError, Tokenizer)


# A process of its own, for its peak must be that of loading. VmHWM counts pages of the mapped file as well.
MEASURE = """
import json, sys, time, torch
from model import Transformer, read_json
def memory():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {k: int(status[k].split()[0]) * 1024 for k in ("VmHWM", "RssAnon")}
Transformer.from_pretrained(sys.argv[1], dtype=torch.float32)  # whatever a first load costs once
open("/proc/self/clear_refs", "w").write("5")                  # sets VmHWM back to the present size
before, start = memory(), time.perf_counter()
model = Transformer.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
loaded, seconds = memory(), time.perf_counter() - start
checksum = sum(p.sum().item() for p in model.parameters())     # every page is touched
after = memory()
weights = sum(p.nbytes for p in model.parameters())
print(json.dumps({"weights": weights, "seconds": seconds, "load": loaded["VmHWM"] - before["VmHWM"],
                  "peak": after["VmHWM"] - before["VmHWM"], "anonymous": after["RssAnon"] - before["RssAnon"]}))
"""


def make_checkpoint(folder, **sizes):
    """A tied checkpoint in bfloat16, all ones; returns its folder."""
    raw = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048,
           "num_hidden_layers": 8, "num_attention_heads": 8, "tie_word_embeddings": True,
           "torch_dtype": "bfloat16"} | sizes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = {k: t.shape for k, t in Transformer(Config.from_dict(raw)).state_dict().items()}
    save_file({k: torch.ones(s, dtype=torch.bfloat16) for k, s in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from /proc (Linux)")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory(tmp_path, dtype):
    """At most 1.15 times the weights: neither a second copy, nor the file beside its cast, nor a doubled tied head."""
    big = make_checkpoint(tmp_path / "big")
    out = subprocess.run([sys.executable, "-c", MEASURE, FIXTURES / "llama-tied", big, dtype], check=True,
                         capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    seen = json.loads(out)
    assert seen["weights"] > 65e6
    assert seen["peak"] <= 1.15 * seen["weights"], seen
    if dtype == "bfloat16":  # a view of the file: the pages are the file's, shared with other processes
        assert seen["anonymous"] <= 0.15 * seen["weights"], seen


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


def test_offline_cache(tmp_path):
    """A repo id comes from the local cache when offline, and one that is not there ends in one line."""
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
    lines = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT,
                           env=env | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}).stdout.splitlines()
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


def bare(error):
    """An error of huggingface_hub without the web response that its constructor wants."""
    return error.__new__(error)


@pytest.mark.parametrize("error, says", [
    (bare(errors.GatedRepoError), "accept its terms at https://huggingface.co/someone/model"),
    (bare(errors.RepositoryNotFoundError), "check the spelling"),
    (errors.LocalEntryNotFoundError("many\nlines"), "check the network"),
    (RuntimeError("a proxy said no\nand more"), "a proxy said no"),
])
def test_hub_errors(monkeypatch, error, says):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub(monkeypatch, error)
    line = failure("someone/model", OSError, resolve)
    assert line.startswith("someone/model is ") and says in line


def test_no_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in failure("someone/model", OSError, resolve)


def test_only_what_is_needed_is_fetched(monkeypatch, tmp_path):
    calls = hub(monkeypatch, str(tmp_path))
    assert resolve("Qwen/Qwen2.5-1.5B-Instruct") == tmp_path
    (args, kwargs), = calls
    assert args == ("Qwen/Qwen2.5-1.5B-Instruct",)
    repo = ["config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors",
            "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "tokenizer.model",
            "original/consolidated.00.pth", "model.onnx", "modeling_custom.py", "README.md", "training_args.bin"]
    wanted = [f for f in repo if any(fnmatch.fnmatch(f, p) for p in kwargs["allow_patterns"])]
    assert wanted == repo[:8]


@pytest.mark.parametrize("path", ["./absent", "../absent/model", "/absent/model", "~/absent/model", "a/b/c", "absent",
                                  Path("someone/model"), "someone/", ""])
def test_a_path_is_not_looked_up_on_the_hub(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    calls = hub(monkeypatch, str(tmp_path))
    if path == "":  # the current folder, which holds no config
        assert "config.json" in failure(path, FileNotFoundError)
    else:
        assert "is not a folder" in failure(path, FileNotFoundError, resolve)
    assert not calls


def test_a_file_is_not_a_folder(folder):
    assert "is a file" in failure(folder / "model.safetensors", OSError, resolve)


def test_a_folder_comes_before_the_hub(monkeypatch, tmp_path):
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    calls = hub(monkeypatch, "elsewhere")
    assert resolve("someone/model") == Path("someone/model")
    assert not calls
