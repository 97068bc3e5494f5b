"""One piece of a study: train some identities with one variant's settings, draw, and score."""

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
from sefi_fast.evaluation.scorers import score_image
from sefi_fast.evaluation.sheets import png
from sefi_fast.pipelines import attach, detach, load_pipeline
from sefi_fast.subject import Subject
from sefi_fast.subject.subject import summarise
from sefi_fast.tiny_world import CLASS_WORD, SAMPLING, bundled_model_path
from sefi_fast.tiny_world.drawing import draw
from sefi_fast.tiny_world.judge import JUDGE_PATH, Judge
from sefi_fast.training import ManyResult, TrainConfig, train_many
from sefi_fast.training.image import prepare
from sefi_fast.training.latents import load_mask
from sefi_fast.training.summary import FILE as SUMMARY_FILE
from sefi_fast.utils.files import atomic_write, read_regular
from sefi_fast.utils.strict_json import parse_json

PLACEHOLDER = "<it>"
IMAGE_SIZE = 192
"""Side in pixels of the images that subjects are learnt from."""
_BATCH = 16
_RESULT_LIMIT = 64 * 2**20
_PARTS = {"pictures", "overfit", "open", "training"}


@dataclass(frozen=True)
class Protocol:
    """How subjects are tried; results of another protocol are made anew.

    Attributes:
        prompts: for each identity.
        seeds: images of each prompt.
        sampling_steps, guidance: of the sampler.
        precision: that images are drawn in, "fp32" or "bf16".
        seed: of the identities, their images and prompts.
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
        """How subjects trained with these settings are tried; sampling as suits the bundled model.

        With precision="bf16" images are drawn in it too.
        """
        steps = SAMPLING["steps"] if sampling_steps is None else sampling_steps
        precision = "bf16" if config.precision == "bf16" else "fp32"
        guidance = SAMPLING["guidance"]
        return cls(prompts, seeds, steps, guidance, precision, seed, model_checksum())

    @property
    def dtype(self) -> torch.dtype:
        """That images are drawn in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def subjects(self, count: int) -> list[StudySubject]:
        """The first `count` identities with their images and prompts."""
        return study_subjects(count, self.prompts, self.seed)


@dataclass(frozen=True)
class Task:
    """Some identities of one variant.

    Attributes:
        folder: of the study.
        variant: the settings.
        numbers: of the identities.
        protocol: how they are tried.
    """

    folder: Path
    variant: Variant
    numbers: tuple[int, ...]
    protocol: Protocol

    def result(self, number: int) -> Path:
        """File with the scores of an identity."""
        return self._file("results", number, "json")

    def subject(self, number: int) -> Path:
        """File with the learnt subject."""
        return self._file("subjects", number, "safetensors")

    def pictures(self, number: int) -> Path:
        """File with the first image of each prompt, side by side."""
        return self._file("pictures", number, "png")

    def name(self, number: int) -> str:
        """Of an identity's files."""
        return f"{self.protocol.model}-s{self.protocol.seed}-{number:02d}"

    def is_done(self, number: int) -> bool:
        """Whether an identity has all scores by this very protocol."""
        found = self.load(number)
        return found is not None and found.keys() >= _PARTS

    def load(self, number: int) -> dict[str, Any] | None:
        """An identity's scores; None if there are none by this protocol."""
        try:
            found = parse_json(read_regular(self.result(number), _RESULT_LIMIT))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("protocol") != asdict(self.protocol):
            return None
        return found

    def _file(self, kind: str, number: int, suffix: str) -> Path:
        return self.folder / kind / self.variant.key / f"{self.name(number)}.{suffix}"


def model_checksum() -> str:
    """Eight hexadecimal digits that change with the bundled model or the judge."""
    digest = hashlib.sha256()
    for path in (*sorted(bundled_model_path().rglob("*.safetensors")), JUDGE_PATH):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class Worker:
    """Does tasks; the model and the judge are loaded once."""

    @cache  # noqa: B019 - a worker lives as long as its process
    def _pipe(self, dtype: torch.dtype) -> Any:
        pipe = load_pipeline(None, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def _judge(self) -> Judge:
        return Judge.load()

    def __call__(self, task: Task) -> dict[int, str]:
        """Do what of a task is not done yet.

        Returns:
            For identities that could not be learnt, why.
        """
        open_ones = [number for number in task.numbers if not task.is_done(number)]
        if not open_ones:
            return {}
        chosen = {one.number: one for one in task.protocol.subjects(max(open_ones) + 1)}
        subjects = [chosen[number] for number in open_ones]
        trained: dict[int, ManyResult | None] = dict.fromkeys(open_ones)
        if task.variant.config is not None:
            trained.update(zip(open_ones, train(task, subjects), strict=True))
        failures = {}
        for one in subjects:
            result = trained[one.number]
            if result is not None and result.error is not None:
                failures[one.number] = f"{task.variant.name}, {result.name}: {result.error}"
                continue
            self._try(task, one, None if result is None else result.subject)
        return failures

    def _try(self, task: Task, one: StudySubject, subject: Subject | None) -> None:
        """Draw, score and write the file of one identity; parts that are there stay."""
        pipe, protocol = self._pipe(task.protocol.dtype), task.protocol
        found = task.load(one.number) or {
            "variant": task.variant.name,
            "protocol": asdict(protocol),
            "subject": one.number,
            "picture": asdict(one.picture),
            "training": None if subject is None else _training(subject),
        }
        if subject is not None:
            attach(pipe, subject)
        try:
            if "pictures" not in found:
                images = _draw(pipe, self._texts(task, one, one.prompts), protocol)
                found["pictures"] = self._scores(images, one.prompts, one, protocol.seeds)
                atomic_write(task.pictures(one.number), png(_strip(images[:: protocol.seeds])))
            if "overfit" not in found:
                found["overfit"] = None if subject is None else _overfit(pipe, subject, one)
            if "open" not in found:
                images = _draw(pipe, self._texts(task, one, one.open_prompts), protocol)
                found["open"] = self._scores(images, one.open_prompts, one, protocol.seeds)
        finally:
            detach(pipe)
        text = json.dumps(found, indent=1, ensure_ascii=False)
        atomic_write(task.result(one.number), text.encode())

    def _texts(self, task: Task, one: StudySubject, prompts: Sequence[StudyPrompt]) -> list[str]:
        """The prompts with the subject, or what the control has in its place."""
        if task.variant.name == SPELLED_OUT:
            return [prompt.spelled_out(one.identity) for prompt in prompts]
        word = CLASS_WORD if task.variant.config is None else PLACEHOLDER
        return [prompt.text.format(word) for prompt in prompts]

    def _scores(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[StudyPrompt],
        one: StudySubject,
        seeds: int,
    ) -> list[dict[str, Any]]:
        rows = []
        repeated = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
        for judgement, (prompt, seed) in zip(self._judge(images), repeated, strict=True):
            score = score_image(judgement, prompt, one.identity, one.picture.scene)
            rounded = {name: round(value, 4) for name, value in score.as_dict().items()}
            rows.append({"kind": prompt.kind, "text": prompt.text, "seed": seed, **rounded})
        return rows


def train(task: Task, subjects: Sequence[StudySubject]) -> list[ManyResult]:
    """Learn identities by the settings of a task's variant; what its folder holds is not redone."""
    config = task.variant.config
    assert config is not None
    entries = []
    for one in subjects:
        picture, mask = draw(one.picture, IMAGE_SIZE)
        entries.append(
            {
                "image": picture,
                "name": task.name(one.number),
                "placeholder": PLACEHOLDER,
                "scene": _scene(one, task.variant),
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
        raise TrainingError("a study cannot run under torchrun or accelerate: give it workers=")
    return results


def _scene(one: StudySubject, variant: Variant) -> str | None:
    """What the training sentence says behind the subject."""
    named = [one.scene] if variant.scene_named else []
    return " ".join([*named, one.place] if variant.place_named else named) or None


@torch.inference_mode()
def _draw(pipe: Any, texts: Sequence[str], protocol: Protocol) -> list[Image.Image]:
    """All seeds of the first prompt, then of the next one; noise by prompt and seed alone."""
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
    picture, mask = draw(one.picture, IMAGE_SIZE)
    size = pipe.unet.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    pixels, shown = prepare(picture, size), load_mask(mask, picture, size)
    found = attention_overfit(pipe, subject, pixels, shown, f"a photo of a {{}} {one.scene}")
    return {name: round(value, 4) for name, value in found.as_dict().items()}


def _training(subject: Subject) -> dict[str, Any]:
    """What the run was like; a subject that an earlier run had learnt has it in its file."""
    return dict(summarise(subject.history) or subject.summary or {})


def _strip(images: Sequence[Image.Image]) -> Image.Image:
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for place, image in enumerate(images):
        strip.paste(image, (place * width, 0))
    return strip
