"""SDXL's training step against the same step written plainly; lanes, captures, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from training.plain_xl import PlainTrainingXL
from training.watch import FORBIDDEN, Watch

from sefi_fast.errors import PromptError
from sefi_fast.subject import SubjectTokens
from sefi_fast.training import TrainConfig
from sefi_fast.training.base_model import checkpointed
from sefi_fast.training.engine import Engine, Lane
from sefi_fast.training.image import load_image, prepare, time_ids
from sefi_fast.training.latents import LatentDistribution, encode_image
from sefi_fast.training.noise import Draw
from sefi_fast.training.prompts import TrainingPrompts

CPU = torch.device("cpu")
WORDS = ("cat", "dog", "bear")
# The random model's subject loss is minute: without a large weight it would not be tested.
BASE = {"batch_size": 3, "weight_lambda": 100.0, "schedule": "constant", "resolution": 64}
SENTENCES = ("a photo of a {}", "{} in the snow")
"""Each case differs from BASE in what it names."""
CASES = {
    "default": {},
    "as many samples as stages": {"batch_size": 4, "stages": 2, "templates": SENTENCES},
    "free rows, reference gradient": {"module": "free", "reference_grad": True},
    "fixed base, several templates": {"train_base": False, "templates": SENTENCES},
    "tied": {"split": False, "loss_resolutions": (4,)},
    "one tied stage": {"stages": 1, "split": False, "scene": "on the beach"},
    "class": {"attention_loss": "class", "flip": False},
    "mask": {"attention_loss": "mask", "weight_lambda": 1.0},
}


def picture(seed=4, height=80, width=97):
    generator = torch.Generator().manual_seed(seed)
    return load_image(torch.rand(height, width, 3, generator=generator).numpy())


def encoders(pipe):
    return [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]


def class_ids(tokenizer, word):
    return [tokenizer.convert_tokens_to_ids(part + "</w>") for part in word.split()]


def make_tokens(pipe, config, word="cat", seed=9):
    """A module an encoder, away from the class word, where subject loss and gradient vanish."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for tokenizer, encoder in encoders(pipe):
        rows = encoder.get_input_embeddings().weight[class_ids(tokenizer, word)].detach()
        module = SubjectTokens(
            rows,
            stages=config.stages,
            split=config.split,
            train_base=config.train_base,
            module=config.module,
            generator=generator,
        )
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.2 * rows.square().mean().sqrt() * noise
        modules.append(module)
    return tuple(modules)


def make_mask(config):
    if config.attention_loss != "mask":
        return None
    return torch.rand(64, 64, generator=torch.Generator().manual_seed(6))


def make_lane(pipe, config, number=0, tokens=None):
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        part.requires_grad_(False).eval()
    image, word = picture(4 + number, width=97 + 10 * number), WORDS[number]
    ids = [class_ids(tokenizer, word) for tokenizer, _ in encoders(pipe)]
    tokenizers = [tokenizer for tokenizer, _ in encoders(pipe)]
    return Lane(
        tokens=tokens or make_tokens(pipe, config, word, 9 + number),
        latents=encode_image(pipe.vae, prepare(image, 64), config.flip),
        prompts=TrainingPrompts(tokenizers, config.sentences(), "<it>", ids, CPU),
        seed=number,
        mask=make_mask(config),
        time_ids=time_ids(image, 64),
    )


def make_engine(pipe, lanes, config):
    return Engine(
        unet=pipe.unet,
        text_encoders=[encoder for _, encoder in encoders(pipe)],
        scheduler=pipe.scheduler,
        lanes=lanes,
        config=config,
        dtype=torch.float32,
    )


def terms_of(engine):
    engine._draws.load()
    step = engine._step
    with engine.processors.in_place():
        return step.terms(step.state.rows(), Draw(*(part[0] for part in step.draws)))


def gradients(engine, total, modules):
    """The gradient of a loss in each parameter, by its name in the engine's state."""
    (flat,) = torch.autograd.grad(total, engine._step.state.parameters)
    state = engine._step.state.state_dict(0)
    order = [name.partition(".")[2] for name in state if name.startswith("parameters.")]
    own = named(modules)
    parts = flat[0].split([own[name].numel() for name in order])
    return {name: part.view_as(own[name]) for name, part in zip(order, parts, strict=True)}


def named(modules):
    found = dict(modules[0].named_parameters())
    return found | {f"encoder_2.{name}": p for name, p in modules[1].named_parameters()}


def make_plain(pipe, config, modules, dtype=torch.float64):
    pipe = copy.deepcopy(pipe)
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        part.to(dtype)
    mask = make_mask(config)
    mask = None if mask is None else mask.to(dtype)
    return PlainTrainingXL(pipe, picture(), config, "cat", modules, mask)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_plain_step(sdxl_pipeline, case):
    config = TrainConfig(**{**BASE, **CASES[case]})
    tokens = make_tokens(sdxl_pipeline, config)
    plain_tokens = tuple(copy.deepcopy(module).double() for module in tokens)
    plain = make_plain(sdxl_pipeline, config, plain_tokens)
    lane = make_lane(sdxl_pipeline, config, tokens=tokens)
    engine = make_engine(sdxl_pipeline, [lane], config)
    terms = terms_of(engine)
    found = gradients(engine, terms.noise + config.weight_lambda * terms.attention, tokens)
    noise, subject_loss = plain.terms()
    (noise + config.weight_lambda * subject_loss).backward()

    assert subject_loss > 1e-7
    torch.testing.assert_close(terms.noise[0].double(), noise, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms.attention[0].double(), subject_loss, rtol=1e-3, atol=0)
    wanted = named(plain_tokens)
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        grad = wanted[name].grad
        assert grad.abs().max() > 0, name
        error = (gradient.double() - grad).abs().max() / grad.abs().max()
        assert error < 2e-3, (name, error)


@pytest.mark.parametrize("wrong", ["pooled", "sizes", "crop"])
def test_what_the_unet_is_told_beside_the_words_counts_in_these_tests(sdxl_pipeline, wrong):
    config = TrainConfig(**BASE)
    lane = make_lane(sdxl_pipeline, config)
    found = []
    for change in (False, True):
        engine = make_engine(sdxl_pipeline, [lane], config)
        if change and wrong == "pooled":
            # K's embedding in the place of V's.
            sdxl_pipeline.text_encoder_2.text_projection.register_forward_hook(
                lambda module, inputs, output: output.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            )
        elif change:
            engine._step.time_ids[:, slice(0, 2) if wrong == "sizes" else slice(2, 4)] += 30
        found.append(gradients(engine, terms_of(engine).noise, lane.tokens)["encoder_2.slots"])
    assert (found[1] - found[0]).abs().max() > 0.1 * found[0].abs().max()


def test_three_updates_are_those_of_the_plain_step(sdxl_pipeline):
    config = TrainConfig(**BASE, learning_rate=1e-2)
    tokens = make_tokens(sdxl_pipeline, config)
    plain_tokens = copy.deepcopy(tokens)
    plain = make_plain(sdxl_pipeline, config, plain_tokens, torch.float32)
    lane = make_lane(sdxl_pipeline, config, tokens=tokens)
    engine = make_engine(sdxl_pipeline, [lane], config)
    start = torch.cat([module().detach() for module in tokens], -1)
    groups = [g for m in plain_tokens for g in m.parameter_groups(config.learning_rate)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(3):
        (result,) = engine.step()
        noise, subject_loss = plain.terms()
        assert result.noise == pytest.approx(noise.item(), rel=1e-4)
        assert result.subject_loss == pytest.approx(subject_loss.item(), rel=1e-2)
        optimizer.zero_grad()
        (noise + config.weight_lambda * subject_loss).backward()
        optimizer.step()
    wanted = torch.cat([module().detach() for module in plain_tokens], -1)
    moved = (wanted - start).abs().amax((0, 1, 2))
    assert moved[:48].max() > 1e-3 and moved[48:].max() > 1e-3
    torch.testing.assert_close(engine.current(), wanted, rtol=0, atol=0.02 * float(moved.max()))


def test_lanes_are_runs_of_their_own_when_one_drops_and_goes_on_bit_for_bit(sdxl_pipeline):
    config = TrainConfig(**{**BASE, "batch_size": 2, "templates": SENTENCES})
    pipe = sdxl_pipeline
    lanes = [make_lane(pipe, config, number) for number in range(3)]
    assert len({tuple(lane.time_ids.tolist()) for lane in lanes}) == 3
    engine = make_engine(pipe, lanes, config)
    results = [engine.step()]
    engine.drop(1)
    states = {lane: engine.state_dict(lane) for lane in (0, 2)}
    results += [engine.step(), engine.step()]
    for number in (0, 2):
        alone = make_engine(pipe, [lanes[number]], config)
        single = [alone.step()[0] for _ in range(3)]
        for together, by_itself in zip(results, single, strict=True):
            assert together[number].noise == pytest.approx(by_itself.noise, rel=1e-4)
            assert together[number].subject_loss == pytest.approx(by_itself.subject_loss, rel=1e-2)
        start = torch.cat([module().detach() for module in lanes[number].tokens], -1)
        moved = float((alone.current() - start).abs().max())
        torch.testing.assert_close(
            engine.current(number), alone.current(), rtol=0, atol=0.02 * moved
        )
    again = make_engine(pipe, lanes, config)
    again.drop(1)
    for lane, state in states.items():
        again.load_state_dict(lane, state)
    assert [again.step(), again.step()] == results[1:]
    assert torch.equal(again.rows(), engine.rows())


def test_a_refilled_engine_takes_over_sizes_and_both_prompts(sdxl_pipeline):
    config = TrainConfig(**BASE)
    lanes = [make_lane(sdxl_pipeline, config, number) for number in range(2)]
    engine = make_engine(sdxl_pipeline, lanes[:1], config)
    engine.step()
    kept = engine._step
    engine.refill(lanes[1:])
    wanted = make_engine(sdxl_pipeline, lanes[1:], config)
    assert kept.take_over(wanted._step)
    engine._step = kept
    engine._draws.move(kept.draws)
    assert engine.step() == wanted.step()


@pytest.mark.parametrize("loss", ["subject", "mask", "none"])
def test_nothing_in_a_step_is_read_back_to_the_host(sdxl_pipeline, loss, monkeypatch):
    # On CUDA this one reads no value; on a CPU it does.
    monkeypatch.setattr("sefi_fast.prompts.text_encoder._check", lambda *arguments: None)
    config = TrainConfig(**{**BASE, "attention_loss": loss, "templates": SENTENCES})
    lanes = [make_lane(sdxl_pipeline, config, number) for number in range(2)]
    engine = make_engine(sdxl_pipeline, lanes, config)
    engine.step()
    with engine.processors.in_place(), checkpointed(sdxl_pipeline.unet, True), Watch() as watch:
        engine._step()
    assert {"convolution_backward", "lerp_", "addmm"} <= watch.seen
    assert not watch.seen & set(FORBIDDEN), watch.seen & set(FORBIDDEN)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_is_the_eager_step(sdxl_pipeline):
    pipe = sdxl_pipeline
    config = TrainConfig(**{**BASE, "templates": SENTENCES})
    lanes = [on_cuda(make_lane(pipe, config, number)) for number in range(3)]
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.to("cuda")
    runs = []
    for capture in ("never", "always"):
        config = TrainConfig.from_overrides(config, {"capture": capture})
        engine = make_engine(pipe, lanes, config)
        results = [engine.step(), engine.step()]
        engine.drop(1)
        results.append(engine.step())
        assert (engine._replay is not None) == (capture == "always")
        runs.append((results, engine.rows()))
    for eager, captured in zip(runs[0][0], runs[1][0], strict=True):
        for one, other in zip(eager, captured, strict=True):
            assert one == other or one == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-6)


def on_cuda(lane):
    lane.prompts.input_ids = lane.prompts.input_ids.cuda()
    lane.prompts.slots = lane.prompts.slots.cuda()
    latents = LatentDistribution(lane.latents.mean.cuda(), lane.latents.std.cuda())
    return Lane(**{**vars(lane), "latents": latents})


def test_lanes_that_do_not_fit_the_model_are_told(sdxl_pipeline, sd15_pipeline):
    config = TrainConfig(**BASE)
    lane = make_lane(sdxl_pipeline, config)
    for change, message in (
        ({"tokens": lane.tokens[:1]}, r"tokens for 1 text encoder.* but the model has 2"),
        ({"time_ids": None}, r"no time_ids, but the model has 2 text encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            make_engine(sdxl_pipeline, [Lane(**{**vars(lane), **change})], config)
    with pytest.raises(ValueError, match=r"tokens for 2 text encoder.* but the model has 1"):
        Engine(
            unet=sd15_pipeline.unet,
            text_encoders=[sd15_pipeline.text_encoder],
            scheduler=sd15_pipeline.scheduler,
            lanes=[lane],
            config=config,
            dtype=torch.float32,
        )


def test_tokenizers_that_disagree_about_a_sentence_are_told(sdxl_pipeline):
    first, second = sdxl_pipeline.tokenizer, copy.deepcopy(sdxl_pipeline.tokenizer_2)
    second.add_tokens(["photo of"])
    with pytest.raises(PromptError, match="split 'a photo of a <it>' into words differently"):
        TrainingPrompts([first, second], SENTENCES, "<it>", [[5], [5]], CPU)
