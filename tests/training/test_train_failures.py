"""The public function when something goes wrong: what is told, what is kept, what is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import skimage
import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image

import sefi_fast
from sefi_fast.errors import ImageError, ModelError, PromptError, TrainingError
from sefi_fast.subject import Subject
from sefi_fast.training import NonFiniteLossError, train
from sefi_fast.training import step as step_module
from sefi_fast.training import trainer as run_module
from sefi_fast.training.image import load_image

# It ships inside the scikit-image package.
PHOTO = Path(skimage.__file__).parent / "data" / "chelsea.png"
FAST = {"steps": 3, "batch_size": 2, "resolution": 64, "progress": False}


@pytest.fixture
def photo() -> Image.Image:
    return load_image(PHOTO)


def poison(monkeypatch, bad_steps, value=float("nan")):
    calls = iter(range(1000))
    honest = step_module.noise_loss

    def noise_loss(prediction, target):
        loss = honest(prediction, target)
        return loss * value if next(calls) in bad_steps else loss

    monkeypatch.setattr(step_module, "noise_loss", noise_loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_single_bad_steps_are_skipped(sd15_pipeline, photo, monkeypatch, value):
    poison(monkeypatch, {1, 2, 4}, value)
    subject = train(photo, model=sd15_pipeline, class_word="cat", **{**FAST, "steps": 6})
    assert subject.history.skipped == [1, 2, 4]
    assert len(subject.history.loss) == 3
    assert torch.isfinite(subject.tokens[0]).all()


def test_three_bad_steps_in_a_row_stop_and_keep_the_last_good_state(
    sd15_pipeline, photo, monkeypatch, tmp_path
):
    path = tmp_path / "subject.safetensors"
    settings = {**FAST, "steps": 9, "schedule": "constant"}
    poison(monkeypatch, {3, 4, 5})
    with pytest.raises(NonFiniteLossError, match="step 6: 3 steps in a row") as caught:
        train(photo, model=sd15_pipeline, class_word="cat", output=path, **settings)
    assert isinstance(caught.value, TrainingError)
    monkeypatch.undo()
    # The last tokens that were seen to give a finite loss are those before the third update.
    good = train(photo, model=sd15_pipeline, class_word="cat", **{**settings, "steps": 2})
    assert torch.equal(caught.value.subject.tokens[0], good.tokens[0])
    assert torch.equal(Subject.load(path).tokens[0], good.tokens[0])


def test_a_run_without_any_good_step_leaves_an_older_file_alone(
    sd15_pipeline, photo, monkeypatch, tmp_path
):
    path = tmp_path / "subject.safetensors"
    path.write_bytes(b"older")
    poison(monkeypatch, set(range(9)))
    with pytest.raises(NonFiniteLossError):
        train(photo, model=sd15_pipeline, class_word="cat", output=path, **FAST)
    assert path.read_bytes() == b"older"


def test_a_gradient_that_is_not_finite_is_skipped(sd15_pipeline, photo):
    pipe = sd15_pipeline
    table = pipe.text_encoder.get_input_embeddings()
    calls = []

    def spoil(module, inputs, output):
        if output.requires_grad:
            calls.append(None)
            if len(calls) == 2:
                output.register_hook(lambda gradient: gradient * float("nan"))

    # Runs after the hook that puts the rows in only if registered later, so on the layer behind.
    layer = next(m for n, m in pipe.text_encoder.named_modules() if n.endswith("layers.0"))
    handle = layer.register_forward_hook(
        lambda m, i, o: spoil(m, i, o[0] if isinstance(o, tuple) else o)
    )
    subject = train(photo, model=pipe, class_word="cat", **{**FAST, "steps": 4})
    handle.remove()
    assert table is not None
    assert subject.history.skipped == [1]
    assert torch.isfinite(subject.tokens[0]).all()


def test_an_interrupt_saves_what_there_is(sd15_pipeline, photo, tmp_path):
    path = tmp_path / "subject.safetensors"

    def interrupt(step, history):
        if step == 2:
            raise KeyboardInterrupt

    settings = {**FAST, "schedule": "constant"}
    arguments = {"model": sd15_pipeline, "class_word": "cat", **settings}
    with pytest.raises(KeyboardInterrupt):
        train(photo, output=path, callback=interrupt, **arguments)
    two = train(photo, **{**arguments, "steps": 2})
    assert torch.equal(Subject.load(path).tokens[0], two.tokens[0])


def test_a_run_that_ends_badly_leaves_a_finished_subject_alone(
    sd15_pipeline, photo, tmp_path, monkeypatch
):
    path = tmp_path / "subject.safetensors"
    arguments = {"model": sd15_pipeline, "class_word": "cat", "output": path, **FAST}
    train(photo, **arguments)
    finished = path.read_bytes()

    def interrupt(step, history):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(photo, callback=interrupt, **arguments)
    assert path.read_bytes() == finished
    poison(monkeypatch, {1, 2, 3})
    with pytest.raises(NonFiniteLossError):
        train(photo, resume=False, **{**arguments, "steps": 9})
    assert path.read_bytes() == finished


def test_an_error_of_a_callback_leaves_a_checkpoint(sd15_pipeline, photo, tmp_path):
    path = tmp_path / "subject.safetensors"

    def fail(step, history):
        if step == 2:
            raise RuntimeError("from the callback")

    arguments = {"model": sd15_pipeline, "class_word": "cat", "output": path, **FAST}
    with pytest.raises(RuntimeError, match="from the callback"):
        train(photo, callback=fail, **arguments)
    subject = train(photo, resume=True, **arguments)
    assert torch.equal(subject.tokens[0], train(photo, **{**arguments, "output": None}).tokens[0])


def test_validation_pictures_that_cannot_be_drawn_end_no_training(
    sd15_pipeline, photo, monkeypatch, caplog
):
    def fail(*arguments):
        raise ValueError("no image")

    settings = {**FAST, "validation_prompts": ("a {} here",), "validation_every": 2}
    monkeypatch.setattr(run_module, "validate", fail)
    subject = train(photo, model=sd15_pipeline, class_word="cat", **settings)
    assert len(subject.history.loss) == FAST["steps"]
    assert "no validation images at step 2: no image" in caplog.text
    settings["validation_prompts"] = ("a {}ly thing",)
    with pytest.raises(PromptError, match="longer word"):
        train(photo, model=sd15_pipeline, class_word="cat", **settings)


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_training(
    sd15_pipeline, photo, tmp_path, monkeypatch, caplog
):
    honest = Path.unlink

    def unlink(path, missing_ok=False):
        if "step-" in path.name:
            raise PermissionError(13, "held open")
        honest(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    settings = {**FAST, "steps": 4, "checkpoint_every": 1, "keep_checkpoints": 1}
    path = tmp_path / "subject.safetensors"
    train(photo, model=sd15_pipeline, class_word="cat", output=path, **settings)
    assert Subject.load(path) and "the old checkpoint" in caplog.text


def test_the_picture_is_not_overwritten(tmp_path):
    picture = tmp_path / "me.png"
    Image.new("RGB", (64, 64)).save(picture)
    before = picture.read_bytes()
    with pytest.raises(ValueError, match="an image to learn from"):
        train(picture, output=picture, **FAST)
    assert picture.read_bytes() == before


def test_a_pipeline_that_was_loaded_from_a_path_object(tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(sefi_fast.bundled_model_path())
    path = tmp_path / "subject.safetensors"
    settings = {"steps": 1, "batch_size": 1, "progress": False}
    train(
        sefi_fast.bundled_subject_image(),
        model=pipe,
        class_word="creature",
        output=path,
        **settings,
    )
    assert Subject.load(path).base_model == str(sefi_fast.bundled_model_path())


def test_an_ip_adapter_is_to_be_unloaded_first(sd15_pipeline, photo):
    sd15_pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ModelError, match="unload_ip_adapter"):
        train(photo, model=sd15_pipeline, class_word="cat", **FAST)


def test_output_that_cannot_be_written_is_told_before_training(photo, tmp_path):
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"the model's {name} was touched")

    (tmp_path / "file").write_text("a file, no folder")
    for output, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "subject.safetensors", "cannot be written"),
    ):
        with pytest.raises(OSError, match=message):
            train(photo, model=Untouchable(), class_word="cat", output=output)
    assert os.listdir(tmp_path) == ["file"]


def test_output_in_a_new_folder(sd15_pipeline, photo, tmp_path):
    path = tmp_path / "new" / "folder" / "subject.safetensors"
    train(photo, model=sd15_pipeline, class_word="cat", output=path, **FAST)
    assert Subject.load(path).placeholder == "<it>"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_word": None}, ValueError, "class_word is missing"),
        ({"class_word": "xylophone"}, PromptError, "one token"),
        ({"class_word": 3}, TypeError, "class_word"),
        ({"placeholder": ""}, ValueError, "one word without spaces"),
        ({"placeholder": "my cat"}, ValueError, "one word without spaces"),
        ({"placeholder": None}, TypeError, "placeholder"),
        ({"templates": ("a photo of x{}",)}, PromptError, "longer word"),
        ({"templates": ("a " * 90 + "{}",)}, PromptError, "shorten"),
        ({"resolution": 100}, ValueError, "multiple of 8, at most 128"),
        ({"resolution": 256}, ValueError, "at most 128"),
        ({"precision": "fp16"}, ValueError, "CUDA only"),
        ({"device": "abacus"}, ValueError, "abacus"),
        ({"stepps": 3}, TypeError, "no setting stepps"),
        ({"config": {"steps": 3}}, TypeError, "TrainConfig"),
        ({"image": "missing.png"}, ImageError, "no image at missing.png"),
        ({"image": None}, TypeError, "path, a PIL image"),
        ({"model": 3}, ModelError, "int"),
        ({"model": "no/such/folder/anywhere"}, ModelError, "no/such/folder/anywhere"),
        ({"attention_backend": "abacus"}, sefi_fast.errors.BackendError, "abacus"),
    ],
)
def test_wrong_arguments(sd15_pipeline, photo, arguments, error, message):
    settings = {"image": photo, "model": sd15_pipeline, "class_word": "cat", **FAST, **arguments}
    with pytest.raises(error, match=message):
        train(**settings)


def test_an_inpainting_unet_is_refused(sd15_pipeline, photo):
    sd15_pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(ModelError, match="takes 9 channels"):
        train(photo, model=sd15_pipeline, class_word="cat", **FAST)


def test_offloaded_weights_are_refused(sd15_pipeline, photo):
    sd15_pipeline.unet.to("meta")
    with pytest.raises(ModelError, match="offload"):
        train(photo, model=sd15_pipeline, class_word="cat", device="cpu", **FAST)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_that_hooks_move_at_each_call_are_refused(sd15_pipeline, photo, part):
    # What enable_model_cpu_offload puts on each part, but for the device, which it wants there.
    cpu_offload_with_hook(getattr(sd15_pipeline, part), "cpu")
    with pytest.raises(ModelError, match=r"CPU offload\): call pipe\.remove_all_hooks"):
        train(photo, model=sd15_pipeline, class_word="cat", **FAST)


def test_group_offloading_is_refused(sd15_pipeline, photo):
    sd15_pipeline.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ModelError, match="CPU offload"):
        train(photo, model=sd15_pipeline, class_word="cat", **FAST)


def test_a_vae_without_a_distribution_is_refused(sd15_pipeline, photo):
    sd15_pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    sd15_pipeline.vae.register_to_config(block_out_channels=(8, 8, 8, 8))
    with pytest.raises(ModelError, match="AutoencoderTiny, which gives latents without"):
        train(photo, model=sd15_pipeline, class_word="cat", **FAST)
