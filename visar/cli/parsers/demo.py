"""The options of `visar demo`."""

from visar.cli.parsers.base import CommandParser, whole
from visar.cli.parsers.options import drafter_option, model_options


def demo(p: CommandParser) -> None:
    """Serve a web page that shows images while they are decoded.

    visar demo
    visar demo --model icons --port 7861 --max-images 2
    """
    model_options(p, several="icons and icons-mar")
    drafter_option(p.add_argument_group("Model"))
    server = p.add_argument_group("Server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    server.add_argument("--port", type=whole(), default=7860, metavar="N", help="0 for any that is free")
    server.add_argument("--share", action="store_true", help="also give it a public address at Gradio's")
    server.add_argument("--max-images", type=whole(1), default=4, metavar="N", help="images in a request, at most")
    server.add_argument("--max-waiting", type=whole(1), default=16, metavar="N", help="images in line, at most")
    server.add_argument(
        "--max-per-address", type=whole(1), metavar="N",
        help="requests of one network address, at most (1; without limit with --share, which hides addresses)",
    )  # fmt: skip
    server.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a name by which others reach it"
    )
    server.add_argument(
        "--trusted-proxy", action="append", default=[], metavar="ADDRESS",
        help="a proxy whose X-Forwarded-For and -Proto headers hold",
    )  # fmt: skip
    server.add_argument(
        "--embed-in", action="append", default=[], metavar="ORIGIN",
        help="a site that may show the page in a frame, such as https://huggingface.co",
    )  # fmt: skip
