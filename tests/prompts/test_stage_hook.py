"""The stage hook on real U-Nets and ControlNets, and whole-graph compiled."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from models import make_controlnet, make_unet
from torch import nn

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.pipelines.model_patch import hook_streams
from sefi_fast.prompts import install_stage_hook, pack


class Seer(nn.Module):
    """Has the call of a U-Net and gives back what prompt reached it."""

    def forward(self, sample, timestep, encoder_hidden_states=None, extra=None):
        return encoder_hidden_states


class Mixer(nn.Module):
    """A small model with a weight, to compile."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, sample, timestep, encoder_hidden_states):
        key, value = encoder_hidden_states.chunk(2, dim=-1)
        return self.linear(key) + 2 * value + sample


def make_streams(batch: int = 2, stages: int = 5, tokens: int = 4, width: int = 3) -> torch.Tensor:
    shape = (batch, stages, 2, tokens, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


sample = torch.zeros(2, 1)


@pytest.mark.parametrize("timestep", [650, 650.0, torch.tensor(650), torch.tensor([650.5, 650.5])])
def test_every_way_of_calling(timestep):
    streams = make_streams()
    packed = pack(streams)
    model = Seer()
    install_stage_hook(model, 3)
    expected = torch.cat([*streams[:, 3].unbind(1)], -1)
    assert torch.equal(model(sample, timestep, packed), expected)
    assert torch.equal(model(sample, timestep, packed, None), expected)
    assert torch.equal(model(sample, timestep, encoder_hidden_states=packed), expected)
    assert torch.equal(
        model(sample=sample, timestep=timestep, encoder_hidden_states=packed, extra=1), expected
    )


def test_one_timestep_a_sample():
    streams = make_streams()
    model = Seer()
    install_stage_hook(model, 3)
    found = model(sample, torch.tensor([0, 999]), pack(streams))
    assert torch.equal(found[0], torch.cat([*streams[0, 0]], -1))
    assert torch.equal(found[1], torch.cat([*streams[1, 4]], -1))


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 9, 17, 41, 42])
def test_a_plain_prompt_of_any_length_is_left_alone(length):
    prompt = torch.randn(2, length, 3)
    model = Seer()
    install_stage_hook(model, 3)
    assert model(sample, 500, prompt) is prompt


@pytest.mark.parametrize(
    "shape", [(2, 4, 4), (2, 4, 6), (2, 4, 8), (2, 4, 0), (4, 3), (2, 1, 4, 3)]
)
def test_what_is_neither_plain_nor_packed_is_refused(shape):
    model = Seer()
    install_stage_hook(model, 3)
    with pytest.raises(ValueError, match=r"takes \[B, M, 3\], or packed \[B, M, stages·7\]"):
        model(sample, 500, torch.zeros(shape))


def test_no_prompt_is_left_alone():
    model = Seer()
    install_stage_hook(model, 3)
    assert model(sample, 500) is None
    assert model(sample, 500, None) is None


def test_removal_leaves_nothing():
    model = Seer()
    handle = install_stage_hook(model, 3)
    assert len(model._forward_pre_hooks) == 1
    handle.remove()
    handle.remove()
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    prompt = pack(make_streams())
    assert model(sample, 500, prompt) is prompt


def test_a_second_hook_is_refused_until_the_first_is_gone():
    model = Seer()
    handle = install_stage_hook(model, 3)
    with pytest.raises(ValueError, match="Seer has a stage hook already"):
        install_stage_hook(model, 3)
    handle.remove()
    install_stage_hook(model, 3).remove()
    with pytest.raises(ValueError, match="width must be"):
        install_stage_hook(model, 0)


def test_it_runs_before_hooks_that_were_there():
    model = Seer()
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kw: seen.append(args[2].shape), with_kwargs=True
    )
    install_stage_hook(model, 3)
    model(sample, 500, pack(make_streams()))
    assert seen == [(2, 4, 6)]


def test_a_copied_model_has_a_hook_of_its_own():
    model = Seer()
    handle = install_stage_hook(model, 3)
    copied = copy.deepcopy(model)
    handle.remove()
    packed = pack(make_streams())
    assert model(sample, 500, packed) is packed
    assert copied(sample, 500, packed).shape == (2, 4, 6)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("timestep", [torch.tensor(100), torch.tensor([100.5, 900]), 300, 301.5])
def test_it_compiles_into_one_graph(wrapped, grad, timestep):
    torch._dynamo.reset()
    streams = make_streams()
    packed = pack(streams)
    model = Mixer()
    reference = copy.deepcopy(model)
    noise = torch.randn(2, 4, 3)
    install_stage_hook(model, 3)
    if wrapped:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        model.compile(backend="aot_eager", fullgraph=True)
        compiled = model
    each = torch.as_tensor(timestep).expand(2)
    chosen = torch.cat([*streams[torch.arange(2), (each * 5 / 1000).long()].unbind(1)], -1)
    with torch.set_grad_enabled(grad):
        expected = reference(noise, timestep, chosen)
        torch.testing.assert_close(compiled(noise, timestep, packed), expected)


def test_a_schedule_is_compiled_once():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = Mixer()
    install_stage_hook(model, 3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    packed = pack(make_streams())
    counts = []
    with torch.no_grad():
        for timestep in torch.linspace(999, 0, 20):
            compiled(torch.zeros(2, 4, 3), timestep, packed)
            counts.append(len(graphs))
    assert counts == counts[:1] * 20


def test_a_model_compiled_before_notices_the_hook():
    torch._dynamo.reset()
    model = Seer()
    compiled = torch.compile(model, backend="eager")
    packed = pack(make_streams())
    with torch.no_grad():
        assert compiled(sample, torch.tensor(3), packed).shape == packed.shape
        handle = install_stage_hook(model, 3)
        assert compiled(sample, torch.tensor(3), packed).shape == (2, 4, 6)
        handle.remove()
        assert compiled(sample, torch.tensor(3), packed).shape == packed.shape


@pytest.mark.parametrize("kind", ["unet", "controlnet"])
@torch.no_grad()
def test_real_models_run_on_the_selected_stage(kind):
    unet = make_unet(16)
    model = unet if kind == "unet" else make_controlnet(unet)
    # Tied streams, so that the bare model on one stream is the expected result.
    streams = make_streams(2, 5, 7, 16)
    streams[:, :, 1] = streams[:, :, 0]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([250, 850])
    keywords = {"controlnet_cond": torch.rand(2, 3, 128, 128)} if kind == "controlnet" else {}

    def run(prompt):
        call = {"encoder_hidden_states": prompt, "return_dict": False, **keywords}
        output = model(noise, timesteps, **call)
        return output[0] if kind == "unet" else output[1]

    expected = run(torch.stack([streams[0, 1, 0], streams[1, 4, 0]]))
    other = run(torch.stack([streams[0, 0, 0], streams[1, 3, 0]]))
    install_stage_hook(model, 16)
    for attn in cross_attention_layers(model).values():
        hook_streams(attn)
    found = run(pack(streams))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - other).abs().max() > 1e-3


class PooledSeer(nn.Module):
    """Has the call of SDXL's U-Net and gives back the pooled embedding that reached it."""

    config = SimpleNamespace(
        addition_embed_type="text_time",
        projection_class_embeddings_input_dim=7 + 6 * 2,
        addition_time_embed_dim=2,
    )

    def forward(self, sample, timestep, prompt, class_labels=None, added_cond_kwargs=None):
        return added_cond_kwargs["text_embeds"]


@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize("timestep", [650.5, torch.tensor([650, 650])])
def test_pooled_embeddings_follow_the_stage(timestep, positional):
    model = PooledSeer()
    install_stage_hook(model, 3)
    prompt = pack(make_streams())
    pooled = torch.randn(2, 5, 7)
    added = {"text_embeds": pooled.flatten(1), "time_ids": torch.zeros(2, 6)}
    if positional:
        found = model(sample, timestep, prompt, None, added)
    else:
        found = model(sample, timestep, prompt, added_cond_kwargs=added)
    assert torch.equal(found, pooled[:, 3])
    assert added["text_embeds"].shape == (2, 35)


def test_pooled_embeddings_of_other_stages_and_samples():
    model = PooledSeer()
    install_stage_hook(model, 3)
    prompt, time_ids = pack(make_streams()), torch.zeros(2, 6)
    pooled = torch.randn(2, 2, 7)
    added = {"text_embeds": pooled.flatten(1), "time_ids": time_ids}
    found = model(sample, torch.tensor([499, 500]), prompt, added_cond_kwargs=added)
    assert torch.equal(found, torch.stack([pooled[0, 0], pooled[1, 1]]))
    plain = {"text_embeds": pooled[:, 0], "time_ids": time_ids}
    assert model(sample, 999, prompt, added_cond_kwargs=plain) is plain["text_embeds"]
    # A model with fewer time ids has the wider pooled embedding.
    wide = {"text_embeds": torch.randn(2, 18), "time_ids": time_ids[:, :5]}
    assert torch.equal(
        model(sample, 999, prompt, added_cond_kwargs=wide), wide["text_embeds"][:, 9:]
    )
    with pytest.raises(
        ValueError, match=r"of 8 numbers are neither one embedding of this model \(7"
    ):
        model(sample, 999, prompt, added_cond_kwargs=plain | {"text_embeds": torch.zeros(2, 8)})
