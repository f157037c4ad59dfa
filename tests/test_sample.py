"""Decoding, sampling, the command line. Run: python -m pytest tests/test_sample.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import caprese
import data
import sample

ROOT = Path(__file__).resolve().parents[1]


def test_greedy_is_the_argmax_of_teacher_forced_logits():
    model, prompt = tiny.model(), tiny.tokens(2, 7)
    new = sample.generate(model, prompt, 10)
    logits = model(torch.cat([prompt, new], dim=1))[:, 6:-1]
    assert torch.equal(logits.argmax(-1), new)


def test_rows_of_different_lengths_decode_as_alone():
    model, prompts, lengths = tiny.model(), tiny.tokens(3, 9), torch.tensor([4, 9, 6])
    together = sample.generate(model, prompts, 12, prompt_lengths=lengths)
    for row, n in enumerate(lengths):
        assert torch.equal(together[row], sample.generate(model, prompts[row:row + 1, :n], 12)[0])


def test_a_row_repeats_its_stop_until_the_last_is_done():
    model, prompts = tiny.model(), tiny.tokens(3, 6)
    free = sample.generate(model, prompts, 20)
    stop = int(free[0, 3])
    new = sample.generate(model, prompts, 20, stop_ids=(stop,))
    for row in range(3):
        ids = data.until_stop(free[row].tolist(), (stop,))
        assert new[row].tolist() == ids + [stop] * (new.shape[1] - len(ids))
    assert sample.generate(model, prompts[:1], 20, stop_ids=(stop,)).shape[1] == free[0].tolist().index(stop) + 1


def test_generation_ends_at_the_context():
    model = tiny.model()  # context 128
    assert sample.generate(model, tiny.tokens(1, 120), 50).shape == (1, 8)
    with pytest.raises(ValueError, match="context"):
        sample.generate(model, tiny.tokens(1, 128), 1)


def test_samples_of_one_prompt_share_its_selection():
    model, prompt = tiny.model(), tiny.tokens(1, 7)
    caprese.attach(model, "griffin", 0.4)
    alone = sample.generate(model, prompt, 10)
    many = sample.generate(model, prompt, 10, samples=3)
    assert caprese.sparse_layers(model)[0].compact and torch.equal(many, alone.expand(3, -1))
    drawn = sample.generate(model, prompt, 10, samples=4, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    again = sample.generate(model, prompt, 10, samples=4, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("reselect", [None, 3])
@pytest.mark.parametrize("method", caprese.METHODS)
def test_samples_of_several_prompts_keep_their_own_selection(method, reselect):
    model, prompts, lengths = caprese.attach(tiny.model().double(), method, 0.4), tiny.tokens(2, 7), torch.tensor([7, 5])
    once = sample.generate(model, prompts, 8, prompt_lengths=lengths, reselect=reselect)
    twice = sample.generate(model, prompts, 8, prompt_lengths=lengths, reselect=reselect, samples=2)
    assert torch.equal(twice, once.repeat_interleave(2, dim=0))


def test_decoding_leaves_nothing_that_a_later_pass_cannot_change():
    """The buffers that generate() allocates are filled again outside of it, and trained against."""
    model, tokens = caprese.attach(tiny.model(), "griffin", 0.4, rank=4), tiny.tokens(1, 9)
    sample.generate(model, tokens[:, :5], 4)
    model.hidden(tokens, generated=False)
    caprese.select(model)
    model.hidden(tokens, generated=True)
    model(tokens, [5]).sum().backward()


def test_choose_follows_the_distribution_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20000, -1)
    draw = lambda **kw: torch.bincount(sample.choose(logits, generator=torch.Generator().manual_seed(0), **kw),
                                       minlength=4) / 20000
    # Three standard deviations of a share of 20,000 draws are at most 0.011.
    assert torch.allclose(draw(temperature=1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.011)
    assert torch.allclose(draw(temperature=1.0, top_p=0.8), torch.tensor([0.625, 0.375, 0, 0]), atol=0.011)
    assert draw(temperature=1.0, top_p=1e-9)[0] == 1 and draw(temperature=1e-3)[0] == 1
    sharp = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    assert torch.allclose(draw(temperature=0.5), sharp / sharp.sum(), atol=0.011)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0.0}, {"reselect": 0}, {"samples": 0},
                                 {"max_new_tokens": 0}])
def test_generate_refuses(bad):
    with pytest.raises(ValueError):
        sample.generate(tiny.model(), tiny.tokens(1, 5), **{"max_new_tokens": 4} | bad)


def run(*args):
    return subprocess.run([sys.executable, "sample.py", *args], cwd=ROOT, capture_output=True, text=True)


def test_command_answers_three_ways():
    done = run("--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [r["method"] for r in rows] == ["full", "sparse", "sparse + Caprese"]
    assert [r["correct"] for r in rows] == [True, False, True]
    assert all(r["tokens_per_second"] > 0 for r in rows)
    assert rows[0]["response"] in done.stderr  # what streamed is what is reported


def test_command_answers_a_prompt():
    question = "Please reason step by step. Tom has 12 apples. Tom buys 5 more. How many apples does Tom have?"
    done = run(question, "--json")
    assert json.loads(done.stdout)["rows"][0]["response"] == "12 + 5 = 17. #### 17"
    done = run(question, "--json", "--method", "cats", "--density", "0.9", "--reselect", "8", "-n", "3",
               "--temperature", "0.6", "--top-p", "0.95", "--seed", "3")
    assert len(json.loads(done.stdout)["rows"][0]["samples"]) == 3


@pytest.mark.parametrize("args, words", [
    (["x", "--method", "magic"], "magic"),
    (["x", "--density", "1.5"], "(0, 1]"),
    (["x", "--adapter", "none.safetensors"], "none.safetensors"),
    (["x", "--method", "cats", "--adapter", "models/tiny-math/griffin.safetensors"], "for griffin"),
    (["x", "--adapter", "models/tiny-math/model.safetensors"], "not a Caprese adapter"),
    (["long " * 600], "context"),
    (["x", "--device", "abacus"], "abacus"),
    (["x", "--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
    (["--model", "models/tiny-math"], "prompt"),
    (["x", "--temperature", "-1"], "temperature"),
])
def test_bad_input_is_one_line_and_exit_code_2(args, words):
    done = run(*args)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
