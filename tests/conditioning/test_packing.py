"""Packing: lossless, differentiable, unmistakable, and selecting by timestep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sefi_fast.conditioning import pack, packed_stages, select_stage, stage_of, unpack


def make_streams(batch: int, stages: int, tokens: int, width: int = 3, **options) -> torch.Tensor:
    shape = (batch, stages, 2, tokens, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), **options)


sizes = {"batch": st.integers(0, 4), "stages": st.integers(1, 12), "tokens": st.integers(1, 80)}


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_unpack_undoes_pack(batch, stages, tokens):
    streams = make_streams(batch, stages, tokens)
    packed = pack(streams)
    assert packed.shape == (batch, stages * 2 * tokens + 1, 3)
    assert not packed[:, -1].any()
    assert packed_stages(packed.shape[1], tokens) == stages
    restored = unpack(packed, tokens)
    assert torch.equal(restored, streams)
    assert restored.data_ptr() == packed.data_ptr()


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(2, 256), multiple=st.integers(1, 200))
def test_no_plain_prompt_is_taken_for_packed(tokens, multiple):
    assert packed_stages(tokens * multiple, tokens) is None


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 2000), tokens=st.integers(1, 256))
def test_packed_stages_is_exact(length, tokens):
    expected = [s for s in range(1, 1001) if s * 2 * tokens + 1 == length]
    assert packed_stages(length, tokens) == (expected[0] if expected else None)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    stages=st.integers(1, 12),
    tokens=st.integers(1, 9),
    per_sample=st.booleans(),
    fractional=st.booleans(),
    data=st.data(),
)
def test_select_stage(batch, stages, tokens, per_sample, fractional, data):
    streams = make_streams(batch, stages, tokens)
    number = st.floats(0, 999, width=32) if fractional else st.integers(0, 999)
    count = batch if per_sample else 1
    timesteps = [data.draw(number) for _ in range(count)]
    timestep = torch.tensor(timesteps) if per_sample else timesteps[0]
    selected = select_stage(pack(streams), tokens, timestep)
    assert selected.shape == (batch, 2 * tokens, 3)
    for sample in range(batch):
        stage = stage_of(timesteps[sample % count], stages)
        assert torch.equal(selected[sample], streams[sample, stage].flatten(0, 1))


@pytest.mark.parametrize(
    "timestep", [400, 400.0, torch.tensor(400), torch.tensor([400.0]), torch.tensor([400] * 3)]
)
def test_every_way_to_give_one_timestep(timestep):
    streams = make_streams(3, 5, 4)
    selected = select_stage(pack(streams), 4, timestep)
    assert torch.equal(selected, streams[:, 2].flatten(1, 2))


def test_another_number_of_training_timesteps():
    streams = make_streams(1, 5, 4)
    assert torch.equal(select_stage(pack(streams), 4, 25, 50), streams[:, 2].flatten(1, 2))


def test_gradients_reach_the_selected_stage_only():
    streams = make_streams(2, 5, 4, requires_grad=True, dtype=torch.float64)
    select_stage(pack(streams), 4, torch.tensor([0, 999])).sum().backward()
    expected = torch.zeros_like(streams)
    expected[0, 0] = 1
    expected[1, 4] = 1
    assert torch.equal(streams.grad, expected)


def test_selecting_compiles_whole():
    streams = make_streams(2, 5, 4)
    packed = pack(streams)
    compiled = torch.compile(select_stage, backend="aot_eager", fullgraph=True)
    for timestep in (torch.tensor(700.5), torch.tensor([10, 990]), 250, 250.0):
        expected = select_stage(packed, 4, timestep)
        assert torch.equal(compiled(packed, 4, timestep), expected)


@pytest.mark.parametrize(
    ("shape", "tokens"), [((1, 42, 3), 5), ((1, 40, 3), 4), ((1, 1, 3), 4), ((41, 3), 4)]
)
def test_what_is_not_packed_is_told(shape, tokens):
    for function in (unpack, lambda packed, tokens: select_stage(packed, tokens, 0)):
        with pytest.raises(ValueError, match="packed prompt is"):
            function(torch.zeros(shape), tokens)


def test_wrong_streams_and_timesteps_are_told():
    with pytest.raises(ValueError, match="streams must be"):
        pack(torch.zeros(1, 5, 3, 4, 8))
    with pytest.raises(ValueError, match="streams must be"):
        pack(torch.zeros(5, 2, 4, 8))
    with pytest.raises(ValueError, match="2 timesteps for a batch of 3"):
        select_stage(pack(make_streams(3, 5, 4)), 4, torch.tensor([1, 2]))
