"""The model that lmms-eval runs: ``lmms_eval --model expertflow --model_args pretrained=OUT,expert_memory=25%``.

Prompts, images, limits and stop texts are those of the harness's task (but see ``FILLED_IN``). Requests are
answered in the order given, so a run and our own evaluator with the same batch size make the same batches.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.progress import MofNCompleteColumn, Progress

from expertflow_quant.checkpoint.manifest import MANIFEST_FILE
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.harness.options import Batch, Options, batches
from expertflow_quant.runtime.answers import Generation
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.loading import load, load_plain
from expertflow_quant.runtime.prompts import PromptError

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
except ModuleNotFoundError as error:
    raise ExpertFlowError(
        f"lmms-eval's model class is not here (no module {error.name}): pip install 'expertflow-quant[lmms]'"
    ) from error

log = logging.getLogger(__name__)

OF_LOAD = (
    *("gpu_memory", "host_memory", "context", "rows", "fast"),
    *("policy", "predictor", "ahead", "usage", "slots"),
)
"""What ``expertflow_quant.load`` takes by name and a text can say."""


class ExpertFlow(lmms):
    """One of our checkpoints, or a plain transformers folder, as a simple model of lmms-eval.

    The arguments are those of ``expertflow_quant.load`` (``OF_LOAD`` among them), ``device`` by default a GPU where
    there is one; a plain folder takes ``device`` and ``dtype`` only. ``batch_size``: most requests at once. ``seed``:
    of tasks that sample. A request that the model cannot take (a prompt longer than its context) is answered with ""
    and kept in ``failures`` by task and document; any other error ends the run.

    Raises ExpertFlowError for an unusable argument, for more than one process, and what ``load`` raises.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        expert_memory: int | str = "100%",
        device: str = "auto",
        batch_size: int | str = 1,
        *,
        dtype: str | None = None,
        seed: int = 0,
        **of_load: Any,
    ) -> None:
        super().__init__()
        _refuse_processes()
        self.batch_size = _whole(batch_size)
        self.seed = seed
        self.failures: dict[tuple[str, int], str] = {}
        self.engine = _open(Path(pretrained), expert_memory, device, dtype, _known(of_load))

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """One ``GenerationResult`` per request, in order."""
        answers: list[Any] = []
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, disable=self.rank != 0) as progress:
            bar = progress.add_task("answers", total=len(requests))
            for batch in batches(requests, [request.args[1] for request in requests], self.batch_size):
                conversations = [self._conversation(request) for request in batch.requests]
                answers += map(_result, self._answers(batch, conversations))
                progress.update(bar, completed=len(answers))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: an engine tells what it would say, not how likely something else is."""
        _refuse("loglikelihood", "a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: every request is one turn."""
        _refuse("generate_until_multi_round", "a task of one round")

    def _conversation(self, request: Any) -> list[dict[str, Any]]:
        context, _, doc_to_visual, doc_id, task, split = request.args
        images = _images(doc_to_visual(self.task_dict[task][split][doc_id]), task)
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]

    def _answers(self, batch: Batch, conversations: Sequence[Any]) -> list[Generation | None]:
        try:
            return list(self._generate(batch.options, conversations, batch.first))
        except PromptError:
            alone = zip(batch.requests, conversations, strict=True)
            return [self._alone(batch, place, *pair) for place, pair in enumerate(alone)]

    def _alone(self, batch: Batch, place: int, request: Any, conversation: Any) -> Generation | None:
        try:
            return self._generate(batch.options, [conversation], batch.first + place)[0]
        except PromptError as error:
            self.failures[request.task_name, request.doc_id] = str(error)
            log.warning("%s document %s is answered with nothing: %s", request.task_name, request.doc_id, error)
            return None

    def _generate(self, options: Options, conversations: Sequence[Any], place: int) -> list[Generation]:
        return self.engine.generate(
            conversations,
            options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=self.seed + place if options.temperature else None,
            stop=options.stop,
        )


def _open(
    folder: Path, expert_memory: int | str, device: str, dtype: torch.dtype | str | None, ours: dict[str, Any]
) -> Engine:
    if (folder / MANIFEST_FILE).is_file():
        return load(folder, expert_memory, device, dtype, **ours)
    given = [*ours, *(["expert_memory"] if expert_memory != "100%" else [])]
    if given and folder.is_dir():
        raise ExpertFlowError(
            f"{folder} is no checkpoint of ours, and {', '.join(given)} divide a checkpoint's memory: leave them out, "
            "or quantize the model first"
        )
    return load_plain(folder, device, dtype)


def _known(of_load: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(of_load.keys() - set(OF_LOAD)):
        raise ExpertFlowError(
            f"model argument {', '.join(unknown)} is not known: give pretrained, expert_memory, device, batch_size, "
            f"dtype, seed, {', '.join(OF_LOAD)}"
        )
    return {name: value for name, value in of_load.items() if value is not None}


def _result(answer: Generation | None) -> Any:
    if answer is None:
        return GenerationResult("", TokenCounts(input_tokens=0, output_tokens=0))
    return GenerationResult(answer.text, TokenCounts(answer.prompt_tokens, answer.completion_tokens))


def _images(visuals: Any, task: str) -> list[Any]:
    """The pictures of a document, which a task gives as a list, a list in a list, one picture or None."""
    if visuals is None:
        return []
    if not isinstance(visuals, list | tuple):
        visuals = [visuals]
    if len(visuals) == 1 and isinstance(visuals[0], list | tuple):
        visuals = visuals[0]
    for visual in visuals:
        if not hasattr(visual, "convert"):
            raise ExpertFlowError(
                f"task {task} shows a {type(visual).__name__}, and this model reads pictures only: choose a task of "
                "pictures or text"
            )
    return list(visuals)


def _whole(batch_size: int | str) -> int:
    if str(batch_size).isdecimal() and int(batch_size) > 0:
        return int(batch_size)
    raise ExpertFlowError(
        f"batch_size {batch_size!r} is no number of requests: give a whole number of at least 1; it changes the last "
        "bits of sums, so it is never chosen by itself"
    )


def _refuse_processes() -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ExpertFlowError(
            f"{processes} processes were started, and a model here is one process's: start one, or one per device "
            "with --offset and --limit"
        )


def _refuse(what: str, remedy: str) -> NoReturn:
    raise ExpertFlowError(f"the harness asks for {what}, and this model answers generate_until only: choose {remedy}")
