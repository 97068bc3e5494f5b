"""Train the bundled subject on the bundled model, and generate it in another scene.

python examples/train_one.py [IMAGE] [STEPS]
"""

from __future__ import annotations

import sys

import sefi_fast

image = sys.argv[1] if len(sys.argv) > 1 else sefi_fast.bundled_subject_image()
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200

pipe = sefi_fast.load_pipeline(sefi_fast.bundled_model_path())
subject = sefi_fast.train(
    image, model=pipe, class_word="creature", output="subject.safetensors", steps=steps
)
sefi_fast.attach(pipe, subject)
for number, found in enumerate(sefi_fast.generate(pipe, "a photo of a <it> in the snow", n=2)):
    found.save(f"subject-{number}.png")
