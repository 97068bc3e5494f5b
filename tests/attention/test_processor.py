"""SeFiAttnProcessor against AttnProcessor2_0 and against its definition."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from sefi_fast.attention.processor import AttentionRecord, LayerRecord, SeFiAttnProcessor
from sefi_fast.errors import BackendError

BATCH, TOKENS, WIDTH, HEADS, HEAD_DIM = 2, 7, 24, 3, 8
INNER = HEADS * HEAD_DIM


def make_attention(**options) -> Attention:
    torch.manual_seed(3)
    settings = {"query_dim": INNER, "heads": HEADS, "dim_head": HEAD_DIM} | options
    attn = Attention(**settings).eval()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attn


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


SEQUENCE_CASES = {
    "self": ({}, False),
    "cross": ({"cross_attention_dim": WIDTH}, True),
    "bias, residual and rescale": (
        {"bias": True, "residual_connection": True, "rescale_output_factor": 1.7},
        False,
    ),
    "group norm": ({"norm_num_groups": 4}, False),
    "layer norm of the prompt": (
        {"cross_attention_dim": WIDTH, "cross_attention_norm": "layer_norm"},
        True,
    ),
    "group norm of the prompt": (
        {
            "cross_attention_dim": WIDTH,
            "cross_attention_norm": "group_norm",
            "cross_attention_norm_num_groups": 4,
        },
        True,
    ),
    "norm of query and key": ({"cross_attention_dim": WIDTH, "qk_norm": "layer_norm"}, True),
    "rms norm of query and key": ({"qk_norm": "rms_norm"}, False),
}


@pytest.mark.parametrize("case", SEQUENCE_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_attn_processor_2_0(case, dtype):
    options, cross = SEQUENCE_CASES[case]
    attn = make_attention(**options).to(dtype)
    hidden_states = torch.randn(BATCH, 20, INNER, dtype=dtype)
    prompt = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype) if cross else None
    expected = run(attn, AttnProcessor2_0(), hidden_states, prompt)
    actual = run(attn, SeFiAttnProcessor(), hidden_states, prompt)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("spatial_norm", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pictures_go_in_and_come_out_with_spatial_and_group_norm(spatial_norm, channels_last):
    options = {"norm_num_groups": 4, "residual_connection": True, "bias": True}
    temb = None
    if spatial_norm:
        options |= {"query_dim": 32, "spatial_norm_dim": 6}
        temb = torch.randn(BATCH, 6, 5, 3)
    attn = make_attention(**options)
    image = torch.randn(BATCH, options.get("query_dim", INNER), 5, 3)
    expected = run(attn, AttnProcessor2_0(), image, temb=temb)
    if channels_last:
        image = image.to(memory_format=torch.channels_last)
    actual = run(attn, SeFiAttnProcessor(), image, temb=temb)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_vae_attention_with_4d_input_gives_a_map_of_all_its_places():
    attn = make_attention(cross_attention_dim=WIDTH, norm_num_groups=4)
    record = LayerRecord(probs_positions=torch.tensor([[0]]))
    run(
        attn,
        SeFiAttnProcessor(record=record, backend="eager"),
        torch.randn(BATCH, INNER, 5, 3),
        torch.randn(BATCH, TOKENS, WIDTH),
    )
    assert record.attn_probs.shape == (BATCH, 1, 15)


def bias_of(mask: torch.Tensor) -> torch.Tensor:
    return (1 - mask.float()) * -10000.0


@pytest.mark.parametrize("queries", [1, 20])
def test_masks_mean_what_they_mean_to_attn_processor_2_0(queries):
    attn = make_attention(cross_attention_dim=WIDTH)
    hidden_states, prompt = torch.randn(BATCH, 20, INNER), torch.randn(BATCH, TOKENS, WIDTH)
    mask = torch.rand(BATCH, queries, TOKENS) > 0.4
    mask[..., 0] = True
    bias = bias_of(mask)
    expected = run(attn, AttnProcessor2_0(), hidden_states, prompt, attention_mask=bias)
    actual = run(attn, SeFiAttnProcessor(), hidden_states, prompt, attention_mask=bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    plain = run(attn, SeFiAttnProcessor(), hidden_states, prompt)
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("boolean", [False, True])
def test_a_key_mask_reaches_the_fused_operator_as_booleans(boolean):
    attn = make_attention(cross_attention_dim=WIDTH)
    hidden_states, prompt = torch.randn(BATCH, 20, INNER), torch.randn(BATCH, TOKENS, WIDTH)
    mask = torch.rand(BATCH, TOKENS) > 0.4
    mask[:, 0] = True
    record = LayerRecord(probs_positions=torch.arange(TOKENS)[None])
    actual = run(
        attn,
        SeFiAttnProcessor(record=record, backend="eager"),
        hidden_states,
        prompt,
        attention_mask=mask[:, None] if boolean else bias_of(mask[:, None]),
    )
    expected, probabilities = exact_attention(attn, hidden_states, prompt, prompt, mask)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    maps = probabilities.mean(1).transpose(1, 2)
    torch.testing.assert_close(record.attn_probs.double(), maps, rtol=0, atol=1e-6)


def test_masks_that_no_key_mask_can_say_are_refused_when_maps_are_wanted():
    attn = make_attention(cross_attention_dim=WIDTH)
    hidden_states, prompt = torch.randn(BATCH, 20, INNER), torch.randn(BATCH, TOKENS, WIDTH)
    processor = SeFiAttnProcessor(record=LayerRecord(probs_positions=torch.tensor([[1]])))
    per_query = bias_of(torch.rand(BATCH, 20, TOKENS) > 0.5)
    with pytest.raises(ValueError, match="differs between queries or heads"):
        run(attn, processor, hidden_states, prompt, attention_mask=per_query)
    per_head = bias_of(torch.rand(BATCH * HEADS, 1, TOKENS) > 0.5)
    with pytest.raises(ValueError, match="differs between queries or heads"):
        run(attn, processor, hidden_states, prompt, attention_mask=per_head)
    soft = torch.full((BATCH, 1, TOKENS), -1.5)
    with pytest.raises(ValueError, match="only key masks"):
        run(attn, processor, hidden_states, prompt, attention_mask=soft)
    run(attn, SeFiAttnProcessor(), hidden_states, prompt, attention_mask=soft)


def test_a_scale_other_than_the_usual_is_honoured():
    attn = make_attention(cross_attention_dim=WIDTH, scale_qk=False)
    hidden_states, prompt = torch.randn(BATCH, 20, INNER), torch.randn(BATCH, TOKENS, WIDTH)
    expected = run(attn, AttnProcessor(), hidden_states, prompt)
    for processor in (SeFiAttnProcessor(), SeFiAttnProcessor(backend="eager")):
        actual = run(attn, processor, hidden_states, prompt)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_keys_come_from_the_first_stream_and_values_from_the_second(backend):
    attn = make_attention(cross_attention_dim=WIDTH)
    hidden_states = torch.randn(BATCH, 20, INNER)
    key_prompt, value_prompt = torch.randn(2, BATCH, TOKENS, WIDTH)
    both = torch.cat([key_prompt, value_prompt], dim=1)
    processor = SeFiAttnProcessor(split_streams=True, backend=backend)
    expected, _ = exact_attention(attn, hidden_states, key_prompt, value_prompt)
    actual = run(attn, processor, hidden_states, both)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    mask = torch.rand(BATCH, TOKENS) > 0.4
    mask[:, 0] = True
    expected, _ = exact_attention(attn, hidden_states, key_prompt, value_prompt, mask)
    actual = run(attn, processor, hidden_states, both, attention_mask=bias_of(mask[:, None]))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one entry a token"):
        run(attn, processor, hidden_states, both, attention_mask=torch.zeros(BATCH, 1, 2 * TOKENS))


def test_a_group_norm_of_the_prompt_sees_each_stream_alone():
    attn = make_attention(
        cross_attention_dim=WIDTH,
        cross_attention_norm="group_norm",
        cross_attention_norm_num_groups=4,
    )
    hidden_states, prompt = torch.randn(BATCH, 20, INNER), torch.randn(BATCH, TOKENS, WIDTH)
    expected = run(attn, AttnProcessor2_0(), hidden_states, prompt)
    twice = torch.cat([prompt, prompt], dim=1)
    actual = run(attn, SeFiAttnProcessor(split_streams=True), hidden_states, twice)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_alignment_and_maps_are_those_of_equations_4_and_5_and_carry_gradients():
    attn = make_attention(cross_attention_dim=WIDTH)
    hidden_states = torch.randn(BATCH, 20, INNER)
    key_prompt, value_prompt, reference = torch.randn(3, BATCH, TOKENS, WIDTH)
    weights = torch.rand(1, TOKENS)
    columns = torch.tensor([[2, -1, 0]])
    record = LayerRecord(
        reference_key=attn.to_k(reference[:1]).detach(),
        token_weights=weights,
        probs_positions=columns,
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
    torch.testing.assert_close(record.attn_probs[:, ::2].double(), maps, rtol=0, atol=1e-6)
    assert not record.attn_probs[:, 1].any()
    (gradient,) = torch.autograd.grad(record.subject_loss.sum(), both, retain_graph=True)
    assert gradient[:, :TOKENS].abs().max() > 0
    assert not gradient[:, TOKENS:].any()


def test_a_second_run_of_a_layer_overwrites_its_results():
    attn = make_attention(cross_attention_dim=WIDTH)
    record = LayerRecord(reference_key=torch.randn(1, TOKENS, INNER))
    attn.set_processor(SeFiAttnProcessor(record=record, backend="eager"))
    prompt = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    hidden_states = torch.randn(BATCH, 20, INNER)
    output = torch.utils.checkpoint.checkpoint(attn, hidden_states, prompt, use_reentrant=False)
    first = record.subject_loss
    assert first.shape == (BATCH,)
    output.sum().backward()
    torch.testing.assert_close(record.subject_loss, first)
    record.reference_key = None
    attn(hidden_states, prompt)
    assert record.subject_loss is None
    attn.set_processor(SeFiAttnProcessor(record=record))
    record.attn_probs = first
    attn(hidden_states, prompt)
    assert record.attn_probs is None


def test_projections_are_called_as_modules():
    attn = make_attention(cross_attention_dim=WIDTH)
    prompt, hidden_states = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, 20, INNER)
    before = run(attn, SeFiAttnProcessor(), hidden_states, prompt)

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return self.base_layer(x) + 0.5 * x.mean(-1, keepdim=True)

    attn.to_v = Adapted(attn.to_v)
    after = run(attn, SeFiAttnProcessor(), hidden_states, prompt)
    assert (after - before).abs().max() > 1e-2
    expected = run(attn, AttnProcessor2_0(), hidden_states, prompt)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_wrong_prompts_and_options_are_told_in_words(monkeypatch):
    attn = make_attention(cross_attention_dim=WIDTH)
    hidden_states = torch.randn(BATCH, 20, INNER)
    odd = torch.randn(BATCH, 2 * TOKENS + 1, WIDTH)
    with pytest.raises(ValueError, match="odd length 15.*stage hook"):
        run(attn, SeFiAttnProcessor(split_streams=True), hidden_states, odd)
    with pytest.raises(TypeError, match="unload_ip_adapter"):
        run(attn, SeFiAttnProcessor(), hidden_states, (odd, odd))
    with pytest.raises(ValueError, match="'flash'"):
        SeFiAttnProcessor(self_attention="flash")
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(BackendError, match="xformers cannot be imported"):
        SeFiAttnProcessor(self_attention="xformers")
    with pytest.raises(BackendError, match="warp"):
        prompt = torch.randn(BATCH, TOKENS, WIDTH)
        run(attn, SeFiAttnProcessor(backend="warp"), hidden_states, prompt)


def test_xformers_serves_self_attention_when_asked(monkeypatch):
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
    attn = make_attention()
    hidden_states = torch.randn(BATCH, 20, INNER)
    bias = bias_of(torch.rand(BATCH, 1, 20) > 0.3)
    processor = SeFiAttnProcessor(self_attention="xformers")
    actual = run(attn, processor, hidden_states, attention_mask=bias)
    expected = run(attn, AttnProcessor2_0(), hidden_states, attention_mask=bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert calls == [(BATCH, 20, HEADS, HEAD_DIM)]


def test_attention_records_hold_one_slot_a_layer():
    record = AttentionRecord()
    slot = record.layer("mid")
    slot.size = (4, 4)
    assert record.layer("mid") is slot and record.layer("up") is not slot
    assert [name for name, _ in record.items()] == ["mid", "up"] and len(record) == 2
    assert not slot.asks and LayerRecord(probs_positions=torch.tensor([[0]])).asks


def test_compiles_without_graph_breaks():
    attn = make_attention(cross_attention_dim=WIDTH)
    record = LayerRecord(reference_key=torch.randn(1, TOKENS, INNER))
    attn.set_processor(SeFiAttnProcessor(split_streams=True, record=record, backend="eager"))
    hidden_states = torch.randn(BATCH, 20, INNER)
    both = torch.randn(BATCH, 2 * TOKENS, WIDTH, requires_grad=True)
    expected = attn(hidden_states, both), record.subject_loss
    compiled = torch.compile(attn, fullgraph=True, backend="eager")
    actual = compiled(hidden_states, both), record.subject_loss
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
