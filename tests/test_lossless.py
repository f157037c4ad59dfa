"""The output is the full model's. Run: python -m pytest tests/test_lossless.py"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

import bench
import caprese
import data
import sample
from beyond import lossless

ROOT = Path(__file__).resolve().parents[1]


def full_model(**changes):
    """A random model in float64, where no two logits are ever as good as equal."""
    return tiny.model(**changes).double()


@pytest.fixture(autouse=True)
def long_drafts(monkeypatch):
    """Random models are never sure of a token; so that drafts are long they need not be."""
    monkeypatch.setattr(lossless, "SURE", 0.0)


def sparse(model, method="griffin", layers=None, rank=4):
    """A draft that is often wrong: few neurons, and a random correction where rank is above 0."""
    return tiny.fill(caprese.attach(model, method, 0.3, layers, rank))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("layers", [pytest.param(None, marks=pytest.mark.slow), "all"])
@pytest.mark.parametrize("method", ["griffin", "cats"])
@pytest.mark.parametrize("family", [
    family if family in ("llama", "gemma2") else pytest.param(family, marks=pytest.mark.slow)
    for family in tiny.VARIANTS])
def test_greedy_output_is_the_full_models(family, method, layers, rank):
    model = full_model(**tiny.VARIANTS[family])
    prompt = tiny.tokens(1, 7)
    expected = sample.generate(model, prompt, 30)
    sparse(model, method, layers, rank)
    drafted = sample.generate(model, prompt, 30)
    for rho in (1, 2, 5, 9):
        counts = Counter()
        found = lossless.generate(model, prompt, 30, rho, counts=counts)
        assert torch.equal(found, expected)
        assert counts["tokens"] == 29 == counts["passes"] + counts["accepted"]
        assert counts["accepted"] <= counts["drafted"] <= (rho - 1) * counts["passes"]
        if rho == 9 and not torch.equal(drafted, expected):
            assert counts["accepted"] < counts["drafted"]


@pytest.mark.parametrize("length", [
    1, pytest.param(5, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow), 126, 127])
def test_prompts_of_any_length_up_to_the_end_of_the_context(length):
    model = full_model()
    prompt = tiny.tokens(1, length)
    expected = sample.generate(model, prompt, 40)
    assert expected.shape[1] == min(40, 128 - length)
    sparse(model)
    for rho in range(1, 10):
        found = lossless.generate(model, prompt, 40, rho)
        assert torch.equal(found, expected)


def test_a_draft_ends_where_it_is_unsure(monkeypatch):
    model = full_model()
    prompt = tiny.tokens(1, 7)
    expected = sample.generate(model, prompt, 30)
    sparse(model)
    drafted = {}
    for sure in (0.0, 0.05, 1.0):
        monkeypatch.setattr(lossless, "SURE", sure)
        counts = Counter()
        found = lossless.generate(model, prompt, 30, 9, counts=counts)
        assert torch.equal(found, expected)
        drafted[sure] = counts["drafted"] / counts["passes"]
    assert drafted[1.0] <= 1 and drafted[1.0] < drafted[0.05] < drafted[0.0]


def test_the_answer_ends_where_the_full_models_does():
    """At a stop id that was drafted, that the pass has added, that comes first, or not at all."""
    model = full_model()
    prompt = tiny.tokens(1, 7)
    tokens = sample.generate(model, prompt, 30)[0].tolist()
    sparse(model)
    for end in {tokens.index(token) for token in tokens}:
        for rho in (2, 5):
            found = lossless.generate(model, prompt, 30, rho, stop_ids=(tokens[end],))
            assert found[0].tolist() == tokens[:end + 1]
    for limit in range(1, 12):
        found = lossless.generate(model, prompt, limit, 5)
        assert found[0].tolist() == tokens[:limit]


@pytest.mark.slow
def test_sampling_keeps_the_full_models_distribution(monkeypatch):
    """The first three tokens of 1,000 answers against their exact probabilities, by chi-square."""
    monkeypatch.setattr(lossless, "SURE", 0.38)  # drafts of two tokens, and some of one
    temperature, top_p, count = 0.7, 0.9, 1000
    model = tiny.model(vocab_size=5).double()
    prompt = tiny.tokens(1, 4) % 5
    expected = {}

    def extend(tokens, probability):
        if len(tokens) == 3:
            expected[tokens] = probability
            return
        text = torch.cat([prompt, torch.tensor([tokens], dtype=torch.long)], dim=1)
        p = sample.distribution(model(text)[:, -1], temperature, top_p)[0]
        for token in p.nonzero().flatten().tolist():
            extend((*tokens, token), probability * p[token].item())

    extend((), 1.0)
    assert sum(expected.values()) == pytest.approx(1)
    sparse(model, layers="all")
    generator, counts, seen = torch.Generator().manual_seed(0), Counter(), Counter()
    for _ in range(count):
        tokens = lossless.generate(model, prompt, 3, 3, temperature, top_p, generator=generator,
                                   counts=counts)
        seen[tuple(tokens[0].tolist())] += 1
    assert set(seen) <= set(expected)
    assert 0.1 < counts["accepted"] / counts["drafted"] < 0.9  # both branches are taken
    assert 1.05 * count < counts["passes"] < 1.95 * count  # after the first token, one or two
    likely = {key: p for key, p in expected.items() if p * count >= 5}
    rest = 1 - sum(likely.values())
    cells = [(seen[key], p * count) for key, p in likely.items()]
    cells.append((count - sum(n for n, _ in cells), max(rest * count, 1e-9)))
    chi_square = sum((n - e) ** 2 / e for n, e in cells if e >= 1)
    freedom = len(cells) - 1
    # Mean and variance of chi-square are k and 2 k: four standard deviations above the mean.
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_rejected_token_is_replaced_by_one_that_the_full_model_may_give():
    """Also where p and q differ by rounding alone, and (p - q)+ is zero everywhere."""
    generator, token = torch.Generator().manual_seed(0), torch.tensor([1])
    p = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 0.9, 0.1]])
    for _ in range(200):
        accepted, last = lossless.verify(p, [q], [token], generator)
        assert (accepted, last.item()) in ((1, 0), (0, 2))
    q = torch.tensor([[0.0, 0.9, 0.5]])  # as far off as rounding never is, so that it is rejected
    outcomes = {(n, last.item()) for n, last in (
        lossless.verify(p, [q], [token], generator) for _ in range(200))}
    assert outcomes == {(1, 0), (0, 1), (0, 2)}


# ---- only tokens that stand are counted

class OwnStatistic(caprese.GRIFFIN):
    """A fork whose statistic needs x, gate and z, and which does not merge as GRIFFIN does."""

    def statistic(self, x, gate, z, counted=None):
        weight = x.abs().sum(-1) if counted is None else x.abs().sum(-1) * counted
        return ((gate.abs() + z.square()) * weight[..., None]).sum(1)

    def merge(self, s, s_G):
        return s + s_G


@pytest.mark.parametrize("method", ["griffin", OwnStatistic])
@pytest.mark.parametrize("rho", [1, 2, 6])
def test_the_statistic_is_that_of_a_prefill_over_the_tokens_that_stand(rho, method):
    """They are the prompt and the answer but for its last token, which the next pass would run."""
    model, prompt, counts = full_model(), tiny.tokens(1, 7), Counter()
    sparse(model, method, "all")
    counted, lengths = [], (2, 6, 11, 17)

    def check(tokens):
        layers = list(caprese.sparse_layers(model).values())
        found = [(ff.s, ff.gate_k) for ff in layers]
        sample.prefill(model, tokens, 1, torch.tensor([tokens.shape[1]]))
        for ff, (s, gate_k) in zip(layers, found):
            torch.testing.assert_close(s, ff.s)  # float64: 1e-7 relative
            assert torch.equal(gate_k, ff.gate_k)
            if method == "griffin":  # each token that is counted adds a vector of length one
                assert s.square().sum().item() == pytest.approx(tokens.shape[1])
        counted.append(tokens.shape[1])

    for length in lengths:
        answer = lossless.generate(model, prompt, length, rho, counts=counts)
        check(torch.cat([prompt, answer[:, :-1]], dim=1))
    assert counted == [7 + length - 1 for length in lengths]
    if rho > 2:
        assert counts["drafted"] > counts["accepted"]  # some tokens did not stand


def test_the_statistic_holds_within_an_answer():
    model, prompt, counts = full_model(), tiny.tokens(1, 7), Counter()
    expected = sample.generate(model, prompt, 30)[0]
    ff = next(iter(caprese.sparse_layers(sparse(model)).values()))
    standing = 0
    for number, _ in enumerate(lossless.stream(model, prompt, 30, 6, counts=counts)):
        # A pass counts the token that it starts from and those accepted; one more it yields.
        standing = 7 + counts["passes"] + counts["accepted"]
        assert ff.s.square().sum().item() == pytest.approx(standing)
    assert standing == 7 + 29 and len(expected) == number + 1
    assert counts["drafted"] > counts["accepted"]


def test_the_hooks_of_a_pass_are_removed_even_if_it_fails():
    model = sparse(tiny.model())
    cache = model.new_cache(1, 2)
    with pytest.raises(ValueError, match="room for 2 tokens"):
        lossless.run_full(model, tiny.tokens(1, 9), cache)  # more than the cache holds
    lossless.generate(model, tiny.tokens(1, 5), 6, 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- what is refused

def test_one_row_at_a_time_and_a_method_to_draft_with():
    model = sparse(tiny.model())
    with pytest.raises(ValueError, match="one row"):
        lossless.generate(model, tiny.tokens(2, 5), 4, 4)
    with pytest.raises(ValueError, match="no sparse method"):
        lossless.generate(caprese.detach(model), tiny.tokens(1, 5), 4, 4)


@pytest.mark.parametrize("bad", [
    {"rho": 0}, {"rho": -1}, {"max_new_tokens": 0}, {"temperature": -1},
    {"temperature": float("nan")}, {"top_p": 0.0}, {"tokens": tiny.tokens(1, 128)}])
def test_settings_out_of_range(bad):
    good = {"tokens": tiny.tokens(1, 5), "max_new_tokens": 4, "rho": 4}
    with pytest.raises(ValueError):
        lossless.generate(sparse(tiny.model()), **good | bad)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("where", ["draft", "full"])
def test_logits_that_are_not_finite_are_one_line(where, temperature):
    model = sparse(tiny.model())
    steps = lossless.stream(model, tiny.tokens(1, 5), 20, 4, temperature)
    next(steps)  # the prefill has been right
    ff = caprese.sparse_layers(model)[0]
    broken = ff.down_k if where == "draft" else ff.up_proj.weight
    broken.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite in torch.float32.*bfloat16 or float32"):
        list(steps)


def test_the_model_stays_full_where_a_consumer_breaks_off():
    model = sparse(tiny.model())
    tokens = tiny.tokens(1, 9)
    expected = model(tokens)
    steps = lossless.stream(model, tokens, 20, 4)
    for _ in range(3):
        next(steps)
    assert torch.equal(model(tokens), expected)


@pytest.mark.slow
def test_in_bfloat16_only_ties_differ():
    """A pass over several tokens rounds otherwise than a step, so the best two may change places.

    Wherever the answers part, the full model's two logits are within bfloat16's rounding.
    """
    parted = 0
    for seed in range(8):
        model = tiny.model(seed=seed).bfloat16()
        prompt = tiny.tokens(1, 9, seed=seed)
        expected = sample.generate(model, prompt, 30)[0]
        sparse(model)
        found = lossless.generate(model, prompt, 30, 5)[0]
        caprese.detach(model)
        if not torch.equal(found, expected):
            at = int((found != expected).nonzero()[0])
            logits = model(torch.cat([prompt[0], expected[:at]])[None])[0, -1].float()
            gap = (logits[expected[at]] - logits[found[at]]).abs()
            assert gap <= 0.05 * logits.abs().max()  # a few of bfloat16's steps of 2^-8
            parted += 1
    assert parted < 8


# ---- bytes

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_bytes_are_those_of_the_weights_that_a_token_reads(method, tied):
    model = tiny.model(tie_word_embeddings=tied)
    full = sum(p.numel() for name, p in model.named_parameters()
               if tied or "embed_tokens" not in name)
    caprese.attach(model, method, 0.3, [1, 2], rank=4)
    # Of 80 neurons 24 are kept. CATS reads all of Wg.
    kept = 3 * 24 * 32 if method == "griffin" else (80 + 24 + 24) * 32
    step = full + 2 * (kept - 3 * 80 * 32 + 2 * 32 * 4)
    counts = Counter(passes=10, drafted=70, accepted=50, tokens=60)
    assert lossless.ratios(model, counts) == {
        "acceptance": 0.714, "tokens_per_pass": 6.0,
        "bytes_to_full": round((10 + 70 * step / full) / 60, 3)}
    assert lossless.ratios(model, Counter()) == {}


# ---- the command line

@pytest.fixture
def run(monkeypatch, capsys):
    """Call python -m beyond.lossless with these arguments: (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(lossless, "SURE", 0.9)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["lossless", "--device", "cpu", *map(str, args)])
        code = 0
        try:
            sample.run_command(lossless.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return call


def test_the_command_answers_as_the_full_model(run):
    model = sample.Transformer.from_pretrained(sample.BUNDLED, dtype=torch.float32)
    tokenizer = data.Tokenizer(sample.BUNDLED)
    rows = []
    for flags in (["--adapter", "models/tiny-math/griffin.safetensors"], ["--method", "griffin"],
                  ["--method", "cats"]):
        code, out, err = run("--json", "--reselect", "6", *flags, "--density", "0.3")
        assert code == 0, err
        row = json.loads(out)
        prompt = torch.tensor([tokenizer.prompt_ids(row["prompt"])])
        full = sample.generate(model, prompt, 512, stop_ids=tokenizer.stop_ids)[0].tolist()
        assert row["response"] == tokenizer.decode(full) and row["tokens"] == len(full)
        assert f"{row['response']}\n" in err and "acceptance" in err and row["correct"] is True
        assert 0 < row["acceptance"] <= 1 <= row["tokens_per_pass"] <= 6
        # A pass reads the full model once, and at most 5 draft steps before it less each.
        assert 1 < row["bytes_to_full"] * row["tokens_per_pass"] < 1 + 5
        rows.append(row)
    assert rows[0]["acceptance"] > rows[1]["acceptance"]  # L and R are worth something


def test_the_command_answers_a_prompt(run):
    code, out, _ = run("Tom has 12 apples. Tom buys 5 more. How many apples does Tom have?",
                       "--reselect", "4", "--json", "--temperature", "0.6", "--seed", "3")
    assert code == 0 and json.loads(out)["prompt"].startswith(data.INSTRUCTION)
    code, out, _ = run("Tom has 12 apples.", "--reselect", "4", "--json", "--model",
                       sample.BUNDLED, "--density", "0.4", "--max-new-tokens", "1")
    row = json.loads(out)
    assert code == 0 and row["prompt"] == "Tom has 12 apples." and row["tokens"] == 1
    assert "acceptance" not in row  # no pass has run


def test_times_of_a_shape(run, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"tiny": tiny.CONFIG | {"max_position_embeddings": 256}})
    monkeypatch.setattr(lossless, "median_ms", lambda operation: operation() or 10.0)
    code, out, err = run("--time", "tiny", "--json", "--density", "0.25")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["layers"], row["n"]) for row in rows] == [
        (layers, n) for layers in (2, 4) for n in lossless.PASSES]
    for row in rows:
        n = row["n"]
        assert row["ms per token at 100%"] == pytest.approx(10)  # n parts of 10 ms for n tokens
        assert row["ms per token at 80%"] == pytest.approx(10 * n * 0.2 / (1 - 0.8 ** n))
        assert row["ms per pass"] == row["full ms per token"] == 10


def test_the_clock_gives_milliseconds():
    assert 0 < lossless.median_ms(lambda: None) < 1


@pytest.mark.parametrize("args, words", [
    (["x"], "--reselect"),
    (["x", "--reselect", "0"], "whole number"),
    (["x", "--reselect", "4", "--density", "0"], "(0, 1]"),
    (["x", "--reselect", "4", "--adapter", "none.safetensors"], "none.safetensors does not exist"),
    (["x", "--reselect", "4", "--method", "cats", "--adapter",
      "models/tiny-math/griffin.safetensors"], "griffin"),
    (["x", "--reselect", "4", "--model", "models/tiny-math"], "--adapter"),
    (["--reselect", "4", "--model", "models/tiny-math", "--method", "cats"], "prompt"),
    (["x", "--reselect", "4", "--temperature", "nan"], "temperature"),
    (["long " * 600, "--reselect", "4"], "context"),
    (["x", "--time", "smollm2-135m"], "--time"),
    (["--time", "smollm2-135m", "--reselect", "4"], "--time"),
    (["--time", "no-such-shape"], "no-such-shape"),
])
def test_bad_input_is_one_line_and_exit_code_2(args, words, run):
    code, out, err = run(*args)
    assert code == 2 and err.splitlines()[-1].startswith("error: ")
    assert words in err.splitlines()[-1]
