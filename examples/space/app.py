"""The demo of visar, as it is: in a Hugging Face Space behind its proxies, elsewhere on this machine only."""

import os
import sys

from visar.cli import main

options = ["--port", os.environ.get("GRADIO_SERVER_PORT", "7860")]
if name := os.environ.get("SPACE_HOST"):  # USER-SPACE.hf.space
    options += ["--host", "0.0.0.0", "--allowed-host", name, "--trusted-proxy", "*"]
    options += ["--embed-in", "https://huggingface.co"]
if __name__ == "__main__":
    sys.exit(main(["demo", *options, *sys.argv[1:]]))
