"""The bundled model: a genuine small pipeline whose prompts steer what it draws."""

from __future__ import annotations

import subprocess
import sys

import pytest
from diffusers import StableDiffusionPipeline

from evals.tiny_world.rates import Asked, draw_prompts, obeyed, prompt_sets
from sefi_fast.tiny_world import CLASS_WORD, bundled_model_path
from sefi_fast.tiny_world.drawing import COLOURS, SCENES
from sefi_fast.tiny_world.judge import Judge, Judgement


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(bundled_model_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    scenes = [SCENES[k % len(SCENES)] for k in range(16)]
    colours = [COLOURS[k % len(COLOURS)] for k in range(16)]
    phrases = {"beach": "on the beach", "night": "at night"}
    return [
        Asked(
            f"a photo of a {colour} {CLASS_WORD} {phrases.get(scene, f'in the {scene}')}",
            {"colour": colour, "scene": scene},
        )
        for colour, scene in zip(colours, scenes, strict=True)
    ]


def test_the_folder_is_at_most_20_megabytes():
    files = [path for path in bundled_model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert not any(path.name.startswith(".") for path in files)


def test_it_is_a_stable_diffusion_pipeline_with_cross_attention_at_two_resolutions(pipe):
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel"
    assert type(pipe.vae).__name__ == "AutoencoderKL"
    assert pipe.safety_checker is None
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    blocks = {
        name.rsplit(".transformer_blocks", 1)[0].split(".attentions")[0]
        for name in pipe.unet.attn_processors
        if "attn2" in name
    }
    assert {"down_blocks.0", "down_blocks.1", "up_blocks.1", "up_blocks.2"} <= blocks


def test_prompts_choose_colour_and_scene(pipe, asked):
    images = draw_prompts(pipe, [ask.prompt for ask in asked], steps=12)
    assert all(image.size == (48, 48) for image in images)
    found = obeyed(asked, Judge.load()(images))
    assert found["scene"]["rate"] >= 0.8
    assert found["colour"]["rate"] >= 0.7


def test_an_empty_prompt_does_not_obey(pipe, asked):
    """The rates above are the prompts' doing: without guidance by them they fall to chance."""
    images = draw_prompts(pipe, [""] * len(asked), steps=12, guidance=1.0)
    found = obeyed(asked, Judge.load()(images))
    assert found["scene"]["rate"] <= 0.6
    assert found["colour"]["rate"] <= 0.5


def test_obeyed_counts_accessories_together():
    sets = prompt_sets(4)
    ask = next(a for a in sets["held out"] if "yes" in a.wanted.values())
    perfect = Judgement({name: {value: 1.0} for name, value in ask.wanted.items()})
    rates = obeyed([ask], [perfect])
    assert rates["accessory"] == {"rate": 1.0, "prompts": 1, "chance": 0.5}
    assert rates["no accessory"]["prompts"] == 3
    wrong = {name: {value: 1.0} for name, value in ask.wanted.items()} | {"ears": {"none": 1.0}}
    assert obeyed([ask], [Judgement(wrong)])["ears"]["rate"] == 0.0


def test_prompt_sets_keep_seen_and_unseen_identities_apart():
    sets = prompt_sets(66)
    assert [len(asked) for asked in sets.values()] == [66, 66, 33]
    assert not {a.prompt for a in sets["held out"]} & {a.prompt for a in sets["seen"]}
    assert prompt_sets(66) == sets


def test_importing_the_package_is_light():
    code = (
        "import sys, sefi_fast.tiny_world as t; t.bundled_model_path(); t.CLASS_WORD; "
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
