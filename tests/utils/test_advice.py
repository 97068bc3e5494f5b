"""Advice in error messages works: each case follows it."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
from diffusers import (
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from pipelines.sampling import sample, subject_for

import sefi_fast
from sefi_fast import attach, detach, encode, regions, train, train_many
from sefi_fast.cli import main
from sefi_fast.subject import Subject

BOX = (0, 0, 1, 1)
QUICK = {"class_word": "cat", "steps": 1, "batch_size": 1, "stages": 1, "progress": False}
short = partial(sample, num_inference_steps=1)


class Work:
    """A pipeline with <it> attached, and the current folder."""

    def __init__(self, pipe, folder, capture):
        self.pipe, self.folder, self.capture = pipe, folder, capture
        self.subject = subject_for(pipe)
        attach(pipe, self.subject)
        self.image, self.output = folder / "me.png", folder / "me.safetensors"
        self.image.write_bytes(sefi_fast.bundled_subject_image().read_bytes())

    def train(self, **settings):
        return train(self.image, model=self.pipe, **{**QUICK, **settings})

    def many(self, rows, output="many", **settings):
        folder = self.folder / output
        for result in train_many(rows, model=self.pipe, output=folder, **{**QUICK, **settings}):
            if result.error is not None:
                raise result.error

    def stop(self, step, **settings):
        def at(done, history):
            if done == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.train(output=self.output, callback=at, **settings)

    def saved(self, name="saved.safetensors", **changes):
        dataclasses.replace(self.subject, **changes).save(self.folder / name)
        return self.folder / name

    def command(self, *arguments):
        """Run a command; one that fails raises what it prints."""
        if main([*map(str, arguments)]):
            raise RuntimeError(self.capture.readouterr().err.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def models(_sd15_session):
    """Models of their own; the cases leave them unchanged."""
    return copy.deepcopy(_sd15_session.components)


@pytest.fixture
def work(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe = StableDiffusionPipeline(**models, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    yield Work(pipe, tmp_path, capsys)
    detach(pipe)


# Each case: words of the message, a call that raises it, and calls that follow its advice.
CALLS = {
    "a trace in a trace": lambda w: (
        "name all words in one trace",
        partial(traced, w.pipe, ["a"], ["<it>"]),
        partial(traced, w.pipe, ["a", "<it>"]),
    ),
    "a placeholder in a longer word": lambda w: (
        "put a space or a punctuation mark",
        partial(encode, w.pipe, "a <it>man"),
        partial(encode, w.pipe, "a <it> man"),
        partial(encode, w.pipe, "a <it>, man"),
    ),
    "a placeholder that is cut off": lambda w: (
        "shorten the prompt or move the placeholder",
        partial(encode, w.pipe, "a " * 80 + "<it>"),
        partial(encode, w.pipe, "a <it>"),
        partial(encode, w.pipe, "<it> " + "a " * 80),
    ),
    "a placeholder in other letters": lambda w: (
        "write the placeholder exactly as it is",
        partial(short, w.pipe, "a <IT>"),
        partial(short, w.pipe, "a <it>"),
    ),
    "stages that divide no other": lambda w: (
        "train them with stages that divide one another",
        partial(staged, w.pipe, 11, 13),
        partial(staged, w.pipe, 5, 10),
    ),
    "no checkpoint": lambda w: (
        "or use resume='auto'",
        partial(w.train, resume=True),
        w.train,
        partial(w.train, output=w.output, resume="auto"),
    ),
}  # fmt: skip


def traced(pipe, *words, **settings):
    if not words:
        return short(pipe, "a <it>", **settings)
    with sefi_fast.trace(pipe, words[0]):
        return traced(pipe, *words[1:], **settings)


def staged(pipe, *stages):
    subjects = [subject_for(pipe, f"<{s}>", stages=s) for s in stages]
    encode(pipe, " ".join(f"<{s}>" for s in stages), subjects=subjects)


# Cases that change something between the message and the advice are generators of the same.
def one_placeholder_for_two(w):
    file = w.saved()
    yield r"s.placeholder = '<me>'; s.save\(file\)"
    yield partial(attach, w.pipe, [w.subject, file])
    s = Subject.load(file)
    s.placeholder = "<me>"
    s.save(file)
    yield partial(attach, w.pipe, [w.subject, file])


def a_trace_of_pag(w):
    detach(w.pipe)
    pag = StableDiffusionPAGPipeline.from_pipe(w.pipe)
    plain = StableDiffusionPipeline.from_pipe(pag)
    for pipe in (pag, plain):
        pipe.set_progress_bar_config(disable=True)
    yield r"give pag_scale=0, or trace StableDiffusionPipeline"
    yield partial(traced, pag, ["a"])
    yield partial(traced, pag, ["a"], pag_scale=0)
    yield partial(traced, plain, ["a"])


def a_placeholder_of_another_pipeline(w):
    other = StableDiffusionPipeline.from_pipe(w.pipe)
    other.set_progress_bar_config(disable=True)
    yield "call sefi_fast.attach on the pipeline that"
    yield partial(short, other, "a <it>")
    yield lambda: short(attach(other, w.subject), "a <it>")
    yield lambda: short(w.pipe, None, prompt_embeds=encode(w.pipe, "a <it>"))
    yield lambda: short(detach(detach(w.pipe) and other), "a <it>")


def text_encoders_that_are_gone(w):
    embeds, empty = encode(w.pipe, "a <it>"), encode(w.pipe, "")
    w.pipe.text_encoder = None
    yield "as prompt_embeds, which are made by sefi_fast.encode"
    yield partial(short, w.pipe, "a <it>")
    yield partial(short, w.pipe, None, prompt_embeds=embeds, negative_prompt_embeds=empty)
    yield partial(short, w.pipe, None, prompt_embeds=embeds, guidance_scale=1)


def embeddings_for_a_trace_or_regions(w):
    for context in (sefi_fast.trace(w.pipe, ["<it>"]), regions(w.pipe, {"a <it>": BOX})):
        with context:
            embeds = encode(w.pipe, "a <it>")
            with pytest.raises(ValueError, match="give (it|them) as text"):
                short(w.pipe, None, prompt_embeds=embeds)
            short(w.pipe, "a <it>")
    with sefi_fast.trace(w.pipe, ["<it>"]) as found:
        yield "call the pipeline inside the with block first"
        yield lambda: found.maps
        short(w.pipe, "a <it>")
        yield lambda: found.maps


def an_unfinished_run(w):
    w.stop(1, steps=2)
    yield r"resume=True \(--resume\)"
    yield partial(w.train, output=w.output, steps=2)
    yield partial(w.train, output=w.output, steps=2, resume=True)
    w.output.unlink()
    w.stop(1, steps=2)
    yield partial(w.train, output=w.output, steps=2, resume=False)


def a_checkpoint_of_other_settings(w):
    w.stop(2, steps=3, schedule="constant")
    again = partial(w.train, output=w.output, schedule="constant")
    yield "use resume=False"
    yield partial(again, steps=3, resume=True, flip=False)
    with pytest.raises(ValueError, match="give at least as many"):
        again(steps=1, resume=True)
    yield partial(again, steps=2, resume=True)
    yield partial(again, steps=3, resume=False, flip=False)


def a_subject_of_other_settings(w):
    w.many([w.image])
    yield "choose another output, or use overwrite"
    yield partial(w.many, [w.image], flip=False)
    yield partial(w.many, [w.image], flip=False, overwrite=True)
    yield partial(w.many, [w.image], output="other", flip=True)


def a_command_with_a_preset_and_a_config(w):
    config = w.folder / "c.yaml"
    config.write_text("steps: 1\nbatch_size: 1\n")
    command = partial(w.command, "train", w.image, "-c", config, "--quiet")
    yield "write the preset into the config file, as 'preset: likeness'"
    yield partial(command, "--preset", "likeness")
    config.write_text("steps: 1\nbatch_size: 1\npreset: likeness\n")
    yield command


def a_comma_in_a_manifest(w):
    path = w.folder / "all.csv"
    path.write_text("image,scene\nme.png,at home, on a sofa\n")
    yield "put quotes round a value that holds a comma"
    yield partial(w.many, path)
    path.write_text('image,scene\nme.png,"at home, on a sofa"\n')
    yield partial(w.many, path)


SEVERAL = [
    one_placeholder_for_two,
    a_trace_of_pag,
    a_placeholder_of_another_pipeline,
    text_encoders_that_are_gone,
    embeddings_for_a_trace_or_regions,
    an_unfinished_run,
    a_checkpoint_of_other_settings,
    a_subject_of_other_settings,
    a_command_with_a_preset_and_a_config,
    a_comma_in_a_manifest,
]


@pytest.mark.parametrize(
    "case", [*CALLS.values(), *SEVERAL], ids=[*CALLS, *(case.__name__ for case in SEVERAL)]
)
def test_advice_of_a_message_works(work, case):
    steps = iter(case(work))
    words, failing = next(steps), next(steps)
    with pytest.raises(Exception, match=f"(?si){words}"):
        failing()
    assert [remedy() for remedy in steps]
