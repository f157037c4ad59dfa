"""RESULTS.md says what paper/results.tsv holds: python -m pytest tests/test_results.py

RESULTS.md tells, under "Where the figures are", how a cell of its tables finds its row. A cell
agrees if a row with this model, method, set and metric has the same value and the same error, both
rounded to the decimals of the cell.
"""

import re
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
LINES = (ROOT / "paper" / "results.tsv").read_text(encoding="utf-8").splitlines()
COLUMNS = "commit date machine command model method set metric value error".split()
ROWS = [dict(zip(COLUMNS, line.split("\t"))) for line in LINES[1:]]
NUMBER = r"-?\d+(?:\.\d+)?"
CELL = re.compile(rf"({NUMBER})(?: ± ({NUMBER}))?(?: \[({NUMBER})\])?")
VERDICTS = {"holds", "holds in part", "not here", "not tried"}


def tables(text):
    """Every table of a text: a list of rows, the first one its headings, each a list of cells."""
    found, before = [], ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        before = line
    return [[rows[0], *rows[2:]] for rows in found]


def sections():
    """{model: text} of the sections whose title ends with a model in backticks."""
    parts = re.split(r"^## .*`(.+)`$|^## .*$", TEXT, flags=re.MULTILINE)
    return {model: text for model, text in zip(parts[1::2], parts[2::2]) if model}


def cells():
    """(model, method, set, metric, value, error) of every figure in the tables of the sections."""
    for model, text in sections().items():
        for headings, *rows in tables(text):
            for method, *row in rows:
                for heading, cell in zip(headings[1:], row, strict=True):
                    if cell:
                        yield from figures(model, headings[0], method, heading, cell)


def figures(model, first_heading, method, heading, cell):
    """The figures of one cell: its value with its error, and what stands in brackets."""
    what = heading
    if first_heading != "method":
        method, what = f"{method}, {heading}", first_heading
    name, _, metric = what.rpartition(", ")
    match = CELL.fullmatch(cell)
    assert match, f"{method}, {heading}: {cell!r} is not a figure"
    yield model, method, name, metric, match[1], match[2]
    if match[3]:
        yield model, method, name, "recovered %", match[3], None


def same(quoted, number):
    """Is a number of results.tsv the one that RESULTS.md quotes, to the decimals quoted?"""
    if not quoted or not number:
        return not quoted and not number
    decimals = len(quoted.partition(".")[2])
    return abs(float(number) - float(quoted)) <= 0.5 * 10 ** -decimals + 1e-9


def agrees(figure):
    """Has a row of results.tsv the same value and error as a figure of a table?"""
    *key, value, error = figure
    return any([row[name] for name in ("model", "method", "set", "metric")] == key
               and same(value, row["value"]) and same(error, row["error"]) for row in ROWS)


def quoted(text):
    """(value, error) of the figures in free text: those with an error or with decimals."""
    pairs = re.findall(rf"({NUMBER})(?: ± ({NUMBER}))?", text)
    return [(value, error) for value, error in pairs if error or "." in value]


def test_the_table_of_results_is_well_formed():
    assert LINES[0].split("\t") == COLUMNS
    assert len(ROWS) > 1000
    for line, row in zip(LINES[1:], ROWS):
        assert line.count("\t") == len(COLUMNS) - 1, line
        date.fromisoformat(row["date"])
        float(row["value"])
        assert float(row["error"] or 0) >= 0, line
        for column in ("commit", "machine", "command", "model", "metric"):
            assert row[column].strip(), f"{column} is missing: {line}"


def test_every_figure_of_the_tables_has_its_row():
    found = list(cells())
    assert len(found) >= 200
    assert [figure for figure in found if not agrees(figure)] == []


def test_figures_with_errors_in_the_prose_have_their_rows():
    found = [(model, value, error) for model, text in sections().items()
             for value, error in quoted(re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)) if error]
    assert len(found) >= 30
    assert [figure for figure in found if not any(
        row["model"] == figure[0] and same(figure[1], row["value"])
        and same(figure[2], row["error"]) for row in ROWS)] == []


@pytest.mark.parametrize("model", sections())
def test_a_wrong_figure_would_be_noticed(model):
    """Without this the test above could pass because it compares nothing."""
    for *key, value, error in [figure for figure in cells() if figure[0] == model][:20]:
        assert not agrees((*key, f"{float(value) + 1000:.2f}", error))
        assert not agrees((*key, value, "1000"))


def test_the_claims_have_verdicts_and_figures_of_their_model():
    headings, *claims = tables(TEXT)[0]
    assert headings == ["claim", "verdict", "the paper", "here", "model", "command"]
    assert len(claims) >= 15
    count = 0
    for claim, verdict, _, here, model, command in claims:
        assert verdict in VERDICTS, claim
        assert verdict == "not tried" or (here and model and command), claim
        rows = [row for row in ROWS if row["model"] == model]
        for value, error in quoted(here):
            count += 1
            assert any(same(value, row["value"]) and (not error or same(error, row["error"]))
                       for row in rows), f"{claim}: {value} ± {error}"
    assert count >= 25


def test_what_was_tried_has_its_rows():
    headings, *tried = tables(TEXT.split("\n## Tried and lost\n")[1])[0]
    count = 0
    for row in tried:
        for value, _ in quoted(" ".join(row)):
            count += 1
            assert any(same(value, other["value"]) for other in ROWS), f"{row[0]}: {value}"
    assert count >= 20


def test_results_is_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 150] == []


def test_every_picture_and_file_that_results_names_exists():
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert len(named) >= 5
    named += re.findall(r"`((?:paper|models|docs)/[\w./-]+)`", TEXT)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_script_that_the_claims_name_exists():
    for *_, command in tables(TEXT)[0][1:]:
        name = command.strip("`")
        if name:
            module = name.removeprefix("python -m ")
            file = name.split()[1] if name.endswith(".py") else f"{module.replace('.', '/')}.py"
            file = file if "/" in file or name.endswith(".py") else f"paper/{file}"
            assert (ROOT / file).is_file(), command
