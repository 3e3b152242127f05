"""What is foretold of a request before it is admitted: the path by which the token scheduler groups it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.models.seams import image_ids
from expertflow_quant.offload.policies.named import known
from expertflow_quant.offload.predict_paths import PathItem, PathPredictor
from expertflow_quant.offload.trace import PROMPT_IMAGE, PROMPT_TEXT
from expertflow_quant.runtime.caching import has_predictor
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.prompts import Message
from expertflow_quant.runtime.schedule import predicted_path, word_path

SCHEDULES = ("auto", "paths", "words", "arrival")


class Foreteller:
    """Paths of conversations by ``predictor``, or without one by their words. From any thread."""

    def __init__(self, engine: Engine, top_k: int, predictor: PathPredictor | None = None) -> None:
        if predictor is not None and predictor.basis is not None:
            raise ExpertFlowError(
                f"{predictor.name}: requests are grouped before their pictures are read: give --predictor a folder of "
                "one trained on ids, or use --schedule words"
            )
        self._engine, self._top_k, self._predictor = engine, top_k, predictor
        self.name = "words" if predictor is None else f"path ({predictor.name})"
        self._image_ids = torch.tensor(image_ids(engine.model.config), dtype=torch.int64)

    def __call__(self, messages: Sequence[Message]) -> Tensor:
        """bool [L, E], or [1, words]. Raises what ``Engine.generate`` raises of a conversation."""
        ids = self._engine.prompt_tokens(messages).inputs["input_ids"][0].cpu()
        image = torch.isin(ids, self._image_ids)
        if self._predictor is None:
            return word_path(ids[~image])
        kind = torch.where(image, PROMPT_IMAGE, PROMPT_TEXT)
        return predicted_path(self._predictor.logits_of(PathItem(ids, kind)), self._top_k)


def foreteller(engine: Engine, folder: Path, schedule: str, predictor: str | None = None) -> Foreteller | None:
    """What ``schedule`` asks for of ``engine``, whose checkpoint is ``folder``; None for order of arrival.

    "paths": by the trained predictor in the folder ``predictor``, or else the checkpoint's own; "words": without one;
    "auto": "paths" where there is a predictor, else "arrival". Grouping measured better than order of arrival with
    both (eval/results/schedule.json), with words on questions of a few kinds only. Raises ExpertFlowError for an
    unknown name or a predictor that is missing or of another model.
    """
    known("schedule", schedule, SCHEDULES)
    own = Path(predictor) if predictor is not None and Path(predictor).is_dir() else folder
    if schedule == "arrival" or (schedule == "auto" and not has_predictor(own)):
        return None
    layers = engine.model.expert_store.layers
    if schedule == "words":
        return Foreteller(engine, layers[0].top_k)
    trained = PathPredictor.load(own)
    if schedule == "auto" and trained.basis is not None:
        return None
    sizes = trained.model.sizes
    if [sizes.experts] * sizes.layers != [len(layer.nbytes) for layer in layers]:
        raise ExpertFlowError(
            f"{own} has a predictor of {sizes.layers} layers of {sizes.experts} experts, which is another model's: "
            "train one with `python -m calibration predictor`, or use --schedule arrival"
        )
    return Foreteller(engine, layers[0].top_k, trained)
