"""The page on a port of this machine, behind its guard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from gradio import Blocks
from starlette.middleware import Middleware

from visar.demo.app import HEAD, theme, written
from visar.demo.guard import Access, Guard
from visar.demo.requests import Limits
from visar.demo.visitors import Visitors

CONNECTIONS = 512  # open at a time; a machine allows a process 1,024 files or more


def launch(page: Blocks, access: Access, limits: Limits, host: str, port: int, share: bool = False) -> tuple[str, str]:
    """Serve a page until it is closed: its address here, and its public one ("" without `share`).

    Raises `OSError` and `ValueError`, as Gradio does.
    """
    guard = Middleware(Guard, page=page, access=access, visitors=Visitors(page, limits))
    with _trusting(access.proxies):
        _, url, shared = page.launch(
            server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True,
            theme=theme(), css=written("page.css"), js=written("page.js"), head=HEAD, footer_links=[],
            max_threads=limits.waiting + limits.rows, ssr_mode=False, mcp_server=False,
            max_file_size=0, enable_monitoring=False,  # no uploads, no list of what others do
            state_session_capacity=limits.sessions, app_kwargs={"middleware": [guard], "openapi_url": None},
        )  # fmt: skip
    page.server.config.limit_concurrency = CONNECTIONS  # beyond it the answer is 503
    page._queue.pending_messages_per_session.max_size = limits.sessions
    if shared:
        access.hosts = {*access.hosts, str(urlsplit(shared).hostname)}
    return url, shared or ""


@contextmanager
def _trusting(proxies: Sequence[str]) -> Iterator[None]:
    """The server that starts within trusts these proxies; left alone it would trust whoever is on this machine."""
    name = "FORWARDED_ALLOW_IPS"  # read by uvicorn, to which Gradio passes no option
    before = os.environ.get(name)
    os.environ[name] = ",".join(proxies)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
