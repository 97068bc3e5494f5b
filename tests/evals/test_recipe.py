"""The recipe of the bundled model, its judge and its LoRA: each stage runs and leaves its files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from evals.tiny_world.__main__ import main
from evals.tiny_world.images import drawn_images, to_tensor
from evals.tiny_world.judge_training import train_judge
from evals.tiny_world.loop import Settings
from evals.tiny_world.rates import Asked, obeyed, prompt_sets
from evals.tiny_world.text_encoder import named_attributes
from evals.tiny_world.tokenizer import MAX_LENGTH, CaptionCodes
from evals.tiny_world.train import make_model, replace_folder
from evals.tiny_world.two_creatures import train_two_creatures
from evals.tiny_world.unet import make_scheduler
from evals.tiny_world.vae import encode_images
from sefi_fast.pipelines import load_pipeline
from sefi_fast.tiny_world import SAMPLING, bundled_model_path, two_creatures_lora
from sefi_fast.tiny_world.captions import VOCABULARY
from sefi_fast.tiny_world.drawing import Identity, ImageSpec, random_specs
from sefi_fast.tiny_world.judge import ATTRIBUTES, Judge, Judgement

SMALL = Settings(60, max_steps=2, progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe") / "model"
    make_model(out, 128, SMALL)
    return out


def test_two_steps_of_every_stage_give_a_pipeline(made):
    pipe = StableDiffusionPipeline.from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a red creature", num_inference_steps=2).images[0]
    assert image.size == (48, 48)
    weights = next((made / "unet").glob("*.safetensors"))
    assert 8e6 < weights.stat().st_size < 16e6
    assert not any(str(made.parent) in path.read_text() for path in made.rglob("*.json"))
    assert all(path.stat().st_mode & 0o044 for path in made.rglob("*") if path.is_file())
    signal = make_scheduler().alphas_cumprod.sqrt()
    assert 0.01 < signal[-1] < 0.02 and signal[0] > 0.999


def test_latents_have_unit_variance(made):
    vae = StableDiffusionPipeline.from_pretrained(made, torch_dtype=torch.float32).vae
    assert vae.config.scaling_factor == 1.0
    images, _ = drawn_images(128, 0, made.with_name("model.work"))
    latents = encode_images(vae, images, torch.device("cpu"))
    assert latents.shape == (128, 8, 12, 12)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_a_finished_stage_is_skipped(made, capsys):
    work, again = made.with_name("model.work"), made.with_name("again")
    before = {p: p.stat().st_mtime_ns for p in work.rglob("*.safetensors")}
    make_model(again, 128, SMALL, work=work)
    assert before == {p: p.stat().st_mtime_ns for p in work.rglob("*.safetensors")}
    assert (again / "model_index.json").exists() and "dB" not in capsys.readouterr().out


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["new.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize("bundled", [False, True])
def test_transformers_4_finds_its_files_and_names(made, bundled):
    """It reads vocab.json and merges.txt, and names of weights that begin with text_model."""
    folder = bundled_model_path() if bundled else made
    vocabulary, merges = (str(folder / "tokenizer" / n) for n in ("vocab.json", "merges.txt"))
    text = "a photo of a red creature with a Crown, in the snow"
    slow = CLIPTokenizer(vocabulary, merges)
    fast = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert slow(text).input_ids == fast(text).input_ids
    with safe_open(folder / "text_encoder" / "model.safetensors", "pt") as weights:
        names = weights.keys()
    assert all(name.startswith("text_model.") for name in names)


def test_the_table_of_caption_codes_agrees_with_the_tokenizer(made):
    tokenizer = CLIPTokenizer.from_pretrained(made / "tokenizer")
    codes = CaptionCodes(tokenizer)
    for text in ("", "a photo of a creature on the beach", " ".join(VOCABULARY[:20])):
        padded = tokenizer(text, padding="max_length", max_length=MAX_LENGTH).input_ids
        assert codes(text) == padded
    assert len(tokenizer("ünïcode, zebra!").input_ids) > 8


def test_drawn_images_are_kept_and_reproducible(tmp_path):
    first, specs = drawn_images(130, 3, tmp_path)
    assert specs == random_specs(130, 3) and first.shape == (130, 48, 48, 3)
    (path,) = tmp_path.iterdir()
    assert np.array_equal(first, drawn_images(130, 3, tmp_path)[0])
    path.unlink()
    assert np.array_equal(first, drawn_images(130, 3, tmp_path, processes=2)[0])
    tensor = to_tensor(first, torch.device("cpu"))
    assert tensor.shape == (130, 3, 48, 48) and tensor.abs().max() <= 1


def test_named_attributes_reads_a_caption():
    spec = ImageSpec(Identity("red", "blue", "striped", "long", "tall"), "city", ("hat",), "left")
    whole = "a photo of a tall red creature with blue stripes and long ears"
    brief = "a grey photo of a creature with a hat in the city on the left"
    assert named_attributes(whole, spec) == [1, 5, 2, 3, 2] + [0] * 7
    assert named_attributes(brief, spec) == [0] * 5 + [5, 1, 1, 1, 0, 0, 0]


def test_training_writes_a_judge_that_loads(tmp_path):
    path = tmp_path / "judge.safetensors"
    assert set(train_judge(path, 128, SMALL, batch_size=16)) == set(ATTRIBUTES)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert Judge.load(path)([Image.new("RGB", (48, 48))])[0].labels.keys() == ATTRIBUTES.keys()


def test_two_steps_give_a_lora_that_diffusers_adds_as_it_was_trained(tmp_path):
    pytest.importorskip("peft")
    file = tmp_path / "new" / "lora.safetensors"
    train_two_creatures(file, 16, 3, SMALL, batch_size=4)
    assert [path.name for path in file.parent.iterdir()] == ["lora.safetensors"]
    added, pipe = load_file(file), load_pipeline()
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    assert added.keys() == load_file(two_creatures_lora()).keys()
    moved = 0
    for name, weight in pipe.unet.state_dict().items():
        layer, expected = f"unet.{name.removesuffix('.weight')}", before[name]
        if f"{layer}.lora_A.weight" in added:
            a, b = (added[f"{layer}.lora_{part}.weight"].float().flatten(1) for part in "AB")
            expected = expected + (b @ a).view_as(expected)
            moved += bool((b != 0).any())
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    assert moved == len(added) // 2 > 60


def test_obeyed_counts_accessories_together():
    ask = next(a for a in prompt_sets(4)["held out"] if "yes" in a.wanted.values())
    perfect = {name: {value: 1.0} for name, value in ask.wanted.items()}
    rates = obeyed([ask], [Judgement(perfect)])
    assert rates["accessory"] == {"rate": 1.0, "prompts": 1, "chance": 0.5}
    assert rates["no accessory"]["prompts"] == 3
    wrong = perfect | {"ears": {"none": 1.0}}
    assert obeyed([Asked(*ask)], [Judgement(wrong)])["ears"]["rate"] == 0.0


@pytest.mark.parametrize(
    ("command", "report", "lines"),
    [("rates", "rates.json", 5), ("pair-rates", "pair-rates.json", 4)],
)
def test_the_commands_measure_rates(tmp_path, capsys, monkeypatch, command, report, lines):
    pytest.importorskip("peft")
    monkeypatch.setitem(SAMPLING, "steps", 2)
    assert main([command, "--out", str(tmp_path / "new"), "--count", "2"]) == 0
    found = json.loads((tmp_path / "new" / report).read_text())
    assert len(capsys.readouterr().out.splitlines()) == lines
    by_half = found if command == "pair-rates" else {}
    shares = [s for halves in by_half.values() for half in halves.values() for s in half.values()]
    assert set(shares) <= {0.0, 0.5, 1.0} and len(shares) == 24 * bool(by_half)
    (sheet,) = (tmp_path / "new").glob("*.png")
    with Image.open(sheet) as image:
        assert image.width > 96


def test_the_command_trains(tmp_path, monkeypatch, capsys):
    calls = []
    for name in ("make_model", "train_judge", "train_two_creatures"):
        answer = {"train_judge": {"ears": 1.0}}.get(name, 0.5)
        monkeypatch.setattr(
            f"evals.tiny_world.__main__.{name}",
            lambda name=name, answer=answer, **options: calls.append((name, options)) or answer,
        )
    for command in ("model", "judge", "lora"):
        assert main([command, "--out", str(tmp_path), "--threads", "1"]) == 0
    assert [name for name, _ in calls] == ["make_model", "train_judge", "train_two_creatures"]
    assert [options["images"] for _, options in calls] == [26_000, 16_000, 12_000]
    assert "ears" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    ["model --minutes 0", "lora --rank 0", "judge --images 9", "pair-rates --count 34"],
)
def test_senseless_options_are_refused(tmp_path, wrong):
    with pytest.raises(SystemExit):
        main([*wrong.split(), "--out", str(tmp_path / "m")])
    assert not any(tmp_path.iterdir())
