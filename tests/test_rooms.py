"""The core needs no other room: python -m pytest tests/test_rooms.py"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ("model", "caprese", "data", "sample", "distill", "bench")
CORE_TESTS = ("loading", "caprese", "decode", "data", "sample")  # what may miss another room


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A copy of the project without beyond/ and paper/."""
    folder = tmp_path_factory.mktemp("alone") / "caprese"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        "beyond", "paper", ".git", ".venv", "runs", "*.state", "adapter*.safetensors",
        "__pycache__"))
    return folder


def run(folder, *words):
    """The stdout of a Python command in a folder that imports nothing from this one."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_core_learns_and_answers_alone(alone):
    out = run(alone, "distill.py", "--json", "--samples", "100", "--eval-samples", "20",
              "--device", "cpu")
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["full", "griffin", "+ layer-wise", "+ E2E"]
    assert rows[-1]["recovered"] > 0.5
    out = run(alone, "sample.py", "--json", "--adapter", "adapter.safetensors", "--device", "cpu")
    assert len(json.loads(out)["rows"]) == 3


@pytest.mark.slow
def test_the_cores_tests_pass_alone(alone):
    files = [f"tests/test_{name}.py" for name in CORE_TESTS]
    out = run(alone, "-m", "pytest", "-q", *files)
    assert " passed" in out


@pytest.mark.parametrize("name", CORE)
def test_imports_point_one_way(name):
    """{model, caprese, data} import none of the six; the other rooms are imported late."""
    may = {"sample": {"model", "caprese", "data"}}
    may["distill"] = may["sample"] | {"sample"}
    may["bench"] = may["distill"]
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    at_once = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            at_once |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            at_once.add(node.module.split(".")[0])
    ours = at_once & {*CORE, "beyond", "paper", "models"}
    assert ours <= may.get(name, set())


def test_no_script_stands_beside_the_six():
    assert {file.stem for file in ROOT.glob("*.py")} == set(CORE)
