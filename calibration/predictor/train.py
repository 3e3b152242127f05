"""Training the encoder-decoder of paths (expertflow_quant/offload/path_model.py) on recorded traces.

As ExpertFlow publishes it: AdamW, linear warm-up, one item in ten held out, binary cross-entropy on paths. What differs
was measured on the shipped model (calibration/predictor/README.md): d_model 64 and d_ff 256 with a rate that falls to
nearly zero, so that a few minutes of one core are enough.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.path_model import PathModel, PathModelSizes
from expertflow_quant.offload.predict_paths import PathItem, PathPredictor, batch_of, items_of
from expertflow_quant.offload.predictor import best
from expertflow_quant.offload.sight import Basis, Sight
from expertflow_quant.offload.trace import RoutingTrace

LOSSES = ("bce", "softmax")
_LAST_SHARE, _CLIP, _DECAY = 0.02, 1.0, 0.01


@dataclass(frozen=True)
class Settings:
    """How to train: ``steps`` of ``batch`` items; ``rate`` is the highest learning rate, reached after ``warmup``
    steps; ``generated`` is how much a generated token counts in the loss, where a prompt's counts 1."""

    width: int = 64
    inner: int = 256
    heads: int = 4
    encoder_layers: int = 3
    decoder_layers: int = 2
    loss: str = "bce"
    rate: float = 2e-3
    warmup: int = 100
    steps: int = 4000
    batch: int = 8
    generated: float = 1.0
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ExpertFlowError(f"loss {self.loss!r} is not known: use {' or '.join(LOSSES)}")
        if self.steps < 1 or self.batch < 1 or not 0 < self.held_out < 1:
            raise ExpertFlowError(
                f"{self.steps} steps of {self.batch} items with {self.held_out} held out: steps and items must be at "
                "least 1, the share above 0 and below 1"
            )
        if not (0 < self.generated < math.inf):
            raise ExpertFlowError(f"generated tokens counting {self.generated} times: give a number above 0")


@dataclass
class Trained:
    """The predictor, its recall at top_k on the held-out items and on their generated tokens (none: None), and the loss
    over the last tenth of the steps."""

    predictor: PathPredictor
    recall: float
    generated_recall: float | None
    loss: float
    seconds: float
    items: tuple[int, int]
    curve: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """An item with its ``paths`` bool [n, L, E]."""

    item: PathItem
    paths: Tensor


def train(
    traces: Sequence[tuple[RoutingTrace, Sight | None]],
    settings: Settings | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train on ``traces``, with pictures where every one of them has a sight that holds some.

    Raises ExpertFlowError for traces of different models, bases that differ, or too few items.
    """
    settings, begun = settings or Settings(), time.perf_counter()
    basis = common_basis([sight for _, sight in traces])
    train_set, held = split(examples(traces, basis is not None), settings)
    torch.manual_seed(settings.seed)
    model = PathModel(sizes_for([trace for trace, _ in traces], settings, basis))
    losses = _fit(model, train_set, settings, progress)
    predictor = PathPredictor(model, basis)
    tail = losses[-max(1, len(losses) // 10) :]
    found = Trained(
        predictor,
        *recalls_of(predictor, held, traces[0][0].top_k),
        sum(tail) / len(tail),
        time.perf_counter() - begun,
        (len(train_set), len(held)),
        losses,
    )
    predictor.trained = {
        **{name: getattr(settings, name) for name in ("loss", "rate", "warmup", "steps", "batch", "generated", "seed")},
        "tasks": sorted({task for trace, _ in traces for task in trace.tasks}),
        "items": len(train_set),
        "held_out_items": len(held),
        "held_out_recall_at_k": round(found.recall, 4),
        "held_out_generated_recall_at_k": found.generated_recall and round(found.generated_recall, 4),
    }
    return found


def common_basis(sights: Sequence[Sight | None]) -> Basis | None:
    """The basis of the pictures in all of them, None where one has none. Raises ExpertFlowError where they differ."""
    bases = [None if sight is None else sight.basis for sight in sights]
    if any(basis is None for basis in bases):
        return None
    if any(not torch.equal(basis.basis, bases[0].basis) for basis in bases if basis and bases[0]):
        raise ExpertFlowError(
            "the sights of these traces have pictures in different bases: record all with --basis and the first one"
        )
    return bases[0]


def examples(traces: Sequence[tuple[RoutingTrace, Sight | None]], pictures: bool) -> list[Example]:
    """Every item of the traces. Raises ExpertFlowError when they are not of one model."""
    found: list[Example] = []
    sizes = {(trace.layers, trace.num_experts, trace.top_k) for trace, _ in traces}
    if len(sizes) != 1:
        raise ExpertFlowError(f"traces of several models (layers, experts, top_k: {sorted(sizes)}): give one's only")
    for trace, sight in traces:
        paths = trace.paths()
        items = items_of(trace, sight.check(trace) if pictures and sight is not None else None)
        found += [Example(item, paths[trace.rows(number)]) for number, item in enumerate(items)]
    return found


def split(found: list[Example], settings: Settings) -> tuple[list[Example], list[Example]]:
    """Items to train on and items held out, drawn by the seed."""
    count = round(len(found) * settings.held_out)
    if not 0 < count < len(found):
        raise ExpertFlowError(f"{len(found)} items cannot be split {settings.held_out:g} to hold some out: record more")
    order = list(range(len(found)))
    random.Random(settings.seed).shuffle(order)
    return [found[at] for at in order[count:]], [found[at] for at in order[:count]]


def sizes_for(traces: Sequence[RoutingTrace], settings: Settings, basis: Basis | None) -> PathModelSizes:
    """Sizes that fit the traces; one more id stands for all that are not in them."""
    return PathModelSizes(
        tokens=max(int(trace.token_ids.max()) for trace in traces) + 2,
        layers=traces[0].layers,
        experts=traces[0].num_experts,
        width=settings.width,
        inner=settings.inner,
        heads=settings.heads,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers,
        features=0 if basis is None else basis.basis.shape[1],
    )


def path_loss(logits: Tensor, paths: Tensor, loss: str, weight: Tensor | None = None) -> Tensor:
    """Mean over tokens [n, L, E], each counted ``weight`` [n] times: of binary cross-entropies, or of softmax
    cross-entropies with used experts alike."""
    used = paths.float()
    if loss == "bce":
        each = F.binary_cross_entropy_with_logits(logits, used, reduction="none").mean((1, 2))
    else:
        each = -(logits.log_softmax(-1) * used / used.sum(-1, keepdim=True)).sum(-1).mean(1)
    return each.mean() if weight is None else (each * weight).sum() / weight.sum()


def recalls_of(predictor: PathPredictor, held: Sequence[Example], top_k: int) -> tuple[float, float | None]:
    """Share of the used experts that are among the top_k of highest score, over all tokens and layers, and over those
    of generated tokens."""
    hits, used = ([0, 0], [0, 0])
    for example in held:
        found = best(predictor._scores([example.item])[0], top_k) & example.paths
        for at, first in enumerate((0, example.item.prompt)):
            hits[at] += int(found[first:].sum())
            used[at] += int(example.paths[first:].sum())
    return hits[0] / used[0], hits[1] / used[1] if used[1] else None


def _fit(
    model: PathModel, found: Sequence[Example], settings: Settings, progress: Callable[[int, int], None]
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, settings))
    losses: list[float] = []
    model.train()
    for some in _batches(found, settings):
        batch = batch_of([example.item for example in some], model.sizes)
        prompt, answer = model(batch)
        logits = torch.cat([prompt[batch.prompt_real], answer[batch.answer_real]])
        prompts = [example.paths[: example.item.prompt] for example in some]
        answers = [example.paths[example.item.prompt :] for example in some]
        weight = torch.ones(len(logits))
        weight[len(logits) - sum(map(len, answers)) :] = settings.generated
        loss = path_loss(logits, torch.cat(prompts + answers), settings.loss, weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        progress(len(losses), settings.steps)
    return losses


def rate_share(step: int, settings: Settings) -> float:
    """The share of the highest rate: linear warm-up, then a linear fall."""
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    return warm * max(_LAST_SHARE, 1 - step / settings.steps)


def _batches(found: Sequence[Example], settings: Settings) -> Iterator[list[Example]]:
    """``steps`` batches, every item once before any comes again."""
    generator, waiting = random.Random(settings.seed), list[Any]()
    for _ in range(settings.steps):
        if not waiting:
            waiting = list(found)
            generator.shuffle(waiting)
        yield waiting[: settings.batch]
        waiting = waiting[settings.batch :]
