"""The command that measures how often the bundled model draws what its prompt says."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from evals.studies.prompts import identity_words
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
from sefi_fast.tiny_world.judge import ATTRIBUTES, Judge, Judgement, right_answers


class Asked(NamedTuple):
    """A prompt and the value of each attribute that it names."""

    prompt: str
    wanted: dict[str, str]


def identity_prompt(
    identity: Identity, scene: str, position: str, accessory: str | None = None
) -> Asked:
    """A prompt that names a whole identity, the scene, the place and perhaps an accessory."""
    words = ["a photo of a", identity_words(identity)]
    if accessory is not None:
        words.append(f"with a {accessory}")
    words += [SCENE_PHRASES[scene], POSITION_PHRASES[position]]
    wanted = {
        "colour": identity.colour,
        "second_colour": identity.value("second_colour"),
        "pattern": identity.pattern,
        "ears": identity.ears,
        "shape": identity.shape,
        "scene": scene,
        "position": position,
        "style": "colour",
    }
    wanted |= {name: "yes" if name == accessory else "no" for name in ACCESSORIES}
    return Asked(" ".join(words), wanted)


def prompt_sets(count: int, seed: int = 0) -> dict[str, list[Asked]]:
    """Three fixed sets of prompts.

    Args:
        count: prompts of the first two sets; the third has half as many.
        seed: of the choice.

    Returns:
        "held out" and "seen": whole identities, every second one with an accessory; "brief": the
        bare class word with an accessory and a scene, every third one as a grey photo.
    """
    rng = random.Random(seed)
    held_out = held_out_identities()
    rng.shuffle(held_out)
    sets: dict[str, list[Asked]] = {"held out": [], "seen": [], "brief": []}
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
        style = "grey" if k % 3 == 0 else "colour"
        opener = "a grey photo" if style == "grey" else "a photo"
        prompt = f"{opener} of a {CLASS_WORD} with a {accessory} {SCENE_PHRASES[scene]}"
        sets["brief"].append(Asked(prompt, {"scene": scene, accessory: "yes", "style": style}))
    return sets


def draw_prompts(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = SAMPLING["steps"],
    guidance: float = SAMPLING["guidance"],
    batch_size: int = 16,
) -> list[Image.Image]:
    """One picture a prompt, in batches; picture k's noise depends on the seed and k alone."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        seeds = (seed * 100_003 + start + k for k in range(len(part)))
        noise = [torch.Generator().manual_seed(number) for number in seeds]
        images += pipe(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=noise
        ).images
    return images


def obeyed(asked: Iterable[Asked], found: Iterable[Judgement]) -> dict[str, dict[str, float]]:
    """For each attribute: share of prompts obeyed, number of them, and chance.

    The four accessories count together: "accessory" where one is asked for, "no accessory" where
    the prompt says what else there is and names none.
    """
    hits: dict[str, list[bool]] = {}
    for ask, judgement in zip(asked, found, strict=True):
        labels = judgement.labels
        for name, value in ask.wanted.items():
            key = name
            if name in ACCESSORIES:
                key = "accessory" if value == "yes" else "no accessory"
            hits.setdefault(key, []).append(labels[name] == value)
    chances = {name: 1 / len(values) for name, values in ATTRIBUTES.items()}
    return {
        name: {
            "rate": round(sum(marks) / len(marks), 3),
            "prompts": len(marks),
            "chance": round(chances.get(name, 0.5), 3),
        }
        for name, marks in hits.items()
    }


def ceiling(pipe: StableDiffusionPipeline, judge: Judge, count: int, seed: int) -> dict[str, float]:
    """Share of right answers of the judge on drawings that went through the autoencoder and back.

    No model of these latents can be judged to do better, so it is the ceiling of the rates.
    """
    rng, held_out = random.Random(seed), held_out_identities()
    specs = [random_spec(rng, rng.choice(held_out)) for _ in range(count)]
    decoded = []
    for spec in specs:
        pixels = pipe.image_processor.preprocess(draw(spec)[0])
        with torch.inference_mode():
            latents = pipe.vae.encode(pixels).latent_dist.mean
            decoded += pipe.image_processor.postprocess(pipe.vae.decode(latents).sample)
    return {name: round(share, 3) for name, share in right_answers(specs, judge(decoded)).items()}


def measure(
    out: Path,
    *,
    model: Path | None = None,
    count: int = 66,
    seed: int = 0,
    steps: int = SAMPLING["steps"],
    guidance: float = SAMPLING["guidance"],
) -> dict[str, Any]:
    """Draw the prompt sets, judge them, and write rates.json and sheet.png into a folder.

    Args:
        out: folder; made when missing.
        model: pipeline folder; None for the bundled one.
        count: prompts of each of the two identity sets.
        seed: of the prompts and the noise.
        steps: sampling steps.
        guidance: guidance scale.

    Returns:
        What rates.json holds.
    """
    pipe = StableDiffusionPipeline.from_pretrained(
        model or bundled_model_path(), torch_dtype=torch.float32, use_safetensors=True
    )
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.load()
    report: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "sets": {}}
    rows = []
    seconds, pictures = 0.0, 0
    for name, asked in prompt_sets(count, seed).items():
        started = time.perf_counter()
        prompts = [ask.prompt for ask in asked]
        images = draw_prompts(pipe, prompts, seed=seed, steps=steps, guidance=guidance)
        seconds, pictures = seconds + time.perf_counter() - started, pictures + len(images)
        report["sets"][name] = obeyed(asked, judge(images))
        shown = [Panel(image, ask.prompt) for image, ask in zip(images, asked, strict=True)][:18]
        heading = {
            "held out": "identities that the model has never seen",
            "seen": "other identities",
            "brief": "the bare class word",
        }[name]
        rows += [(heading if k == 0 else "", shown[k : k + 6]) for k in range(0, len(shown), 6)]
    report["ceiling"] = ceiling(pipe, judge, 2 * count, seed)
    report["seconds_per_picture"] = round(seconds / pictures, 3)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rates.json").write_text(json.dumps(report, indent=2) + "\n")
    sheet = contact_sheet(rows, title="the bundled tiny model: prompt by prompt, first seed")
    sheet.save(out / "sheet.png")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m evals.tiny_world.rates``."""
    parser = argparse.ArgumentParser(prog="python -m evals.tiny_world.rates", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for rates.json, sheet.png")
    parser.add_argument("--model", type=Path, help="pipeline folder (default: the bundled one)")
    parser.add_argument("--count", type=int, default=66, help="prompts a set (default: 66)")
    parser.add_argument("--steps", type=int, default=SAMPLING["steps"])
    parser.add_argument("--guidance", type=float, default=SAMPLING["guidance"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch (default: its own)")
    options = vars(parser.parse_args(arguments))
    if options["count"] < 2 or options["steps"] < 1:
        parser.error("--count must be at least 2 and --steps at least 1")
    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    report = measure(**options)
    for name, rates in report["sets"].items():
        print(name)
        for attribute, entry in rates.items():
            print(f"  {attribute:14s} {entry['rate']:.2f}  of {entry['prompts']} prompts")
    print("ceiling: the judge on drawings that went through the autoencoder")
    print("  " + ", ".join(f"{name} {rate:.2f}" for name, rate in report["ceiling"].items()))
    print(f"{report['seconds_per_picture']} s a picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
