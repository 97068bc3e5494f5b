"""The engine against the same step written plainly, and batches of subjects against each alone."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler
from training.plain import PlainTraining
from training.shared import FORBIDDEN, MASKS_OVERFLOW, Watch, random_image

from sefi_fast.errors import PromptError
from sefi_fast.subject import SubjectTokens
from sefi_fast.training import TrainConfig
from sefi_fast.training import engine as engine_module
from sefi_fast.training.base_model import checkpointed
from sefi_fast.training.config import AttentionLossName
from sefi_fast.training.engine import CUDAGraphStep, Engine, SubjectInputs, is_lost, warmup
from sefi_fast.training.image import prepare, time_ids
from sefi_fast.training.latents import LatentDistribution, encode_image
from sefi_fast.training.losses import LOSSES
from sefi_fast.training.noise import NoiseSample
from sefi_fast.training.prompts import TrainingPrompts

CPU = torch.device("cpu")
WORDS = ("cat", "dog", "bear")
SENTENCES = ("a photo of a {}", "{} in the snow", "the {} and a {}")
# The random model's subject loss is minute: without a large weight it would not be tested.
BASE = {"batch_size": 3, "weight_lambda": 150.0, "schedule": "constant", "resolution": 64}
BATCH = {**BASE, "batch_size": 2, "templates": SENTENCES[:2], "learning_rate": 1e-2, "steps": 5}
MASK = {"attention_loss": "mask", "weight_lambda": 1.0}
"""Each case differs from BASE in the settings that it names."""
CASES = {
    "default": {},
    "free rows": {"module": "free", "batch_size": 4},
    "fixed base, several templates": {"train_base": False, "templates": SENTENCES},
    "free rows, reference gradient": {"module": "free", "reference_grad": True},
    "as many samples as stages": {"batch_size": 4, "stages": 2, "templates": SENTENCES[:2]},
    "some resolutions, tied": {"split": False, "loss_resolutions": (4,)},
    "one tied stage": {"stages": 1, "split": False, "scene": "on the beach"},
    "class, no flip": {"attention_loss": "class", "flip": False},
    "mask": MASK,
}
MORE_CASES = {
    "some resolutions": {"module": "free", "loss_resolutions": (8, 2)},
    "ten stages": {"module": "free", "stages": 10, "batch_size": 6},
    "one sample": {"batch_size": 1},
    "two vectors, tied": {"num_vectors": 2, "split": False, "module": "free"},
    "two vectors, class": {"num_vectors": 2, "attention_loss": "class", "reference_grad": True},
    "two vectors, mask": {"num_vectors": 2, **MASK},
    "Min-SNR": {"snr_gamma": 2.5},
    "class, several templates": {"attention_loss": "class", "templates": SENTENCES},
    "mask, several templates": {**MASK, "templates": SENTENCES, "loss_resolutions": (8, 2)},
}
FAMILY_CASES = [
    *(("sd15", case) for case in CASES | MORE_CASES),
    *(("sdxl", case) for case in CASES),
]


def class_word(config):
    """Return as many words as there are vectors: the plain step finds them by their ids."""
    return "red cat" if config.num_vectors == 2 else "cat"


def make_tokens(family, config, word, seed=9):
    """Modules away from the class word, where subject loss and gradient vanish."""
    generator = torch.Generator().manual_seed(seed)
    options = {name: getattr(config, name) for name in ("stages", "split", "train_base", "module")}
    modules = []
    for rows in family.class_rows(word):
        module = SubjectTokens(rows, generator=generator, **options)
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


def image_of(number=0):
    return random_image(number, 97 + 10 * number, 80)


def make_subject(family, config, number=0, word=None, tokens=None):
    pipe, word = family.pipe, word or WORDS[number]
    for part in (pipe.unet, pipe.vae, *(encoder for _, encoder in family.encoders)):
        part.requires_grad_(False).eval()
    tokenizers = [tokenizer for tokenizer, _ in family.encoders]
    ids = family.class_ids(word)
    return SubjectInputs(
        tokens=tokens or make_tokens(family, config, word, 9 + number),
        latents=encode_image(pipe.vae, prepare(image_of(number), 64), config.flip),
        prompts=TrainingPrompts(tokenizers, config.sentences(), "<it>", ids, CPU),
        seed=number,
        mask=make_mask(config),
        time_ids=time_ids(image_of(number), 64) if family.is_sdxl else None,
    )


def make_engine(family, subjects, config):
    return Engine(
        unet=family.pipe.unet,
        text_encoders=[encoder for _, encoder in family.encoders],
        scheduler=family.pipe.scheduler,
        subjects=subjects,
        config=config,
        dtype=torch.float32,
    )


def losses_of(engine):
    """Both losses of the next sample of noise."""
    engine._sampler.load()
    step = engine._step
    with engine.processors.in_place():
        return step.losses(step.state.rows(), NoiseSample(*(part[0] for part in step.noise)))


def gradients(engine, total, modules):
    """The gradient of a loss in each parameter, by its name in the engine's state."""
    (flat,) = torch.autograd.grad(total, engine._step.state.parameters, retain_graph=True)
    state = engine._step.state.state_dict(0)
    order = [name.partition(".")[2] for name in state if name.startswith("parameters.")]
    own = named(modules)
    parts = flat[0].split([own[name].numel() for name in order])
    return {name: part.view_as(own[name]) for name, part in zip(order, parts, strict=True)}


def named(modules):
    prefixes = ("", "encoder_2.")
    return {
        prefix + name: parameter
        for prefix, module in zip(prefixes, modules, strict=False)
        for name, parameter in module.named_parameters()
    }


def make_plain(family, config, modules, dtype):
    pipe = copy.deepcopy(family.pipe)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    mask = make_mask(config)
    mask = None if mask is None else mask.to(dtype)
    return PlainTraining(pipe, image_of(), config, class_word(config), modules, mask)


def joined(modules):
    return torch.cat([module().detach() for module in modules], -1)


@pytest.mark.skipif(MASKS_OVERFLOW, reason="float64 is the default dtype here")
@pytest.mark.parametrize(("family", "case"), FAMILY_CASES, indirect=["family"])
def test_loss_and_gradient_are_those_of_the_plain_step(family, case):
    config = TrainConfig(**{**BASE, **(CASES | MORE_CASES)[case]})
    word = class_word(config)
    tokens = make_tokens(family, config, word)
    plain_tokens = tuple(copy.deepcopy(module).double() for module in tokens)
    plain = make_plain(family, config, plain_tokens, torch.float64)
    engine = make_engine(family, [make_subject(family, config, 0, word, tokens)], config)
    losses = losses_of(engine)
    found = gradients(engine, losses.noise + config.weight_lambda * losses.attention, tokens)
    noise, subject_loss = plain.terms()
    (noise + config.weight_lambda * subject_loss).backward()

    assert subject_loss > 1e-7
    torch.testing.assert_close(losses.noise[0].double(), noise, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.attention[0].double(), subject_loss, rtol=1e-3, atol=0)
    wanted = named(plain_tokens)
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        grad = wanted[name].grad
        assert grad.abs().max() > 0, name
        assert (gradient.double() - grad).abs().max() < 2e-3 * grad.abs().max(), name


@pytest.mark.parametrize("wrong", ["pooled", "sizes", "crop"])
@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_the_added_conditioning_counts_in_these_tests(family, wrong):
    config = TrainConfig(**BASE)
    subject = make_subject(family, config)
    found = []
    for change in (False, True):
        engine = make_engine(family, [subject], config)
        if change and wrong == "pooled":
            # K's embedding in the place of V's.
            family.pipe.text_encoder_2.text_projection.register_forward_hook(
                lambda module, inputs, output: output.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            )
        elif change:
            engine._step.time_ids[:, slice(0, 2) if wrong == "sizes" else slice(2, 4)] += 30
        noise = losses_of(engine).noise
        found.append(gradients(engine, noise, subject.tokens)["encoder_2.slots"])
    assert (found[1] - found[0]).abs().max() > 0.1 * found[0].abs().max()


@pytest.mark.parametrize(
    ("family", "prediction_type"),
    [("sd15", "epsilon"), ("sd15", "v_prediction"), ("sdxl", "epsilon")],
    indirect=["family"],
)
def test_three_updates_are_those_of_the_plain_step(family, prediction_type):
    config = TrainConfig(**BASE, learning_rate=1e-2)
    family.pipe.scheduler = DDPMScheduler.from_config(
        family.pipe.scheduler.config, prediction_type=prediction_type
    )
    subject = make_subject(family, config)
    plain_tokens = copy.deepcopy(subject.tokens)
    plain = make_plain(family, config, plain_tokens, torch.float32)
    engine = make_engine(family, [subject], config)
    groups = [g for m in plain_tokens for g in m.parameter_groups(config.learning_rate)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(3):
        (result,) = engine.step()
        noise, subject_loss = plain.terms()
        assert result.finite and result.noise == pytest.approx(noise.item(), rel=1e-4)
        assert result.subject_loss == pytest.approx(subject_loss.item(), rel=1e-2)
        optimizer.zero_grad()
        (noise + config.weight_lambda * subject_loss).backward()
        optimizer.step()
    wanted = joined(plain_tokens)
    moved = (wanted - joined(subject.tokens)).abs().amax((0, 1, 2))
    assert moved[:48].max() > 1e-3 and moved[-48:].max() > 1e-3
    torch.testing.assert_close(engine.current(), wanted, rtol=0, atol=0.02 * float(moved.max()))


@pytest.mark.parametrize("off", [{"weight_lambda": 0.0}, {"attention_loss": "none"}])
@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_without_attention_loss_the_fused_operator_is_not_called(family, monkeypatch, off):
    monkeypatch.setattr("sefi_fast.attention.processor.fused_cross_attention", None)
    config = TrainConfig(**{**BASE, **off})
    (result,) = make_engine(family, [make_subject(family, config)], config).step()
    assert result.subject_loss == 0.0 and result.finite


def test_every_loss_name_has_a_class():
    assert set(LOSSES) == set(AttentionLossName.__args__)


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_resolutions": (8, 5)}, r"names 5, .* have the sides 1, 2, 4, 8"),
        ({"capture": "always"}, "works on CUDA only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(family, settings, message):
    config = TrainConfig(**BASE, **settings)
    with pytest.raises(ValueError, match=message):
        make_engine(family, [make_subject(family, config)], config)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_tokenizers_that_disagree_about_a_sentence_are_refused(family):
    first, second = family.pipe.tokenizer, copy.deepcopy(family.pipe.tokenizer_2)
    second.add_tokens(["photo of"])
    with pytest.raises(PromptError, match="split 'a photo of a <it>' into words differently"):
        TrainingPrompts([first, second], SENTENCES, "<it>", [[5], [5]], CPU)


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_only_the_sampled_stages_are_encoded_at_the_rate_of_the_schedule(family):
    config = TrainConfig(**{**BASE, "stages": 50, "schedule": "cosine", "steps": 4})
    engine = make_engine(family, [make_subject(family, config)], config)
    calls, rates = [], []
    family.pipe.text_encoder.register_forward_pre_hook(
        lambda module, inputs: calls.append(inputs[0].shape)
    )
    for _ in range(4):
        engine.step()
        rates.append(engine._step.state.rate.item())
    assert calls == [(6, 77)] * 4
    assert rates == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-5)


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_gradient_checkpointing_changes_no_number_and_nothing_stays_in_memory(family):
    config = TrainConfig(**BASE)
    runs = []
    for checkpointing in (False, True):
        engine = make_engine(family, [make_subject(family, config)], config)
        with checkpointed(family.pipe.unet, checkpointing):
            runs.append((engine.step(), engine.step(), engine.current()))
        for _, layer in engine._models.record.items():
            assert layer.subject_loss is None and layer.attn_probs is None
    assert runs[0][:2] == runs[1][:2] and torch.equal(runs[0][2], runs[1][2])


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_accumulated_batches_are_averaged(family):
    config = TrainConfig(**BASE, gradient_accumulation=3, learning_rate=1e-2)
    subject = make_subject(family, config)
    one_by_one = make_engine(family, [subject], TrainConfig(**BASE, learning_rate=1e-2))
    losses = [losses_of(one_by_one) for _ in range(3)]
    totals = [each.noise + config.weight_lambda * each.attention for each in losses]
    wanted = gradients(one_by_one, sum(totals) / 3, subject.tokens)
    engine = make_engine(family, [subject], config)
    (result,) = engine.step()
    assert result.noise == pytest.approx(sum(each.noise.item() for each in losses) / 3, rel=1e-6)
    mean = sum(each.attention.item() for each in losses) / 3
    assert result.subject_loss == pytest.approx(mean, rel=1e-5)
    state = engine.state_dict()
    for name, gradient in wanted.items():
        # Adam's first moment after one step is a tenth of the gradient.
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(10 * state[f"exp_avg.{name}"], gradient, rtol=1e-4, atol=atol)


def steps(engine, count):
    return [engine.step() for _ in range(count)]


def assert_as_alone(family, engine, index, subjects, results, config):
    """Compare subject `index` of a batch with an engine of its own: numbers and tokens."""
    alone = make_engine(family, [subjects[index]], config)
    for together, (by_itself,) in zip(results, steps(alone, len(results)), strict=True):
        assert together[index].noise == pytest.approx(by_itself.noise, rel=1e-4)
        assert together[index].subject_loss == pytest.approx(by_itself.subject_loss, rel=1e-2)
        assert together[index].finite == by_itself.finite
    moved = (alone.current() - joined(subjects[index].tokens)).abs().max()
    assert moved > 5e-3
    torch.testing.assert_close(
        engine.current(index), alone.current(), rtol=0, atol=0.02 * float(moved)
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd15", {"module": "free"}),
        ("sd15", {"attention_loss": "class"}),
        ("sd15", MASK),
        ("sdxl", {}),
    ],
    indirect=["family"],
)
def test_subjects_train_as_if_alone_when_one_is_dropped_and_resume_bit_for_bit(family, settings):
    config = TrainConfig(**{**BATCH, **settings})
    subjects = [make_subject(family, config, number) for number in range(3)]
    engine = make_engine(family, subjects, config)
    results = steps(engine, 2)
    assert len({result.noise for result in results[0]}) == 3
    engine.drop(1)
    assert engine.active == (0, 2)
    states = {index: engine.state_dict(index) for index in (0, 2)}
    kept = copy.deepcopy(states)
    later = steps(engine, 2)
    assert all(result[1] is None for result in later)
    for index in (0, 2):
        assert_as_alone(family, engine, index, subjects, results + later, config)
    # Another start, another seed: everything must come from the saved state.
    others = [
        SubjectInputs(**{**vars(one), "seed": 77, "tokens": make_tokens(family, config, word, 1)})
        for one, word in zip(subjects, WORDS, strict=True)
    ]
    again = make_engine(family, others, config)
    again.step()
    again.drop(1)
    for index, state in states.items():
        again.load_state_dict(index, state)
        assert all(torch.equal(tensor, kept[index][name]) for name, tensor in state.items())
    assert steps(again, 2) == later
    assert torch.equal(again.rows(), engine.rows())


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_a_subject_whose_loss_is_nan_keeps_its_state_and_the_others_train(family, spoil):
    config = TrainConfig(**BATCH)
    subjects = [make_subject(family, config, number) for number in range(3)]
    engine = make_engine(family, subjects, config)
    first = steps(engine, 1)
    before = engine.state_dict(1)
    spoil({0}, samples=slice(2, 4))
    bad = steps(engine, 1)
    assert [result.finite for result in bad[0]] == [True, False, True]
    after = engine.state_dict(1)
    assert (before.pop("step"), after["step"]) == (1, 2)
    del before["generator"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    rest = steps(engine, 1)
    assert rest[0][1].finite
    for index in (0, 2):
        assert_as_alone(family, engine, index, subjects, first + bad + rest, config)


class Imitation:
    """Takes the place of a captured graph: warms up, then runs with the processors it has."""

    made = 0

    def __init__(self, run, changed, device):
        type(self).made += 1
        warmup(run, changed)
        self._run = run

    def __call__(self):
        with self.processors.in_place():
            self._run()


@pytest.mark.parametrize("family", ["sd15", "sdxl"], indirect=True)
def test_a_capture_changes_no_number_and_is_made_only_when_it_must(family, monkeypatch):
    config = TrainConfig(**BATCH)
    subjects = [make_subject(family, config, number) for number in range(3)]
    plain = make_engine(family, subjects, config)
    wanted = steps(plain, 2)
    plain.drop(0)
    wanted += steps(plain, 2)
    fresh = steps(make_engine(family, [subjects[2], subjects[0]], config), 2)
    monkeypatch.setattr(engine_module, "CUDAGraphStep", Imitation)
    monkeypatch.setattr(Imitation, "made", 0)
    engine = make_engine(family, subjects, config)
    engine._capture, Imitation.processors = True, engine.processors
    got = steps(engine, 2)
    assert Imitation.made == 1
    engine.drop(0)
    got += steps(engine, 2)
    assert Imitation.made == 2 and got == wanted
    assert torch.equal(engine.rows(), plain.rows())

    tensors = engine._step.tensors()
    engine.refill([subjects[2], subjects[0]])
    assert steps(engine, 2) == fresh and Imitation.made == 2
    assert tensors["latents.mean"] is engine._step.tensors()["latents.mean"]
    engine.refill(subjects)
    assert steps(engine, 1) == wanted[:1] and Imitation.made == 3


def illegal_access(*arguments):
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_a_failed_capture_ends_the_run_only_where_the_device_is_lost(family, monkeypatch, lost):
    config = TrainConfig(**BATCH)
    subjects = [make_subject(family, config)]
    wanted = steps(make_engine(family, subjects, config), 1)
    monkeypatch.setattr(engine_module, "CUDAGraphStep", illegal_access)
    monkeypatch.setattr(engine_module, "is_lost", lambda device: lost)
    engine = make_engine(family, subjects, config)
    engine._capture = True
    if lost:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            engine.step()
    else:
        assert steps(engine, 1) == wanted


def test_a_device_that_answers_with_an_error_is_lost(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not is_lost(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", illegal_access)
    assert is_lost(torch.device("cuda")) and not is_lost(CPU)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_in_a_step_is_read_back_to_the_host(family, loss, monkeypatch):
    # On CUDA this one reads no value; on a CPU it does.
    monkeypatch.setattr("sefi_fast.prompts.text_encoder._check_slots", lambda *arguments: None)
    config = TrainConfig(**{**BATCH, "attention_loss": loss})
    subjects = [make_subject(family, config, number) for number in range(2)]
    engine = make_engine(family, subjects, config)
    engine.step()
    unet = family.pipe.unet
    with engine.processors.in_place(), checkpointed(unet, True), Watch() as watch:
        engine._step()
    assert {"convolution_backward", "lerp_", "addmm"} <= watch.seen
    assert not watch.seen & FORBIDDEN


def on_cuda(subject):
    subject.prompts.input_ids = subject.prompts.input_ids.cuda()
    subject.prompts.slots = subject.prompts.slots.cuda()
    latents = LatentDistribution(subject.latents.mean.cuda(), subject.latents.std.cuda())
    return SubjectInputs(**{**vars(subject), "latents": latents})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_captured_step_is_the_eager_step(family, checkpointing):
    config = TrainConfig(**BATCH)
    subjects = [on_cuda(make_subject(family, config, number)) for number in range(3)]
    for part in (family.pipe.unet, *(encoder for _, encoder in family.encoders)):
        part.to("cuda")
    runs = []
    for capture in ("never", "always"):
        config = TrainConfig.from_overrides(config, {"capture": capture})
        engine = make_engine(family, subjects, config)
        with checkpointed(family.pipe.unet, checkpointing):
            results = steps(engine, 2)
            engine.drop(1)
            results += steps(engine, 2)
        assert isinstance(engine._graph, CUDAGraphStep) == (capture == "always")
        runs.append((results, engine.rows()))
    for eager, captured in zip(runs[0][0], runs[1][0], strict=True):
        for one, other in zip(eager, captured, strict=True):
            assert one == other or one == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-6)
