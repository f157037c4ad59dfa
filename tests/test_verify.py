"""Lossless decoding: the output is the full model's. Run: python -m pytest tests/test_verify.py"""

from collections import Counter

import pytest
import tiny
import torch

import caprese
import sample


def full_model(**changes):
    """A random model in float64, where no two logits are ever as good as equal."""
    return tiny.model(**changes).double()


@pytest.fixture(autouse=True)
def long_drafts(monkeypatch):
    """Random models are never sure of a token; so that drafts are long they need not be."""
    monkeypatch.setattr(sample, "SURE", 0.0)


def sparse(model, method, layers, rank):
    """A draft that is often wrong: few neurons, and a random correction where rank is above 0."""
    return tiny.fill(caprese.attach(model, method, 0.3, layers, rank))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("layers", [None, [0, 1, 2, 3]])
@pytest.mark.parametrize("method", ["griffin", "cats"])
@pytest.mark.parametrize("family", tiny.VARIANTS)
def test_greedy_output_is_the_full_models(family, method, layers, rank):
    model = full_model(**tiny.VARIANTS[family])
    prompt = tiny.tokens(1, 7)
    expected = sample.generate(model, prompt, 30)
    sparse(model, method, layers, rank)
    drafted = sample.generate(model, prompt, 30)
    for rho in (1, 2, 5, 9):
        counts = Counter()
        found = sample.generate(model, prompt, 30, reselect=rho, verify=True, counts=counts)
        assert torch.equal(found, expected)
        assert counts["tokens"] == 29 == counts["passes"] + counts["accepted"]
        assert counts["accepted"] <= counts["drafted"] <= (rho - 1) * counts["passes"]
        if rho == 9 and not torch.equal(drafted, expected):
            assert counts["accepted"] < counts["drafted"]


@pytest.mark.parametrize("length", [1, 5, 100, 126, 127])
def test_prompts_of_any_length_up_to_the_end_of_the_context(length):
    model = full_model()
    prompt = tiny.tokens(1, length)
    expected = sample.generate(model, prompt, 40)
    assert expected.shape[1] == min(40, 128 - length)
    sparse(model, "griffin", None, 4)
    for rho in range(1, 10):
        found = sample.generate(model, prompt, 40, reselect=rho, verify=True)
        assert torch.equal(found, expected)


def test_a_draft_ends_where_it_is_unsure(monkeypatch):
    model = full_model()
    prompt = tiny.tokens(1, 7)
    expected = sample.generate(model, prompt, 30)
    sparse(model, "griffin", None, 4)
    drafted = {}
    for sure in (0.0, 0.05, 1.0):
        monkeypatch.setattr(sample, "SURE", sure)
        counts = Counter()
        found = sample.generate(model, prompt, 30, reselect=9, verify=True, counts=counts)
        assert torch.equal(found, expected)
        drafted[sure] = counts["drafted"] / counts["passes"]
    assert drafted[1.0] <= 1 and drafted[1.0] < drafted[0.05] < drafted[0.0]


def test_the_answer_ends_where_the_full_models_does():
    """At a stop id that was drafted, that the pass has added, that comes first, or not at all."""
    model = full_model()
    prompt = tiny.tokens(1, 7)
    tokens = sample.generate(model, prompt, 30)[0].tolist()
    sparse(model, "griffin", None, 4)
    for end in {tokens.index(token) for token in tokens}:
        for rho in (2, 5):
            found = sample.generate(model, prompt, 30, reselect=rho, stop_ids=(tokens[end],),
                                    verify=True)
            assert found[0].tolist() == tokens[:end + 1]
    for limit in range(1, 12):
        found = sample.generate(model, prompt, limit, reselect=5, verify=True)
        assert found[0].tolist() == tokens[:limit]


def test_sampling_keeps_the_full_models_distribution(monkeypatch):
    """The first three tokens of 1,000 answers against their exact probabilities, by chi-square."""
    monkeypatch.setattr(sample, "SURE", 0.38)  # drafts of two tokens, and some of one
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
    sparse(model, "griffin", [0, 1, 2, 3], 4)
    generator, counts, seen = torch.Generator().manual_seed(0), Counter(), Counter()
    for _ in range(count):
        tokens = sample.generate(model, prompt, 3, temperature, top_p, reselect=3, verify=True,
                                 generator=generator, counts=counts)
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


def test_a_padded_prompt_is_answered_as_if_it_were_not():
    model = full_model()
    prompt = tiny.tokens(1, 7)
    expected = sample.generate(model, prompt, 20)
    padded = torch.cat([prompt, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    sparse(model, "griffin", None, 4)
    found = sample.generate(model, padded, 20, reselect=4, verify=True, prompt_lengths=[7])
    assert torch.equal(found, expected)


def test_one_row_at_a_time():
    model = tiny.model()
    for settings in ({"reselect": None}, {"reselect": 4, "samples": 2}):
        with pytest.raises(ValueError, match="one row at a time"):
            sample.generate(model, tiny.tokens(1, 5), 4, verify=True, **settings)
    with pytest.raises(ValueError, match="one row at a time"):
        sample.generate(model, tiny.tokens(2, 5), 4, verify=True, reselect=4)


def test_the_model_stays_full_where_a_consumer_breaks_off():
    model = sparse(tiny.model(), "griffin", None, 4)
    tokens = tiny.tokens(1, 9)
    expected = model(tokens)
    steps = sample.stream(model, tokens, 20, reselect=4, verify=True)
    for _ in range(3):
        next(steps)
    assert torch.equal(model(tokens), expected)


def test_in_bfloat16_only_ties_differ():
    """A pass over several tokens rounds otherwise than a step, so the best two may change places.

    Wherever the answers part, the full model's two logits are within bfloat16's rounding.
    """
    parted = 0
    for seed in range(8):
        model = tiny.model(seed=seed).bfloat16()
        prompt = tiny.tokens(1, 9, seed=seed)
        expected = sample.generate(model, prompt, 30)[0]
        sparse(model, "griffin", None, 4)
        found = sample.generate(model, prompt, 30, reselect=5, verify=True)[0]
        caprese.detach(model)
        if not torch.equal(found, expected):
            at = int((found != expected).nonzero()[0])
            logits = model(torch.cat([prompt[0], expected[:at]])[None])[0, -1].float()
            gap = (logits[expected[at]] - logits[found[at]]).abs()
            assert gap <= 0.05 * logits.abs().max()  # a few of bfloat16's steps of 2^-8
            parted += 1
    assert parted < 8
