"""Resumed runs: bit for bit as uninterrupted ones, or a clear word why not."""

from __future__ import annotations

import errno
import logging
import os
import shutil

import pytest
import safetensors.torch
import torch

import sefi_fast
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training import (
    Callbacks,
    CheckpointError,
    TrainConfig,
    TrainingInterrupted,
    subject_state,
    train,
)
from sefi_fast.training.base_model import borrowed, model_checksum
from sefi_fast.training.checkpoint import (
    CheckpointFolder,
    checkpoints_to_resume,
    folder_of,
    newest_step,
)
from sefi_fast.training.subject_state import Job, Learner
from sefi_fast.training.trainer import running
from sefi_fast.utils.tensor_file import pack_tensors, unpack_tensors

PICTURE = sefi_fast.bundled_subject_image()
FAST = {"class_word": CLASS_WORD, "batch_size": 1, "stages": 2, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return sefi_fast.load_pipeline(None)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "me.safetensors"


class StopAfter(Callbacks):
    """Leaves as an interrupt does after some steps."""

    def __init__(self, step):
        self.step = step

    def on_step(self, step, history):
        if step == self.step:
            raise KeyboardInterrupt


def leave_at(step, pipe, output, **settings):
    with pytest.raises(KeyboardInterrupt):
        train(
            PICTURE, model=pipe, output=output, callback=StopAfter(step), **{**FAST, **settings}
        )  # fmt: skip
    assert newest_step(output) == step


def checkpoints(output):
    return CheckpointFolder(folder_of(output))


def assert_same(first, second):
    assert torch.equal(first.tokens[0], second.tokens[0])
    for name in ("loss", "subject_loss", "skipped"):
        assert getattr(first.history, name) == getattr(second.history, name)
    assert len(first.history.validation) == len(second.history.validation)


def test_ten_steps_and_ten_more_are_twenty(pipe, output):
    straight = train(PICTURE, model=pipe, steps=20, **FAST)
    leave_at(10, pipe, output, steps=20)
    resumed = train(PICTURE, model=pipe, steps=20, output=output, resume=True, **FAST)
    assert_same(straight, resumed)
    assert len(resumed.history.loss) == 20
    assert resumed.history.seconds == sorted(resumed.history.seconds)
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.8, "warmup_steps": 2, "schedule": "linear"},
        {"module": "free", "split": False, "weight_lambda": 0.0, "gradient_accumulation": 2},
        {"train_base": False, "templates": ("a {}", "one {}"), "stages": 3},
        {"validation_prompts": ("a {}",), "validation_every": 2, "validation_steps": 1},
    ],
    ids=["average", "free rows", "templates", "validation"],
)
def test_whatever_the_settings_a_resumed_run_is_the_same(pipe, output, settings):
    settings = {**FAST, "steps": 9, **settings}
    straight = train(PICTURE, model=pipe, **settings)
    leave_at(3, pipe, output, **settings)
    resumed = train(PICTURE, model=pipe, output=output, resume="auto", **settings)
    assert_same(straight, resumed)
    for (one_step, one), (other_step, other) in zip(
        straight.history.validation, resumed.history.validation, strict=True
    ):
        assert one_step == other_step
        assert [x.tobytes() for x in one] == [x.tobytes() for x in other]


def test_a_plateau_is_reached_at_the_same_step(pipe, output, monkeypatch):
    monkeypatch.setattr(subject_state, "_WINDOW", 2)
    settings = {"steps": 40, "patience": 4}
    straight = train(PICTURE, model=pipe, **settings, **FAST)
    ended = len(straight.history.loss)
    assert 6 <= ended < 40
    leave_at(ended - 2, pipe, output, **settings)
    assert_same(
        straight, train(PICTURE, model=pipe, output=output, resume=True, **settings, **FAST)
    )


def test_checkpoints_come_when_due_and_go_at_the_end(pipe, output):
    seen = []

    class Watch(Callbacks):
        ended = None

        def on_checkpoint(self, step, path):
            seen.append((step, path.name, checkpoints(output).steps()))

        def on_end(self, subject):
            self.ended = subject, os.listdir(output.parent)

    watch = Watch()
    subject = train(
        PICTURE, model=pipe, output=output, steps=8, checkpoint_every=2, callback=watch, **FAST
    )
    # The eighth step is the last, and its checkpoint would be of no use.
    assert [step for step, _, _ in seen] == [2, 4, 6]
    assert seen[2][1:] == ("step-000006.safetensors", [6, 4])
    assert watch.ended == (subject, [output.name])
    assert torch.equal(Subject.load(output).tokens[0], subject.tokens[0])


def test_no_checkpoints_without_an_output_or_where_none_are_wanted(pipe, output, monkeypatch):
    monkeypatch.chdir(output.parent)
    train(PICTURE, model=pipe, steps=3, checkpoint_every=1, **FAST)
    assert os.listdir(output.parent) == []
    with pytest.raises(KeyboardInterrupt):
        train(
            PICTURE, model=pipe, output=output, steps=5, checkpoint_every=0,
            callback=StopAfter(2), **FAST,
        )  # fmt: skip
    assert os.listdir(output.parent) == [output.name]


def test_an_unfinished_run_is_never_overwritten_silently(pipe, output):
    leave_at(2, pipe, output, steps=4)
    with pytest.raises(CheckpointError, match=r"unfinished run of 2 steps .* resume=True"):
        train(PICTURE, model=pipe, output=output, steps=4, **FAST)
    assert newest_step(output) == 2


def test_beginning_anew_says_so_and_does(pipe, output, caplog):
    leave_at(2, pipe, output, steps=4)
    with caplog.at_level(logging.WARNING):
        anew = train(PICTURE, model=pipe, output=output, steps=4, seed=5, resume=False, **FAST)
    assert "begins anew" in caplog.text
    straight = train(PICTURE, model=pipe, steps=4, seed=5, **FAST)
    assert_same(anew, straight)


def test_nothing_to_go_on_from_is_an_error_unless_auto(pipe, output):
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        train(PICTURE, model=pipe, output=output, steps=2, resume=True, **FAST)
    with pytest.raises(CheckpointError, match="a run without an output"):
        train(PICTURE, model=pipe, steps=2, resume=True, **FAST)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        train(PICTURE, model=pipe, output=output, steps=2, resume=output, **FAST)
    with pytest.raises(TypeError, match="resume must be"):
        train(PICTURE, model=pipe, output=output, steps=2, resume=3, **FAST)
    assert os.listdir(output.parent) == []
    train(PICTURE, model=pipe, output=output, steps=2, resume="auto", **FAST)
    assert output.exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"learning_rate": 0.1}, r"learning_rate was 0\.005, is 0\.1\."),
        (
            {"batch_size": 2, "scene": "in snow"},
            "batch_size was 1, is 2; scene was None, is 'in sn",
        ),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"placeholder": "<me>"}, "placeholder was '<it>', is '<me>'"),
        ({"stages": 3}, "stages was 2, is 3"),
        ({"steps": 2}, "has done 3 steps, more than the 2"),
    ],
)
def test_other_settings_are_named(pipe, output, changed, told):
    leave_at(3, pipe, output, steps=5)
    before = checkpoints(output).file(3).read_bytes()
    for resume in (True, "auto", checkpoints(output).file(3)):
        with pytest.raises(CheckpointError, match=told):
            train(
                PICTURE, model=pipe, output=output, resume=resume,
                **{**FAST, "steps": 5, **changed},
            )  # fmt: skip
    assert checkpoints(output).file(3).read_bytes() == before


def test_another_picture_is_told(pipe, output):
    leave_at(2, pipe, output, steps=4)
    other = torch.rand(96, 96, 3, generator=torch.Generator().manual_seed(1)).numpy()
    with pytest.raises(CheckpointError, match="the image was"):
        train(other, model=pipe, output=output, steps=4, resume=True, **FAST)


def change_one_weight(path):
    tensors = safetensors.torch.load_file(path)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[-1] += 1
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def test_changed_weights_in_the_same_folder_are_told(output, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sefi_fast.bundled_model_path(), folder)
    leave_at(1, folder, output, steps=3)
    (file,) = (folder / "unet").glob("*.safetensors")
    change_one_weight(file)
    before = checkpoints(output).file(1).read_bytes()
    for resume in (True, "auto"):
        with pytest.raises(CheckpointError, match=r"weights or noise schedule was .* resume=False"):
            train(PICTURE, model=folder, output=output, steps=3, resume=resume, **FAST)
    assert checkpoints(output).file(1).read_bytes() == before
    train(PICTURE, model=folder, output=output, steps=3, resume=False, **FAST)


def test_a_model_folder_may_be_copied_and_weights_stored_otherwise(pipe, output, tmp_path):
    straight = train(PICTURE, model=pipe, steps=3, **FAST)
    leave_at(1, pipe, output, steps=3)
    shutil.copytree(sefi_fast.bundled_model_path(), tmp_path / "copy")
    resumed = train(PICTURE, model=tmp_path / "copy", output=output, steps=3, resume=True, **FAST)
    # Weights in other places may be rounded otherwise.
    changed = (straight.tokens[0] - straight.class_embeddings[0]).norm()
    assert (resumed.tokens[0] - straight.tokens[0]).norm() < 0.01 * changed


@pytest.mark.parametrize("changed", ["unet", "text_encoder", "vae", "scheduler", "scaling_factor"])
def test_a_pipeline_that_changed_in_memory_is_told(output, changed):
    pipe = sefi_fast.load_pipeline(None)
    leave_at(1, pipe, output, steps=3)
    if changed == "scheduler":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.013)
    elif changed == "scaling_factor":
        pipe.vae.register_to_config(scaling_factor=0.5)
    else:
        with torch.no_grad():
            list(getattr(pipe, changed).parameters())[5].view(-1)[3] += 1e-3
    with pytest.raises(CheckpointError, match="weights or noise schedule was"):
        train(PICTURE, model=pipe, output=output, steps=3, resume=True, **FAST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_the_checksum_of_weights_is_that_of_their_values(dtype):
    pipe = sefi_fast.load_pipeline(None)
    pipe.unet.to(dtype)
    before = model_checksum(pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    for parameter in pipe.unet.parameters():
        # Not at a multiple of 8 bytes, as in a file that is mapped into memory.
        shifted = torch.empty(parameter.numel() + 1, dtype=dtype)[1:].view(parameter.shape)
        parameter.data = shifted.copy_(parameter.data)
    assert model_checksum(pipe) == before
    with torch.no_grad():
        pipe.unet.conv_in.bias[-1:] = 0.5
    assert model_checksum(pipe) != before


def test_more_steps_and_other_harmless_settings_go_on(pipe, output, caplog):
    leave_at(2, pipe, output, steps=3, schedule="constant")
    harmless = {"checkpoint_every": 1, "keep_checkpoints": 1, "max_seconds": 1e4}
    longer = train(
        PICTURE, model=pipe, output=output, steps=5, schedule="constant", resume=True,
        **FAST, **harmless,
    )  # fmt: skip
    straight = train(PICTURE, model=pipe, steps=5, schedule="constant", **FAST)
    assert_same(longer, straight)
    assert "length" not in caplog.text
    leave_at(2, pipe, output, steps=3)
    train(PICTURE, model=pipe, output=output, steps=4, resume=True, **FAST)
    assert "was to have 3 steps and has 4 now" in caplog.text


def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before(pipe, output, caplog):
    leave_at(3, pipe, output, steps=6, checkpoint_every=2)
    newest = checkpoints(output).file(3)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert newest_step(output) == 2
    resumed = train(
        PICTURE, model=pipe, output=output, steps=6, resume=True, checkpoint_every=1, **FAST
    )
    assert "step-000003.safetensors is damaged" in caplog.text
    assert "the newest whole checkpoint" in caplog.text and "is of step 2" in caplog.text
    assert_same(resumed, train(PICTURE, model=pipe, steps=6, **FAST))


@pytest.fixture(scope="module")
def unfinished(pipe, tmp_path_factory):
    """A subject whose run was left with checkpoints of steps 3 and 2, and their contents."""
    output = tmp_path_factory.mktemp("unfinished") / "me.safetensors"
    settings = {
        "steps": 6, "checkpoint_every": 2, "ema_decay": 0.9,
        "validation_prompts": ("a {}",), "validation_every": 1, "validation_steps": 1,
    }  # fmt: skip
    leave_at(3, pipe, output, **settings)
    config = TrainConfig(batch_size=1, stages=2, **settings)
    with running(pipe, config) as source, borrowed(pipe.vae, source.device, torch.float32):
        learner = Learner(Job(PICTURE, CLASS_WORD, output=output), source, config)
    files = {step: checkpoints(output).file(step).read_bytes() for step in (3, 2)}
    return output, learner, files


def _without(*names):
    return lambda metadata, tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(names)]


def _with(name, value):
    return lambda metadata, tensors: tensors.update({name: value})


def _saying(name, text):
    return lambda metadata, tensors: metadata.update({name: text})


LONG = torch.float64
HOSTILE_CHECKPOINTS = {
    "no history": _without("history."),
    "no loss": _without("history.loss"),
    "no generator": _without("engine.generator"),
    "no engine": _without("engine."),
    "no run": _without("run."),
    "no average": _without("average."),
    "no updates": _without("average.updates"),
    "nothing": _without(""),
    "history of a step more": _with("history.skipped", torch.tensor([1])),
    "history of another length": _with("history.loss", torch.zeros(2, dtype=LONG)),
    "history of NaN": _with("history.seconds", torch.full((3,), torch.nan, dtype=LONG)),
    "history of words": _with("history.loss", torch.zeros(3, dtype=torch.uint8)),
    "history of a number": _with("history.skipped", torch.tensor(0)),
    "image of another name": _with("history.validation.x", torch.zeros(3, dtype=torch.uint8)),
    "image of nothing": _with("history.validation.1.0", torch.zeros(3, dtype=torch.uint8)),
    "image of floats": _with("history.validation.1.0", torch.zeros(3)),
    "generator of zeros": _with("engine.generator", torch.zeros(5056, dtype=torch.uint8)),
    "generator too short": _with("engine.generator", torch.zeros(16, dtype=torch.uint8)),
    "generator of floats": _with("engine.generator", torch.zeros(5056)),
    "step of the engine": _with("engine.step", torch.tensor(2)),
    "step below 0": _with("engine.step", torch.tensor(-3)),
    "step of floats": _with("engine.step", torch.tensor(3.0)),
    "steps": _with("engine.step", torch.tensor([3, 3])),
    "scale of another shape": _with("engine.scale", torch.ones(2)),
    "tokens of another dtype": _with("engine.last_good", torch.zeros(2, 2, 1, 4, dtype=torch.half)),
    "failures": _with("run.failures", torch.tensor(-1)),
    "updates": _with("average.updates", torch.tensor(2**62)),
    "average of another shape": _with("average.average", torch.zeros(2**4)),
    "deep settings": _saying("settings", "[" * 100_000),
    "settings of a list": _saying("settings", "[]"),
    "identity of a number": _saying("identity", "1"),
    "identity twice": _saying("identity", '{"mask": "a", "mask": "b"}'),
    "step of a word": _saying("step", "three"),
    "step of many digits": _saying("step", "3" * 100_000),
    "step of another name": _saying("step", "5"),
    "version of a word": _saying("format_version", "one"),
}


@pytest.mark.parametrize("change", HOSTILE_CHECKPOINTS.values(), ids=list(HOSTILE_CHECKPOINTS))
def test_a_run_goes_on_from_the_checkpoint_before_a_hostile_one(unfinished, change, caplog):
    output, learner, files = unfinished
    folder = checkpoints(output)
    assert list(checkpoints_to_resume(learner.unfinished(), True)) == [3, 2]
    metadata, tensors = unpack_tensors(files[3], checksum=True)
    change(metadata, tensors)
    try:
        folder.file(3).write_bytes(pack_tensors(tensors, metadata, checksum=True))
        assert list(checkpoints_to_resume(learner.unfinished(), True)) == [2]
        assert "step-000003.safetensors is" in caplog.text and "left aside" in caplog.text
        with pytest.raises(CheckpointError, match=r"step-000003\.safetensors is"):
            checkpoints_to_resume(learner.unfinished(), folder.file(3))
    finally:
        folder.file(3).write_bytes(files[3])


@pytest.mark.parametrize("resume", [True, "auto"])
def test_no_whole_checkpoint_is_an_error_not_a_restart(pipe, output, resume):
    leave_at(3, pipe, output, steps=6, checkpoint_every=2)
    for step in checkpoints(output).steps():
        checkpoints(output).file(step).write_bytes(b"foreign")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints .* is whole"):
        train(PICTURE, model=pipe, output=output, steps=6, resume=resume, **FAST)
    assert checkpoints(output).steps() == [3, 2]


def test_a_path_names_the_checkpoint_or_its_folder(pipe, output, tmp_path):
    leave_at(3, pipe, output, steps=5, checkpoint_every=2)
    kept = tmp_path / "kept"
    shutil.copytree(folder_of(output), kept)
    shutil.rmtree(folder_of(output))
    straight = train(PICTURE, model=pipe, steps=5, **FAST)
    for resume in (kept, kept / "step-000002.safetensors", str(kept)):
        resumed = train(PICTURE, model=pipe, output=output, steps=5, resume=resume, **FAST)
        assert_same(resumed, straight)
    assert len(os.listdir(kept)) == 2


def test_something_in_the_way_of_checkpoints_is_told_before_training(pipe, output):
    folder_of(output).write_text("a file")
    with pytest.raises(OSError, match="is in the way"):
        train(PICTURE, model=pipe, output=output, steps=2, **FAST)
    assert folder_of(output).read_text() == "a file"
    # What the message advises.
    train(PICTURE, model=pipe, output=output, steps=2, checkpoint_every=0, **FAST)
    assert folder_of(output).read_text() == "a file"


@pytest.mark.parametrize("resume", [None, True, "auto", False])
@pytest.mark.parametrize("every", [0, 1])
def test_nothing_of_a_linked_checkpoint_folder_is_deleted(pipe, output, tmp_path, resume, every):
    target = tmp_path / "target"
    target.mkdir()
    kept = [target / "step-000001.safetensors", target / ".step-000002.safetensors.0123abcd"]
    for path in kept:
        path.write_text("precious")
    folder_of(output).symlink_to(target, target_is_directory=True)
    settings = {"steps": 2, "checkpoint_every": every, "resume": resume, **FAST}
    if every == 0 and resume is not True:
        train(PICTURE, model=pipe, output=output, **settings)
    else:
        error = CheckpointError if every == 0 else FileExistsError
        with pytest.raises(error, match=r"is in the way: it is a link|no checkpoint to go on"):
            train(PICTURE, model=pipe, output=output, **settings)
    assert folder_of(output).is_symlink()
    assert sorted(target.iterdir()) == sorted(kept)
    assert {path.read_text() for path in kept} == {"precious"}


def test_a_full_disk_stops_no_run_and_costs_no_older_checkpoint(pipe, output, caplog, monkeypatch):
    honest, room = os.fsync, [2]

    def fsync(handle):
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(handle)

    class Fill(Callbacks):
        def on_checkpoint(self, step, path):
            if step == 2:
                room[0] = 0

        def on_step(self, step, history):
            if step == 6:
                assert checkpoints(output).steps() == [2]
                room[0] = 1000

    monkeypatch.setattr(os, "fsync", fsync)
    arguments = {"steps": 7, "checkpoint_every": 2, **FAST}
    subject = train(PICTURE, model=pipe, output=output, callback=Fill(), **arguments)
    assert "step 4 could not be written" in caplog.text
    assert "No space left" in caplog.text and "the one of step 2 stays" in caplog.text
    monkeypatch.undo()
    assert_same(subject, train(PICTURE, model=pipe, **arguments))


def test_a_disk_that_is_full_at_the_end_loses_nothing(pipe, output, monkeypatch):
    from sefi_fast.training import UnsavedSubjectError

    def save(subject, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Subject, "save", save)
        with pytest.raises(UnsavedSubjectError, match=r"No space left.*step 4 stays") as caught:
            train(PICTURE, model=pipe, output=output, steps=5, checkpoint_every=2, **FAST)
    resumed = train(PICTURE, model=pipe, output=output, steps=5, resume=True, **FAST)
    assert_same(caught.value.subject, resumed)


def test_what_a_kill_left_of_writing_the_subject_goes(pipe, output):
    partial = output.with_name(".me.safetensors.0123abcd")
    other = output.with_name(".me.safetensors.notes")
    for path in (partial, other):
        path.write_bytes(b"half")
    train(PICTURE, model=pipe, output=output, steps=1, **FAST)
    assert sorted(os.listdir(output.parent)) == [other.name, output.name]


def test_an_interrupted_run_says_how_to_go_on(pipe, output):
    with pytest.raises(KeyboardInterrupt) as caught:
        train(PICTURE, model=pipe, output=output, steps=5, callback=StopAfter(2), **FAST)
    assert not isinstance(caught.value, TrainingInterrupted)
    message = str(caught.value)
    assert "after 2 of 5 steps" in message and "goes on from step 2" in message
