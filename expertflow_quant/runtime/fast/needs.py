"""What the fast path puts on a device, bounded on the host before a weight is there, and how a promise is shared."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from expertflow_quant.kernels import ATTENTION_PROGRAMS
from expertflow_quant.models.seams import model_class
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime import layer_product
from expertflow_quant.runtime.fast.build import NEXT_GATE, OFF, FastOptions, share_expert_memory
from expertflow_quant.runtime.fast.foretold import Foretold
from expertflow_quant.runtime.fast.prefill import QUERIES
from expertflow_quant.runtime.memory import MemoryPlan, Needs, plan_memory
from expertflow_quant.runtime.memory_needs import TextSizes, backbone_bytes, kv_bytes_per_token, prefill_bytes
from expertflow_quant.runtime.streamed import SLACK_BYTES, StreamOptions

MiB = 2**20
POOL_BYTES = 64 * MiB
"""What torch's allocator holds in part for a pool of graphs: some segments of 20 and 2 MiB."""

TUNING_BYTES = 256 * MiB
"""Written between timings while layers are compiled, to empty the device's caches; prefill's room, which is free
then, serves for it."""

SAMPLING_BYTES = 32
"""Of a token of the vocabulary: scores in float32, their softmax, the sort's keys and indices, twice."""

CONTROLLER_BYTES = 128
"""Of an expert: addresses, stamps, owners and counters of the cache, and the orders of a prefill."""


def longest_pass(options: FastOptions) -> tuple[int, int]:
    """Most tokens of one prefill and most prompts in it."""
    rows = options.buckets[-1]
    return (
        (options.room, 1) if rows == 1 else (min(max(options.prefill_tokens, options.room), rows * options.room), rows)
    )


def fast_needs(
    config: Any,
    store: ExpertStore,
    dtype: torch.dtype,
    options: FastOptions,
    patches_per_token: int = 0,
) -> Needs:
    """Bytes that a model of ``config`` with the experts of ``store`` takes in ``dtype``.

    The KV memory has the rows of the largest captured batch, a prefill the most tokens that one pass takes, all of
    them image tokens of ``patches_per_token`` patches where the model reads images. Staging counts one record: as
    much as is kept where all experts are resident (``share``).
    """
    tokens, prompts = longest_pass(options)
    routed = _routed_bytes(store, dtype, tokens, options.stream or StreamOptions())
    scored = 0 if dtype.itemsize == 2 else options.room
    scratch = prefill_bytes(config, tokens, dtype, prompts, tokens * patches_per_token, scored, routed)
    largest = max(max(layer.nbytes) for layer in store.layers)
    model = _meta_model(config, dtype)
    if _scores_by_hand(config, model):
        scratch += _by_hand_bytes(TextSizes.of(config), options.room, dtype)
    return Needs(
        backbone_bytes=backbone_bytes(model),
        kv_bytes_per_token=kv_bytes_per_token(config, dtype),
        rows=options.buckets[-1],
        context=options.room,
        prefill_bytes=max(scratch, TUNING_BYTES),
        graph_bytes=graph_bytes(config, store.layers, options.buckets, dtype) + foretold_bytes(options),
        staging_bytes=largest,
        expert_bytes=store.nbytes,
        # with one record staged that makes two, the fewest that are streamed; a model of two has all or none
        minimum_expert_bytes=largest if store.nbytes > 2 * largest else store.nbytes,
    )


def foretold_bytes(options: FastOptions) -> int:
    """What a trained predictor takes beside the steps that it looks ahead in, reading prompts included."""
    if options.look_ahead in (OFF, NEXT_GATE):
        return 0
    sizes, (tokens, prompts) = PathPredictor.load(options.look_ahead).model.sizes, longest_pass(options)
    scores = prompts * sizes.heads * options.room**2  # at once where nothing fuses the encoder's attention
    states, rows = tokens * (8 * sizes.width + sizes.inner), options.buckets[-1]
    steps = 3 * rows * sizes.heads * options.room  # scores of one attention, masked, and their softmax
    return Foretold.nbytes(sizes, rows, options.room) + 4 * (states + scores + steps)


def graph_bytes(config: Any, layers: Sequence[LayerRecords], buckets: Sequence[int], dtype: torch.dtype) -> int:
    """A bound for what captured steps of ``buckets`` rows hold. They share one pool, and one runs at a time, so with
    R the largest bucket, V the vocabulary and d the bytes of ``dtype`` it is::

        2 scratch(R)                a step of R rows, as a prefill of R tokens: warmed up outside the pool, captured
      + sum(buckets) V d            every graph keeps its logits
      + R V 32                      drawing a token from them
      + (P + R N) max(16, 2 G) (2 D + 2) 4
                                    parts of split attention in float32: P programs, N KV heads with G queries each, D
                                    a head's size; both padded to powers of two
      + 128 for each expert         the tables of the controller
      + POOL_BYTES
    """
    s, rows = TextSizes.of(config), buckets[-1]
    step = prefill_bytes(config, rows, dtype, rows)
    head = max(16, s.queries // max(1, s.heads))
    kv_heads = max(1, s.keys // head)
    group = max(16, 2 * s.heads // kv_heads)
    parts = (ATTENTION_PROGRAMS + rows * kv_heads) * group * (2 * head + 2) * 4
    logits = s.vocabulary * (sum(buckets) * dtype.itemsize + rows * SAMPLING_BYTES)
    tables = CONTROLLER_BYTES * sum(len(layer.nbytes) for layer in layers)
    return 2 * step + logits + parts + tables + POOL_BYTES


def share(total_bytes: int, needs: Needs, layers: Sequence[LayerRecords], wanted: int) -> tuple[MemoryPlan, int]:
    """Divide ``total_bytes``: the plan, and what experts and their staging get together, at most ``wanted``.

    Raises MemoryPlanError where the least does not fit, BudgetError where ``wanted`` is less than that.
    """
    plan = plan_memory(total_bytes, needs)
    if plan.experts == needs.expert_bytes and wanted >= needs.expert_bytes:
        return plan, wanted
    budget = min(wanted, plan.experts + plan.staging, needs.expert_bytes - 1)
    room = share_expert_memory(layers, budget)
    staged = replace(needs, staging_bytes=budget - room.slot_bytes, minimum_expert_bytes=0)
    return MemoryPlan(staged, total_bytes, room.slot_bytes), budget


def weights_dtype(config: Any, dtype: torch.dtype | str | None) -> torch.dtype:
    """What ``dtype`` means for the weights of ``config``'s model; the widest where neither says."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype != "auto":
        return getattr(torch, dtype)
    text = config.get_text_config(decoder=True)
    return getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32


def _routed_bytes(store: ExpertStore, dtype: torch.dtype, tokens: int, stream: StreamOptions) -> int:
    """Scratch of the layer of experts that takes most: as ``StreamedExperts.scratch_bytes``, but before a model has
    said who computes its gate, and with decoded experts in any case."""
    most = 0
    for layouts, layer in zip(store.layouts, store.layers, strict=True):
        shape = layouts[0].shape
        together = layer_product.part_tokens(shape, layer.top_k, dtype, False, stream.part_bytes)
        decoded = layer_product.decoded_together(shape, len(layer.nbytes), dtype, stream.dense_bytes)
        most = max(most, layer_product.scratch_bytes(shape, layer.top_k, tokens, together, decoded, dtype, False))
    return most + SLACK_BYTES


def _meta_model(config: Any, dtype: torch.dtype) -> Any:
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        return model_class(plain)._from_config(plain, dtype=dtype)


def _scores_by_hand(config: Any, model: Any) -> bool:
    """Whether a prefill's attention may hold scores: windows, or sinks."""
    text = config.get_text_config(decoder=True)
    return bool(getattr(text, "sliding_window", None)) or any(
        name.endswith("sinks") for name, _ in model.named_parameters()
    )


def _by_hand_bytes(sizes: TextSizes, room: int, dtype: torch.dtype) -> int:
    """QUERIES tokens' scores against a whole row, four times in float32 and twice in ``dtype``, and keys and values
    repeated for every head."""
    scores = QUERIES * room * sizes.heads * (16 + 2 * dtype.itemsize)
    return scores + 2 * room * sizes.queries * dtype.itemsize
