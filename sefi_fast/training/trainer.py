"""Train a subject: one picture in, one small file out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sefi_fast.subject import Subject
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.image import load_image
from sefi_fast.training.job import Callback, Callbacks, Job, class_word_for
from sefi_fast.training.output import check_output, is_one_of
from sefi_fast.training.resume import Resume, check_resume
from sefi_fast.training.run import Run, running
from sefi_fast.training.trackers import check_trackers

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def train(
    image: str | os.PathLike[str] | Image.Image | np.ndarray,
    *,
    model: Any = None,
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
    """Learn the subject of one picture as a new word (docs/method.md, equations 1 to 6).

    With an output, checkpoints lie beside it until it is written (`me.safetensors.checkpoints`),
    and a run that was killed goes on with `resume=True`, on a CPU bit for bit.

    Args:
        image: a picture file, a PIL image or an array [h, w, 3]; its central square is used.
        model: a diffusers folder, a hub id, a .safetensors checkpoint of Stable Diffusion 1.x,
            2.x or SDXL, or a ready pipeline, of which nothing is changed in the end. Default: the
            bundled tiny model.
        class_word: what the subject is: person, cat, golden retriever. Needed for every model but
            the bundled one.
        placeholder: the new word, without spaces.
        mask: a picture of the same size as `image`, white where the subject is; for
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
        ImageError: the picture is missing, unreadable or of a kind that cannot be used.
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
    path = None if output is None else check_output(output)
    if path is not None and is_one_of(path, (image, mask)):
        raise ValueError(f"output {path} is a picture to learn from: give it another name")
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
    with running(model, settings) as source:
        run = Run(source, settings, [job], resume=resume)
        if source.owned and not settings.validation_prompts:
            source.pipe.vae = None
        (outcome,) = run(progress=progress)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
