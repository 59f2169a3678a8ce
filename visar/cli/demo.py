"""`visar demo`: a page in the browser, on models that are loaded once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from visar.cli.common import bound, each_model, load_model
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
    with bound(options.host, options.port) as listener:  # before models are loaded
        port = int(listener.getsockname()[1])
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
    return [(own.model, load_model(own)) for own in each_model(options, ["icons", "icons-mar"])]
