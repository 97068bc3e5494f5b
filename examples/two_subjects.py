"""Generate two subjects in one image, each in its own region.

python examples/two_subjects.py LEFT.safetensors RIGHT.safetensors [MODEL]
"""

from __future__ import annotations

import sys

import sefi_fast

left, right = (sefi_fast.Subject.load(path) for path in sys.argv[1:3])
model = sys.argv[3] if len(sys.argv) > 3 else sefi_fast.bundled_model_path()

pipe = sefi_fast.load_pipeline(model)
sefi_fast.attach(pipe, [left, right])
boxes = {
    f"a photo of a {left.placeholder}": (0, 0, 0.5, 1),
    f"a photo of a {right.placeholder}": (0.5, 0, 1, 1),
}
side = pipe.unet.config.sample_size * pipe.vae_scale_factor
with sefi_fast.regions(pipe, boxes):
    images = sefi_fast.generate(pipe, "a photo of two creatures", width=2 * side, height=side)
images[0].save("two.png")
