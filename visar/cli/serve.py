"""`visar serve`: OpenAI's images API over models that are loaded once."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from visar.cli.common import bound, configured, each_model, load_model, samplers_of
from visar.errors import VisarError
from visar.texts import lines_of, read_text

if TYPE_CHECKING:
    from visar.generation.model import ImageModel
    from visar.serving.replica import Served

KEY = "VISAR_API_KEY"
LEAST_KEY = 8  # characters of an API key
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(options: argparse.Namespace) -> int:
    require_server()
    for name, value in (("--replicas", options.replicas), ("--ray-address", options.ray_address)):
        if value is not None and not options.ray:
            raise VisarError(f"{name} is of --ray, which is not given.")
    keys = keys_of(options.api_key_file)
    with bound(options.host, options.port) as listener:  # before models are loaded
        if not keys and options.host not in LOOPBACK:
            _say("note: without --api-key-file everybody who reaches this address may use it")
        if not options.ray:
            return _serve(options, keys, listener)
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


def _serve(options: argparse.Namespace, keys: list[str], listener: Any) -> int:
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
        replica, access=access, keys=Keys(keys), metrics=metrics, most_images=options.max_images,
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


def models_of(options: argparse.Namespace) -> list[Served]:
    """The loaded models, with the samplers that run for each."""
    from visar.serving.replica import Served, named

    loaded = named((own.model, load_model(own)) for own in each_model(options, ["icons"]))
    for model in loaded.values():
        model.family.check_decoding()
    chosen = _samplers(options, loaded)
    return [Served(name, model, chosen[name], options.invariant) for name, model in loaded.items()]


def _drain(replica: Any, seconds: float) -> None:
    _say("finishing what was begun; another Ctrl-C ends it at once")
    if not replica.close(seconds):
        _say(f"note: not all images were done after {seconds:g} seconds")


def _say(text: str) -> None:
    print(f"visar serve: {text}", file=sys.stderr, flush=True)


def keys_of(file: str | None) -> list[str]:
    """API keys: the lines of a file, or the one of the environment. Raises `VisarError` for one that is none."""
    if file is not None:
        found = [line.strip() for line in lines_of(read_text(file)) if line.strip()]
        if not found:
            raise VisarError(f"{file} has no API key; give one a line.")
    else:
        found = [key] if (key := os.environ.get(KEY, "").strip()) else []
    for key in found:
        if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise VisarError(
                f"An API key has {LEAST_KEY} or more ASCII characters, and no space; one of these has not."
            )
    return found


def _samplers(options: argparse.Namespace, models: Mapping[str, ImageModel]) -> dict[str, dict[str, Any]]:
    """The samplers of each model by their labels: those that were asked for and fit its tokens, or its default."""
    from visar.samplers import check_sampler, default_sampler

    def fits(sampler: Any, model: ImageModel) -> bool:
        try:
            check_sampler(sampler, model.family.tokens, model.family.scan)
        except VisarError:
            return False
        return True

    asked: dict[str, Any] = dict(samplers_of(options)) if options.samplers else {}
    for sampler in asked.values():
        if not any(fits(sampler, model) for model in models.values()):
            first = next(iter(models.values())).family
            check_sampler(sampler, first.tokens, first.scan)  # which says why
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        own = {label: sampler for label, sampler in asked.items() if fits(sampler, model)}
        if not own:
            default = default_sampler(model.family.tokens, model.family.scan)
            plain = options.window is None and not options.parameters
            own = {default: None if plain else configured(default, options.parameters, options.window)}
        found[name] = {label: model.sampler_of(sampler) for label, sampler in own.items()}
        for sampler in found[name].values():
            model.drafters.of(sampler)  # an error where it is missing
    return found
