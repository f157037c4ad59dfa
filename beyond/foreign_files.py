"""Says of a file or a folder that the core cannot read what it is, and what to do about it.

model.py and data.py call explain() when they refuse one. Without this file their messages are
shorter.
"""

import re
from pathlib import Path

POINTER = ("it is only a Git LFS pointer: run `git lfs pull` in its folder, or fetch the file "
           "again")
GGUF = "is a GGUF file, which is not read: give the model that it was made from"
PICKLE = "is a pickle, which is not read: load it in transformers and save it by save_pretrained()"
PAGE = "it is an HTML or XML page, perhaps of a failed download; download it again"
PANDAS = "convert it with pandas: {}(FILE).to_json(NEW, orient='records', lines=True)"
UTF_16 = "it is UTF-16; convert it with iconv -f UTF-16 -t UTF-8 FILE > NEW"
LAYOUTS = {  # files of other models' folders, and what to say of them
    "adapter_config.json": "is of a PEFT adapter: in PEFT call merge_and_unload(), then "
                           "save_pretrained(), and give the folder that this writes",
    "*.gguf": GGUF, "pytorch_model*.bin": PICKLE, "*.pth": PICKLE, "*.pt": PICKLE,
}
TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
              "vocab.json", "merges.txt", "vocab.txt")  # older forms than tokenizer.json
# How a file begins. A safetensors file begins with any eight bytes, so only long marks count there.
WEIGHTS = {b"version https://git-": POINTER, b"GGUF": f"it {GGUF}", b"PK\x03\x04": f"it {PICKLE}",
           b"\x80\x02\x8a\n": f"it {PICKLE}", b"<!DOCTYPE": PAGE, b"<html": PAGE}
TEXTS = {
    b"version https://git-": POINTER,
    b"PAR1": "it is Parquet; " + PANDAS.format("read_parquet"),
    b"ARROW1": "it is Arrow; " + PANDAS.format("read_feather"),
    b"\xff\xff\xff\xff":
        "it is Arrow; load it with datasets.Dataset.from_file(FILE), then .to_json(NEW)",
    b"PK\x03\x04": "it is a ZIP archive, which you unpack, or a spreadsheet; "
                   + PANDAS.format("read_excel"),
    b"\x1f\x8b": "it is gzip; unpack it with gunzip",
    b"BZh": "it is bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "it is xz; unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "it is zstd; unpack it with unzstd",
    b"\xff\xfe": UTF_16, b"\xfe\xff": UTF_16,
    b"SQLite": "it is an SQLite data base; " + PANDAS.format("read_sql"),
    b"\x80": "it is a pickle, which is not loaded; write it as JSON lines where it was made",
    b"<": PAGE,
}


def explain(path):
    """One line on what is at a path that cannot be read, and what to do.

    It is "" if nothing is known: for a damaged file in the right format, or if there is no file.
    An absent tokenizer.json may have its words in another file of the folder.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return explain_folder(path)
    if path.suffix.lower() == ".gguf":
        return f"it {GGUF}"
    if not path.exists() and path.name == "tokenizer.json":
        return explain_tokenizer(path.parent)
    if not path.is_file():
        return ""
    content = path.read_bytes() if path.suffix != ".safetensors" else read_start(path)
    known = WEIGHTS if path.suffix == ".safetensors" else TEXTS
    for beginning, words in known.items():
        if content.startswith(beginning):
            return words
    return explain_text(content) if known is TEXTS else ""


def read_start(file):
    """The first bytes of a file that may be large."""
    with open(file, "rb") as opened:
        return opened.read(100)


def explain_folder(folder):
    """One line on a folder that is not a model in the official layout."""
    has_weights = bool([*folder.glob("model*.safetensors"),
                        *folder.glob("model.safetensors.index.json")])
    for pattern, words in LAYOUTS.items():
        for file in folder.glob(pattern):
            if pattern == "adapter_config.json" or not has_weights:
                return f"{file.name} {words}"
    return f"{'config.json' if has_weights else 'model*.safetensors'} is not there"


def explain_tokenizer(folder):
    """One line on a folder without tokenizer.json; "" if it holds no other tokenizer either."""
    others = " and ".join(name for name in TOKENIZERS if (folder / name).exists())
    if not others:
        return ""
    return (f"{others} is another form, which is not read: load the tokenizer in transformers by "
            "AutoTokenizer, and its save_pretrained() writes tokenizer.json")


def explain_text(content):
    """One line on the bytes of a file that is not JSON in UTF-8; "" if nothing is known."""
    if b"\0" in content[:1000]:
        return f"it is binary and begins with {content[:20]!r}, or it is UTF-16 or UTF-32"
    try:
        line = content.decode("utf-8-sig").strip().split("\n")[0].strip()
    except UnicodeDecodeError as error:
        return (f"byte {error.start + 1} is not UTF-8; if it is text, convert it with "
                "iconv -f LATIN1 -t UTF-8 FILE > NEW, or from what encoding it has")
    if line[:1] in ("", "[", "{"):
        return ""
    if re.search("[,;\t|]", line) and not line.startswith("#"):  # which a Markdown title does
        return f"it is CSV with the columns {line:.60}; " + PANDAS.format("read_csv")
    return (f"it begins with {line[:40]!r}; a data set is JSON, one JSON object per line, and a "
            "model is a folder with config.json and model*.safetensors")
