"""What all parsers share: help in groups with defaults and examples, errors of one sentence, and types of values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from visar.errors import VisarError, short
from visar.files import is_device

Group = Any  # argparse has no public type for its groups
STDOUT = "-"
STDOUTS = (STDOUT, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
LONGEST = 1e9  # of numbers above 0: seconds that a thread can wait, and factors that stay far from overflow
MOST = 2**31 - 1  # of whole numbers where nothing smaller is said: the largest that every tensor takes
RENAMED = {"--output": "--out", "--images": "--num-images", "--num-pictures": "--num-images", "--target": "--model"}


class UsageError(VisarError):
    """A command line that no command understands; `usage` is that of the command which was meant."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class _Help(argparse.HelpFormatter):
    """One line of usage, defaults where there are any, and paragraphs as they were written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        needed = [a for a in actions if a.required or not a.option_strings]
        super().add_usage(usage, [argparse.Action(["OPTIONS"], "options", nargs=0), *needed], (), prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text or not action.option_strings or action.default in (None, False, [], argparse.SUPPRESS):
            return text
        return f"{text} (default: %(default)s)" if text else "default: %(default)s"


class CommandParser(argparse.ArgumentParser):
    """A parser of the command line, which raises `VisarError` for what it does not understand.

    `examples` are commands that `--help` shows. Groups of the same title are one group.
    """

    def __init__(self, *, examples: tuple[str, ...] = (), **about: Any) -> None:
        lines = "\n".join(f"  {example}" for example in examples)
        super().__init__(formatter_class=_Help, epilog=f"Examples:\n{lines}" if examples else None, **about)
        self.examples = examples
        self._optionals.title = "Options"
        self._positionals.title = "Arguments"

    def add_argument_group(self, *args: Any, **about: Any) -> Any:
        title = args[0] if args else about.get("title")
        found = next((group for group in self._action_groups if group.title == title), None)
        return found or super().add_argument_group(*args, **about)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; but the command that does not know an argument says so, not the one above it."""
        self._given: dict[str, tuple[Any, list[str]]] = {}
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
            message = (
                f"Unknown option {flag}.{self._nearest_flag(flag)}"
                if flag
                else f"Unexpected argument {unknown[0]!r}; put the arguments before the options."
            )
            raise UsageError(message, self.format_usage())
        return options, unknown

    def error(self, message: str) -> NoReturn:
        if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
            message = f"{missing[1]} must be given"
        message = re.sub(r"(argument )?(-\w/)?(--[\w-]+)", r"\3", message)
        raise UsageError(f"{message}.", self.format_usage())

    def _nearest_flag(self, flag: str) -> str:
        known = list(self._option_string_actions)
        close = [n for n in (RENAMED.get(flag),) if n in known] or get_close_matches(flag, known, n=1)
        return f" Did you mean {close[0]}?" if close else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        close = get_close_matches(str(value).lower(), known, n=1)
        nearest = f" Did you mean {close[0]!r}?" if close else ""
        what = "Unknown command" if isinstance(action, argparse._SubParsersAction) else f"{_name(action)} cannot be"
        raise UsageError(f"{what} {value!r}.{nearest} Known: {', '.join(known)}.", self.format_usage())

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and "--" in arg_strings:  # argparse would make an empty list of it
            raise VisarError(f"{_name(action)} takes a value, not --.")
        value = super()._get_values(action, arg_strings)
        if action.option_strings and isinstance(value, list | dict) and isinstance(action, argparse._StoreAction):
            # Of single values the last wins, as everywhere; of lists, one would be lost that was to be added.
            before, words = self._given.setdefault(action.dest, (value, arg_strings))
            if before != value:
                said = " and ".join(short(" ".join(each), 100) for each in (words, arg_strings))
                raise UsageError(f"{_name(action)} is given twice: {said}.", self.format_usage())
        return value

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if isinstance(action, argparse._SubParsersAction):
            return super()._get_value(action, arg_string)  # all that follows is its own
        if not arg_string and action.nargs != argparse.ZERO_OR_MORE:  # of the prompts, the command says more
            raise VisarError(f"{_name(action)} is empty; give a value, or leave it out.")
        if "\0" in arg_string:
            raise VisarError(f"{_name(action)} holds a zero byte: {arg_string!r}.")
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            raise VisarError(f"{_name(action)} {error.message}.") from error


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar)


def add_commands(parser: argparse.ArgumentParser, *commands: Callable[[CommandParser], None]) -> None:
    """Commands below a parser, by the functions that declare their options.

    Such a function has the name of its command and, as docstring, a sentence and two examples. The function of the same
    name in the file of the same name in `visar.cli` does the work.
    """
    about = f"`{parser.prog} COMMAND --help` shows its options"
    found = parser.add_subparsers(metavar="COMMAND", prog=parser.prog, parser_class=CommandParser, help=about)
    for command in commands:
        sentence, *examples = [
            line.strip() for line in (command.__doc__ or command.__name__).splitlines() if line.strip()
        ]
        own = found.add_parser(
            command.__name__.rstrip("_").replace("_", "-"),
            help=sentence,
            description=sentence,
            examples=tuple(examples),
        )
        own.set_defaults(run=f"{command.__module__.rpartition('.')[2]}:{command.__name__}", parser=own)
        command(own)
    parser.set_defaults(run="")


def _value(kind: Callable[[str], Any], noun: str, bound: str, good: Callable[[Any], bool]) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        try:
            found = kind(text)
        except ValueError as error:
            wanted = f"{noun}, {bound}" if bound else noun
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}") from error
        if not good(found):
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")
        return found

    return value


def whole(low: int | None = None, high: int = MOST) -> Callable[[str], int]:
    """The type of a whole number, from `low`, if given, to `high`."""

    def value(text: str) -> int:
        bound = "" if low is None else f"{low} or more"
        found: int = _value(int, "a whole number", bound, lambda found: low is None or found >= low)(text)
        if abs(found) > high:
            raise argparse.ArgumentTypeError(f"must be {high} or less, not {text}")
        return found

    return value


def size(text: str) -> int | str:
    """The type of an image's size: the pixels of a square, or WIDTHxHEIGHT."""
    width, across, height = text.partition("x")
    return f"{whole(1)(width)}x{whole(1)(height)}" if across else whole(1)(width)


def seed(text: str) -> int:
    """The type of a seed of what takes 63 bits."""
    return whole(0, 2**63 - 1)(text)


def finite(text: str) -> float:
    """The type of a number."""
    return _value(float, "a number", "finite", lambda value: abs(value) < float("inf"))(text)


def positive(text: str) -> float:
    """The type of a number above 0, such as minutes, seconds or a factor."""
    return _value(float, "a number", f"above 0 and at most {LONGEST:g}", lambda value: 0 < value <= LONGEST)(text)


def names(text: str) -> list[str]:
    """The type of names that are separated by commas, each of them once."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if twice := next((name for i, name in enumerate(found) if name in found[:i]), None):
        raise argparse.ArgumentTypeError(f"has {twice!r} twice")
    return found


def json_target(text: str) -> str:
    """The type of `--json`. A prompt or another word after a bare `--json` is not taken for a file."""
    if text in STDOUTS:
        return STDOUT
    if Path(text).suffix.lower() != ".json" and not is_device(Path(text)):
        raise argparse.ArgumentTypeError(
            f"takes a .json file, or - for stdout, not {text!r}; put --json after the other arguments"
        )
    return text
