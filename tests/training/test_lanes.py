"""Lanes side by side are what they are alone: in training, after a loss, a failure and a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from training.watch import FORBIDDEN, Watch

from sefi_fast.subject import SubjectTokens
from sefi_fast.training import TrainConfig
from sefi_fast.training import engine as engine_module
from sefi_fast.training import step as step_module
from sefi_fast.training.base_model import checkpointed
from sefi_fast.training.engine import Engine, Lane, Replay, rehearse
from sefi_fast.training.image import load_image, prepare
from sefi_fast.training.latents import LatentDistribution, encode_image
from sefi_fast.training.prompts import TrainingPrompts

CPU = torch.device("cpu")
WORDS = ("cat", "dog", "bear")
CONFIG = TrainConfig(
    batch_size=2,
    weight_lambda=200.0,
    resolution=64,
    learning_rate=1e-2,
    templates=("a photo of a {}", "{} in the snow"),
    steps=5,
)


@pytest.fixture
def pipe(sd15_pipeline):
    for part in (sd15_pipeline.unet, sd15_pipeline.text_encoder, sd15_pipeline.vae):
        part.requires_grad_(False).eval()
    return sd15_pipeline


def make_lane(pipe, number, config=CONFIG):
    generator = torch.Generator().manual_seed(number)
    picture = load_image(torch.rand(70, 70, 3, generator=generator).numpy())
    class_id = pipe.tokenizer(WORDS[number], add_special_tokens=False).input_ids[0]
    row = pipe.text_encoder.get_input_embeddings().weight[class_id].detach()
    tokens = SubjectTokens(row, module=config.module, generator=generator)
    with torch.no_grad():
        for parameter in tokens.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * row.square().mean().sqrt() * noise
    return Lane(
        tokens=(tokens,),
        latents=encode_image(pipe.vae, prepare(picture, 64), config.flip),
        prompts=TrainingPrompts([pipe.tokenizer], config.sentences(), "<it>", [[class_id]], CPU),
        seed=number,
        mask=prepare(picture, 64).mean(0) / 2 + 0.5 if config.attention_loss == "mask" else None,
    )


def make_engine(pipe, lanes, config=CONFIG):
    return Engine(
        unet=pipe.unet,
        text_encoders=[pipe.text_encoder],
        scheduler=pipe.scheduler,
        lanes=lanes,
        config=config,
        dtype=torch.float32,
    )


def steps(engine, count):
    return [engine.step() for _ in range(count)]


def assert_like(engine, lane, alone, results, single, moved_from):
    """Lane `lane` of a batch against lane 0 of an engine of its own: numbers and tokens."""
    for together, by_itself in zip(results, single, strict=True):
        assert together[lane].noise == pytest.approx(by_itself[0].noise, rel=1e-4)
        assert together[lane].subject_loss == pytest.approx(by_itself[0].subject_loss, rel=1e-2)
        assert together[lane].finite == by_itself[0].finite
    wanted = alone.current()
    moved = (wanted - moved_from).abs().max()
    assert moved > 5e-3
    torch.testing.assert_close(engine.current(lane), wanted, rtol=0, atol=0.02 * float(moved))


@pytest.mark.parametrize("module", ["attention", "free"])
def test_three_lanes_are_three_runs(pipe, module):
    config = TrainConfig.from_overrides(CONFIG, {"module": module})
    lanes = [make_lane(pipe, number, config) for number in range(3)]
    engine = make_engine(pipe, lanes, config)
    results = steps(engine, 3)
    for number, lane in enumerate(lanes):
        alone = make_engine(pipe, [lane], config)
        start = lane.tokens[0]().detach()
        assert_like(engine, number, alone, results, steps(alone, 3), start)
    assert len({result.noise for result in results[0]}) == 3
    assert (engine.rows()[1] == engine.current(1)).all()


@pytest.mark.parametrize("loss", ["class", "mask"])
def test_lanes_of_the_other_losses_are_runs_too(pipe, loss):
    config = TrainConfig.from_overrides(CONFIG, {"attention_loss": loss, "weight_lambda": 1.0})
    lanes = [make_lane(pipe, number, config) for number in range(2)]
    results = steps(make_engine(pipe, lanes, config), 1)
    for number, lane in enumerate(lanes):
        single = steps(make_engine(pipe, [lane], config), 1)
        assert results[0][number].subject_loss > 0
        assert results[0][number] == pytest.approx(single[0][0], rel=1e-4)


def test_a_dropped_lane_leaves_the_others_alone(pipe):
    lanes = [make_lane(pipe, number) for number in range(3)]
    engine = make_engine(pipe, lanes)
    results = steps(engine, 2)
    engine.drop(1)
    assert engine.active == (0, 2)
    later = steps(engine, 2)
    assert all(result[1] is None for result in later)
    for number in (0, 2):
        alone = make_engine(pipe, [lanes[number]])
        single = steps(alone, 4)
        start = lanes[number].tokens[0]().detach()
        assert_like(engine, number, alone, results + later, single, start)
    with pytest.raises(KeyError, match="lane 1 is not in training"):
        engine.current(1)
    engine.drop(2)
    engine.drop(0)
    assert engine.step() == [None, None, None]


def test_a_lane_that_is_not_finite_keeps_its_state_and_the_others_train(pipe, monkeypatch):
    lanes = [make_lane(pipe, number) for number in range(3)]
    honest = step_module.noise_loss

    def poisoned(prediction, target):
        loss = honest(prediction, target)
        factor = torch.ones_like(loss)
        factor[2:4] = float("nan")
        return loss * factor

    engine = make_engine(pipe, lanes)
    first = steps(engine, 1)
    before = engine.state_dict(1)
    with monkeypatch.context() as patched:
        patched.setattr(step_module, "noise_loss", poisoned)
        bad = steps(engine, 1)
    assert [result.finite for result in bad[0]] == [True, False, True]
    after = engine.state_dict(1)
    for name in set(before) - {"generator", "step"}:
        assert torch.equal(after[name], before[name]), name
    assert engine.steps_done(1) == 2
    rest = steps(engine, 1)
    assert rest[0][1].finite
    for number in (0, 2):
        alone = make_engine(pipe, [lanes[number]])
        start = lanes[number].tokens[0]().detach()
        assert_like(engine, number, alone, first + bad + rest, steps(alone, 3), start)


def test_a_lane_goes_on_bit_for_bit_from_its_saved_state(pipe):
    lanes = [make_lane(pipe, number) for number in range(2)]
    engine = make_engine(pipe, lanes)
    steps(engine, 2)
    states = [engine.state_dict(lane) for lane in (0, 1)]
    kept = copy.deepcopy(states)
    wanted = steps(engine, 2)
    # Another start, another seed: everything must come from the saved state.
    others = [
        Lane((SubjectTokens(lane.tokens[0].class_embedding),), lane.latents, lane.prompts, seed=77)
        for lane in lanes
    ]
    again = make_engine(pipe, others)
    again.step()
    for lane in (0, 1):
        again.load_state_dict(lane, states[lane])
        assert again.steps_done(lane) == 2
    assert steps(again, 2) == wanted
    for lane in (0, 1):
        assert torch.equal(again.current(lane), engine.current(lane))
        for name, tensor in states[lane].items():
            assert torch.equal(tensor, kept[lane][name]), name


def test_states_of_another_run_are_refused_and_change_nothing(pipe):
    engine = make_engine(pipe, [make_lane(pipe, 0)])
    engine.step()
    state = engine.state_dict()
    name = "exp_avg.slots"
    for bad, message in (
        ({k: v for k, v in state.items() if k != name}, f"no {name}"),
        (state | {name: state[name][:3]}, rf"{name} .*\(3, 48\).*\(10, 48\)"),
        (state | {"scale": state["scale"].double()}, "scale .*float64"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load_state_dict(0, bad)
    now = engine.state_dict()
    assert all(torch.equal(now[key], state[key]) for key in state)


class Imitation:
    """Stands in for a captured graph: rehearses, then runs with the processors it began with."""

    made = 0

    def __init__(self, run, changed, device):
        type(self).made += 1
        rehearse(run, changed)
        self._run = run

    def __call__(self):
        with self.processors.in_place():
            self._run()


def test_a_capture_changes_no_number_and_is_made_anew_only_when_it_must(pipe, monkeypatch):
    lanes = [make_lane(pipe, number) for number in range(3)]
    plain = make_engine(pipe, lanes)
    wanted = steps(plain, 2)
    plain.drop(0)
    wanted += steps(plain, 2)
    fresh = steps(make_engine(pipe, [lanes[2], lanes[0]]), 2)
    monkeypatch.setattr(engine_module, "Replay", Imitation)
    monkeypatch.setattr(engine_module, "wants_capture", lambda setting, device: True)
    monkeypatch.setattr(Imitation, "made", 0)
    engine = make_engine(pipe, lanes)
    Imitation.processors = engine.processors
    got = steps(engine, 2)
    assert Imitation.made == 1
    engine.drop(0)
    got += steps(engine, 2)
    assert Imitation.made == 2
    assert got == wanted
    for lane in (1, 2):
        assert torch.equal(engine.current(lane), plain.current(lane))

    tensors = engine._step._tensors()
    engine.refill([lanes[2], lanes[0]])
    assert steps(engine, 2) == fresh
    assert Imitation.made == 2
    assert tensors["latents.mean"] is engine._step._tensors()["latents.mean"]
    engine.refill(lanes)
    assert steps(engine, 1) == wanted[:1]
    assert Imitation.made == 3


@pytest.mark.parametrize("lost", [False, True])
def test_a_failed_capture_ends_the_run_only_where_the_device_is_lost(pipe, monkeypatch, lost):
    def fails(run, changed, device):
        raise RuntimeError("an illegal memory access was encountered")

    wanted = steps(make_engine(pipe, [make_lane(pipe, 0)]), 1)
    monkeypatch.setattr(engine_module, "Replay", fails)
    monkeypatch.setattr(engine_module, "wants_capture", lambda setting, device: True)
    monkeypatch.setattr(engine_module, "is_lost", lambda device: lost)
    engine = make_engine(pipe, [make_lane(pipe, 0)])
    if lost:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            engine.step()
    else:
        assert steps(engine, 1) == wanted


@pytest.mark.parametrize("loss", ["subject", "class", "mask", "none"])
def test_nothing_in_a_step_is_read_back_to_the_host(pipe, loss, monkeypatch):
    # On CUDA this one reads no value; on a CPU it does.
    monkeypatch.setattr("sefi_fast.prompts.text_encoder._check", lambda *arguments: None)
    config = TrainConfig.from_overrides(CONFIG, {"attention_loss": loss})
    engine = make_engine(pipe, [make_lane(pipe, number, config) for number in range(2)], config)
    engine.step()
    with engine.processors.in_place(), checkpointed(pipe.unet, True), Watch() as watch:
        engine._step()
    assert {"convolution_backward", "lerp_", "addmm"} <= watch.seen
    assert not watch.seen & set(FORBIDDEN), watch.seen & set(FORBIDDEN)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_captured_step_is_the_eager_step(pipe, checkpointing):
    lanes = [on_cuda(make_lane(pipe, number)) for number in range(3)]
    for part in (pipe.unet, pipe.text_encoder):
        part.to("cuda")
    runs = []
    for capture in ("never", "always"):
        config = TrainConfig.from_overrides(CONFIG, {"capture": capture})
        engine = make_engine(pipe, lanes, config)
        with checkpointed(pipe.unet, checkpointing):
            results = steps(engine, 2)
            engine.drop(1)
            results += steps(engine, 2)
        assert (engine._replay is not None) == (capture == "always")
        assert engine._replay is None or isinstance(engine._replay, Replay)
        runs.append((results, engine.current(0), engine.current(2)))
    for eager, captured in zip(runs[0][0], runs[1][0], strict=True):
        for one, other in zip(eager, captured, strict=True):
            assert one == other or one == pytest.approx(other, rel=1e-5)
    for eager, captured in zip(runs[0][1:], runs[1][1:], strict=True):
        torch.testing.assert_close(eager, captured, rtol=1e-5, atol=1e-6)


def on_cuda(lane):
    lane.prompts.input_ids = lane.prompts.input_ids.cuda()
    lane.prompts.slots = lane.prompts.slots.cuda()
    latents = LatentDistribution(lane.latents.mean.cuda(), lane.latents.std.cuda())
    return Lane(lane.tokens, latents, lane.prompts, lane.seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (SubjectTokens(torch.ones(48), stages=4),)}, "number of stages is 5 .* and 4"),
        ({"tokens": (SubjectTokens(torch.ones(48), split=False),)}, "split is True"),
        ({"tokens": (SubjectTokens(torch.ones(3, 48)),)}, "number of vectors is 1 .* and 3"),
        ({"tokens": (SubjectTokens(torch.ones(48), module="free"),)}, "module is attention"),
        ({"mask": torch.ones(64, 64)}, "the side of the mask"),
    ],
)
def test_lanes_that_do_not_fit_are_told_apart(pipe, change, message):
    lane = make_lane(pipe, 0)
    other = Lane(**{**vars(lane), **change})
    with pytest.raises(ValueError, match=f"lanes 0 and 1 .*{message}"):
        make_engine(pipe, [lane, other])


def test_masks_go_with_their_loss_alone(pipe):
    lane = make_lane(pipe, 0)
    wanted = TrainConfig.from_overrides(CONFIG, {"attention_loss": "mask"})
    with pytest.raises(ValueError, match="lane 0 has no mask, but attention_loss is 'mask'"):
        make_engine(pipe, [lane], wanted)
    masked = Lane(**{**vars(lane), "mask": torch.ones(64, 64)})
    with pytest.raises(ValueError, match="lane 0 has a mask, but attention_loss is 'subject'"):
        make_engine(pipe, [masked])
    with pytest.raises(ValueError, match="no lane to train"):
        make_engine(pipe, [])
