"""Two samplers at the same prompts and seeds: `python examples/compare_samplers.py ar scd`.

NFE (passes of the model) and milliseconds per pass are apart: their product is the time.
"""

import sys

from visar import TextToImagePipeline

PROMPTS = ["a red heart, 3d", "a lion, noto"]

samplers = sys.argv[1:] or ["ar", "scd"]
pipe = TextToImagePipeline.from_pretrained("icons")
pipe.set_progress_bar_config(disable=True)
pipe(PROMPTS[0], sampler=samplers[-1])  # warm-up

print(f"{'sampler':<10}{'exact':<8}{'NFE':>8}{'ms/pass':>10}{'seconds':>10}")
for name in samplers:
    runs = [pipe(prompt, sampler=name, seed=0, output_type="tokens").stats for prompt in PROMPTS]
    nfe, seconds = sum(s.nfe for s in runs) / len(runs), sum(s.seconds for s in runs) / len(runs)
    ms = sum(s.ms_per_pass for s in runs) / len(runs)
    print(f"{name:<10}{runs[0].exact!s:<8}{nfe:>8.1f}{ms:>10.2f}{seconds:>10.3f}")
