"""Second prompts, sizes and pooled embeddings of SDXL, and subjects of the other family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pipelines.sampling import (
    assert_close,
    assert_differ,
    encode_prompt,
    sample,
    state_of,
    subject_for,
)

from sefi_fast import attach, detach, encode
from sefi_fast.errors import SubjectFileError
from sefi_fast.prompts import encode_with_pooled, install_stage_hook
from sefi_fast.subject import Subject


@pytest.fixture
def family() -> str:
    return "sdxl"


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt_2": "snow", "negative_prompt_2": "a red hat"},
        {"clip_skip": 1},
        {
            "height": 64,
            "width": 96,
            "original_size": (512, 384),
            "crops_coords_top_left": (32, 8),
            "target_size": (1024, 1024),
            "negative_original_size": (64, 64),
        },
    ],
    ids=["second prompt", "clip_skip", "sizes"],
)
def test_arguments_of_sdxl_act_as_in_the_bare_pipeline(pipe, make_subject, arguments):
    arguments = {"negative_prompt": "a hat"} | arguments
    expected = sample(pipe, "a photo of a cat", **arguments)
    shape = {name: arguments.get(name) for name in ("height", "width")}
    assert_differ(sample(pipe, "a photo of a cat", negative_prompt="a hat", **shape), expected)
    attach(pipe, make_subject(distance=0))
    assert_close(sample(pipe, "a photo of a <it>", **arguments), expected)


def test_a_clip_skip_beyond_the_layers_is_refused(pipe, make_subject):
    attach(pipe, make_subject())
    with pytest.raises(ValueError, match="between 0 and 2 for a text encoder of 3 layers"):
        sample(pipe, "a <it>", clip_skip=3)


def test_a_missing_negative_prompt_becomes_zeros(pipe, make_subject):
    attach(pipe, make_subject())
    positive, negative, _, negative_pooled = encode_prompt(pipe, "a <it>")
    assert negative.shape == positive.shape
    assert not negative.any() and not negative_pooled.any()


def test_a_callback_may_end_guidance(pipe, make_subject):
    attach(pipe, make_subject(distance=0))
    names, batches = ["prompt_embeds", "add_text_embeds", "add_time_ids"], []

    def stop_guiding(pipe, step, timestep, tensors):
        batches.append([len(tensors[name]) for name in names])
        if step == 1:
            pipe._guidance_scale = 0.0
            return {name: tensors[name].chunk(2)[-1] for name in names}
        return tensors

    arguments = {"negative_prompt": "a car", "callback_on_step_end": stop_guiding}
    arguments |= {"callback_on_step_end_tensor_inputs": names}
    actual = sample(pipe, "a photo of a <it>", **arguments)
    assert batches == [[2] * 3, [2] * 3, [1] * 3, [1] * 3]
    detach(pipe)
    assert_close(actual, sample(pipe, "a photo of a cat", **arguments))


def test_subjects_of_the_other_family_are_refused(pipe, sd15_pipeline, tmp_path):
    small, large = subject_for(sd15_pipeline), subject_for(pipe)
    path = tmp_path / "large.safetensors"
    large.save(path)
    loaded = Subject.load(path)
    assert [t.shape for t in loaded.tokens] == [(5, 2, 1, 48), (5, 2, 1, 64)]
    assert all(map(torch.equal, loaded.tokens, large.tokens))
    before = state_of(pipe)
    with pytest.raises(SubjectFileError, match=r"with 1 text encoder\(s\), this pipeline has 2"):
        attach(pipe, small)
    assert state_of(pipe) == before
    with pytest.raises(SubjectFileError, match=r"with 2 text encoder\(s\), this pipeline has 1"):
        attach(sd15_pipeline, path)
    with pytest.raises(SubjectFileError, match=r"width \[48\].*take \[48, 64\]"):
        encode(pipe, "a <it>", subjects=small)
    with pytest.raises(ValueError, match="prompt_2 is for SDXL"):
        encode_with_pooled(sd15_pipeline, "a <it>", "b", subjects=small)
    attach(pipe, path)


def test_pooled_embeddings_that_do_not_fit_are_refused(pipe, make_subject):
    attach(pipe, make_subject())
    embeds, pooled = encode_with_pooled(pipe, "a <it>")
    with pytest.raises(ValueError, match="pooled embeddings of 33 numbers"):
        sample(pipe, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled[:, :33])
    with pytest.raises(ValueError, match="without their pooled ones"):
        encode_prompt(pipe, None, prompt_embeds=embeds)
    added = {"text_embeds": pooled[:, :33], "time_ids": torch.zeros(1, 6)}
    with pytest.raises(ValueError, match=r"neither one embedding of this model \(32\)"):
        pipe.unet(torch.zeros(1, 4, 16, 16), 5, embeds, added_cond_kwargs=added)
    with pytest.raises(ValueError, match="prompt_2 holds 2 prompts, prompt 1"):
        encode_with_pooled(pipe, "a <it>", ["a", "b"])


class TimeText(torch.nn.Module):
    """Is called as SDXL's U-Net is, and returns the pooled embedding that reaches it."""

    config = SimpleNamespace(
        addition_embed_type="text_time",
        projection_class_embeddings_input_dim=3 + 6 * 8,
        addition_time_embed_dim=8,
    )

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs):
        return added_cond_kwargs["text_embeds"] + sample


@torch.no_grad()
def test_the_choice_of_the_pooled_embedding_is_compiled_whole():
    torch._dynamo.reset()
    model = TimeText()
    install_stage_hook(model, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    pooled = torch.arange(30.0).reshape(2, 15)
    added = {"text_embeds": pooled, "time_ids": torch.zeros(2, 6)}
    packed = torch.zeros(2, 4, 5 * (2 * 3 + 1))
    for timestep, stages in ((torch.tensor(650), [3, 3]), (torch.tensor([0, 999]), [0, 4])):
        found = compiled(torch.zeros(2, 3), timestep, packed, added_cond_kwargs=added)
        assert torch.equal(found, pooled.unflatten(1, (5, 3))[torch.arange(2), stages])
