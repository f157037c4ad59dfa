"""Chat templates, special tokens, stop ids. Run: python -m pytest tests/test_prompts.py"""

import json
import sys
from pathlib import Path

import pytest

import data
from data import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
CASES = {case["name"]: case for case in json.loads((FIXTURES / "prompts.json").read_text(encoding="utf-8"))["cases"]}
USER = [{"role": "user", "content": "hello"}]


def make(folder, tokenizer_config=None, **files):
    """A Tokenizer of the fixture's vocabulary with the given files beside it; a dictionary is written as JSON."""
    tokenizer = json.loads((FIXTURES / "tokenizer.json").read_text(encoding="utf-8"))
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config or {}} | files
    for name, content in files.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return Tokenizer(folder)


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_those_of_transformers(tmp_path, name):
    """The same string and the same ids: a bos neither lost nor doubled, whether template or tokenizer writes it."""
    case = CASES[name]
    tokenizer = json.loads((FIXTURES / "tokenizer.json").read_text(encoding="utf-8"))
    made = make(tmp_path, case["tokenizer_config"], **{
        "tokenizer.json": tokenizer | {"post_processor": case["post_processor"]},
        "chat_template.jinja": case["chat_template.jinja"]})
    for chat in case["chats"]:
        assert made.prompt(chat["question"]) == chat["prompt"]
        assert made.prompt_ids(chat["question"]) == chat["ids"]


def test_the_cases_are_what_they_should_be():
    """Guards the fixtures: the templates differ, and the two base models differ in the bos alone."""
    first = {name: case["chats"][0] for name, case in CASES.items()}
    assert len({first[n]["prompt"] for n in ("llama3", "qwen2.5", "gemma2", "deepseek-r1")}) == 4
    assert first["base with bos"]["ids"][1:] == first["base without bos"]["ids"]
    assert first["gemma2"]["ids"].count(first["gemma2"]["ids"][0]) == 1


@pytest.mark.parametrize("template", [
    "{{ messages.__class__ }}", "{{ messages.__class__.__mro__ }}", "{{ ''|attr('__class__') }}",
    "{{ messages.append(1) }}", "{% set _ = messages[0].update({'role': 'system'}) %}", "{{ messages.clear() }}",
    "{{ cycler.__init__.__globals__ }}", "{{ raise_exception.__globals__ }}",
])
def test_forbidden_templates_are_refused(tmp_path, template):
    tokenizer = make(tmp_path, {"chat_template": template})
    with pytest.raises(ValueError, match="^the chat template is refused: access to [^\n]* unsafe[^\n]*$"):
        tokenizer.prompt("hello")


@pytest.mark.parametrize("template, says", [
    ("{{ raise_exception('No such role\nhere') }}", "No such role here"),
    ("{% for m in messages %}", "Unexpected end of template"),
    ("{% include 'secrets' %}", "no loader"),
    ("{{ range(10**9)|list }}", "Range too big"),
    ("{{ messages[0].role + 1 }}", "str"),
    ("{{ nothing.at_all }}", "'nothing' is undefined"),
])
def test_failing_templates_end_in_one_line(tmp_path, template, says):
    with pytest.raises(ValueError, match="^the chat template fails: [^\n]*$") as e:
        make(tmp_path, {"chat_template": template}).prompt("hello")
    assert says in str(e.value)


def test_mutation_leaves_the_conversation_alone():
    messages = [dict(m) for m in USER]
    with pytest.raises(ValueError, match="refused"):
        data.render("{{ messages.pop() }}", messages=messages)
    assert messages == USER


def test_no_jinja2(tmp_path, monkeypatch):
    tokenizer = make(tmp_path, {"chat_template": "{{ messages[0].content }} never seen before"})
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.ext", None)
    with pytest.raises(ValueError, match="^[^\n]*pip install jinja2[^\n]*$"):
        tokenizer.prompt("hello")


@pytest.mark.parametrize("generation, config, stops", [
    ({"eos_token_id": 5}, {"eos_token_id": 7}, (5,)),
    ({"eos_token_id": [5, 6]}, {}, (5, 6)),
    ({"eos_token_id": 0}, {"eos_token_id": 7}, (0,)),
    ({"temperature": 0.6}, {"eos_token_id": 7}, (7,)),
    ({"eos_token_id": None}, {"eos_token_id": [7, 8]}, (7, 8)),
    (None, {"eos_token_id": 7}, (7,)),
    (None, None, ()),
])
def test_stop_ids(tmp_path, generation, config, stops):
    assert make(tmp_path, **{"generation_config.json": generation, "config.json": config}).stop_ids == stops


def test_special_tokens_map_fills_in(tmp_path):
    """Older repos name the special tokens in a file of their own."""
    tokenizer = make(tmp_path, {"chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}", "pad_token": None},
                     **{"special_tokens_map.json": {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}})
    assert tokenizer.prompt("hello") == "<bos>|<eos>|"


def test_merges_as_strings_or_pairs(tmp_path):
    tokenizer = json.loads((FIXTURES / "tokenizer.json").read_text(encoding="utf-8"))
    merges = tokenizer["model"]["merges"]
    assert isinstance(merges[0], list)
    text = CASES["llama3"]["chats"][1]["prompt"]
    pairs = make(tmp_path).encode(text)
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]
    strings = make(tmp_path, **{"tokenizer.json": tokenizer})
    assert strings.encode(text) == pairs and len(pairs) < len(text)
    assert strings.decode(strings.encode("a plain text")) == "a plain text"


def test_training_time_truncation_and_padding_are_off(tmp_path):
    """A tokenizer.json may keep the settings of the run that it was saved in."""
    tokenizer = json.loads((FIXTURES / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "<eos>"}
    made = make(tmp_path, **{"tokenizer.json": tokenizer})
    assert made.encode("a somewhat longer text") == make(tmp_path / "..").encode("a somewhat longer text")
