"""nf4's sixteen values against the quantiles that define them."""

from statistics import NormalDist

import pytest
import torch

from expertflow_quant.formats import NF4_VALUES

OUTERMOST = 0.9677083
"""The probability below the largest quantile, as published with QLoRA's code."""


def test_values_are_quantiles_of_the_normal_distribution() -> None:
    """Eight above zero and seven below, each side evenly spread in probability from 1/2 to the outermost."""
    above = [NormalDist().inv_cdf(0.5 + (OUTERMOST - 0.5) * step / 8) for step in range(1, 9)]
    below = [-NormalDist().inv_cdf(0.5 + (OUTERMOST - 0.5) * step / 7) for step in range(1, 8)]
    largest = max(above)
    wanted = sorted(value / largest for value in [*above, 0.0, *below])
    assert wanted == pytest.approx(NF4_VALUES, abs=2e-7)


def test_values_are_float32_numbers() -> None:
    assert torch.tensor(NF4_VALUES, dtype=torch.float32).tolist() == list(NF4_VALUES)
