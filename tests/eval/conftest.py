from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_moe(tmp_path_factory) -> Path:
    """The shipped architecture, untrained, as a plain transformers folder: its answers are noise."""
    import torch

    from calibration.shipped.architecture import build_model, build_processor, save_processor

    folder = tmp_path_factory.mktemp("models") / "moe"
    torch.manual_seed(0)
    processor = build_processor(sheets=20)
    build_model("moe", processor).to(torch.bfloat16).save_pretrained(folder)
    save_processor(processor, folder)
    return folder


@pytest.fixture(scope="session")
def small_int4(small_moe, tmp_path_factory) -> Path:
    """A checkpoint of ``small_moe``."""
    from expertflow_quant.pipeline.quantize import quantize_model

    folder = tmp_path_factory.mktemp("checkpoints") / "int4"
    quantize_model(small_moe, folder, method="rtn", plan="int4-g32")
    return folder
