"""The public function: images in, subjects out, pipelines given back, failures told."""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from training.pipeline_state import state_of

import sefi_fast
from sefi_fast.subject import Subject
from sefi_fast.training import TrainConfig, train
from sefi_fast.training.image import load_image, prepare
from sefi_fast.training.noise import draw

# These ship inside the scikit-image package.
PHOTOS = Path(skimage.__file__).parent / "data"
FAST = {"steps": 3, "batch_size": 2, "resolution": 64, "progress": False}


@pytest.fixture
def photo() -> Image.Image:
    return load_image(PHOTOS / "chelsea.png")


@pytest.mark.parametrize(("name", "word"), [("chelsea.png", "cat"), ("astronaut.png", "person")])
def test_a_photo_becomes_a_subject_that_draws(sd15_pipeline, tmp_path, name, word):
    path = tmp_path / "subject.safetensors"
    subject = sefi_fast.train(
        image=PHOTOS / name, model=sd15_pipeline, class_word=word, output=path, **FAST
    )
    table = sd15_pipeline.text_encoder.get_input_embeddings().weight
    row = table[sd15_pipeline.tokenizer(word, add_special_tokens=False).input_ids[0]]
    assert subject.tokens[0].shape == (5, 2, 1, 48)
    assert torch.equal(subject.class_embeddings[0], row[None])
    assert (subject.tokens[0] - row).abs().max() > 1e-4
    assert (subject.placeholder, subject.class_word) == ("<it>", word)
    assert subject.settings["steps"] == 3
    assert TrainConfig(**{k: v for k, v in subject.settings.items() if k != "model"}).steps == 3
    loaded = Subject.load(path)
    assert torch.equal(loaded.tokens[0], subject.tokens[0])
    assert os.listdir(tmp_path) == ["subject.safetensors"]
    sefi_fast.attach(sd15_pipeline, path)
    pictures = sefi_fast.generate(sd15_pipeline, "a photo of a <it>", steps=1)
    assert pictures[0].size == (128, 128)


def test_a_folder_as_the_model(sd15_folder, photo):
    subject = train(photo, model=sd15_folder, class_word="cat", **FAST)
    assert subject.base_model == subject.settings["model"] == str(sd15_folder)
    assert len(subject.history.loss) == 3


@pytest.mark.parametrize("module", ["attention", "free"])
def test_a_class_word_of_two_words_and_more_vectors(sd15_pipeline, photo, tmp_path, module):
    path = tmp_path / "cat.safetensors"
    subject = train(
        photo, model=sd15_pipeline, class_word="red cat", num_vectors=3, module=module,
        output=path, **FAST,
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
    # The untrained tokens are the reference itself, and the first step is taken from there.
    assert subject.history.subject_loss[0] == pytest.approx(0, abs=1e-9)
    assert subject.history.subject_loss[-1] > 0
    sefi_fast.attach(sd15_pipeline, path)
    with sefi_fast.trace(sd15_pipeline, ["<it>", "snow"]) as found:
        sefi_fast.generate(sd15_pipeline, "a photo of a <it> in the snow", steps=1)
    assert all(bool(one.any()) for one in found.maps.values())


def test_history_and_callback(sd15_pipeline, photo):
    seen = []

    def callback(step, history):
        seen.append((step, len(history.loss)))
        return step == 2

    subject = train(photo, model=sd15_pipeline, class_word="cat", callback=callback, **FAST)
    history = subject.history
    assert seen == [(1, 1), (2, 2)]
    assert len(history.loss) == len(history.subject_loss) == len(history.seconds) == 2
    assert all(0 < loss < 10 for loss in history.loss)
    assert history.subject_loss[0] == pytest.approx(0, abs=1e-9)
    assert history.subject_loss[1] > history.subject_loss[0]
    assert history.seconds == sorted(history.seconds)
    assert history.skipped == []


def test_the_same_seed_gives_the_same_tokens_bit_for_bit(sd15_pipeline, photo):
    def run(seed):
        return train(photo, model=sd15_pipeline, class_word="cat", seed=seed, **FAST)

    first, other = run(0), run(1)
    torch.manual_seed(1234)
    np.random.seed(5)
    state = torch.random.get_rng_state()
    again = run(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.tokens[0], again.tokens[0])
    assert first.history.loss == again.history.loss
    assert not torch.equal(first.tokens[0], other.tokens[0])


def test_one_tied_stage_without_weight_is_textual_inversion(sd15_pipeline, photo):
    config = TrainConfig(
        stages=1,
        split=False,
        weight_lambda=0.0,
        module="free",
        schedule="constant",
        learning_rate=1e-2,
        snr_gamma=None,
        flip=False,
        steps=3,
        batch_size=2,
        seed=4,
    )
    pipe = copy.deepcopy(sd15_pipeline)
    subject = train(photo, model=pipe, class_word="cat", config=config, progress=False)

    # Textual Inversion as it is usually written: one row of the token table in the optimiser.
    pipe = sd15_pipeline
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    posterior = pipe.vae.encode(prepare(photo, 128)[None]).latent_dist
    ids = pipe.tokenizer(["a photo of a cat"] * 2, padding="max_length", return_tensors="pt")
    table = pipe.text_encoder.get_input_embeddings().weight
    word = pipe.tokenizer("cat", add_special_tokens=False).input_ids[0]
    row = table[word].clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([row], lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(4)
    losses = []
    for _ in range(3):
        drawn = draw(
            generator,
            batch_size=2,
            num_train_timesteps=1000,
            views=1,
            templates=1,
            latent_shape=(4, 16, 16),
        )
        latents = posterior.mean + posterior.std * drawn.latent_noise
        latents = latents * pipe.vae.config.scaling_factor
        noised = pipe.scheduler.add_noise(latents, drawn.noise, drawn.timesteps)
        is_word = (torch.arange(len(table)) == word)[:, None]
        name = next(n for n, p in pipe.text_encoder.named_parameters() if p is table)
        changed = {name: torch.where(is_word, row, table)}
        prompt = torch.func.functional_call(pipe.text_encoder, changed, (ids.input_ids,))[0]
        prediction = pipe.unet(noised, drawn.timesteps, prompt).sample
        loss = torch.nn.functional.mse_loss(prediction, drawn.noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert subject.history.loss == pytest.approx(losses, rel=1e-4)
    assert subject.history.subject_loss == [0.0] * 3
    assert subject.tokens[0].shape == (1, 1, 1, 48)
    # Adam's first steps follow the gradient's sign, so where that is near zero they may differ.
    torch.testing.assert_close(subject.tokens[0][0, 0, 0], row.detach(), rtol=0, atol=2e-3)
    assert (row - table[word]).abs().max() > 0.02


def make_unusual(pipe):
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.text_encoder.requires_grad_(False)
    pipe.vae.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("end", ["whole", "error", "interrupt", "refused"])
def test_a_pipeline_is_given_back_as_it_was(sd15_pipeline, photo, half, end):
    pipe = sd15_pipeline.to(torch.float16) if half else sd15_pipeline
    make_unusual(pipe)
    before = state_of(pipe)

    def callback(step, history):
        if end == "error":
            raise RuntimeError("from the callback")
        if end == "interrupt":
            raise KeyboardInterrupt

    settings = dict(FAST, gradient_checkpointing=True)
    if not half:
        settings |= {"validation_prompts": ("a {}",), "validation_every": 1, "validation_steps": 2}
    if end == "refused":
        settings["loss_resolutions"] = (999,)
    with contextlib.suppress(RuntimeError, KeyboardInterrupt, ValueError):
        train(photo, model=pipe, class_word="cat", callback=callback, **settings)
    assert state_of(pipe) == before


def test_subjects_attached_before_stay_attached(sd15_pipeline, photo):
    first = train(photo, model=sd15_pipeline, class_word="cat", **FAST)
    plain = train(photo, model=sd15_pipeline, class_word="dog", placeholder="<me>", **FAST)
    sefi_fast.attach(sd15_pipeline, first)
    wanted = sefi_fast.generate(sd15_pipeline, "a <it>", steps=2)[0]
    validation = {
        "validation_prompts": ("a photo of {}",),
        "validation_every": 2,
        "validation_steps": 2,
    }
    second = train(
        photo, model=sd15_pipeline, class_word="dog", placeholder="<me>", **FAST, **validation
    )
    assert torch.equal(second.tokens[0], plain.tokens[0])
    assert [step for step, _ in second.history.validation] == [2]
    (image,) = second.history.validation[0][1]
    assert image.size == (64, 64)
    got = sefi_fast.generate(sd15_pipeline, "a <it>", steps=2)[0]
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


def test_training_inside_no_grad_and_inference_mode(sd15_pipeline, photo):
    subject = train(photo, model=sd15_pipeline, class_word="cat", **FAST)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            again = train(photo, model=sd15_pipeline, class_word="cat", **FAST)
        assert torch.equal(subject.tokens[0], again.tokens[0])


def test_bfloat16_on_the_cpu_stays_near_float32(sd15_pipeline, photo):
    exact = train(photo, model=sd15_pipeline, class_word="cat", **FAST)
    rough = train(photo, model=sd15_pipeline, class_word="cat", precision="bf16", **FAST)
    assert rough.tokens[0].dtype == torch.float32
    assert rough.history.loss == pytest.approx(exact.history.loss, rel=0.02)
    assert rough.history.loss != exact.history.loss


@pytest.mark.parametrize("progress", [False, True])
def test_progress_goes_to_the_error_stream_only_when_wanted(sd15_pipeline, photo, capfd, progress):
    settings = {**FAST, "progress": progress}
    validation = {"validation_prompts": ("a {}",), "validation_every": 2, "validation_steps": 2}
    train(photo, model=sd15_pipeline, class_word="cat", **settings, **validation)
    out, err = capfd.readouterr()
    assert out == ""
    if not progress:
        assert err == ""
    else:
        assert all(word in err for word in ("<it>", "3/3", "loss=", "subject_loss="))
