"""A packed model expands to nearly the one it was, every time to the same, and transformers loads it."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from calibration.shipped.packed import PACKED, WEIGHTS, expand, pack

DENSE = Path(__file__).parents[2] / "calibration" / "shipped" / "dense"


def test_a_packed_model_expands_to_nearly_itself(tmp_path):
    pack(DENSE, tmp_path / "packed")
    assert (tmp_path / "packed" / PACKED).stat().st_size < 0.56 * (DENSE / WEIGHTS).stat().st_size
    for name in ("one", "other"):
        expand(tmp_path / "packed", tmp_path / name)
    was, now = load_file(DENSE / WEIGHTS), load_file(tmp_path / "one" / WEIGHTS)
    assert now.keys() == was.keys()
    for name, value in was.items():
        assert now[name].dtype == value.dtype
        step = value.float().abs().flatten(1).amax(dim=1) / 127 if value.ndim > 1 else torch.zeros(())
        off = (now[name].float() - value.float()).abs()
        room = step.view(-1, *[1] * (value.ndim - 1)) * 0.5 + value.float().abs() * 2**-7 if value.ndim > 1 else step
        assert bool((off <= room + 1e-12).all()), name
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    assert model.config.model_type == "qwen3_vl"
