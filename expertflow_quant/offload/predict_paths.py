"""The trained predictor: ExpertFlow's encoder-decoder (path_model.py) with its file, over whole items.

A predictor lies in a folder, mostly the checkpoint's, as ``predictor.safetensors`` (weights in float16; ``center`` and
``basis`` of pictures) and ``predictor.json`` (format, version, sizes, how it was trained).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.path_model import PathBatch, PathModel, PathModelSizes
from expertflow_quant.offload.predictor import History, check_fits
from expertflow_quant.offload.sight import Basis, Sight
from expertflow_quant.offload.trace import GENERATED, PROMPT_IMAGE, RoutingTrace

FORMAT, VERSION = "expertflow-predictor", 1
WEIGHTS_FILE, SIZES_FILE = "predictor.safetensors", "predictor.json"
_TOGETHER = 32


@dataclass(frozen=True)
class PathItem:
    """One item: ``token_ids`` and ``kind`` int64 [n], prompt first; ``pictures`` float [image tokens, F] or none."""

    token_ids: Tensor
    kind: Tensor
    pictures: Tensor | None = None

    @property
    def prompt(self) -> int:
        """How many tokens the prompt has."""
        return int((self.kind != GENERATED).sum())


class PathPredictor:
    """``model`` is put into eval mode; ``basis`` of the pictures it was trained on, if it was; ``trained``: how, for
    the reader."""

    def __init__(self, model: PathModel, basis: Basis | None = None, trained: dict[str, Any] | None = None) -> None:
        if bool(model.sizes.features) != (basis is not None):
            raise ExpertFlowError(
                f"a model of {model.sizes.features} features for each image token must have a basis, and only then"
            )
        self.model, self.basis, self.trained = model.eval(), basis, dict(trained or {})
        self.name = "encoder-decoder, pictures" if basis is not None else "encoder-decoder, ids"

    def predict(self, history: History) -> Tensor:
        item = self._seen(PathItem(history.token_ids.long(), history.kind.long(), history.pictures))
        return self._scores([item])[0][history.at]

    def scores_for(self, trace: RoutingTrace, sight: Sight | None = None) -> Tensor:
        check_fits(self.name, (self.model.sizes.layers, self.model.sizes.experts), trace)
        items = [self._seen(item) for item in items_of(trace, self._fitting(sight, trace))]
        parts = [items[first : first + _TOGETHER] for first in range(0, len(items), _TOGETHER)]
        scores = [one for part in parts for one in self._scores(part)]
        return torch.cat(scores) if scores else torch.zeros(0, trace.layers, trace.num_experts)

    def logits_of(self, item: PathItem) -> Tensor:
        """float32 [n, L, E] of one item's tokens, before a sigmoid makes chances of them."""
        return self._scores([self._seen(item)])[0]

    def save(self, folder: Path | str) -> None:
        """Write both files into ``folder``."""
        folder = Path(folder)
        tensors = {name: value.to(torch.float16) for name, value in self.model.state_dict().items()}
        if self.basis is not None:
            tensors |= {"center": self.basis.center, "basis": self.basis.basis}
        head = {"format": FORMAT, "version": VERSION, "sizes": asdict(self.model.sizes), "trained": self.trained}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / WEIGHTS_FILE).write_bytes(save({name: value.contiguous() for name, value in tensors.items()}))
            (folder / SIZES_FILE).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ExpertFlowError(f"cannot write into {folder} ({error}): make room or choose another one") from error

    @classmethod
    def load(cls, folder: Path | str) -> "PathPredictor":
        """Read both files. Raises ExpertFlowError when they are missing, damaged or do not fit together."""
        folder = Path(folder)
        try:
            head = json.loads((folder / SIZES_FILE).read_text(encoding="utf-8"))
            if (head["format"], head["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {head['format']!r}, version {head['version']!r}")
            model = PathModel(PathModelSizes(**head["sizes"]))
            tensors = load_file(folder / WEIGHTS_FILE)
            basis = Basis(tensors.pop("center"), tensors.pop("basis")) if "basis" in tensors else None
            model.load_state_dict({name: value.float() for name, value in tensors.items()})
            return cls(model, basis, head["trained"])
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
            raise ExpertFlowError(
                f"{folder} holds no predictor that can be read ({error}): `python -m calibration predictor` makes one"
            ) from error

    def _fitting(self, sight: Sight | None, trace: RoutingTrace) -> Sight | None:
        """The sight that this model looks at. Pictures in another basis mean something else, so they are refused."""
        if self.basis is None:
            return None
        if sight is None or sight.basis is None:
            raise ExpertFlowError(
                f"{self.name} was trained on pictures: give a sight that holds them (`python -m calibration sight`)"
            )
        if not torch.equal(sight.basis.basis, self.basis.basis):
            raise ExpertFlowError(
                "the sight's pictures are in another basis than the predictor's: record it with --basis and the "
                "predictor's training sight"
            )
        return sight.check(trace)

    def _seen(self, item: PathItem) -> PathItem:
        return item if self.basis is not None else PathItem(item.token_ids, item.kind)

    def _scores(self, items: Sequence[PathItem]) -> list[Tensor]:
        """float32 [n, L, E] of each item."""
        with torch.no_grad():
            prompt, answer = self.model(batch_of(items, self.model.sizes))
        return [
            torch.cat([prompt[row, : item.prompt], answer[row, : len(item.token_ids) - item.prompt]]).float()
            for row, item in enumerate(items)
        ]


def items_of(trace: RoutingTrace, sight: Sight | None = None) -> list[PathItem]:
    """The items of a trace, with their pictures if ``sight`` has any."""
    pictures = None if sight is None else sight.pictures
    items, images = [], 0
    for item in range(trace.items):
        rows = trace.rows(item)
        kind = trace.kind[rows].long()
        count = int((kind == PROMPT_IMAGE).sum())
        own = None if pictures is None else pictures[images : images + count]
        items.append(PathItem(trace.token_ids[rows].long(), kind, own))
        images += count
    return items


def batch_of(items: Sequence[PathItem], sizes: PathModelSizes) -> PathBatch:
    """Items side by side, padded at the end. Ids that the model does not know count as its last one."""
    prompts = [item.prompt for item in items]
    shape = (len(items), max(prompts))
    answers = (len(items), max(len(item.token_ids) - prompt for item, prompt in zip(items, prompts)))
    prompt, prompt_kind, place = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    answer = torch.zeros(answers, dtype=torch.int64)
    prompt_real, answer_real = torch.zeros(shape, dtype=torch.bool), torch.zeros(answers, dtype=torch.bool)
    features = torch.zeros(*shape, sizes.features) if sizes.features else None
    for row, (item, count) in enumerate(zip(items, prompts)):
        ids, later = item.token_ids.clamp(max=sizes.tokens - 1), len(item.token_ids) - count
        prompt[row, :count], prompt_kind[row, :count] = ids[:count], item.kind[:count]
        prompt_real[row, :count] = True
        place[row, :count] = places_in_images(item.kind[:count])
        answer[row, :later], answer_real[row, :later] = ids[count:], True
        if features is not None and item.pictures is not None:
            features[row, :count][item.kind[:count] == PROMPT_IMAGE] = item.pictures
    return PathBatch(prompt, prompt_kind, place, prompt_real, answer, answer_real, features)


def places_in_images(kind: Tensor) -> Tensor:
    """int64 like ``kind``: of every image token its place in its run of image tokens, 0 for others."""
    image = kind == PROMPT_IMAGE
    at = torch.arange(len(kind))
    last_other = torch.where(image, -1, at).cummax(0).values if len(kind) else at
    return torch.where(image, at - last_other - 1, 0)
