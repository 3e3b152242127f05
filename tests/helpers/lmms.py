"""lmms-eval for tests: the real one where it is installed, else a stand-in with the same contract; and requests."""

import abc
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
MODULE = "expertflow_quant.harness.lmms"
SPLIT = "test"


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


class Base(abc.ABC):
    """What lmms-eval 0.7.3 asks of a simple model, and what it gives one."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


STAND_IN: dict[str, dict[str, Any]] = {
    "lmms_eval": {},
    "lmms_eval.api": {},
    "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
    "lmms_eval.api.model": {"lmms": Base},
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
}


def provide(patch: pytest.MonkeyPatch) -> None:
    """Make ``lmms_eval`` importable, as far as our model needs it, and our model's module unread."""
    if not INSTALLED:
        for name, content in STAND_IN.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, MODULE, raising=False)


def model_module(patch: pytest.MonkeyPatch) -> Any:
    """``expertflow_quant.harness.lmms``, read with what ``provide`` gives."""
    provide(patch)
    return importlib.import_module(MODULE)


@dataclass
class Request:
    """One of lmms-eval's requests to a simple model."""

    context: str
    settings: dict[str, Any]
    doc_id: int
    task_name: str = "charts"
    visuals: Any = field(default=lambda doc: [doc["image"]])

    @property
    def args(self) -> tuple[Any, ...]:
        return self.context, self.settings, self.visuals, self.doc_id, self.task_name, SPLIT
