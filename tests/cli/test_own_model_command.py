"""`visar verify --session`: files of a user's, what is wrong with them in one sentence, and what the command prints."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.eval.exactness.test_own_model import DOCS, MODEL, SEEN
from visar.cli import main
from visar.eval.exactness.joint import Row
from visar.eval.exactness.own_model import Check

Capture = pytest.CaptureFixture[str]

GOOD = "--session my_model.py:make"
BAD_INPUT = {
    "--session nowhere.py:make": "There is no file nowhere.py.",
    "--session my_model.py": "--session takes a Python file and a function in it, as in my_session.py:make",
    "--session my_model.py:makes": "my_model.py has no function 'makes'.",
    "--session my_model.py:VOCAB": "my_model.py has something that is no function 'VOCAB'.",
    "--session bad.py:narrow": "must take two arguments, the batch size and the window",
    f"{GOOD} --reference my_model.py:probs": "my_model.py has no function 'probs'.",
    f"{GOOD} --sampler gsd": "'gsd' is relaxed",
    f"{GOOD} --sampler mar": "Sampler 'mar' is for continuous tokens",
    f"{GOOD} --sampler speculative-tree": "has no trees",
    "--reference my_model.py:logits": "--reference is what a --session is compared with; give both.",
    "--session bad.py:nothing": "make gave NoneType, not a visar.engine.session.Session.",
    "--session bad.py:large": "16384 sequences",
    "--session bad.py:rows": "gave a session of 1 rows, not ",
    "--session bad.py:shape": "forward gave float32 [256, 4] for tokens [256, 1]; it must give logits [B, W, V]",
    "--session bad.py:nan": "forward gave logits that are no distribution (NaN or infinite), first in row 0 at token 0",
    "--session bad.py:flat": "The distributions hardly depend on the tokens before",
    "--session bad.py:unborn": "gave a session whose __init__ did not call super().__init__(batch, length, vocab).",
    "--session bad.py:asserts": "bad.py, line 47: AssertionError.\n",
    "--session bad.py:raises": "bad.py, line 33: RuntimeError: the pass",
    "--session bad.py:counts": "commit adds the counts to `lengths`",
    f"{GOOD} --reference bad.py:narrow": "it must give [B, n + 1, V], here [256, 5, 4]",
    "--session syntax.py:make": "syntax.py, line 1: SyntaxError",
    "--session absent.py:make": "absent.py, line 1: ModuleNotFoundError: No module named 'not_there'",
}
BAD = """import torch
from my_model import CLASS, MODEL, MySession, logits
from visar.engine.callable_session import CallableSession
from visar.engine.session import Session

def spoilt(**parts):
    def make(batch, window):
        return type("Spoilt", (MySession,), parts)(MODEL, torch.full((batch,), CLASS), window)
    return make

def nothing(batch, window):
    pass

def large(batch, window):
    return CallableSession(logits, batch, 256, 16384)

def rows(batch, window):
    return MySession(MODEL, torch.full((1,), CLASS), window) if batch > 1 else spoilt()(1, window)

def flat_logits(tokens):
    return torch.zeros(len(tokens), tokens.shape[1] + 1, 4)

def flat(batch, window):
    return CallableSession(flat_logits, batch, 5, 4)

def narrow(tokens):
    return logits(tokens)[:, :-1]

def fails(self, tokens, tree=None, first=0):
    if tokens.shape[1] == 1:
        return MySession.forward(self, tokens, tree, first)
    # the line that is named
    raise RuntimeError("the pass\\nwas too long")

shape = spoilt(forward=lambda self, tokens, tree=None, first=0: MySession.forward(self, tokens, tree, first)[:, 0])
nan = spoilt(forward=lambda self, *rest: MySession.forward(self, *rest) * torch.nan)
raises = spoilt(forward=fails)
counts = spoilt(commit=lambda self, count: None)

def unborn(batch, window):
    class Unborn(MySession):
        def __init__(self):
            pass
    return Unborn()

def asserts(batch, window):
    assert not batch
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a user's, and none of this process's memory of them."""
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "syntax.py").write_text("def make(batch, window) return\n")
    (tmp_path / "absent.py").write_text("import not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    return tmp_path


@pytest.mark.parametrize("options", BAD_INPUT)
def test_bad_input_is_one_sentence(options: str, folder: Path, capsys: Capture) -> None:
    assert main(["verify", "--sequences", "16384", *options.split()]) == 2
    err = capsys.readouterr().err
    assert BAD_INPUT[options] in err and err.count("\n") == 1 and err.startswith("visar: error: ")


def test_a_wrong_session_is_a_failed_check(folder: Path, capsys: Capture) -> None:
    (folder / "my_model.py").write_text(MODEL.replace(SEEN, "return self.slots <= slots[:, -1:, None]"))
    command = "verify --session my_model.py:make --reference my_model.py:logits"
    assert main(command.split()) == 1
    *_, row, sentence = capsys.readouterr().out.splitlines()
    assert row.split() == ["passes", "of", "W", "tokens", "FAILED"] and "causal mask" in sentence
    assert main([*command.split(), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == [] and [c["passed"] for c in found["checks"]] == [True, True, True, False]
    assert "causal mask" in found["checks"][-1]["message"]


def test_no_names_are_all_samplers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table without a row would prove nothing."""
    asked: list[object] = []

    def verify_files(*_: object, names: object, **__: object) -> tuple[list[Check], list[Row]]:
        asked.append(names)
        return [Check("rows are apart", "")], []

    monkeypatch.setattr("visar.eval.exactness.own_model.verify_files", verify_files)
    for names in (",", "all"):
        assert main(["verify", *GOOD.split(), "--sampler", names]) == 0
    assert asked == [None, None]


def test_a_file_may_have_dataclasses(folder: Path, capsys: Capture) -> None:
    """They ask for their module, which has no name that could be imported."""
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    (folder / "typed.py").write_text(f"{head}\n@dataclass\nclass Size:\n    dim: int = 32\n\n{MODEL}")
    assert main(["verify", "--session", "typed.py:make", "--sampler", "ar", "--sequences", "16384"]) == 0
    assert "All rows pass." in capsys.readouterr().out


def test_json_has_the_joint_laws(folder: Path, capsys: Capture) -> None:
    assert main(f"verify {GOOD} --sampler ar --sequences 16384 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["sampler"] == "ar" and row["passed"] and abs(row["z"]) < 4 and row["sequences"] == 16384
    assert found["reference"] is None and all(c["passed"] for c in found["checks"])


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^visar (verify .*)$", (DOCS / "own-model.md").read_text(), flags=re.M)
    assert main(command.split()) == 0

    def shape(line: str) -> str:
        return re.sub(r"-?\d+\.\d+", "#", " ".join(line.split()))

    found = [shape(line) for line in capsys.readouterr().out.splitlines()]
    (shown,) = re.findall(r"^```text\n(.*?)^```", (DOCS / "own-model.md").read_text(), flags=re.S | re.M)
    assert [shape(line) for line in shown.splitlines()] == found
    assert found[-1].endswith("All rows pass.") and "good" in found[1] and "exact" in found[-2]
