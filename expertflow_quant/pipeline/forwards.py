"""Where a model that is observed asks what its experts answer, and forwards that wait there.

Usually (``replay``) a forward is run from block to block and answered at once. Where a model's blocks cannot be
run apart, all samples meet instead: each batch's forward runs on a thread of its own that waits inside the
experts call until it is told the answer; threads serve as coroutines here, and what lies on their stacks stays
in memory. The model runs as it is; nothing needs to know what lies between two MoE layers.

On the CPU as many forwards run at a time as torch has threads, each on one thread alone: were torch to give
each its own pool, the waiting pools would slow down everything else threefold.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertflow_quant.formats.errors import ExpertFlowError

EXPERTS_FUNCTION = "expertflow-observe"
_RUNNING = threading.local()


@dataclass(frozen=True)
class ExpertsCall:
    """A forward at an MoE layer: inputs ``[T, H]``, ids ``[T, k]``, affinities ``[T, k]``, router scores
    ``[T, E]``."""

    module: nn.Module
    hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    scores: Tensor | None


class Observer(Protocol):
    """What watches the forward that runs on this thread; ``scores``: the router's, of the next experts call."""

    scores: Tensor | None

    def answer(self, call: ExpertsCall) -> Tensor:
        """What the experts answer, ``[T, H]``."""


@contextlib.contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Forwards on this thread are watched by ``observer`` for as long as this lasts."""
    _RUNNING.observer = observer
    try:
        yield
    finally:
        del _RUNNING.observer


class _Abandoned(BaseException):
    """Ends a forward that is no longer needed; no BaseException handler of a model may swallow it."""


class Forward(threading.Thread):
    """One forward of ``model`` over ``make_batch()``; starts to run at the first ``resume``.

    ``alone``: torch works on this thread only, without a pool of its own.
    """

    def __init__(
        self, model: Callable[..., Any], make_batch: Callable[[], dict[str, Any]], alone: bool = False
    ) -> None:
        super().__init__(daemon=True)
        self.call: ExpertsCall | None = None
        self.scores: Tensor | None = None
        self.batch: dict[str, Any] = {}
        self._model, self._make_batch, self._alone = model, make_batch, alone
        self._answer: Tensor | None = None
        self._error: BaseException | None = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)

    def resume(self, answer: Tensor | None = None) -> None:
        """Runs on to the next experts call (then in ``call``) or the end (``call`` is None). Raises what
        it raised."""
        self._answer = answer
        if not self.is_alive():
            self.start()
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def answer(self, call: ExpertsCall) -> Tensor:
        """Called on the forward's own thread: waits for the experts' answer ``[T, H]``."""
        self.call = call
        self._paused.release()
        self._go.acquire()
        if self._answer is None:
            raise _Abandoned
        self.call = None
        return self._answer

    def abandon(self) -> None:
        """Ends the forward where it waits."""
        if self.is_alive():
            self.resume(None)
            self.join()

    def run(self) -> None:
        self._go.acquire()
        try:
            if self._alone:
                torch.set_num_threads(1)
            with torch.no_grad(), observed_by(self):
                self.batch = self._make_batch()
                self._model(**self.batch, use_cache=False)
        except _Abandoned:
            pass
        except BaseException as error:  # handed to whoever resumed this forward
            self._error = error
        finally:
            self.call = None
            self._paused.release()


def experts_forward(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls for the experts of a model that is being observed."""
    observer = current_observer()
    scores, observer.scores = observer.scores, None
    return observer.answer(ExpertsCall(module, hidden, top_k_index, top_k_weights, scores))


def watch_router(router: nn.Module, experts: int) -> Any:
    """Notes the scores ``[T, experts]`` that a router computes, for the experts call that follows it."""

    def note(module: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        for value in outputs:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] == experts:
                current_observer().scores = value.reshape(-1, experts)
                return

    return router.register_forward_hook(note)


class Forwards:
    """The forwards of all batches of a model, on the CPU several at a time."""

    def __init__(self, model: Any, batches: Sequence[Callable[[], dict[str, Any]]], device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self._at_a_time = self._threads if device.type == "cpu" else 1
        self.all = [Forward(model, make_batch, alone=device.type == "cpu") for make_batch in batches]

    def resume(self, answers: Mapping[Forward, Tensor | None]) -> None:
        """Brings these forwards to their next experts call or end. Raises what the first of them raised."""
        with ThreadPoolExecutor(self._at_a_time) as pool:
            for done in [pool.submit(forward.resume, answer) for forward, answer in answers.items()]:
                done.result()

    def close(self) -> None:
        """Ends all forwards where they are."""
        for forward in self.all:
            forward.abandon()
        torch.set_num_threads(self._threads)  # new threads begin with the number that was set last


def current_observer() -> Observer:
    """What watches the forward that runs on this thread."""
    observer: Observer | None = getattr(_RUNNING, "observer", None)
    if observer is None:
        raise ExpertFlowError(
            f"a model prepared with {EXPERTS_FUNCTION!r} only runs while it is observed: load it anew to use it"
        )
    return observer


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, experts_forward)
