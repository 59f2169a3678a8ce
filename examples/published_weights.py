"""Images by class from LlamaGen's published files: `python examples/published_weights.py c2i_L_384.pt vq_ds16_c2i.pt`.

The files are those of the hub repository FoundationVision/LlamaGen. Classes are ImageNet's: 207 is a golden retriever.
"""

import sys

import torch

from visar import ClassToImagePipeline

weights, vq = sys.argv[1:3]
cuda = torch.cuda.is_available()
pipe = ClassToImagePipeline.from_single_file(weights, vq=vq)
pipe = pipe.to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
out = pipe([207, 360], guidance_scale=4.0, seed=0)
for label, image in zip((207, 360), out.images, strict=True):
    image.save(f"class-{label}.png")
print(out.stats)
