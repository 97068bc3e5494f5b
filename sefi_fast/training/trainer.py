"""Train one subject: `sefi_fast.train`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sefi_fast.errors import is_out_of_memory
from sefi_fast.subject import Subject
from sefi_fast.training.base_model import ModelPath, Source, borrowed, find_source, frozen
from sefi_fast.training.checkpoint import (
    Checkpoint,
    Resume,
    Timetable,
    check_resume,
    checkpoints_to_resume,
    read_checkpoint,
)
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.engine import Engine, StepResult, is_lost
from sefi_fast.training.image import load_image
from sefi_fast.training.monitor import Progress, Trackers, check_trackers, validate
from sefi_fast.training.optimizer import rate_factor
from sefi_fast.training.signals import Stop, TrainingInterrupted, graceful
from sefi_fast.training.subject_state import (
    NON_FINITE_LIMIT,
    Callback,
    Callbacks,
    Job,
    Learner,
    NonFiniteLossError,
    Outcome,
    class_word_for,
    save_partial,
    unsaved_error,
)
from sefi_fast.utils.files import check_output, expanded, is_one_of, user_path

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


logger = logging.getLogger(__name__)

OnOutcome = Callable[[int, Outcome], None]


@contextmanager
def running(
    model: Any, config: TrainConfig, model_config: ModelPath = None, vae: ModelPath = None
) -> Iterator[Source]:
    """Yield the model, frozen on its device, with gradients on.

    The caller's autocast and default device are off inside: a seed gives one result whatever they
    are.

    Raises:
        ModelError: there is no such model, or the method does not fit its family.
        ValueError: the device or the precision asked for cannot be had.
    """
    # As a mode it costs each operation microseconds.
    default_device = torch.get_default_device()
    on_cpu = nullcontext() if default_device.type == "cpu" else torch.device("cpu")
    with on_cpu, torch.inference_mode(False), torch.enable_grad():
        source = find_source(model, config, model_config, vae)
        with torch.autocast(source.device.type, enabled=False), frozen(source, config):
            yield source


class Run:
    """Subjects that train side by side, to be made and called inside `running`.

    Args:
        source: the model.
        config: settings that all subjects share.
        jobs: the subjects. One that cannot be done ends here, the others go on.
        resume: whether to go on from checkpoints (`resume.Resume`).
        engine: of an earlier run on the same source, to be used again.

    Attributes:
        engine: trains the subjects; None if there is none left to train.

    Raises:
        ValueError, TypeError: `resume` cannot be meant, or the subjects do not fit one engine.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        jobs: Sequence[Job],
        *,
        resume: Resume = None,
        engine: Engine | None = None,
    ) -> None:
        check_resume(resume, len(jobs))
        self._source, self._config = source, config
        self._outcomes: list[Outcome | None] = [None] * len(jobs)
        self._on_outcome: OnOutcome | None = None
        self._learners: dict[int, Learner] = {}
        begun: dict[int, Checkpoint] = {}
        with borrowed(source.pipe.vae, source.device, torch.float32):
            for number, job in enumerate(jobs):
                try:
                    learner = Learner(job, source, config)
                    found = checkpoints_to_resume(learner.unfinished(), resume)
                    if found:
                        begun[number] = read_checkpoint(found[max(found)])
                        learner.load(begun[number])
                except Exception as error:
                    if is_out_of_memory(error) or is_lost(source.device):
                        raise
                    self._outcomes[number] = error
                else:
                    self._learners[number] = learner
        self._lanes = {number: lane for lane, number in enumerate(self._learners)}
        self.engine = self._start_engine(engine) if self._learners else engine
        for number in begun.keys() & self._learners.keys():
            assert self.engine is not None
            try:
                self.engine.load_state_dict(self._lanes[number], begun[number].part("engine"))
            except Exception as error:
                if is_out_of_memory(error) or is_lost(source.device):
                    raise
                self._end({number: error})
        self._timetable = Timetable(config.checkpoint_every)
        self._whole = True

    def __call__(
        self, *, progress: bool = True, on_outcome: OnOutcome | None = None
    ) -> list[Outcome]:
        """Train until every subject is learnt or has failed.

        Args:
            progress: show a progress bar.
            on_outcome: called with a job's number and outcome as soon as there is one; a
                subject's file is on the disk by then.

        Returns:
            What became of each job: the subject, or the error that ended it.

        Raises:
            TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came; every subject that was still in
                training has a checkpoint, if it has an output.
        """
        self._on_outcome = on_outcome
        for number, outcome in enumerate(self._outcomes):
            if outcome is not None and on_outcome is not None:
                on_outcome(number, outcome)
        titles = [learner.job.title for learner in self._learners.values()]
        title = titles[0] if len(titles) == 1 else f"{len(titles)} subjects"
        with ExitStack() as stack:
            stop = stack.enter_context(graceful())
            trackers = self._trackers(title) if self._learners else Trackers((), Path(), "", {})
            stack.callback(trackers.close)
            done = min((learner.done for learner in self._learners.values()), default=0)
            bar = Progress(title, self._config.steps, done, progress and bool(titles))
            stack.enter_context(bar)
            try:
                self._loop(bar, trackers, stop)
            except KeyboardInterrupt as error:
                self._leave(error)
                raise
            except Exception:
                # A callback's, or one of the step: what is whole is kept.
                if self._whole:
                    self._write_checkpoints(self._learners)
                raise
        return [outcome for outcome in self._outcomes if outcome is not None]

    def _loop(self, bar: Progress, trackers: Trackers, stop: Stop) -> None:
        started = time.perf_counter()
        self._finish(n for n, learner in self._learners.items() if self._is_last(learner))
        while self._learners:
            self._step(bar, trackers, started)
            if self._learners and stop.received is not None:
                raise TrainingInterrupted("", stop.received, self._steps_done())
            self._write_checkpoints(
                n for n, learner in self._learners.items() if self._timetable.due(learner.done)
            )

    def _step(self, bar: Progress, trackers: Trackers, started: float) -> None:
        assert self.engine is not None
        self._whole = False
        results = self.engine.step()
        learners = list(self._learners.items())
        good, failed = [], []
        for number, learner in learners:
            result = results[self._lanes[number]]
            assert result is not None
            if learner.take(result, time.perf_counter() - started):
                failed.append((number, result))
            elif result.finite:
                good.append(number)
        self._average()
        self._whole = True
        bar.step([learner.history for _, learner in learners])
        ended = []
        for number in good:
            learner = self._learners[number]
            self._log(learner, trackers)
            self._validate(number, bar, trackers)
            if learner.ends_early():
                ended.append(number)
        self._fail(failed)
        last = [n for n, learner in self._learners.items() if self._is_last(learner)]
        self._finish(dict.fromkeys([*ended, *last]))

    def _is_last(self, learner: Learner) -> bool:
        return learner.done >= self._config.steps

    def _steps_done(self) -> int:
        return max((learner.done for learner in self._learners.values()), default=0)

    def _start_engine(self, engine: Engine | None) -> Engine:
        lanes = [learner.lane for learner in self._learners.values()]
        if engine is not None:
            engine.refill(lanes)
            return engine
        pipe = self._source.pipe
        return Engine(
            unet=pipe.unet,
            text_encoders=self._source.text_encoders,
            scheduler=pipe.scheduler,
            lanes=lanes,
            config=self._config,
            dtype=self._source.dtype,
        )

    def _average(self) -> None:
        if self._config.ema_decay is None or not self._learners:
            return
        assert self.engine is not None
        rows = dict(zip(self.engine.active, self.engine.rows(), strict=True))
        for number, learner in self._learners.items():
            assert learner.average is not None
            learner.average.update(rows[self._lanes[number]])

    def _tokens(self, number: int) -> Tensor:
        """The tokens that a subject would have now."""
        assert self.engine is not None
        average = self._learners[number].average
        return self.engine.current(self._lanes[number]) if average is None else average.current()

    def _log(self, learner: Learner, trackers: Trackers) -> None:
        if trackers:
            history, start = learner.history, self._prefix(learner)
            rate = rate_factor(self._config, learner.done - 1) * self._config.learning_rate
            values = {
                "loss": history.loss[-1],
                "subject_loss": history.subject_loss[-1],
                "learning_rate": rate,
            }
            trackers.log({start + name: value for name, value in values.items()}, learner.done)

    def _validate(self, number: int, bar: Progress, trackers: Trackers) -> None:
        config, learner = self._config, self._learners[number]
        if not config.validation_prompts or learner.done % config.validation_every:
            return
        subject = learner.subject(self._tokens(number))
        try:
            pictures = validate(self._source, subject, learner.config, learner.size)
        except Exception as error:
            # Images to look at are no reason to lose a run.
            logger.warning("no validation images at step %d: %s", learner.done, error)
            return
        learner.history.validation.append((learner.done, pictures))
        bar.pictures(pictures)
        trackers.log_images({self._prefix(learner) + "validation": pictures}, learner.done)

    def _prefix(self, learner: Learner) -> str:
        return "" if len(self._outcomes) == 1 else f"{learner.job.title}/"

    def _finish(self, numbers: Iterable[int]) -> None:
        outcomes: dict[int, Outcome] = {}
        for number in list(numbers):
            learner = self._learners[number]
            subject = learner.subject(self._tokens(number))
            try:
                if learner.job.output is not None:
                    subject.save(learner.job.output)
            except Exception as error:
                outcomes[number] = unsaved_error(learner, subject, error)
                continue
            if learner.folder is not None:
                learner.folder.clear()
            if isinstance(learner.job.callback, Callbacks):
                learner.job.callback.on_end(subject)
            outcomes[number] = subject
        self._end(outcomes)

    def _fail(self, failed: Iterable[tuple[int, StepResult]]) -> None:
        assert self.engine is not None
        outcomes: dict[int, Outcome] = {}
        for number, result in failed:
            learner = self._learners[number]
            subject = learner.subject(self.engine.last_good(self._lanes[number]))
            outcomes[number] = NonFiniteLossError(
                f"training stopped at step {learner.done}: {NON_FINITE_LIMIT} steps in a row the "
                f"loss or its gradient was NaN or infinite (now: noise loss {result.noise:g}, "
                f"subject loss {result.subject_loss:g}); the last good state is kept. Lower "
                "learning_rate, or use precision='fp32'",
                subject,
            )
            save_partial(learner, subject)
        self._end(outcomes)

    def _end(self, outcomes: dict[int, Outcome]) -> None:
        for number, outcome in outcomes.items():
            del self._learners[number]
            self._outcomes[number] = outcome
        for number, outcome in outcomes.items():
            # When all are done the engine is left as it is, with its captured graph, for reuse.
            if self._learners and self.engine is not None:
                self.engine.drop(self._lanes[number])
            if self._on_outcome is not None:
                self._on_outcome(number, outcome)

    def _write_checkpoints(self, numbers: Iterable[int]) -> None:
        chosen = [n for n in numbers if self._learners[n].folder is not None]
        if self._config.checkpoint_every == 0 or not chosen:
            return
        assert self.engine is not None
        started = time.perf_counter()
        for number in chosen:
            learner = self._learners[number]
            assert learner.folder is not None
            state = self.engine.state_dict(self._lanes[number])
            try:
                path = learner.folder.write(learner.checkpoint(state))
            except Exception as error:
                logger.warning(
                    "the checkpoint of step %d could not be written to %s (%s): %s",
                    learner.done,
                    learner.folder.path,
                    getattr(error, "strerror", None) or error,
                    f"the one of step {learner.saved} stays" if learner.saved else "there is none",
                )
                continue
            learner.saved = learner.done
            learner.folder.prune(learner.done)
            if isinstance(learner.job.callback, Callbacks):
                learner.job.callback.on_checkpoint(learner.done, path)
        self._timetable.written(time.perf_counter() - started)

    def _leave(self, error: KeyboardInterrupt) -> None:
        """What an interrupted run leaves, said in the error."""
        # A second Ctrl-C may come in the middle of a step, whose state is neither old nor new.
        if self._whole:
            self._write_checkpoints(self._learners)
        words = [
            f"training was interrupted after {self._steps_done()} of {self._config.steps} steps"
        ]
        partial = [
            str(learner.job.partial)
            for number, learner in self._learners.items()
            if save_partial(learner, learner.subject(self._tokens(number)))
        ]
        if partial:
            words.append(f"the subject as it is now is in {', '.join(partial)}")
        saved = [learner.saved for learner in self._learners.values() if learner.saved]
        if saved:
            words.append(f"resume=True (--resume) goes on from step {max(saved)}")
        if not partial and not saved:
            words.append("nothing of it is kept")
        error.args = ("; ".join(words),)

    def _trackers(self, title: str) -> Trackers:
        first = next(iter(self._learners.values()))
        output = first.job.output
        beside = (output.parent if output is not None else Path()) / "logs"
        folder = user_path(self._config.log_dir or beside)
        name = output.stem if output is not None and len(self._learners) == 1 else title
        return Trackers(self._config.trackers, folder, name, self._config.as_dict())


def train(
    image: str | os.PathLike[str] | Image.Image | np.ndarray,
    *,
    model: Any = None,
    model_config: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    class_word: str | None = None,
    placeholder: str = "<it>",
    mask: str | os.PathLike[str] | Image.Image | np.ndarray | None = None,
    preset: str | None = None,
    config: TrainConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: Resume = None,
    progress: bool = True,
    callback: Callback | Callbacks | None = None,
    **overrides: Any,
) -> Subject:
    """Learn the subject of one image as a new word (docs/method.md, equations 1 to 6).

    With an output, checkpoints lie beside it until it is written (`me.safetensors.checkpoints`),
    and a run that was killed goes on with `resume=True`, on a CPU bit for bit.

    Args:
        image: an image file, a PIL image or an array [h, w, 3]; its central square is used.
        model: a diffusers folder, a hub id, a .safetensors checkpoint of Stable Diffusion 1.x,
            2.x or SDXL, or a ready pipeline, of which nothing is changed in the end. Default: the
            bundled tiny model.
        model_config: for a model in one file, the diffusers folder (weights are not read) of a
            model of the same architecture, so that nothing is asked of the hub.
        vae: another autoencoder than the model's, as for `load_pipeline`.
        class_word: what the subject is: person, cat, golden retriever. Needed for every model but
            the bundled one.
        placeholder: the new word, without spaces.
        mask: an image of the same size as `image`, white where the subject is; for
            `attention_loss="mask"`.
        preset: "sefi", "likeness", "textual-inversion" or "prospect" in place of `config`.
        config: settings; default: TrainConfig().
        output: file to save the subject to, written at the end, whole or not at all. A run that is
            interrupted leaves its latest state there if there was no file before.
        resume: True goes on from the newest whole checkpoint, "auto" does so where there is one,
            False removes what an unfinished run left and begins anew, a path names a checkpoint.
            By default an unfinished run is an error.
        progress: show a progress bar.
        callback: called after each step with the number of steps done and the history so far;
            True ends the run there. Or `Callbacks`, which hear of checkpoints and the end too.
        **overrides: fields of TrainConfig, by name; they win over `config` and `preset`.

    Returns:
        The subject; its `history` holds what training saw.

    Raises:
        ImageError: the image is missing, unreadable or of a kind that cannot be used.
        ModelError: there is no such model, or the method does not fit its family.
        PromptError: the tokenizer does not know the class word, it has more tokens than
            `num_vectors`, or a template is too long.
        ValueError, TypeError: a setting is out of range or of the wrong type.
        OSError: the output cannot be written; told before training begins.
        CheckpointError: `resume` and the checkpoints that are there do not go together.
        NonFiniteLossError: three steps in a row gave no finite loss or gradient. The last good
            state is in its `subject`, and saved if `output` was given, no file was there yet, and
            any step succeeded.
        UnsavedSubjectError: the disk filled up meanwhile; the result is in its `subject`.
        TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came. The step was finished, a checkpoint
            written.
    """
    if preset is not None and config is not None:
        raise ValueError(
            f"preset {preset!r} and config were both given: give one of them, and by name what "
            "shall differ"
        )
    settings = (
        TrainConfig.from_overrides(config, overrides)
        if preset is None
        else TrainConfig.preset(preset, **overrides)
    )
    if (mask is not None) != (settings.attention_loss == "mask"):
        has = "there is no mask" if mask is None else "there is a mask"
        raise ValueError(
            f"{has}, but attention_loss is {settings.attention_loss!r}: give a mask with "
            "attention_loss='mask', and with that only"
        )
    image = user_path(image) if isinstance(image, (str, os.PathLike)) else image
    mask = user_path(mask) if isinstance(mask, (str, os.PathLike)) else mask
    model = expanded(model) if isinstance(model, (str, os.PathLike)) else model
    path = None if output is None else check_output(output)
    if path is not None and is_one_of(path, (image, mask)):
        raise ValueError(f"output {path} is an image to learn from: give it another name")
    job = Job(
        image=load_image(image),
        class_word=class_word_for(class_word, model),
        placeholder=placeholder,
        mask=mask,
        output=path,
        # A file that is there already is another subject, or an earlier state that --resume keeps.
        partial=None if path is None or path.exists() else path,
        callback=callback,
    )
    check_resume(resume, 1)
    check_trackers(settings.trackers)
    with running(model, settings, model_config, vae) as source:
        run = Run(source, settings, [job], resume=resume)
        if source.owned and not settings.validation_prompts:
            source.pipe.vae = None
        (outcome,) = run(progress=progress)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
