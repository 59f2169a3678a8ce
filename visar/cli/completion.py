"""`visar completion`: a script for the shell that completes commands, options, names and files."""

from __future__ import annotations

import argparse
from typing import Any

from visar.cli.parsers import parser
from visar.cli.parsers.options import MODEL_OR_PATH
from visar.cli.tables import model_rows, sampler_rows


def completion(options: argparse.Namespace) -> int:
    import shtab

    top = parser()
    models = [row["name"] for row in model_rows()]
    _complete(top, {"SAMPLER": [row["name"] for row in sampler_rows()], "MODEL": models})
    words = " ".join(models)
    preamble: Any = {
        "bash": f'_visar_model() {{ compgen -W "{words}" -- "$1"; _shtab_compgen_files "$1"; }}',
        "zsh": f"_visar_model() {{ _alternative 'models:model:({words})' 'files:file:_files' }}",
    }
    print(shtab.complete(top, shell=options.shell, preamble=preamble))
    return 0


def _complete(parser: argparse.ArgumentParser, names: dict[str, list[str]]) -> None:
    """Say by what each argument is completed, which its metavar tells."""
    import shtab

    for action in parser._actions:
        what: Any = action  # `complete` is an attribute of shtab's own
        metavar = str(action.metavar)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete(command, names)
        elif metavar in names:
            action.choices = names[metavar]
        elif metavar == MODEL_OR_PATH:
            what.complete = {"bash": "_visar_model", "zsh": "_visar_model", "tcsh": "f"}
        elif metavar == "FOLDER":
            what.complete = shtab.DIRECTORY
        elif {"PATH", "FILE"} & set(metavar.split("|")):
            what.complete = shtab.FILE
