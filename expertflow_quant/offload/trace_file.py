"""The file of a recorded trace.

The file is a ``.safetensors`` with these tensors (N tokens, L MoE layers, K experts for a token, I items):

=============  ============  ===========================================================================
token_ids      int32 [N]     tokens in the order in which they were computed, item after item
kind           uint8 [N]     0 text of a prompt, 1 image of a prompt, 2 generated and then fed back
experts        [N, L, K]     uint8 up to 256 experts, int16 above; top-k order
weights        float16       [N, L, K] weights of the gate, or [N, L, 0] where they were not kept
item_tokens    int32 [I]     how many of the tokens belong to each item
item_first     int32 [I]     position of each item's first token, 0 unless the prompt was cut off
=============  ============  ===========================================================================

and these metadata: ``format`` "expertflow-trace", ``version`` "1", ``num_experts`` (of a layer), ``tasks`` (JSON list,
one name for each item) and ``meta`` (JSON object of strings: model, settings).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError

FORMAT, VERSION = "expertflow-trace", "1"
_TENSORS = ("token_ids", "kind", "experts", "weights", "item_tokens", "item_first")


@dataclass(frozen=True)
class TraceContent:
    """``tensors`` as the table above names them, and the metadata."""

    tensors: dict[str, Tensor]
    num_experts: int
    tasks: list[str]
    meta: dict[str, str]


def write_trace_file(path: Path, content: TraceContent) -> None:
    """Write the file, under its name only once it is whole. Raises ExpertFlowError when it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    header = {"num_experts": content.num_experts, "tasks": content.tasks, "meta": content.meta}
    metadata = {"format": FORMAT, "version": VERSION} | {name: json.dumps(value) for name, value in header.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save({name: content.tensors[name].contiguous() for name in _TENSORS}, metadata))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ExpertFlowError(f"cannot write {path} ({error}): make room or choose another folder") from error


def read_trace_file(path: Path) -> TraceContent:
    """What ``path`` holds; counts of items fit the tokens, the rest is checked by the trace. Raises ExpertFlowError for
    a file that is missing, damaged or no trace."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_format(path, header)
            missing = sorted(set(_TENSORS) - set(file.keys()))
            tensors = {name: file.get_tensor(name) for name in _TENSORS if name not in missing}
    except (OSError, SafetensorError) as error:
        raise ExpertFlowError(f"cannot read the trace {path} ({error}): restore the file or record again") from error
    if missing:
        raise ExpertFlowError(f"{path} lacks {', '.join(missing)}: restore the file or record again")
    _check_counts(path, tensors)
    return TraceContent(tensors, *_header(path, header))


def _check_format(path: Path, header: dict[str, str]) -> None:
    found = header.get("format"), header.get("version")
    if found != (FORMAT, VERSION):
        raise ExpertFlowError(
            f"{path} has format {found[0]!r}, version {found[1]!r}, where {FORMAT!r}, {VERSION!r} is read: give a file "
            "that `python -m calibration trace` wrote"
        )


def _check_counts(path: Path, tensors: dict[str, Tensor]) -> None:
    counts, first, tokens = tensors["item_tokens"], tensors["item_first"], tensors["token_ids"].shape[:1].numel()
    typed = counts.dtype == first.dtype == torch.int32 and counts.ndim == 1 and counts.shape == first.shape
    if not typed or int(counts.sum()) != tokens or bool((counts < 0).any()):
        raise ExpertFlowError(
            f"{path}: item_tokens {counts.dtype} {tuple(counts.shape)} and item_first {first.dtype} "
            f"{tuple(first.shape)} must say how the {tokens} tokens belong to items: restore the file or record again"
        )


def _header(path: Path, header: dict[str, str]) -> tuple[int, list[str], dict[str, str]]:
    try:
        num_experts, tasks, meta = (json.loads(header.get(name, "null")) for name in ("num_experts", "tasks", "meta"))
    except ValueError as error:
        raise ExpertFlowError(f"{path} has metadata that are not JSON ({error}): record again") from error
    if (
        type(num_experts) is not int
        or not isinstance(tasks, list)
        or not isinstance(meta, dict)
        or not all(isinstance(text, str) for text in (*tasks, *meta.values()))
    ):
        raise ExpertFlowError(
            f"{path}: num_experts {num_experts!r} must be an integer, tasks a list of texts, meta an object of texts: "
            "record again"
        )
    return num_experts, tasks, meta
