"""What a file or folder is that the core refuses.

Run: python -m pytest tests/test_foreign_files.py
"""

import gzip
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import save_file

import data
from beyond.foreign_files import explain
from data import Tokenizer
from model import Transformer, resolve
from test_data import read_fails

FIXTURES = Path(__file__).parent / "fixtures"
SHARD = "model-00002-of-00003.safetensors"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345678\n"


def failure(path, error=ValueError, load=Transformer.from_pretrained):
    """The one line that loading ends in."""
    with pytest.raises(error) as e:
        load(path)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- models

@pytest.mark.parametrize("model, name", [
    ("r1-distill-llama", "model.safetensors"), ("r1-distill-llama", "config.json"),
    ("llama-bias", SHARD), ("llama-bias", "model.safetensors.index.json"),
])
def test_a_git_lfs_pointer(tmp_path, model, name):
    folder = shutil.copytree(FIXTURES / model, tmp_path / "model")
    (folder / name).write_text(POINTER)
    says = failure(folder)
    assert says.startswith(str(folder / name))
    assert "it is only a Git LFS pointer: run `git lfs pull` in its folder" in says


def test_a_git_lfs_pointer_in_place_of_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(POINTER)
    says = failure(tmp_path, load=Tokenizer)
    assert says.startswith(str(tmp_path / "tokenizer.json")) and "`git lfs pull`" in says


@pytest.mark.parametrize("names", [["tokenizer.model"], ["vocab.json", "merges.txt"],
                                   ["vocab.txt"], ["tekken.json"], ["spiece.model"]])
def test_a_tokenizer_of_another_form(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"\n\x0e")
    says = failure(tmp_path, OSError, Tokenizer)
    assert says.startswith(f"{tmp_path / 'tokenizer.json'} is not there; {' and '.join(names)} ")
    assert "transformers" in says and "save_pretrained() writes tokenizer.json" in says


def test_no_tokenizer_at_all(tmp_path, monkeypatch):
    absent = f"{tmp_path / 'tokenizer.json'} is not there; fetch it"
    assert failure(tmp_path, OSError, Tokenizer) == absent
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    monkeypatch.setitem(sys.modules, "beyond.foreign_files", None)  # its import fails
    assert failure(tmp_path, OSError, Tokenizer) == absent


@pytest.mark.parametrize("text", ["# A title, or two\n", "Read me first\n"])
def test_a_text_in_place_of_a_model(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    says = failure(tmp_path / "README.md", OSError, resolve)
    assert "a model is a folder with config.json and model*.safetensors" in says


@pytest.mark.parametrize("content, words", [
    (b"<!DOCTYPE html><html>", "download it again"), (b"GGUF\3\0\0\0", "made from"),
    (b"PK\x03\x04" + bytes(60), "save_pretrained()"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "save_pretrained()"),
])
def test_weights_of_another_format(tmp_path, content, words):
    folder = shutil.copytree(FIXTURES / "r1-distill-llama", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    says = failure(folder)
    assert str(folder / "model.safetensors") in says and words in says


def test_nothing_is_said_of_a_safetensors_file_or_of_none(tmp_path):
    """Its first bytes are the length of its header, whatever that begins like."""
    for length in range(1, 200):
        save_file({}, tmp_path / "a.safetensors", {"a": "x" * length})
        assert explain(tmp_path / "a.safetensors") == ""
    assert explain(tmp_path / "absent") == explain(tmp_path / "absent.safetensors") == ""


@pytest.mark.parametrize("files, says", [
    (["adapter_config.json", "adapter_model.safetensors"], ["PEFT adapter", "merge_and_unload()"]),
    (["adapter_config.json", "config.json", "model.safetensors"], ["PEFT adapter"]),
    (["config.json", "tiny-q4_k_m.gguf"], ["GGUF", "made from"]),
    (["tiny.gguf"], ["GGUF", "made from"]),
    (["config.json", "pytorch_model.bin"], ["pickle", "save_pretrained()"]),
    (["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
     ["pickle", "save_pretrained()"]),
    (["params.json", "consolidated.00.pth", "tokenizer.model"], ["pickle", "save_pretrained()"]),
    (["config.json", "model.pt"], ["pickle", "save_pretrained()"]),
    (["config.json", "consolidated.safetensors"], ["model*.safetensors is not there"]),
    (["config.json", "tokenizer.json"], ["model*.safetensors is not there"]),
    (["tokenizer.model"], ["model*.safetensors is not there"]),
    (["model.safetensors"], ["config.json is not there"]),
    ([], ["model*.safetensors is not there"]),
])
@pytest.mark.parametrize("load", [Transformer.from_pretrained, resolve])
def test_a_folder_of_another_kind_is_named(tmp_path, files, says, load):
    for name in files:
        (tmp_path / name).write_text("{}")
    line = failure(tmp_path, OSError, load)
    assert str(tmp_path) in line and all(words in line for words in says)


@pytest.mark.parametrize("name", ["absent.gguf", "tiny.Q4_K_M.gguf", "TINY.GGUF"])
def test_a_gguf_file(tmp_path, name):
    if name != "absent.gguf":
        (tmp_path / name).write_bytes(b"GGUF")
    assert "is a GGUF file, which is not read" in failure(tmp_path / name, OSError, resolve)


def test_a_gguf_file_is_not_looked_up_on_the_hub(monkeypatch, tmp_path):
    """Its relative path may look like owner/name."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file, which is not read" in failure("models/tiny.gguf", OSError, resolve)


def test_a_repo_of_another_kind_is_named(monkeypatch, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert "PEFT adapter" in failure("someone/lora", OSError, resolve)


# ---- data sets

@pytest.mark.parametrize("content, says", [
    (b"PAR1\x15\x04\x15\x80\xff\xfe" + b"\0" * 30 + b"PAR1", ("Parquet", "read_parquet")),
    (b"ARROW1\0\0\xff\xff", ("Arrow", "read_feather")),
    (b"\xff\xff\xff\xff\x10\0", ("Arrow", "from_file")),
    (gzip.compress(b'{"question": "q"}'), ("gzip", "gunzip")),
    (b"BZh91AY&SY", ("bzip2", "bunzip2")), (b"\xfd7zXZ\0", ("xz", "unxz")),
    (b"\x28\xb5\x2f\xfd\x04", ("zstd", "unzstd")),
    (b"PK\x03\x04\x14\0", ("ZIP", "unpack", "read_excel")),
    ('{"question": "q"}'.encode("utf-16"), ("UTF-16", "iconv -f UTF-16")),
    (b"\xfe\xff" + '{"question": "q"}'.encode("utf-16-be"), ("UTF-16", "iconv -f UTF-16")),
    ('{"question": "q"}'.encode("utf-16-le"), ("UTF-16", "binary")),
    (b"question,answer\n1 + 1?,2\n", ("CSV with the columns question,answer", "read_csv")),
    (b"question\tanswer\n1 + 1?\t2\n", ("CSV", "read_csv")),
    ('"question";"answer"\n'.encode("utf-8-sig"), ("CSV", "read_csv")),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("Git LFS", "git lfs pull")),
    (b"<!DOCTYPE html>\n<html>", ("HTML", "download it again")),
    (b"\x80\x04\x95\x10", ("pickle", "not loaded")), (b"SQLite format 3\0", ("SQLite",)),
    ('{"prompt": "caf\xe9"}'.encode("latin-1"), ("byte 16 is not UTF-8", "iconv")),
    (b"- question: q\n", ("begins with '- question: q'", "one JSON object per line")),
    (b"hello", ("begins with 'hello'", "one JSON object per line")),
])
def test_another_format_is_named_and_how_to_convert_it(tmp_path, content, says):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    for text in says + (str(file),):
        read_fails(file, text, False)


def test_nothing_is_said_of_json_that_is_damaged(tmp_path):
    file = tmp_path / "a.jsonl"
    for text in ('{"question": "q", "answer": "1"}\n{"question": ', '[{"question": ', "\n {"):
        file.write_text(text)
        assert explain(file) == ""
        read_fails(file, "is not valid JSON (", False)


@pytest.mark.parametrize("content", [b"PAR1\xff", b"question,answer\n1,2\n", b"hello", b"\x80\x04"])
def test_without_this_file_another_format_is_refused_too(tmp_path, monkeypatch, content):
    monkeypatch.setitem(sys.modules, "beyond.foreign_files", None)  # its import fails
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    refused = "a.jsonl.* is (no text in UTF-8|not valid JSON)[^\n]*; [^\n]*$"
    with pytest.raises(ValueError, match=refused):
        data.read_problems(file)
