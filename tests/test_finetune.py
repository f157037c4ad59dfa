"""models/: fine-tuning and its word problems. Run: python -m pytest tests/test_finetune.py"""

import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import caprese
import data
import sample
from model import Transformer

ROOT = Path(__file__).resolve().parents[1]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "models" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finetune():
    return load_script("finetune")


@pytest.fixture(scope="module")
def word_problems():
    return load_script("word_problems")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    script.main()


# ---- word problems

def test_every_story_states_a_right_chain_of_thought(word_problems):
    rng = random.Random(0)
    for _ in range(500):
        row = word_problems.make_story(rng)
        result = None
        for left, op, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["answer"]):
            assert eval(f"{left} {op} {right}") == int(result) > 0
        assert data.correct(row["answer"], result)
        assert not re.search(r"[{}]", row["question"] + row["answer"])


def test_no_held_out_problem_is_in_a_training_file(word_problems, tmp_path, monkeypatch):
    files = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    run(word_problems, monkeypatch, "--out", files[0], "--stories", 30, "--running", 30)
    run(word_problems, monkeypatch, "--out", files[1], "--running", 20, "--held-out")
    train, held_out = (data.read_problems(file) for file in files)
    assert len(train) == 60 and len(held_out) == 20
    assert all(data.held_out(problem.question) for problem in held_out)
    running = [p for p in train if "#### " in p.response.split("\n")[0]]
    assert len(running) == 30 and not any(data.held_out(p.question) for p in running)


def test_questions_on_passages_name_what_their_passage_says(word_problems, tmp_path, monkeypatch):
    files = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    flags = "--running", 0, "--stories", 0, "--reading", 30
    run(word_problems, monkeypatch, "--out", files[0], *flags)
    run(word_problems, monkeypatch, "--out", files[1], *flags, "--held-out")
    train, held_out = (data.read_problems(file) for file in files)
    assert len(train) == len(held_out) == 30
    assert not {p.question for p in train} & {p.question for p in held_out}
    for problem in train + held_out:
        assert problem.kind == "passage" and problem.answer in problem.response
        passage, _, rest = problem.question.partition("\n\nQuestion: ")
        assert problem.answer in passage and problem.answer not in rest


# ---- fine-tuning

@pytest.fixture
def samples(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(8)]
    return write(tmp_path / "train.jsonl", rows)


def flags(samples, out):
    return ["--model", sample.BUNDLED, "--dtype", "bfloat16", "--data", samples, "--device", "cpu",
            "--out", out, "--batch-size", 3, "--micro-batch", 2, "--lr", 1e-3, "--save-every", 1]


@pytest.mark.slow
def test_the_folder_is_a_model_that_has_learned(finetune, samples, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model"
    run(finetune, monkeypatch, *flags(samples, out), "--epochs", 6)
    report = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    content = (out / "model.safetensors").read_bytes()
    assert report["sha256"] == hashlib.sha256(content).hexdigest()
    tokenizer = data.Tokenizer(out)
    question = data.ask(data.Problem("3 + 1?\n" + data.BOXED["maths"], "", "4"))
    prompt = torch.tensor([tokenizer.prompt_ids(question)])
    new = [tokenizer.encode("It is 4.\n\\boxed{4}") + [tokenizer.stop_ids[0]]]
    tokens = torch.cat([prompt, torch.tensor(new)], dim=1)
    losses = []
    for folder in (sample.BUNDLED, out):
        logits = Transformer.from_pretrained(folder, dtype=torch.float32)(tokens)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        losses.append(loss[prompt.shape[1] - 1:].mean())
    assert losses[1] < 0.5 * losses[0]
    assert not list(tmp_path.glob("*.state"))


def interrupt(finetune, monkeypatch, *words):
    """Fine-tune, and be told to stop after one step or two of three."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return backward(*args)

    backward = finetune.backward
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(finetune, patch, *words)


@pytest.mark.parametrize("more", [(), ("--resume",)], ids=["same-command", "resume"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_weights(finetune, samples, tmp_path,
                                                                   monkeypatch, capsys, more):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(finetune, monkeypatch, *flags(samples, whole))
    interrupt(finetune, monkeypatch, *flags(samples, parts))
    capsys.readouterr()
    run(finetune, monkeypatch, *flags(samples, parts), *more)
    assert re.search("fine-tuning, step [12];", capsys.readouterr().out)  # by the batches' order
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.state"))


def test_an_interrupted_run_does_not_go_on_with_something_else(finetune, samples, tmp_path,
                                                               monkeypatch, capsys):
    words = flags(samples, tmp_path / "model")
    with pytest.raises(ValueError, match="nothing to resume"):
        run(finetune, monkeypatch, *words, "--resume")
    interrupt(finetune, monkeypatch, *words)
    for changed, message in ((("--lr", 1e-4), "lr"), (("--epochs", 2), "epochs"),
                             (("--samples", 6), "training samples")):
        with pytest.raises(ValueError, match=f"another {message};.*--fresh"):
            run(finetune, monkeypatch, *words, *changed)
    run(finetune, monkeypatch, *words, "--samples", 6, "--fresh")
    assert "Going on" not in capsys.readouterr().out.rpartition("Fine-tuning")[0]
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("spelling", ["plain", "relative", "link", "data"])
def test_an_output_that_is_an_input_is_refused_at_the_start(finetune, samples, tmp_path,
                                                            monkeypatch, spelling):
    folder = tmp_path / "model"
    shutil.copytree(sample.BUNDLED, folder)
    (tmp_path / "link").symlink_to(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    out = {"plain": folder, "relative": "./model/../model", "link": "link", "data": samples}
    words = [*flags(samples, out[spelling]), "--model", folder]
    with pytest.raises(ValueError, match="would overwrite the input"):
        run(finetune, monkeypatch, *words)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not list(tmp_path.glob("*.state"))


@pytest.mark.parametrize("lr", ["nan", "inf", "-inf", "0", "-0.1"])
def test_a_learning_rate_that_is_none_is_refused_at_the_start(finetune, samples, tmp_path,
                                                              monkeypatch, lr):
    with pytest.raises(ValueError, match="--lr is .* above 0"):
        run(finetune, monkeypatch, *flags(samples, tmp_path / "model"), f"--lr={lr}")
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize("kind", ["file", "broken link", "model", "weights"])
def test_an_output_that_is_not_free_is_refused_at_the_start(finetune, samples, tmp_path,
                                                            monkeypatch, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("keep")
    elif kind == "broken link":
        out.symlink_to("nowhere")
    elif kind == "model":
        shutil.copytree(sample.BUNDLED, out)
    else:
        out.mkdir()
        (out / "pytorch_model.bin").write_text("keep")
    contents = {file.name: file.read_bytes() for file in out.glob("*")}
    for more in ((), ("--fresh",)):
        with pytest.raises(ValueError, match="give (another --out|a new folder)"):
            run(finetune, monkeypatch, *flags(samples, out), *more)
    assert {file.name: file.read_bytes() for file in out.glob("*")} == contents
    assert kind != "file" or out.read_text() == "keep"
    assert not list(tmp_path.glob("*.state"))


def test_a_run_that_was_killed_while_it_wrote_its_folder_goes_on(finetune, samples, tmp_path,
                                                                 monkeypatch):
    """Its state is there, so the folder is its own. Without the state nobody knows."""
    out, words = tmp_path / "model", flags(samples, tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save_file", lambda *args, **settings: open("/dev/full/x"))
        with pytest.raises(OSError, match=f"cannot write {out}"):
            run(finetune, patch, *words)
    assert (out / "config.json").exists() and not (out / "model.safetensors").exists()
    with pytest.raises(ValueError, match="another lr"):
        run(finetune, monkeypatch, *words, "--lr", 1e-4)
    run(finetune, monkeypatch, *words)
    with pytest.raises(ValueError, match="give a new folder"):
        run(finetune, monkeypatch, *words)


def test_the_weights_have_ordinary_permissions(finetune, tmp_path):
    model, before = sample.Transformer.from_pretrained(sample.BUNDLED), os.umask(0o027)
    try:
        finetune.save(model, sample.BUNDLED, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert modes == {0o640}


@pytest.mark.slow
def test_the_bundled_model_is_the_default(finetune, samples, tmp_path, monkeypatch):
    for name, words in (("default", flags(samples, tmp_path / "default")[2:]),
                        ("named", flags(samples, tmp_path / "named"))):
        run(finetune, monkeypatch, *words, "--samples", 3)
    contents = [(tmp_path / name / "model.safetensors").read_bytes()
                for name in ("default", "named")]
    assert contents[0] == contents[1]


def test_a_step_that_is_no_number_ends_the_run_and_keeps_the_last_state(finetune, samples, tmp_path,
                                                                        monkeypatch):
    backward, calls = finetune.backward, []

    def damaged(model, *args):
        calls.append(args)
        loss = backward(model, *args)
        if len(calls) == 3:  # in the second step
            model.model.norm.weight.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(finetune, "backward", damaged)
    with pytest.raises(ValueError, match="inf or NaN in torch.bfloat16"):
        run(finetune, monkeypatch, *flags(samples, tmp_path / "model"))
    tensors, about = caprese.load_tensors(tmp_path / "model.state")
    assert about["step"] == 1 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_evaluation_problems_are_left_out(finetune, samples, tmp_path, capsys):
    exclude = write(tmp_path / "test.jsonl", [{"question": "3  +1 ?", "answer": "4"}])
    args = SimpleNamespace(data=[samples], samples=None, exclude=[exclude], max_tokens=512)
    tokenizer = data.Tokenizer(sample.BUNDLED)
    found = finetune.read_samples(args, tokenizer)
    assert len(found) == 7 and "3 + 1?" in capsys.readouterr().out
    assert all(response[-1] == tokenizer.stop_ids[0] for _, response in found)
    assert "\\boxed{1}" in tokenizer.decode(found[0][1])


def test_only_maths_asks_for_the_box(finetune, tmp_path):
    rows = [{"question": "Tom lives in Paris. Where does Tom live?", "answer": "Paris",
             "kind": "passage", "response": "Tom lives in Paris. #### Paris"},
            {"question": "3 + 1?", "answer": "4\n#### 4"}]
    file = write(tmp_path / "both.jsonl", rows)
    args = SimpleNamespace(data=[file], samples=None, exclude=[], max_tokens=512)
    tokenizer = data.Tokenizer(sample.BUNDLED)
    found = finetune.read_samples(args, tokenizer)
    passage, maths = (tokenizer.decode(prompt) for prompt, _ in found)
    assert ["boxed" in tokenizer.decode(response) for _, response in found] == [False, True]
    assert "boxed" not in passage and "step by step" not in passage
    assert data.BOXED["maths"] in maths and data.INSTRUCTION in maths
