"""Measure how often the bundled model, with and without its LoRA, obeys its prompts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline

from evals.studies.prompts import identity_words
from evals.studies.two_subjects import generate_pair, pair_pipeline
from evals.tiny_world.pairs import halves_of
from sefi_fast.evaluation import Panel, contact_sheet
from sefi_fast.tiny_world import CLASS_WORD, SAMPLING, bundled_model_path
from sefi_fast.tiny_world.captions import POSITION_PHRASES, SCENE_PHRASES
from sefi_fast.tiny_world.drawing import (
    ACCESSORIES,
    POSITIONS,
    SCENES,
    Identity,
    draw,
    held_out_identities,
    random_identity,
    random_spec,
)
from sefi_fast.tiny_world.judge import (
    ATTRIBUTES,
    IDENTITY_ATTRIBUTES,
    Judge,
    Judgement,
    right_answers,
)

_HEADINGS = {
    "held out": "identities that the model has never seen",
    "seen": "other identities",
    "brief": "the bare class word",
}
_WAYS = ("one sentence", "a sentence for each half")


class Asked(NamedTuple):
    """A prompt and the value of each attribute that it names."""

    prompt: str
    wanted: dict[str, str]


def identity_prompt(
    identity: Identity, scene: str, position: str, accessory: str | None = None
) -> Asked:
    """Name a whole identity, the scene, the position and perhaps an accessory."""
    words = ["a photo of a", identity_words(identity)]
    if accessory is not None:
        words.append(f"with a {accessory}")
    words += [SCENE_PHRASES[scene], POSITION_PHRASES[position]]
    wanted = {name: identity.value(name) for name in IDENTITY_ATTRIBUTES}
    wanted |= {"scene": scene, "position": position, "style": "colour"}
    wanted |= {name: "yes" if name == accessory else "no" for name in ACCESSORIES}
    return Asked(" ".join(words), wanted)


def prompt_sets(count: int, seed: int = 0) -> dict[str, list[Asked]]:
    """Return three fixed sets of prompts.

    Args:
        count: prompts of the first two sets; the third has half as many.
        seed: seed of the choice.

    Returns:
        "held out" and "seen": whole identities, every second one with an accessory. "brief": the
        bare class word with an accessory and a scene, every third one as a grey photo.
    """
    rng = random.Random(seed)
    held_out = held_out_identities()
    rng.shuffle(held_out)
    sets: dict[str, list[Asked]] = {name: [] for name in _HEADINGS}
    for k in range(count):
        scene, position = SCENES[k % len(SCENES)], POSITIONS[rng.randrange(3)]
        accessory = ACCESSORIES[(k // 2) % len(ACCESSORIES)] if k % 2 else None
        for name, identity in (
            ("held out", held_out[k % len(held_out)]),
            ("seen", random_identity(rng)),
        ):
            sets[name].append(identity_prompt(identity, scene, position, accessory))
    for k in range(count // 2):
        scene, accessory = SCENES[k % len(SCENES)], ACCESSORIES[k % len(ACCESSORIES)]
        opener, style = ("a grey photo", "grey") if k % 3 == 0 else ("a photo", "colour")
        prompt = f"{opener} of a {CLASS_WORD} with a {accessory} {SCENE_PHRASES[scene]}"
        sets["brief"].append(Asked(prompt, {"scene": scene, accessory: "yes", "style": style}))
    return sets


def obeyed(asked: Iterable[Asked], found: Iterable[Judgement]) -> dict[str, dict[str, float]]:
    """Return for each attribute the share of prompts obeyed, their number, and chance.

    The four accessories count together: "accessory" if the prompt names one, "no accessory" if the
    prompt describes everything and does not name it.
    """
    hits: dict[str, list[bool]] = {}
    for ask, judgement in zip(asked, found, strict=True):
        labels = judgement.labels
        for name, value in ask.wanted.items():
            key = name
            if name in ACCESSORIES:
                key = "accessory" if value == "yes" else "no accessory"
            hits.setdefault(key, []).append(labels[name] == value)
    return {
        name: {
            "rate": round(sum(marks) / len(marks), 3),
            "prompts": len(marks),
            "chance": round(1 / len(ATTRIBUTES.get(name, ("no", "yes"))), 3),
        }
        for name, marks in hits.items()
    }


@torch.inference_mode()
def ceiling(pipe: StableDiffusionPipeline, judge: Judge, count: int, seed: int) -> dict[str, float]:
    """Return the judge's share of right answers on drawings that the autoencoder reconstructs.

    No model of these latents can be judged to do better.
    """
    rng, held_out = random.Random(seed), held_out_identities()
    specs = [random_spec(rng, rng.choice(held_out)) for _ in range(count)]
    decoded = []
    for spec in specs:
        latents = pipe.vae.encode(pipe.image_processor.preprocess(draw(spec)[0])).latent_dist.mean
        decoded += pipe.image_processor.postprocess(pipe.vae.decode(latents).sample)
    return {name: round(share, 3) for name, share in right_answers(specs, judge(decoded)).items()}


def measure(
    out: Path, *, model: Path | None, count: int, seed: int, steps: int, guidance: float
) -> dict[str, Any]:
    """Generate images of the prompt sets, judge them, and write rates.json and sheet.png.

    Args:
        out: folder, made if it is missing.
        model: pipeline folder; None for the bundled one.
        count: prompts of each of the two identity sets.
        seed: seed of the prompts and the noise.
        steps: sampling steps.
        guidance: guidance scale.

    Returns:
        The contents of rates.json.
    """
    pipe = StableDiffusionPipeline.from_pretrained(
        model or bundled_model_path(), torch_dtype=torch.float32, use_safetensors=True
    )
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.load()
    report: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "sets": {}}
    rows, seconds, images = [], 0.0, 0
    for name, asked in prompt_sets(count, seed).items():
        started = time.perf_counter()
        panels: list[Panel] = []
        for start in range(0, len(asked), 16):
            prompts = [ask.prompt for ask in asked[start : start + 16]]
            seeds = (seed * 100_003 + start + k for k in range(len(prompts)))
            found = pipe(
                prompts, num_inference_steps=steps, guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(number) for number in seeds],
            ).images  # fmt: skip
            panels += map(Panel, found, prompts)
        seconds, images = seconds + time.perf_counter() - started, images + len(panels)
        report["sets"][name] = obeyed(asked, judge([panel.image for panel in panels]))
        shown = panels[:18]
        rows += [(_HEADINGS[name] * (k == 0), shown[k : k + 6]) for k in range(0, len(shown), 6)]
    report["ceiling"] = ceiling(pipe, judge, 2 * count, seed)
    report["seconds per image"] = round(seconds / images, 3)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rates.json").write_text(json.dumps(report, indent=2) + "\n")
    sheet = contact_sheet(rows, title="the bundled tiny model: prompt by prompt, first seed")
    sheet.save(out / "sheet.png")
    return report


def measure_pairs(out: Path, *, count: int, seed: int) -> dict[str, Any]:
    """Generate pairs spelled out in words, judge the halves, write pair-rates.json and pairs.png.

    Args:
        out: folder, made if it is missing.
        count: pairs of identities that neither the model nor its LoRA has seen, 1 to 33. Each has
            one image per way to ask.
        seed: seed of the pairs and the noise.

    Returns:
        The contents of pair-rates.json: way → half → attribute → share of images that are right.
    """
    chosen = held_out_identities()
    random.Random(seed).shuffle(chosen)
    pairs = list(zip(chosen[: 2 * count : 2], chosen[1 : 2 * count : 2], strict=True))
    pipe, judge = pair_pipeline(torch.float32), Judge.load()
    report: dict[str, Any] = {}
    rows = []
    for way in _WAYS:
        panels: list[Panel] = []
        for k, (first, second) in enumerate(pairs):
            words = (f"a {identity_words(first)}", f"a {identity_words(second)}")
            images = generate_pair(
                pipe, words, SCENES[k % len(SCENES)], [seed + k], by_halves=way != _WAYS[0],
                **SAMPLING,
            )  # fmt: skip
            panels += map(Panel, images)
        report[way] = {}
        for place, half in enumerate(("left", "right")):
            labels = [one.labels for one in judge([halves_of(p.image)[place] for p in panels])]
            right = {"creature": [found["creature"] == "yes" for found in labels]}
            for name in IDENTITY_ATTRIBUTES:
                wanted = [pair[place].value(name) for pair in pairs]
                right[name] = [f[name] == w for f, w in zip(labels, wanted, strict=True)]
            report[way][half] = {name: round(sum(r) / count, 3) for name, r in right.items()}
        rows += [(way * (k == 0), panels[k : k + 6]) for k in range(0, min(12, count), 6)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "pair-rates.json").write_text(json.dumps(report, indent=2) + "\n")
    contact_sheet(rows, title="two creatures, first seeds").save(out / "pairs.png")
    return report
