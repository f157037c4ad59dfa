"""Fixtures for all tests."""

import os

import pytest


@pytest.fixture(scope="session")
def device():
    """Where decoding, distillation and adapters are tested: CAPRESE_TEST_DEVICE or cpu."""
    return os.environ.get("CAPRESE_TEST_DEVICE", "cpu")
