"""Several subjects in one run: each as if it were alone, each with its own end and files."""

from __future__ import annotations

import os

import pytest
import torch

import sefi_fast
from sefi_fast.errors import ImageError, PromptError
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training import NonFiniteLossError, TrainConfig, TrainingInterrupted, train
from sefi_fast.training import step as step_module
from sefi_fast.training.checkpoint import CheckpointError, newest_step
from sefi_fast.training.subject_state import Job
from sefi_fast.training.trainer import Run, running

PICTURE = sefi_fast.bundled_subject_image()
CONFIG = TrainConfig(steps=4, batch_size=1, stages=2, schedule="constant")


@pytest.fixture(scope="module")
def pipe():
    return sefi_fast.load_pipeline(None)


def job(**changed):
    return Job(**{"image": PICTURE, "class_word": CLASS_WORD, **changed})


def run(pipe, jobs, config=CONFIG, resume=None, on_outcome=None):
    with running(pipe, config) as source:
        return Run(source, config, jobs, resume=resume)(progress=False, on_outcome=on_outcome)


def alone(pipe, config=CONFIG, **overrides):
    return train(
        PICTURE, model=pipe, class_word=CLASS_WORD, config=config, progress=False, **overrides
    )


def assert_near(one, other):
    torch.testing.assert_close(one.tokens[0], other.tokens[0], rtol=0, atol=2e-4)
    assert one.history.loss == pytest.approx(other.history.loss, rel=1e-3)


def test_subjects_side_by_side_are_as_alone_and_bad_ones_are_dropped(pipe, tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(5)]
    told = []
    jobs = [
        job(seed=1, output=files[0]),
        job(image=tmp_path / "missing.png", output=files[1]),
        job(seed=2, output=files[2], placeholder="<two>"),
        job(class_word="xylophone quartet", output=files[3]),
        job(seed=3, output=files[4], scene="in the snow"),
    ]
    outcomes = run(pipe, jobs, on_outcome=lambda number, outcome: told.append((number, outcome)))
    assert isinstance(outcomes[1], ImageError) and isinstance(outcomes[3], PromptError)
    assert_near(outcomes[0], alone(pipe, seed=1))
    assert_near(outcomes[2], alone(pipe, seed=2, placeholder="<two>"))
    assert_near(outcomes[4], alone(pipe, seed=3, scene="in the snow"))
    assert outcomes[4].settings["seed"] == 3 and outcomes[4].settings["scene"] == "in the snow"
    assert [number for number, _ in told] == [1, 3, 0, 2, 4]
    assert all(outcomes[number] is outcome for number, outcome in told)
    assert sorted(os.listdir(tmp_path)) == [files[number].name for number in (0, 2, 4)]
    assert torch.equal(Subject.load(files[2]).tokens[0], outcomes[2].tokens[0])


def test_all_bad_subjects_are_a_run_too(pipe, tmp_path):
    outcomes = run(pipe, [job(image=tmp_path / "missing.png")] * 2)
    assert all(isinstance(outcome, ImageError) for outcome in outcomes)


def test_a_subject_that_ends_early_leaves_the_others_alone(pipe):
    jobs = [job(seed=1, callback=lambda step, history: step == 2), job(seed=2), job(seed=3)]
    outcomes = run(pipe, jobs)
    assert [len(outcome.history.loss) for outcome in outcomes] == [2, 4, 4]
    assert_near(outcomes[0], alone(pipe, seed=1, steps=2))
    assert_near(outcomes[1], alone(pipe, seed=2))


def test_a_subject_without_finite_losses_is_dropped_with_its_last_good_state(
    pipe, tmp_path, monkeypatch
):
    calls = iter(range(1000))
    honest = step_module.noise_loss

    def noise_loss(prediction, target):
        loss = honest(prediction, target)
        # The first of the two subjects, from the second step on.
        bad = torch.zeros_like(loss)
        if next(calls) >= 1 and len(loss) == 2:
            bad[0] = float("nan")
        return loss + bad

    monkeypatch.setattr(step_module, "noise_loss", noise_loss)
    partial = tmp_path / "partial.safetensors"
    output = tmp_path / "bad.safetensors"
    config = TrainConfig.from_overrides(CONFIG, {"steps": 6})
    outcomes = run(pipe, [job(seed=1, output=output, partial=partial), job(seed=2)], config)
    assert isinstance(outcomes[0], NonFiniteLossError)
    assert "step 4: 3 steps in a row" in str(outcomes[0])
    assert torch.equal(Subject.load(partial).tokens[0], outcomes[0].subject.tokens[0])
    assert os.listdir(tmp_path) == [partial.name]
    monkeypatch.undo()
    assert_near(outcomes[1], alone(pipe, config, seed=2))


def test_an_interrupted_run_goes_on_whoever_is_beside(pipe, tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]

    def interrupt(step, history):
        if step == 2:
            raise TrainingInterrupted("", 15, step)

    begun = [job(seed=n, output=files[n]) for n in (0, 1)]
    with pytest.raises(TrainingInterrupted, match="goes on from step 2"):
        run(pipe, [begun[0], job(seed=1, output=files[1], callback=interrupt)])
    assert [newest_step(file) for file in files] == [2, 2, 0]
    assert sorted(os.listdir(tmp_path)) == [f"{file.name}.checkpoints" for file in files[:2]]
    # A third that begins beside those that go on.
    outcomes = run(pipe, [*begun, job(seed=2, output=files[2])], resume="auto")
    for number, outcome in enumerate(outcomes):
        assert len(outcome.history.loss) == 4
        assert_near(outcome, alone(pipe, seed=number))
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]


def test_one_subject_of_other_settings_is_told_and_the_others_go_on(pipe, tmp_path):
    output = tmp_path / "me.safetensors"

    def interrupt(step, history):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, [job(seed=1, output=output, callback=interrupt)])
    outcomes = run(pipe, [job(seed=5, output=output), job(seed=2)], resume="auto")
    assert isinstance(outcomes[0], CheckpointError) and "seed was 1, is 5" in str(outcomes[0])
    assert_near(outcomes[1], alone(pipe, seed=2))
    with pytest.raises(ValueError, match="2 subjects train here"):
        run(pipe, [job(), job()], resume=output)


def test_the_average_is_each_subjects_own(pipe):
    config = TrainConfig.from_overrides(CONFIG, {"ema_decay": 0.5})
    outcomes = run(pipe, [job(seed=1), job(seed=2)], config)
    for number, outcome in enumerate(outcomes, 1):
        assert_near(outcome, alone(pipe, config, seed=number))
        assert not torch.allclose(
            outcome.tokens[0], alone(pipe, seed=number).tokens[0], rtol=0, atol=2e-4
        )


def test_time_that_is_up_ends_all(pipe):
    config = TrainConfig.from_overrides(CONFIG, {"steps": 10_000, "max_seconds": 0.5})
    outcomes = run(pipe, [job(seed=1), job(seed=2)], config)
    for outcome in outcomes:
        assert 1 <= len(outcome.history.loss) < 10_000
        assert outcome.history.seconds[-1] >= 0.5
        assert all(second < 0.5 for second in outcome.history.seconds[:-1])
