"""From a folder to an engine: our checkpoints with a budget, and plain transformers models."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from expertflow_quant.checkpoint.manifest import MANIFEST_FILE
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.models.device import pick_device
from expertflow_quant.models.processor import load_processor
from expertflow_quant.models.seams import model_class, read_config
from expertflow_quant.offload.budget import format_bytes, parse_budget
from expertflow_quant.offload.host_memory import available_bytes
from expertflow_quant.offload.policies.named import GUESSES
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime.caching import AUTO, PATHS, CacheOptions, attach_foresight, has_predictor
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.fast.build import OFF as NO_LOOK_AHEAD
from expertflow_quant.runtime.fast.build import FastOptions, build_fast
from expertflow_quant.runtime.fast.needs import fast_needs, weights_dtype
from expertflow_quant.runtime.fast.probe import FastPathError
from expertflow_quant.runtime.longest import patches_per_token
from expertflow_quant.runtime.memory import MemoryPlan
from expertflow_quant.runtime.plain import PlainRunner
from expertflow_quant.runtime.promise import check_promise, make_promise, promised, refuse_promise
from expertflow_quant.runtime.prompts import PromptEncoder
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
    gpu_memory: int | str | None = None,
    host_memory: int | str | None = None,
    context: int | None = None,
    rows: int | None = None,
    fast: bool | None = None,
    options: FastOptions | None = None,
    policy: str | None = None,
    predictor: str | None = None,
    ahead: float | None = None,
    usage: str | Path | None = None,
    slots: str | Path | None = None,
    on_step: Callable[[str], None] | None = None,
    on_pinned: Callable[[int, int], None] | None = None,
) -> Engine:
    """An engine on a quantized checkpoint, its experts in ``expert_memory`` of the device ("2MiB", "25%",
    bytes).

    ``dtype`` is that of activations and non-expert weights: by default float32 on the CPU, the model's own
    elsewhere. ``verify`` checks every file's sha256 first. ``context``: most tokens of a prompt and its answer (on the
    fast path by default 4096 or what the model reads), ``rows``: most answers at once (at
    most 32).

    ``fast``: True for the fast path (captured decode steps, streamed prefill; ``options`` set its sizes, of which
    ``context`` and ``rows`` override two, ``on_step`` hears what building it does), False for transformers' own
    ``generate``; by default the fast path on a GPU where it can be taken, and a warning that says why where it cannot.

    ``policy``, ``predictor``, ``ahead``, ``usage``, ``slots``: how the plain path keeps experts, as
    ``caching.CacheOptions`` says; by default what measured best. The fast path takes all but ``ahead``: ``policy`` is
    one of its own (layer_policy.LAYER_POLICIES), and ``predictor`` what it looks ahead by ("off", "next-gate", "paths"
    for the checkpoint's own trained one, or a folder; "auto" takes the checkpoint's own where there is one). None of
    them changes an answer.

    ``gpu_memory``, for the fast path: a promise that the device memory this process reserves stays below it, the
    CUDA context, images and the longest prompt included. Experts get what is left, at most ``expert_memory``. The
    sizes are planned before a weight is on the device, torch is told to refuse more (for the rest of the process), and
    the longest prompt is run once. ``host_memory``: pinned memory for records, by default what is available; records
    that do not fit stay in their files, which takes the plain path. ``on_pinned(done, total)`` hears bytes pinned.

    Raises ExpertFlowError (BudgetError, CheckpointError, FastPathError, MemoryPlanError) before anything is
    generated: a budget below one token's working set, a model that does not fit into ``gpu_memory``, a missing or
    damaged file, an unknown format, no such device.
    """
    folder, target = Path(path), pick_device(device)
    config, processor = _our_config(folder), load_processor(folder)
    cached = _cached(policy=policy, predictor=predictor, ahead=ahead, usage=usage, slots=slots)
    wanted = target.type == "cuda" and ahead is None if fast is None else fast
    if wanted and ahead is not None:
        raise FastPathError(
            f"ahead {ahead}: the plain path's; the fast path brings what a predictor finds likely: leave it out and "
            "give a predictor, or give fast=False"
        )
    _refuse_memory(gpu_memory, host_memory, target, wanted)
    sizes = _sizes(config, options, context, rows)
    if wanted:
        sizes = replace(sizes, slots=slots or sizes.slots, policy=policy or sizes.policy, usage=usage or sizes.usage)
        sizes = _looking_ahead(sizes, predictor, folder)
    store = ExpertStore(CheckpointReader(folder))
    budget, plan = parse_budget(expert_memory, store.nbytes), None
    if gpu_memory is not None:
        patches = patches_per_token(PromptEncoder(processor, config), config)
        needs = fast_needs(config, store, weights_dtype(config, dtype), sizes, patches)
        plan, budget = make_promise(gpu_memory, needs, store.layers, budget, target)
    if not wanted:
        (cached or CacheOptions()).classes(store, budget)  # refused before the model is read
    config.quantization_config = {**config.quantization_config, "verify": verify, "place": False}
    with promised(plan):
        model = _model(folder, config, target, dtype)
        on_gpu = next(model.parameters()).device.type == "cuda"
        model.expert_store = pinned_store(store, host_memory, on_pinned) if on_gpu else store
        if not wanted:
            reason = _why_plain(fast, target)
            return _plain(_with_cache(model, folder, budget, cached), processor, context, rows, reason)
        try:
            return _fast(model, processor, budget, sizes, plan, on_step)
        except FastPathError as error:
            if plan is not None:
                remedy = "--gpu-memory is kept by the fast path only: give --expert-memory instead"
                raise FastPathError(f"{error}; {remedy}") from error
            if fast:
                raise
            reason = str(error)
        # the error held what it came from, slots of the whole budget among it; a compiler's may be in a ring
        gc.collect()
        log.warning("%s: the plain path is taken, which is slower", reason)
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        return _plain(_with_cache(model, folder, budget, cached), processor, context, rows, reason)


def pinned_store(
    store: ExpertStore, host_memory: int | str | None, on_pinned: Callable[[int, int], None] | None = None
) -> ExpertStore:
    """The records of ``store`` in at most ``host_memory`` of pinned memory, the others where they are."""
    room = None
    if host_memory is not None:
        room = parse_budget(host_memory, available_bytes(), "--host-memory", "the host memory that is available")
    return ExpertStore(store.source, pin=True, host_memory=room, on_progress=on_pinned)


def _our_config(folder: Path) -> Any:
    if not (folder / MANIFEST_FILE).is_file():
        raise ExpertFlowError(
            f"{folder} holds no {MANIFEST_FILE}, so it is no finished expertflow checkpoint: make one with "
            "`expertflow-quant quantize MODEL OUT`, or load a plain model with Engine.from_plain"
        )
    config = read_config(folder)
    saved = getattr(config, "quantization_config", None)
    if not isinstance(saved, dict) or saved.get("quant_method") != ExpertFlowConfig().quant_method:
        raise ExpertFlowError(f"{folder}/config.json names no quantization_config of ours: restore or quantize again")
    return config


def _sizes(config: Any, options: FastOptions | None, context: int | None, rows: int | None) -> FastOptions:
    """``options`` with the given sizes in place of its own, and no more room than the model reads tokens."""
    if context is not None and context < 2:
        raise ExpertFlowError(f"--context {context} holds no prompt and answer: give at least 2 tokens")
    sizes = options or FastOptions()
    room = sizes.room if context is None else context
    reads = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or room
    return replace(sizes, rows=sizes.rows if rows is None else rows, room=min(room, reads))


def _refuse_memory(
    gpu_memory: int | str | None, host_memory: int | str | None, target: torch.device, fast: bool
) -> None:
    if target.type != "cuda" and host_memory is not None:
        raise ExpertFlowError(
            f"--host-memory {host_memory!r} is memory that a GPU reads, and the device is {target}, which reads "
            "records where their files are mapped: leave it out, or choose a GPU with --device"
        )
    if gpu_memory is not None:
        refuse_promise(gpu_memory, target, fast)


def _fast(
    model: Any,
    processor: Any,
    budget: int,
    sizes: FastOptions,
    plan: MemoryPlan | None,
    on_step: Callable[[str], None] | None,
) -> Engine:
    _refuse_unpinned(model.expert_store, next(model.parameters()).device)

    def runner(engine: Engine) -> Runner:
        return build_fast(model, engine.tokenizer, engine.end_ids, budget, sizes, on_step=on_step)

    engine = Engine(model, processor, runner)
    if plan is not None:
        engine.memory_plan = plan
        torch.cuda.empty_cache()  # what compiling and capturing took for a while
        if on_step is not None:
            on_step("reading the longest prompt")
        check_promise(engine, plan, sizes)
    return engine


def _refuse_unpinned(store: ExpertStore, device: torch.device) -> None:
    if device.type == "cuda" and not store.pinned:
        raise FastPathError(
            f"{format_bytes(store.pinned_bytes)} of {format_bytes(store.nbytes)} of records are in pinned memory, and "
            "the fast path reads all of them there: give more with --host-memory, free host memory, or use a smaller "
            "format"
        )


def _plain(model: Any, processor: Any, context: int | None, rows: int | None, reason: str) -> Engine:
    def runner(engine: Engine) -> Runner:
        return PlainRunner(model, engine.tokenizer, rows, context)

    engine = Engine(model, processor, runner)
    engine.plain_because = reason
    return engine


def _with_cache(model: Any, folder: Path, budget: int, cached: CacheOptions | None) -> Any:
    """``model`` with the plain path's cache, and what tells it of passes to come."""
    chosen = cached or CacheOptions()
    attach_cache(model, budget, chosen)
    attach_foresight(model, chosen, folder)
    return model


def _cached(**given: Any) -> CacheOptions | None:
    """What was asked of the plain path's cache, None where nothing was."""
    named = {name: value for name, value in given.items() if value is not None}
    return CacheOptions(**named) if named else None


def _looking_ahead(sizes: FastOptions, predictor: str | None, folder: Path) -> FastOptions:
    """``sizes`` with what ``load`` was told to look ahead by. Raises FastPathError for what the fast path has not."""
    if predictor in GUESSES:
        raise FastPathError(
            f"predictor {predictor!r} is the plain path's: give 'off', 'next-gate', 'paths' or the folder of a trained "
            "one, or fast=False"
        )
    if predictor == PATHS and not has_predictor(folder):
        raise FastPathError(
            f"{folder} holds no trained predictor: make one with `python -m calibration predictor`, or give the folder "
            "of one"
        )
    if predictor in (None, AUTO):
        own = sizes.look_ahead == NO_LOOK_AHEAD and has_predictor(folder)
        return replace(sizes, look_ahead=str(folder)) if own else sizes
    return replace(sizes, look_ahead=str(folder) if predictor == PATHS else predictor)


def _why_plain(fast: bool | None, target: torch.device) -> str:
    if fast is False:
        return "the fast path was turned off"
    if target.type == "cuda":
        return "records are fetched ahead by number, which the fast path does not do"
    return f"the device is {target}"


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
