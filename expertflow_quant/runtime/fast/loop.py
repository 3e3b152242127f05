"""The fast runner: prompts in streamed passes, then steps of a captured graph until every answer has ended."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.models.seams import cache_argument
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.staging import StagingRing
from expertflow_quant.offload.stats import CacheStats
from expertflow_quant.runtime.answers import Sampling
from expertflow_quant.runtime.fast import passes
from expertflow_quant.runtime.fast.attention import PassThrough
from expertflow_quant.runtime.fast.decode import DecodeGraphs
from expertflow_quant.runtime.fast.prefill import PrefillPass
from expertflow_quant.runtime.fast.probe import Findings, positions_of
from expertflow_quant.runtime.fast.sampler import Sampler
from expertflow_quant.runtime.plain import StopTexts, moved
from expertflow_quant.runtime.prompts import Prompts
from expertflow_quant.runtime.stream import Cancellable, TokenQueue
from expertflow_quant.runtime.streamed import StreamedExperts


class FastRunner:
    """See ``runner.Runner``; built by ``build.build_fast``. ``graphs`` must have been captured."""

    def __init__(
        self,
        graphs: DecodeGraphs,
        resident: ResidentExperts,
        streamed: StreamedExperts,
        ring: StagingRing,
        findings: Findings,
        tokenizer: Any,
        end_ids: frozenset[int],
        prefill_tokens: int,
        routes: passes.Routes | None = None,
    ) -> None:
        self.graphs, self.resident, self.streamed, self.ring = graphs, resident, streamed, ring
        self.model, self.kv = graphs.model, graphs.kv
        self.device = graphs.device
        self.prefill_tokens: int | None = prefill_tokens
        self._findings, self._tokenizer, self._end_ids = findings, tokenizer, end_ids
        self._routes = routes
        self._broke_off = False

    @property
    def max_rows(self) -> int | None:
        return self.graphs.buckets[-1]

    @property
    def room(self) -> int | None:
        return self.kv.room

    @property
    def stats(self) -> CacheStats:
        """What was streamed past and what was kept together; ``layers`` has requests of captured steps alone.

        A pass that streams counts every expert that it computed: one from a slot is a hit, a streamed one a miss.
        """
        kept, past = self.resident.stats, self.streamed.total
        return replace(
            kept,
            hits=kept.hits + past.experts_resident + self.graphs.uncounted_hits,
            misses=kept.misses + past.experts_streamed,
            bytes_moved=kept.bytes_moved + past.bytes_streamed,
        )

    def reset_stats(self) -> None:
        self.resident.reset_stats()
        self.streamed.reset_total()
        self.graphs.uncounted_hits = 0

    @property
    def expert_bytes(self) -> int:
        return self.resident.store.nbytes

    @property
    def device_expert_bytes(self) -> int:
        """Slots and staging ring."""
        return self.resident.device_bytes + self.ring.device_bytes

    def run(
        self,
        batches: Sequence[Prompts],
        sampling: Sampling,
        streamer: TokenQueue | None = None,
        cancellable: Cancellable | None = None,
    ) -> list[list[int]]:
        """See ``runner.Runner``: the batches' prompts are read one batch a pass and answered together."""
        with passes.on_device(self.device), torch.inference_mode():
            return self._run(batches, sampling, streamer, cancellable)

    def _run(
        self,
        batches: Sequence[Prompts],
        sampling: Sampling,
        streamer: TokenQueue | None,
        cancellable: Cancellable | None,
    ) -> list[list[int]]:
        sampler = Sampler(sampling, self.device)
        if streamer is not None:
            streamer.put(batches[0].inputs["input_ids"])
        if self._broke_off:  # an expert may have been given a slot and its record never have come
            self.resident.preload()
        self._broke_off = True
        self.kv.lengths.zero_()
        first = 0
        for prompts in batches:
            logits = self.prefill(prompts, first)
            self.graphs.tokens[first : first + len(prompts), 0] = sampler.pick(logits)
            first += len(prompts)
        stop = StopTexts(self._tokenizer, sampling.stop, 0) if sampling.stop else None
        answers = _Answers(self.graphs, first, self._end_ids, stop, streamer, cancellable)
        rows = answers.finish(sampling, sampler)
        self._broke_off = False
        return rows

    def prefill(self, prompts: Prompts, first: int) -> Tensor:
        """Read ``prompts`` into rows ``first`` and on; logits ``[prompts, vocabulary]`` of their last tokens."""
        inputs = moved(prompts.inputs, self.device)
        padded = min(prompts.prompt_tokens) < prompts.width
        valid = inputs["attention_mask"].reshape(-1).bool() if padded else None
        rows = range(first, first + len(prompts))
        the_pass = PrefillPass(
            self.kv, self.streamed, self._findings.gates, rows, prompts.prompt_tokens, valid, self._routes
        )
        foretold = self.graphs.foretold
        self.streamed.begin(sum(prompts.prompt_tokens))
        with (
            passes.running(the_pass),
            self.graphs.compiled(None),
            _embeddings(self.model, foretold is not None and foretold.looks_at_pictures) as embeddings,
        ):
            positions = positions_of(self.model, inputs)
            cache = {cache_argument(self.model): PassThrough()}
            outputs = self.model(**inputs, position_ids=positions, **cache, use_cache=True, logits_to_keep=1)
        if foretold is not None:
            foretold.read(first, prompts.inputs, *embeddings)
        self.graphs.positions[..., first : first + len(prompts), :] = positions[..., -1:] + 1
        counts = torch.tensor(prompts.prompt_tokens, dtype=torch.int32)
        self.kv.lengths[first : first + len(prompts)] = counts.to(self.device)
        return outputs.logits[:, -1]


@contextmanager
def _embeddings(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """What the language model is given while this lasts, if it is ``wanted``."""
    found: list[Tensor] = []

    def note(module: Any, args: Any, named: dict[str, Any]) -> None:
        if isinstance(given := named.get("inputs_embeds"), Tensor):
            found.append(given)

    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True) if wanted else None
    try:
        yield found
    finally:
        if hook is not None:
            hook.remove()


class _Answers:
    """Rows ``[:rows]`` of ``graphs``, whose first tokens are chosen, until each has ended.

    The host reads a token while the device works on the next, so a row that ends is stepped once more in vain. Of
    several rows, those with a token of ``end_ids`` are known to the device too: that step sends them to no expert.
    """

    def __init__(
        self,
        graphs: DecodeGraphs,
        rows: int,
        end_ids: frozenset[int],
        stop: StopTexts | None,
        streamer: TokenQueue | None,
        cancellable: Cancellable | None,
    ) -> None:
        self._graphs, self._rows = graphs, rows
        self._end_ids, self._stop = end_ids, stop
        self._streamer, self._cancellable = streamer, cancellable
        self._answers: list[list[int]] = [[] for _ in range(rows)]
        self._open = [True] * rows
        self._on_cuda = graphs.device.type == "cuda"
        self._ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=graphs.device)

    def finish(self, sampling: Sampling, sampler: Sampler) -> list[list[int]]:
        graphs, rows = self._graphs, self._rows
        bucket = graphs.bucket(rows)
        graphs.active.zero_()
        graphs.active[:rows] = True
        for left in reversed(range(sampling.max_new_tokens)):
            read = self._reader(graphs.tokens[:rows, 0])
            if left:
                if rows > 1:  # a single row's step does not look whether it is active
                    graphs.active[:rows] &= (graphs.tokens[:rows] != self._ends).all(dim=1)
                graphs.step(bucket)
                if not sampler.greedy:
                    graphs.tokens[:rows, 0] = sampler.pick(graphs.logits(bucket)[:rows])
            if self._take(read()):
                break
        return self._answers

    def _reader(self, tokens: Tensor) -> Callable[[], list[int]]:
        """What gives ``tokens`` as they are now, however soon the device overwrites them."""
        if not self._on_cuda:
            now = tokens.tolist()
            return lambda: now
        kept = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        kept.copy_(tokens, non_blocking=True)
        done = torch.cuda.current_stream(self._graphs.device).record_event()

        def read() -> list[int]:
            done.synchronize()
            found: list[int] = kept.tolist()
            return found

        return read

    def _take(self, tokens: Sequence[int]) -> bool:
        """Add one token to every open answer; whether all have ended."""
        before = list(self._open)
        for row, token in enumerate(tokens):
            if self._open[row]:
                self._answers[row].append(token)
                if self._streamer is not None:
                    self._streamer.put_at(row, token)
                self._open[row] = not self._ended(row, token)
        if self._cancellable is not None and self._cancellable.event.is_set():
            return True
        if before != self._open and any(self._open):
            self._close()
        return not any(self._open)

    def _ended(self, row: int, token: int) -> bool:
        dropped = self._cancellable is not None and row in self._cancellable.rows
        return dropped or token in self._end_ids or bool(self._stop and self._stop.met(self._answers[row]))

    def _close(self) -> None:
        """The device may know of later ends already, so none is opened again."""
        still = torch.empty(self._rows, dtype=torch.bool, pin_memory=self._on_cuda)
        still.copy_(torch.tensor(self._open))
        self._graphs.active[: self._rows] &= still.to(self._graphs.device, non_blocking=True)
