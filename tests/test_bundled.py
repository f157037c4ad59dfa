"""What the README says of the bundled model. Run: python -m pytest tests/test_bundled.py"""

import pytest
import torch

import caprese
import data
import sample
from distill import EVALUATION_SEED, recovered
from model import Transformer

VARIANTS = ("full", "sparse", "corrected")


@pytest.fixture(scope="module")
def accuracies():
    """{variant: (maths, reading)} on the first held-out problems."""
    model = Transformer.from_pretrained(sample.BUNDLED, dtype=torch.float32)
    tokenizer = data.Tokenizer(sample.BUNDLED)
    maths = data.problems("maths", 125, EVALUATION_SEED, evaluation=True)
    reading = data.problems("reading", 60, EVALUATION_SEED, evaluation=True)
    found = {}
    for variant in VARIANTS:
        if variant == "sparse":
            about = caprese.read_adapter(sample.BUNDLED / "griffin.safetensors")[1]
            caprese.attach(model, "griffin", about["density"], about["layers"])
        if variant == "corrected":
            caprese.load_adapter(model, sample.BUNDLED / "griffin.safetensors")
            assert caprese.added_parameters(model) <= 0.02
        found[variant] = [sample.evaluate(model, tokenizer, problems, max_new_tokens=128)[0]
                          for problems in (maths, reading)]
    return found


def test_the_full_model_reasons_and_reads(accuracies):
    assert min(accuracies["full"]) >= 0.98


def test_sparse_inference_costs_the_maths_but_not_the_reading(accuracies):
    assert accuracies["sparse"][0] <= 0.5 * accuracies["full"][0]
    assert accuracies["sparse"][1] >= 0.93 * accuracies["full"][1]


def test_the_bundled_adapter_recovers_the_maths_and_keeps_the_reading(accuracies):
    rows = [{"math_accuracy": accuracies[variant][0]} for variant in VARIANTS]
    assert recovered(rows) >= 0.95
    assert accuracies["corrected"][1] >= 0.98 * accuracies["full"][1]


def test_size_on_disk():
    files = [file for file in sample.BUNDLED.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
