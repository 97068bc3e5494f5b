"""The contenders of step_bench on one architecture: checked against each other, then measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from _measure import Effort, Timing, interleaved, interleaved_cuda
from _plain_steps import PlainStep, TextualInversionStep
from _record import MOST_SPREAD, Target
from _run import reason
from _sefi_steps import SefiStep
from _step_models import Architecture, random_pipeline
from _step_parts import StepMemory, memory_of, profile_step
from PIL import Image
from torch import Tensor

from sefi_fast.training import TrainConfig, prepare

SEFI, PLAIN, INVERSION, NO_LOSS = "sefi", "plain-maps", "textual-inversion", "sefi-no-loss"

_CHECKED_STEPS = 3
# Largest relative differences of the noise loss and of the subject loss between (a) and (b). The
# first updates of AdamW are signs, which rounding turns where a gradient is nearly zero.
_TOLERANCES = {
    torch.float32: (1e-3, 0.05),
    torch.bfloat16: (0.05, 0.5),
    torch.float16: (0.05, 0.5),
}


class StepContender(NamedTuple):
    """One way to train a step: its letter in the tables, and what is and what is not in it."""

    name: str
    letter: str
    what: str
    with_loss: bool
    make: Callable[[Any, TrainConfig, Tensor, torch.dtype], Any]


CONTENDERS = (
    StepContender(
        SEFI, "a", "sefi_fast with the subject-wise attention loss", True, SefiStep
    ),
    StepContender(
        PLAIN, "b", "the same method on diffusers' parts, cross-attention maps in memory", True,
        PlainStep,
    ),
    StepContender(
        INVERSION, "c",
        "Textual Inversion as in diffusers' examples: image and prompt encoded each step, whole "
        "token tables in AdamW", False, TextualInversionStep,
    ),
    StepContender(NO_LOSS, "d", "sefi_fast without the loss", False, SefiStep),
)  # fmt: skip


@dataclass
class StepEntry:
    """What was found of one contender."""

    contender: StepContender
    numbers: list[tuple[float, float]] = field(default_factory=list)
    """(noise loss, subject loss) of the first steps."""
    problem: str | None = None
    timing: Timing | None = None
    parts: dict[str, float] = field(default_factory=dict)
    memory: StepMemory | None = None


@dataclass
class StepRecord:
    """All contenders on one architecture, batch and dtype of one device."""

    built: Architecture
    batch: int
    dtype: str
    device_type: str
    entries: list[StepEntry]

    def entry(self, name: str) -> StepEntry:
        return next(entry for entry in self.entries if entry.contender.name == name)

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a contender."""
        found = []
        for entry in self.entries:
            row: dict[str, Any] = {
                "model": self.built.name,
                "note": self.built.note,
                "latent": self.built.latent,
                "widths": "x".join(map(str, self.built.widths)),
                "batch": self.batch,
                "dtype": self.dtype,
                "contender": entry.contender.name,
                "what": entry.contender.what,
                "with_loss": entry.contender.with_loss,
                "verdict": entry.problem or "right",
            }
            if entry.timing is not None:
                row |= {
                    "seconds": entry.timing.median,
                    "fastest_seconds": entry.timing.fastest,
                    "spread": entry.timing.spread,
                    "rounds": entry.timing.rounds,
                }
            row |= {f"seconds_{part}": seconds for part, seconds in entry.parts.items()}
            if entry.memory is not None:
                row |= {"held_bytes": entry.memory.held, "peak_bytes": entry.memory.peak}
            found.append(row)
        return found

    def targets(self) -> list[Target]:
        """Speed against the plain method and Textual Inversion, memory against the latter.

        No speeds where times scatter too widely.
        """
        ours, plain, inversion = map(self.entry, (SEFI, PLAIN, INVERSION))
        if ours.timing is None:
            return []
        noisy = any(e.timing is not None and e.timing.spread > MOST_SPREAD for e in self.entries)
        found: list[tuple[str, float, float]] = []
        for what, other, wanted in (
            ("times the plain method's speed", plain, 3.0 if self.device_type == "cuda" else 1.0),
            ("times Textual Inversion's speed", inversion, 1.0),
        ):
            if other.timing is not None and not noisy:
                found.append((what, other.timing.median / ours.timing.median, wanted))
        if inversion.memory is not None and ours.memory is not None:
            less = inversion.memory.peak / ours.memory.peak
            found.append(("times less peak memory than Textual Inversion", less, 1.0))
        return [(f"{self.built.name} b{self.batch}", *one) for one in found]


def picture(size: int) -> Tensor:
    """An image [3, size, size] in [-1, 1] that every contender learns."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return prepare(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC), size)


def config_of(
    contender: StepContender, batch: int, dtype: torch.dtype, capture: str = "auto"
) -> TrainConfig:
    """The library's defaults at a constant rate, with or without the loss."""
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    loss = {} if contender.with_loss else {"weight_lambda": 0.0}
    return TrainConfig(
        batch_size=batch, schedule="constant", precision=precision, capture=capture, **loss
    )


def measure_steps(
    built: Architecture,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    tick: Callable[[str], None] = lambda _: None,
    contenders: tuple[StepContender, ...] = CONTENDERS,
) -> StepRecord:
    """Check, time in turns, take apart, then measure memory with each contender alone.

    One that fails or disagrees gets no figures. `tick` is told of each thing begun.
    """
    pixels = picture(8 * built.latent)
    record = StepRecord(
        built,
        batch,
        str(dtype).removeprefix("torch."),
        device.type,
        list(map(StepEntry, contenders)),
    )

    def build(contender: StepContender, capture: str = "auto") -> tuple[Any, Any]:
        pipe = random_pipeline(built, device, dtype)
        config = config_of(contender, batch, dtype, capture)
        return contender.make(pipe, config, pixels, dtype), pipe

    ready: dict[str, tuple[Any, Any]] = {}
    for entry in record.entries:
        name = entry.contender.name
        tick(f"{name}: check")
        try:
            ready[name] = build(entry.contender)
            entry.numbers = [ready[name][0]() for _ in range(_CHECKED_STEPS)]
        except Exception as error:  # noqa: BLE001 - whatever a library raises is why it has no figure
            entry.problem = f"not run: {reason(error)}"
            ready.pop(name, None)
    _judge(record, dtype)
    sound = [entry for entry in record.entries if entry.problem is None]
    calls = {entry.contender.name: ready[entry.contender.name][0] for entry in sound}
    tick("in turns")
    timings = (interleaved_cuda if device.type == "cuda" else interleaved)(calls, effort)
    for entry in sound:
        entry.timing = timings[entry.contender.name]
        tick(f"{entry.contender.name}: parts")
        step, pipe = ready.pop(entry.contender.name)
        if device.type == "cuda" and isinstance(step, SefiStep):
            step, pipe = build(entry.contender, capture="never")
            step()
        entry.parts = profile_step(step, pipe, device, repeats=max(2, effort.rounds // 2))
        del step, pipe
    calls.clear()
    for entry in sound:
        tick(f"{entry.contender.name}: memory")
        entry.memory = memory_of(lambda contender=entry.contender: build(contender)[0], device)
    return record


def _judge(record: StepRecord, dtype: torch.dtype) -> None:
    """Every number finite; (a) and (b) agree, and (d) begins with (a)'s noise loss."""
    for entry in record.entries:
        if entry.problem is None and not all(
            math.isfinite(noise) and math.isfinite(subject_loss)
            for noise, subject_loss in entry.numbers
        ):
            entry.problem = f"wrong: its losses are {entry.numbers}"
    numbers = {
        entry.contender.name: entry.numbers for entry in record.entries if entry.problem is None
    }
    if SEFI not in numbers or PLAIN not in numbers:
        return
    noise_off, subject_loss_off = _TOLERANCES[dtype]
    for ours, plain in zip(numbers[SEFI], numbers[PLAIN], strict=True):
        close = math.isclose(ours[0], plain[0], rel_tol=noise_off) and math.isclose(
            ours[1], plain[1], rel_tol=subject_loss_off, abs_tol=1e-6
        )
        if not close:
            record.entry(
                SEFI
            ).problem = f"wrong: noise loss and subject loss {ours}, the plain step has {plain}"
    if NO_LOSS in numbers and not math.isclose(
        numbers[NO_LOSS][0][0], numbers[PLAIN][0][0], rel_tol=noise_off
    ):
        record.entry(NO_LOSS).problem = "wrong: its noise loss is not the plain step's"
