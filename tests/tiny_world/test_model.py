"""The bundled model: a small Stable Diffusion pipeline whose prompts steer its images."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from evals.tiny_world.pairs import HALVES, halves_of
from sefi_fast import regions
from sefi_fast.tiny_world import CLASS_WORD, bundled_model_path, two_creatures_lora
from sefi_fast.tiny_world.captions import SCENE_PHRASES
from sefi_fast.tiny_world.drawing import COLOURS, SCENES, held_out_identities
from sefi_fast.tiny_world.judge import Judge


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(bundled_model_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_a_small_pipeline_with_cross_attention_at_two_resolutions(pipe):
    files = [path for path in bundled_model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert not any(path.name.startswith(".") for path in files)
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel"
    assert type(pipe.vae).__name__ == "AutoencoderKL"
    assert pipe.safety_checker is None
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    layers = [name for name in pipe.unet.attn_processors if "attn2" in name]
    blocks = {name.split(".attentions")[0] for name in layers}
    assert {"down_blocks.0", "down_blocks.1", "up_blocks.1", "up_blocks.2"} <= blocks


@pytest.mark.parametrize("prompted", [True, False])
def test_prompts_choose_color_and_scene(pipe, prompted):
    """Without the prompts the shares fall towards chance."""
    asked = [(COLOURS[k % len(COLOURS)], SCENES[k % len(SCENES)]) for k in range(16)]
    prompts = [f"a photo of a {colour} {CLASS_WORD} {SCENE_PHRASES[s]}" for colour, s in asked]
    images = pipe(
        prompts if prompted else [""] * 16, num_inference_steps=12,
        guidance_scale=3.0 if prompted else 1.0,
        generator=[torch.Generator().manual_seed(k) for k in range(16)],
    ).images  # fmt: skip
    assert all(image.size == (48, 48) for image in images)
    found = [(one.labels["colour"], one.labels["scene"]) for one in Judge.load()(images)]
    colour, scene = np.mean(np.array(found) == np.array(asked), axis=0)
    assert (colour >= 0.7 and scene >= 0.8) if prompted else (colour <= 0.5 and scene <= 0.6)


def test_the_bundled_lora_shows_two_and_regions_keep_them_apart(pipe):
    pytest.importorskip("peft")
    lora = two_creatures_lora()
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    judge, held_out, right = Judge.load(), held_out_identities(), {False: [], True: []}
    for k in range(3):
        pair = held_out[k], held_out[-1 - k]
        first, second = (f"a {one.colour} {CLASS_WORD} with {one.ears} ears" for one in pair)
        sentences = [f"a photo of {one} at night" for one in (first, second)]
        for by_halves in (False, True):
            boxes = list(zip(sentences, HALVES, strict=True))
            with regions(pipe, boxes) if by_halves else nullcontext():
                image = pipe(
                    f"a photo of {first} and {second} at night", width=96, height=48,
                    num_inference_steps=10, guidance_scale=3.0,
                    generator=torch.Generator().manual_seed(k),
                ).images[0]  # fmt: skip
            for half, identity in zip(judge(halves_of(image)), pair, strict=True):
                assert half.labels["creature"] == "yes", (k, by_halves)
                right[by_halves].append(half.labels["colour"] == identity.colour)
    # One sentence mixes the colors of the second creature.
    assert np.mean(right[True]) >= max(0.8, np.mean(right[False]))


def test_importing_the_tiny_world_loads_neither_torch_nor_diffusers():
    code = (
        "import sys, sefi_fast.tiny_world as t; t.bundled_model_path(); t.CLASS_WORD; "
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
