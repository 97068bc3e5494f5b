"""Watch a training run: history, progress bar, trackers and validation images."""

from __future__ import annotations

import copy
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sefi_fast.errors import TrainingError, printable
from sefi_fast.pipelines import attach, detach, generate
from sefi_fast.prompts.text_encoder import is_sdxl
from sefi_fast.subject import Subject
from sefi_fast.training.base_model import BaseModel, autocast, temporarily_frozen
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.image import decode

logger = logging.getLogger(__name__)

_THUMBNAIL = 24
_RECENT = 20
_LONGEST_TITLE = 40


@dataclass(eq=False)
class History:
    """Numbers of every finished step, and the validation images of a run.

    Attributes:
        loss: noise loss (the first term of equation 6) of each step.
        subject_loss: attention loss of each step, before λ; 0 in runs with λ = 0, which skip it.
        seconds: time since training began, at the end of each step; a resumed run goes on from
            the time of its checkpoint.
        validation: (steps done, one image for each validation prompt).
        skipped: numbers of the steps, counted from 0, that were skipped because the loss or a
            gradient was not finite.

    Example:
        >>> history = sefi_fast.train("me.jpg", validation_prompts=["a {} in the snow"]).history
        >>> print(len(history.loss), history.loss[-1], history.seconds[-1])
        >>> for step, images in history.validation:
        ...     images[0].save(f"step-{step}.png")
    """

    loss: list[float] = field(default_factory=list)
    subject_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, list[Image.Image]]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    def record(self, loss: float, subject_loss: float, seconds: float) -> None:
        """Append one finished step."""
        self.loss.append(loss)
        self.subject_loss.append(subject_loss)
        self.seconds.append(seconds)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything as tensors: float64 and int64 [steps], images as the bytes of a PNG."""
        state = {
            name: torch.tensor(getattr(self, name), dtype=torch.float64)
            for name in ("loss", "subject_loss", "seconds")
        }
        state["skipped"] = torch.tensor(self.skipped, dtype=torch.int64)
        for step, images in self.validation:
            for number, image in enumerate(images):
                png = io.BytesIO()
                image.save(png, format="PNG")
                content = torch.frombuffer(bytearray(png.getvalue()), dtype=torch.uint8)
                state[f"validation.{step:09d}.{number:04d}"] = content
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> History:
        """Return the history of a `state_dict`, or raise ValueError for what is not one."""
        for name in ("loss", "subject_loss", "seconds", "skipped"):
            dtype = torch.int64 if name == "skipped" else torch.float64
            own = state.get(name)
            if own is None or own.dtype != dtype or own.dim() != 1:
                raise ValueError(f"its history has no {name}, a row of {dtype}")
        rows = [state[name] for name in ("loss", "subject_loss", "seconds")]
        if len(set(map(len, rows))) != 1 or not bool(torch.stack(rows).isfinite().all()):
            raise ValueError(
                "its history does not hold one finite number of each kind for each step"
            )
        validation: dict[int, list[Image.Image]] = {}
        for name in sorted(name for name in state if name.startswith("validation.")):
            step = re.fullmatch(r"validation\.([0-9]{1,12})\.[0-9]+", name)
            if step is None or state[name].dtype != torch.uint8 or state[name].dim() != 1:
                raise ValueError(f"its history holds {name}, which is not a validation image")
            png = io.BytesIO(state[name].numpy().tobytes())
            image = decode(png, "a validation image of the checkpoint")
            validation.setdefault(int(step[1]), []).append(image)
        loss, subject_loss, seconds = (row.tolist() for row in rows)
        images, skipped = list(validation.items()), state["skipped"].tolist()
        return cls(loss, subject_loss, seconds, images, skipped)


class Progress:
    """Progress bar on the error stream, with recent means of the losses."""

    def __init__(self, title: str, steps: int, done: int, shown: bool) -> None:
        name = printable(title, _LONGEST_TITLE)
        # Even a disabled bar takes a lock that forked processes share.
        self._bar = tqdm(total=steps, initial=done, unit="step", desc=name) if shown else None

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def step(self, histories: Sequence[History]) -> None:
        """Count one more step, and show means over the subjects and the last twenty steps."""
        if self._bar is None:
            return
        seen = [history for history in histories if history.loss]
        if seen:
            values: dict[str, str] = {}
            for name in ("loss", "subject_loss"):
                tails = [getattr(history, name)[-_RECENT:] for history in seen]
                mean = sum(sum(tail) / len(tail) for tail in tails) / len(tails)
                values[name] = f"{mean:.3g}"
            if len(seen) > 1:
                values["subjects"] = str(len(seen))
            self._bar.set_postfix(values, refresh=False)
        self._bar.update()

    def images(self, generated: Sequence[Image.Image]) -> None:
        """Show images above the bar, if the terminal has colors."""
        if self._bar is not None and generated and shows_colors(sys.stderr):
            self._bar.write(thumbnails(generated), file=sys.stderr)


def shows_colors(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that announces 24-bit colors."""
    return stream.isatty() and os.environ.get("COLORTERM") in ("truecolor", "24bit")


def thumbnails(images: Sequence[Image.Image], side: int = _THUMBNAIL) -> str:
    """Return a row of images as lines of half blocks in 24-bit colors, two pixels a character."""
    squares = [np.asarray(image.convert("RGB").resize((side, side))) for image in images]
    gap = np.zeros((side, 1, 3), dtype=np.uint8)
    row = np.concatenate([part for square in squares for part in (square, gap)][:-1], axis=1)
    lines = []
    for upper, lower in zip(row[0::2].tolist(), row[1::2].tolist(), strict=True):
        cells = [
            "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*top, *bottom)
            for top, bottom in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def check_trackers(names: Sequence[str]) -> None:
    """Check before a run that its trackers are installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(str(known) for known in LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"there is no tracker {name!r}; accelerate has {known}")
        if name not in available:
            raise TrainingError(
                f"the tracker {name!r} needs a package that is not installed: pip install {name}, "
                f"or leave {name!r} out of trackers"
            )


class Trackers:
    """The trackers of one run. One that fails is removed with a warning, and training goes on."""

    def __init__(
        self, names: Sequence[str], folder: Path, run_name: str, settings: Mapping[str, Any]
    ) -> None:
        self._trackers: dict[str, Any] = {}
        if not names:
            return
        from accelerate import PartialState

        # The trackers' own log messages ask for it.
        PartialState()
        shown = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in settings.items()
        }
        run_name = re.sub(r"[^\w.-]+", "_", run_name).strip("_") or "subject"
        for name in dict.fromkeys(names):
            try:
                self._trackers[name] = _started(name, folder, run_name, shown)
            except Exception as error:
                raise TrainingError(
                    f"the tracker {name!r} cannot start: {error}; leave it out of trackers or set "
                    "it up first"
                ) from error

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of the step."""
        self._each(lambda name, tracker: tracker.log(dict(values), step=step))

    def log_images(self, values: Mapping[str, Sequence[Image.Image]], step: int) -> None:
        """Log images of the step, where the tracker takes images."""

        def log(name: str, tracker: Any) -> None:
            if name == "tensorboard":
                arrays = {key: np.stack([*map(np.asarray, each)]) for key, each in values.items()}
                tracker.log_images(arrays, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({key: list(each) for key, each in values.items()}, step=step)

        self._each(log)

    def close(self) -> None:
        """Flush and end the trackers."""
        self._each(lambda name, tracker: tracker.finish())
        self._trackers = {}

    def _each(self, act: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(name, tracker)
            except Exception as error:
                logger.warning("the tracker %r fails and is removed: %s", name, error)
                del self._trackers[name]


def _started(name: str, folder: Path, run_name: str, settings: Mapping[str, Any]) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    make = LOGGER_TYPE_TO_CLASS[name]
    where = {"logging_dir": folder} if make.requires_logging_directory else {}
    if where:
        folder.mkdir(parents=True, exist_ok=True)
    tracker = make(run_name, **where)
    # Under `accelerate launch` each process has subjects of its own to log.
    tracker.main_process_only = False
    # In the oldest accelerate that is supported, making a tracker starts it.
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration(settings)
    return tracker


def validate(
    base: BaseModel, subject: Subject, config: TrainConfig, size: int
) -> list[Image.Image]:
    """Generate an image of one seed for each validation prompt; the pipeline stays as it is."""
    # A call changes its pipeline and scheduler, so a copy with the same models is called.
    pipe = copy.copy(base.pipe)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if is_sdxl(pipe) and pipe.vae.config.force_upcast:
        pipe.vae = _without_autocast(pipe.vae)
    parts = [x for x in base.pipe.components.values() if isinstance(x, torch.nn.Module)]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(temporarily_frozen(part, base.device, None))
        stack.enter_context(autocast(base.device, base.dtype))
        stack.callback(detach, pipe)
        attach(pipe, subject)
        with torch.no_grad():
            return [
                generate(
                    pipe,
                    sentence.replace("{}", subject.placeholder),
                    n=1,
                    seed=config.seed,
                    steps=config.validation_steps,
                    guidance=guidance_for(base, config),
                    height=size,
                    width=size,
                )[0]
                for sentence in config.validation_prompts
            ]


def guidance_for(base: BaseModel, config: TrainConfig) -> float:
    """Return the guidance of the settings, or the model's usual one."""
    if config.validation_guidance is not None:
        return config.validation_guidance
    from sefi_fast.tiny_world import SAMPLING, bundled_model_path

    if base.owned if base.model is None else Path(base.model) == bundled_model_path():
        return float(SAMPLING["guidance"])
    return 5.0 if is_sdxl(base.pipe) else 7.5


def _without_autocast(vae: Any) -> Any:
    """Return a VAE that decodes in its weights' own precision: SDXL's overflows in float16."""
    wrapped = copy.copy(vae)

    def decode(latents: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return vae.decode(latents.to(vae.dtype), *arguments, **keywords)

    wrapped.decode = decode
    return wrapped
