"""Unfinished runs go on bit for bit, and never from the checkpoint of another run."""

from __future__ import annotations

import errno
import logging
import os
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from training.shared import (
    BUNDLED_IMAGE,
    FAST,
    QUICK,
    assert_same,
    checkpoints,
    newest_step,
    raising,
    random_image,
    stop_at,
)

import sefi_fast
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training import (
    Callbacks,
    CheckpointError,
    TrainConfig,
    UnsavedSubjectError,
    load_image,
    subject_state,
    train,
)
from sefi_fast.training.base_model import BaseModel, temporarily_frozen, training_session
from sefi_fast.training.checkpoint import checkpoint_to_resume, folder_of
from sefi_fast.training.subject_state import SubjectSpec, SubjectState
from sefi_fast.utils.tensor_file import pack_tensors, unpack_tensors


@pytest.fixture
def quick(bundled, output):
    """Train the bundled model: `quick()` to the output, `quick(output=None)` without."""

    def quick(image=BUNDLED_IMAGE, **settings):
        return train(image, **{"model": bundled, "output": output, **QUICK, **settings})

    return quick


@pytest.fixture
def leave_at(quick, output):
    """Interrupt a run after some steps."""

    def leave_at(step, **settings):
        with pytest.raises(KeyboardInterrupt):
            quick(callback=stop_at(step), **settings)
        assert newest_step(output) == step

    return leave_at


def test_ten_steps_and_ten_more_are_twenty(quick, leave_at, output):
    straight = quick(output=None, steps=20)
    leave_at(10, steps=20)
    resumed = quick(steps=20, resume=True)
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
def test_a_resumed_run_is_the_same_for_all_settings(quick, leave_at, settings):
    straight = quick(output=None, steps=9, **settings)
    leave_at(3, steps=9, **settings)
    assert_same(straight, quick(steps=9, resume="auto", **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.8, "schedule": "linear", "templates": ("a {}", "one {}")},
        {"preset": "prospect", "gradient_accumulation": 2},
    ],
    ids=["average", "prospect"],
)
def test_a_resumed_run_of_sdxl_is_the_same(sdxl_pipeline, photo, output, settings):
    arguments = {"model": sdxl_pipeline, "class_word": "cat", **FAST, "steps": 5, **settings}
    straight = train(photo, **arguments)
    with pytest.raises(KeyboardInterrupt):
        train(photo, output=output, callback=stop_at(2), **arguments)
    wider = load_image(np.pad(np.asarray(photo), ((0, 0), (4, 4), (0, 0))))
    with pytest.raises(ValueError, match=r"size and crop was '\[300, 451, 0, 16, 64, 64\]', is"):
        train(wider, output=output, resume=True, **arguments)
    assert_same(straight, train(photo, output=output, resume=True, **arguments))


def test_early_stopping_ends_a_resumed_run_at_the_same_step(quick, leave_at, monkeypatch):
    monkeypatch.setattr(subject_state, "_WINDOW", 2)
    settings = {"steps": 40, "patience": 4}
    straight = quick(output=None, **settings)
    ended = len(straight.history.loss)
    assert 6 <= ended < 40
    leave_at(ended - 2, **settings)
    assert_same(straight, quick(resume=True, **settings))


def test_checkpoints_come_when_due_and_go_at_the_end(quick, output):
    seen = []

    class Watch(Callbacks):
        ended = None

        def on_checkpoint(self, step, path):
            seen.append((step, path.name, checkpoints(output).steps()))

        def on_end(self, subject):
            self.ended = subject, os.listdir(output.parent)

    watch = Watch()
    subject = quick(steps=8, checkpoint_every=2, callback=watch)
    # The eighth step is the last, and its checkpoint would be of no use.
    assert [step for step, _, _ in seen] == [2, 4, 6]
    assert seen[2][1:] == ("step-000006.safetensors", [6, 4])
    assert watch.ended == (subject, [output.name])
    assert torch.equal(Subject.load(output).tokens[0], subject.tokens[0])


def test_no_checkpoints_without_an_output_or_where_none_are_wanted(quick, output, monkeypatch):
    monkeypatch.chdir(output.parent)
    quick(output=None, steps=3, checkpoint_every=1)
    assert os.listdir(output.parent) == []
    with pytest.raises(KeyboardInterrupt):
        quick(steps=5, checkpoint_every=0, callback=stop_at(2))
    assert os.listdir(output.parent) == [output.name]


def test_an_unfinished_run_is_overwritten_on_request_only(quick, leave_at, output, caplog):
    leave_at(2, steps=4)
    with pytest.raises(CheckpointError, match=r"unfinished run of 2 steps .* resume=True"):
        quick(steps=4)
    assert newest_step(output) == 2
    with caplog.at_level(logging.WARNING):
        again = quick(steps=4, seed=5, resume=False)
    assert "begins again" in caplog.text
    assert_same(again, quick(output=None, steps=4, seed=5))


def test_no_checkpoint_is_an_error_unless_auto(quick, output):
    for given, message in (
        ({"resume": True}, "no checkpoint to go on from"),
        ({"resume": True, "output": None}, "a run without an output"),
        ({"resume": output}, "no checkpoint at"),
    ):
        with pytest.raises(CheckpointError, match=message):
            quick(steps=2, **given)
    assert os.listdir(output.parent) == []
    quick(steps=2, resume="auto")
    assert output.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.1}, r"learning_rate was 0\.005, is 0\.1\."),
        ({"batch_size": 2, "scene": "in snow"}, "batch_size was 1, is 2; scene was None, is 'in s"),
        ({"placeholder": "<me>"}, "placeholder was '<it>', is '<me>'"),
        ({"steps": 2}, "has done 3 steps, more than the 2"),
        ({"image": random_image(1)}, "the image was"),
    ],
)
def test_other_settings_are_named(quick, leave_at, output, changed, message):
    leave_at(3, steps=5)
    before = checkpoints(output).file(3).read_bytes()
    for resume in (True, "auto", checkpoints(output).file(3)):
        with pytest.raises(CheckpointError, match=message):
            quick(**{"steps": 5, "resume": resume, **changed})
    assert checkpoints(output).file(3).read_bytes() == before


def test_changed_weights_in_the_same_folder_are_found(quick, leave_at, output, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sefi_fast.bundled_model_path(), folder)
    leave_at(1, model=folder, steps=3)
    (path,) = (folder / "unet").glob("*.safetensors")
    tensors = safetensors.torch.load_file(path)
    tensors[sorted(tensors)[len(tensors) // 2]].view(-1)[-1] += 1
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    before = checkpoints(output).file(1).read_bytes()
    for resume in (True, "auto"):
        with pytest.raises(CheckpointError, match=r"weights or noise schedule was .* resume=False"):
            quick(model=folder, steps=3, resume=resume)
    assert checkpoints(output).file(1).read_bytes() == before
    quick(model=folder, steps=3, resume=False)


def test_a_model_folder_may_be_copied_and_weights_stored_otherwise(quick, leave_at, tmp_path):
    straight = quick(output=None, steps=3)
    leave_at(1, steps=3)
    shutil.copytree(sefi_fast.bundled_model_path(), tmp_path / "copy")
    resumed = quick(model=tmp_path / "copy", steps=3, resume=True)
    # Weights in other places may be rounded otherwise.
    changed = (straight.tokens[0] - straight.class_embeddings[0]).norm()
    assert (resumed.tokens[0] - straight.tokens[0]).norm() < 0.01 * changed


@pytest.mark.parametrize("changed", ["unet", "text_encoder", "vae", "scheduler", "scaling_factor"])
def test_a_pipeline_that_changed_in_memory_is_found(quick, leave_at, changed):
    pipe = sefi_fast.load_pipeline(None)
    leave_at(1, model=pipe, steps=3)
    if changed == "scheduler":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.013)
    elif changed == "scaling_factor":
        pipe.vae.register_to_config(scaling_factor=0.5)
    else:
        with torch.no_grad():
            list(getattr(pipe, changed).parameters())[5].view(-1)[3] += 1e-3
    with pytest.raises(CheckpointError, match="weights or noise schedule was"):
        quick(model=pipe, steps=3, resume=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_the_checksum_of_weights_is_that_of_their_stored_values(dtype):
    def checksum():
        return BaseModel(pipe, "it", None, torch.device("cpu"), torch.float32, False).checksum

    pipe = sefi_fast.load_pipeline(None)
    pipe.unet.to(dtype)
    before = checksum()
    pipe.unet.to(memory_format=torch.channels_last)
    for parameter in pipe.unet.parameters():
        # Not at a multiple of 8 bytes, as in a file that is mapped into memory.
        shifted = torch.empty(parameter.numel() + 1, dtype=dtype)[1:].view(parameter.shape)
        parameter.data = shifted.copy_(parameter.data)
    assert checksum() == before
    with training_session(pipe, TrainConfig()) as base:
        # Narrow weights are widened here.
        assert base.checksum == before
    with torch.no_grad():
        pipe.unet.conv_in.bias[-1:] = 0.5
    assert checksum() != before


def test_more_steps_and_other_harmless_settings_go_on(quick, leave_at, caplog):
    leave_at(2, steps=3, schedule="constant")
    harmless = {"checkpoint_every": 1, "keep_checkpoints": 1, "max_seconds": 1e4}
    longer = quick(steps=5, schedule="constant", resume=True, **harmless)
    assert_same(longer, quick(output=None, steps=5, schedule="constant"))
    assert "length" not in caplog.text
    leave_at(2, steps=3)
    quick(steps=4, resume=True)
    assert "was to have 3 steps and has 4 now" in caplog.text


@pytest.fixture(scope="module")
def unfinished(bundled, tmp_path_factory):
    """A subject whose run was left with checkpoints of steps 3 and 2, and their contents."""
    output = tmp_path_factory.mktemp("unfinished") / "me.safetensors"
    settings = {
        "steps": 6, "checkpoint_every": 2, "ema_decay": 0.9,
        "validation_prompts": ("a {}",), "validation_every": 1, "validation_steps": 1,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        train(
            BUNDLED_IMAGE, model=bundled, output=output, callback=stop_at(3), **settings, **QUICK
        )  # fmt: skip
    config = TrainConfig(batch_size=1, stages=2, **settings)
    spec = SubjectSpec(BUNDLED_IMAGE, CLASS_WORD, placeholder="<it>", output=output)
    with (
        training_session(bundled, config) as base,
        temporarily_frozen(bundled.vae, base.device, torch.float32),
    ):
        state = SubjectState(spec, base, config)
    files = {step: checkpoints(output).file(step).read_bytes() for step in (3, 2)}
    return output, state, files


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
    output, state, files = unfinished
    folder = checkpoints(output)
    assert checkpoint_to_resume(state, True).step == 3
    metadata, tensors = unpack_tensors(files[3], checksum=True)
    change(metadata, tensors)
    try:
        folder.file(3).write_bytes(pack_tensors(tensors, metadata, checksum=True))
        assert checkpoint_to_resume(state, True).step == 2
        assert "step-000003.safetensors is" in caplog.text and "is skipped" in caplog.text
        with pytest.raises(CheckpointError, match=r"step-000003\.safetensors is"):
            checkpoint_to_resume(state, folder.file(3))
    finally:
        folder.file(3).write_bytes(files[3])


@pytest.mark.parametrize("resume", [True, "auto"])
def test_no_whole_checkpoint_is_an_error_not_a_restart(quick, leave_at, output, resume):
    leave_at(3, steps=6, checkpoint_every=2)
    for step in checkpoints(output).steps():
        checkpoints(output).file(step).write_bytes(b"foreign")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints .* is whole"):
        quick(steps=6, resume=resume)
    assert checkpoints(output).steps() == [3, 2]


def test_a_path_names_the_checkpoint_or_its_folder(quick, leave_at, output, tmp_path):
    leave_at(3, steps=5, checkpoint_every=2)
    kept = tmp_path / "kept"
    shutil.move(folder_of(output), kept)
    straight = quick(output=None, steps=5)
    for resume in (kept, kept / "step-000002.safetensors", str(kept)):
        assert_same(quick(steps=5, resume=resume), straight)
    assert len(os.listdir(kept)) == 2


def test_a_file_in_the_way_of_checkpoints_is_an_error_before_training(quick, output):
    folder_of(output).write_text("a file")
    with pytest.raises(OSError, match="is in the way"):
        quick(steps=2)
    # The advice of the message.
    quick(steps=2, checkpoint_every=0)
    assert folder_of(output).read_text() == "a file"


@pytest.mark.parametrize("resume", [None, True, "auto", False])
@pytest.mark.parametrize("every", [0, 1])
def test_nothing_of_a_linked_checkpoint_folder_is_deleted(quick, output, tmp_path, resume, every):
    target = tmp_path / "target"
    target.mkdir()
    kept = [target / "step-000001.safetensors", target / ".step-000002.safetensors.0123abcd"]
    for path in kept:
        path.write_text("precious")
    folder_of(output).symlink_to(target, target_is_directory=True)
    settings = {"steps": 2, "checkpoint_every": every, "resume": resume}
    if every == 0 and resume is not True:
        quick(**settings)
    else:
        error = CheckpointError if every == 0 else FileExistsError
        with pytest.raises(error, match=r"is in the way: it is a link|no checkpoint to go on"):
            quick(**settings)
    assert folder_of(output).is_symlink()
    assert sorted(target.iterdir()) == sorted(kept)
    assert {path.read_text() for path in kept} == {"precious"}


def test_a_full_disk_stops_no_run_and_costs_no_older_checkpoint(quick, output, caplog, monkeypatch):
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
    settings = {"steps": 7, "checkpoint_every": 2}
    subject = quick(callback=Fill(), **settings)
    assert "step 4 could not be written" in caplog.text
    assert "No space left" in caplog.text and "the one of step 2 stays" in caplog.text
    monkeypatch.undo()
    assert_same(subject, quick(output=None, **settings))


def test_a_disk_that_is_full_at_the_end_loses_nothing(quick, monkeypatch):
    full = raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with monkeypatch.context() as patched:
        patched.setattr(Subject, "save", full)
        with pytest.raises(UnsavedSubjectError, match=r"No space left.*step 4 stays") as caught:
            quick(steps=5, checkpoint_every=2)
    assert_same(caught.value.subject, quick(steps=5, resume=True))


def test_partial_files_of_a_killed_run_go(quick, output):
    partial = output.with_name(".me.safetensors.0123abcd")
    other = output.with_name(".me.safetensors.notes")
    for path in (partial, other):
        path.write_bytes(b"half")
    quick(steps=1)
    assert sorted(os.listdir(output.parent)) == [other.name, output.name]
