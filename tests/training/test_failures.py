"""Runs that go wrong: the errors that are raised, the files that are kept, the files that stay."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderTiny, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from training.shared import BUNDLED_IMAGE, FAST, QUICK, raising, stop_at

import sefi_fast
from sefi_fast.errors import BackendError, ImageError, ModelError, PromptError, TrainingError
from sefi_fast.subject import Subject
from sefi_fast.training import Callbacks, NonFiniteLossError, train, train_many, trainer
from sefi_fast.training.checkpoint import folder_of


def cat(pipe, photo, **settings):
    return train(photo, model=pipe, class_word="cat", **{**FAST, **settings})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_single_bad_steps_are_skipped(sd15_pipeline, photo, spoil, value):
    spoil({1, 2, 4}, value)
    subject = cat(sd15_pipeline, photo, steps=6)
    assert subject.history.skipped == [1, 2, 4] and len(subject.history.loss) == 3
    assert torch.isfinite(subject.tokens[0]).all()


def test_three_bad_steps_in_a_row_stop_and_keep_the_last_good_state(
    sd15_pipeline, photo, spoil, output, monkeypatch
):
    spoil({3, 4, 5})
    settings = {"schedule": "constant"}
    with pytest.raises(NonFiniteLossError, match="step 6: 3 steps in a row") as caught:
        cat(sd15_pipeline, photo, output=output, steps=9, **settings)
    assert isinstance(caught.value, TrainingError)
    monkeypatch.undo()
    # The last tokens that were seen to give a finite loss are those before the third update.
    good = cat(sd15_pipeline, photo, steps=2, **settings)
    assert torch.equal(caught.value.subject.tokens[0], good.tokens[0])
    assert torch.equal(Subject.load(output).tokens[0], good.tokens[0])


def test_a_gradient_that_is_not_finite_is_skipped(sd15_pipeline, photo):
    calls = []

    def spoil_gradient(module, inputs, outputs):
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        if hidden.requires_grad:
            calls.append(None)
            if len(calls) == 2:
                hidden.register_hook(lambda gradient: gradient * float("nan"))

    # Runs after the hook that puts the rows in only if registered later, so on the layer after it.
    encoder = sd15_pipeline.text_encoder
    layer = next(m for n, m in encoder.named_modules() if n.endswith("layers.0"))
    layer.register_forward_hook(spoil_gradient)
    subject = cat(sd15_pipeline, photo, steps=4)
    assert subject.history.skipped == [1]
    assert torch.isfinite(subject.tokens[0]).all()


def test_a_run_that_ends_badly_keeps_an_older_file(sd15_pipeline, photo, output, spoil):
    output.write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt):
        cat(sd15_pipeline, photo, output=output, callback=stop_at(1))
    spoil({0, 1, 2})
    with pytest.raises(NonFiniteLossError):
        cat(sd15_pipeline, photo, output=output, resume=False)
    assert output.read_bytes() == b"older"


def test_an_error_of_a_callback_leaves_a_checkpoint(sd15_pipeline, photo, output):
    with pytest.raises(RuntimeError, match="from the callback"):
        cat(sd15_pipeline, photo, output=output, callback=stop_at(2, RuntimeError))
    subject = cat(sd15_pipeline, photo, output=output, resume=True)
    assert torch.equal(subject.tokens[0], cat(sd15_pipeline, photo).tokens[0])


def test_validation_images_that_fail_end_no_training(sd15_pipeline, photo, monkeypatch, caplog):
    monkeypatch.setattr(trainer, "validate", raising(ValueError("no image")))
    settings = {"validation_prompts": ("a {} here",), "validation_every": 2}
    assert len(cat(sd15_pipeline, photo, **settings).history.loss) == 3
    assert "no validation images at step 2: no image" in caplog.text
    with pytest.raises(PromptError, match="longer word"):
        cat(sd15_pipeline, photo, validation_prompts=("a {}ly thing",))


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_training(output, monkeypatch, caplog):
    honest = Path.unlink

    def unlink(path, missing_ok=False):
        if "step-" in path.name:
            raise PermissionError(13, "held open")
        honest(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    settings = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 1}
    train(BUNDLED_IMAGE, output=output, **settings, **QUICK)
    assert Subject.load(output) and "the old checkpoint" in caplog.text


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with links that lead nowhere; loading a model fails the test."""
    began = raising(AssertionError("training began"))
    for module in ("trainer", "many"):
        monkeypatch.setattr(f"sefi_fast.training.{module}.training_session", began)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "summary.jsonl").mkdir()
    (tmp_path / "file").write_text("a file")
    return tmp_path


BAD_OUTPUTS = {
    "nowhere": "leads nowhere",
    "nowhere/me": "leads nowhere",
    "nowhere/new/me": "leads nowhere",
    "m" * 256: "too long",
    "new/" + "m" * 256: "too long",
    "x" * 256 + "/me": "too long",
    "file/me": "cannot be written",
    ".": "is a folder",
}


@pytest.mark.parametrize(("name", "message"), BAD_OUTPUTS.items())
def test_an_output_that_cannot_be_written_is_an_error_before_training(place, name, message):
    before = sorted(os.listdir(place))
    with pytest.raises(OSError, match=rf"output .*{message}"):
        train(BUNDLED_IMAGE, output=place / name, **QUICK)
    with pytest.raises(OSError, match=r"summary\.jsonl is a folder" if name == "." else message):
        train_many([BUNDLED_IMAGE], output=place / name, **QUICK)
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_save_that_will_fail_is_an_error_before_training(place, monkeypatch, call):
    monkeypatch.setattr(os, call, raising(OSError(errno.EPERM, os.strerror(errno.EPERM))))
    for name in ("me.safetensors", "new/me.safetensors"):
        with pytest.raises(OSError, match="not permitted.*choose another place"):
            train(BUNDLED_IMAGE, output=place / name, **QUICK)


def test_the_image_is_not_overwritten(tmp_path):
    image = tmp_path / "me.png"
    Image.new("RGB", (64, 64)).save(image)
    before = image.read_bytes()
    with pytest.raises(ValueError, match="an image to train on"):
        train(image, output=image, **FAST)
    assert image.read_bytes() == before


def test_new_folders_long_names_and_links_are_written(tmp_path):
    target, link = tmp_path / "far" / "me.safetensors", tmp_path / "me.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"before")
    link.symlink_to(target)
    kept = []

    class Look(Callbacks):
        def on_checkpoint(self, step, path):
            kept.append(path)

    long = tmp_path / "new" / "folder" / ("m" * 243 + ".safetensors")
    for output in (link, long):
        settings = {"steps": 2, "checkpoint_every": 1, "callback": Look()}
        train(BUNDLED_IMAGE, output=output, **settings, **QUICK)
        assert kept[-1].parent == folder_of(output) and Subject.load(output).stages == 2
    assert link.is_symlink() and Subject.load(target).stages == 2
    assert os.listdir(long.parent) == [long.name]


def test_a_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "me.png").write_bytes(BUNDLED_IMAGE.read_bytes())
    train("~/me.png", output="~/out/me.safetensors", steps=1, **{**QUICK, "stages": 1})
    loaded = Subject.load("~/out/me.safetensors")
    loaded.save("~/out/copy.safetensors")
    sefi_fast.export_embedding(loaded, "~/out/e.safetensors", lossy=True)
    sefi_fast.TrainConfig(steps=7).save("~/out/c.yaml")
    assert sefi_fast.TrainConfig.load("~/out/c.yaml").steps == 7
    (result,) = train_many(["~/me.png"], output="~/many", steps=1, **QUICK)
    assert result.path == tmp_path / "home" / "many" / "me.safetensors"
    pipe = sefi_fast.attach(sefi_fast.load_pipeline(), "~/out/me.safetensors")
    sefi_fast.detach(pipe)
    sefi_fast.import_embedding("~/out/e.safetensors", pipe, class_word="creature")
    files = {path.name for path in (tmp_path / "home" / "out").iterdir()}
    assert files == {"me.safetensors", "copy.safetensors", "e.safetensors", "c.yaml"}
    assert os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_word": None}, ValueError, "class_word is missing"),
        ({"class_word": "xylophone"}, PromptError, "one token"),
        ({"class_word": 3}, TypeError, "class_word"),
        ({"placeholder": "my cat"}, ValueError, "one word without spaces"),
        ({"placeholder": None}, TypeError, "placeholder"),
        ({"callback": 3}, TypeError, "callback must be a function"),
        ({"templates": ("a photo of x{}",)}, PromptError, "longer word"),
        ({"templates": ("a " * 90 + "{}",)}, PromptError, "Shorten"),
        ({"resolution": 100}, ValueError, "multiple of 8, at most 128"),
        ({"precision": "fp16"}, ValueError, "CUDA only"),
        ({"device": "abacus"}, ValueError, "abacus"),
        ({"preset": "sefi", "config": sefi_fast.TrainConfig()}, ValueError, "give one of them"),
        ({"resume": 3}, TypeError, "resume must be"),
        ({"attention_loss": "mask"}, ValueError, "there is no mask, but attention_loss is 'mask'"),
        ({"mask": "mask.png"}, ValueError, "there is a mask, but attention_loss is 'subject'"),
        ({"image": "missing.png"}, ImageError, "no image at missing.png"),
        ({"image": None}, TypeError, "path, a PIL image"),
        ({"model": 3}, ModelError, "int"),
        ({"model": "no/such/folder/anywhere"}, ModelError, "no/such/folder/anywhere"),
        ({"attention_backend": "abacus"}, BackendError, "abacus"),
    ],
)
def test_wrong_arguments(sd15_pipeline, photo, arguments, error, message):
    settings = {"image": photo, "model": sd15_pipeline, "class_word": "cat", **FAST, **arguments}
    with pytest.raises(error, match=message):
        train(**settings)


def _register(**settings):
    return lambda pipe: pipe.unet.register_to_config(**settings)


def _offload(part):
    # What enable_model_cpu_offload puts on each part, but for the device, which it wants there.
    return lambda pipe: cpu_offload_with_hook(getattr(pipe, part), "cpu")


def _tiny_vae(pipe):
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    pipe.vae.register_to_config(block_out_channels=(8, 8, 8, 8))


MODELS = {
    "IP-Adapter": ("sd15", _register(encoder_hid_dim_type="ip_image_proj"), "unload_ip_adapter"),
    "inpainting": ("sd15", _register(in_channels=9), "takes 9 channels"),
    "inpainting, SDXL": ("sdxl", _register(in_channels=9), "takes 9 channels"),
    "meta device": ("sd15", lambda pipe: pipe.unet.to("meta"), "offload|on 'meta'"),
    "offloaded U-Net": ("sd15", _offload("unet"), r"CPU offload\): call pipe\.remove_all_hooks"),
    "offloaded VAE": ("sd15", _offload("vae"), r"CPU offload\): call"),
    "group offload": (
        "sd15",
        lambda pipe: pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        "CPU offload",
    ),
    "VAE without a distribution": ("sd15", _tiny_vae, "AutoencoderTiny, which gives latents"),
    "refiner's sizes": (
        "sdxl",
        _register(projection_class_embeddings_input_dim=32 + 5 * 8),
        r"takes 72 numbers .* make 80, as with SDXL's refiner",
    ),
    "no added conditioning": (
        "sdxl",
        _register(addition_embed_type=None),
        "type None, where 'text_time' goes",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_do_not_fit_are_refused(request, photo, kind):
    name, change, message = MODELS[kind]
    pipe = request.getfixturevalue(f"{name}_pipeline")
    change(pipe)
    with pytest.raises(ModelError, match=message):
        cat(pipe, photo, device="cpu")


def test_the_refiner_is_refused(sdxl_pipeline, photo, tmp_path):
    parts = dict(sdxl_pipeline.components) | {"text_encoder": None, "tokenizer": None}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    with pytest.raises(ModelError, match="second text encoder of SDXL alone"):
        cat(refiner, photo)
    refiner.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="second text encoder alone, as SDXL's refiner has"):
        cat(tmp_path, photo)


def test_class_words_that_one_encoder_splits_are_refused(sdxl_pipeline, photo):
    sdxl_pipeline.tokenizer.add_tokens(["xylophone"])
    with pytest.raises(PromptError, match=r"text encoder 2 of 2, the class word 'xylophone' falls"):
        train(photo, model=sdxl_pipeline, class_word="xylophone", **FAST)
