"""Keys and values projected once a prompt: equal to projecting each step, dropped in time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from models import make_unet
from torch import nn

from sefi_fast import projection_cache
from sefi_fast.conditioning import pack, unpack
from sefi_fast.conditioning.stage_hook import install_stage_hook
from sefi_fast.layers import cross_attention_layers
from sefi_fast.processor import SeFiAttnProcessor

BATCH, STAGES, TOKENS, WIDTH = 2, 4, 7, 24


def unet_inputs():
    torch.manual_seed(5)
    return torch.randn(BATCH, 4, 16, 16), torch.tensor(420)


@pytest.fixture
def split_unet():
    """A U-Net with split-stream processors on its cross-attention layers, and its stage hook."""
    unet = make_unet(WIDTH)
    for attn in cross_attention_layers(unet).values():
        attn.set_processor(SeFiAttnProcessor(split_streams=True))
    install_stage_hook(unet, TOKENS, 1000)
    return unet


def packed_prompt(seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(BATCH, STAGES, 2, TOKENS, WIDTH, generator=generator))


@pytest.fixture
def projections(split_unet, monkeypatch):
    """Counts the calls of to_k and to_v, by layer."""
    names = {}
    for name, attn in cross_attention_layers(split_unet).items():
        names[id(attn.to_k)], names[id(attn.to_v)] = f"{name}.to_k", f"{name}.to_v"
    counts = dict.fromkeys(names.values(), 0)
    forward = nn.Linear.forward

    def counted(self, x):
        if id(self) in names:
            counts[names[id(self)]] += 1
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    return counts


@torch.no_grad()
def without_reuse(unet, sample, timestep, packed):
    """The same through fresh prompts, of which nothing can be kept."""
    streams = unpack(packed, TOKENS)
    stage = (timestep.reshape(-1) * STAGES / 1000).long().expand(BATCH)
    chosen = streams[torch.arange(BATCH), stage]
    return unet(sample, timestep, pack(chosen[:, None])).sample


def test_a_prompt_is_projected_once_for_all_steps(split_unet, projections):
    sample, _ = unet_inputs()
    packed = packed_prompt()
    steps = [torch.tensor(t) for t in (960, 700, 510, 499, 251, 10)]
    with torch.no_grad():
        outputs = [split_unet(sample, t, packed).sample for t in steps]
        again = split_unet(sample, steps[0], packed).sample
    assert set(projections.values()) == {1}
    assert torch.equal(outputs[0], again)
    for t, output in zip(steps, outputs, strict=True):
        expected = without_reuse(split_unet, sample, t, packed)
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("length", [TOKENS, 2 * TOKENS, 3])
def test_a_plain_prompt_is_projected_once_too(split_unet, projections, length):
    sample, timestep = unet_inputs()
    plain = torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = [split_unet(sample, torch.tensor(t), plain).sample for t in (900, 420)]
        assert set(projections.values()) == {1}
        plain.mul_(-1)
        changed = split_unet(sample, timestep, plain).sample
        assert set(projections.values()) == {2}
    size = sum(part.numel() * 4 for _, *both in plain.sefi_projections.values() for part in both)
    assert plain.sefi_projected_bytes == size
    expected = split_unet(sample, timestep, -plain).sample
    torch.testing.assert_close(outputs[1], expected, rtol=0, atol=2e-5)
    expected = split_unet(sample, timestep, plain.clone()).sample
    torch.testing.assert_close(changed, expected, rtol=0, atol=2e-5)


def test_each_sample_gets_the_stage_of_its_own_timestep(split_unet):
    sample, _ = unet_inputs()
    packed = packed_prompt()
    timesteps = torch.tensor([900.25, 120.5])
    with torch.no_grad():
        first = split_unet(sample, timesteps, packed).sample
        second = split_unet(sample, timesteps, packed).sample
    expected = without_reuse(split_unet, sample, timesteps, packed)
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-5)
    assert torch.equal(first, second)


def test_slices_of_a_prompt_share_what_the_prompt_keeps(split_unet, projections):
    sample, timestep = unet_inputs()
    doubled = torch.cat([packed_prompt(1), packed_prompt(0)])
    with torch.no_grad():
        for _ in range(3):
            output = split_unet(sample, timestep, doubled.chunk(2)[1]).sample
        assert set(projections.values()) == {1}
        other = split_unet(sample, timestep, doubled.chunk(2)[0]).sample
    expected = without_reuse(split_unet, sample, timestep, packed_prompt(0))
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
    expected = without_reuse(split_unet, sample, timestep, packed_prompt(1))
    torch.testing.assert_close(other, expected, rtol=0, atol=2e-5)


def change_in_place(unet, packed):
    layer = next(iter(cross_attention_layers(unet).values()))
    with torch.no_grad():
        layer.to_v.weight.mul_(3)


def change_by_replacing(unet, packed):
    layer = next(iter(cross_attention_layers(unet).values()))
    layer.to_k.weight = nn.Parameter(layer.to_k.weight * -2)


def change_data(unet, packed):
    layer = next(iter(cross_attention_layers(unet).values()))
    layer.to_v.weight.data = layer.to_v.weight.data * 3


def change_through_an_adapter(unet, packed):
    """As peft does: other weights while an adapter is in place, of which nothing tells later."""
    layer = next(iter(cross_attention_layers(unet).values()))
    plain = layer.to_v
    layer.to_v = nn.Sequential(plain)
    unet(*unet_inputs(), packed)
    plain.weight.data.mul_(3)
    layer.to_v = plain


def change_prompt(unet, packed):
    packed.mul_(-1)


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_by_replacing,
        change_data,
        change_through_an_adapter,
        change_prompt,
    ],
)
def test_what_is_kept_is_dropped_when_weights_or_prompt_change(split_unet, change):
    sample, timestep = unet_inputs()
    packed = packed_prompt()
    with torch.no_grad():
        before = split_unet(sample, timestep, packed).sample
        change(split_unet, packed)
        after = split_unet(sample, timestep, packed).sample
    assert (after - before).abs().max() > 1e-3
    expected = without_reuse(split_unet, sample, timestep, packed)
    torch.testing.assert_close(after, expected, rtol=0, atol=5e-5)


def test_nothing_is_kept_with_gradients_or_adapted_projections_or_inference_tensors(
    split_unet, projections
):
    sample, timestep = unet_inputs()
    packed = packed_prompt().requires_grad_()
    split_unet(sample, timestep, packed).sample.sum().backward()
    assert packed.grad.abs().max() > 0
    assert not hasattr(packed, "sefi_projections")
    with torch.inference_mode():
        inner = packed.detach().clone()
        expected = split_unet(sample, timestep, inner).sample
    assert not hasattr(inner, "sefi_projections")
    with torch.no_grad():
        layer = next(iter(cross_attention_layers(split_unet).values()))
        plain = layer.to_k
        layer.to_k = nn.Sequential(plain)
        packed = packed_prompt()
        before = projections["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
        for _ in range(3):
            output = split_unet(sample, timestep, packed).sample
    assert projections["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"] == before + 3
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_beyond_a_limit_layers_project_at_each_step(split_unet, projections, monkeypatch, share):
    sample, timestep = unet_inputs()
    packed = packed_prompt()
    with torch.no_grad():
        split_unet(sample, timestep, packed)
    entries = packed.sefi_projections.values()
    size = sum(part.numel() * part.element_size() for _, *both in entries for part in both)
    assert packed.sefi_projected_bytes == size
    monkeypatch.setattr(projection_cache, "MOST_BYTES", int(size * share))
    projections.update(dict.fromkeys(projections, 0))
    again = packed_prompt()
    with torch.no_grad():
        for _ in range(3):
            output = split_unet(sample, timestep, again).sample
    assert set(projections.values()) == ({3} if share == 0 else {1, 3})
    assert getattr(again, "sefi_projected_bytes", 0) <= size * share
    expected = without_reuse(split_unet, sample, timestep, packed)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)


def test_what_is_kept_dies_with_the_prompt(split_unet):
    sample, timestep = unet_inputs()
    packed = packed_prompt()
    with torch.no_grad():
        split_unet(sample, timestep, packed)
    entry = next(iter(packed.sefi_projections.values()))
    kept = weakref.ref(entry[1])
    del entry, packed
    gc.collect()
    assert kept() is None


def test_autocast_and_full_precision_do_not_share_what_is_kept(split_unet):
    sample, timestep = unet_inputs()
    packed = packed_prompt()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = split_unet(sample, timestep, packed).sample
        after = split_unet(sample, timestep, packed).sample
        expected = split_unet(sample, timestep, packed_prompt()).sample
    assert torch.equal(after, expected)
    torch.testing.assert_close(low.float(), expected, rtol=0, atol=0.1)
