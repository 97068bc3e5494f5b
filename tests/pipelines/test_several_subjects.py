"""Four subjects in one prompt, each from a file of its own, with stages and words of their own."""

from __future__ import annotations

import pytest
import torch
from pipelines.sampling import draw, sample_by_hand, subject_for
from pipelines.sampling_xl import sample_xl_by_hand

from sefi_fast import attach, trace

PROMPT = "a photo of a <a> and a <b> with a <c> on a <d>"
# Stages that meet on ten, one tied, one of two vectors.
FOUR = {"<a>": ("cat", 5, True), "<b>": ("red dog", 10, True), "<c>": ("bear", 1, True)} | {
    "<d>": ("person", 2, False)
}


def four(pipe, folder, **options) -> tuple[list, list]:
    """The subjects and the files they were written to."""
    subjects = [
        subject_for(pipe, name, word, stages=stages, split=split, **options)
        for name, (word, stages, split) in FOUR.items()
    ]
    files = [folder / f"{subject.class_word}.safetensors" for subject in subjects]
    for subject, file in zip(subjects, files, strict=True):
        subject.save(file)
    return subjects, files


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_each_draws_from_its_own_file(request, family, tmp_path):
    pipe = request.getfixturevalue(f"{family}_pipeline")
    subjects, files = four(pipe, tmp_path)
    by_hand = sample_by_hand if family == "sd15" else sample_xl_by_hand
    expected = by_hand(pipe, PROMPT, subjects, steps=7)
    attach(pipe, files)
    actual = draw(pipe, PROMPT, num_inference_steps=7)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)
    for left_out in subjects if family == "sd15" else subjects[:1]:
        prompt = PROMPT.replace(left_out.placeholder, left_out.class_word)
        assert (draw(pipe, prompt, num_inference_steps=7) - actual).abs().max() > 1e-2


def test_untrained_ones_draw_their_class_words(sd15_pipeline, tmp_path):
    pipe = sd15_pipeline
    expected = draw(pipe, "a photo of a cat and a red dog with a bear on a person")
    _, files = four(pipe, tmp_path, distance=0)
    attach(pipe, files)
    torch.testing.assert_close(draw(pipe, PROMPT), expected, rtol=0, atol=2e-4)


def test_they_may_stand_in_any_order_and_more_than_once(sd15_pipeline, tmp_path):
    pipe = sd15_pipeline
    subjects, files = four(pipe, tmp_path)
    prompt = "the <d> of <b>, a <a> and the <d>"
    named = [subject for subject in subjects if subject.placeholder != "<c>"]
    expected = sample_by_hand(pipe, prompt, named)
    attach(pipe, reversed(files))
    torch.testing.assert_close(draw(pipe, prompt), expected, rtol=0, atol=2e-4)


def test_each_has_a_map_of_its_own(sd15_pipeline, tmp_path):
    pipe = sd15_pipeline
    attach(pipe, four(pipe, tmp_path)[1])
    with trace(pipe, list(FOUR)) as found:
        draw(pipe, PROMPT)
    maps = list(found.maps.values())
    for index, one in enumerate(maps):
        assert one.shape == (1, 16, 16) and bool(one.any())
        assert all((one - other).abs().max() > 1e-4 for other in maps[:index])


def test_two_with_one_placeholder_are_refused_and_the_others_stay(sd15_pipeline, tmp_path):
    pipe = sd15_pipeline
    files = four(pipe, tmp_path)[1]
    attach(pipe, files)
    with pytest.raises(ValueError, match="2 of the subjects have the placeholder '<a>'"):
        attach(pipe, [files[0], files[1], files[0]])
    assert [s.placeholder for s in pipe.encode_prompt.subjects] == list(FOUR)
