"""Chat templates, special tokens, decoding. Run: python -m pytest tests/test_prompts.py"""

import json
import sys
from pathlib import Path

import pytest

from data import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = json.loads((FIXTURES / "prompts.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in PROMPTS["cases"]}


def make(folder, tokenizer_config=None, **files):
    """A Tokenizer of the fixture's vocabulary and the given files; dictionaries become JSON."""
    tokenizer = json.loads((FIXTURES / "tokenizer.json").read_text(encoding="utf-8"))
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config or {}} | files
    for name, content in files.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return Tokenizer(folder)


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_those_of_transformers(tmp_path, name):
    """The same string and the same ids: a bos is neither lost nor doubled, whoever writes it."""
    case = CASES[name]
    tokenizer = json.loads((FIXTURES / "tokenizer.json").read_text(encoding="utf-8"))
    made = make(tmp_path, case["tokenizer_config"], **{
        "tokenizer.json": tokenizer | {"post_processor": case["post_processor"]},
        "chat_template.jinja": case["chat_template.jinja"]})
    for chat in case["chats"]:
        assert made.prompt(chat["question"]) == chat["prompt"]
        assert made.prompt_ids(chat["question"]) == chat["ids"]


def test_the_cases_are_what_they_should_be():
    """Guards the fixtures: the templates differ, the two base models differ in the bos alone."""
    first = {name: case["chats"][0] for name, case in CASES.items()}
    assert len({first[n]["prompt"] for n in ("llama3", "qwen2.5", "gemma2", "deepseek-r1")}) == 4
    assert first["base with bos"]["ids"][1:] == first["base without bos"]["ids"]
    assert first["gemma2"]["ids"].count(first["gemma2"]["ids"][0]) == 1


@pytest.mark.parametrize("template", [
    "{{ messages.__class__.__mro__ }}", "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__self__.sleep(0) }}",
    "{{ messages.append(1) }}",
    "{{ messages.pop() }}",
    "{% set _ = messages[0].update({'role': 'system'}) %}",
    "{{ messages.clear() }}",
    "{{ cycler.__init__.__globals__ }}",
])
def test_forbidden_templates_are_refused(tmp_path, template):
    tokenizer = make(tmp_path, {"chat_template": template})
    refused = "^the chat template fails: access to [^\n]* unsafe[^\n]*$"
    with pytest.raises(ValueError, match=refused):
        tokenizer.prompt("hello")


@pytest.mark.parametrize("template", [
    "{{ messages.__class__ }}", "{{ ''|attr('__class__') }}", "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
])
def test_forbidden_attributes_are_not_shown(tmp_path, template):
    """jinja2's sandbox prints them as it prints what is undefined."""
    assert make(tmp_path, {"chat_template": template}).prompt("hello") == ""


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


def test_no_jinja2(tmp_path, monkeypatch):
    tokenizer = make(tmp_path, {"chat_template": "{{ messages[0].content }} never seen before"})
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(ValueError, match="^the chat template fails: [^\n]*jinja2[^\n]*$"):
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
    files = {"generation_config.json": generation, "config.json": config}
    assert make(tmp_path, **files).stop_ids == stops


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("stop", [[None], {}, "x", [2, "x"], [[2]], True, 2.5])
def test_a_stop_id_that_is_no_id_is_one_line(tmp_path, name, stop):
    with pytest.raises(ValueError, match=f"^[^\n]*eos_token_id of [^\n]*{name}[^\n]*not the id"):
        make(tmp_path, **{name: {"eos_token_id": stop}})


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "unk_token"])
@pytest.mark.parametrize("token", [{"x": 1}, {"content": None}, {"content": 5}, 5, ["<s>"], False])
def test_a_special_token_that_is_no_text_is_one_line(tmp_path, name, token):
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / file).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"^[^\n]*{name} of [^\n]*{file}[^\n]*, not text$"):
            make(tmp_path, **{"tokenizer_config.json": {}, file: {name: token}})


def test_special_tokens_map_fills_in(tmp_path):
    """Older repos name the special tokens in a file of their own."""
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"
    special = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}
    tokenizer = make(tmp_path, {"chat_template": template, "pad_token": None},
                     **{"special_tokens_map.json": special})
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
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst",
                               "stride": 0}
    tokenizer["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "<eos>", "pad_to_multiple_of": None}
    made = make(tmp_path, **{"tokenizer.json": tokenizer})
    (tmp_path / "plain").mkdir()
    text = "a somewhat longer text"
    assert made.encode(text) == make(tmp_path / "plain").encode(text)


@pytest.mark.parametrize("templates, prompt", [
    ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ([{"name": "default", "template": "d"}], "d"), ("s", "s"), (None, "hello"),
])
def test_the_default_of_several_templates(tmp_path, templates, prompt):
    assert make(tmp_path, {"chat_template": templates}).prompt("hello") == prompt


@pytest.mark.parametrize("names", [["tool_use", "rag"], ["Default"], []])
def test_several_templates_without_a_default_are_named(tmp_path, names):
    """Not silently asked without any template."""
    templates = [{"name": name, "template": "t"} for name in names]
    with pytest.raises(ValueError, match="^[^\n]*none named default; write [^\n]*[.]jinja$") as e:
        make(tmp_path, {"chat_template": templates})
    assert all(name in str(e.value) for name in names)
    assert make(tmp_path, {"chat_template": templates},
                **{"chat_template.jinja": "j"}).prompt("hello") == "j"


@pytest.mark.parametrize("template", [5, {"default": "d"}, ["d"], [{"template": "d"}],
                                      [{"name": "default"}], [{"name": 3, "template": "d"}]])
def test_a_template_that_is_no_text_is_one_line(tmp_path, template):
    with pytest.raises(ValueError, match="^[^\n]*chat[^\n]template[^\n]*$"):
        make(tmp_path, {"chat_template": template}).prompt("hello")


def with_bytes(folder):
    """sentencepiece's way, as Llama 2 and Gemma have it: each byte is a token, <0x00> to <0xFF>."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "\u2581b", "c"]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": [],
             "byte_fallback": True, "unk_token": "<unk>"}
    decoders = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}]
    content = {"version": "1.0", "added_tokens": [], "model": model,
               "decoder": {"type": "Sequence", "decoders": decoders}}
    return make(folder, **{"tokenizer.json": content}), {t: i for i, t in enumerate(tokens)}


@pytest.mark.parametrize("tokens, text", [
    (["\u2581a", "<0xE4>", "<0xBD>", "<0xA0>", "c"], " a\u4f60c"),            # whole
    (["\u2581a", "<0xE4>", "<0xBD>", "c"], " a\ufffd\ufffdc"),               # cut short
    (["\u2581a", "<0x0A>", "<0xF0>", "<0x9F>", "c"], " a\ufffd\ufffd\ufffdc"),
    (["<0xFF>", "\u2581b"], "\ufffd b"), (["<0x80>"], "\ufffd"), ([], ""),
])
def test_bytes_that_are_no_character_are_replaced(tmp_path, tokens, text):
    tokenizer, ids = with_bytes(tmp_path)
    assert tokenizer.decode([ids[token] for token in tokens]) == text


def test_tokens_that_the_tokenizer_does_not_have_are_replaced(tmp_path):
    """An embedding often has more rows than its tokenizer has tokens."""
    tokenizer, ids = with_bytes(tmp_path)
    a, b, beyond = ids["\u2581a"], ids["\u2581b"], max(ids.values()) + 1
    assert tokenizer.decode([a, beyond, b]) == " a\ufffd b"
    assert tokenizer.decode([beyond, beyond + 99]) == "\ufffd\ufffd"
    assert tokenizer.decode((a, b)) == " a b"


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_a_lone_surrogate_ends_in_one_line(tmp_path, template):
    """JSON can hold "\\ud800", which is no character and which no tokenizer knows."""
    tokenizer = make(tmp_path, {"chat_template": template})
    for encode in (tokenizer.prompt_ids, tokenizer.encode):
        with pytest.raises(ValueError, match="^character 3 is half of a surrogate pair[^\n]*$"):
            encode(json.loads('"a \\ud800 b"'))


@pytest.mark.parametrize("text, place", [("a \udcc3\udca9", 3), ("\udc80", 1), ("\udcff", 1)])
def test_a_command_line_in_another_encoding_ends_in_one_line(tmp_path, text, place):
    """Python keeps bytes that it cannot decode as U+DC80 to U+DCFF: no half of a pair is meant."""
    refused = f"^character {place} is not valid UTF-8; set PYTHONUTF8=1, [^\n]*encoding[^\n]*$"
    with pytest.raises(ValueError, match=refused):
        make(tmp_path).encode(text)
    for half in ("\udc7f", "\udd00", "\udfff"):
        with pytest.raises(ValueError, match="is half of a surrogate pair"):
            Tokenizer(tmp_path).encode(half)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "config.json",
                                  "generation_config.json", "special_tokens_map.json"])
def test_a_file_that_is_no_utf_8_is_named(tmp_path, name):
    make(tmp_path)
    (tmp_path / name).write_bytes('{"a": "caf\xe9"}'.encode("latin-1"))
    refused = f"^[^\n]*{name} is no text in UTF-8 \\(byte 11\\); [^\n]*$"
    with pytest.raises(ValueError, match=refused):
        Tokenizer(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    make(tmp_path, {"chat_template": "a"})
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        text = '{"chat_template": "a"}' if name.endswith("n") else "b"
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert Tokenizer(tmp_path).prompt("hello") == "b"


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_configuration_that_is_no_object_is_named(tmp_path, text):
    with pytest.raises(ValueError, match="tokenizer_config.json is not (valid JSON|a JSON object)"):
        make(tmp_path, **{"tokenizer_config.json": text})
