"""Train three subjects in one batch.

python examples/train_many.py [STEPS]
"""

from __future__ import annotations

import sys

import sefi_fast

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
image = str(sefi_fast.bundled_subject_image())

results = sefi_fast.train_many(
    [{"image": image, "name": name, "seed": seed} for seed, name in enumerate(("ada", "bo", "cy"))],
    model=sefi_fast.bundled_model_path(),
    class_word="creature",
    output="subjects",
    batch_subjects=3,
    steps=steps,
)
for result in results:
    print(result.name, result.path if result.error is None else result.error)
