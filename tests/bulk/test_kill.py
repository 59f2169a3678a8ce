"""SIGKILL at every step that a run takes on the disk, and jobs of several processes: the set is that of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.bulk.test_run import PROMPTS, images, manifest, names, told
from visar.bulk import RunFolder
from visar.cli import main

COUNT, BATCH = 7, 2

# Dies by SIGKILL just before or after the Nth change of the disk. The children of one process share its imports.
EVERYWHERE = """
import os, signal, sys
from pathlib import Path
import torch
from visar.pipelines import TextToImagePipeline
from visar.bulk import sample_images

torch.set_num_threads(1)  # a process with threads cannot be forked
model, out, prompts = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split("|")
pipe = TextToImagePipeline.from_pretrained(model)
pipe.set_progress_bar_config(disable=True)

def run(folder):
    return sample_images(pipe, prompts, folder, count=2, batch=1, tokens=True)

def killed(folder, at):
    left = at
    def deadly(function, before):
        def called(*arguments, **named):
            nonlocal left
            left -= 1
            if left == 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*arguments, **named)
            finally:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        return called
    child = os.fork()
    if child == 0:
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name), at % 2))
        run(folder)
        os._exit(0)
    code = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(code) or os.WEXITSTATUS(code) == 0, code
    return os.WIFSIGNALED(code)

run(out / "whole")
at = 1
while killed(out / str(at), at):
    if at % 2:  # once more, so that what two kills leave is there together
        killed(out / str(at), 4)
    saved = len(list((out / str(at)).glob("[!.]*.png")))
    drawn = run(out / str(at)).sampled
    assert drawn <= 2 - saved + 1, at  # at most one image was saved and had no line yet
    at += 1
print(at)
"""


def test_a_kill_at_any_moment_loses_nothing(text_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EVERYWHERE, str(text_folder), str(tmp_path), "|".join(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout)
    assert kills > 14  # description, 2 images with their lines, manifest, and what is taken away
    whole = tmp_path / "whole"
    for at in range(1, kills):
        folder = tmp_path / str(at)
        assert names(folder) == names(whole), at
        assert images(folder) == images(whole) and told(folder) == told(whole), at


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def arguments(text_folder: Path, prompts: Path, out: Path) -> list[str]:
    return ["sample", "--model", str(text_folder), "--prompts", str(prompts), "-n", str(COUNT), "--batch", str(BATCH),
            "--seed", "5", "--tokens", "--out", str(out)]  # fmt: skip


def in_one_thread(given: list[str]) -> int:
    """The command line here, with the number of threads that torchrun gives each of several ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return main(given)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(text_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert in_one_thread(arguments(text_folder, prompts, out)) == 0
    return out


@pytest.mark.slow
def test_a_killed_command_goes_on(text_folder: Path, prompts: Path, alone: Path, tmp_path: Path) -> None:
    """A real command, killed when its third image appears."""
    out = tmp_path / "out"
    given = arguments(text_folder, prompts, out)
    process = subprocess.Popen([sys.executable, "-m", "visar", *given], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(list(out.glob("[!.]*.png"))) < 3:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert in_one_thread(given) == 0
    assert images(out) == images(alone) and names(out) == names(alone)
    assert [line["id"] for line in manifest(out)] == [f"{i:06d}" for i in range(COUNT)]


# Jobs as torchrun starts them, but forked from one process, which has the imports already. Of each: its ranks, the
# images after which rank 1 is killed (0: never; what is left is copied), a rank whose lock another run has (0: none),
# and the arguments. Prints the ranks' exit codes.
JOBS = """
import json, os, shutil, signal, socket, sys
from contextlib import nullcontext
import torch
from visar.cli import main
from visar.bulk import RunFolder

torch.set_num_threads(1)

def deadly(saved):
    original, left = os.replace, saved
    def replace(source, target):
        nonlocal left
        if str(target).endswith(".png"):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return original(source, target)
    os.replace = replace

def start(rank, world, port, saved, arguments):
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    if rank == 1 and saved:
        deadly(saved)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)

codes = []
for world, saved, held, arguments in json.loads(sys.argv[1]):
    out = arguments[-1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with RunFolder(out).locked(held) if held else nullcontext():
        ranks = [start(rank, world, port, saved, arguments) for rank in range(world)]
        if saved:
            os.waitpid(ranks.pop(1), 0)
            for rank in ranks:  # as torchrun does
                os.kill(rank, signal.SIGKILL)
        codes.append([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks])
    if saved:
        shutil.copytree(out, out + "-left")
print(json.dumps(codes))
"""


def test_ranks_make_the_set_of_one_process(text_folder: Path, prompts: Path, alone: Path, tmp_path: Path) -> None:
    """Two ranks; two of which one is killed, then three that go on; and errors, said once.

    Of the errors one is found by all ranks, and one by rank 1 alone.
    """
    two, killed, new = (tmp_path / name for name in ("two", "killed", "new"))
    given = [
        (2, 0, 0, arguments(text_folder, prompts, two)),
        (2, 1, 0, arguments(text_folder, prompts, killed)),
        (3, 0, 0, arguments(text_folder, prompts, killed)),
        (2, 0, 0, ["sample", "--sampler", "scdd", *arguments(text_folder, prompts, new)[1:]]),
        (2, 0, 1, arguments(text_folder, prompts, two)),
    ]
    command = [sys.executable, "-c", JOBS, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    *printed, codes = done.stdout.splitlines()
    assert json.loads(codes) == [[0] * 2, [-signal.SIGKILL], [0] * 3, [2] * 2, [2] * 2], done.stderr
    for out in (two, killed):
        assert images(out) == images(alone) and told(out) == told(alone) and names(out) == names(alone)

    folder = RunFolder(tmp_path / "killed-left")
    left = images(folder.path)
    assert len(left) < COUNT and all(images(alone)[name] == data for name, data in left.items())
    assert len(left.keys() & {"000001.png", "000003.png", "000005.png"}) == 1  # of rank 1
    for rank in range(2):
        journal = folder.path / f".journal.{rank}"
        lines = journal.read_text().splitlines() if journal.exists() else []
        assert all(int(json.loads(line)["id"]) % 2 == rank for line in lines)
    assert "manifest.jsonl" not in names(folder.path) and [n for n in names(folder.path) if ".partial." in n]
    drawn = (COUNT, COUNT - len(folder.done()))
    for line, out, number in zip(printed, (two, killed), drawn, strict=True):  # rank 0 alone prints
        assert line.startswith(f"scd (exact): {COUNT} images in {out}, {number} of them sampled now, ")

    ours = [line for line in done.stderr.splitlines() if line.startswith("visar:")]
    assert not new.exists() and len(ours) == 2
    assert ours[0].startswith("visar: error: Unknown sampler 'scdd'.")
    assert ours[1].startswith("visar: error: Another run is at work in")


def torchrun(*command: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*start, *command], capture_output=True, text=True, env=environment)


# Rank 1 is killed while it has an image under a temporary name; rank 0 goes on until torchrun ends it.
ONE_DIES = """
import os, signal, sys
from visar.cli import main

def replace(source, target, left=[2]):
    if os.environ["RANK"] == "1" and str(target).endswith(".png"):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    return original(source, target)

original, os.replace = os.replace, replace
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_goes_on_after_a_kill(text_folder: Path, prompts: Path, alone: Path, tmp_path: Path) -> None:
    """The killed job leaves whole images only; the next one, of three ranks, makes the set of one process."""
    out = tmp_path / "out"
    script = tmp_path / "one_dies.py"
    script.write_text(ONE_DIES)
    killed = torchrun(str(script), *arguments(text_folder, prompts, out))
    assert killed.returncode != 0 and f"Signal {signal.SIGKILL.value} (SIGKILL)" in killed.stderr, killed.stderr
    assert "manifest.jsonl" not in names(out) and [n for n in names(out) if ".partial." in n]
    left = images(out)
    assert len(left) < COUNT and all(images(alone)[name] == data for name, data in left.items())
    again = torchrun("-m", "visar", *arguments(text_folder, prompts, out), ranks=3)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("scd (exact): 7 images in") == 1  # rank 0 alone prints
    assert images(out) == images(alone) and told(out) == told(alone) and names(out) == names(alone)
