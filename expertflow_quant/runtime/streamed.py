"""The experts of a prefill: many tokens in one pass, layer by layer, experts that are not resident streamed past.

While one layer's experts are computed, the next ones' records cross the link into a staging ring: the host asks for
copies as far ahead as the ring has room, so attention and routers of the next layer run beside copies too. Pairs are
sorted by expert once per layer, every pair's row is kept, and a token's rows are added up in top-k order at the end:
what is resident, how chunks are cut, and whether records are staged ahead or on demand change no bit of the result.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.kernels import Gate, combine
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.staging import Chunk, StagingRing, contiguous_runs
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime import layer_product
from expertflow_quant.runtime.layer_product import LayerProduct, cut_tokens

DENSE_TOKENS = 512
"""Tokens per expert from which experts are decoded first and multiplied dense. Measured on an H100 with int4-g128
experts of 768 x 2048, 128 in a layer: at 128 tokens an expert 0.65 ms decoded in the product, 1.13 ms decoded first; at
1,024 tokens 3.4 against 2.9 ms."""

AHEAD_COVERAGE = 0.95
"""Expected share of a layer's experts that a pass meets, from which all are staged ahead without looking."""

PART_BYTES = 256 << 20
"""Room for what lies between the two products: tokens are multiplied in parts that fit, while weights stay in place."""

DENSE_BYTES = 192 << 20
"""Room for experts that are decoded before they are multiplied, unless one alone needs more. An estimate: 16 or more
experts of a fine-grained model, whose blocks keep every processor of a large GPU busy."""

SLACK_BYTES = 1 << 20
"""For the rounding of allocations and tensors whose size does not depend on the tokens."""


@dataclass(frozen=True)
class StreamOptions:
    """``multiply``: decode "in kernel", or "on load" and multiply dense; "auto" takes the latter from
    ``dense_tokens`` tokens per expert on, unless the records are dense in that dtype already. ``stage``: all missing
    experts "ahead", or only routed ones "on demand", which waits for the device once in each layer; "auto" takes the
    former where ``expected_coverage`` of every layer reaches ``ahead_coverage``. ``part_bytes``, ``dense_bytes``:
    see PART_BYTES, DENSE_BYTES."""

    multiply: Literal["auto", "in kernel", "on load"] = "auto"
    stage: Literal["auto", "ahead", "on demand"] = "auto"
    dense_tokens: float = DENSE_TOKENS
    ahead_coverage: float = AHEAD_COVERAGE
    part_bytes: int = PART_BYTES
    dense_bytes: int = DENSE_BYTES


@dataclass(frozen=True)
class StreamStats:
    """Counts of one pass: record bytes that crossed the link, and experts that were used from a slot or streamed,
    whether or not a token met them."""

    bytes_streamed: int = 0
    experts_resident: int = 0
    experts_streamed: int = 0

    def __add__(self, other: "StreamStats") -> "StreamStats":
        return StreamStats(
            self.bytes_streamed + other.bytes_streamed,
            self.experts_resident + other.experts_resident,
            self.experts_streamed + other.experts_streamed,
        )


def expected_coverage(experts: int, top_k: int, tokens: int) -> float:
    """Share of ``experts`` that ``tokens`` tokens are expected to meet, if every token drew ``top_k`` of them evenly:
    ``1 - (1 - top_k / experts) ** tokens``. Real routes are less even, so they meet fewer."""
    return 1.0 - (1.0 - top_k / experts) ** tokens


@dataclass(frozen=True)
class _Order:
    """A layer's experts in the order in which they are computed, int64 ``[n]``: the first ``residents`` from their
    slots, the others streamed. ``short`` is the same in int32. ``places`` int32 ``[E]``: each expert's place among the
    residents or in its chunk, -1 where it is in neither."""

    experts: Tensor
    short: Tensor
    places: Tensor
    residents: int


def _step(experts: int, chunk: int) -> int:
    """How many of ``experts`` are staged together: as even as chunks of at most ``chunk`` can be."""
    return max(1, -(-experts // max(1, -(-experts // chunk))))


class StreamedExperts:
    """Passes over all layers: ``begin`` once, then ``layer`` for each MoE layer in model order.

    Between ``begin`` and the last layer nothing else may move experts into or out of ``resident``'s slots. The rows of
    all pairs of a layer are kept until its last chunk, because a token's sum has an order; so memory bounds the tokens
    of a pass (``scratch_bytes``). One thread, one compute stream.
    """

    def __init__(
        self, resident: ResidentExperts, store: ExpertStore, ring: StagingRing, options: StreamOptions | None = None
    ) -> None:
        if ring.device != resident.address.device:
            raise ExpertFlowError(
                f"experts stay on {resident.address.device} but are staged on {ring.device}: make both on one device"
            )
        self._resident, self._store, self.ring = resident, store, ring
        self._options = options or StreamOptions()
        self._residents: list[list[int]] = []
        self._orders: list[_Order] = []
        self._queue: deque[tuple[int, Sequence[int]]] = deque()
        self._staged: deque[Chunk] = deque()
        self._ahead = False
        self._tokens = 0
        self._next = len(store.layers)
        self._neighbours: dict[int, list[bool]] = {}
        self._stats = self._total = StreamStats()

    @property
    def stats(self) -> StreamStats:
        """Counts since ``begin``; known to the host, nothing waits."""
        return self._stats

    @property
    def total(self) -> StreamStats:
        """Counts of all passes since ``reset_total``."""
        return self._total

    def reset_total(self) -> None:
        self._total = StreamStats()

    @property
    def ahead(self) -> bool:
        """Whether the last pass to begin stages all missing experts without looking who is routed."""
        return self._ahead

    def begin(self, tokens: int) -> None:
        """Start a pass over ``tokens`` tokens, padding not counted: reads which experts are resident, which waits for
        the device once, and asks for the first copies. A pass that was not finished is given up."""
        self._queue.clear()
        self._staged.clear()
        self.ring.reset()
        self._stats, self._tokens, self._next = StreamStats(), tokens, 0
        self._ahead = self._stages_ahead(tokens)
        self._residents = self._resident.resident_experts()
        missing = [self._missing(layer) if self._ahead else [] for layer in range(len(self._residents))]
        # before any record: a small copy would have to queue behind the large ones
        self._orders = self._ordered(range(len(self._residents)), missing)
        for layer, experts in enumerate(missing):
            self._ask(layer, experts)

    @torch.no_grad()
    def layer(
        self, layer: int, gate: Gate, hidden: Tensor, ids: Tensor, weights: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of every token's experts: hidden ``[T, H]``, ids int and weights ``[T, K]`` -> ``[T, H]``.

        Ids that are no expert's add nothing. ``valid`` bool ``[T]``: tokens where it is False cost nothing and get
        zeros. Raises ExpertFlowError when layers come in another order than the model's, or without ``begin``.
        """
        if layer != self._next or layer >= len(self._store.layers):
            raise ExpertFlowError(
                f"layer {layer} was asked for, next in this pass is layer {self._next} of {len(self._store.layers)}: "
                "call begin, then every MoE layer once, in order"
            )
        self._next += 1
        experts = len(self._store.layers[layer].nbytes)
        if valid is not None:
            ids = ids.masked_fill(~valid.unsqueeze(1), experts)
        order = self._orders[layer] if self._ahead else self._routed(layer, ids, experts)
        rows = hidden.new_empty(ids.numel(), hidden.shape[1])
        table, row_of = self._resident.tables[layer]
        together = self._multiplied_together(layer, hidden.dtype, gate.fused is not None)
        product = LayerProduct(
            table,
            row_of,
            self._resident.addresses(layer).clone(),
            order.places,
            gate,
            cut_tokens(hidden.contiguous(), ids, rows, experts, together),
            self._tokens_per_expert(layer, self._tokens),
        )
        self._multiply(product, order, self._decoded_together(layer, self._tokens, hidden.dtype))
        return combine(rows, ids, weights, experts)

    def scratch_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16, fused: bool = True) -> int:
        """What a pass over ``tokens`` tokens, padding included, allocates on the device at once, at most: rows, result,
        what lies between the two products, decoded matrices, plans; not slots and ring. ``dtype`` is that of the hidden
        states, ``fused``: whether kernels compute the gate."""
        layers = self._store.layers
        largest = max(
            layer_product.scratch_bytes(
                self._resident.tables[index][0].shape,
                layer.top_k,
                tokens,
                self._multiplied_together(index, dtype, fused),
                self._decoded_together(index, tokens, dtype),
                dtype,
                fused,
            )
            for index, layer in enumerate(layers)
        )
        tables = 32 * len(layers) * max(len(layer.nbytes) for layer in layers)
        return largest + tables + SLACK_BYTES

    def _multiply(self, product: LayerProduct, order: _Order, decoded: int) -> None:
        """Residents first, then chunk by chunk what is streamed, asking for the next copies after each chunk.
        ``decoded``: experts that are decoded together, 0: in the kernel."""
        residents, streamed = order.residents, 0

        def run(experts: Tensor) -> None:
            if decoded:
                product.run_dense(experts, decoded)
            else:
                product.run(experts)

        if residents:
            run(order.short[:residents])
        count = order.experts.shape[0]
        step = _step(count - residents, self.ring.chunk)
        for first in range(residents, count, step):
            staged = self._staged.popleft()
            staged.wait()
            product.addresses.index_copy_(0, order.experts[first : first + step], staged.addresses)
            run(order.short[first : first + step])
            staged.release()
            streamed += staged.nbytes
            self._pump()
        passed = StreamStats(streamed, residents, count - residents)
        self._stats, self._total = self._stats + passed, self._total + passed

    def _routed(self, layer: int, ids: Tensor, experts: int) -> _Order:
        """Ask for the experts of ``layer`` that are routed and missing: waits for the device unless none is missing."""
        missing = self._missing(layer)
        if not missing:
            return self._orders[layer]
        flat = ids.reshape(-1).long()
        met = torch.zeros(experts + 1, dtype=torch.bool, device=ids.device)
        met.index_fill_(0, torch.where((flat >= 0) & (flat < experts), flat, experts), True)
        is_met = met.tolist()
        wanted = [expert for expert in missing if is_met[expert]]
        (order,) = self._ordered([layer], [wanted])
        self._ask(layer, wanted)
        return order

    def _missing(self, layer: int) -> list[int]:
        resident = set(self._residents[layer])
        return [expert for expert in range(len(self._store.layers[layer].nbytes)) if expert not in resident]

    def _ordered(self, layers: Sequence[int], streamed: Sequence[Sequence[int]]) -> list[_Order]:
        """The orders of ``layers`` whose ``streamed`` experts follow the resident ones; one upload for all."""
        device = self.ring.device
        widest = max(len(self._store.layers[layer].nbytes) for layer in layers)
        host = torch.full((2, len(layers), widest), -1, dtype=torch.int64, pin_memory=device.type == "cuda")
        lengths = []
        for row, (layer, others) in enumerate(zip(layers, streamed, strict=True)):
            residents = self._residents[layer]
            experts = torch.tensor([*residents, *others], dtype=torch.int64)
            step = _step(len(others), self.ring.chunk)
            places = [*range(len(residents)), *(place % step for place in range(len(others)))]
            host[0, row, : len(experts)] = experts
            host[1, row, experts] = torch.tensor(places, dtype=torch.int64)
            lengths.append((len(experts), len(self._store.layers[layer].nbytes), len(residents)))
        long = host.to(device, non_blocking=True)
        short = long.to(torch.int32)
        return [
            _Order(long[0, row, :count], short[0, row, :count], short[1, row, :experts], residents)
            for row, (count, experts, residents) in enumerate(lengths)
        ]

    def _ask(self, layer: int, experts: Sequence[int]) -> None:
        step = _step(len(experts), self.ring.chunk)
        self._queue.extend((layer, experts[first : first + step]) for first in range(0, len(experts), step))
        self._pump()

    def _pump(self) -> None:
        """Ask for copies while the ring has room; records are looked up only now."""
        while self._queue and self.ring.has_room:
            layer, experts = self._queue.popleft()
            sizes = [self._store.layers[layer].nbytes[expert] for expert in experts]
            self._staged.append(self.ring.stage_runs(self._runs(layer, experts), sizes, self._store.pinned))

    def _runs(self, layer: int, experts: Sequence[int]) -> list[Tensor]:
        """The records of ``experts`` (ascending) as few tensors as possible: neighbours in one slab are one view."""
        nbytes, follows = self._store.layers[layer].nbytes, self._follows(layer)
        runs: list[Tensor] = []
        first, length = experts[0], 0
        for before, expert in zip((None, *experts), experts):
            if before is not None and (expert != before + 1 or not follows[expert]):
                runs.append(self._store.record(layer, first).as_strided((length,), (1,)))
                first, length = expert, 0
            length += nbytes[expert]
        runs.append(self._store.record(layer, first).as_strided((length,), (1,)))
        return runs

    def _follows(self, layer: int) -> list[bool]:
        """Of every expert, whether its record begins where the one before it ends, in the same memory."""
        if (known := self._neighbours.get(layer)) is None:
            records = [self._store.record(layer, expert) for expert in range(len(self._store.layers[layer].nbytes))]
            joined = (len(contiguous_runs(pair)) == 1 for pair in itertools.pairwise(records))
            known = self._neighbours[layer] = [False, *joined]
        return known

    def _stages_ahead(self, tokens: int) -> bool:
        if self._options.stage != "auto":
            return self._options.stage == "ahead"
        covered = min(expected_coverage(len(each.nbytes), each.top_k, tokens) for each in self._store.layers)
        return covered >= self._options.ahead_coverage

    def _multiplied_together(self, layer: int, dtype: torch.dtype, fused: bool) -> int:
        """How many tokens of ``layer`` are multiplied at a time."""
        shape, top_k = self._resident.tables[layer][0].shape, self._store.layers[layer].top_k
        return layer_product.part_tokens(shape, top_k, dtype, fused, self._options.part_bytes)

    def _decoded_together(self, layer: int, tokens: int, dtype: torch.dtype) -> int:
        """How many experts of ``layer`` are decoded before they are multiplied; 0: all are in the kernel."""
        options, (table, _) = self._options, self._resident.tables[layer]
        dense = options.multiply == "on load"
        if options.multiply == "auto":
            ready = dtype == torch.bfloat16 and table.widths == {16}
            dense = not ready and self._tokens_per_expert(layer, tokens) >= options.dense_tokens
        experts = len(self._store.layers[layer].nbytes)
        return layer_product.decoded_together(table.shape, experts, dtype, options.dense_bytes) if dense else 0

    def _tokens_per_expert(self, layer: int, tokens: int) -> float:
        records = self._store.layers[layer]
        return tokens * records.top_k / len(records.nbytes)
