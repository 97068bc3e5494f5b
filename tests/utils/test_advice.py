"""Every advice in a message works: each is followed here."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from functools import partial

import pytest
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from pipelines.sampling import sample, subject_for

import sefi_fast
from sefi_fast import attach, detach, encode, generate, regions, train, train_many
from sefi_fast.cli import main
from sefi_fast.subject import Subject
from sefi_fast.training import TrainConfig

PICTURE = sefi_fast.bundled_subject_image()
BOX = (0, 0, 1, 1)
QUICK = {"class_word": "cat", "steps": 1, "batch_size": 1, "stages": 1, "progress": False}
short = partial(sample, num_inference_steps=1)


class Work:
    """What a case works with: a pipeline with <it> attached, and a folder that is the current."""

    def __init__(self, pipe, folder):
        self.pipe, self.folder = pipe, folder
        self.subject = subject_for(pipe)
        attach(pipe, self.subject)
        self.output = folder / "me.safetensors"
        self.picture = folder / "me.png"
        self.picture.write_bytes(PICTURE.read_bytes())

    def train(self, **settings):
        return train(self.picture, model=self.pipe, **{**QUICK, **settings})

    def stop(self, step, **settings):
        def at(done, history):
            if done == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.train(output=self.output, callback=at, **settings)

    def saved(self, name="saved.safetensors", **changes):
        path = self.folder / name
        dataclasses.replace(self.subject, **changes).save(path)
        return path

    def command(self, *arguments):
        """A command that fails raises what it prints."""
        if main([*map(str, arguments)]):
            raise RuntimeError(self.capture.readouterr().err.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def models(_sd15_session):
    """Models of their own: the cases leave them as they were."""
    return copy.deepcopy(_sd15_session.components)


@pytest.fixture
def work(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe = StableDiffusionPipeline(**models, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    work = Work(pipe, tmp_path)
    work.capture = capsys
    yield work
    detach(pipe)


# Each case gives the message's words, what ends in it, and what its advice says to do instead.


def nothing_to_attach(w):
    yield "give at least one, or call detach", lambda: attach(w.pipe, [])
    yield lambda: attach(w.pipe, [w.subject])
    yield lambda: detach(w.pipe)


def one_placeholder_for_two(w):
    file = w.saved()

    def renamed():
        s = Subject.load(file)
        s.placeholder = "<me>"
        s.save(file)
        attach(w.pipe, [w.subject, file])

    yield r"s.placeholder = '<me>'; s.save\(file\)", lambda: attach(w.pipe, [w.subject, file])
    yield renamed


def a_foreign_processor(w):
    detach(w.pipe)
    layer = w.pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    layer.set_processor(PAGIdentitySelfAttnProcessor2_0())

    def plain():
        w.pipe.unet.set_attn_processor(AttnProcessor2_0())
        attach(detach(w.pipe), w.train())
        short(w.pipe, "a <it>")

    yield r"unet\.set_attn_processor\(AttnProcessor2_0\(\)\)", w.train
    yield plain


def a_scheduler_of_other_times(w):
    detach(w.pipe)
    w.pipe.scheduler = EDMEulerScheduler()

    def other():
        w.pipe.scheduler = DDIMScheduler()
        short(attach(w.pipe, w.subject), "a <it>")

    yield "set pipe.scheduler to one of DDIM", lambda: attach(w.pipe, w.subject)
    yield other


def a_trace_of_pag(w):
    detach(w.pipe)
    pag = StableDiffusionPAGPipeline.from_pipe(w.pipe)

    def traced(pipe, **settings):
        pipe.set_progress_bar_config(disable=True)
        with sefi_fast.trace(pipe, ["cat"]) as found:
            short(pipe, "a cat", **settings)
        assert found.maps["cat"].sum() > 0

    yield r"give pag_scale=0, or trace StableDiffusionPipeline", lambda: traced(pag)
    yield lambda: traced(pag, pag_scale=0)
    yield lambda: traced(StableDiffusionPipeline.from_pipe(pag))


def a_trace_of_embeddings(w):
    with sefi_fast.trace(w.pipe, ["<it>"]):
        embeds = encode(w.pipe, "a <it>")
        yield "give it as text", lambda: short(w.pipe, None, prompt_embeds=embeds)
        yield lambda: short(w.pipe, "a <it>")


def a_trace_in_a_trace(w):
    def both():
        with sefi_fast.trace(w.pipe, ["a"]), sefi_fast.trace(w.pipe, ["<it>"]):
            pass

    def one():
        with sefi_fast.trace(w.pipe, ["a", "<it>"]):
            short(w.pipe, "a <it>")

    yield "name all words in one trace", both
    yield one


def maps_before_a_call(w):
    with sefi_fast.trace(w.pipe, ["<it>"]) as found:
        yield "call the pipeline inside the with block first", lambda: found.maps
        short(w.pipe, "a <it>")
        yield lambda: found.maps


def regions_of_embeddings(w):
    with regions(w.pipe, {"a <it>": BOX}):
        embeds = encode(w.pipe, "a <it>")
        yield "give them as text", lambda: short(w.pipe, None, prompt_embeds=embeds)
        yield lambda: short(w.pipe, "a dog")


def no_region(w):
    def around(boxes):
        with regions(w.pipe, boxes):
            pass

    yield "give at least one prompt and its box", lambda: around({})
    yield lambda: around({"a <it>": BOX})


def a_placeholder_in_a_longer_word(w):
    yield "put a space or a punctuation mark", lambda: encode(w.pipe, "a <it>man")
    yield lambda: encode(w.pipe, "a <it> man")
    yield lambda: encode(w.pipe, "a <it>, man")


def a_placeholder_that_is_cut_off(w):
    long = "a " * 80
    yield "shorten the prompt or move the placeholder", lambda: encode(w.pipe, f"{long} <it>")
    yield lambda: encode(w.pipe, "a <it>")
    yield lambda: encode(w.pipe, f"<it> {long}")


def a_placeholder_in_other_letters(w):
    yield "write the placeholder exactly as it is", lambda: short(w.pipe, "a <IT>")
    yield lambda: short(w.pipe, "a <it>")


def a_placeholder_of_another_pipeline(w):
    other = StableDiffusionPipeline.from_pipe(w.pipe)
    other.set_progress_bar_config(disable=True)
    yield "call sefi_fast.attach on the pipeline that draws", lambda: short(other, "a <it>")
    yield lambda: short(attach(other, w.subject), "a <it>")
    yield lambda: short(w.pipe, None, prompt_embeds=encode(w.pipe, "a <it>"))
    yield lambda: short(detach(detach(w.pipe) and other), "a <it>")


def a_prompt_for_text_encoders_that_are_gone(w):
    embeds, empty = encode(w.pipe, "a <it>"), encode(w.pipe, "")
    w.pipe.text_encoder = None
    yield "give it as prompt_embeds made by sefi_fast.encode", lambda: short(w.pipe, "a <it>")
    given = partial(short, w.pipe, None, prompt_embeds=embeds)
    yield lambda: given(negative_prompt_embeds=empty)
    yield lambda: given(guidance_scale=1)


def several_sentences_at_once(w):
    yield "call once for each sentence", lambda: generate(w.pipe, ["a", "b"], steps=1)
    yield lambda: [generate(w.pipe, x, steps=1, output_type="latent") for x in ("a", "b")]


def a_number_given_otherwise(w):
    yield "give n", lambda: generate(w.pipe, "a", steps=1, num_images_per_prompt=2)
    yield lambda: generate(w.pipe, "a", steps=1, n=2, output_type="latent")


def stages_that_divide_no_other(w):
    def attached(*stages):
        subjects = [subject_for(w.pipe, f"<{s}>", stages=s) for s in stages]
        encode(w.pipe, " ".join(f"<{s}>" for s in stages), subjects=subjects)

    yield "train them with stages that divide one another", lambda: attached(11, 13)
    yield lambda: attached(5, 10)


def a_class_word_in_pieces(w):
    yield r"choose words that are one token each.*\(person, dog", lambda: w.train(class_word="catt")
    yield lambda: w.train(class_word="person")
    yield lambda: w.train(class_word="dog")


def a_class_word_of_too_many_tokens(w):
    two = {"class_word": "cat dog"}
    yield r"\(num_vectors\); use more", lambda: w.train(**two, num_vectors=1)
    yield lambda: w.train(**two, num_vectors=2)
    yield lambda: w.train(class_word="cat", num_vectors=1)


def a_mask_without_its_loss(w):
    yield "give a mask with attention_loss='mask'", lambda: w.train(attention_loss="mask")
    yield lambda: w.train(attention_loss="mask", mask=w.picture)


def a_preset_and_a_config(w):
    def both():
        w.train(preset="sefi", config=TrainConfig())

    yield "give one of them, and by name what shall differ", both
    yield lambda: w.train(preset="sefi", flip=False)


def an_unfinished_run(w):
    w.stop(1, steps=2)
    yield r"resume=True \(--resume\)", lambda: w.train(output=w.output, steps=2)
    yield lambda: w.train(output=w.output, steps=2, resume=True)
    w.output.unlink()
    w.stop(1, steps=2)
    yield lambda: w.train(output=w.output, steps=2, resume=False)


def no_checkpoint_to_go_on_from(w):
    yield "leave resume out to begin, or use resume='auto'", lambda: w.train(resume=True)
    yield lambda: w.train()
    yield lambda: w.train(output=w.output, resume="auto")


def a_checkpoint_of_other_settings(w):
    w.stop(1, steps=2)
    again = partial(w.train, output=w.output, steps=2)
    yield "Resume with the same, or use resume=False", lambda: again(resume=True, flip=False)
    yield lambda: again(resume=True)
    yield lambda: again(resume=False, flip=False)


def a_checkpoint_of_more_steps(w):
    w.stop(2, steps=3, schedule="constant")
    again = partial(w.train, output=w.output, resume=True, schedule="constant")
    yield "give at least as many", lambda: again(steps=1)
    yield lambda: again(steps=2)


def a_file_in_the_checkpoints_place(w):
    w.output.with_name("me.safetensors.checkpoints").touch()
    again = partial(w.train, output=w.output)
    yield "move it, choose another output, or set checkpoint_every=0", again
    yield lambda: w.train(output=w.folder / "other.safetensors")
    yield lambda: again(checkpoint_every=0)


def an_output_that_is_a_folder(w):
    yield r"give the name of a file, as .*me\.safetensors", lambda: w.train(output=w.folder)
    yield lambda: w.train(output=w.folder / "me.safetensors")


def an_output_that_is_the_picture(w):
    yield "give it another name", lambda: w.train(output=w.picture)
    yield lambda: w.train(output=w.output)


def a_subject_of_other_settings(w):
    def many(output="many", **settings):
        return train_many(
            [w.picture], model=w.pipe, output=w.folder / output, **{**QUICK, **settings}
        )

    def good(**settings):
        (result,) = many(**settings)
        if result.error is not None:
            raise result.error

    good()
    yield "remove the file, choose another output, or use overwrite", lambda: good(flip=False)
    yield lambda: good(flip=False, overwrite=True)
    yield lambda: good(output="other", flip=True)


def a_resolution_that_does_not_fit(w):
    yield "give a multiple of 8, at most", lambda: w.train(resolution=60)
    yield lambda: w.train(resolution=64)


def half_precision_on_a_cpu(w):
    yield "on a CPU use 'fp32' or 'bf16'", lambda: w.train(precision="fp16", device="cpu")
    yield lambda: w.train(precision="fp32", device="cpu")
    yield lambda: w.train(precision="bf16", device="cpu")


def a_graph_on_a_cpu(w):
    always = partial(w.train, capture="always", device="cpu")
    yield "works on CUDA only.*give 'auto' or", always
    yield lambda: w.train(capture="auto", device="cpu")
    yield lambda: w.train(capture="never", device="cpu")


def a_home_folder_that_is_not_there(w):
    yield r"or \./~me.safetensors for a file", lambda: w.train(output="~me.safetensors")
    yield lambda: w.train(output="./~me.safetensors")


def an_export_that_loses(w):
    subject = subject_for(w.pipe, stages=2)
    path = w.folder / "e.safetensors"
    yield "pass lossy=True", lambda: sefi_fast.export_embedding(subject, path)
    yield lambda: sefi_fast.export_embedding(subject, path, lossy=True)
    tied = w.train(preset="textual-inversion")
    yield lambda: sefi_fast.export_embedding(tied, path)


def an_export_by_command_that_loses(w):
    path = w.saved()
    export = partial(w.command, "export", path, "-o", w.folder / "e.safetensors")
    yield "pass --mean-of-stages", export
    yield lambda: export("--mean-of-stages")


def a_command_without_the_subject(w):
    w.pipe.save_pretrained(w.folder / "sd")
    file = w.saved("it.safetensors")
    drawing = ("-m", w.folder / "sd", "--steps", 1, "-n", 1, "-o", w.folder / "drawn")
    yield "add the file of each with -s FILE", lambda: w.command("generate", "a <it>", *drawing)
    yield lambda: w.command("generate", "a <it>", "-s", file, *drawing)


def a_command_with_a_subject_of_another_name(w):
    w.pipe.save_pretrained(w.folder / "sd")
    file = w.saved("it.safetensors", placeholder="<rex:(a=b)>")
    drawing = ("-m", w.folder / "sd", "--steps", 1, "-n", 1, "-o", w.folder / "drawn")
    named = partial(w.command, "generate", "a <me>")
    yield "write it where the cat shall stand", lambda: named("-s", file, *drawing)
    yield lambda: named("-s", f"<me>={file}", *drawing)
    yield lambda: w.command("generate", "a <rex:(a=b)>", "-s", file, *drawing)


def a_command_with_two_of_one_name(w):
    w.pipe.save_pretrained(w.folder / "sd")
    first, second = w.saved("a=1.safetensors"), w.saved("b=2.safetensors")
    drawing = ("-m", w.folder / "sd", "--steps", 1, "-n", 1, "-o", w.folder / "drawn")
    drawn = partial(w.command, "generate", "a <it> and <other>", *drawing, "-s", first)
    yield r"as -s '<other>=.*b=2\.safetensors'", lambda: drawn("-s", second)
    yield lambda: drawn("-s", f"<other>={second}")


def a_command_with_a_preset_and_a_config(w):
    config = w.folder / "c.yaml"
    config.write_text("steps: 1\nbatch_size: 1\n")
    command = partial(w.command, "train", w.picture, "-c", config, "--quiet")
    yield (
        "write the preset into the config file, as 'preset: likeness'",
        lambda: command("--preset", "likeness"),
    )
    config.write_text("steps: 1\nbatch_size: 1\npreset: likeness\n")
    yield command


def a_comma_in_a_manifest(w):
    path = w.folder / "all.csv"
    path.write_text("image,scene\nme.png,at home, on a sofa\n")
    read = partial(train_many, path, model=w.pipe, output=w.folder / "many", **QUICK)
    yield "put quotes round a value that holds a comma", read
    path.write_text('image,scene\nme.png,"at home, on a sofa"\n')
    yield read


def two_of_one_name_in_a_manifest(w):
    def many(*names):
        rows = [{"image": w.picture, "name": name} for name in names]
        train_many(rows, model=w.pipe, output=w.folder / "many", **QUICK)

    yield "give each subject a name of its own", lambda: many("a", "A")
    yield lambda: many("a", "b")


CASES = [
    one
    for one in list(globals().values())
    if getattr(one, "__module__", None) == __name__
    and inspect.isgeneratorfunction(one)
    and "w" in inspect.signature(one).parameters
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_a_message_advises_works(work, case):
    steps = case(work)
    words, failing = next(steps)
    with pytest.raises(Exception, match=f"(?si){words}"):
        failing()
    followed = [remedy() for remedy in steps]
    assert followed


def test_the_messages_that_users_are_likely_to_meet_are_followed():
    assert len(CASES) >= 40
