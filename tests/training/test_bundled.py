"""The bundled model trains by default, with nothing but an image given."""

from __future__ import annotations

import pytest

import sefi_fast
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD


def test_a_picture_alone_is_enough(tmp_path):
    path = tmp_path / "subject.safetensors"
    subject = sefi_fast.train(
        sefi_fast.bundled_subject_image(), output=path, steps=3, progress=False
    )
    assert (subject.placeholder, subject.class_word) == ("<it>", CLASS_WORD)
    assert subject.settings["model"] is None
    assert len(subject.history.loss) == len(subject.history.subject_loss) == 3
    assert subject.history.subject_loss[0] == pytest.approx(0, abs=1e-9)
    assert subject.history.subject_loss[-1] > 0
    assert path.stat().st_size < 100_000
    pipe = sefi_fast.attach(sefi_fast.load_pipeline(None), Subject.load(path))
    pipe.set_progress_bar_config(disable=True)
    (picture,) = sefi_fast.generate(pipe, "a photo of a <it> in the snow", steps=2)
    assert picture.mode == "RGB"


def test_a_larger_weight_holds_the_alignment():
    runs = {
        weight: sefi_fast.train(
            sefi_fast.bundled_subject_image(),
            steps=30,
            batch_size=2,
            progress=False,
            weight_lambda=weight,
        ).history
        for weight in (0.003, 0.1)
    }
    ends = {weight: sum(history.subject_loss[-20:]) for weight, history in runs.items()}
    assert ends[0.1] < 0.5 * ends[0.003]
