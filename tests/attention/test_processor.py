"""SeFiAttnProcessor against AttnProcessor2_0 and against its definition."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from sefi_fast.attention.processor import (
    LayerRecord,
    PromptState,
    SeFiAttnProcessor,
    TrainingProcessor,
)
from sefi_fast.attention.regions import RegionPrompts
from sefi_fast.errors import BackendError, ModelError

BATCH, TOKENS, WIDTH, HEADS, HEAD_DIM = 2, 7, 24, 3, 8
INNER = HEADS * HEAD_DIM
CROSS = {"cross_attention_dim": WIDTH}
TIGHT = {"rtol": 0, "atol": 1e-6}


def make_attention(**options) -> Attention:
    torch.manual_seed(3)
    settings = {"query_dim": INNER, "heads": HEADS, "dim_head": HEAD_DIM} | options
    attn = Attention(**settings).eval()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attn


@pytest.fixture
def attn() -> Attention:
    return make_attention(**CROSS)


@pytest.fixture
def hidden_states() -> torch.Tensor:
    return torch.randn(BATCH, 20, INNER)


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH)


def run(attn: Attention, processor, *args, **kwargs) -> torch.Tensor:
    attn.set_processor(processor)
    with torch.no_grad():
        return attn(*args, **kwargs)


def exact_attention(attn: Attention, hidden_states, key_prompt, value_prompt, mask=None):
    """(output, probabilities [B, H, N, M]) in float64, from the definition."""

    def heads(linear, x):
        projected = x.double() @ linear.weight.double().T
        return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    query, key = heads(attn.to_q, hidden_states), heads(attn.to_k, key_prompt)
    scores = query @ key.transpose(-1, -2) * attn.scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    probabilities = scores.softmax(-1)
    output = (probabilities @ heads(attn.to_v, value_prompt)).transpose(1, 2).flatten(2)
    out = attn.to_out[0]
    return output @ out.weight.double().T + out.bias.double(), probabilities


def key_mask() -> torch.Tensor:
    mask = torch.rand(BATCH, TOKENS) > 0.4
    mask[:, 0] = True
    return mask


def bias_of(mask: torch.Tensor) -> torch.Tensor:
    return (1 - mask.float()) * -10000.0


GROUP_NORM = {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4}
CASES = {
    "self": {},
    "cross": CROSS,
    "bias, residual and rescale": {
        "bias": True,
        "residual_connection": True,
        "rescale_output_factor": 1.7,
    },
    "group norm": {"norm_num_groups": 4},
    "layer norm of the prompt": {**CROSS, "cross_attention_norm": "layer_norm"},
    "group norm of the prompt": {**CROSS, **GROUP_NORM},
    "norm of query and key": {**CROSS, "qk_norm": "layer_norm"},
    "rms norm of query and key": {"qk_norm": "rms_norm"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_attn_processor_2_0(case, dtype, hidden_states, prompt):
    attn = make_attention(**CASES[case]).to(dtype)
    hidden_states = hidden_states.to(dtype)
    prompt = prompt.to(dtype) if attn.is_cross_attention else None
    expected = run(attn, AttnProcessor2_0(), hidden_states, prompt)
    actual = run(attn, SeFiAttnProcessor(), hidden_states, prompt)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("spatial_norm", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_image_inputs_with_spatial_and_group_norm(spatial_norm, memory_format):
    spatial = {"spatial_norm_dim": 6} if spatial_norm else {}
    attn = make_attention(
        query_dim=32, norm_num_groups=4, residual_connection=True, bias=True, **spatial
    )
    image, temb = torch.randn(BATCH, 32, 5, 3), torch.randn(BATCH, 6, 5, 3)
    expected = run(attn, AttnProcessor2_0(), image, temb=temb)
    actual = run(attn, SeFiAttnProcessor(), image.to(memory_format=memory_format), temb=temb)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 20])
def test_masks_mean_the_same_as_for_attn_processor_2_0(attn, hidden_states, prompt, queries):
    mask = torch.rand(BATCH, queries, TOKENS) > 0.4
    mask[..., 0] = True
    bias = bias_of(mask)
    expected = run(attn, AttnProcessor2_0(), hidden_states, prompt, attention_mask=bias)
    actual = run(attn, SeFiAttnProcessor(), hidden_states, prompt, attention_mask=bias)
    torch.testing.assert_close(actual, expected, **TIGHT)
    assert (run(attn, SeFiAttnProcessor(), hidden_states, prompt) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("boolean", [False, True])
def test_a_key_mask_reaches_the_fused_operator_as_booleans(attn, hidden_states, prompt, boolean):
    mask = key_mask()
    record = LayerRecord(probs_positions=torch.arange(TOKENS)[None])
    given = mask[:, None] if boolean else bias_of(mask[:, None])
    processor = SeFiAttnProcessor(record=record, backend="eager")
    actual = run(attn, processor, hidden_states, prompt, attention_mask=given)
    expected, probabilities = exact_attention(attn, hidden_states, prompt, prompt, mask)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    maps = probabilities.mean(1).transpose(1, 2)
    torch.testing.assert_close(record.attn_probs.double(), maps, **TIGHT)


@pytest.mark.parametrize(
    "mask",
    [
        bias_of(torch.rand(BATCH, 20, TOKENS) > 0.5),
        bias_of(torch.rand(BATCH * HEADS, 1, TOKENS) > 0.5),
        torch.full((BATCH, 1, TOKENS), -1.5),
    ],
)
def test_the_fused_operator_refuses_other_masks(attn, hidden_states, prompt, mask):
    processor = SeFiAttnProcessor(record=LayerRecord(probs_positions=torch.tensor([[1]])))
    with pytest.raises(ValueError, match="only key masks"):
        run(attn, processor, hidden_states, prompt, attention_mask=mask)
    run(attn, SeFiAttnProcessor(), hidden_states, prompt, attention_mask=mask)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_scale_of_the_layer_is_used(hidden_states, prompt, backend):
    attn = make_attention(**CROSS, scale_qk=False)
    expected = run(attn, AttnProcessor(), hidden_states, prompt)
    actual = run(attn, SeFiAttnProcessor(backend=backend), hidden_states, prompt)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_keys_come_from_the_first_stream_and_values_from_the_second(
    attn, hidden_states, backend, masked
):
    streams = torch.randn(2, BATCH, TOKENS, WIDTH)
    mask = key_mask() if masked else None
    expected, _ = exact_attention(attn, hidden_states, *streams, mask)
    bias = None if mask is None else bias_of(mask[:, None])
    processor = SeFiAttnProcessor(split_streams=True, backend=backend)
    both = torch.cat([*streams], dim=1)
    actual = run(attn, processor, hidden_states, both, attention_mask=bias)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_each_stream_is_normed_alone_and_projected_by_a_call_of_the_module(hidden_states, prompt):
    attn = make_attention(**CROSS, **GROUP_NORM)
    attn.to_v.register_forward_hook(lambda _, inputs, output: output + inputs[0].mean())
    expected = run(attn, AttnProcessor2_0(), hidden_states, prompt)
    twice = torch.cat([prompt, prompt], dim=1)
    actual = run(attn, SeFiAttnProcessor(split_streams=True), hidden_states, twice)
    torch.testing.assert_close(actual, expected, **TIGHT)


def test_loss_and_maps_are_those_of_equations_4_and_5_and_carry_gradients(attn, hidden_states):
    key_prompt, value_prompt, reference = torch.randn(3, BATCH, TOKENS, WIDTH)
    weights = torch.rand(1, TOKENS)
    record = LayerRecord(
        reference_key=attn.to_k(reference[:1]).detach(),
        token_weights=weights,
        probs_positions=torch.tensor([[2, -1, 0]]),
    )
    attn.set_processor(SeFiAttnProcessor(split_streams=True, record=record, backend="eager"))
    both = torch.cat([key_prompt, value_prompt], dim=1).requires_grad_()
    output = attn(hidden_states, both)
    expected, target = exact_attention(attn, hidden_states, key_prompt, value_prompt)
    _, wanted = exact_attention(attn, hidden_states, reference[:1].expand(2, -1, -1), value_prompt)
    subject_loss = (weights * (target - wanted) ** 2).sum((-1, -2)).mean(1)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(record.subject_loss.double(), subject_loss, rtol=1e-4, atol=1e-6)
    maps = target.mean(1).transpose(1, 2)[:, [2, 0]]
    torch.testing.assert_close(record.attn_probs[:, ::2].double(), maps, **TIGHT)
    assert not record.attn_probs[:, 1].any()
    (gradient,) = torch.autograd.grad(record.subject_loss.sum(), both, retain_graph=True)
    assert gradient[:, :TOKENS].abs().max() > 0
    assert not gradient[:, TOKENS:].any()


def test_a_second_run_of_a_layer_overwrites_its_results(attn, hidden_states, prompt):
    record = LayerRecord(reference_key=torch.randn(1, TOKENS, INNER))
    attn.set_processor(SeFiAttnProcessor(record=record, backend="eager"))
    prompt.requires_grad_()
    output = torch.utils.checkpoint.checkpoint(attn, hidden_states, prompt, use_reentrant=False)
    first = record.subject_loss
    assert first.shape == (BATCH,)
    output.sum().backward()
    torch.testing.assert_close(record.subject_loss, first)
    record.reference_key = None
    for backend in ("eager", None):
        record.subject_loss = record.attn_probs = first
        run(attn, SeFiAttnProcessor(record=record, backend=backend), hidden_states, prompt)
        assert record.subject_loss is None and record.attn_probs is None


def test_state_on_a_prompt_replaces_the_record_of_the_processor(attn, hidden_states, prompt):
    own, traced = (LayerRecord(probs_positions=torch.tensor([[1]])) for _ in range(2))
    processor = SeFiAttnProcessor(record=own, backend="eager")
    PromptState(records={id(attn): traced}).put_on(prompt)
    run(attn, processor, hidden_states, prompt)
    assert own.attn_probs is None and traced.attn_probs is not None
    assert PromptState.take_off(prompt).records == {id(attn): traced}
    run(attn, processor, hidden_states, prompt)
    assert own.attn_probs is not None


def test_image_tokens_of_a_box_attend_to_its_prompt(attn, hidden_states, prompt):
    other = torch.randn(1, TOKENS, WIDTH)
    boxes = [(0, 0, 0.5, 1), (0.9, 0.9, 0.91, 0.91)]
    regions = RegionPrompts([other, other + 1], boxes, 1, (5, 4), {id(attn): 1})
    expected = run(attn, SeFiAttnProcessor(), hidden_states, prompt).view(BATCH, 5, 4, INNER)
    inside = run(attn, SeFiAttnProcessor(), hidden_states, other.expand(BATCH, -1, -1))
    expected[1, :, :2] = inside.view(BATCH, 5, 4, INNER)[1, :, :2]
    PromptState(regions=regions).put_on(prompt)
    actual = run(attn, SeFiAttnProcessor(), hidden_states, prompt)
    torch.testing.assert_close(actual, expected.flatten(1, 2), rtol=1e-5, atol=1e-5)
    assert regions.reached == {id(attn)}
    with pytest.raises(ModelError, match="10 image tokens instead of 5×4"):
        run(attn, SeFiAttnProcessor(), hidden_states[:, :10], prompt)


def test_a_training_processor_leaves_other_prompts_to_the_replaced_one(attn, hidden_states, prompt):
    processor = TrainingProcessor(split_streams=True)
    processor.replaced = AttnProcessor2_0()
    both = torch.cat([prompt, prompt + 1], dim=1)
    plain = run(attn, AttnProcessor2_0(), hidden_states, both)
    assert torch.equal(run(attn, processor, hidden_states, both), plain)
    PromptState(training=True).put_on(both)
    expected = run(attn, SeFiAttnProcessor(split_streams=True), hidden_states, both)
    assert torch.equal(run(attn, processor, hidden_states, both), expected)


@pytest.mark.parametrize(
    ("options", "tokens", "mask", "error", "message"),
    [
        ({"split_streams": True}, 15, None, ValueError, "odd length 15.*stage hook"),
        ({"split_streams": True}, 14, torch.zeros(2, 1, 14), ValueError, "one entry a token"),
        ({"backend": "warp"}, TOKENS, None, BackendError, "warp"),
    ],
)
def test_impossible_prompts_and_backends(
    attn, hidden_states, options, tokens, mask, error, message
):
    prompt = torch.randn(BATCH, tokens, WIDTH)
    with pytest.raises(error, match=message):
        run(attn, SeFiAttnProcessor(**options), hidden_states, prompt, attention_mask=mask)


def test_impossible_options_and_ip_adapters_prompts(attn, hidden_states, prompt, monkeypatch):
    with pytest.raises(TypeError, match="unload_ip_adapter"):
        run(attn, SeFiAttnProcessor(), hidden_states, (prompt, prompt))
    with pytest.raises(ValueError, match="'flash'"):
        SeFiAttnProcessor(self_attention="flash")
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(BackendError, match="xformers cannot be imported"):
        SeFiAttnProcessor(self_attention="xformers")


def test_xformers_runs_self_attention_on_request(monkeypatch, hidden_states):
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, scale=None):
        calls.append(query.shape)
        tokens_second = (x.transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(*tokens_second, attn_bias, scale=scale)
        return output.transpose(1, 2)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    attn, bias = make_attention(), bias_of(torch.rand(BATCH, 1, 20) > 0.3)
    processor = SeFiAttnProcessor(self_attention="xformers")
    actual = run(attn, processor, hidden_states, attention_mask=bias)
    expected = run(attn, AttnProcessor2_0(), hidden_states, attention_mask=bias)
    torch.testing.assert_close(actual, expected, **TIGHT)
    assert calls == [(BATCH, 20, HEADS, HEAD_DIM)]


def test_compiles_without_graph_breaks(attn, hidden_states):
    record = LayerRecord(reference_key=torch.randn(1, TOKENS, INNER))
    attn.set_processor(SeFiAttnProcessor(split_streams=True, record=record, backend="eager"))
    both = torch.randn(BATCH, 2 * TOKENS, WIDTH, requires_grad=True)
    expected = attn(hidden_states, both), record.subject_loss
    compiled = torch.compile(attn, fullgraph=True, backend="eager")
    actual = compiled(hidden_states, both), record.subject_loss
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
