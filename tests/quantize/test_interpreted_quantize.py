"""GPTQ's inner loop as a Triton kernel against its PyTorch twin, in Triton's interpreter."""

from pathlib import Path

import pytest
from helpers import interpreted


@pytest.mark.parametrize("file", interpreted.files(__file__), ids=lambda file: file.stem)
def test_kernels_pass_in_the_interpreter(file: Path) -> None:
    interpreted.check(file)
