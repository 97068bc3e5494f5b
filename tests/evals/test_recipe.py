"""The recipe: every stage runs, skips what is done, and leaves a pipeline that draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from evals.tiny_world.noising import make_scheduler
from evals.tiny_world.pictures import drawn_images
from evals.tiny_world.progress import Budget
from evals.tiny_world.text_encoder import named_attributes
from evals.tiny_world.tokenizer import MAX_LENGTH, CaptionCodes
from evals.tiny_world.train import main, make_model, replace_folder
from evals.tiny_world.vae import encode_images, make_vae, to_tensor
from sefi_fast.tiny_world.captions import VOCABULARY
from sefi_fast.tiny_world.drawing import Identity, ImageSpec, random_specs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe") / "model"
    make_model(out, minutes=1, threads=1, pictures=128, max_steps=2, progress=False)
    return out


def test_two_steps_of_every_stage_give_a_pipeline_that_draws(made):
    pipe = StableDiffusionPipeline.from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a red creature", num_inference_steps=2).images[0]
    assert image.size == (48, 48)
    weights = next((made / "unet").glob("*.safetensors"))
    assert 8e6 < weights.stat().st_size < 16e6
    assert not any(str(made.parent) in path.read_text() for path in made.rglob("*.json"))
    assert all(path.stat().st_mode & 0o044 for path in made.rglob("*") if path.is_file())


def test_latents_have_unit_variance_and_decode_to_the_right_shape(made):
    vae = StableDiffusionPipeline.from_pretrained(made, torch_dtype=torch.float32).vae
    pictures, _ = drawn_images(128, 0, made.with_name("model.work"))
    latents = encode_images(vae, pictures, torch.device("cpu"))
    assert latents.shape == (128, 8, 12, 12)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_a_finished_stage_is_skipped_and_an_unfinished_one_runs(made, capsys):
    before = {p: p.stat().st_mtime_ns for p in made.with_name("model.work").rglob("*.safetensors")}
    again = made.with_name("again")
    work = made.with_name("model.work")
    make_model(again, work=work, minutes=1, threads=1, pictures=128, max_steps=2, progress=False)
    assert before == {p: p.stat().st_mtime_ns for p in work.rglob("*.safetensors")}
    assert (again / "model_index.json").exists()
    assert "dB" not in capsys.readouterr().out


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["new.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


def test_the_table_of_caption_codes_agrees_with_the_tokenizer(made):
    tokenizer = CLIPTokenizer.from_pretrained(made / "tokenizer")
    codes = CaptionCodes(tokenizer)
    for text in ("", "a photo of a creature on the beach", " ".join(VOCABULARY[:20])):
        padded = tokenizer(text, padding="max_length", max_length=MAX_LENGTH).input_ids
        assert codes(text) == padded
    assert len(tokenizer("ünïcode, zebra!").input_ids) > 8


def test_drawn_pictures_are_kept_and_reproducible(tmp_path):
    first, specs = drawn_images(130, 3, tmp_path)
    assert specs == random_specs(130, 3)
    (path,) = tmp_path.iterdir()
    again, _ = drawn_images(130, 3, tmp_path)
    assert np.array_equal(first, again)
    path.unlink()
    assert np.array_equal(first, drawn_images(130, 3, tmp_path)[0])


def test_the_vae_anchors_and_shapes():
    vae = make_vae()
    latents = vae.encode(to_tensor(np.zeros((2, 48, 48, 3), np.uint8), torch.device("cpu")))
    assert latents.latent_dist.mean.shape == (2, 8, 12, 12)
    assert vae.config.scaling_factor == 1.0


def test_the_noise_process_ends_with_almost_no_signal():
    signal = make_scheduler().alphas_cumprod.sqrt()
    assert 0.01 < signal[-1] < 0.02
    assert signal[0] > 0.999


def test_named_attributes_reads_a_caption():
    spec = ImageSpec(Identity("red", "blue", "striped", "long", "tall"), "city", ("hat",), "left")
    said = named_attributes("a photo of a tall red creature with blue stripes and long ears", spec)
    assert said[:5] == [1, 5, 2, 3, 2]
    assert not any(said[5:])
    brief = named_attributes("a grey photo of a creature with a hat in the city on the left", spec)
    assert brief[:5] == [0] * 5
    assert brief[5:] == [5, 1, 1, 1, 0, 0, 0]


def test_a_budget_of_steps_ends_and_its_rate_rises_then_falls():
    budget = Budget("trial", 1000.0, max_steps=20, show=False)
    rates = [budget.rate(step, warm_up=5, flat=0.5, end=0.1) for step in budget.steps()]
    assert len(rates) == 20
    assert rates[0] == pytest.approx(0.2)
    assert rates[5:10] == pytest.approx([1.0] * 5)
    assert rates[-1] < 0.2


def test_senseless_options_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "m"), "--minutes", "0"])
    assert not any(tmp_path.iterdir())
