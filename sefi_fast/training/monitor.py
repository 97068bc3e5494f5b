"""Watch a training run: history, progress bar, trackers and validation images."""

from __future__ import annotations

import copy
import io
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sefi_fast.errors import TrainingError, printable
from sefi_fast.pipelines import attach, detach, generate
from sefi_fast.pipelines.support import is_sdxl
from sefi_fast.subject import Subject
from sefi_fast.training.base_model import Source, autocast, borrowed
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.image import decode

if TYPE_CHECKING:
    from PIL import Image


@dataclass(eq=False)
class History:
    """Numbers of every finished step, and the images drawn on the way.

    Attributes:
        loss: noise loss (the first term of equation 6) of each step.
        subject_loss: attention term of each step, before λ; 0 in runs with λ = 0, which skip it.
        seconds: time since training began, at the end of each step; a resumed run goes on from
            the time of its checkpoint.
        validation: (steps done, one image a validation prompt).
        skipped: numbers of the steps, counted from 0, that were left out because the loss or a
            gradient was not finite.
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
        """Everything as tensors: float64 and int64 [steps], images as the bytes of a PNG."""
        state = {
            name: torch.tensor(getattr(self, name), dtype=torch.float64)
            for name in ("loss", "subject_loss", "seconds")
        }
        state["skipped"] = torch.tensor(self.skipped, dtype=torch.int64)
        for step, pictures in self.validation:
            for number, picture in enumerate(pictures):
                state[f"validation.{step:09d}.{number:04d}"] = _png(picture)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> History:
        """Return the history that `state_dict` was taken of.

        Raises:
            ValueError: `state` is not one of `state_dict`, or a validation image is damaged.
        """
        for name in ("loss", "subject_loss", "seconds", "skipped"):
            dtype = torch.int64 if name == "skipped" else torch.float64
            own = state.get(name)
            if own is None or own.dtype != dtype or own.dim() != 1:
                raise ValueError(f"its history has no {name}, a row of {dtype}")
        loss, subject_loss, seconds = (state[name] for name in ("loss", "subject_loss", "seconds"))
        alike = len(loss) == len(subject_loss) == len(seconds)
        if not alike or not bool(torch.stack([loss, subject_loss, seconds]).isfinite().all()):
            raise ValueError("its history is not of finite numbers, one of each kind a step")
        drawn: dict[int, list[Image.Image]] = {}
        for name in sorted(name for name in state if name.startswith("validation.")):
            step = re.fullmatch(r"validation\.([0-9]{1,12})\.[0-9]+", name)
            if step is None or state[name].dtype != torch.uint8 or state[name].dim() != 1:
                raise ValueError(f"its history holds {name}, which is not a validation image")
            png = io.BytesIO(state[name].numpy().tobytes())
            image = decode(png, "a validation image of the checkpoint")
            drawn.setdefault(int(step[1]), []).append(image)
        return cls(
            loss.tolist(),
            subject_loss.tolist(),
            seconds.tolist(),
            validation=list(drawn.items()),
            skipped=state["skipped"].tolist(),
        )


def _png(picture: Image.Image) -> Tensor:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


_THUMBNAIL = 24
_RECENT = 20
_LONGEST_TITLE = 40


class Progress:
    """A bar with the loss and subject loss of late, and the seconds left; on the error stream.

    Args:
        title: what stands before the bar.
        steps: of the whole run.
        done: steps done before this process.
        shown: False for no output at all.
    """

    def __init__(self, title: str, steps: int, done: int, shown: bool) -> None:
        name = printable(title, _LONGEST_TITLE)
        # Even a disabled bar takes a lock that forked processes share.
        self._bar = tqdm(total=steps, initial=done, unit="step", desc=name) if shown else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, histories: Sequence[History]) -> None:
        """One more step, with means over the subjects and the last twenty steps."""
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

    def pictures(self, drawn: Sequence[Image.Image]) -> None:
        """Show images above the bar, if the terminal has colours."""
        if self._bar is not None and drawn and shows_colours(sys.stderr):
            self._bar.write(thumbnails(drawn), file=sys.stderr)


def shows_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal that says it has 24-bit colours."""
    return stream.isatty() and os.environ.get("COLORTERM") in ("truecolor", "24bit")


def thumbnails(pictures: Sequence[Image.Image], side: int = _THUMBNAIL) -> str:
    """Images side by side as lines of half blocks in 24-bit colours, two pixels a character."""
    squares = [np.asarray(picture.convert("RGB").resize((side, side))) for picture in pictures]
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


logger = logging.getLogger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """Find out before a run whether its trackers are there.

    Raises:
        ValueError: accelerate knows no tracker of that name.
        TrainingError: the tracker's package is not installed.
    """
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
    """The trackers of one run; one that fails is told of and left out, and training goes on.

    Args:
        names: of accelerate's trackers.
        folder: for those that write files.
        run_name: what the run is called there.
        settings: the run's settings.

    Raises:
        TrainingError: a tracker cannot start.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, run_name: str, settings: Mapping[str, Any]
    ) -> None:
        self._trackers: dict[str, Any] = {}
        if not names:
            return
        check_trackers(names)
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
                arrays = {key: np.stack([*map(np.asarray, drawn)]) for key, drawn in values.items()}
                tracker.log_images(arrays, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({key: list(drawn) for key, drawn in values.items()}, step=step)

        self._each(log)

    def close(self) -> None:
        """Write out what is left."""
        self._each(lambda name, tracker: tracker.finish())
        self._trackers = {}

    def _each(self, act: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(name, tracker)
            except Exception as error:
                logger.warning("the tracker %r fails and is left out from here: %s", name, error)
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
    # accelerate had no `start` at first: making a tracker began it.
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration(settings)
    return tracker


_USUAL_GUIDANCE = 7.5
_USUAL_GUIDANCE_SDXL = 5.0


def validate(source: Source, subject: Subject, config: TrainConfig, size: int) -> list[Image.Image]:
    """One image a validation prompt, with the model on its device meanwhile."""
    parts = [x for x in source.pipe.components.values() if isinstance(x, torch.nn.Module)]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(borrowed(part, source.device, None))
        stack.enter_context(autocast(source.device, source.dtype))
        return draw_validation(
            source.pipe,
            subject,
            config.validation_prompts,
            seed=config.seed,
            size=size,
            steps=config.validation_steps,
            guidance=guidance_for(source, config),
        )


def guidance_for(source: Source, config: TrainConfig) -> float:
    """The guidance asked for, or what suits the model: the bundled one has its own."""
    if config.validation_guidance is not None:
        return config.validation_guidance
    from sefi_fast.tiny_world import SAMPLING, bundled_model_path

    is_bundled = (
        source.owned if source.model is None else Path(source.model) == bundled_model_path()
    )
    if is_bundled:
        return float(SAMPLING["guidance"])
    return _USUAL_GUIDANCE_SDXL if is_sdxl(source.pipe) else _USUAL_GUIDANCE


def draw_validation(
    pipe: Any,
    subject: Subject,
    sentences: tuple[str, ...],
    *,
    seed: int,
    size: int,
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    """One image a sentence with `subject` attached, leaving the pipeline as it is.

    Args:
        pipe: a whole pipeline, with its own attention processors in place.
        subject: the current state.
        sentences: with {} where the subject stands.
        seed: of every image, so that the images of a run can be compared.
        size: side length in pixels.
        steps: denoising steps.
        guidance: strength of classifier-free guidance.
    """
    # A call leaves traces on its pipeline and scheduler, so a twin with the same models is called.
    twin = copy.copy(pipe)
    twin.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    twin.set_progress_bar_config(disable=True)
    if is_sdxl(pipe) and pipe.vae.config.force_upcast:
        twin.vae = _without_autocast(pipe.vae)
    try:
        attach(twin, subject)
        with torch.no_grad():
            return [
                generate(
                    twin,
                    sentence.replace("{}", subject.placeholder),
                    n=1,
                    seed=seed,
                    steps=steps,
                    guidance=guidance,
                    height=size,
                    width=size,
                )[0]
                for sentence in sentences
            ]
    finally:
        detach(twin)


def _without_autocast(vae: Any) -> Any:
    """The same VAE, decoding in its weights' own precision: SDXL's overflows in float16."""
    twin = copy.copy(vae)

    def decode(latents: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return vae.decode(latents.to(vae.dtype), *arguments, **keywords)

    twin.decode = decode
    return twin
