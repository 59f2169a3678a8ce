"""`visar serve --ray`, and the same as an application that Ray Serve builds.

serve run visar.cli.serve_on_ray:app model=icons rows=16 replicas=2
serve build visar.cli.serve_on_ray:app -o visar.yaml
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import threading
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from visar.cli.cluster import elsewhere
from visar.cli.served import keys_of, models_of, most_images
from visar.errors import VisarError

if TYPE_CHECKING:
    from visar.serving.fleet import Settings
    from visar.serving.replica import Served


def run(options: argparse.Namespace, keys: list[str], port: int) -> int:
    """Serve until a signal; images that were begun are finished."""
    from visar.cluster import connected
    from visar.serving.fleet import application

    ended = threading.Event()
    with connected(options.ray_address):
        from ray import serve  # `connected` says it where it is missing

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing was begun that is to be finished
        if serve.status().proxies:
            raise VisarError(
                "Ray Serve is at work on this cluster, at an address of its own; add visar to it by "
                "`serve run visar.cli.serve_on_ray:app`."
            )
        serve.start(http_options={"host": options.host, "port": port}, logging_config={"log_level": "WARNING"})
        try:  # from here on something of it may be left on a cluster that is not ours
            try:
                serve.run(application(partial(served, elsewhere(options)), settings_of(options, keys)), name="visar")
            except RuntimeError as error:
                raise VisarError(f"The engines could not be started: {str(error).rstrip('.')}.") from error
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: ended.set())
            print(f"visar serve: on http://{options.host}:{port}/v1, with Ray", flush=True)
            ended.wait()
            print("visar serve: finishing what was begun", file=sys.stderr, flush=True)
            serve.delete("visar")
        finally:
            serve.shutdown()
    return 0


def app(given: dict[str, Any]) -> Any:
    """The application, for options by their names on the command line: {"model": "icons", "rows": "16"}."""
    from visar.cli.parsers import parser

    options = parser().parse_args(["serve", "--ray", *(f"--{name}={value}" for name, value in given.items())])
    from visar.serving.fleet import application

    return application(partial(served, options), settings_of(options, keys_of(options.api_key_file)))


def settings_of(options: argparse.Namespace, keys: list[str]) -> Settings:
    from visar.serving.fleet import Settings

    return Settings(
        rows=options.rows, waiting=options.waiting, replicas=options.replicas or (1, 1), device=options.device,
        most_images=most_images(options), deadline=options.deadline, drain=options.drain, keys=tuple(keys),
        bound=options.host, allowed_hosts=tuple(options.allowed_host),
    )  # fmt: skip


def served(options: argparse.Namespace) -> list[Served]:
    """The models of one process, which is an engine's alone."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"visar\.")  # as in `visar serve` without Ray
    return models_of(copy.copy(options))
