"""Many images in a folder: `python examples/many_images.py FOLDER COUNT`. A killed run goes on where it was."""

import json
import sys
from pathlib import Path

from visar import TextToImagePipeline
from visar.bulk import sample_images

PROMPTS = ["a red heart, 3d", "a lion, noto", "a green apple, flat"]

folder, count = Path(sys.argv[1] if len(sys.argv) > 1 else "set"), int(sys.argv[2]) if len(sys.argv) > 2 else 12
pipe = TextToImagePipeline.from_pretrained("icons")
pipe.set_progress_bar_config(disable=True)
print(sample_images(pipe, PROMPTS, folder, count=count, sampler="scd", batch=4, seed=0))

for line in (folder / "manifest.jsonl").read_text().splitlines()[:3]:
    row = json.loads(line)
    print(row["id"], row["prompt"], row["stats"]["passes"])
