"""The README names what there is: python -m pytest tests/test_readme.py"""

import importlib
import inspect
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from paper.__main__ import SCRIPTS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ("model", "caprese", "data", "sample", "distill", "bench")


def section(title):
    """The text of a section."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(text):
    """The rows of the table in a text, lists of cells, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def code(text):
    """What stands between single backticks in a text."""
    return re.findall(r"`([^`\n]+)`", text)


def resolve(name):
    """The object of a dotted name such as caprese.SparseFF.fused or paper.lora.LoRAFF."""
    words = name.split(".")
    length = 2 if words[0] in ("paper", "beyond") else 1
    found = importlib.import_module(".".join(words[:length]))
    for word in words[length:]:
        found = getattr(found, word)
    return found


def equations(row):
    """The equation numbers in the first cell of a row of the map."""
    return [int(number) for number in re.findall(r"\((\d+)\)", row[0])]


def commands():
    """Every command of the README as its words, from blocks and from single backticks."""
    snippets = []
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        snippets += block.splitlines()
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    snippets += [snippet for snippet in code(prose) if " " in snippet]
    found = []
    for snippet in snippets:
        for part in snippet.split("&&"):
            words = shlex.split(part, comments=True)
            if any("python" in word or word == "torchrun" for word in words[:1]):
                found.append(words)
    return found


def script_and_flags(words):
    """(script, flags given to it) of a command; (None, []) if it runs no script of ours."""
    for i, word in enumerate(words):
        name = word.removesuffix(".py")
        is_file = word.endswith(".py") and name in MODULES
        is_module = i > 0 and words[i - 1] == "-m" and word.split(".")[0] in ("paper", "beyond")
        if is_file or is_module:
            flags = [flag.split("=")[0] for flag in words[i + 1:] if re.match(r"--?[a-z]", flag)]
            return name, flags
    return None, []


MAP = table(section("Read it in this order"))
NAMES = [name for row in MAP for name in code(row[1])]
COMMANDS = [words for words in commands() if script_and_flags(words)[0]]


@pytest.fixture
def flags_of(monkeypatch, capsys):
    """A function: the flags that --help lists for a script, or for one of its commands."""
    def flags_of(script, *command):
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "argv", [script, *command, "--help"])
        name = "paper.__main__" if script == "paper" else script
        with pytest.raises(SystemExit):
            importlib.import_module(name).main()
        lines = re.findall(r"^  (-.*)$", capsys.readouterr().out, re.MULTILINE)
        return {flag for line in lines for flag in re.findall(r"(?<![\w-])--?[a-z][\w-]*", line)}

    return flags_of


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_the_map_exists(name):
    resolve(name)


@pytest.mark.parametrize("number", range(1, 11))
def test_every_equation_stands_in_a_function_that_the_map_names_for_it(number):
    rows = [row for row in MAP if number in equations(row)]
    assert rows, f"the map lacks equation ({number})"
    for row in rows:
        sources = [inspect.getsource(resolve(name)) for name in code(row[1])]
        assert any(f"({number})" in source for source in sources), row[1]


def test_every_command_names_a_module():
    named = set(re.findall(r"-m ((?:paper|beyond)[.\w]*)", README))
    assert {"paper", "beyond.own_answers", "beyond.lossless", "beyond.peers"} <= named
    for name in named - {"paper"}:
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
    assert len(SCRIPTS) == 13


def test_the_equations_as_code_are_lines_of_the_code():
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
                 if "(10)" in block)
    lines = {line.strip() for line in (ROOT / "caprese.py").read_text().splitlines()}
    shown = [line for line in block.splitlines() if not line.startswith("#")]
    assert len(shown) == 8
    for line in shown:
        assert line in lines


def test_the_nine_lines_from_python_run(capsys):
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
                 if "sample.evaluate" in block)
    assert len([line for line in block.splitlines() if "import" not in line]) <= 9
    quick = block.replace("400", "40").replace("50,", "8,")
    assert quick != block
    exec(quick, {})
    accuracy, error = map(float, capsys.readouterr().out.strip("()\n").split(", "))
    assert 0 <= accuracy <= 1 and error > 0


def test_commands_are_found():
    """Without this the next test could pass because nothing is read."""
    found = {script_and_flags(words)[0] for words in COMMANDS}
    assert {"sample", "distill", "bench", "paper", "beyond.own_answers"} <= found
    assert any("--nproc_per_node=4" in words for words in COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_flag_of_a_command_exists(words, flags_of):
    script, flags = script_and_flags(words)
    if flags and script != "beyond.several_devices":  # which takes distill.py's, under torchrun
        command = words[3:4] if script == "beyond.in_transformers" else []
        assert set(flags) <= flags_of(script, *command)
    first = [word for word in words[1:] if word not in ("-m", script, f"{script}.py")][:1]
    takes_a_prompt = script.startswith(("sample", "beyond"))
    if not takes_a_prompt and first and words[0] != "torchrun":
        assert first[0].startswith("--")


@pytest.mark.parametrize("title, scripts", [
    ("Two commands", ["sample"]),
    ("Read it in this order", ["sample", "distill"]),
    ("Fork it", ["distill"]),
    ("Limits", ["sample"])])
def test_every_flag_that_stands_alone_exists(title, scripts, flags_of):
    """Such as `--paper`: it is a flag of the script that the section is about."""
    alone = {snippet.split()[0] for snippet in code(section(title)) if snippet.startswith("--")}
    assert alone <= set().union(*(flags_of(script) for script in scripts))


def test_every_choice_is_taken(monkeypatch):
    """Such as `--loss kl`, which distill.py must know."""
    distill = importlib.import_module("distill")
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL).replace("\n", " ")
    words = [snippet.split() for snippet in code(prose) if re.match(r"--\w+ \w", snippet)]
    assert ["--loss", "kl"] in words and ["--layerwise", "sequential"] in words
    mine = types.ModuleType("mine")
    mine.Mine = type("Mine", (importlib.import_module("caprese").GRIFFIN,), {})
    monkeypatch.setitem(sys.modules, "mine", mine)  # the reader's own file
    for given in words:
        distill.arguments(given)


def test_every_file_that_the_readme_names_exists():
    names = set(re.findall(r"(?<![\w/.])((?:\w+/)*\w+\.py)\b", README))
    names |= set(re.findall(r"\]\(([\w/.-]+\.(?:md|png|svg))\)", README))
    names |= {snippet for snippet in code(README) if re.fullmatch(r"(?:[\w-]+/)+", snippet)}
    names -= {"runs/", "mine.py"}  # made by the scripts, and by the reader
    assert {f"{name}.py" for name in MODULES} <= names
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_reading_order_names_what_there_is():
    module, checked = None, 0
    numbered = re.findall(r"^(?:\d\.|  ) .*$", section("Read it in this order"), re.MULTILINE)
    for snippet in code("\n".join(numbered)):
        if snippet.endswith(".py"):
            module = snippet.removesuffix(".py").replace("/", ".")
        elif re.fullmatch(r"\w+(\.\w+)*", snippet):
            resolve(f"{'caprese' if module.startswith('tests') else module}.{snippet}")
            checked += 1
    assert checked >= 12


def test_the_first_line_with_pytest_is_the_whole_test_command():
    """Continuous integration runs this line as it stands."""
    line = next(line for line in README.splitlines() if "pytest" in line)
    assert line.endswith(".venv/bin/python -m pytest -q")
    assert "pip install --retries 1 -r requirements.txt" in line
