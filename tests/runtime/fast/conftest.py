"""Tiny checkpoints, written once for all tests of the fast path."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helpers import fast

import expertflow_quant
from expertflow_quant import Engine


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder of its checkpoint of mixed formats."""
    root = tmp_path_factory.mktemp("fast")

    @cache
    def made(family: str) -> Path:
        return fast.checkpoint(root / family, family)

    return made


@pytest.fixture(scope="session")
def plain_of(folder_of: Callable[[str], Path]) -> Callable[[str], Engine]:
    """family -> its engine on the plain path, everything resident."""

    @cache
    def loaded(family: str) -> Engine:
        return expertflow_quant.load(folder_of(family), fast=False)

    return loaded
