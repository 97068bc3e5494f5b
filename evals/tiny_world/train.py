"""Make the bundled model: draw, train every stage, write the pipeline."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from evals.tiny_world.images import drawn_images
from evals.tiny_world.loop import Settings
from evals.tiny_world.text_encoder import pretrain_text_encoder
from evals.tiny_world.tokenizer import train_tokenizer
from evals.tiny_world.unet import train_unet
from evals.tiny_world.vae import train_vae

STAGES = ("tokenizer", "vae", "text", "unet")
_SHARES = {"vae": 0.12, "text": 0.025, "unet": 0.855}


def make_model(
    out: Path,
    images: int,
    settings: Settings,
    *,
    work: Path | None = None,
    processes: int = 1,
    stages: Sequence[str] = STAGES,
) -> None:
    """Train the model and write it as a StableDiffusionPipeline folder in float16.

    A stage whose result is in the work folder is skipped, so the same call resumes a stopped run.

    Args:
        out: folder of the pipeline, replaced when the last stage is done, and every four minutes
            before with the state of the training.
        images: number of drawn images.
        settings: settings of the training of all stages together.
        work: folder of the stages. Default: "<out>.work".
        processes: number of processes that draw.
        stages: stages to run now, of STAGES.
    """
    work = work or out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)

    def wanted(stage: str) -> bool:
        return stage in stages and not (work / stage).exists()

    def part(stage: str) -> Settings:
        return replace(settings, seconds=_SHARES[stage] * settings.seconds)

    if wanted("tokenizer"):
        with _stage(work, "tokenizer") as folder:
            train_tokenizer(folder)
    if wanted("vae"):
        with _stage(work, "vae") as folder:
            drawn, _ = drawn_images(images, settings.seed, work, processes)
            quality = train_vae(drawn, folder, part("vae"))
        print(f"vae: {quality:.1f} dB on the kept images", flush=True)
    if wanted("text"):
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        with _stage(work, "text") as folder:
            accuracy = pretrain_text_encoder(tokenizer, folder, part("text"))
        print(f"text encoder: {accuracy:.3f} of the attributes are right", flush=True)
    if wanted("unet"):
        with _stage(work, "unet") as folder:

            def save(pipeline: StableDiffusionPipeline) -> None:
                pipeline.save_pretrained(folder)
                # transformers would load in the weights' dtype, unlike the other parts.
                path = folder / "text_encoder" / "config.json"
                config = json.loads(path.read_text()) | {"dtype": "float32"}
                path.write_text(json.dumps(config, indent=2) + "\n")
                write_for_transformers_4(work / "tokenizer", folder)
                replace_folder(folder, out)

            drawn, specs = drawn_images(images, settings.seed, work, processes)
            loss = train_unet(
                drawn,
                specs,
                CLIPTokenizer.from_pretrained(work / "tokenizer"),
                AutoencoderKL.from_pretrained(work / "vae"),
                CLIPTextModel.from_pretrained(work / "text"),
                save,
                part("unet"),
            )
        print(f"u-net: loss {loss:.4f}", flush=True)
    elif (work / "unet").exists():
        replace_folder(work / "unet", out)


def write_for_transformers_4(tokenizer: Path, folder: Path) -> None:
    """Add the tokenizer's files and the names of weights that transformers 4 reads, and 5 too."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, folder / "tokenizer" / name)
    path = folder / "text_encoder" / "model.safetensors"
    prefix = "text_model."
    weights = {prefix + name.removeprefix(prefix): w for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def replace_folder(source: Path, target: Path) -> None:
    """Replace a folder by a copy of another; it is whole at any time."""
    copy = target.with_name(f".{target.name}-{os.getpid()}")
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    shutil.rmtree(copy, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # copyfile leaves the modes out, because weights are saved for their owner alone.
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    if target.exists():
        os.replace(target, old)
    os.replace(copy, target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _stage(work: Path, stage: str) -> Iterator[Path]:
    """Give an empty folder that becomes the stage's folder at the end."""
    folder = work / f"{stage}.part"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    os.replace(folder, work / stage)
