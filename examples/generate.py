"""Images of prompts: `python examples/generate.py "a red heart, 3d" "a lion, noto"`."""

import sys

from visar import TextToImagePipeline

prompts = sys.argv[1:] or ["a red heart, 3d"]
pipe = TextToImagePipeline.from_pretrained("icons")
out = pipe(prompts, seed=0)
for number, image in enumerate(out.images):
    image.save(f"image-{number}.png")
print(out.stats)  # sampler, exact or relaxed, NFE, tokens per pass, ms per pass
