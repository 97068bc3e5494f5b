"""SDXL: both text encoders, the pooled embedding and the time ids, with subjects and without."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from pipelines.sampling import draw, state_of, subject_for
from pipelines.sampling_xl import encode_by_hand, sample_xl_by_hand

from sefi_fast.errors import ModelError, SubjectFileError
from sefi_fast.pipelines import attach, detach, generate, trace
from sefi_fast.prompts import encode, encode_with_pooled, install_stage_hook, packed_stages, unpack
from sefi_fast.subject import Subject

CPU = torch.device("cpu")
CLOSE = {"rtol": 0, "atol": 1e-3}
EXACT = {"rtol": 0, "atol": 1e-4}


def test_a_plain_prompt_draws_what_the_bare_pipeline_draws(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    arguments = {"negative_prompt": "a blue car", "num_images_per_prompt": 2}
    expected = draw(pipe, "a photo of a dog", **arguments)
    attach(pipe, make_sdxl_subject())
    torch.testing.assert_close(draw(pipe, "a photo of a dog", **arguments), expected, **EXACT)


@pytest.mark.parametrize("negative", [None, "", "a red {}"])
@pytest.mark.parametrize("split", [True, False])
def test_an_untrained_subject_draws_its_class_word(
    sdxl_pipeline, make_sdxl_subject, split, negative
):
    pipe = sdxl_pipeline

    def run(word):
        texts = negative if negative is None else negative.replace("{}", word)
        return draw(pipe, f"a photo of a {word} on the beach", negative_prompt=texts)

    expected = run("cat")
    assert (expected - run("dog")).abs().max() > 1e-2
    attach(pipe, make_sdxl_subject(distance=0, split=split))
    torch.testing.assert_close(run("<it>"), expected, **CLOSE)


@pytest.mark.parametrize("negative", [None, "a car"])
def test_each_step_takes_the_tokens_of_its_stage(sdxl_pipeline, make_sdxl_subject, negative):
    pipe = sdxl_pipeline
    prompt = "a photo of a <it> with a <me>"
    subjects = [make_sdxl_subject(), make_sdxl_subject("<me>", "person", stages=10, split=False)]
    expected = sample_xl_by_hand(pipe, prompt, subjects, negative=negative, steps=7)
    of_keys = sample_xl_by_hand(pipe, prompt, subjects, negative=negative, steps=7, pooled_stream=0)
    attach(pipe, subjects)
    actual = draw(pipe, prompt, negative_prompt=negative, num_inference_steps=7)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert (actual - of_keys).abs().max() > 1e-2


def test_detach_leaves_everything_bit_for_bit_as_it_was(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    expected = draw(pipe, "a photo of a cat")
    before = state_of(pipe)
    assert attach(pipe, make_sdxl_subject()) is pipe
    assert state_of(pipe) != before
    run(pipe, "a <it>")
    detach(pipe)
    assert state_of(pipe) == before
    assert torch.equal(draw(pipe, "a photo of a cat"), expected)


def test_one_stage_tied_is_textual_inversion_of_both_encoders(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    subject = make_sdxl_subject(stages=1, split=False)
    attach(pipe, subject)
    actual = draw(pipe, "a photo of a <it>", negative_prompt="a car")
    detach(pipe)
    first, second = (tokens[0] for tokens in subject.tokens)
    parts = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    for (tokenizer, encoder), row in zip(parts, (first, second), strict=True):
        pipe.load_textual_inversion(
            {"<it>": row}, token="<it>", tokenizer=tokenizer, text_encoder=encoder
        )
    expected = draw(pipe, "a photo of a <it>", negative_prompt="a car")
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_the_packed_tensors_hold_every_stage_and_the_pooled_values(
    sdxl_pipeline, make_sdxl_subject
):
    pipe = sdxl_pipeline
    subject = make_sdxl_subject(stages=3)
    embeds, pooled = encode_with_pooled(pipe, ["a <it>", "a dog"], subjects=subject)
    assert embeds.shape == (2, 77, 3 * (2 * (48 + 64) + 1)) and pooled.shape == (2, 3 * 32)
    assert torch.equal(encode(pipe, ["a <it>", "a dog"], subjects=subject), embeds)
    streams = unpack(embeds, 112)
    for stage in range(3):
        for stream in range(2):
            want, want_pooled = encode_by_hand(pipe, "a <it>", [subject], stage, 3, stream)
            torch.testing.assert_close(streams[:1, stage, stream], want, **EXACT)
            same = torch.allclose(
                pooled[:1].unflatten(1, (3, 32))[:, stage], want_pooled, atol=1e-4
            )
            assert same == (stream == 1)
        plain, plain_pooled = encode_by_hand(pipe, "a dog", [], 0, 1, 0)
        torch.testing.assert_close(
            streams[1:, stage], plain[:, None].expand(-1, 2, -1, -1), **EXACT
        )
        torch.testing.assert_close(
            pooled[1:].unflatten(1, (3, 32))[:, stage], plain_pooled, **EXACT
        )
    with pytest.raises(ValueError, match="prompt_2 holds 2 prompts, prompt 1"):
        encode_with_pooled(pipe, "a <it>", ["a", "b"], subjects=subject)


def test_tensors_draw_what_words_draw(sdxl_pipeline, make_sdxl_subject):
    pipe = attach(sdxl_pipeline, [make_sdxl_subject(), make_sdxl_subject("<me>", "man", stages=2)])
    expected = draw(pipe, "a <it>", negative_prompt="a <me>", num_images_per_prompt=2)
    positive, negative = (encode_with_pooled(pipe, text) for text in ("a <it>", "a <me>"))
    actual = draw(
        pipe,
        None,
        prompt_embeds=positive.prompt_embeds,
        pooled_prompt_embeds=positive.pooled_prompt_embeds,
        negative_prompt_embeds=negative.prompt_embeds,
        negative_pooled_prompt_embeds=negative.pooled_prompt_embeds,
        num_images_per_prompt=2,
    )
    torch.testing.assert_close(actual, expected, **CLOSE)
    zeros = draw(pipe, "a <it>")
    actual = draw(pipe, None, **positive._asdict())
    torch.testing.assert_close(actual, zeros, **CLOSE)


def run(pipe, *args, **kwargs):
    with torch.no_grad():
        return pipe.encode_prompt(*args, device=CPU, **kwargs)


def test_encode_prompt_is_called_and_answers_as_the_pipelines_own(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    own = inspect.signature(pipe.encode_prompt)
    plain = run(pipe, ["a dog", "a car"], num_images_per_prompt=2, negative_prompt="a hat")
    attach(pipe, [make_sdxl_subject(), make_sdxl_subject("<me>", "person", stages=2)])
    assert inspect.signature(pipe.encode_prompt) == own
    for ours, theirs in zip(
        run(pipe, ["a dog", "a car"], num_images_per_prompt=2, negative_prompt="a hat"),
        plain,
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    positive, negative, pooled, negative_pooled = run(
        pipe, ["a <it>", "a car"], num_images_per_prompt=2, negative_prompt="a hat"
    )
    assert positive.shape == negative.shape == (4, 77, 5 * (2 * 112 + 1))
    assert pooled.shape == negative_pooled.shape == (4, 5 * 32)
    torch.testing.assert_close(negative_pooled, plain[3].repeat(1, 5), **EXACT)
    torch.testing.assert_close(unpack(negative, 112)[:, 4, 0], plain[1], **EXACT)
    only = run(pipe, "a <it>", do_classifier_free_guidance=False)
    assert only[1] is None and only[3] is None and packed_stages(only[0].shape[2], 112) == 5
    zeros = run(pipe, "a <it>")
    assert not zeros[1].any() and not zeros[3].any() and zeros[1].shape == zeros[0].shape


def test_a_second_prompt_goes_to_the_second_encoder(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    arguments = {"negative_prompt": "a hat", "negative_prompt_2": "a red hat"}
    expected = draw(pipe, "a photo of a cat", prompt_2="snow", **arguments)
    assert (expected - draw(pipe, "a photo of a cat", **arguments)).abs().max() > 1e-2
    attach(pipe, make_sdxl_subject(distance=0))
    actual = draw(pipe, "a photo of a <it>", prompt_2="snow", **arguments)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_clip_skip_counts_from_the_penultimate_layer(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    plain = draw(pipe, "a photo of a cat", negative_prompt="a car")
    expected = draw(pipe, "a photo of a cat", negative_prompt="a car", clip_skip=1)
    assert (expected - plain).abs().max() > 1e-2
    attach(pipe, make_sdxl_subject(distance=0))
    actual = draw(pipe, "a photo of a <it>", negative_prompt="a car", clip_skip=1)
    torch.testing.assert_close(actual, expected, **CLOSE)
    with pytest.raises(ValueError, match="between 0 and 2 for a text encoder of 3 layers"):
        draw(pipe, "a <it>", clip_skip=3)


def test_sizes_and_crops_reach_the_unet(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    arguments = {
        "height": 64,
        "width": 96,
        "original_size": (512, 384),
        "crops_coords_top_left": (32, 8),
        "target_size": (1024, 1024),
        "negative_original_size": (64, 64),
        "negative_prompt": "a car",
    }
    expected = draw(pipe, "a photo of a cat", **arguments)
    plain = draw(pipe, "a photo of a cat", height=64, width=96, negative_prompt="a car")
    assert (expected - plain).abs().max() > 1e-2
    attach(pipe, make_sdxl_subject(distance=0))
    torch.testing.assert_close(draw(pipe, "a photo of a <it>", **arguments), expected, **CLOSE)


def test_callbacks_see_and_may_change_what_is_packed(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    attach(pipe, make_sdxl_subject(distance=0))
    seen = []

    def stop_guiding(pipe, step, timestep, tensors):
        seen.append({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        if step == 1:
            pipe._guidance_scale = 0.0
            names = ("prompt_embeds", "add_text_embeds", "add_time_ids")
            return tensors | {name: tensors[name].chunk(2)[-1] for name in names}
        return tensors

    inputs = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    arguments = {
        "callback_on_step_end": stop_guiding,
        "callback_on_step_end_tensor_inputs": inputs,
        "negative_prompt": "a car",
    }
    actual = draw(pipe, "a photo of a <it>", **arguments)
    packed, narrow = (77, 5 * (2 * 112 + 1)), (5 * 32,)
    assert [s["prompt_embeds"] for s in seen] == [(2, *packed)] * 2 + [(1, *packed)] * 2
    assert [s["add_text_embeds"] for s in seen] == [(2, *narrow)] * 2 + [(1, *narrow)] * 2
    detach(pipe)
    torch.testing.assert_close(actual, draw(pipe, "a photo of a cat", **arguments), **CLOSE)


def test_the_samples_of_a_batch_do_not_meet(sdxl_pipeline, make_sdxl_subject):
    pipe = attach(sdxl_pipeline, [make_sdxl_subject(), make_sdxl_subject("<me>", "man", stages=2)])
    prompts = ["a photo of a <it>", "a dog in the snow", "a <me> with a <it>"]
    negatives = ["a red <me>", "", "a blue car"]
    together = draw(pipe, prompts, negative_prompt=negatives)
    for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = draw(pipe, prompt, seed=index, negative_prompt=negative)
        torch.testing.assert_close(together[index : index + 1], alone, **CLOSE)


def test_without_guidance_and_in_few_steps(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    arguments = {"guidance_scale": 0.0, "num_inference_steps": 1, "num_images_per_prompt": 2}
    expected = draw(pipe, "a photo of a cat", **arguments)
    attach(pipe, make_sdxl_subject(distance=0))
    torch.testing.assert_close(draw(pipe, "a photo of a <it>", **arguments), expected, **CLOSE)


def test_words_are_traced(sdxl_pipeline, make_sdxl_subject):
    pipe = attach(sdxl_pipeline, make_sdxl_subject(distance=0))
    with trace(pipe, ["<it>", "beach"]) as found:
        draw(pipe, "a photo of a <it> on the beach")
    detach(pipe)
    with trace(pipe, ["cat", "beach"]) as expected:
        draw(pipe, "a photo of a cat on the beach")
    torch.testing.assert_close(found.maps["<it>"], expected.maps["cat"], **EXACT)
    torch.testing.assert_close(found.maps["beach"], expected.maps["beach"], **EXACT)
    assert found.maps["<it>"].shape == (1, 8, 8)


def test_generate_draws_each_picture_from_its_seed(sdxl_pipeline, make_sdxl_subject):
    pipe = attach(sdxl_pipeline, make_sdxl_subject())
    arguments = {"steps": 2, "guidance": 4.0, "output_type": "latent"}
    pair = generate(pipe, "a <it>", n=2, seed=3, negative_prompt="a car", **arguments)
    alone = generate(pipe, "a <it>", seed=4, negative_prompt="a car", **arguments)
    torch.testing.assert_close(pair[1], alone[0], **CLOSE)


def test_subjects_stay_with_their_family(sdxl_pipeline, sd15_pipeline, tmp_path):
    small, large = subject_for(sd15_pipeline), subject_for(sdxl_pipeline)
    large.save(tmp_path / "large.safetensors")
    loaded = Subject.load(tmp_path / "large.safetensors")
    assert [t.shape for t in loaded.tokens] == [(5, 2, 1, 48), (5, 2, 1, 64)]
    assert all(map(torch.equal, loaded.tokens, large.tokens))
    before = state_of(sdxl_pipeline)
    with pytest.raises(SubjectFileError, match=r"with 1 text encoder\(s\), this pipeline has 2"):
        attach(sdxl_pipeline, small)
    assert state_of(sdxl_pipeline) == before
    with pytest.raises(SubjectFileError, match=r"with 2 text encoder\(s\), this pipeline has 1"):
        attach(sd15_pipeline, tmp_path / "large.safetensors")
    with pytest.raises(SubjectFileError, match=r"width \[48\].*take \[48, 64\]"):
        encode(sdxl_pipeline, "a <it>", subjects=small)
    with pytest.raises(ValueError, match="prompt_2 is for SDXL"):
        encode_with_pooled(sd15_pipeline, "a <it>", "b", subjects=small)
    attach(sdxl_pipeline, tmp_path / "large.safetensors")


def test_the_refiner_is_left_alone(sdxl_pipeline, make_sdxl_subject):
    parts = dict(sdxl_pipeline.components) | {"text_encoder": None, "tokenizer": None}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    with pytest.raises(ModelError, match="second text encoder of SDXL alone"):
        attach(refiner, make_sdxl_subject())


def test_pooled_embeddings_that_do_not_fit_are_told(sdxl_pipeline, make_sdxl_subject):
    pipe = attach(sdxl_pipeline, make_sdxl_subject())
    embeds, pooled = encode_with_pooled(pipe, "a <it>")
    with pytest.raises(ValueError, match="pooled embeddings of 33 numbers"):
        draw(pipe, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled[:, :33])
    with pytest.raises(ValueError, match="without their pooled ones"):
        run(pipe, None, prompt_embeds=embeds)
    added = {"text_embeds": pooled[:, :33], "time_ids": torch.zeros(1, 6)}
    with pytest.raises(ValueError, match=r"neither one embedding of this model \(32\)"):
        pipe.unet(torch.zeros(1, 4, 16, 16), 5, embeds, added_cond_kwargs=added)


class TimeText(torch.nn.Module):
    """Is called as SDXL's U-Net is, and gives back what pooled embedding reached it."""

    config = SimpleNamespace(
        addition_embed_type="text_time",
        projection_class_embeddings_input_dim=3 + 6 * 8,
        addition_time_embed_dim=8,
    )

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs):
        return added_cond_kwargs["text_embeds"] + sample


def test_the_compiler_sees_the_choice_of_the_pooled_embedding():
    torch._dynamo.reset()
    model = TimeText()
    install_stage_hook(model, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    pooled = torch.arange(30.0).reshape(2, 15)
    added = {"text_embeds": pooled, "time_ids": torch.zeros(2, 6)}
    packed = torch.zeros(2, 4, 5 * (2 * 3 + 1))
    with torch.no_grad():
        for timestep, stages in ((650, [3, 3]), (torch.tensor([0, 999]), [0, 4])):
            found = compiled(
                torch.zeros(2, 3), torch.as_tensor(timestep), packed, added_cond_kwargs=added
            )
            assert torch.equal(found, pooled.unflatten(1, (5, 3))[torch.arange(2), stages])


@pytest.mark.long
def test_a_compiled_unet_draws_the_same(sdxl_pipeline, make_sdxl_subject):
    pipe = sdxl_pipeline
    plain = draw(pipe, "a dog", num_inference_steps=2)
    attach(pipe, make_sdxl_subject())
    expected = draw(pipe, "a <it>", num_inference_steps=2)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(draw(pipe, "a <it>", num_inference_steps=2), expected, **CLOSE)
    torch.testing.assert_close(draw(pipe, "a dog", num_inference_steps=2), plain, **CLOSE)
