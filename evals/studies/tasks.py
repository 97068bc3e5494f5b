"""One piece of a study: train some identities with one variant's settings, generate, score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from evals.studies.overfit import attention_overfit
from evals.studies.prompts import StudyPrompt, StudySubject, study_subjects
from evals.studies.variants import SPELLED_OUT, Variant
from sefi_fast.errors import TrainingError
from sefi_fast.evaluation import score_image
from sefi_fast.evaluation.sheets import png
from sefi_fast.pipelines import attach, detach, load_pipeline
from sefi_fast.subject import Subject
from sefi_fast.subject.subject import summarise
from sefi_fast.tiny_world import CLASS_WORD, SAMPLING, bundled_model_path
from sefi_fast.tiny_world.drawing import draw
from sefi_fast.tiny_world.judge import JUDGE_PATH, Judge
from sefi_fast.training import ManyResult, TrainConfig, train_many
from sefi_fast.training.image import load_image, prepare
from sefi_fast.training.latents import load_mask
from sefi_fast.training.summary import FILE as SUMMARY_FILE
from sefi_fast.utils.files import atomic_write, read_regular
from sefi_fast.utils.strict_json import parse_json

PLACEHOLDER = "<it>"
IMAGE_SIZE = 192
"""Side in pixels of the images that subjects are trained on."""
_BATCH = 16
_RESULT_LIMIT = 64 * 2**20


@dataclass(frozen=True)
class Protocol:
    """The way that subjects are scored. Results of another protocol are made again.

    Attributes:
        prompts: prompts per identity.
        seeds: images per prompt.
        sampling_steps, guidance: settings of the sampler.
        precision: precision of the images' generation, "fp32" or "bf16".
        seed: seed of the identities, their images and prompts.
        model: checksum of the bundled model and the judge.
    """

    prompts: int
    seeds: int
    sampling_steps: int
    guidance: float
    precision: str
    seed: int
    model: str

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        *,
        prompts: int,
        seeds: int,
        seed: int,
        sampling_steps: int | None = None,
    ) -> Protocol:
        """Return the protocol for these settings, with the bundled model's sampling as default.

        With precision="bf16" images are generated in it too.
        """
        digest = hashlib.sha256()
        for path in (*sorted(bundled_model_path().rglob("*.safetensors")), JUDGE_PATH):
            digest.update(path.read_bytes())
        return cls(
            prompts=prompts,
            seeds=seeds,
            sampling_steps=SAMPLING["steps"] if sampling_steps is None else sampling_steps,
            guidance=SAMPLING["guidance"],
            precision="bf16" if config.precision == "bf16" else "fp32",
            seed=seed,
            model=digest.hexdigest()[:8],
        )

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the images' generation."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def subjects(self, count: int) -> list[StudySubject]:
        """Return the first `count` identities with their images and prompts."""
        return study_subjects(count, self.prompts, self.seed)


@dataclass(frozen=True)
class Task:
    """Some identities of one variant.

    Attributes:
        folder: folder of the study.
        variant: the settings.
        numbers: numbers of the identities.
        protocol: the way they are scored.
    """

    folder: Path
    variant: Variant
    numbers: tuple[int, ...]
    protocol: Protocol

    def result(self, number: int) -> Path:
        """Return the file with the scores of an identity."""
        return self._file("results", number, "json")

    def subject(self, number: int) -> Path:
        """Return the file with the trained subject."""
        return self._file("subjects", number, "safetensors")

    def strip(self, number: int) -> Path:
        """Return the file with the first image of each prompt in a row."""
        return self._file("images", number, "png")

    def name(self, number: int) -> str:
        """Return the name of an identity's files."""
        return f"{self.protocol.model}-s{self.protocol.seed}-{number:02d}"

    def is_done(self, number: int) -> bool:
        """Whether an identity has scores of this protocol."""
        return self.load(number) is not None

    def load(self, number: int) -> dict[str, Any] | None:
        """Return an identity's scores; None if there are none of this protocol."""
        try:
            found = parse_json(read_regular(self.result(number), _RESULT_LIMIT))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("protocol") != asdict(self.protocol):
            return None
        return found

    def _file(self, kind: str, number: int, suffix: str) -> Path:
        return self.folder / kind / self.variant.key / f"{self.name(number)}.{suffix}"


def images_of(strip: Path) -> list[Image.Image]:
    """Return the square images of a file of `Task.strip`."""
    row = load_image(strip)
    side = row.height
    return [row.crop((left, 0, left + side, side)) for left in range(0, row.width, side)]


class Worker:
    """Does tasks with one model and one judge."""

    @cache  # noqa: B019 - a worker lives as long as its process
    def _pipe(self, dtype: torch.dtype) -> Any:
        pipe = load_pipeline(None, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def _judge(self) -> Judge:
        return Judge.load()

    def __call__(self, task: Task) -> dict[int, str]:
        """Do the unfinished part of a task. Return identities whose training failed → the error."""
        unfinished = [number for number in task.numbers if not task.is_done(number)]
        if not unfinished:
            return {}
        subjects = [task.protocol.subjects(number + 1)[-1] for number in unfinished]
        trained: list[ManyResult | None] = [None] * len(subjects)
        if task.variant.config is not None:
            trained[:] = train(task, subjects)
        failures = {}
        for one, result in zip(subjects, trained, strict=True):
            if result is not None and result.error is not None:
                failures[one.number] = f"{task.variant.name}, {result.name}: {result.error}"
            else:
                self._score(task, one, None if result is None else result.subject)
        return failures

    def _score(self, task: Task, one: StudySubject, subject: Subject | None) -> None:
        """Generate, score and write the file of one identity."""
        pipe, protocol = self._pipe(task.protocol.dtype), task.protocol
        if subject is not None:
            attach(pipe, subject)
        try:
            images = _generate(pipe, _texts(task, one, one.prompts), protocol)
            open_images = _generate(pipe, _texts(task, one, one.open_prompts), protocol)
            overfit = subject and _overfit(pipe, subject, one)
        finally:
            detach(pipe)
        atomic_write(task.strip(one.number), png(_strip(images[:: protocol.seeds])))
        found = {
            "variant": task.variant.name,
            "protocol": asdict(protocol),
            "subject": one.number,
            "image": asdict(one.image),
            # A subject that an earlier run trained has the summary in its file.
            "training": subject and dict(summarise(subject.history) or subject.summary or {}),
            "images": self._rows(images, one.prompts, one, protocol.seeds),
            "open": self._rows(open_images, one.open_prompts, one, protocol.seeds),
            "overfit": overfit,
        }
        text = json.dumps(found, indent=1, ensure_ascii=False)
        atomic_write(task.result(one.number), text.encode())

    def _rows(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[StudyPrompt],
        one: StudySubject,
        seeds: int,
    ) -> list[dict[str, Any]]:
        rows = []
        repeated = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
        for judgement, (prompt, seed) in zip(self._judge(images), repeated, strict=True):
            score = score_image(judgement, prompt, one.identity, one.image.scene)._asdict()
            rounded = {name: round(value, 4) for name, value in score.items()}
            rows.append({"kind": prompt.kind, "text": prompt.text, "seed": seed, **rounded})
        return rows


def train(task: Task, subjects: Sequence[StudySubject]) -> list[ManyResult]:
    """Train identities by the settings of a task's variant, unless the folder holds them."""
    variant, config = task.variant, task.variant.config
    assert config is not None
    entries = []
    for one in subjects:
        image, mask = draw(one.image, IMAGE_SIZE)
        scene = [one.scene] * variant.scene_named + [one.place] * variant.place_named
        entries.append(
            {
                "image": image,
                "name": task.name(one.number),
                "placeholder": PLACEHOLDER,
                "scene": " ".join(scene) or None,
                "seed": config.seed + one.number,
                "mask": mask if config.attention_loss == "mask" else None,
            }
        )
    folder = task.subject(0).parent
    try:
        results = train_many(
            entries, output=folder, batch_subjects=len(entries), config=config, progress=False
        )
    finally:
        # Several tasks share the folder, and each would leave its own rows only.
        (folder / SUMMARY_FILE).unlink(missing_ok=True)
    if len(results) != len(entries):
        raise TrainingError("A study cannot run under torchrun or accelerate. Give it workers.")
    return results


def _texts(task: Task, one: StudySubject, prompts: Sequence[StudyPrompt]) -> list[str]:
    """Return the prompts with the subject, or with the control in its place."""
    if task.variant.name == SPELLED_OUT:
        return [prompt.spelled_out(one.identity) for prompt in prompts]
    word = CLASS_WORD if task.variant.config is None else PLACEHOLDER
    return [prompt.text.format(word) for prompt in prompts]


@torch.inference_mode()
def _generate(pipe: Any, texts: Sequence[str], protocol: Protocol) -> list[Image.Image]:
    """Return all seeds of the first prompt, then of the next; noise by prompt and seed alone."""
    wanted = [
        (text, 1000 * place + seed)
        for place, text in enumerate(texts)
        for seed in range(protocol.seeds)
    ]
    images: list[Image.Image] = []
    for start in range(0, len(wanted), _BATCH):
        part = wanted[start : start + _BATCH]
        images += pipe(
            [text for text, _ in part],
            num_inference_steps=protocol.sampling_steps,
            guidance_scale=protocol.guidance,
            generator=[torch.Generator().manual_seed(seed) for _, seed in part],
        ).images
    return images


def _overfit(pipe: Any, subject: Subject, one: StudySubject) -> dict[str, float]:
    image, mask = draw(one.image, IMAGE_SIZE)
    size = pipe.unet.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    pixels, shown = prepare(image, size), load_mask(mask, image, size)
    found = attention_overfit(pipe, subject, pixels, shown, f"a photo of a {{}} {one.scene}")
    return {name: round(value, 4) for name, value in found._asdict().items()}


def _strip(images: Sequence[Image.Image]) -> Image.Image:
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for place, image in enumerate(images):
        strip.paste(image, (place * width, 0))
    return strip
