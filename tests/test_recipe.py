"""What a PNG file says of its making: sizes that are no square."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from visar.recipe import Recipe


def test_a_height_and_a_width(tmp_path: Path) -> None:
    recipe = Recipe(model="glm", prompt="a cat", sampler="scd", exactness="exact", load=[("image-size", "96x64")])
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png", pnginfo=recipe.info())
    found = Recipe.read(tmp_path / "a.png")
    assert found == recipe and "--image-size 96x64" in found.command() and "image_size='96x64'" in found.python()
