"""From a folder to an engine: our checkpoints with a budget, and plain transformers models."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from expertflow_quant.checkpoint.manifest import MANIFEST_FILE
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.models.device import pick_device
from expertflow_quant.models.processor import load_processor
from expertflow_quant.models.seams import model_class, read_config
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.quantizer import ExpertFlowConfig


def load(
    path: str | Path,
    expert_memory: int | str = "100%",
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
) -> Engine:
    """An engine on a quantized checkpoint, its experts in ``expert_memory`` of the device ("2MiB", "25%",
    bytes).

    ``dtype`` is that of activations and non-expert weights: by default float32 on the CPU, the model's own
    elsewhere. ``verify`` checks every file's sha256 first. Raises ExpertFlowError (BudgetError,
    CheckpointError) before anything is generated: a budget below one token's working set, a missing or
    damaged file, an unknown format, no such device.
    """
    folder = Path(path)
    if not (folder / MANIFEST_FILE).is_file():
        raise ExpertFlowError(
            f"{folder} holds no {MANIFEST_FILE}, so it is no finished expertflow checkpoint: make one with "
            "`expertflow-quant quantize MODEL OUT`, or load a plain model with Engine.from_plain"
        )
    config = read_config(folder)
    saved = getattr(config, "quantization_config", None)
    if not isinstance(saved, dict) or saved.get("quant_method") != ExpertFlowConfig().quant_method:
        raise ExpertFlowError(f"{folder}/config.json names no quantization_config of ours: restore or quantize again")
    config.quantization_config = {**saved, "expert_memory": expert_memory, "verify": verify}
    return _engine(folder, config, device, dtype)


def load_plain(path: str | Path, device: str = "cpu", dtype: torch.dtype | str | None = None) -> Engine:
    """An engine on an ordinary transformers folder, dense or Mixture-of-Experts in full precision.

    ``dtype`` as in ``load``. Raises ExpertFlowError for one of our checkpoints, which ``load`` takes.
    """
    folder = Path(path)
    if (folder / MANIFEST_FILE).is_file():
        raise ExpertFlowError(f"{folder} is an expertflow checkpoint: load it with expertflow_quant.load")
    return _engine(folder, read_config(folder), device, dtype)


def _engine(folder: Path, config: Any, device: str, dtype: torch.dtype | str | None) -> Engine:
    target = pick_device(device)
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else "auto"
    placed: dict[str, Any] = {} if target.type == "cpu" else {"device_map": {"": str(target)}}
    with _no_progress_bar():
        model = model_class(config).from_pretrained(folder, config=config, dtype=dtype, **placed)
    return Engine(model, load_processor(folder))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
