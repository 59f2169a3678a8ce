"""`visar demo`: a page in the browser, on models that are loaded once."""

from __future__ import annotations

import argparse
import copy
import errno
import socket
from typing import TYPE_CHECKING

from visar.cli.common import load_model
from visar.errors import VisarError

if TYPE_CHECKING:
    from visar.generation.model import ImageModel

POOLS = 12  # of samplers and widths, whose rows stay in memory


def demo(options: argparse.Namespace) -> int:
    try:
        import gradio  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        what = "pip install gradio matplotlib, or visar with its extra, 'visar[demo]'"
        raise VisarError(f"The demo needs Gradio and matplotlib: {what}.") from error
    if not 0 <= options.port < 65536:
        raise VisarError(f"--port must be from 0 (any that is free) to 65535, not {options.port}.")
    port = _free_port(options.host, options.port)  # before models are loaded
    from visar.demo.app import build
    from visar.demo.guard import Access
    from visar.demo.models import named
    from visar.demo.requests import Limits
    from visar.demo.server import launch
    from visar.serving.engine import Engine

    access = Access(options.host, options.allowed_host, options.embed_in, options.trusted_proxy)
    models = named(_load(options))
    everybody = options.max_waiting + 1  # who come by --share have one address
    per_address = options.max_per_address or (everybody if options.share and not access.proxies else 1)
    limits = Limits(images=options.max_images, waiting=options.max_waiting, per_address=per_address)
    # Two samplers of a comparison must find room, and pools of a few samplers, each in several widths.
    engine = Engine(rows=max(limits.rows, limits.images), waiting=limits.waiting, pools=POOLS)
    page = build(models, limits, engine)
    try:
        url, shared = launch(page, access, limits, options.host, port, options.share)
    except (OSError, ValueError) as error:
        engine.close(drain=False)
        raise VisarError(f"The demo could not be served on {options.host}:{port}: {error}.") from error
    print(f"visar demo: {', '.join(models)} on {shared or url}", flush=True)
    try:
        page.block_thread()
    finally:
        engine.close(drain=False, timeout=60)
    return 0


def _load(options: argparse.Namespace) -> list[tuple[str, ImageModel]]:
    """The pipelines of all models that were asked for, by what they were called."""
    wanted = options.models or ["icons", "icons-mar"]
    each = []
    for name in wanted:
        own = copy.copy(options)
        own.model = name
        each.append(own)
    if len(wanted) > 1 and (options.vq or options.vae):
        raise VisarError("A published file is served alone, with its --vq or --vae; give one --model.")
    if len(wanted) > 1 and options.drafter:
        raise VisarError("A drafter is for one model; give one --model.")
    return [(own.model, load_model(own)) for own in each]


def _free_port(host: str, port: int) -> int:
    """The port, or for 0 one that is free; a `VisarError` where it cannot be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise VisarError(f"There is no address {host!r} to listen on; --host takes one of this machine.") from error
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise VisarError(f"{host} is no address of this machine; --host takes one that is.") from error
        why = error.strerror or str(error)
        raise VisarError(f"Cannot listen on {host}:{port} ({why}); use another --port.") from error
