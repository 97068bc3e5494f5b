"""Models that pipelines, threads and copies share."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from pipelines.sampling import (
    HINT,
    assert_close,
    assert_differ,
    hooks_on,
    run_threads,
    sample,
    state_of,
    twin,
)

from sefi_fast import attach, detach
from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.errors import PromptError


@pytest.mark.parametrize("another", [twin, copy.copy, AutoPipelineForImage2Image.from_pipe])
def test_pipelines_that_share_models(pipe, make_subject, another):
    arguments = {} if another in (twin, copy.copy) else {"image": HINT, "strength": 1.0}
    plain = sample(another(pipe), "a dog", **arguments)
    before = state_of(pipe)["unet."], dict(pipe.unet.attn_processors)
    attach(pipe, make_subject())
    mine = sample(pipe, "a <it>")
    other = detach(another(pipe))
    assert_close(sample(other, "a dog", **arguments), plain, 1e-5)
    assert_close(sample(pipe, "a <it>"), mine)
    attach(other, make_subject("<me>", "person"))
    theirs = sample(other, "a <me>", **arguments)
    assert_differ(theirs, mine)
    assert_close(sample(pipe, "a <it>"), mine)
    detach(pipe)
    assert_close(sample(other, "a <me>", **arguments), theirs)
    detach(other)
    assert "encode_prompt" not in vars(other) and not hooks_on(pipe)
    assert (state_of(pipe)["unet."], dict(pipe.unet.attn_processors)) == before
    assert torch.equal(sample(other, "a dog", **arguments), plain)


@pytest.mark.parametrize("another", [twin, copy.copy])
def test_a_pipeline_deleted_without_detach_leaves_no_trace(pipe, make_subject, another):
    before = state_of(pipe)
    other = attach(another(pipe), make_subject())
    assert state_of(pipe) != before
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None and state_of(pipe) == before
    other = attach(another(pipe), make_subject())
    attach(pipe, make_subject())
    del other
    gc.collect()
    assert sample(pipe, "a <it>").isfinite().all()
    detach(pipe)
    assert not hooks_on(pipe)


def test_threads_that_share_a_unet(pipe, make_subject):
    pipes, prompts = [pipe, twin(pipe)], ["a photo of a <it>", "a <me> in the snow"]
    attach(pipes[0], make_subject())
    attach(pipes[1], make_subject("<me>", "person", stages=3))
    expected = [sample(*pair) for pair in zip(pipes, prompts, strict=True)]

    def work(index):
        for _ in range(3):
            assert_close(sample(pipes[index], prompts[index]), expected[index])

    run_threads(lambda: work(0), lambda: work(1))


def test_threads_that_attach_and_detach_the_same_pipeline(pipe, make_subject):
    before = state_of(pipe)

    def work(subject):
        for _ in range(20):
            attach(pipe, subject)
            detach(pipe)

    subjects = [make_subject(), make_subject("<me>", "person")]
    run_threads(lambda: work(subjects[0]), lambda: work(subjects[1]))
    assert state_of(pipe) == before


# A prompt as long as a packed one would be if stages were tokens, and one of CLIP's length.
@pytest.mark.parametrize("tokens", [77, 154, 155])
def test_a_call_goes_on_while_other_pipelines_attach_and_detach(pipe, make_subject, tokens):
    other, subject = twin(pipe), make_subject()
    changes = [lambda: attach(other, subject), lambda: detach(other)] * 4
    prompt = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(0))
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": prompt.flip(1)}
    expected = sample(pipe, None, **given)

    def change(module, args):
        if changes:
            changes.pop(0)()

    for attn in cross_attention_layers(pipe.unet).values():
        attn.register_forward_pre_hook(change)
        attn.to_v.register_forward_pre_hook(change)
    assert torch.equal(sample(pipe, None, **given), expected)
    assert not changes


@pytest.mark.parametrize("when", ["between steps", "in a U-Net call"])
def test_a_subject_detached_during_a_call_raises_an_error(pipe, make_subject, when):
    attach(pipe, make_subject())

    def end(*args):
        detach(pipe)

    arguments = {"callback_on_step_end": lambda pipe, *args: detach(pipe) and args[-1]}
    if when == "in a U-Net call":
        # It runs before the hook of the attached pipeline, which has begun then.
        pipe.unet.register_forward_pre_hook(end, prepend=True)
        arguments = {}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sample(pipe, "a <it>", **arguments)
    assert set(hooks_on(pipe)) <= {end}


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied_by", [pickled, saved, copy.deepcopy])
def test_copies_of_an_attached_pipeline_and_of_its_models(pipe, make_subject, copied_by):
    bare = copy.deepcopy(pipe)
    before = sample(pipe, "a dog")
    attach(pipe, make_subject())
    expected = sample(pipe, "a <it>")
    copied, models = copied_by(pipe), twin(pipe)
    models.unet, models.text_encoder = map(copied_by, (pipe.unet, pipe.text_encoder))
    assert copied.encode_prompt is not pipe.encode_prompt
    detach(pipe)
    assert_close(sample(copied, "a <it>"), expected)
    with pytest.raises(PromptError, match="as plain words"):
        sample(twin(copied), "a <it>")
    assert_close(sample(models, "a dog"), before, 1e-5)
    assert sample(models, "a <it>", num_inference_steps=1).isfinite().all()
    attach(models, make_subject())
    assert_close(sample(models, "a <it>"), expected)
    for one in (copied, models):
        detach(one)
        assert_close(sample(one, "a dog"), before, 1e-5)
        assert not hooks_on(one)
        for name in ("unet", "text_encoder"):
            assert vars(getattr(one, name)).keys() == vars(getattr(bare, name)).keys()


@pytest.mark.parametrize(
    "family",
    [pytest.param("sd15", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.long)],
)
def test_a_compiled_unet_gives_the_same_image(pipe, make_subject):
    plain = sample(pipe, "a dog", num_inference_steps=2)
    attach(pipe, make_subject())
    expected = sample(pipe, "a <it>", num_inference_steps=2)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    assert_close(sample(pipe, "a <it>", num_inference_steps=2), expected)
    assert_close(sample(pipe, "a dog", num_inference_steps=2), plain)
    detach(pipe)
    assert_close(sample(pipe, "a dog", num_inference_steps=2), plain)
