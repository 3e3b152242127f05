"""The HTTP application: POST /v1/chat/completions, GET /v1/models, /v1/models/{id}, /health, /metrics."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from expertflow_quant.serve.chat import Chat
from expertflow_quant.serve.errors import install_handlers, unknown_model
from expertflow_quant.serve.limits import Limits
from expertflow_quant.serve.line import Batching
from expertflow_quant.serve.metrics import Metrics
from expertflow_quant.serve.queue import RequestQueue
from expertflow_quant.serve.replies import model_card
from expertflow_quant.serve.work import AnswerEngine


def create_app(
    engine: AnswerEngine, model_name: str, limits: Limits | None = None, batching: Batching | None = None
) -> FastAPI:
    """An application that answers for ``engine`` under the name ``model_name``, a BatchEngine where ``batching`` has
    more than one row.

    The engine answers in one thread only. The worker starts and stops with the application's lifespan.
    """
    limits = limits or Limits()
    batching = batching or Batching()
    metrics = Metrics(lambda: engine.stats, lambda: queue.waiting)
    queue = RequestQueue(engine, limits.max_queue, batching.rows, batching.patience, metrics.batch_ended)
    chat = Chat(queue, metrics, model_name, limits, batching.foretell)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue.start()
        yield
        queue.stop()

    app = FastAPI(title="expertflow-quant", lifespan=lifespan, docs_url=None, redoc_url=None)
    install_handlers(app)
    _add_model_routes(app, model_name, int(time.time()))
    _add_state_routes(app, queue, metrics, model_name, limits)
    app.post("/v1/chat/completions", response_model=None)(chat.answer)
    return app


def _add_model_routes(app: FastAPI, model_name: str, created: int) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [model_card(model_name, created)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        if name != model_name:
            raise unknown_model(name, model_name)
        return model_card(model_name, created)


def _add_state_routes(app: FastAPI, queue: RequestQueue, metrics: Metrics, model_name: str, limits: Limits) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        state = {
            "status": "ok" if queue.alive else "stopped",
            "model": model_name,
            "running": queue.running,
            "waiting": queue.waiting,
            "max_queue": limits.max_queue,
        }
        return JSONResponse(state, status_code=200 if queue.alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)
