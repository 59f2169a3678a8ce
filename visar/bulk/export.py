"""Export a finished run in the layouts of evaluators.

- ADM's evaluator (github.com/openai/guided-diffusion, evaluations/): an .npz file with `arr_0`, uint8 [N, H, W, 3], and
  for classes `arr_1`, int64 [N].
- GenEval (github.com/djghosh13/geneval): a folder for each prompt, 00000/ and so on, with the prompt's line of
  evaluation_metadata.jsonl as metadata.jsonl, and its images as samples/0000.png and so on.
- DPG-Bench (github.com/TencentQQGYLab/ELLA, dpg_bench/): for each prompt ITEM_ID.png, a 2 x 2 grid of its images.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visar.bulk.folder import Line, RunFolder
from visar.errors import VisarError, unknown
from visar.files import is_device, new_file, new_folder, path_of, replacing, tidy
from visar.image_files import converted, open_image

DPG_IMAGES = 4


def export(folder: str | Path, layout: str, out: str | Path) -> int:
    """Write the finished run in `folder` to `out` in one of `LAYOUTS`; returns the number of images.

    Raises `VisarError` for an unfinished run, a run that does not fit the layout, and an output that exists.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    return LAYOUTS[layout](folder, out)


def new_npz(out: str | Path) -> Path:
    """As `new_file`. Raises `VisarError` also for a name that no reader takes for a .npz file."""
    path = path_of("The .npz file", out)
    if path.suffix.lower() != ".npz" and not is_device(path):
        raise VisarError(f"All images are written to a .npz file, not to {out}.")
    return new_file(path)


def export_npz(folder: str | Path, out: str | Path) -> int:
    """The file of ADM's evaluator, images in the order of their ids, streamed."""
    run = RunFolder(folder)
    lines = run.finished()
    size = _pixels(run, lines[0]).shape
    with tidy(), replacing(new_npz(out)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            _header(file, (len(lines), *size), np.dtype(np.uint8))
            for line in lines:
                image = _pixels(run, line)
                if image.shape != size:
                    raise VisarError(f"{line['file']} is of another size than the first image.")
                file.write(image.tobytes())
        if "class" in lines[0]:
            with archive.open("arr_1.npy", "w") as file:
                _header(file, (len(lines),), np.dtype(np.int64))
                file.write(np.array([line["class"] for line in lines], np.int64).tobytes())
    return len(lines)


def export_geneval(folder: str | Path, out: str | Path) -> int:
    """GenEval's folder, of a run with the prompts of its evaluation_metadata.jsonl."""
    run = RunFolder(folder)
    prompts = _by_prompt(run, "geneval")
    if any("tag" not in lines[0].get("metadata", {}) for lines in prompts):
        raise VisarError(
            "GenEval's evaluator reads a 'tag' of each prompt; sample by its evaluation_metadata.jsonl as --prompts."
        )
    with new_folder(out) as made:
        for number, lines in enumerate(prompts):
            samples = made / f"{number:05d}" / "samples"
            samples.mkdir(parents=True)
            entry = lines[0]["metadata"] | {"prompt": lines[0]["prompt"]}
            if "prompt_id" in lines[0]:
                entry["id"] = lines[0]["prompt_id"]
            (samples.parent / "metadata.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")
            for i, line in enumerate(lines):
                shutil.copyfile(run.file(line), samples / f"{i:04d}.png")
    return sum(map(len, prompts))


def export_dpg(folder: str | Path, out: str | Path) -> int:
    """DPG-Bench's folder, of a run with four images of each prompt, named by the id of the prompt."""
    run = RunFolder(folder)
    prompts = _by_prompt(run, "dpg")
    for lines in prompts:
        if len(lines) != DPG_IMAGES:
            raise VisarError(
                f"DPG-Bench takes {DPG_IMAGES} images of each prompt; sample with -n {DPG_IMAGES * len(prompts)}."
            )
        name = str(lines[0].get("prompt_id", ""))
        if not name or len(name) > 200 or not name.isprintable() or any(c in name for c in "/\\."):
            raise VisarError(  # its evaluator cuts names at a dot
                f"DPG-Bench names images by the item_id; give each prompt an id without . / and \\, not {name!r}."
            )
    with new_folder(out) as made:
        for lines in prompts:
            images = [Image.fromarray(_pixels(run, line)) for line in lines]
            width, height = images[0].size
            grid = Image.new("RGB", (2 * width, 2 * height))
            for i, image in enumerate(images):
                grid.paste(image, (i % 2 * width, i // 2 * height))
            grid.save(made / f"{lines[0]['prompt_id']}.png")
    return sum(map(len, prompts))


LAYOUTS: dict[str, Callable[[str | Path, str | Path], int]] = {
    "npz": export_npz,
    "geneval": export_geneval,
    "dpg": export_dpg,
}


def _by_prompt(run: RunFolder, layout: str) -> list[list[Line]]:
    """The lines of each prompt in the order of the prompts file."""
    lines = run.finished()
    if "prompt" not in lines[0]:
        raise VisarError(f"The layout {layout!r} is for prompts, and this run is of classes.")
    about: Any = run.about()
    if "conditions" not in about:
        raise VisarError(f"{run.path} does not say how many prompts its run has.")
    number = min(about["conditions"]["conditions"], len(lines))
    return [lines[p::number] for p in range(number)]


def _pixels(run: RunFolder, line: Line) -> np.ndarray:
    """An image of a run, uint8 [H, W, 3]."""
    file = run.file(line)
    with open_image(file, file) as image:
        return np.asarray(converted(image, "RGB", file))


def _header(file: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
