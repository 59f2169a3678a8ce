"""An image while it is decoded, as a GIF: `python examples/watch_decoding.py "a red heart, 3d"`."""

import sys

from PIL import Image

from visar import TextToImagePipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red heart, 3d"
frames = []


def show(progress):
    """Called after each pass. A preview is one pixel per token: cheap, and grey where nothing is committed yet."""
    frames.append(Image.fromarray(progress.preview()[0].numpy()).resize((256, 256), Image.Resampling.NEAREST))


pipe = TextToImagePipeline.from_pretrained("icons")
out = pipe(prompt, seed=0, callback=show)
frames.append(out.images[0].resize((256, 256)))
frames[0].save("decoding.gif", save_all=True, append_images=frames[1:], duration=[50] * (len(frames) - 1) + [2000])
print(f"decoding.gif: {len(frames) - 1} passes for {out.tokens.shape[1]} tokens")
