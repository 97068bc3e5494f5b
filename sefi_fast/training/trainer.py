"""Train one subject: `sefi_fast.train`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sefi_fast.errors import is_out_of_memory
from sefi_fast.subject import Subject
from sefi_fast.training.base_model import (
    BaseModel,
    ModelPath,
    temporarily_frozen,
    training_session,
)
from sefi_fast.training.checkpoint import (
    Checkpoint,
    CheckpointInterval,
    Resume,
    check_resume,
    checkpoint_to_resume,
)
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.engine import Engine, StepResult, is_lost
from sefi_fast.training.image import load_image
from sefi_fast.training.losses import mask_problem
from sefi_fast.training.monitor import Progress, Trackers, check_trackers, validate
from sefi_fast.training.optimizer import rate_factor
from sefi_fast.training.signals import Stop, TrainingInterrupted, graceful
from sefi_fast.training.subject_state import (
    NON_FINITE_LIMIT,
    Callback,
    Callbacks,
    NonFiniteLossError,
    Result,
    SubjectSpec,
    SubjectState,
    UnsavedSubjectError,
    class_word_for,
)
from sefi_fast.utils.files import check_output, expanded, is_one_of, user_path
from sefi_fast.utils.text import check_placeholder

if TYPE_CHECKING:
    from sefi_fast.training.subject_state import ImageSource

logger = logging.getLogger(__name__)


def train(
    image: ImageSource,
    *,
    model: Any = None,
    model_config: ModelPath = None,
    vae: ModelPath = None,
    class_word: str | None = None,
    placeholder: str = "<it>",
    mask: ImageSource | None = None,
    preset: str | None = None,
    config: TrainConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: Resume = None,
    progress: bool = True,
    callback: Callback | Callbacks | None = None,
    **overrides: Any,
) -> Subject:
    """Train the subject of one image as a new word (docs/method.md, equations 1 to 6).

    With an output, checkpoints are written next to it (`me.safetensors.checkpoints`) until it is
    written. A run that was killed goes on with `resume=True`, on a CPU bit for bit.

    Example:
        >>> subject = sefi_fast.train("me.jpg", class_word="person", model="path/or/hub-id",
        ...                           precision="bf16", output="me.safetensors")
        >>> pipe = sefi_fast.attach(sefi_fast.load_pipeline("path/or/hub-id"), subject)
        >>> pipe("a photo of <it> in the snow").images[0]

    Args:
        image: an image file, a PIL image or an array [h, w, 3]; `crop` names its square.
        model: a diffusers folder, a hub id, a .safetensors checkpoint of Stable Diffusion 1.x,
            2.x or SDXL, or a ready pipeline, which is restored at the end. Default: the bundled
            tiny model.
        model_config: for a model in one file, the diffusers folder (weights are not read) of a
            model of the same architecture, so that nothing is asked of the hub.
        vae: another autoencoder than the model's, as for `load_pipeline`.
        class_word: what the subject is: person, cat, golden retriever. Needed for every model but
            the bundled one.
        placeholder: the new word, without spaces.
        mask: an image of the same size as `image`, white where the subject is; for
            `attention_loss="mask"`.
        preset: "sefi", "likeness", "textual-inversion" or "prospect" in place of `config`.
        config: settings; default: TrainConfig(). `precision` selects mixed precision.
        output: file of the subject, written at the end, whole or not at all. A run that is
            interrupted leaves its latest state there if there was no file before.
        resume: True goes on from the newest whole checkpoint, "auto" does so where there is one,
            False removes the checkpoints of an unfinished run and begins again, a path names a
            checkpoint. By default an unfinished run is an error.
        progress: show a progress bar.
        callback: called after each step with a finite loss, with the number of steps done and the
            history; True ends the run there. Or `Callbacks`, with methods for checkpoints and the
            end too.
        **overrides: fields of TrainConfig, by name; they win over `config` and `preset`.

    Returns:
        The subject; its `history` holds the numbers of the training.

    Raises:
        ImageError: the image is missing, unreadable or of a kind that cannot be used.
        ModelError: there is no such model, or the method does not fit its family.
        PromptError: the tokenizer does not know the class word, it has more tokens than
            `num_vectors`, or a template is too long.
        ValueError, TypeError: a setting is out of range or of the wrong type.
        OSError: the output cannot be written; raised before training begins.
        CheckpointError: `resume` does not fit the checkpoints that are there.
        NonFiniteLossError: three steps in a row gave no finite loss or gradient. The last good
            state is in its `subject`, and saved if `output` was given, no file was there yet, and
            any step succeeded.
        UnsavedSubjectError: the disk filled up meanwhile; the result is in its `subject`.
        TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came. The step was finished, a checkpoint
            written.
    """
    settings = TrainConfig.from_overrides(config, overrides, preset)
    if problem := mask_problem(mask is not None, settings.attention_loss):
        raise ValueError(problem)
    image = user_path(image) if isinstance(image, (str, os.PathLike)) else image
    mask = user_path(mask) if isinstance(mask, (str, os.PathLike)) else mask
    model = expanded(model) if isinstance(model, (str, os.PathLike)) else model
    path = None if output is None else check_output(output)
    if path is not None and is_one_of(path, (image, mask)):
        raise ValueError(f"output {path} is an image to train on: give it another name")
    check_resume(resume)
    check_trackers(settings.trackers)
    spec = SubjectSpec(
        image=image,
        class_word=class_word_for(class_word, model),
        placeholder=check_placeholder(placeholder),
        mask=mask,
        output=path,
        # A file that is there already is another subject, or an earlier state that --resume keeps.
        partial=None if path is None or path.exists() else path,
        callback=callback,
        loaded=load_image(image),
    )
    with training_session(model, settings, model_config, vae) as base:
        (result,) = Run(base, settings, [spec], resume=resume)(progress=progress)
    if isinstance(result, Exception):
        raise result
    return result


class Run:
    """Subjects that train together. Make and call it inside a `training_session`.

    A subject that cannot be trained ends at once, the others go on. An `engine` of an earlier run
    on the same model is used again. The attribute is None if no subject is left to train.
    """

    def __init__(
        self,
        base: BaseModel,
        config: TrainConfig,
        specs: Sequence[SubjectSpec],
        *,
        resume: Resume = None,
        engine: Engine | None = None,
    ) -> None:
        self._base, self._config = base, config
        self._results: list[Result | None] = [None] * len(specs)
        self._on_result: Callable[[int, Result], None] | None = None
        # Those still in training, by their places in `specs`.
        self._states: dict[int, SubjectState] = {}
        begun: dict[int, Checkpoint] = {}
        with temporarily_frozen(base.pipe.vae, base.device, torch.float32):
            for number, spec in enumerate(specs):
                try:
                    state = SubjectState(spec, base, config)
                    if (checkpoint := checkpoint_to_resume(state, resume)) is not None:
                        state.load(checkpoint)
                        begun[number] = checkpoint
                except Exception as error:
                    if is_out_of_memory(error) or is_lost(base.device):
                        raise
                    self._results[number] = error
                else:
                    self._states[number] = state
        self._subject_index = {number: index for index, number in enumerate(self._states)}
        self.engine = engine
        if self._states:
            self._start_engine()
            for number, checkpoint in begun.items():
                self._engine.load_state_dict(self._subject_index[number], checkpoint.part("engine"))
        self._interval = CheckpointInterval(config.checkpoint_every)
        # False within a step, where the state is neither the old nor the new one.
        self._is_whole = True

    def __call__(
        self, *, progress: bool = True, on_result: Callable[[int, Result], None] | None = None
    ) -> list[Result]:
        """Train until every subject is trained or has failed, and return the result of each spec.

        `on_result` gets the place of a spec and its result as soon as there is one; the subject's
        file is on the disk by then.

        Raises:
            TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came; every subject that was still in
                training has a checkpoint, if it has an output.
        """
        self._on_result = on_result
        for number, result in enumerate(self._results):
            if result is not None and on_result is not None:
                on_result(number, result)
        titles = [state.spec.title for state in self._states.values()]
        title = titles[0] if len(titles) == 1 else f"{len(titles)} subjects"
        with ExitStack() as stack:
            stop = stack.enter_context(graceful())
            trackers = self._trackers(title) if self._states else Trackers((), Path(), "", {})
            stack.callback(trackers.close)
            done = min((state.done for state in self._states.values()), default=0)
            bar = Progress(title, self._config.steps, done, progress and bool(titles))
            stack.callback(bar.close)
            try:
                self._loop(bar, trackers, stop)
            except KeyboardInterrupt as error:
                self._leave(error)
                raise
            except Exception:
                # Of a callback, or of the step.
                if self._is_whole:
                    self._write_checkpoints(self._states)
                raise
        return [result for result in self._results if result is not None]

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None
        return self.engine

    def _loop(self, bar: Progress, trackers: Trackers, stop: Stop) -> None:
        started = time.perf_counter()
        self._finish(self._last())
        while self._states:
            self._step(bar, trackers, started)
            if self._states and stop.received is not None:
                raise TrainingInterrupted("", stop.received, self._steps_done())
            self._write_checkpoints(
                n for n, state in self._states.items() if self._interval.due(state.done)
            )

    def _step(self, bar: Progress, trackers: Trackers, started: float) -> None:
        self._is_whole = False
        results = self._engine.step()
        states = list(self._states.items())
        good, failed = [], []
        for number, state in states:
            result = results[self._subject_index[number]]
            assert result is not None
            if state.record(result, time.perf_counter() - started):
                failed.append((number, result))
            elif result.finite:
                good.append(number)
        if self._config.ema_decay is not None:
            rows = dict(zip(self._engine.active, self._engine.rows(), strict=True))
            for number, state in states:
                assert state.average is not None
                state.average.update(rows[self._subject_index[number]])
        self._is_whole = True
        bar.step([state.history for _, state in states])
        ended = []
        for number in good:
            if trackers:
                self._log(self._states[number], trackers)
            self._validate(number, bar, trackers)
            if self._states[number].ends_early():
                ended.append(number)
        self._fail(failed)
        self._finish(dict.fromkeys([*ended, *self._last()]))

    def _last(self) -> list[int]:
        return [n for n, state in self._states.items() if state.done >= self._config.steps]

    def _steps_done(self) -> int:
        return max((state.done for state in self._states.values()), default=0)

    def _start_engine(self) -> None:
        base, subjects = self._base, [state.inputs for state in self._states.values()]
        if self.engine is not None:
            self.engine.refill(subjects)
            return
        self.engine = Engine(
            unet=base.pipe.unet,
            text_encoders=base.text_encoders,
            scheduler=base.pipe.scheduler,
            subjects=subjects,
            config=self._config,
            dtype=base.dtype,
        )

    def _tokens(self, number: int) -> Tensor:
        if (average := self._states[number].average) is not None:
            return average.current()
        return self._engine.current(self._subject_index[number])

    def _log(self, state: SubjectState, trackers: Trackers) -> None:
        values = {
            "loss": state.history.loss[-1],
            "subject_loss": state.history.subject_loss[-1],
            "learning_rate": rate_factor(self._config, state.done - 1) * self._config.learning_rate,
        }
        start = self._prefix(state)
        trackers.log({start + name: value for name, value in values.items()}, state.done)

    def _validate(self, number: int, bar: Progress, trackers: Trackers) -> None:
        config, state = self._config, self._states[number]
        if not config.validation_prompts or state.done % config.validation_every:
            return
        subject = state.subject(self._tokens(number))
        try:
            images = validate(self._base, subject, state.config, state.size)
        except Exception as error:
            # A run goes on without images to look at.
            logger.warning("no validation images at step %d: %s", state.done, error)
            return
        state.history.validation.append((state.done, images))
        bar.images(images)
        trackers.log_images({self._prefix(state) + "validation": images}, state.done)

    def _prefix(self, state: SubjectState) -> str:
        return "" if len(self._results) == 1 else f"{state.spec.title}/"

    def _finish(self, numbers: Iterable[int]) -> None:
        results: dict[int, Result] = {}
        for number in numbers:
            state = self._states[number]
            subject = state.subject(self._tokens(number))
            try:
                if state.spec.output is not None:
                    subject.save(state.spec.output)
            except Exception as error:
                kept = "it is in this error's `subject`"
                if state.saved:
                    kept = f"the checkpoint of step {state.saved} stays, resume goes on from it"
                results[number] = UnsavedSubjectError(
                    f"the subject is trained, but {state.spec.output} could not be written: "
                    f"{error}; {kept}",
                    subject,
                )
                results[number].__cause__ = error
                continue
            if state.folder is not None:
                state.folder.clear()
            if isinstance(state.spec.callback, Callbacks):
                state.spec.callback.on_end(subject)
            results[number] = subject
        self._end(results)

    def _fail(self, failed: Iterable[tuple[int, StepResult]]) -> None:
        results: dict[int, Result] = {}
        for number, result in failed:
            state = self._states[number]
            subject = state.subject(self._engine.last_good(self._subject_index[number]))
            results[number] = NonFiniteLossError(
                f"training stopped at step {state.done}: {NON_FINITE_LIMIT} steps in a row the "
                f"loss or its gradient was NaN or infinite (now: noise loss {result.noise:g}, "
                f"subject loss {result.subject_loss:g}); the last good state is kept. Lower "
                "learning_rate, or use precision='fp32'",
                subject,
            )
            state.save_partial(subject)
        self._end(results)

    def _end(self, results: dict[int, Result]) -> None:
        for number, result in results.items():
            del self._states[number]
            self._results[number] = result
        for number, result in results.items():
            # When all are done the engine is left as it is, with its captured graph, for reuse.
            if self._states:
                self._engine.drop(self._subject_index[number])
            if self._on_result is not None:
                self._on_result(number, result)

    def _write_checkpoints(self, numbers: Iterable[int]) -> None:
        chosen = [n for n in numbers if self._states[n].folder is not None]
        if self._config.checkpoint_every == 0 or not chosen:
            return
        started = time.perf_counter()
        for number in chosen:
            state = self._states[number]
            assert state.folder is not None
            engine_state = self._engine.state_dict(self._subject_index[number])
            try:
                path = state.folder.write(state.checkpoint(engine_state))
            except Exception as error:
                logger.warning(
                    "the checkpoint of step %d could not be written to %s (%s): %s",
                    state.done, state.folder.path, getattr(error, "strerror", None) or error,
                    f"the one of step {state.saved} stays" if state.saved else "there is none",
                )  # fmt: skip
                continue
            state.saved = state.done
            state.folder.prune(state.done)
            if isinstance(state.spec.callback, Callbacks):
                state.spec.callback.on_checkpoint(state.done, path)
        self._interval.written(time.perf_counter() - started)

    def _leave(self, error: KeyboardInterrupt) -> None:
        """Save what an interrupted run can keep, and say so in the error."""
        # A second Ctrl-C may come within a step.
        if self._is_whole:
            self._write_checkpoints(self._states)
        words = [
            f"training was interrupted after {self._steps_done()} of {self._config.steps} steps"
        ]
        partial = [
            str(state.spec.partial)
            for number, state in self._states.items()
            if state.save_partial(state.subject(self._tokens(number)))
        ]
        if partial:
            words.append(f"the subject as it is now is in {', '.join(partial)}")
        saved = [state.saved for state in self._states.values() if state.saved]
        if saved:
            words.append(f"resume=True (--resume) goes on from step {max(saved)}")
        if not partial and not saved:
            words.append("nothing of it is kept")
        error.args = ("; ".join(words),)

    def _trackers(self, title: str) -> Trackers:
        output = next(iter(self._states.values())).spec.output
        default = (output.parent if output is not None else Path()) / "logs"
        folder = user_path(self._config.log_dir or default)
        name = output.stem if output is not None and len(self._states) == 1 else title
        return Trackers(self._config.trackers, folder, name, self._config.as_dict())
