"""A listening socket first, then a server on it: a port that is taken is known before a model is loaded."""

import contextlib
import socket

import uvicorn
from fastapi import FastAPI

from expertflow_quant.formats.errors import ExpertFlowError

STOP_SECONDS = 5
"""How long requests in work may go on after Ctrl-C."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host``:``port``; port 0 takes any free one. Who connects before the server
    runs is answered then. ExpertFlowError when the port cannot be had."""
    if not 0 <= port <= 65535:
        raise ExpertFlowError(f"port {port} is not between 0 and 65535: choose another with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # until somebody listens, another process may bind the same port too
    except OSError as error:
        raise ExpertFlowError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --host or --port; "
            "--port 0 takes any free one"
        ) from None
    return listener


def address(listener: socket.socket) -> str:
    """The URL that clients use as base_url."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def is_private(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    host = listener.getsockname()[0]
    return host.startswith("127.") or host == "::1"


def run(app: FastAPI, listener: socket.socket, log_level: str = "info") -> None:
    """Serve until Ctrl-C or SIGTERM; answers in work get ``STOP_SECONDS`` to end."""
    config = uvicorn.Config(app, log_level=log_level, lifespan="on", timeout_graceful_shutdown=STOP_SECONDS)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
