"""One chat request from its bytes to its last event: check, queue, answer. Who goes away frees the worker."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.serve.convert import chat_messages, sampling
from expertflow_quant.serve.errors import ApiError, server_failed, unknown_model
from expertflow_quant.serve.limits import Limits
from expertflow_quant.serve.metrics import Metrics
from expertflow_quant.serve.queue import QueueFull, RequestQueue
from expertflow_quant.serve.replies import Reply
from expertflow_quant.serve.schema import ChatRequest, parse_chat_request
from expertflow_quant.serve.work import Cancelled, ChatMessage, Delta, Done, Event, Failed, Job, Stopped

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Chat:
    """The handler of /v1/chat/completions."""

    def __init__(
        self,
        queue: RequestQueue,
        metrics: Metrics,
        model_name: str,
        limits: Limits,
        foretell: Callable[[Sequence[ChatMessage]], Tensor] | None = None,
    ) -> None:
        self._queue, self._metrics, self._model_name, self._limits = queue, metrics, model_name, limits
        self._foretell = foretell

    async def answer(self, request: Request) -> Response:
        """A completion, whole or as a stream. A stream's headers wait for its first token, so that whatever
        fails before that is an ordinary error with its own status."""
        try:
            asked = self._check(request, await _body(request, self._limits.max_body_bytes))
            return await self._answer(request, asked)
        except ApiError as error:
            self._metrics.ended(_outcome(error.status))
            raise
        except (Cancelled, ClientDisconnect):
            self._metrics.ended("cancelled")
            return Response(status_code=499)

    def _check(self, request: Request, body: bytes) -> ChatRequest:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(f"content-type is {kind or 'missing'!r}: send application/json", status=415)
        asked = parse_chat_request(body)
        if asked.model != self._model_name:
            raise unknown_model(asked.model, self._model_name)
        return asked

    async def _answer(self, request: Request, asked: ChatRequest) -> Response:
        job, events = await self._enqueue(asked)
        watcher = asyncio.create_task(self._cancel_when_gone(request, job))
        answer = _Answer(job, events, self._metrics, lambda: self._leave(job, watcher))
        wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
        reply = Reply(self._model_name, wants_usage)
        if not asked.stream:
            text, done = await answer.whole()
            return JSONResponse(reply.whole(text, done))
        chunks = answer.stream(reply, await answer.first())
        return StreamingResponse(chunks, media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def _enqueue(self, asked: ChatRequest) -> tuple[Job, "asyncio.Queue[Event]"]:
        born, drawn = time.monotonic(), sampling(asked, self._limits)
        try:
            self._queue.take_place()
        except QueueFull as full:
            wait = {"Retry-After": str(full.retry_after)}
            raise ApiError(str(full), status=429, code="queue_full", headers=wait) from None
        try:
            messages, path = await run_in_threadpool(self._read, asked)
        except BaseException:
            self._queue.give_back()
            raise
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = Job(messages, drawn, _deliver_to(asyncio.get_running_loop(), events), born, path)
        self._queue.submit(job)
        return job, events

    def _read(self, asked: ChatRequest) -> tuple[list[ChatMessage], Tensor | None]:
        """The messages, and the path that is foretold of them; slow."""
        messages = chat_messages(asked, self._limits)
        if self._foretell is None:
            return messages, None
        try:
            return messages, self._foretell(messages)
        except ExpertFlowError:  # a prompt that is refused; its answer will say so
            return messages, None

    async def _cancel_when_gone(self, request: Request, job: Job) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._queue.cancel(job)

    def _leave(self, job: Job, watcher: "asyncio.Task[None]") -> None:
        watcher.cancel()
        self._queue.cancel(job)


class _Answer:
    """The events of one job, read once. Whoever stops reading, for whatever reason, has left."""

    def __init__(self, job: Job, events: "asyncio.Queue[Event]", metrics: Metrics, leave: Callable[[], None]) -> None:
        self._job, self._events, self._metrics, self._leave = job, events, metrics, leave

    async def whole(self) -> tuple[str, Done]:
        pieces = []
        try:
            while isinstance(event := await self._next(), Delta):
                pieces.append(event.text)
        finally:
            self._leave()
        self._record(event)
        return "".join(pieces), event

    async def first(self) -> Delta | Done:
        try:
            return await self._next()
        except BaseException:
            self._leave()
            raise

    async def stream(self, reply: Reply, event: Delta | Done) -> AsyncIterator[bytes]:
        outcome = "cancelled"
        try:
            yield reply.opening()
            while isinstance(event, Delta):
                if event.text:
                    yield reply.piece(event.text)
                event = await self._next()
            outcome = ""
            self._record(event)
            yield reply.ending(event)
        except ApiError as error:
            outcome = _outcome(error.status)
            yield reply.failure(error)
        except Cancelled:
            pass
        finally:
            self._leave()
            if outcome:
                self._metrics.ended(outcome)

    async def _next(self) -> Delta | Done:
        event = await self._events.get()
        if isinstance(event, Failed):
            raise _as_told(event.error)
        return event

    def _record(self, done: Done) -> None:
        born, first = self._job.born, self._job.first_token
        self._metrics.answered(done, time.monotonic() - born)
        if first is not None:
            self._metrics.first_token(first - born)


def _as_told(error: Exception) -> Exception:
    if isinstance(error, Cancelled):
        return error
    if isinstance(error, Stopped):
        return ApiError(f"{error}: ask again when it is back", status=503, code="stopped")
    if isinstance(error, ExpertFlowError):
        return ApiError(str(error), code="invalid_request")
    return server_failed()


def _outcome(status: int) -> str:
    if status == 429:
        return "busy"
    return "refused" if status < 500 else "failed"


def _deliver_to(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event]") -> Callable[[Event], None]:
    def deliver(event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    return deliver


async def _body(request: Request, most: int) -> bytes:
    too_large = ApiError(f"the request's body is larger than {most} bytes: send smaller images", status=413)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise too_large
    return bytes(data)
