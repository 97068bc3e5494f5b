"""The engine against the same step written plainly, in loss, gradient and three updates."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler
from training.plain import PlainTraining

from sefi_fast.subject import SubjectTokens
from sefi_fast.training import TrainConfig
from sefi_fast.training.engine import Engine, Lane
from sefi_fast.training.image import load_image, prepare
from sefi_fast.training.latents import encode_image
from sefi_fast.training.noise import Draw
from sefi_fast.training.prompts import TrainingPrompts

CPU = torch.device("cpu")
# The random model's subject loss is minute: without a large weight it would not be tested.
BASE = {"batch_size": 4, "weight_lambda": 200.0, "schedule": "constant", "resolution": 64}
SENTENCES = ("a photo of a {}", "{} in the snow", "the {} and a {}")
"""Each case differs from BASE in what it names."""
CASES = {
    "default": {},
    "attention module": {"module": "attention"},
    "fixed base": {"module": "attention", "train_base": False},
    "reference gradient": {"reference_grad": True},
    "some resolutions": {"loss_resolutions": (4, 2)},
    "one resolution": {"loss_resolutions": (8,)},
    "several templates": {"templates": SENTENCES},
    "scene": {"scene": "on the beach"},
    "tied": {"split": False},
    "one stage": {"stages": 1},
    "ten stages": {"stages": 10, "batch_size": 6},
    "one sample": {"batch_size": 1},
    "no flip": {"flip": False},
    "two vectors": {"num_vectors": 2, "module": "attention", "templates": SENTENCES},
    "two vectors, tied": {"num_vectors": 2, "split": False},
    "two vectors, class": {"num_vectors": 2, "attention_loss": "class"},
    "two vectors, mask": {"num_vectors": 2, "attention_loss": "mask", "weight_lambda": 1.0},
    "Min-SNR": {"snr_gamma": 2.5},
    "class": {"attention_loss": "class"},
    "class, reference gradient": {"attention_loss": "class", "reference_grad": True},
    "class, several templates": {"attention_loss": "class", "templates": SENTENCES},
    "mask": {"attention_loss": "mask", "weight_lambda": 1.0},
    "mask, several templates": {
        "attention_loss": "mask",
        "weight_lambda": 1.0,
        "templates": SENTENCES,
        "loss_resolutions": (8, 2),
    },
}


@pytest.fixture
def picture():
    return load_image(torch.rand(80, 90, 3, generator=torch.Generator().manual_seed(4)).numpy())


def class_word(config):
    """Of as many words as there are vectors: the plain step tells them apart by their ids."""
    return "red cat" if config.num_vectors == 2 else "cat"


def class_ids(pipe, config):
    return pipe.tokenizer(class_word(config), add_special_tokens=False).input_ids


def make_tokens(pipe, config, disturb=0.2):
    """The module, moved away from the class word, where subject loss and gradient vanish."""
    rows = pipe.text_encoder.get_input_embeddings().weight[class_ids(pipe, config)].detach()
    generator = torch.Generator().manual_seed(9)
    tokens = SubjectTokens(
        rows,
        stages=config.stages,
        split=config.split,
        train_base=config.train_base,
        module=config.module,
        generator=generator,
    )
    with torch.no_grad():
        for parameter in tokens.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += disturb * rows.square().mean().sqrt() * noise
    return tokens


def make_mask(config):
    if config.attention_loss != "mask":
        return None
    return torch.rand(64, 64, generator=torch.Generator().manual_seed(6))


def make_engine(pipe, picture, config, tokens):
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False).eval()
    size = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    latents = encode_image(pipe.vae, prepare(picture, size), config.flip)
    ids = [class_ids(pipe, config)]
    prompts = TrainingPrompts([pipe.tokenizer], config.sentences(), "<it>", ids, CPU)
    return Engine(
        unet=pipe.unet,
        text_encoders=[pipe.text_encoder],
        scheduler=pipe.scheduler,
        lanes=[Lane((tokens,), latents, prompts, config.seed, make_mask(config))],
        config=config,
        dtype=torch.float32,
    )


def terms_of(engine):
    """Both terms of the next draw, for the one lane there is."""
    engine._draws.load()
    step = engine._step
    with engine.processors.in_place():
        return step.terms(step.state.rows(), Draw(*(part[0] for part in step.draws)))


def gradients(engine, total, tokens):
    """The gradient of a loss in each parameter of `tokens`, by name."""
    (flat,) = torch.autograd.grad(total, engine._step.state.parameters, retain_graph=True)
    named = engine._step.state.state_dict(0)
    order = [name.partition(".")[2] for name in named if name.startswith("parameters.")]
    own = dict(tokens.named_parameters())
    parts = flat[0].split([own[name].numel() for name in order])
    return {name: part.view_as(own[name]) for name, part in zip(order, parts, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_plain_step(sd15_pipeline, picture, case):
    config = TrainConfig(**{**BASE, "module": "free", **CASES[case]})
    tokens = make_tokens(sd15_pipeline, config)
    plain_tokens = copy.deepcopy(tokens).double()
    plain_pipe = copy.deepcopy(sd15_pipeline)
    engine = make_engine(sd15_pipeline, picture, config, tokens)
    terms = terms_of(engine)
    found = gradients(engine, terms.noise + config.weight_lambda * terms.attention, tokens)

    for part in (plain_pipe.unet, plain_pipe.text_encoder, plain_pipe.vae):
        part.double()
    mask = None if make_mask(config) is None else make_mask(config).double()
    plain = PlainTraining(plain_pipe, picture, config, class_word(config), plain_tokens, mask)
    noise, subject_loss = plain.terms()
    (noise + config.weight_lambda * subject_loss).backward()

    assert subject_loss > 1e-7
    torch.testing.assert_close(terms.noise[0].double(), noise, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms.attention[0].double(), subject_loss, rtol=1e-3, atol=0)
    wanted = dict(plain_tokens.named_parameters())
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        grad = wanted[name].grad
        assert grad.abs().max() > 0, name
        error = (gradient.double() - grad).abs().max() / grad.abs().max()
        assert error < 2e-3, (name, error)


def test_the_alignment_carries_weight_in_these_tests(sd15_pipeline, picture):
    config = TrainConfig(**BASE, module="free")
    tokens = make_tokens(sd15_pipeline, config)
    engine = make_engine(sd15_pipeline, picture, config, tokens)
    terms = terms_of(engine)
    noise = gradients(engine, terms.noise, tokens)["rows"]
    subject_loss = gradients(engine, config.weight_lambda * terms.attention, tokens)["rows"]
    assert 0.05 < subject_loss.norm() / noise.norm() < 20


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_three_updates_are_those_of_the_plain_step(sd15_pipeline, picture, prediction_type):
    config = TrainConfig(**BASE, module="attention", learning_rate=1e-2)
    sd15_pipeline.scheduler = DDPMScheduler.from_config(
        sd15_pipeline.scheduler.config, prediction_type=prediction_type
    )
    tokens = make_tokens(sd15_pipeline, config)
    plain_tokens = copy.deepcopy(tokens)
    plain_pipe = copy.deepcopy(sd15_pipeline)
    engine = make_engine(sd15_pipeline, picture, config, tokens)
    results = [engine.step()[0] for _ in range(3)]

    plain = PlainTraining(plain_pipe, picture, config, "cat", plain_tokens)
    start = plain_tokens().detach()
    groups = plain_tokens.parameter_groups(config.learning_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for result in results:
        noise, subject_loss = plain.terms()
        assert result.noise == pytest.approx(noise.item(), rel=1e-4)
        assert result.subject_loss == pytest.approx(subject_loss.item(), rel=1e-2)
        assert result.finite
        optimizer.zero_grad()
        (noise + config.weight_lambda * subject_loss).backward()
        optimizer.step()
    moved = (plain_tokens().detach() - start).abs().max()
    assert moved > 1e-3
    torch.testing.assert_close(engine.current(), plain_tokens().detach(), rtol=0, atol=0.02 * moved)


@pytest.mark.parametrize("off", [{"weight_lambda": 0.0}, {"attention_loss": "none"}])
def test_without_attention_loss_no_reference_is_projected_and_nothing_asked(
    sd15_pipeline, picture, monkeypatch, off
):
    monkeypatch.setattr("sefi_fast.attention.processor.fused_cross_attention", None)
    config = TrainConfig(**{**BASE, **off})
    engine = make_engine(sd15_pipeline, picture, config, make_tokens(sd15_pipeline, config))
    (result,) = engine.step()
    assert result.subject_loss == 0.0
    assert result.finite


def test_resolutions_that_no_layer_has_are_refused(sd15_pipeline, picture):
    config = TrainConfig(**BASE, loss_resolutions=(8, 5))
    with pytest.raises(ValueError, match=r"names 5, .* have the sides 1, 2, 4, 8"):
        make_engine(sd15_pipeline, picture, config, make_tokens(sd15_pipeline, config))


def test_only_the_drawn_stages_are_encoded(sd15_pipeline, picture):
    config = TrainConfig(**{**BASE, "stages": 50, "batch_size": 3})
    engine = make_engine(sd15_pipeline, picture, config, make_tokens(sd15_pipeline, config))
    calls = []
    handle = sd15_pipeline.text_encoder.register_forward_pre_hook(
        lambda module, inputs: calls.append(inputs[0].shape)
    )
    engine.step()
    handle.remove()
    assert calls == [(6, 77)]


def test_gradient_checkpointing_changes_no_number(sd15_pipeline, picture):
    config = TrainConfig(**BASE)
    losses = []
    for checkpointing in (False, True):
        tokens = make_tokens(sd15_pipeline, config)
        engine = make_engine(sd15_pipeline, picture, config, tokens)
        if checkpointing:
            sd15_pipeline.unet.enable_gradient_checkpointing()
        engine.step()
        losses.append((engine.step(), engine.current()))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


def test_nothing_of_a_step_stays_in_memory(sd15_pipeline, picture):
    config = TrainConfig(**BASE)
    engine = make_engine(sd15_pipeline, picture, config, make_tokens(sd15_pipeline, config))
    engine.step()
    for _, layer in engine._record.items():
        assert layer.subject_loss is None
        assert layer.attn_probs is None


def test_the_rate_follows_the_schedule_unless_one_is_given(sd15_pipeline, picture):
    config = TrainConfig(**{**BASE, "schedule": "cosine", "steps": 4})
    engine = make_engine(sd15_pipeline, picture, config, make_tokens(sd15_pipeline, config))
    rates = []
    for given in (None, None, None, None, 0.3):
        engine.step(given)
        rates.append(engine._step.state.rate.item())
    assert rates == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.3], abs=1e-5)


def test_accumulated_draws_are_averaged(sd15_pipeline, picture):
    config = TrainConfig(**BASE, gradient_accumulation=3, learning_rate=1e-2)
    tokens = make_tokens(sd15_pipeline, config)
    single = TrainConfig(**BASE, learning_rate=1e-2)
    one_by_one = make_engine(sd15_pipeline, picture, single, tokens)
    terms = [terms_of(one_by_one) for _ in range(3)]
    totals = [each.noise + config.weight_lambda * each.attention for each in terms]
    wanted = gradients(one_by_one, sum(totals) / 3, tokens)
    engine = make_engine(sd15_pipeline, picture, config, tokens)
    (result,) = engine.step()
    assert result.noise == pytest.approx(sum(each.noise.item() for each in terms) / 3, rel=1e-6)
    mean = sum(each.attention.item() for each in terms) / 3
    assert result.subject_loss == pytest.approx(mean, rel=1e-5)
    state = engine.state_dict()
    for name, gradient in wanted.items():
        # Adam's first moment after one step is a tenth of the gradient.
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(10 * state[f"exp_avg.{name}"], gradient, rtol=1e-4, atol=atol)
