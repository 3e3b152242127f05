"""From a folder to an engine: our checkpoints with a budget, and plain transformers models."""

import logging
from collections.abc import Callable, Iterator
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
from expertflow_quant.offload.budget import parse_budget
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.fast.build import FastOptions, build_fast
from expertflow_quant.runtime.fast.probe import FastPathError
from expertflow_quant.runtime.quantizer import ExpertFlowConfig, attach_cache
from expertflow_quant.runtime.runner import Runner

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    expert_memory: int | str = "100%",
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    *,
    fast: bool | None = None,
    options: FastOptions | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Engine:
    """An engine on a quantized checkpoint, its experts in ``expert_memory`` of the device ("2MiB", "25%",
    bytes).

    ``dtype`` is that of activations and non-expert weights: by default float32 on the CPU, the model's own
    elsewhere. ``verify`` checks every file's sha256 first. ``fast``: True for the fast path (captured decode steps,
    streamed prefill; ``options`` set its sizes, ``on_step`` hears what building it does), False for transformers'
    own ``generate``; by default the fast path on a GPU where the model can take it, and a warning that says why
    where it cannot. Raises ExpertFlowError (BudgetError, CheckpointError, FastPathError) before anything is
    generated: a budget below one token's working set, a missing or damaged file, an unknown format, no such device.
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
    target = pick_device(device)
    wanted = target.type == "cuda" if fast is None else fast
    config.quantization_config = {**saved, "expert_memory": expert_memory, "verify": verify, "fast": wanted}
    model = _model(folder, config, target, dtype)
    processor = load_processor(folder)
    if not wanted:
        return Engine(model, processor)
    budget = parse_budget(expert_memory, model.expert_store.nbytes)

    def runner(engine: Engine) -> Runner:
        return build_fast(model, engine.tokenizer, engine.end_ids, budget, options or FastOptions(), on_step=on_step)

    try:
        return Engine(model, processor, runner)
    except FastPathError as error:
        if fast:
            raise
        log.warning("%s: the plain path is taken, which is slower", error)
    return Engine(_plain_again(model, budget), processor)


def _plain_again(model: Any, budget: int) -> Any:
    """``model`` with the plain path's cache, and the attention that it would have had."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    attach_cache(model, budget)
    return model


def load_plain(path: str | Path, device: str = "cpu", dtype: torch.dtype | str | None = None) -> Engine:
    """An engine on an ordinary transformers folder, dense or Mixture-of-Experts in full precision.

    ``dtype`` as in ``load``. Raises ExpertFlowError for one of our checkpoints, which ``load`` takes.
    """
    folder = Path(path)
    if (folder / MANIFEST_FILE).is_file():
        raise ExpertFlowError(f"{folder} is an expertflow checkpoint: load it with expertflow_quant.load")
    model = _model(folder, read_config(folder), pick_device(device), dtype)
    return Engine(model, load_processor(folder))


def _model(folder: Path, config: Any, target: torch.device, dtype: torch.dtype | str | None) -> Any:
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else "auto"
    placed: dict[str, Any] = {} if target.type == "cpu" else {"device_map": {"": str(target)}}
    with _no_progress_bar():
        return model_class(config).from_pretrained(folder, config=config, dtype=dtype, **placed)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
