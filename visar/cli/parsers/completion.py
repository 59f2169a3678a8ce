"""The options of `visar completion`."""

from visar.cli.parsers.base import Commands, add_command

SHELLS = ("bash", "zsh", "tcsh")


def add(commands: Commands) -> None:
    p = add_command(
        commands, "completion", "completion:completion", "Print a script with which your shell completes commands.",
        "visar completion bash > ~/.local/share/bash-completion/completions/visar",
        "visar completion zsh > ~/.zfunc/_visar",
    )  # fmt: skip
    p.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or tcsh")
