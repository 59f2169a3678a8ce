"""The process of `visar serve`: uvicorn on a socket, and an end that loses no image that was begun."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp

CONNECTIONS = 512  # open at a time; beyond it the answer is 503
LAST_WORDS = 10  # seconds for the answers that are on their way when all images are done


class Server(uvicorn.Server):
    """uvicorn that goes on answering while `drain` finishes, in a thread, what was begun; then it ends.

    `listens` is called as soon as it can be reached.
    """

    def __init__(self, app: ASGIApp, drain: Callable[[], object], listens: Callable[[], object] = lambda: None):
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none",
                limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=LAST_WORDS,
            )
        )  # fmt: skip
        self._drain, self._listens = drain, listens
        self._ending = False
        AppStatus.disable_automatic_graceful_drain()  # streams end with their images, not with the first signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listens()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end; a second one does not wait for it."""
        if self._ending:
            self.should_exit = self.force_exit = True
            return
        self._ending = True
        threading.Thread(target=self.end, name="visar drain").start()

    def end(self) -> None:
        """Drain, then end; blocks."""
        try:
            self._drain()
        finally:
            self.should_exit = True
