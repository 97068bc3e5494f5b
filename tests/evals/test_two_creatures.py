"""Pictures of two creatures, their captions, and the LoRA by which the bundled model draws them."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from evals.studies.prompts import identity_words
from evals.tiny_world.pair_rates import main as rates
from evals.tiny_world.two_creatures import main, train_two_creatures
from sefi_fast import regions
from sefi_fast.pipelines import load_pipeline
from sefi_fast.tiny_world import SAMPLING, two_creatures_lora
from sefi_fast.tiny_world.captions import VOCABULARY, pair_caption
from sefi_fast.tiny_world.drawing import Identity, ImageSpec, held_out_identities
from sefi_fast.tiny_world.judge import Judge
from sefi_fast.tiny_world.pairs import PairSpec, draw_pair, halves_of, random_pair

RED = ImageSpec(Identity("red", "white", "striped", "big", "round"), "snow")
BLUE = ImageSpec(Identity("blue", None, "plain", "long", "tall"), "snow", ("hat",))


def test_the_judge_sees_each_creature_in_its_half():
    rng = random.Random(5)
    specs = [random_pair(rng) for _ in range(40)]
    pictures = [draw_pair(spec) for spec in specs]
    assert {picture.size for picture in pictures} == {(96, 48)}
    judge, right = Judge.load(), []
    for place, side in enumerate(("left", "right")):
        for found, spec in zip(judge([halves_of(p)[place] for p in pictures]), specs, strict=True):
            half = getattr(spec, side)
            assert not half.identity.held_out
            right += [found.labels[name] == half.identity.value(name) for name in
                      ("colour", "ears", "shape")]  # fmt: skip
    assert np.mean(right) > 0.97


def test_exchanged_creatures_exchange_the_halves():
    first, second = (np.asarray(draw_pair(spec)) for spec in
                     (PairSpec(RED, BLUE), PairSpec(BLUE, RED)))  # fmt: skip
    assert np.array_equal(first[:, :48], second[:, 48:])
    assert np.array_equal(first[:, 48:], second[:, :48])


def test_a_caption_names_the_left_one_first_and_the_scene_once():
    rng = random.Random(0)
    captions = {pair_caption(RED, BLUE, rng) for _ in range(60)}
    assert len(captions) > 40
    for text in captions:
        assert set(text.split()) <= set(VOCABULARY)
        assert text.count("creature") == 2 and text.count("in the snow") <= 1
        before, after = text.split("creature", 1)[0], text.split(" creature")[-1]
        assert "blue" not in before and "striped" not in after and "stripes" not in after


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match="one scene, not 'snow' and 'city'"):
        PairSpec(RED, replace(BLUE, scene="city"))
    with pytest.raises(ValueError, match="a creature in each half"):
        PairSpec(RED, ImageSpec(None, "snow"))
    with pytest.raises(ValueError, match="it must divide 192"):
        draw_pair(PairSpec(RED, BLUE), 50)


def test_two_steps_give_a_lora_that_diffusers_adds_as_it_was_trained(tmp_path):
    pytest.importorskip("peft")
    file = tmp_path / "new" / "lora.safetensors"
    train_two_creatures(file, pictures=16, batch_size=4, rank=3, max_steps=3, progress=False)
    assert [path.name for path in file.parent.iterdir()] == ["lora.safetensors"]
    added, pipe = load_file(file), load_pipeline()
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    assert added.keys() == load_file(two_creatures_lora()).keys()
    moved = 0
    for name, weight in pipe.unet.state_dict().items():
        layer = f"unet.{name.removesuffix('.weight')}"
        expected = before[name]
        if f"{layer}.lora_A.weight" in added:
            a, b = (added[f"{layer}.lora_{part}.weight"].float().flatten(1) for part in "AB")
            expected = expected + (b @ a).view_as(expected)
            moved += bool((b != 0).any())
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    assert moved == len(added) // 2 > 60


def test_senseless_options_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "lora.safetensors"), "--rank", "0"])
    assert "must be above 0" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_command_of_rates_tells_every_half(tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setitem(SAMPLING, "steps", 2)
    assert rates(["--out", str(tmp_path / "new"), "--count", "2"]) == 0
    report = json.loads((tmp_path / "new" / "pair-rates.json").read_text())
    shares = [
        rate for halves in report.values() for half in halves.values() for rate in half.values()
    ]
    assert len(shares) == 2 * 2 * 6 and set(shares) <= {0.0, 0.5, 1.0}
    assert len(capsys.readouterr().out.splitlines()) == 4
    with Image.open(tmp_path / "new" / "pairs.png") as sheet:
        assert sheet.width > 96
    with pytest.raises(SystemExit):
        rates(["--out", str(tmp_path), "--count", "34"])


def test_the_bundled_lora_draws_two_and_regions_keep_them_apart():
    pytest.importorskip("peft")
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(two_creatures_lora())
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    judge, held_out = Judge.load(), held_out_identities()
    right = {"sentence": [], "regions": []}
    for k in range(3):
        pair = held_out[k], held_out[-1 - k]
        first, second = (f"a {identity_words(identity)}" for identity in pair)
        boxes = {f"a photo of {first} at night": (0, 0, 0.5, 1),
                 f"a photo of {second} at night": (0.5, 0, 1, 1)}  # fmt: skip
        for way, context in (("sentence", nullcontext()), ("regions", regions(pipe, boxes))):
            with context:
                picture = pipe(
                    f"a photo of {first} and {second} at night",
                    width=96,
                    height=48,
                    num_inference_steps=10,
                    guidance_scale=3.0,
                    generator=torch.Generator().manual_seed(k),
                ).images[0]
            for half, identity in zip(judge(halves_of(picture)), pair, strict=True):
                assert half.labels["creature"] == "yes", (k, way)
                right[way].append(half.labels["colour"] == identity.colour)
    # One sentence mixes the colours of the second one; each in its own region is right.
    assert np.mean(right["regions"]) >= 0.8
    assert np.mean(right["regions"]) >= np.mean(right["sentence"])
