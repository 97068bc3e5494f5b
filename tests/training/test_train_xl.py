"""The public functions on SDXL: subjects that draw, runs that resume, models that are refused."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from pipelines.checkpoint import save_checkpoint
from training.pipeline_state import state_of

import sefi_fast
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.subject import Subject, export_embedding
from sefi_fast.training import TrainConfig, train, train_many
from sefi_fast.training.base_model import resolution_of
from sefi_fast.training.image import load_image
from sefi_fast.training.monitor import guidance_for
from sefi_fast.training.subject_state import Job
from sefi_fast.training.trainer import Run, running

# It ships inside the scikit-image package: 451×300 pixels.
PHOTO = Path(skimage.__file__).parent / "data" / "chelsea.png"
FAST = {"steps": 3, "batch_size": 2, "resolution": 64, "progress": False}


@pytest.fixture
def photo():
    return load_image(PHOTO)


def class_rows(pipe, word):
    return [
        encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word + "</w>")]
        for tokenizer, encoder in (
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2),
        )
    ]


def test_a_photo_becomes_a_subject_that_draws(sdxl_pipeline, photo, tmp_path):
    path = tmp_path / "cat.safetensors"
    arguments = {**FAST, "resolution": None, "learning_rate": 0.1}
    subject = train(photo, model=sdxl_pipeline, class_word="cat", output=path, **arguments)
    assert resolution_of(sdxl_pipeline, None) == 128
    assert [tokens.shape for tokens in subject.tokens] == [(5, 2, 1, 48), (5, 2, 1, 64)]
    for tokens, own, row in zip(
        subject.tokens, subject.class_embeddings, class_rows(sdxl_pipeline, "cat"), strict=True
    ):
        assert torch.equal(own, row[None])
        assert (tokens - row).abs().max() > 1e-2
    assert subject.history.subject_loss[0] == pytest.approx(0, abs=1e-9)
    assert subject.history.subject_loss[-1] > 0
    assert os.listdir(tmp_path) == ["cat.safetensors"]
    loaded = Subject.load(path)
    assert all(map(torch.equal, loaded.tokens, subject.tokens))
    generate = {"steps": 2, "guidance": 5.0}
    of_word = sefi_fast.generate(sdxl_pipeline, "a photo of a cat", **generate)[0]
    sefi_fast.attach(sdxl_pipeline, path)
    drawn = sefi_fast.generate(sdxl_pipeline, "a photo of a <it>", **generate)[0]
    assert drawn.size == (128, 128)
    difference = np.asarray(drawn).astype(int) - np.asarray(of_word).astype(int)
    assert np.abs(difference).max() > 3


@pytest.mark.parametrize("module", ["attention", "free"])
def test_before_training_every_token_is_the_class_word_of_its_encoder(sdxl_pipeline, photo, module):
    config = TrainConfig(module=module, resolution=64, batch_size=1, crop="right")
    with running(sdxl_pipeline, config) as source:
        engine = Run(source, config, [Job(photo, "cat")]).engine
        rows = torch.cat(class_rows(sdxl_pipeline, "cat"))
        assert torch.equal(engine.current(), rows.expand(5, 2, 1, -1))
        assert engine._step.time_ids.tolist() == [[300, 451, 0, 32, 64, 64]]


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.8, "schedule": "linear", "templates": ("a {}", "one {}")},
        {"preset": "prospect", "gradient_accumulation": 2},
    ],
    ids=["average", "prospect"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    sdxl_pipeline, photo, tmp_path, settings
):
    def run(**arguments):
        arguments = {**FAST, "steps": 5, **settings, **arguments}
        return train(photo, model=sdxl_pipeline, class_word="cat", **arguments)

    straight = run()
    output = tmp_path / "cat.safetensors"

    def interrupt(step, history):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(output=output, callback=interrupt)
    wider = load_image(np.pad(np.asarray(photo), ((0, 0), (4, 4), (0, 0))))
    with pytest.raises(ValueError, match=r"size and crop was '\[300, 451, 0, 16, 64, 64\]', is"):
        train(
            wider, model=sdxl_pipeline, class_word="cat", output=output, resume=True,
            **{**FAST, "steps": 5, **settings},
        )  # fmt: skip
    resumed = run(output=output, resume=True)
    assert all(map(torch.equal, resumed.tokens, straight.tokens))
    assert resumed.history.loss == straight.history.loss
    assert os.listdir(tmp_path) == [output.name]


def test_many_learn_side_by_side_what_each_learns_alone(sdxl_pipeline, photo, tmp_path):
    subjects = [
        {"image": photo, "name": "a", "class_word": "cat"},
        {"image": photo.rotate(90, expand=True), "name": "b", "class_word": "dog"},
        {"image": photo, "name": "c", "class_word": "wibble"},
    ]
    results = train_many(subjects, model=sdxl_pipeline, output=tmp_path, **FAST)
    assert isinstance(results[2].error, PromptError)
    assert "text encoder 1 of 2, the class word 'wibble'" in str(results[2].error)
    for number, word in ((0, "cat"), (1, "dog")):
        image = subjects[number]["image"]
        alone = train(image, model=sdxl_pipeline, class_word=word, **FAST)
        together = Subject.load(results[number].path)
        assert results[number].subject.history.loss == pytest.approx(alone.history.loss, rel=1e-4)
        rows = class_rows(sdxl_pipeline, word)
        for ours, theirs, row in zip(together.tokens, alone.tokens, rows, strict=True):
            moved = float((theirs - row.detach()).abs().max())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * moved)
    again = train_many(subjects[:2], model=sdxl_pipeline, output=tmp_path, **FAST)
    assert [result.before for result in again] == [True, True]


def test_textual_inversion_goes_to_diffusers_and_draws_the_same(sdxl_pipeline, photo, tmp_path):
    pipe = sdxl_pipeline
    settings = {**FAST, "preset": "textual-inversion", "learning_rate": 0.1}
    subject = train(photo, model=pipe, class_word="cat", **settings)
    assert [tokens.shape for tokens in subject.tokens] == [(1, 1, 1, 48), (1, 1, 1, 64)]
    assert subject.history.subject_loss == [0.0] * 3
    draw = {"steps": 2, "guidance": 5.0, "negative_prompt": "a car"}
    sefi_fast.attach(pipe, subject)
    wanted = sefi_fast.generate(pipe, "a photo of a <it>", **draw)[0]
    sefi_fast.detach(pipe)
    path = export_embedding(subject, tmp_path / "it.safetensors")
    for name, tokenizer, encoder in (
        ("clip_l", pipe.tokenizer, pipe.text_encoder),
        ("clip_g", pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        row = {"<it>": _tensor_of(path, name)}
        pipe.load_textual_inversion(row, token="<it>", tokenizer=tokenizer, text_encoder=encoder)
    got = sefi_fast.generate(pipe, "a photo of a <it>", **draw)[0]
    assert np.abs(np.asarray(got).astype(int) - np.asarray(wanted).astype(int)).max() <= 1


def _tensor_of(path, name):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(name)


def test_the_compiler_sees_the_whole_unet(sdxl_pipeline, photo, monkeypatch):
    honest = torch.compile

    def traced(function, **settings):
        return honest(function, backend="eager", fullgraph=True, **settings)

    settings = {**FAST, "weight_lambda": 50.0}
    plain = train(photo, model=sdxl_pipeline, class_word="cat", **settings)
    monkeypatch.setattr(torch, "compile", traced)
    # Other tests have compiled the same function for models of other shapes.
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = train(photo, model=sdxl_pipeline, class_word="cat", compile=True, **settings)
    assert compiled.history.loss == pytest.approx(plain.history.loss, rel=1e-6)
    for ours, theirs in zip(compiled.tokens, plain.tokens, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "low_memory"])
def test_memory_is_saved_and_no_number_changed(sdxl_pipeline, photo, option):
    settings = {**FAST, "weight_lambda": 50.0}
    plain = train(photo, model=sdxl_pipeline, class_word="cat", **settings)
    seen = []
    layer = sdxl_pipeline.unet.up_blocks[0].resnets[0]
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(None))
    saving = train(photo, model=sdxl_pipeline, class_word="cat", **{option: True}, **settings)
    handle.remove()
    assert len(seen) == 2 * FAST["steps"]
    assert saving.history.loss == plain.history.loss
    assert all(map(torch.equal, saving.tokens, plain.tokens))


def test_a_caller_without_gradients_or_under_autocast_gets_the_same(sdxl_pipeline, photo):
    plain = train(photo, model=sdxl_pipeline, class_word="cat", **FAST)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        again = train(photo, model=sdxl_pipeline, class_word="cat", **FAST)
    assert all(map(torch.equal, again.tokens, plain.tokens))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("end", ["whole", "error"])
def test_a_pipeline_is_given_back_as_it_was(sdxl_pipeline, photo, half, end):
    pipe = sdxl_pipeline.to(torch.float16) if half else sdxl_pipeline
    pipe.unet.train()
    pipe.text_encoder_2.requires_grad_(False)
    # transformers leaves hooks on a text encoder that was asked for its hidden states once.
    pipe.encode_prompt("a cat", device="cpu")
    before = state_of(pipe)

    def callback(step, history):
        if end == "error" and step == 2:
            raise RuntimeError("from the callback")

    drawing = {"validation_prompts": ("a {}",), "validation_every": 2, "validation_steps": 1}
    with contextlib.suppress(RuntimeError):
        train(
            photo, model=pipe, class_word="cat", callback=callback, gradient_checkpointing=True,
            **drawing, **FAST,
        )  # fmt: skip
    assert state_of(pipe) == before


def test_half_precision_stays_near_and_away_from_the_vae(sdxl_pipeline, photo):
    exact = train(photo, model=sdxl_pipeline, class_word="cat", **FAST)
    seen = []
    for part in (sdxl_pipeline.vae.encoder, sdxl_pipeline.vae.decoder):
        part.register_forward_pre_hook(
            lambda module, inputs: seen.append((torch.is_autocast_enabled("cpu"), inputs[0].dtype))
        )
    drawing = {"validation_prompts": ("a {}",), "validation_every": 3, "validation_steps": 2}
    rough = train(photo, model=sdxl_pipeline, class_word="cat", precision="bf16", **drawing, **FAST)
    assert seen == [(False, torch.float32)] * 2
    assert rough.history.validation[0][1][0].size == (64, 64)
    assert all(tokens.dtype == torch.float32 for tokens in rough.tokens)
    assert rough.history.loss == pytest.approx(exact.history.loss, rel=0.02)
    assert rough.history.loss != exact.history.loss


def test_validation_pictures_have_the_guidance_that_suits_the_family(sdxl_pipeline, sd15_pipeline):
    for pipe, wanted in ((sdxl_pipeline, 5.0), (sd15_pipeline, 7.5)):
        config = TrainConfig()
        with running(pipe, config) as source:
            assert guidance_for(source, config) == wanted
    assert guidance_for(source, TrainConfig(validation_guidance=3.0)) == 3.0


def test_subjects_attached_before_stay_and_change_nothing(sdxl_pipeline, photo):
    plain = train(photo, model=sdxl_pipeline, class_word="dog", placeholder="<me>", **FAST)
    sefi_fast.attach(sdxl_pipeline, plain)
    drawing = {"validation_prompts": ("a {}",), "validation_every": 3, "validation_steps": 1}
    again = train(
        photo, model=sdxl_pipeline, class_word="dog", placeholder="<me>", **drawing, **FAST
    )
    assert all(map(torch.equal, again.tokens, plain.tokens))
    sefi_fast.generate(sdxl_pipeline, "a <me>", steps=1)


def test_folders_fp16_variants_and_single_files(sdxl_pipeline, photo, tmp_path):
    folder = tmp_path / "model"
    pipe = sdxl_pipeline.to(torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    of_folder = train(photo, model=folder, class_word="cat", **FAST)
    assert of_folder.base_model == str(folder)
    save_checkpoint(pipe, tmp_path / "model.safetensors")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    single = sefi_fast.load_pipeline(
        tmp_path / "model.safetensors", torch.float32, "cpu", config=folder
    )
    of_file = train(photo, model=single, class_word="cat", **FAST)
    assert of_file.history.loss == pytest.approx(of_folder.history.loss, rel=1e-5)


def test_the_refiner_is_refused(sdxl_pipeline, photo, tmp_path):
    parts = dict(sdxl_pipeline.components) | {"text_encoder": None, "tokenizer": None}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    with pytest.raises(ModelError, match="second text encoder of SDXL alone"):
        train(photo, model=refiner, class_word="cat", **FAST)
    refiner.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="second text encoder alone, as SDXL's refiner has"):
        train(photo, model=tmp_path, class_word="cat", **FAST)
    # A U-Net that takes five numbers of size, one of them the image's beauty.
    unet = sdxl_pipeline.unet
    unet.register_to_config(projection_class_embeddings_input_dim=32 + 5 * 8)
    with pytest.raises(ModelError, match=r"takes 72 numbers .* make 80, as with SDXL's refiner"):
        train(photo, model=sdxl_pipeline, class_word="cat", **FAST)
    unet.register_to_config(addition_embed_type=None)
    with pytest.raises(ModelError, match="type None, where 'text_time' goes"):
        train(photo, model=sdxl_pipeline, class_word="cat", **FAST)


def test_class_words_that_one_encoder_splits_are_refused(sdxl_pipeline, photo):
    sdxl_pipeline.tokenizer.add_tokens(["xylophone"])
    with pytest.raises(PromptError, match=r"text encoder 2 of 2, the class word 'xylophone' falls"):
        train(photo, model=sdxl_pipeline, class_word="xylophone", **FAST)


def test_settings_and_models_that_do_not_fit_are_told(sdxl_pipeline, photo):
    with pytest.raises(ValueError, match="resolution 256 does not fit.* at most 128"):
        train(photo, model=sdxl_pipeline, class_word="cat", **{**FAST, "resolution": 256})
    sdxl_pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(ModelError, match="takes 9 channels"):
        train(photo, model=sdxl_pipeline, class_word="cat", **FAST)
