"""Several subjects in one run: each as if it were alone, each with its own end and files."""

from __future__ import annotations

import os

import pytest
import torch
from training.shared import BUNDLED_IMAGE, assert_near, newest_step

from sefi_fast.errors import ImageError, PromptError
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training import NonFiniteLossError, TrainConfig, TrainingInterrupted, train
from sefi_fast.training.base_model import training_session
from sefi_fast.training.subject_state import SubjectSpec
from sefi_fast.training.trainer import Run

CONFIG = TrainConfig(steps=4, batch_size=1, stages=2, schedule="constant")


def spec(**changed):
    usual = {"image": BUNDLED_IMAGE, "class_word": CLASS_WORD, "placeholder": "<it>"}
    return SubjectSpec(**{**usual, **changed})


def run(pipe, specs, config=CONFIG, resume=None, on_result=None):
    with training_session(pipe, config) as base:
        return Run(base, config, specs, resume=resume)(progress=False, on_result=on_result)


def alone(pipe, config=CONFIG, **overrides):
    return train(
        BUNDLED_IMAGE, model=pipe, class_word=CLASS_WORD, config=config, progress=False,
        **overrides,
    )  # fmt: skip


def test_subjects_train_as_if_alone_and_bad_ones_are_dropped(bundled, tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(5)]
    seen = []
    specs = [
        spec(seed=1, output=files[0]),
        spec(image=tmp_path / "missing.png", output=files[1]),
        spec(seed=2, output=files[2], placeholder="<two>"),
        spec(class_word="xylophone quartet", output=files[3]),
        spec(seed=3, output=files[4], scene="in the snow"),
    ]
    results = run(bundled, specs, on_result=lambda number, result: seen.append((number, result)))
    assert isinstance(results[1], ImageError) and isinstance(results[3], PromptError)
    assert_near(results[0], alone(bundled, seed=1))
    assert_near(results[2], alone(bundled, seed=2, placeholder="<two>"))
    assert_near(results[4], alone(bundled, seed=3, scene="in the snow"))
    assert results[4].settings["seed"] == 3 and results[4].settings["scene"] == "in the snow"
    assert [number for number, _ in seen] == [1, 3, 0, 2, 4]
    assert all(results[number] is result for number, result in seen)
    assert sorted(os.listdir(tmp_path)) == [files[number].name for number in (0, 2, 4)]
    assert torch.equal(Subject.load(files[2]).tokens[0], results[2].tokens[0])
    results = run(bundled, [spec(image=tmp_path / "missing.png")] * 2)
    assert all(isinstance(result, ImageError) for result in results)


def test_a_subject_that_ends_early_leaves_the_others_alone(bundled):
    specs = [spec(seed=1, callback=lambda step, history: step == 2), spec(seed=2), spec(seed=3)]
    results = run(bundled, specs)
    assert [len(result.history.loss) for result in results] == [2, 4, 4]
    assert_near(results[0], alone(bundled, seed=1, steps=2))
    assert_near(results[1], alone(bundled, seed=2))


def test_a_subject_without_finite_losses_is_dropped_with_its_last_good_state(
    bundled, tmp_path, monkeypatch, spoil
):
    # The first of the two subjects, from the second step on.
    spoil({1, 2, 3}, samples=0)
    partial, output = tmp_path / "partial.safetensors", tmp_path / "bad.safetensors"
    config = TrainConfig.from_overrides(CONFIG, {"steps": 6})
    results = run(bundled, [spec(seed=1, output=output, partial=partial), spec(seed=2)], config)
    assert isinstance(results[0], NonFiniteLossError)
    assert "step 4: 3 steps in a row" in str(results[0])
    assert torch.equal(Subject.load(partial).tokens[0], results[0].subject.tokens[0])
    assert os.listdir(tmp_path) == [partial.name]
    monkeypatch.undo()
    assert_near(results[1], alone(bundled, config, seed=2))


def test_an_interrupted_run_goes_on_next_to_new_subjects(bundled, tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]

    def interrupt(step, history):
        if step == 2:
            raise TrainingInterrupted("", 15, step)

    begun = [spec(seed=n, output=files[n]) for n in (0, 1)]
    with pytest.raises(TrainingInterrupted, match="goes on from step 2"):
        run(bundled, [begun[0], spec(seed=1, output=files[1], callback=interrupt)])
    assert [newest_step(file) for file in files] == [2, 2, 0]
    results = run(bundled, [*begun, spec(seed=2, output=files[2])], resume="auto")
    for number, result in enumerate(results):
        assert_near(result, alone(bundled, seed=number))
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]


def test_each_subject_has_its_own_average(bundled):
    config = TrainConfig.from_overrides(CONFIG, {"ema_decay": 0.5})
    for number, result in enumerate(run(bundled, [spec(seed=1), spec(seed=2)], config), 1):
        assert_near(result, alone(bundled, config, seed=number))
        plain = alone(bundled, seed=number)
        assert not torch.allclose(result.tokens[0], plain.tokens[0], rtol=0, atol=2e-4)


def test_time_that_is_up_ends_all(bundled):
    config = TrainConfig.from_overrides(CONFIG, {"steps": 10_000, "max_seconds": 0.5})
    for result in run(bundled, [spec(seed=1), spec(seed=2)], config):
        assert 1 <= len(result.history.loss) < 10_000
        assert result.history.seconds[-1] >= 0.5
        assert all(second < 0.5 for second in result.history.seconds[:-1])
