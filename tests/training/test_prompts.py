"""Training sentences: what is encoded equals each sample's own encoding."""

from __future__ import annotations

import pytest
import torch

from sefi_fast.conditioning import encode_text
from sefi_fast.errors import PromptError
from sefi_fast.training.latents import encode_picture
from sefi_fast.training.prompts import TrainingPrompts

CPU = torch.device("cpu")
SENTENCES = ("a photo of a {}", "{} in the snow")


@pytest.fixture
def prompts(sd15_pipeline):
    class_id = sd15_pipeline.tokenizer("dog", add_special_tokens=False).input_ids[0]
    return TrainingPrompts(sd15_pipeline.tokenizer, SENTENCES, "<it>", class_id, CPU)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(
    ("stages", "templates"),
    [([0, 1, 2, 3], [0, 0, 0, 0]), ([3, 3, 0, 3, 0], [1, 0, 1, 1, 1]), ([2], [1])],
)
def test_streams_are_those_of_each_sample(sd15_pipeline, prompts, streams, stages, templates):
    text_encoder = sd15_pipeline.text_encoder
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, streams, 48, generator=generator, requires_grad=True)
    got = prompts.streams(text_encoder, tokens, torch.tensor(stages), torch.tensor(templates))
    assert got.shape == (len(stages), 2 * 77, 48)
    for sample, (stage, template) in enumerate(zip(stages, templates, strict=True)):
        for stream in range(2):
            row = tokens[stage, min(stream, streams - 1)].view(1, 1, -1)
            ids, slots = prompts.input_ids[[template]], prompts.slots[[template]]
            alone = encode_text(text_encoder, ids, slots, row)[0]
            part = got[sample, stream * 77 : (stream + 1) * 77]
            torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(got.square().sum(), tokens)
    unused = [stage for stage in range(4) if stage not in stages]
    assert not gradient[unused].any()
    assert all(gradient[stage].abs().sum() > 0 for stage in stages)


def test_the_class_words_row_gives_the_reference(sd15_pipeline, prompts):
    text_encoder = sd15_pipeline.text_encoder
    table = text_encoder.get_input_embeddings().weight
    class_id = sd15_pipeline.tokenizer("dog", add_special_tokens=False).input_ids[0]
    tokens = table[class_id].detach().expand(1, 2, -1)
    templates = torch.tensor([0, 1])
    streams = prompts.streams(text_encoder, tokens, torch.zeros(2, dtype=torch.long), templates)
    reference = prompts.reference(text_encoder)
    plain = sd15_pipeline.tokenizer(
        [sentence.replace("{}", "dog") for sentence in SENTENCES],
        padding="max_length",
        return_tensors="pt",
    )
    assert torch.equal(prompts.input_ids, plain.input_ids)
    assert not reference.requires_grad
    torch.testing.assert_close(streams.unflatten(1, (2, 77))[:, 0], reference)
    torch.testing.assert_close(streams.unflatten(1, (2, 77))[:, 1], reference)


def test_a_placeholder_behind_the_cut_is_refused(sd15_pipeline):
    with pytest.raises(PromptError, match="<it>"):
        TrainingPrompts(sd15_pipeline.tokenizer, ["a " * 80 + "{}"], "<it>", 5, CPU)


def test_latents_are_scaled_and_mirrored(sd15_pipeline):
    vae = sd15_pipeline.vae.requires_grad_(False)
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    both = encode_picture(vae, pixels, flip=True)
    alone = encode_picture(vae, pixels, flip=False)
    assert (both.views, alone.views) == (2, 1)
    for view, turned in enumerate((pixels, pixels.flip(2))):
        posterior = vae.encode(turned[None]).latent_dist
        scale = vae.config.scaling_factor
        torch.testing.assert_close(both.mean[view], posterior.mean[0] * scale)
        torch.testing.assert_close(both.std[view], posterior.std[0] * scale)
    noise = torch.randn(3, *both.mean.shape[1:], generator=torch.Generator().manual_seed(2))
    sample = both.sample(torch.tensor([1, 0, 1]), noise)
    torch.testing.assert_close(sample[1], both.mean[0] + both.std[0] * noise[1])
    torch.testing.assert_close(sample[2], both.mean[1] + both.std[1] * noise[2])


def test_the_vaes_shift_is_taken_off(sd15_pipeline):
    vae = sd15_pipeline.vae.requires_grad_(False)
    pixels = torch.zeros(3, 64, 64)
    plain = encode_picture(vae, pixels, flip=False)
    vae.register_to_config(shift_factor=0.25)
    shifted = encode_picture(vae, pixels, flip=False)
    scale = vae.config.scaling_factor
    torch.testing.assert_close(shifted.mean, plain.mean - 0.25 * scale)
    torch.testing.assert_close(shifted.std, plain.std)
