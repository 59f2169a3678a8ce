"""The options of `visar completion`."""

from visar.cli.parsers.base import CommandParser

SHELLS = ("bash", "zsh", "tcsh")


def completion(p: CommandParser) -> None:
    """Print a script with which your shell completes commands.

    visar completion bash > ~/.local/share/bash-completion/completions/visar
    visar completion zsh > ~/.zfunc/_visar
    """
    p.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or tcsh")
