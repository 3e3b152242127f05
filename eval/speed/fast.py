"""The fast path under the trace's routes: captured decode steps, streamed prefill, with or without a look-ahead.

Random weights cannot be predicted, so a look-ahead is told by the trace: all of it (an oracle), or guesses drawn with
the recall and precision that a predictor was measured to have on the misses of a trained model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eval.speed.bench import Bench
from eval.speed.drawn import Drawn, Predictions
from eval.speed.ours import fast_spec
from eval.speed.systems import Counters, Setting, SystemSpec
from expertflow_quant.offload.path_model import PathModel, PathModelSizes
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.runtime.experts import LayerExperts, attach
from expertflow_quant.runtime.fast.build import FORETOLD_LAYERS, FastOptions, build_fast
from expertflow_quant.runtime.fast.decode import BUCKETS
from expertflow_quant.runtime.fast.foretold import FIRST, Foretold
from expertflow_quant.runtime.fast.lookahead import LookAhead
from expertflow_quant.runtime.fast.probe import Findings
from expertflow_quant.runtime.prompts import Prompts

AHEAD = FORETOLD_LAYERS
"""Layers that records are filled in before their own."""

MISSING = 0.3
"""Share of the experts wanted that an LRU misses at a quarter of them, about: wrong guesses are drawn in proportion."""


class TraceRunner:
    """See ``ours.Runner``. ``ahead``: fill in the records of the layer so many layers on, told by the trace itself, or
    by ``predictions`` drawn from it."""

    def __init__(self, bench: Bench, setting: Setting, ahead: int = 0, predictions: Predictions | None = None) -> None:
        made = bench.backbone()
        for layer, moe in enumerate(made.layers):
            attach(moe.module, LayerExperts(cache=None, layer=layer))
        made.model.expert_store = bench.store(bench.target.format)
        tokens, room = setting.batch * setting.prompt, setting.prompt + setting.warm + setting.new_tokens + 1
        captured = tuple(bucket for bucket in BUCKETS if bucket >= setting.batch)[:1] or BUCKETS
        options = FastOptions(setting.batch, room, tokens, captured=captured, policy=bench.policy)
        sizes = bench.routes
        rows = options.buckets[-1]
        self._step = torch.full((sizes.layers, rows, sizes.top_k), sizes.experts, device=bench.device)
        self._routes: Tensor = self._step
        self._drawn = None
        if predictions is not None:
            share = setting.budget_bytes / bench.expert_bytes
            self._drawn = Drawn(predictions, sizes, share, MISSING, bench.device)

        def make_ahead(findings: Findings) -> LookAhead:
            if self._drawn is not None:
                return _foretold(self._drawn.ids, ahead, made.model, options)
            return LookAhead(lambda layer, hidden: self._step[layer], ahead, bench.device)

        self._runner = build_fast(
            made.model,
            None,
            frozenset(),
            setting.budget_bytes,
            options,
            routes=lambda layer, ids: self._routes[layer, : ids.shape[0]],
            make_ahead=make_ahead if ahead else None,
        )
        self._setting = setting
        self._bucket = self._runner.graphs.bucket(setting.batch)
        self.expert_bytes = self._runner.expert_bytes
        self.device_expert_bytes = self._runner.device_expert_bytes

    def prefill(self, tokens: Tensor, routes: Tensor) -> None:
        rows, width = tokens.shape
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        self._routes = routes
        with torch.inference_mode():
            logits = self._runner.prefill(Prompts(inputs, (width,) * rows, (0,) * rows), 0)
            self._runner.graphs.tokens[:rows, 0] = logits.argmax(dim=-1)
            self._runner.graphs.active[:rows] = True

    def step(self, routes: Tensor) -> None:
        self._routes = self._step
        with torch.inference_mode():
            self._step[:, : routes.shape[1]].copy_(routes)
            if self._drawn is not None:
                self._drawn.draw(routes)
            self._runner.graphs.step(self._bucket)

    def counters(self) -> Counters:
        found = self._runner.stats
        return Counters(found.bytes_moved, found.hits, found.misses)

    def reset_counters(self) -> None:
        self._runner.reset_stats()

    def close(self) -> None:
        del self._runner


def _foretold(drawn: Tensor, ahead: int, model: Any, options: FastOptions) -> LookAhead:
    """``drawn`` guesses int64 ``[layers, 1, experts]``, there when a trained predictor's are; one of the usual size
    runs beside them for what it costs, and is not listened to."""
    layers, _, experts = drawn.shape
    sizes = PathModelSizes(model.config.get_text_config().vocab_size, layers, experts)
    predictor = PathPredictor(PathModel(sizes))
    rows, room = options.buckets[-1], options.room
    foretold = Foretold(predictor, [experts] * layers, rows, room, (), drawn.device)
    return LookAhead(lambda layer, hidden: None if layer < FIRST else drawn[layer], ahead, drawn.device, foretold)


def _made(ahead: int) -> Callable[[Bench, Setting], TraceRunner]:
    return lambda bench, setting: TraceRunner(bench, setting, ahead)


def _predicted(bench: Bench, setting: Setting) -> TraceRunner:
    return TraceRunner(bench, setting, AHEAD, Predictions.measured())


OURS: tuple[SystemSpec, ...] = (
    fast_spec(_made(0), "graph", "ours: graph"),
    fast_spec(
        _predicted, "graph-predicted", f"ours: graph, guesses {AHEAD} layers ahead, as good as a predictor's", True
    ),
    fast_spec(_made(AHEAD), "graph-oracle", f"ours: graph, told {AHEAD} layers ahead", True),
)
