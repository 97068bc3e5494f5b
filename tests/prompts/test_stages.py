"""Stages of timesteps, packed prompts, and the hook that selects a stage for a model."""

from __future__ import annotations

import copy
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sefi_fast.prompts import (
    install_stage_hook,
    pack,
    packed_stages,
    select_stage,
    stage_of,
    unpack,
)

SAMPLE = torch.zeros(2, 1)


def make_streams(batch=2, stages=5, tokens=4, width=3, **options) -> torch.Tensor:
    shape = (batch, stages, 2, tokens, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), **options)


def side_by_side(streams: torch.Tensor) -> torch.Tensor:
    """[…, 2, M, C] to […, M, 2·C]."""
    return torch.cat([*streams.unbind(-3)], -1)


@pytest.mark.parametrize("stages", [1, 3, 7, 10, 60])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("total", [1000, 999, 50])
def test_the_stage_of_all_whole_timesteps(stages, dtype, total):
    found = stage_of(torch.arange(total).to(dtype), stages, total)
    assert found.dtype == torch.int64
    assert found.tolist() == [t * stages // total for t in range(total)]


@settings(max_examples=200, deadline=None)
@given(timestep=st.floats(0, 999.875, width=32), stages=st.integers(1, 60))
def test_the_stage_of_fractional_timesteps(timestep, stages):
    exact = Fraction(timestep) * stages / 1000
    near_a_border = abs(exact - round(exact)) < Fraction(1, 10**4)
    possible = {int(exact), min(round(exact), stages - 1)} if near_a_border else {int(exact)}
    assert stage_of(torch.tensor(timestep), stages).item() in possible


@pytest.mark.parametrize(
    ("timestep", "stages", "expected"),
    [
        (torch.tensor([-3, 1000, 5000]), 5, [0, 4, 4]),
        (torch.tensor([-0.5, 1000.0, 1e6]), 5, [0, 4, 4]),
        (600, 5, 3),
        (600.0, 5, 3),
        # 999 · 60 is beyond the range of float16.
        (torch.tensor(999.0, dtype=torch.float16), 60, 59),
    ],
)
def test_the_stage_of_other_timesteps(timestep, stages, expected):
    assert stage_of(timestep, stages).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(0, 4), stages=st.integers(1, 12), tokens=st.integers(1, 80))
def test_unpack_undoes_pack(batch, stages, tokens):
    streams = make_streams(batch, stages, tokens)
    packed = pack(streams)
    assert packed.shape == (batch, tokens, stages * 7)
    assert not packed[..., 6::7].any()
    restored = unpack(packed, 3)
    assert torch.equal(restored, streams)
    assert restored.data_ptr() == packed.data_ptr()


# Widths of CLIP's and OpenCLIP's text encoders, of both of SDXL, and of T5's.
WIDTHS = [512, 640, 768, 1024, 1280, 1664, 2048, 2304, 4096]


@pytest.mark.parametrize("width", WIDTHS)
def test_prompts_of_other_models_do_not_pass_for_packed(width):
    for other in WIDTHS:
        for times in range(1, 65):
            assert packed_stages(other * times, width) is None
            expected = times if other == width else None
            assert packed_stages(times * (2 * other + 1), width) == expected
    assert packed_stages(0, width) is None


TREATMENTS = {
    "cat": (lambda x: torch.cat([x * 0, x])[2:], lambda s: s),
    "repeat and view": (
        lambda x: x.repeat(1, 3, 1).view(6, x.shape[1], -1),
        lambda s: s.repeat_interleave(3, 0),
    ),
    "expand": (lambda x: x[:1].expand(3, -1, -1), lambda s: s[:1].expand(3, -1, -1, -1, -1)),
    "mixed": (lambda x: x[:1].lerp(x[1:], 0.25), lambda s: s[:1].lerp(s[1:], 0.25)),
    "weighted": (
        lambda x: torch.cat([x[:, :2], x[:, 2:3] * 1.6, x[:, 3:]], 1),
        lambda s: torch.cat([s[..., :2, :], s[..., 2:3, :] * 1.6, s[..., 3:, :]], -2),
    ),
    "long": (lambda x: torch.cat([x, x], 1), lambda s: torch.cat([s, s], -2)),
}


@pytest.mark.parametrize("name", TREATMENTS)
def test_packed_prompts_survive_the_treatment_of_pipelines(name):
    on_packed, on_streams = TREATMENTS[name]
    streams = make_streams()
    assert torch.equal(unpack(on_packed(pack(streams)), 3), on_streams(streams))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    stages=st.integers(1, 12),
    per_sample=st.booleans(),
    fractional=st.booleans(),
    data=st.data(),
)
def test_select_stage(batch, stages, per_sample, fractional, data):
    streams = make_streams(batch, stages)
    number = st.floats(0, 999, width=32) if fractional else st.integers(0, 999)
    timesteps = [data.draw(number) for _ in range(batch if per_sample else 1)]
    selected = select_stage(
        pack(streams), 3, torch.tensor(timesteps) if per_sample else timesteps[0]
    )
    for sample in range(batch):
        stage = stage_of(timesteps[sample % len(timesteps)], stages)
        assert torch.equal(selected[sample], side_by_side(streams[sample, stage]))


def test_gradients_reach_the_selected_stage_only():
    streams = make_streams(requires_grad=True, dtype=torch.float64)
    select_stage(pack(streams), 3, torch.tensor([0, 999])).sum().backward()
    expected = torch.zeros_like(streams)
    expected[0, 0] = expected[1, 4] = 1
    assert torch.equal(streams.grad, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stage_of(10, 0, 1000), "stages must be at least 1"),
        (lambda: stage_of(10, 5, 0), "num_train_timesteps must be at least 1"),
        (lambda: pack(torch.zeros(1, 5, 3, 4, 8)), "streams must be"),
        (lambda: pack(torch.zeros(5, 2, 4, 8)), "streams must be"),
        (
            lambda: select_stage(pack(make_streams(3)), 3, torch.tensor([1, 2])),
            "2 timesteps for a batch of 3",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Seer(nn.Module):
    """A model that returns the prompt that reaches it."""

    def forward(self, sample, timestep, encoder_hidden_states=None, extra=None):
        return encoder_hidden_states


@pytest.fixture
def seer():
    model = Seer()
    model.handle = install_stage_hook(model, 3)
    return model


@pytest.mark.parametrize(
    "timestep", [650, 650.0, torch.tensor(650), torch.tensor([650.0]), torch.tensor([650.5] * 2)]
)
def test_the_hook_takes_every_way_of_calling(seer, timestep):
    streams = make_streams()
    packed, expected = pack(streams), side_by_side(streams[:, 3])
    for args, kwargs in [
        ((SAMPLE, timestep, packed, None), {}),
        ((SAMPLE, timestep), {"encoder_hidden_states": packed}),
        ((), {"sample": SAMPLE, "timestep": timestep, "encoder_hidden_states": packed, "extra": 1}),
    ]:
        assert torch.equal(seer(*args, **kwargs), expected)


@pytest.mark.parametrize("length", [1, 3, 4, 7, 9, 41, 42])
def test_plain_prompts_pass_the_hook(seer, length):
    prompt = torch.randn(2, length, 3)
    assert seer(SAMPLE, 500, prompt) is prompt
    assert seer(SAMPLE, 500) is None and seer(SAMPLE, 500, None) is None


@pytest.mark.parametrize(
    "shape", [(2, 4, 4), (2, 4, 6), (2, 4, 8), (2, 4, 0), (4, 3), (2, 1, 4, 3), (1, 1, 4, 7)]
)
def test_prompts_that_are_neither_plain_nor_packed_are_refused(seer, shape):
    for call in (lambda x: seer(SAMPLE, 500, x), lambda x: unpack(x, 3)):
        with pytest.raises(ValueError, match=r"takes \[B, M, 3\], or packed \[B, M, stages·7\]"):
            call(torch.zeros(shape))


def test_the_hook_comes_first_once_and_goes(seer):
    packed, seen = pack(make_streams()), []
    seer.register_forward_pre_hook(lambda _, args, kw: seen.append(args[2].shape), with_kwargs=True)
    with pytest.raises(ValueError, match="Seer has a stage hook already"):
        install_stage_hook(seer, 3)
    seer.handle.remove()
    install_stage_hook(seer, 3)
    copied = copy.deepcopy(seer)
    assert seer(SAMPLE, 500, packed).shape == seen[-1] == (2, 4, 6)
    plain = Seer()
    install_stage_hook(plain, 3).remove()
    assert not plain._forward_pre_hooks and not plain._forward_pre_hooks_with_kwargs
    assert copied(SAMPLE, 500, packed).shape == (2, 4, 6)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("timestep", [torch.tensor([100.5, 900]), 300, 301.5])
def test_a_hooked_model_compiles_into_one_graph(seer, wrapped, grad, timestep):
    torch._dynamo.reset()
    streams = make_streams()
    compiled = torch.compile(seer, backend="aot_eager", fullgraph=True) if wrapped else seer
    if not wrapped:
        seer.compile(backend="aot_eager", fullgraph=True)
    stages = (torch.as_tensor(timestep).expand(2) * 5 / 1000).long()
    with torch.set_grad_enabled(grad):
        found = compiled(SAMPLE, timestep, pack(streams.requires_grad_(grad)))
    assert torch.equal(found, side_by_side(streams[torch.arange(2), stages]))


def test_a_schedule_is_compiled_once_and_a_hook_noticed():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = Seer()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    packed = pack(make_streams())
    with torch.no_grad():
        assert compiled(SAMPLE, torch.tensor(3.0), packed).shape == packed.shape
        handle = install_stage_hook(model, 3)
        assert compiled(SAMPLE, torch.tensor(3.0), packed).shape == (2, 4, 6)
        count = len(graphs)
        for timestep in torch.linspace(999, 0, 20):
            compiled(SAMPLE, timestep, packed)
        assert len(graphs) == count
        handle.remove()
        assert compiled(SAMPLE, torch.tensor(3.0), packed).shape == packed.shape


class PooledSeer(nn.Module):
    """SDXL's U-Net as a model that returns the pooled embedding that reaches it."""

    config = SimpleNamespace(
        addition_embed_type="text_time",
        projection_class_embeddings_input_dim=7 + 6 * 2,
        addition_time_embed_dim=2,
    )

    def forward(self, sample, timestep, prompt, class_labels=None, added_cond_kwargs=None):
        return added_cond_kwargs["text_embeds"]


def test_pooled_embeddings_follow_the_stage():
    model, prompt = PooledSeer(), pack(make_streams())
    install_stage_hook(model, 3)

    def run(pooled, timestep, ids=6, positional=False):
        added = {"text_embeds": pooled, "time_ids": torch.zeros(2, ids)}
        if positional:
            return model(SAMPLE, timestep, prompt, None, added)
        return model(SAMPLE, timestep, prompt, added_cond_kwargs=added)

    five, two = torch.randn(2, 5, 7), torch.randn(2, 2, 7)
    for timestep in (650.5, torch.tensor([650, 650])):
        for positional in (True, False):
            assert torch.equal(run(five.flatten(1), timestep, positional=positional), five[:, 3])
    found = run(two.flatten(1), torch.tensor([499, 500]))
    assert torch.equal(found, torch.stack([two[0, 0], two[1, 1]]))
    assert run(two[:, 0], 999).shape == (2, 7)
    # A model with fewer time ids has the wider pooled embedding.
    wide = torch.randn(2, 18)
    assert torch.equal(run(wide, 999, ids=5), wide[:, 9:])
    with pytest.raises(ValueError, match="of 8 numbers are neither one embedding of this model"):
        run(torch.zeros(2, 8), 999)
