"""Train a subject: one picture in, one small file out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sefi_fast.conditioning import class_token_id
from sefi_fast.errors import TrainingError
from sefi_fast.pipelines.families import unwrap
from sefi_fast.subject import Subject, SubjectTokens
from sefi_fast.training.borrow import borrowed
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.engine import Engine, StepResult
from sefi_fast.training.history import History
from sefi_fast.training.image import load_image, prepare
from sefi_fast.training.latents import LatentDistribution, encode_picture
from sefi_fast.training.output import check_output
from sefi_fast.training.precision import autocast
from sefi_fast.training.prompts import TrainingPrompts
from sefi_fast.training.source import Source, find_source, frozen, resolution_of
from sefi_fast.training.validation import draw_validation

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

NON_FINITE_LIMIT = 3

Callback = Callable[[int, History], "bool | None"]


class NonFiniteLossError(TrainingError):
    """The loss or its gradient was NaN or infinite several steps in a row.

    Attributes:
        subject: the last state that gave a finite loss.
    """

    def __init__(self, message: str, subject: Subject) -> None:
        super().__init__(message)
        self.subject = subject


def train(
    image: str | os.PathLike[str] | Image.Image | np.ndarray,
    *,
    model: Any = None,
    class_word: str | None = None,
    placeholder: str = "<it>",
    config: TrainConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    **overrides: Any,
) -> Subject:
    """Learn the subject of one picture as a new word (docs/method.md, equations 1 to 6).

    Args:
        image: a picture file, a PIL image or an array [h, w, 3]; its central square is used.
        model: a diffusers folder, a hub id, a .safetensors checkpoint of Stable Diffusion 1.x or
            2.x, or a ready pipeline, of which nothing is changed in the end. Default: the bundled
            tiny model.
        class_word: what the subject is, in one token: person, cat, car. Needed for every model but
            the bundled one.
        placeholder: the new word, without spaces.
        config: settings; default: TrainConfig().
        output: file to save the subject to. It is replaced at the end, whole or not at all, or
            when the run is interrupted.
        progress: show a progress bar.
        callback: called after each step with the number of steps done and the history so far;
            True ends the run there.
        **overrides: fields of TrainConfig, by name.

    Returns:
        The subject; its `history` holds what training saw.

    Raises:
        ImageError: the picture is missing, unreadable or of a kind that cannot be used.
        ModelError: there is no such model, or the method does not fit its family.
        PromptError: the class word is several tokens, or a template is too long.
        ValueError, TypeError: a setting is out of range or of the wrong type.
        OSError: the output cannot be written; told before training begins.
        NonFiniteLossError: three steps in a row gave no finite loss or gradient. The last good
            state is in its `subject`, and saved if `output` was given and any step succeeded.
    """
    settings = TrainConfig.from_overrides(config, overrides)
    _check_placeholder(placeholder)
    picture = load_image(image)
    path = None if output is None else check_output(output)
    word = _class_word(class_word, model)
    # Whoever calls from within inference_mode or no_grad still wants to train.
    with torch.inference_mode(False), torch.enable_grad():
        source = find_source(model, settings)
        size = resolution_of(source.pipe, settings.resolution)
        class_id = class_token_id(source.pipe.tokenizer, word)
        prompts = TrainingPrompts(
            source.pipe.tokenizer, settings.sentences(), placeholder, class_id, source.device
        )
        latents = _encode(source, prepare(picture, size, settings.crop), settings)
        with frozen(source, settings):
            run = _Run(source, settings, word, placeholder, class_id, prompts, latents, size)
            return run(path, progress, callback)


class _Run:
    """The loop around the engine: progress, pictures on the way, and what happens at its ends."""

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        class_word: str,
        placeholder: str,
        class_id: int,
        prompts: TrainingPrompts,
        latents: LatentDistribution,
        size: int,
    ) -> None:
        self._source, self._config, self._size = source, config, size
        self._class_word, self._placeholder = class_word, placeholder
        text_encoder = unwrap(source.pipe.text_encoder)
        table = text_encoder.get_input_embeddings()
        with torch.no_grad():
            row = table(torch.tensor([class_id], device=source.device))[0].float()
        self._class_embedding = row
        tokens = SubjectTokens(
            row,
            stages=config.stages,
            split=config.split,
            train_base=config.train_base,
            module=config.module,
            generator=torch.Generator().manual_seed(config.seed),
        ).to(source.device)
        self._engine = Engine(
            unet=source.pipe.unet,
            text_encoder=text_encoder,
            scheduler=source.pipe.scheduler,
            tokens=tokens,
            latents=latents,
            prompts=prompts,
            config=config,
            dtype=source.dtype,
        )
        self._history = History()

    def __call__(self, output: Path | None, progress: bool, callback: Callback | None) -> Subject:
        try:
            self._loop(progress, callback)
        except KeyboardInterrupt:
            self._save_what_there_is(output)
            raise
        except NonFiniteLossError:
            self._save_what_there_is(output, self._engine.last_good)
            raise
        subject = self._subject(self._engine.current())
        if output is not None:
            subject.save(output)
        return subject

    def _loop(self, progress: bool, callback: Callback | None) -> None:
        config, history = self._config, self._history
        started = time.perf_counter()
        failures = 0
        with tqdm(total=config.steps, disable=not progress, unit="step") as bar:
            bar.set_description(self._placeholder)
            for number in range(config.steps):
                result = self._engine.step()
                bar.update()
                if not result.finite:
                    history.skipped.append(number)
                    failures += 1
                    if failures == NON_FINITE_LIMIT:
                        raise self._failure(number, result)
                    continue
                failures = 0
                history.record(result.noise, result.alignment, time.perf_counter() - started)
                bar.set_postfix(loss=_recent(history.loss), alignment=_recent(history.alignment))
                if config.validation_prompts and (number + 1) % config.validation_every == 0:
                    history.validation.append((number + 1, self._validate()))
                if callback is not None and callback(number + 1, history):
                    return

    def _validate(self) -> list[Image.Image]:
        source = self._source
        parts = [x for x in source.pipe.components.values() if isinstance(x, torch.nn.Module)]
        with _all_borrowed(parts, source.device), autocast(source.device, source.dtype):
            return draw_validation(
                source.pipe,
                self._subject(self._engine.current()),
                self._config.validation_prompts,
                seed=self._config.seed,
                size=self._size,
                steps=self._config.validation_steps,
            )

    def _subject(self, tokens: Tensor) -> Subject:
        settings = {**self._config.as_dict(), "model": self._source.model}
        return Subject(
            placeholder=self._placeholder,
            class_word=self._class_word,
            tokens=[tokens.cpu()],
            class_embeddings=[self._class_embedding.cpu()],
            base_model=self._source.name,
            settings=settings,
            history=self._history,
        )

    def _failure(self, number: int, result: StepResult) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"training stopped at step {number + 1}: {NON_FINITE_LIMIT} steps in a row the loss or "
            f"its gradient was NaN or infinite (now: noise loss {result.noise:g}, alignment "
            f"{result.alignment:g}); the last good state is kept. Lower learning_rate, or use "
            "precision='fp32'",
            self._subject(self._engine.last_good),
        )

    def _save_what_there_is(self, output: Path | None, tokens: Tensor | None = None) -> None:
        if output is not None and self._history.loss:
            self._subject(self._engine.current() if tokens is None else tokens).save(output)


def _encode(source: Source, pixels: Tensor, config: TrainConfig) -> LatentDistribution:
    vae = source.pipe.vae
    with borrowed(vae, source.device, torch.float32):
        latents = encode_picture(vae, pixels, config.flip)
    if source.owned and not config.validation_prompts:
        source.pipe.vae = None
    return latents


@contextmanager
def _all_borrowed(parts: list[torch.nn.Module], device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(borrowed(part, device, None))
        yield


def _recent(values: list[float]) -> str:
    tail = values[-20:]
    return f"{sum(tail) / len(tail):.3g}"


def _check_placeholder(placeholder: str) -> None:
    if not isinstance(placeholder, str):
        raise TypeError(f"placeholder must be a string, got {placeholder!r}")
    if not placeholder or placeholder.split() != [placeholder]:
        raise ValueError(
            f"placeholder must be one word without spaces, such as '<it>', got {placeholder!r}"
        )


def _class_word(class_word: str | None, model: Any) -> str:
    if class_word is not None:
        if not isinstance(class_word, str):
            raise TypeError(f"class_word must be a string, got {class_word!r}")
        return class_word
    if model is None:
        from sefi_fast.tiny_world import CLASS_WORD

        return CLASS_WORD
    raise ValueError(
        "class_word is missing: say in one word what the subject is (person, cat, car); only the "
        "bundled model has a class word of its own"
    )
