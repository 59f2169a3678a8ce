"""What every command has in common: help, examples that parse, errors, settings from `SamplingParams`, completion."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import make_dataclass
from pathlib import Path

import pytest

from visar import __version__
from visar.cli import main, parser
from visar.cli.parsers import GROUPS, options
from visar.cli.parsers.base import CommandParser, UsageError
from visar.params import SamplingParams, setting

Capture = pytest.CaptureFixture[str]
SAMPLING = ("generate", "sample", "bench", "eval report", "train drafter")
HEAVY = {"torch", "numpy", "PIL", "diffusers", "transformers", "gradio", "matplotlib", "shtab"}


def commands(at: argparse.ArgumentParser | None = None) -> Iterator[CommandParser]:
    """All parsers below one, leaves and groups."""
    for action in (at or parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from commands(command)


NAMED = {command.prog.removeprefix("visar "): command for command in commands()}


def flags(command: str, at: argparse.ArgumentParser | None = None) -> dict[str, argparse.Action]:
    found = {c.prog.removeprefix("visar "): c for c in commands(at)}[command]
    return dict(found._option_string_actions)


# Help


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["models"], ["models", "icons"]])
def test_what_is_quick_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys, runpy\nsys.argv = ['visar', *{arguments}]\n"
        "try: runpy.run_module('visar', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert done.stdout.splitlines()[-1] == "[]" and done.stderr == ""
    assert after.children_user - before.children_user < 1.0  # seconds of the processor, whatever else is at work


def test_help_lists_every_command(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.count("\n  visar ") == 2
    listed = [command.__name__.rstrip("_") for group in GROUPS.values() for command in group]
    assert set(listed) == {name for name in NAMED if " " not in name}
    assert all(f"\n  {name} " in text for name in listed)


@pytest.mark.parametrize("name", NAMED)
def test_help_of_a_command(name: str) -> None:
    """A sentence, a word on every option, and two examples that the command line understands."""
    command = NAMED[name]
    text = command.format_help()
    about = str(command.description)
    assert about[0].isupper() and about.endswith(".") and about.count(". ") == 0
    assert all(action.help for action in command._actions), name
    assert len(command.examples) == 2
    for example in command.examples:
        assert f"\n  {example}" in text
        words = shlex.split(example.partition(" > ")[0])
        assert words[0] == "visar" and " ".join(words[1:]).startswith(name)
        assert parser().parse_args(words[1:]).run
    assert text.startswith(f"usage: visar {name} ") and text.count("usage:") == 1


def test_defaults_are_shown() -> None:
    text = " ".join(NAMED["bench"].format_help().split())
    assert "images per sampler and repeat (default: 16)" in text and "; 1 is none (default: the model's own)" in text
    assert "says which (default: 0)" in text and "None" not in text and "[]" not in text
    for title in ("Model:", "Sampler:", "Sampling:", "Output:"):
        assert text.count(title) == 1


def test_the_same_flags_everywhere() -> None:
    short = {"-n": "--num-images", "-o": "--out"}
    for name, command in NAMED.items():
        found = command._option_string_actions
        for flag, long in short.items():
            assert (flag in found) == (long in found), name
            assert flag not in found or found[flag] is found[long]
        assert not {"--output", "--images", "--pictures", "--num-pictures"} & set(found)
        assert "--json" not in found or (found["--json"].nargs, found["--json"].const) == ("?", "-")


# Settings


def test_the_settings_are_the_fields() -> None:
    expected = {f"--{f.replace('_', '-')}" for f in SamplingParams.__dataclass_fields__} - {
        "--guidance-interval",
        "--forced-tokens",
    }
    for command in SAMPLING:
        assert expected <= set(flags(command)), command


def test_a_new_field_is_a_flag_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    more = make_dataclass(
        "More",
        [("min_p", "float | None", setting(None, "least probability", low=0.0, high=1.0))],
        bases=(SamplingParams,),
        frozen=True,
    )
    monkeypatch.setattr(options, "SamplingParams", more)
    for command in SAMPLING:
        assert "least probability" in str(flags(command)["--min-p"].help)
    given = options.params_of(parser().parse_args(["generate", "cat", "--min-p", "0.25"]))
    assert options.settings_of(given) == {"seed": 0, "min_p": 0.25}


def test_settings_reach_the_params(capsys: Capture) -> None:
    words = "generate cat --seed 7 --guidance-scale 2 --temperature 0.5 --top-k 9 --top-p 0.9"
    given = options.params_of(parser().parse_args(words.split()))
    assert given == SamplingParams(seed=7, guidance_scale=2.0, temperature=0.5, top_k=9, top_p=0.9)
    assert capsys.readouterr().err == ""
    drawn = [options.params_of(parser().parse_args(["bench", "--seed", "random"])).seed for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert capsys.readouterr().err == "".join(f"visar: note: the seed is {seed}\n" for seed in drawn)


# Errors


@pytest.mark.parametrize(
    ("words", "usage", "message"),
    [
        ("paint", "visar ", "Unknown command 'paint'. Did you mean 'train'? Known: generate, "),
        ("eval fidd a", "visar eval ", "Unknown command 'fidd'. Did you mean 'fid'? Known: fid, "),
        ("generate cat --otput x", "visar generate ", "Unknown option --otput. Did you mean --out?"),
        ("generate cat --output=x", "visar generate ", "Unknown option --output. Did you mean --out?"),
        ("bench --images 3", "visar bench ", "Unknown option --images. Did you mean --num-images?"),
        ("train drafter -o x --target y", "visar train drafter ", "Unknown option --target. Did you mean --model?"),
        ("models --xyz", "visar models ", "Unknown option --xyz."),
        (
            "generate cat --dtype float23",
            "visar generate ",
            "--dtype cannot be 'float23'. Did you mean 'float32'? Known",
        ),
        ("completion fisch", "visar completion ", "SHELL cannot be 'fisch'."),
        ("sample", "visar sample ", "--out must be given."),
        ("eval fid", "visar eval fid ", "FOLDER, --protocol must be given."),
        ("generate cat --seed", "visar generate ", "--seed: expected one argument."),
        ("generate a --seed 1 b", "visar generate ", "Unexpected argument 'b'; put the arguments before the options."),
        ("bench --shapes --profile", "visar bench ", "--profile: not allowed with --shapes."),
        ("bench --samplers ar --samplers scd", "visar bench ", "--samplers is given twice: ar and scd."),
        ("eval compare a b --seeds c --seeds d e", "visar eval compare ", "--seeds is given twice: c and d e."),
    ],
)
def test_a_wrong_word(words: str, usage: str, message: str, capsys: Capture) -> None:
    """The usage of the command that was meant, in one line, and one sentence."""
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == "" and first.startswith(f"usage: {usage}") and second.startswith(f"visar: error: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate cat -n two", "--num-images must be a whole number, 1 or more, not 'two'."),
        ("generate cat -n 0", "--num-images must be 1 or more, not 0."),
        ("generate cat --guidance-scale much", "--guidance-scale must be a number, not 'much'."),
        ("train tokenizer --data x -o y --lr 0", "--lr must be above 0 and at most 1e+09, not 0."),
        ("train tokenizer --data x -o y --lr 1e300", "--lr must be above 0 and at most 1e+09, not 1e300."),
        ("serve --drain 1e10", "--drain must be above 0 and at most 1e+09, not 1e10."),
        ("train tokenizer --data x -o y --minutes inf", "--minutes must be above 0 and at most 1e+09, not inf."),
        ("train mar --data x --autoencoder x --words x -o y --weigh a=1,a=2", "--weigh must be NAME=WEIGHT with"),
        ("verify --samplers scd --device cpu", "--prompt, --class, --image-size, --drafter and --device go with"),
        ("verify --model icons --no-mutants", "--no-mutants leaves known-bad samplers out, and with --model and"),
        ("verify --session f.py:s --no-mutants", "--no-mutants leaves known-bad samplers out"),
        ("bench --history h.json --json ./h.json", "--json would replace h.json, which is given for something else"),
        ("bench --profile -n 2", "--profile takes no --num-images, which would change nothing."),
        ("bench --profile --repeats 2", "--profile takes no --repeats,"),
        ("bench --serve --repeats 2", "--serve takes no --repeats,"),
        ("bench --shapes -n 2", "--shapes takes no --num-images,"),
        ("bench --shapes --model icons-mar", "--shapes takes no --model,"),
        ("bench --shapes --no-ema", "--shapes takes no --ema,"),
        ("bench --shapes --seed 1", "--shapes takes no --seed,"),
        ("bench --samplers ar,scd,ar", "--samplers has 'ar' twice."),
        ("samplers --json eagle", "--json takes a .json file, or - for stdout, not 'eagle'; put --json after"),
    ],
)
def test_a_wrong_value_is_one_sentence(words: str, message: str, capsys: Capture) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"visar: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["eval"], ["train"]])
def test_half_a_command_shows_help(words: list[str], capsys: Capture) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(" ".join(["usage: visar", *words])) and "Examples:" in err


def test_version_and_parsing_alone(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"visar {__version__}\n"
    with pytest.raises(UsageError, match="Unknown option"):
        parser().parse_args(["models", "--nothing"])


# Completion

COMPLETE = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
[[ "{words}" == *" " ]] && COMP_WORDS+=("") && COMP_CWORD=$((COMP_CWORD + 1))
_shtab_visar
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = subprocess.run([sys.executable, "-m", "visar", "completion", "bash"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    file = tmp_path_factory.mktemp("completion") / "visar.bash"
    file.write_text(done.stdout)
    return file


@pytest.mark.parametrize(
    ("words", "among", "not_among"),
    [
        ("visar ge", {"generate"}, {"models"}),
        ("visar generate --gu", {"--guidance-scale", "--guidance-schedule"}, {"--seed"}),
        ("visar generate --sampler ea", {"eagle", "eagle2"}, {"scd"}),
        ("visar samplers sc", {"scd", "scd-gumbel"}, {"ar"}),
        ("visar models ico", {"icons", "icons-mar"}, {"mar-b"}),
        ("visar generate --model ico", {"icons", "icons-mar", "icomic"}, {"mar-b"}),
        ("visar generate --dtype b", {"bfloat16"}, {"float32"}),
        ("visar eval fid --reference ico", {"icomic"}, {"icons"}),
        ("visar completion z", {"zsh"}, {"bash"}),
    ],
)
def test_completion_in_bash(
    words: str, among: set[str], not_among: set[str], bash_script: Path, tmp_path: Path
) -> None:
    (tmp_path / "icomic").touch()
    code = COMPLETE.format(script=bash_script, words=words)
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    found = {line.strip() for line in done.stdout.splitlines()}
    assert among <= found and not not_among & found, done.stderr


@pytest.mark.parametrize(("shell", "begins"), [("zsh", "#compdef visar"), ("tcsh", "# AUTOMATICALLY GENERATED")])
def test_completion_of_other_shells(shell: str, begins: str, capsys: Capture) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text.startswith(begins) and "generate" in text and "scd-gumbel" in text and "icons-mar" in text
