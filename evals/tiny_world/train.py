"""The command that makes the bundled model: draws, trains every stage, writes the pipeline."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from evals.tiny_world.pictures import drawn_images
from evals.tiny_world.text_encoder import pretrain_text_encoder
from evals.tiny_world.tokenizer import train_tokenizer
from evals.tiny_world.unet import train_unet
from evals.tiny_world.vae import train_vae

STAGES = ("tokenizer", "vae", "text", "unet")
_SHARES = {"vae": 0.12, "text": 0.025, "unet": 0.855}


def make_model(
    out: Path,
    *,
    work: Path | None = None,
    minutes: float = 30.0,
    threads: int = 2,
    seed: int = 0,
    device: str = "cpu",
    pictures: int = 26_000,
    stages: Sequence[str] = STAGES,
    max_steps: int | None = None,
    progress: bool = True,
) -> Path:
    """Train the model and write it as a StableDiffusionPipeline folder in float16.

    A stage whose result lies in the work folder is skipped, so a run that was stopped goes on.

    Args:
        out: folder of the pipeline; replaced when the last stage is done, and before that with
            what has been reached, every four minutes.
        work: folder for what the stages leave; default: "<out>.work".
        minutes: training time of all stages together.
        threads: CPU threads of PyTorch, and processes that draw.
        seed: of the pictures, the weights and every draw. The budget is in time, so two runs
            differ in the number of steps they make.
        device: "cpu" or "cuda".
        pictures: how many are drawn.
        stages: those to run now, of STAGES.
        max_steps: of each training loop; for trials of the code.
        progress: show progress bars.

    Returns:
        ``out``.
    """
    torch.set_num_threads(threads)
    work = work or out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    place = torch.device(device)
    common: dict[str, Any] = {
        "seed": seed,
        "device": place,
        "max_steps": max_steps,
        "progress": progress,
    }
    budget = {stage: share * minutes * 60 for stage, share in _SHARES.items()}

    def wanted(stage: str) -> bool:
        return stage in stages and not (work / stage).exists()

    if wanted("tokenizer"):
        train_tokenizer(_part(work, "tokenizer"))
        _done(work, "tokenizer")
    if wanted("vae"):
        drawn, _ = drawn_images(pictures, seed, work, threads)
        quality = train_vae(drawn, _part(work, "vae"), seconds=budget["vae"], **common)
        print(f"vae: {quality:.1f} dB on pictures kept apart", flush=True)
        _done(work, "vae")
    if wanted("text"):
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        accuracy = pretrain_text_encoder(
            tokenizer, _part(work, "text"), seconds=budget["text"], **common
        )
        print(f"text encoder: {accuracy:.3f} of the attributes told apart", flush=True)
        _done(work, "text")
    if wanted("unet"):
        folder = _part(work, "unet")

        def save(pipeline: StableDiffusionPipeline) -> None:
            pipeline.save_pretrained(folder)
            _load_in_float32(folder)
            replace_folder(folder, out)

        drawn, specs = drawn_images(pictures, seed, work, threads)
        loss = train_unet(
            drawn,
            specs,
            CLIPTokenizer.from_pretrained(work / "tokenizer"),
            AutoencoderKL.from_pretrained(work / "vae"),
            CLIPTextModel.from_pretrained(work / "text"),
            save,
            seconds=budget["unet"],
            **common,
        )
        print(f"u-net: loss {loss:.4f}", flush=True)
        _done(work, "unet")
    elif (work / "unet").exists():
        replace_folder(work / "unet", out)
    return out


def _load_in_float32(folder: Path) -> None:
    """Let the text encoder load in float32 unasked, as diffusers loads the other parts.

    transformers writes the dtype of the weights down and loads in it again.
    """
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def replace_folder(source: Path, target: Path) -> None:
    """Put a copy of a folder in another's place; there is never half a folder."""
    beside = target.with_name(f".{target.name}-{os.getpid()}")
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # copyfile leaves the modes out: weights are saved for their owner alone.
    shutil.copytree(source, beside, copy_function=shutil.copyfile)
    if target.exists():
        os.replace(target, old)
    os.replace(beside, target)
    shutil.rmtree(old, ignore_errors=True)


def _part(work: Path, stage: str) -> Path:
    """An empty folder for a stage that is under way."""
    folder = work / f"{stage}.part"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _done(work: Path, stage: str) -> None:
    os.replace(work / f"{stage}.part", work / stage)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m evals.tiny_world``."""
    parser = argparse.ArgumentParser(prog="python -m evals.tiny_world", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--work", type=Path, help="folder of the stages (default: OUT.work)")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time (default: 30)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--pictures", type=int, default=26_000, help="drawn (default: 26000)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.threads < 1 or options.pictures < 128:
        parser.error("--minutes must be above 0, --threads at least 1, --pictures at least 128")
    started = time.perf_counter()
    make_model(**vars(options))
    print(f"{options.out}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
