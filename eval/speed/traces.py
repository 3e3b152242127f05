"""Routes: which experts every token of a run is sent to, drawn from a seed (the library's generator) or read from a
file.

A file is a NumPy ``.npz`` (read without pickle) with
    decode   integers [steps, layers, rows, top_k]   experts of every decode step, distinct within a token
    experts  integer []                              experts in a layer
    prefill  integers [tokens, layers, rows, top_k]  optional: experts of prompt tokens
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.speed.trace_stats import lru_hit_rate, slots_per_layer
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.synthetic_trace import SKEW, RouteSizes, synthetic_routes

Routes = NDArray[np.int32]
TARGET_HITS, TARGET_RESIDENT = 0.7, 0.25
_CALIBRATION_STEPS, _CALIBRATION_LAYERS, _HALVINGS = 160, 4, 10


@dataclass(frozen=True)
class Trace:
    """``decode`` int32 [steps, layers, rows, top_k], ``prefill`` int32 [tokens, layers, rows, top_k]; ``origin``: the
    parameters or the file that it came from."""

    decode: Routes
    prefill: Routes
    experts: int
    origin: dict[str, Any]

    def part(self, rows: int, prompt: int) -> "Trace":
        """The first rows, and of their prompts the last tokens, which the first step follows."""
        prefill = self.prefill[self.prefill.shape[0] - prompt :, :, :rows]
        return Trace(self.decode[:, :, :rows], prefill, self.experts, self.origin)

    def prompt_routes(self) -> Routes:
        """int32 [layers, rows * tokens, top_k], the prompts one after the other."""
        tokens, layers, rows, top_k = self.prefill.shape
        return np.ascontiguousarray(self.prefill.transpose(1, 2, 0, 3)).reshape(layers, rows * tokens, top_k)


def synthetic(
    sizes: RouteSizes,
    *,
    steps: int,
    rows: int,
    prompt: int,
    skew: float = SKEW,
    stickiness: float = 0.0,
    seed: int = 0,
) -> Trace:
    """A trace drawn as ``synthetic_routes`` says. The rows' prompts of ``prompt`` tokens come before the steps."""
    prefill, decode = synthetic_routes(
        sizes, steps=steps, rows=rows, prompt=prompt, skew=skew, stickiness=stickiness, seed=seed
    )
    origin = {"kind": "synthetic", "skew": skew, "stickiness": stickiness, "seed": seed}
    return Trace(decode.int().numpy(), prefill.int().numpy(), sizes.experts, origin)


def calibrate(
    sizes: RouteSizes,
    resident: float = TARGET_RESIDENT,
    target_hits: float = TARGET_HITS,
    *,
    skew: float = SKEW,
    seed: int = 0,
) -> float:
    """The stickiness at which an LRU of ``resident`` of every layer's experts hits ``target_hits`` of one row's
    routes; 0 or 1 where even that is above or below it."""
    few = RouteSizes(min(sizes.layers, _CALIBRATION_LAYERS), sizes.experts, sizes.top_k)
    slots = slots_per_layer(sizes.experts, sizes.top_k, resident)

    def hits(stickiness: float) -> float:
        trace = synthetic(few, steps=_CALIBRATION_STEPS, rows=1, prompt=0, skew=skew, stickiness=stickiness, seed=seed)
        return lru_hit_rate(trace.decode, trace.experts, slots)

    low, high = 0.0, 1.0
    if hits(low) >= target_hits:
        return low
    if hits(high) <= target_hits:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if hits(middle) < target_hits else (low, middle)
    return round((low + high) / 2, 4)


def save_trace(path: Path, trace: Trace) -> None:
    """Write the routes as a file that ``load_trace`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, decode=trace.decode, prefill=trace.prefill, experts=np.int32(trace.experts))


def load_trace(path: Path, sizes: RouteSizes, *, steps: int, rows: int, prompt: int) -> Trace:
    """The first steps, layers and rows of a recorded trace.

    Without prompts of its own, or with too few, a prompt repeats the routes that the file has. Raises
    ExpertFlowError for a file that is no trace, belongs to other sizes, or is too short.
    """
    decode, recorded, experts = _read(path)
    if decode.shape[3] != sizes.top_k or experts != sizes.experts or decode.shape[1] < sizes.layers:
        raise ExpertFlowError(
            f"{path} has routes of {decode.shape[1]} layers to {decode.shape[3]} of {experts} experts, the model has "
            f"{sizes.layers} layers and uses {sizes.top_k} of {sizes.experts}: record a trace of this model"
        )
    if decode.shape[0] < steps or decode.shape[2] < rows:
        raise ExpertFlowError(
            f"{path} has {decode.shape[0]} steps of {decode.shape[2]} rows, this run needs {steps} of {rows}: ask for "
            "fewer new tokens or rows, or record more"
        )
    if recorded is None:
        recorded = decode
    if recorded.shape[1:] != decode.shape[1:] or not recorded.shape[0]:
        raise ExpertFlowError(
            f"{path}: prefill {recorded.shape} must have tokens, and layers, rows and top_k of decode {decode.shape}"
        )
    picked = np.arange(prompt) % recorded.shape[0]
    origin = {"kind": "recorded", "file": path.name, "repeated_prompt": prompt > recorded.shape[0]}
    return Trace(decode[:steps, : sizes.layers, :rows], recorded[picked, : sizes.layers, :rows], experts, origin)


def _read(path: Path) -> tuple[Routes, Routes | None, int]:
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        experts = int(arrays["experts"])
        decode = _checked(path, "decode", arrays["decode"], experts)
        prefill = _checked(path, "prefill", arrays["prefill"], experts) if "prefill" in arrays else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, ExpertFlowError):
            raise
        raise ExpertFlowError(f"{path} is no trace ({error}): give an .npz with decode and experts") from error
    return decode, prefill, experts


def _checked(path: Path, name: str, routes: NDArray[Any], experts: int) -> Routes:
    if routes.ndim != 4 or not np.issubdtype(routes.dtype, np.integer):
        raise ExpertFlowError(f"{path}: {name} is {routes.dtype} {routes.shape}, not four-dimensional integers")
    if routes.size and (routes.min() < 0 or routes.max() >= experts):
        raise ExpertFlowError(f"{path}: {name} names experts outside 0 to {experts - 1}: record it again")
    ordered = np.sort(routes, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ExpertFlowError(f"{path}: {name} names an expert twice for one token: record it again")
    return routes.astype(np.int32)
