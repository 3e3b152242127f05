"""Errors as OpenAI clients read them: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that is answered with an error. ``param`` names the field, ``code`` is for programs."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, object]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=dict(self.headers or {}))


_TYPES = {429: "rate_limit_error", 503: "server_error"}


def server_failed() -> ApiError:
    """What a client is told of a failure that is ours; the cause is in the server's log only."""
    return ApiError("the server failed to answer; its log says why", status=500, code="internal_error")


def unknown_model(name: str, served: str) -> ApiError:
    return ApiError(
        f"model {name!r} is not here; this server has {served!r}: ask for that one",
        status=404,
        param="model",
        code="model_not_found",
    )


def install_handlers(app: FastAPI) -> None:
    """Answer every failure of ``app``, routing included, in the one shape."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}; this server has {_routes(app)}"
        return ApiError(message, status=error.status_code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return server_failed().response()


def _routes(app: FastAPI) -> str:
    return ", ".join(sorted({str(getattr(route, "path", "")) for route in app.routes} - {""}))
