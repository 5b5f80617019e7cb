"""Tests that need a GPU: `pytest tests/gpu`. `--device cpu` tries those that any device can run."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="cpu: a stand-in, to try the tests themselves")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.empty(0, device=request.config.getoption("device")).device


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)
