"""Packing: lossless, differentiable, unmistakable, and selecting by timestep."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sefi_fast.prompts import pack, packed_stages, select_stage, stage_of, unpack


def make_streams(batch: int, stages: int, tokens: int, width: int = 3, **options) -> torch.Tensor:
    shape = (batch, stages, 2, tokens, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), **options)


sizes = {"batch": st.integers(0, 4), "stages": st.integers(1, 12), "tokens": st.integers(1, 80)}


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_unpack_undoes_pack(batch, stages, tokens):
    streams = make_streams(batch, stages, tokens)
    packed = pack(streams)
    assert packed.shape == (batch, tokens, stages * 7)
    assert not packed[..., 6::7].any()
    assert packed_stages(packed.shape[2], 3) == stages
    restored = unpack(packed, 3)
    assert torch.equal(restored, streams)
    assert restored.data_ptr() == packed.data_ptr()


# Widths of CLIP's and OpenCLIP's text encoders, of both of SDXL, and of T5's.
WIDTHS = [512, 640, 768, 1024, 1280, 1664, 2048, 2304, 4096]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_prompt_of_another_model_is_taken_for_packed(width):
    for other in WIDTHS:
        for times in range(1, 65):
            assert packed_stages(other * times, width) is None
        if other != width:
            for stages in range(1, 61):
                assert packed_stages(stages * (2 * other + 1), width) is None


@settings(max_examples=200, deadline=None)
@given(columns=st.integers(0, 2000), width=st.integers(1, 256))
def test_packed_stages_is_exact(columns, width):
    expected = [s for s in range(1, 1001) if s * (2 * width + 1) == columns]
    assert packed_stages(columns, width) == (expected[0] if expected else None)


def saved_and_loaded(packed):
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    return torch.load(file)


WHAT_HAPPENS_TO_PROMPT_EMBEDS = {
    "cat": (lambda x: torch.cat([x * 0, x])[2:], lambda s: s),
    "zeros_like": (torch.zeros_like, torch.zeros_like),
    "repeat and view": (
        lambda x: x.repeat(1, 3, 1).view(6, x.shape[1], -1),
        lambda s: s.repeat_interleave(3, 0),
    ),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), lambda s: s.repeat_interleave(2, 0)),
    "chunk": (lambda x: x.chunk(2)[1], lambda s: s[1:]),
    "expand": (lambda x: x[:1].expand(3, -1, -1), lambda s: s[:1].expand(3, -1, -1, -1, -1)),
    "float16": (torch.Tensor.half, torch.Tensor.half),
    "bfloat16": (torch.Tensor.bfloat16, torch.Tensor.bfloat16),
    "scaled": (lambda x: x * 0.5, lambda s: s * 0.5),
    "mixed": (lambda x: x[:1].lerp(x[1:], 0.25), lambda s: s[:1].lerp(s[1:], 0.25)),
    "saved": (saved_and_loaded, lambda s: s),
    "weighted": (
        lambda x: torch.cat([x[:, :2], x[:, 2:3] * 1.6, x[:, 3:]], 1),
        lambda s: torch.cat([s[..., :2, :], s[..., 2:3, :] * 1.6, s[..., 3:, :]], -2),
    ),
    "long": (lambda x: torch.cat([x, x], 1), lambda s: torch.cat([s, s], -2)),
    "noisy": (lambda x: x + 1, lambda s: s + 1),
}


@pytest.mark.parametrize("name", WHAT_HAPPENS_TO_PROMPT_EMBEDS)
def test_packed_prompts_survive_what_pipelines_do(name):
    on_packed, on_streams = WHAT_HAPPENS_TO_PROMPT_EMBEDS[name]
    streams = make_streams(2, 5, 4)
    assert torch.equal(unpack(on_packed(pack(streams)), 3), on_streams(streams))


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
    selected = select_stage(pack(streams), 3, timestep)
    assert selected.shape == (batch, tokens, 6)
    for sample in range(batch):
        stage = stage_of(timesteps[sample % count], stages)
        assert torch.equal(selected[sample], torch.cat([*streams[sample, stage]], -1))


@pytest.mark.parametrize(
    "timestep", [400, 400.0, torch.tensor(400), torch.tensor([400.0]), torch.tensor([400] * 3)]
)
def test_every_way_to_give_one_timestep(timestep):
    streams = make_streams(3, 5, 4)
    selected = select_stage(pack(streams), 3, timestep)
    assert torch.equal(selected, torch.cat([*streams[:, 2].unbind(1)], -1))


def test_another_number_of_training_timesteps():
    streams = make_streams(1, 5, 4)
    assert torch.equal(
        select_stage(pack(streams), 3, 25, 50), torch.cat([*streams[:, 2].unbind(1)], -1)
    )


def test_gradients_reach_the_selected_stage_only():
    streams = make_streams(2, 5, 4, requires_grad=True, dtype=torch.float64)
    select_stage(pack(streams), 3, torch.tensor([0, 999])).sum().backward()
    expected = torch.zeros_like(streams)
    expected[0, 0] = 1
    expected[1, 4] = 1
    assert torch.equal(streams.grad, expected)


def test_selecting_compiles_whole():
    streams = make_streams(2, 5, 4)
    packed = pack(streams)
    compiled = torch.compile(select_stage, backend="aot_eager", fullgraph=True)
    for timestep in (torch.tensor(700.5), torch.tensor([10, 990]), 250, 250.0):
        expected = select_stage(packed, 3, timestep)
        assert torch.equal(compiled(packed, 3, timestep), expected)


@pytest.mark.parametrize(
    "shape", [(1, 4, 3), (1, 4, 6), (1, 4, 8), (1, 4, 0), (4, 7), (1, 1, 4, 7)]
)
def test_what_is_not_packed_is_told(shape):
    for function in (unpack, lambda packed, width: select_stage(packed, width, 0)):
        with pytest.raises(ValueError, match="prompt_embeds have the shape"):
            function(torch.zeros(shape), 3)


def test_wrong_streams_and_timesteps_are_told():
    with pytest.raises(ValueError, match="streams must be"):
        pack(torch.zeros(1, 5, 3, 4, 8))
    with pytest.raises(ValueError, match="streams must be"):
        pack(torch.zeros(5, 2, 4, 8))
    with pytest.raises(ValueError, match="2 timesteps for a batch of 3"):
        select_stage(pack(make_streams(3, 5, 4)), 3, torch.tensor([1, 2]))
