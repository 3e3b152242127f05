from pathlib import Path

import pytest
import torch

from calibration.shipped.architecture import build_model, build_processor, save_processor


@pytest.fixture(scope="session")
def small_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped architecture, untrained, as a plain transformers folder."""
    folder = tmp_path_factory.mktemp("models") / "moe"
    torch.manual_seed(0)
    processor = build_processor(sheets=20)
    build_model("moe", processor).to(torch.bfloat16).save_pretrained(folder)
    save_processor(processor, folder)
    return folder
