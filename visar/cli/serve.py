"""`visar serve`: OpenAI's images API over models that are loaded once."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

from visar.cli.common import bound
from visar.cli.served import keys_of, models_of, most_images
from visar.errors import VisarError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(options: argparse.Namespace) -> int:
    require_server()
    for name, value in (("--replicas", options.replicas), ("--ray-address", options.ray_address)):
        if value is not None and not options.ray:
            raise VisarError(f"{name} is of --ray, which is not given.")
    keys, most = keys_of(options.api_key_file), most_images(options)
    with bound(options.host, options.port) as listener:  # before models are loaded
        if not keys and options.host not in LOOPBACK:
            _say("note: without --api-key-file everybody who reaches this address may use it")
        if not options.ray:
            return _serve(options, keys, most, listener)
        port = listener.getsockname()[1]
    from visar.cli.serve_on_ray import run

    return run(options, keys, port)


def require_server() -> None:
    """Raise `VisarError` without the packages of a server."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        what = "pip install fastapi uvicorn sse-starlette prometheus-client, or visar with its extra, 'visar[serve]'"
        raise VisarError(f"The server needs FastAPI and three small packages: {what}.") from error


def _serve(options: argparse.Namespace, keys: list[str], most: int, listener: Any) -> int:
    from visar.serving.access import Access
    from visar.serving.app import build
    from visar.serving.engine import Engine
    from visar.serving.gate import Keys
    from visar.serving.metrics import EngineCollector, Metrics
    from visar.serving.replica import Replica
    from visar.serving.server import Server

    access = Access(options.host, options.allowed_host)
    models = models_of(options)
    engine = Engine(rows=options.rows, waiting=options.waiting)
    replica = Replica(models, engine)
    metrics = Metrics()
    metrics.registry.register(EngineCollector(engine))
    app = build(
        replica, access=access, keys=Keys(keys), metrics=metrics, most_images=most,
        deadline=options.deadline, start=replica.warm_up,
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    names, where = ", ".join(served.name for served in models), f"[{host}]" if ":" in host else host
    told = f"visar serve: {names} on http://{where}:{port}/v1"
    with warnings.catch_warnings():
        # A note for each prompt would be kept for ever, and clients get theirs in the answer.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"visar\.")
        Server(app, lambda: _drain(replica, options.drain), lambda: print(told, flush=True)).run([listener])
    engine.close(drain=False, timeout=60)
    return 0


def _drain(replica: Any, seconds: float) -> None:
    _say("finishing what was begun; another Ctrl-C ends it at once")
    if not replica.close(seconds):
        _say(f"note: not all images were done after {seconds:g} seconds")


def _say(text: str) -> None:
    print(f"visar serve: {text}", file=sys.stderr, flush=True)
