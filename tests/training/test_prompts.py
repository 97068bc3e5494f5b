"""Training sentences: what is encoded equals each sample's own encoding."""

from __future__ import annotations

import pytest
import torch

from sefi_fast.errors import PromptError
from sefi_fast.prompts import encode_text
from sefi_fast.training.latents import encode_image
from sefi_fast.training.prompts import BatchedPrompts, TrainingPrompts, batched_gather

CPU = torch.device("cpu")
SENTENCES = ("a photo of a {}", "{} in the snow")


def prompts_for(pipe, word):
    class_ids = pipe.tokenizer(word, add_special_tokens=False).input_ids
    return TrainingPrompts([pipe.tokenizer], SENTENCES, "<it>", [class_ids], CPU)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(
    ("stages", "templates"),
    [
        ([[0, 1, 2, 3]], [[0, 0, 0, 0]]),
        ([[3, 3, 0, 3, 0], [2, 0, 0, 1, 2]], [[1, 0, 1, 1, 1], [0, 0, 1, 0, 0]]),
        ([[2], [2], [0]], [[1], [0], [1]]),
        # As many samples as pairs of a stage and a sentence: each pair is encoded once.
        ([[3, 3, 0, 3, 0, 1, 1, 1], [0, 3, 3, 2, 2, 2, 2, 3]], [[1, 0, 1, 1, 1, 0, 0, 1]] * 2),
    ],
)
def test_streams_are_those_of_each_sample(sd15_pipeline, streams, stages, templates, vectors):
    text_encoder = sd15_pipeline.text_encoder
    generator = torch.Generator().manual_seed(0)
    words = ("dog", "cat", "bear")[: len(stages)]
    subjects = [prompts_for(sd15_pipeline, " ".join([word] * vectors)) for word in words]
    shape = (len(stages), 4, streams, vectors, 48)
    tokens = torch.randn(shape, generator=generator, requires_grad=True)
    stages, templates = torch.tensor(stages), torch.tensor(templates)
    got, pooled = BatchedPrompts(subjects).condition([text_encoder], tokens, stages, templates)
    assert pooled is None
    assert got.shape == (stages.numel(), 2 * 77, 48)
    got = got.unflatten(0, stages.shape).unflatten(2, (2, 77))
    for index, prompts in enumerate(subjects):
        for sample, (stage, template) in enumerate(
            zip(stages[index], templates[index], strict=True)
        ):
            for stream in range(2):
                row = tokens[index, stage, min(stream, streams - 1)][None]
                ids, slots = prompts.input_ids[0, template], prompts.slots[template]
                alone = encode_text(text_encoder, ids[None], slots[None], row)[0]
                part = got[index, sample, stream]
                torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(got.square().sum(), tokens)
    for index in range(len(subjects)):
        for stage in range(4):
            used = stage in stages[index]
            assert bool(gradient[index, stage].any()) == used


def test_the_class_words_row_gives_the_reference(sd15_pipeline):
    text_encoder = sd15_pipeline.text_encoder
    table = text_encoder.get_input_embeddings().weight
    words = ("dog", "cat")
    subjects = BatchedPrompts([prompts_for(sd15_pipeline, word) for word in words])
    ids = [sd15_pipeline.tokenizer(w, add_special_tokens=False).input_ids[0] for w in words]
    tokens = table[ids].detach()[:, None, None, None].expand(-1, 1, 2, -1, -1)
    templates = torch.tensor([[0, 1]] * 2)
    stages = torch.zeros(2, 2, dtype=torch.long)
    streams = subjects.condition([text_encoder], tokens, stages, templates).streams
    reference = subjects.reference([text_encoder])
    assert not reference.requires_grad
    for index, word in enumerate(words):
        plain = sd15_pipeline.tokenizer(
            [sentence.replace("{}", word) for sentence in SENTENCES],
            padding="max_length",
            return_tensors="pt",
        )
        assert torch.equal(subjects.input_ids[index, 0], plain.input_ids)
    streams = streams.unflatten(0, (2, 2)).unflatten(2, (2, 77))
    torch.testing.assert_close(streams[:, :, 0], reference)
    torch.testing.assert_close(streams[:, :, 1], reference)


def test_the_gather_is_an_indexing_with_a_gradient_in_float64():
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(3, 4, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(4, (3, 6), generator=generator)
    wanted = torch.stack([source[n, index[n]] for n in range(3)])
    assert torch.equal(batched_gather(source, index), wanted)
    weight = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((batched_gather(source, index) * weight).sum(), source)
    (plain,) = torch.autograd.grad((wanted * weight).sum(), source)
    torch.testing.assert_close(gradient, plain)


def test_a_placeholder_behind_the_cut_is_refused(sd15_pipeline):
    with pytest.raises(PromptError, match="<it>"):
        TrainingPrompts([sd15_pipeline.tokenizer], ["a " * 80 + "{}"], "<it>", [[5]], CPU)


NUMBERS_OF_VAES = {
    "scaled": {},
    "each channel's mean and spread": {
        "latents_mean": (0.5, -1.0, 0.0, 2.0), "latents_std": (2.0, 1.0, 4.0, 0.5)
    },
    "shift": {"shift_factor": 0.25},
}  # fmt: skip


@pytest.mark.parametrize("numbers", NUMBERS_OF_VAES.values(), ids=list(NUMBERS_OF_VAES))
def test_latents_are_mirrored_and_decode_to_what_the_vae_gave(sd15_pipeline, numbers):
    vae = sd15_pipeline.vae.requires_grad_(False)
    vae.register_to_config(**numbers)
    means, spreads, shift = (
        torch.tensor(numbers.get(name, usual)).view(-1, 1, 1)
        for name, usual in (("latents_mean", 0.0), ("latents_std", 1.0), ("shift_factor", 0.0))
    )
    scale = vae.config.scaling_factor
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    both = encode_image(vae, pixels, flip=True)
    assert (both.views, encode_image(vae, pixels, flip=False).views) == (2, 1)
    for view, mirrored in enumerate((pixels, pixels.flip(2))):
        posterior = vae.encode(mirrored[None]).latent_dist
        # What SDXL's pipelines decode: latents · spread / scale + mean.
        decoded = both.mean[view] * spreads / scale + means + shift
        torch.testing.assert_close(decoded, posterior.mean[0])
        torch.testing.assert_close(both.std[view] * spreads / scale, posterior.std[0])
    noise = torch.randn(3, *both.mean.shape[1:], generator=torch.Generator().manual_seed(2))
    sample = both.sample(torch.tensor([1, 0, 1]), noise)
    torch.testing.assert_close(sample[1], both.mean[0] + both.std[0] * noise[1])
    torch.testing.assert_close(sample[2], both.mean[1] + both.std[1] * noise[2])
