"""A run's numbers in TensorBoard, Weights & Biases and the like, through accelerate's trackers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sefi_fast.errors import TrainingError

if TYPE_CHECKING:
    from PIL import Image

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
        """Log pictures of the step, where the tracker takes pictures."""

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
