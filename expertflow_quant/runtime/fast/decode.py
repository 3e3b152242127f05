"""Decode: one token for every row under way, captured as one CUDA graph per batch size.

Within a step nothing waits for the host: a layer's routed ids are resolved to addresses by a kernel, missing records
are filled in by another, and the products read whatever address they are given. Rows have their own lengths; rows
that are not active write into their own KV row only and touch no expert.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.kernels import Gate, combine, decode_attention, few_product, grouped_rows, plan_blocks
from expertflow_quant.models.seams import cache_argument
from expertflow_quant.offload.layer_slots import Pools
from expertflow_quant.offload.overflow import OverflowRoom, may_overflow
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.runtime.fast import passes
from expertflow_quant.runtime.fast.attention import PassThrough
from expertflow_quant.runtime.fast.compiled import compiled
from expertflow_quant.runtime.fast.kv import KVRows
from expertflow_quant.runtime.fast.lookahead import LookAhead
from expertflow_quant.runtime.fast.passes import AttentionOptions, Routes
from expertflow_quant.runtime.fast.probe import Findings
from expertflow_quant.runtime.streamed import StreamedExperts, expected_coverage

BUCKETS = (1, 2, 4, 8, 16, 32)
FEW_ROWS = 4
"""Up to so many tokens every (token, expert) pair reads its record by itself; above, pairs of an expert share it."""

BLOCK_TOKENS = 16


class DecodePass:
    """Answers the model during a step of ``rows`` rows."""

    def __init__(
        self,
        kv: KVRows,
        resident: ResidentExperts,
        overflow: OverflowRoom,
        gates: Sequence[Gate],
        tokens: Tensor,
        active: Tensor,
        rows: int,
        routes: Routes | None = None,
        ahead: LookAhead | None = None,
    ) -> None:
        self._kv, self._resident, self._overflow, self._gates = kv, resident, overflow, gates
        self._tokens = tokens[:rows]
        self._active, self._rows, self._routes, self._ahead = active[:rows], rows, routes, ahead
        layers = enumerate(zip(resident.store.layers, resident.plan, strict=True))
        self._overflows = [
            may_overflow(records, pools, rows) or (resident.refuses and not resident.all_resident(layer))
            for layer, (records, pools) in layers
        ]
        self._filled: dict[int, Any] = {}
        self._forked: set[Any] = set()

    def begin(self) -> None:
        """The first operations of a step."""
        self._resident.begin_step()
        self._filled.clear()
        self._forked.clear()
        if self._ahead is not None:
            self._foretell(self._ahead)
            for layer in range(min(self._ahead.distance, len(self._gates))):
                self._prefetch(layer, None)

    def end(self) -> None:
        """The last ones: side streams join, if they had work: a capture breaks where it waits for one that is not in
        it."""
        for stream in self._forked:
            torch.cuda.current_stream().wait_stream(stream)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        kept = self._kv.keys[layer], self._kv.values[layer], self._kv.lengths
        return decode_attention(q, k, v, *kept, options.scaling, options.window, options.sinks)

    def experts(self, layer: int, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self._routes is not None:
            ids = self._routes(layer, ids)
        if self._rows > 1:  # a single row that is not active is not stepped at all
            ids = torch.where(self._active[:, None], ids, module.num_experts)
        if self._ahead is not None:
            self._prefetch(layer + self._ahead.distance, hidden)
            if (filled := self._filled.pop(layer, None)) is not None:
                torch.cuda.current_stream().wait_event(filled)
        if self._rows > 1 or not self._resident.all_resident(layer):
            self._resident.resolve(layer, ids)
            self._resident.fill(layer)
        addresses = self._resident.addresses(layer)
        if self._overflows[layer]:
            addresses = self._overflow.bring(self._resident.layer(layer), ids)
        return self._product(layer, module, hidden, ids, weights, addresses)

    def _product(
        self, layer: int, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor, addresses: Tensor
    ) -> Tensor:
        table, row_of = self._resident.tables[layer]
        where = addresses, row_of, table, self._gates[layer]
        if self._rows <= FEW_ROWS:
            return few_product(hidden, ids, weights, *where)
        rows = torch.empty(ids.numel(), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        blocks = plan_blocks(ids, module.num_experts, BLOCK_TOKENS)
        grouped_rows(hidden, blocks, *where, rows)
        return combine(rows, ids, weights, module.num_experts)

    def _foretell(self, ahead: LookAhead) -> None:
        if ahead.foretold is None or all(map(self._resident.all_resident, range(len(self._gates)))):
            return
        if ahead.streams is None:
            ahead.foretold.begin(self._tokens, self._active)
            return
        with self._beside(ahead.streams.choosing, torch.cuda.current_stream()):
            ahead.foretold.begin(self._tokens, self._active)

    def _prefetch(self, layer: int, hidden: Tensor | None) -> None:
        ahead = self._ahead
        if ahead is None or layer >= len(self._gates) or self._resident.all_resident(layer):
            return
        if (streams := ahead.streams) is None:
            if (ids := self._guessed(ahead, layer, hidden)) is not None:
                self._resident.prefetch(layer, ids)
            return
        choosing, fills = streams.choosing, len(streams.filling)
        with self._beside(choosing, torch.cuda.current_stream()):
            if (ids := self._guessed(ahead, layer, hidden)) is None:
                return
            self._resident.choose(layer, ids)
        if hidden is not None:
            hidden.record_stream(choosing)  # its memory must not be another tensor's before the guess is made
        filling = streams.filling[layer % fills]
        with self._beside(filling, choosing):
            self._resident.fill(layer, fills)
            self._filled[layer] = filling.record_event()

    @contextmanager
    def _beside(self, stream: torch.cuda.Stream, after: torch.cuda.Stream) -> Iterator[None]:
        """On a side stream once ``after`` has done what it was given so far; ``end`` joins it."""
        stream.wait_stream(after)
        self._forked.add(stream)
        with torch.cuda.stream(stream):
            yield

    def _guessed(self, ahead: LookAhead, layer: int, hidden: Tensor | None) -> Tensor | None:
        ids = ahead.guess(layer, hidden)
        if ids is None:
            return None
        ids = ids[: self._rows]
        if len(ids) == 1:
            return ids
        nobody = len(self._resident.store.layers[layer].nbytes)
        return torch.where(self._active[:, None], ids, nobody)


class StreamedDecodePass:
    """A step whose rows want more experts of a layer than find room: missing ones stream past, as in a prefill.

    Runs as it is, not captured: the link takes far longer than the host.
    """

    def __init__(
        self,
        kv: KVRows,
        streamed: StreamedExperts,
        gates: Sequence[Gate],
        active: Tensor,
        rows: int,
        routes: Routes | None = None,
    ) -> None:
        self._kv, self._streamed, self._gates = kv, streamed, gates
        self._active, self._routes = active[:rows], routes

    def begin(self) -> None:
        # rows that have ended meet no experts; the pass waits for the device here in any case
        self._streamed.begin(int(self._active.sum()))

    def end(self) -> None:
        """Nothing is left to wait for."""

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        kept = self._kv.keys[layer], self._kv.values[layer], self._kv.lengths
        return decode_attention(q, k, v, *kept, options.scaling, options.window, options.sinks)

    def experts(self, layer: int, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self._routes is not None:
            ids = self._routes(layer, ids)
        return self._streamed.layer(layer, self._gates[layer], hidden, ids, weights, self._active)


def overflows(layers: Sequence[LayerRecords], plan: Sequence[Pools], rows: int, places: int) -> bool:
    """Whether ``rows`` tokens, more than one, are expected to meet more experts of some layer than it has slots and
    ``places`` for those without, if every token drew evenly; never where all have slots. One token's experts are read
    where they are."""
    if rows == 1:
        return False
    for layer, pools in zip(layers, plan, strict=True):
        experts, slots = len(layer.nbytes), sum(count for _, count in pools)
        met = experts * expected_coverage(experts, layer.top_k, rows)
        if slots < experts and met > slots + places:
            return True
    return False


class DecodeGraphs:
    """Steps of up to ``buckets[-1]`` rows. ``capture`` first; then set ``tokens``, ``positions`` and ``active`` and
    call ``step``: it runs rows ``[:bucket]``, leaves ``logits(bucket)`` and the greedy ``picked``, and makes everything
    ready for the next step with the picked tokens as input.

    Buckets that want more experts than find room stream them instead (``overflows``), with no graph. On the CPU
    the same operations run without graphs. One thread at a time.
    """

    def __init__(
        self,
        model: Any,
        kv: KVRows,
        resident: ResidentExperts,
        streamed: StreamedExperts,
        findings: Findings,
        buckets: Sequence[int] = BUCKETS,
        *,
        routes: Routes | None = None,
        ahead: LookAhead | None = None,
        compile_layers: bool = True,
    ) -> None:
        self.model, self.kv, self.device = model, kv, kv.lengths.device
        self.buckets = tuple(sorted(bucket for bucket in set(buckets) if bucket <= kv.rows))
        rows = self.buckets[-1]
        axes = (findings.position_axes,) if findings.position_axes else ()
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.positions = torch.zeros(*axes, rows, 1, dtype=torch.int64, device=self.device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.picked = torch.zeros(rows, dtype=torch.int64, device=self.device)
        gates, layers = findings.gates, resident.store.layers
        overflow = OverflowRoom(streamed.ring.places, max(len(layer.nbytes) for layer in layers))
        self._passes: dict[int, DecodePass | StreamedDecodePass] = {
            bucket: StreamedDecodePass(kv, streamed, gates, self.active, bucket, routes)
            if overflows(layers, resident.plan, bucket, overflow.places)
            else DecodePass(kv, resident, overflow, gates, self.tokens, self.active, bucket, routes, ahead)
            for bucket in self.buckets
        }
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        self._compile = compile_layers
        self.foretold = None if ahead is None else ahead.foretold
        self.uncounted_hits = 0
        """Experts used by single rows in layers that are resident for good, where no kernel runs that could count."""
        whole = (layer.top_k for index, layer in enumerate(layers) if resident.all_resident(index))
        self._whole_hits = sum(whole)

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds ``rows`` rows."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def capture(self, on_bucket: Callable[[int], None] | None = None) -> None:
        """Compile every bucket, and capture those with a graph; largest first, so that the smaller ones find room in
        its pool."""
        self.active.zero_()
        self.kv.lengths.zero_()
        if self.device.type != "cuda":
            return
        with passes.on_device(self.device):
            pool = torch.cuda.graph_pool_handle()
            # of this device, where one that is not named would be on the first that anything was captured on; one for
            # all graphs, for a pool gives what was freed only to the stream that had it
            side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            for bucket in reversed(self.buckets):
                if self.streams(bucket):
                    with self.compiled(bucket):
                        self._run(bucket)
                else:
                    self._capture(bucket, pool, side)
                if on_bucket is not None:
                    on_bucket(bucket)
        self.kv.lengths.zero_()

    def streams(self, bucket: int) -> bool:
        """Whether steps of ``bucket`` stream experts past instead of keeping them in slots."""
        return isinstance(self._passes[bucket], StreamedDecodePass)

    def step(self, bucket: int) -> None:
        """One token more for rows ``[:bucket]``; asynchronous on a GPU."""
        graph = self._graphs.get(bucket)
        if bucket == 1:
            self.uncounted_hits += self._whole_hits
        if graph is not None:
            graph.replay()
            return
        with self.compiled(bucket):
            self._run(bucket)

    def compiled(self, rows: int | None) -> AbstractContextManager[None]:
        """See ``compiled.compiled``; nothing on the CPU, or where compiling was not wanted."""
        layers = getattr(self.model.get_decoder(), "layers", None)
        if not self._compile or self.device.type != "cuda" or layers is None:
            return nullcontext()
        return compiled(layers, rows)

    def logits(self, bucket: int) -> Tensor:
        """``[bucket, vocabulary]`` of the last step of that bucket; overwritten by the next step of any."""
        return self._logits[bucket]

    def _capture(self, bucket: int, pool: Any, side: torch.cuda.Stream) -> None:
        with self.compiled(bucket):
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles kernels and lets libraries allocate what they keep
                    self._run(bucket)
            torch.cuda.current_stream(self.device).wait_stream(side)
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._run(bucket)
        self._graphs[bucket] = graph

    def _run(self, bucket: int) -> None:
        the_pass = self._passes[bucket]
        with passes.running(the_pass):
            the_pass.begin()
            outputs = self.model(
                input_ids=self.tokens[:bucket],
                position_ids=self.positions[..., :bucket, :],
                use_cache=True,
                **{cache_argument(self.model): PassThrough()},
            )
            the_pass.end()
            self._logits[bucket] = outputs.logits[:, -1]
            picked = self.picked[:bucket]
            torch.argmax(self._logits[bucket], dim=-1, out=picked)
            self.tokens[:bucket, 0].copy_(picked)
            # where nobody answers, positions would grow from request to request
            self.positions[..., :bucket, :].add_(self.active[:bucket, None])
            self.kv.lengths[:bucket].add_(self.active[:bucket])
