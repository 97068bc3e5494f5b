"""`sefi_fast.train` on every family: images in, subjects out, pipelines restored."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch
from pipelines.checkpoint import save_checkpoint
from training.shared import (
    BUNDLED_IMAGE,
    FAST,
    MASKS_OVERFLOW,
    PHOTO,
    QUICK,
    assert_same,
    random_image,
    state_of,
)

import sefi_fast
from sefi_fast.subject import Subject, export_embedding
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training import (
    TrainConfig,
    base_model,
    many,
    subject_state,
    train,
    train_many,
    trainer,
)
from sefi_fast.training.base_model import BaseModel, checkpointed, frozen, training_session
from sefi_fast.training.image import load_image
from sefi_fast.training.monitor import guidance_for
from sefi_fast.training.subject_state import SubjectSpec
from sefi_fast.training.trainer import Run

DRAWING = {"validation_prompts": ("a {}",), "validation_every": 2, "validation_steps": 1}


def test_a_photo_becomes_a_subject_that_generates(family, output):
    settings = {**FAST, "resolution": None, "learning_rate": 0.1}
    subject = train(PHOTO, model=family.pipe, class_word="cat", output=output, **settings)
    widths = [48, 64] if family.is_sdxl else [48]
    assert [tokens.shape for tokens in subject.tokens] == [(5, 2, 1, width) for width in widths]
    rows = family.class_rows("cat")
    for tokens, own, row in zip(subject.tokens, subject.class_embeddings, rows, strict=True):
        assert torch.equal(own, row) and (tokens - row).abs().max() > 1e-2
    assert (subject.placeholder, subject.class_word) == ("<it>", "cat")
    assert TrainConfig(**{k: subject.settings[k] for k in TrainConfig().as_dict()}).steps == 3
    assert subject.history.subject_loss[0] == pytest.approx(0, abs=1e-9)
    assert subject.history.subject_loss[-1] > 0
    loaded = Subject.load(output)
    assert all(map(torch.equal, loaded.tokens, subject.tokens))
    assert os.listdir(output.parent) == [output.name]
    options = {"steps": 2, "guidance": 5.0}
    of_word = sefi_fast.generate(family.pipe, "a photo of a cat", **options)[0]
    sefi_fast.attach(family.pipe, output)
    image = sefi_fast.generate(family.pipe, "a photo of a <it>", **options)[0]
    assert image.size == (128, 128)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(of_word)).max() > 3


@pytest.mark.parametrize("module", ["attention", "free"])
def test_before_training_every_token_is_the_class_word_of_its_encoder(family, photo, module):
    config = TrainConfig(module=module, resolution=64, batch_size=1, crop="right")
    with training_session(family.pipe, config) as base:
        engine = Run(base, config, [SubjectSpec(photo, "cat", placeholder="<it>")]).engine
        rows = torch.cat(family.class_rows("cat"), -1)
        assert torch.equal(engine.current(), rows.expand(5, 2, 1, -1))
        if family.is_sdxl:
            assert engine._step.time_ids.tolist() == [[300, 451, 0, 32, 64, 64]]


@pytest.mark.parametrize("module", ["attention", "free"])
def test_a_class_word_of_two_words_and_more_vectors(sd15_pipeline, photo, output, module):
    subject = train(
        photo, model=sd15_pipeline, class_word="red cat", num_vectors=3, module=module,
        output=output, **FAST,
    )  # fmt: skip
    rows = sd15_pipeline.text_encoder.get_input_embeddings().weight
    red, cat = rows[sd15_pipeline.tokenizer("red cat", add_special_tokens=False).input_ids]
    assert torch.equal(subject.class_embeddings[0], torch.stack([red, cat]))
    assert (subject.stages, subject.num_vectors) == (5, 3)
    moved = (subject.tokens[0] - torch.stack([red, cat, cat])).abs()
    # Every vector is near where it began, and none is there still, nor equal to another.
    assert moved.amax((0, 1, 3)).min() > 1e-4
    assert moved.max() < 0.05
    assert not torch.equal(subject.tokens[0][:, :, 1], subject.tokens[0][:, :, 2])
    sefi_fast.attach(sd15_pipeline, output)
    with sefi_fast.trace(sd15_pipeline, ["<it>", "snow"]) as found:
        sefi_fast.generate(sd15_pipeline, "a photo of a <it> in the snow", steps=1)
    assert all(bool(one.any()) for one in found.maps.values())


def test_the_bundled_model_needs_an_image_alone(output):
    settings = {"steps": 3, "progress": False}
    subject = train(BUNDLED_IMAGE, output=output, **settings)
    assert (subject.class_word, subject.settings["model"]) == (CLASS_WORD, None)
    assert output.stat().st_size < 100_000
    pipe = sefi_fast.attach(sefi_fast.load_pipeline(None), Subject.load(output))
    pipe.set_progress_bar_config(disable=True)
    assert sefi_fast.generate(pipe, "a photo of a <it> in the snow", steps=2)[0].mode == "RGB"


def test_a_larger_weight_keeps_the_subject_loss_low():
    settings = {"steps": 30, "batch_size": 2, "progress": False}
    ends = [
        sum(train(BUNDLED_IMAGE, weight_lambda=weight, **settings).history.subject_loss[-20:])
        for weight in (0.003, 0.1)
    ]
    assert ends[1] < 0.5 * ends[0]


@pytest.mark.parametrize("many_at_once", [False, True])
def test_nothing_is_loaded_or_checked_twice(tmp_path, monkeypatch, many_at_once):
    calls: dict[str, int] = {}

    def count(module, name):
        honest = getattr(module, name)

        def counted(*arguments, **keywords):
            # The check of the summary is another file's.
            if "summary" not in str(arguments[0]):
                calls[name] = calls.get(name, 0) + 1
            return honest(*arguments, **keywords)

        monkeypatch.setattr(module, name, counted)

    for module in (trainer, subject_state, many):
        for name in ("load_image", "check_output", "check_resume", "check_trackers"):
            if hasattr(module, name):
                count(module, name)
    count(base_model, "_weights")
    settings = {"steps": 1, "batch_size": 1, "progress": False}
    if many_at_once:
        (result,) = train_many([BUNDLED_IMAGE], output=tmp_path, **settings)
        subject = result.subject
    else:
        subject = train(BUNDLED_IMAGE, output=tmp_path / "a.safetensors", **settings)
        assert calls.pop("check_resume") == 1
    assert calls.pop("_weights") == 1, "the weights are listed, and their checksum is not computed"
    assert calls == {"load_image": 1, "check_output": 1, "check_trackers": 1}
    assert len(subject.settings["image"]) == 8


def test_a_subject_of_train_has_the_checksum_of_its_image_as_one_of_train_many(tmp_path):
    settings = {"steps": 1, "batch_size": 1, "progress": False}
    one = train(BUNDLED_IMAGE, placeholder="<subject>", **settings)
    (other,) = train_many([BUNDLED_IMAGE], output=tmp_path, **settings)
    assert one.settings == other.subject.settings
    assert "image" not in train(load_image(BUNDLED_IMAGE), **settings).settings


def test_textual_inversion_of_sdxl_gives_the_same_in_diffusers(sdxl_pipeline, photo, tmp_path):
    pipe = sdxl_pipeline
    settings = {**FAST, "preset": "textual-inversion", "learning_rate": 0.1}
    subject = train(photo, model=pipe, class_word="cat", **settings)
    options = {"steps": 2, "guidance": 5.0, "negative_prompt": "a car"}
    sefi_fast.attach(pipe, subject)
    wanted = sefi_fast.generate(pipe, "a photo of a <it>", **options)[0]
    sefi_fast.detach(pipe)
    import safetensors.torch

    rows = safetensors.torch.load_file(export_embedding(subject, tmp_path / "it.safetensors"))
    for name, tokenizer, encoder in (
        ("clip_l", pipe.tokenizer, pipe.text_encoder),
        ("clip_g", pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        row = {"<it>": rows[name]}
        pipe.load_textual_inversion(row, token="<it>", tokenizer=tokenizer, text_encoder=encoder)
    got = sefi_fast.generate(pipe, "a photo of a <it>", **options)[0]
    assert np.abs(np.asarray(got).astype(int) - np.asarray(wanted)).max() <= 1


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("end", ["whole", "error", "interrupt", "refused"])
def test_a_pipeline_is_restored(family, photo, half, end):
    pipe = family.pipe.to(torch.float16) if half else family.pipe
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    family.encoders[-1][1].requires_grad_(False)
    pipe.vae.to(memory_format=torch.channels_last)
    # transformers leaves hooks on a text encoder that was asked for its hidden states once.
    family.is_sdxl and pipe.encode_prompt("a cat", device="cpu")
    before = state_of(pipe)

    def callback(step, history):
        if end == "error" and step == 2:
            raise RuntimeError("from the callback")
        if end == "interrupt":
            raise KeyboardInterrupt

    settings = {**FAST, **DRAWING, "gradient_checkpointing": True}
    if end == "refused":
        settings["loss_resolutions"] = (999,)
    with contextlib.suppress(RuntimeError, KeyboardInterrupt, ValueError):
        train(photo, model=pipe, class_word="cat", callback=callback, **settings)
    assert state_of(pipe) == before


def test_subjects_attached_before_stay_and_change_nothing(family, photo):
    pipe = family.pipe
    arguments = {"model": pipe, "class_word": "dog", "placeholder": "<me>", **FAST}
    plain = train(photo, **arguments)
    sefi_fast.attach(pipe, train(photo, model=pipe, class_word="cat", **FAST))
    wanted = sefi_fast.generate(pipe, "a <it>", steps=2)[0]
    again = train(photo, **arguments, **DRAWING)
    assert all(map(torch.equal, again.tokens, plain.tokens))
    ((step, (image,)),) = again.history.validation
    assert step == 2 and image.size == (64, 64)
    got = sefi_fast.generate(pipe, "a <it>", steps=2)[0]
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


def test_half_precision_stays_near_and_away_from_the_vae(family, photo):
    exact = train(photo, model=family.pipe, class_word="cat", **FAST)
    seen = []
    for part in (family.pipe.vae.encoder, family.pipe.vae.decoder):
        part.register_forward_pre_hook(
            lambda module, inputs: seen.append((torch.is_autocast_enabled("cpu"), inputs[0].dtype))
        )
    settings = {**FAST, **DRAWING, "precision": "bf16"}
    rough = train(photo, model=family.pipe, class_word="cat", **settings)
    assert seen[0] == (False, torch.float32)
    if family.is_sdxl:
        assert seen[1] == (False, torch.float32)
    assert all(tokens.dtype == torch.float32 for tokens in rough.tokens)
    assert rough.history.loss == pytest.approx(exact.history.loss, rel=0.02)
    assert rough.history.loss != exact.history.loss


@pytest.mark.parametrize("progress", [False, True])
def test_progress_goes_to_the_error_stream_only_when_wanted(sd15_pipeline, photo, capfd, progress):
    settings = {**FAST, **DRAWING, "progress": progress}
    train(photo, model=sd15_pipeline, class_word="cat", **settings)
    out, err = capfd.readouterr()
    assert out == ""
    words = ("<it>", "3/3", "loss=", "subject_loss=")
    assert all(word in err for word in words) if progress else err == ""


def test_validation_images_have_the_usual_guidance_of_the_family(family):
    config = TrainConfig()
    with training_session(family.pipe, config) as base:
        assert guidance_for(base, config) == (5.0 if family.is_sdxl else 7.5)
    assert guidance_for(base, TrainConfig(validation_guidance=3.0)) == 3.0


def test_folders_fp16_variants_and_single_files(sdxl_pipeline, photo, tmp_path):
    folder = tmp_path / "model"
    pipe = sdxl_pipeline.to(torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    of_folder = train(photo, model=folder, class_word="cat", **FAST)
    assert of_folder.base_model == of_folder.settings["model"] == str(folder)
    save_checkpoint(pipe, tmp_path / "model.safetensors")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    single = sefi_fast.load_pipeline(
        tmp_path / "model.safetensors", torch.float32, "cpu", config=folder
    )
    of_file = train(photo, model=single, class_word="cat", **FAST)
    assert of_file.history.loss == pytest.approx(of_folder.history.loss, rel=1e-5)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_checkpointing_is_restored(sd15_pipeline, own, wanted):
    unet = sd15_pipeline.unet

    def functions():
        return [
            (part.gradient_checkpointing, vars(part).get("_gradient_checkpointing_func"))
            for part in unet.modules()
            if hasattr(part, "gradient_checkpointing")
        ]

    if own:
        unet.enable_gradient_checkpointing()
    before = functions()
    with checkpointed(unet, wanted):
        assert unet.is_gradient_checkpointing == (own or wanted)
        if own or wanted:
            assert {function.__name__ for _, function in functions()} == {"_recompute"}
    assert functions() == before


@pytest.mark.parametrize("option", ["gradient_checkpointing", "low_memory"])
def test_memory_is_saved_and_no_number_changed(family, photo, option):
    settings = {**FAST, "weight_lambda": 50.0, "model": family.pipe, "class_word": "cat"}
    plain = train(photo, **settings)
    seen = []
    layer = family.pipe.unet.up_blocks[0].resnets[0]
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(None))
    saving = train(photo, **{option: True}, **settings)
    handle.remove()
    assert len(seen) == 2 * FAST["steps"]
    assert_same(saving, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_low_memory_takes_the_vae_off_the_device(sd15_pipeline):
    pipe = sd15_pipeline.to("cuda")
    base = BaseModel(pipe, "random", None, torch.device("cuda"), torch.float32, owned=False)
    with frozen(base, TrainConfig(low_memory=True)):
        assert (pipe.vae.device.type, pipe.unet.device.type) == ("cpu", "cuda")
    assert pipe.vae.device.type == "cuda"


@pytest.mark.long
def test_a_compiled_unet_trains_alike(sd15_pipeline, photo):
    settings = {**FAST, "weight_lambda": 50.0, "model": sd15_pipeline, "class_word": "cat"}
    plain, compiled = (train(photo, compile=compiled, **settings) for compiled in (False, True))
    assert compiled.history.loss == pytest.approx(plain.history.loss, rel=1e-4)


@pytest.mark.slow
def test_the_compiler_sees_the_whole_unet(family, photo, monkeypatch):
    honest = torch.compile

    def traced(function, **settings):
        return honest(function, backend="eager", fullgraph=True, **settings)

    settings = {**FAST, "weight_lambda": 50.0, "model": family.pipe, "class_word": "cat"}
    plain = train(photo, **settings)
    monkeypatch.setattr(torch, "compile", traced)
    # Other tests have compiled the same function for models of other shapes.
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = train(photo, compile=True, **settings)
    assert compiled.history.loss == pytest.approx(plain.history.loss, rel=1e-6)
    for ours, theirs in zip(compiled.tokens, plain.tokens, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@contextlib.contextmanager
def put(setter, value, usual):
    setter(value)
    try:
        yield
    finally:
        setter(usual)


SURROUNDINGS = {
    "float64": lambda: put(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: put(torch.set_default_dtype, torch.float16, torch.float32),
    "bfloat16": lambda: put(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device meta": lambda: put(torch.set_default_device, "meta", None),
    "default device cpu": lambda: put(torch.set_default_device, "cpu", None),
    "with device meta": lambda: torch.device("meta"),
    "deterministic": lambda: put(torch.use_deterministic_algorithms, True, False),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another seed": lambda: torch.random.fork_rng(devices=[]),
}


@pytest.fixture(scope="module")
def usual(bundled):
    return train(BUNDLED_IMAGE, model=bundled, steps=2, **QUICK, **DRAWING)


def assert_close(found, wanted):
    for ours, theirs in zip(found.tokens, wanted.tokens, strict=True):
        assert ours.dtype == torch.float32 and ours.device.type == "cpu"
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found.history.loss == pytest.approx(wanted.history.loss, rel=1e-5)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_seed_gives_one_run_and_global_settings_stay(bundled, usual, name):
    if MASKS_OVERFLOW and name in ("float16", "bfloat16"):
        pytest.skip("the masks of this transformers overflow")
    with SURROUNDINGS[name]():
        if name == "another seed":
            torch.manual_seed(1234)
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        found = train(BUNDLED_IMAGE, model=bundled, steps=2, **QUICK, **DRAWING)
        assert (torch.get_default_dtype(), torch.get_default_device()) == (dtype, device)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert np.random.get_state()[1].tolist() == state[1]
    assert_close(found, usual)
    images = [np.asarray(one.history.validation[0][1][0], int) for one in (found, usual)]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("name", ["float64", "with device meta"])
def test_the_model_is_loaded_alike(tmp_path, usual, name):
    with SURROUNDINGS[name]():
        (result,) = train_many([BUNDLED_IMAGE], output=tmp_path, steps=2, **QUICK, **DRAWING)
    assert_close(result.subject, usual)


def test_other_settings_under_another_default_dtype_and_device(family):
    settings = {**FAST, "attention_loss": "mask", "module": "free", "schedule": "linear"}
    mask = np.zeros((64, 64), dtype=bool)
    mask[20:60, 20:60] = True
    arguments = {"model": family.pipe, "class_word": "cat", "mask": mask, **settings}
    wanted = train(random_image(0), **arguments)
    with SURROUNDINGS["float64"](), SURROUNDINGS["with device meta"](), torch.inference_mode():
        assert_close(train(random_image(0), **arguments), wanted)
