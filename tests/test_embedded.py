"""What the README says of the shipped model and adapter. Run: python -m pytest tests/test_embedded.py"""

import pytest
import torch

import caprese
import data
import sample
from distill import EVALUATION_SEED, recovered


@pytest.fixture(scope="module")
def rows():
    """(maths, reading) accuracy of the full, the sparse and the corrected model on the first held-out problems."""
    model = sample.Transformer.from_pretrained(sample.EMBEDDED, dtype=torch.float32)
    tokenizer = data.Tokenizer(sample.EMBEDDED)
    sets = (data.problems("maths", 250, EVALUATION_SEED, evaluation=True),
            data.problems("reading", 250, EVALUATION_SEED, evaluation=True, distinct=True))
    measure = lambda: [sample.evaluate(model, tokenizer, s, max_new_tokens=128)[0] for s in sets]
    full = measure()
    caprese.attach(model, "griffin", sample.EMBEDDED_DENSITY)
    sparse = measure()
    caprese.load_adapter(model, sample.EMBEDDED / "griffin.safetensors")
    assert caprese.added_parameters(model) <= 0.02
    return {"full": full, "sparse": sparse, "corrected": measure()}


def test_the_full_model_reasons_and_reads(rows):
    assert min(rows["full"]) >= 0.95


def test_sparse_inference_costs_the_maths_but_not_the_reading(rows):
    assert rows["sparse"][0] <= 0.5 * rows["full"][0]
    assert rows["sparse"][1] >= 0.9 * rows["full"][1]


def test_the_shipped_adapter_recovers_four_fifths(rows):
    accuracies = [{"math_accuracy": rows[k][0]} for k in ("full", "sparse", "corrected")]
    assert recovered(accuracies) >= 0.8
    assert rows["corrected"][1] >= rows["sparse"][1]


def test_size_on_disk():
    assert sum(f.stat().st_size for f in sample.EMBEDDED.iterdir() if f.is_file()) <= 8e6
