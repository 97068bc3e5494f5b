"""Rows in the text encoders: exact against a changed token table, safe with threads."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sefi_fast.errors import ModelError
from sefi_fast.prompts import (
    class_token_ids,
    encode,
    encode_text,
    encode_text_pooled,
    text_encoders,
    tokenize_prompts,
)


@pytest.fixture
def text(sd15_pipeline):
    return text_encoders(sd15_pipeline)[0]


def tokens_of(tokenizer, *prompts):
    names = [
        ("<me>", class_token_ids(tokenizer, "person")),
        ("<it>", class_token_ids(tokenizer, "cat")),
    ]
    return tokenize_prompts(tokenizer, prompts, names)


def random_rows(prompts: int, count: int = 2, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randn(prompts, count, width, generator=torch.Generator().manual_seed(seed))


def hooks_of(text_encoder) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in text_encoder.modules())


@torch.no_grad()
def test_rows_equal_a_changed_token_table(text):
    tokenizer, text_encoder = text
    ids, slots = tokens_of(
        tokenizer, "a <me> with <it> in the snow", "<it> and <it>", "a red dog", "a person and <me>"
    )
    rows = random_rows(4)
    plain = encode_text(text_encoder, ids)
    assert torch.equal(plain, text_encoder(ids).last_hidden_state)
    found = encode_text(text_encoder, ids, slots, rows)
    for index in range(3):
        changed = copy.deepcopy(text_encoder)
        table = changed.get_input_embeddings().weight
        for number, word in enumerate(("person", "cat")):
            table[class_token_ids(tokenizer, word)] = rows[index, number]
        expected = changed(ids[index : index + 1]).last_hidden_state[0]
        torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-5)
    # The class word next to the placeholder keeps its row, and the transformer is causal.
    assert torch.equal(found[3, :4], plain[3, :4])
    assert (found[3, 4:] - plain[3, 4:]).abs().amax(-1).gt(1e-4).all()
    own = text_encoder.get_input_embeddings().weight[class_token_ids(tokenizer, "person")]
    alone = encode_text(text_encoder, ids[3:], slots[3:], own[None])
    assert torch.equal(alone, encode_text(text_encoder, ids[3:]))
    assert hooks_of(text_encoder) == 0


def test_gradient_reaches_the_rows_and_is_right(text):
    tokenizer, text_encoder = text
    text_encoder.requires_grad_(False)
    ids, slots = tokens_of(tokenizer, "a <me> on the <it>", "red <it>")
    rows = random_rows(2).requires_grad_()
    weight = torch.randn(2, 77, 48, generator=torch.Generator().manual_seed(1))

    def loss(values):
        return (encode_text(text_encoder, ids, slots, values).double() * weight).sum()

    loss(rows).backward()
    assert not rows.grad[1, 0].any() and rows.grad[0].any() and rows.grad[1, 1].any()
    step = 0.003 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        slope = (loss(rows + step) - loss(rows - step)) / 2
    assert slope.item() == pytest.approx((rows.grad * step).sum().item(), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_float32_rows_in_a_half_precision_encoder(text, dtype):
    ids, slots = tokens_of(text.tokenizer, "a <me>")
    exact = encode_text(text.text_encoder, ids, slots, random_rows(1))
    found = encode_text(text.text_encoder.to(dtype), ids, slots, random_rows(1))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.1)


@torch.no_grad()
def test_clip_skip_takes_earlier_layers_through_the_final_norm(text):
    tokenizer, text_encoder = text
    ids, slots = tokens_of(tokenizer, "a <me> in the snow")
    modules, seen = dict(text_encoder.named_modules()), []
    layers = [one for name, one in modules.items() if name.rpartition(".")[0].endswith("layers")]
    (norm,) = [one for name, one in modules.items() if name.endswith("final_layer_norm")]
    handle = layers[0].register_forward_hook(lambda _, inputs, output: seen.append(output))
    last = encode_text(text_encoder, ids, slots, random_rows(1))
    handle.remove()
    skipped = [encode_text(text_encoder, ids, slots, random_rows(1), clip_skip=n) for n in (0, 1)]
    assert torch.equal(skipped[0], last)
    first = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(skipped[1], norm(first))
    assert not torch.allclose(skipped[1], last)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match="2 layers"):
            encode_text(text_encoder, ids, clip_skip=wrong)


@pytest.mark.parametrize("end", ["right", "legacy"])
@torch.no_grad()
def test_an_encoder_trained_with_a_mask_gets_it(text, end):
    tokenizer, text_encoder = text
    ids, slots = tokens_of(tokenizer, "a <me> in the snow", "")
    mask = tokenizer(
        ["a person in the snow", ""], padding="max_length", max_length=77, return_tensors="pt"
    ).attention_mask
    rows = text_encoder.get_input_embeddings().weight[ids[0, 2]].expand(2, 1, -1)
    plain = encode_text(text_encoder, ids)
    text_encoder.config.use_attention_mask = True
    if end == "legacy":
        text_encoder.config.eos_token_id = 2
    expected = text_encoder(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(encode_text(text_encoder, ids), expected)
    assert torch.equal(encode_text(text_encoder, ids, slots, rows), expected)
    assert not torch.allclose(expected, plain)


def test_calls_of_threads_get_their_own_rows(text):
    tokenizer, text_encoder = text
    ids, slots = tokens_of(tokenizer, "a <me> with a hat")
    rows = {"waiting": random_rows(1, seed=1), "passing": random_rows(1, seed=2)}
    arrived, go_on, found = threading.Event(), threading.Event(), {}

    @torch.no_grad()
    def run(name):
        found[name] = encode_text(text_encoder, ids, slots, rows[name])

    with torch.no_grad():
        alone = {name: encode_text(text_encoder, ids, slots, rows[name]) for name in rows}
        plain = encode_text(text_encoder, ids)

    def hold(module, inputs):
        if threading.current_thread().name == "waiting":
            arrived.set()
            assert go_on.wait(30)

    handle = text_encoder.get_input_embeddings().register_forward_pre_hook(hold)
    thread = threading.Thread(target=run, args=("waiting",), name="waiting")
    thread.start()
    assert arrived.wait(30)
    run("passing")
    with torch.no_grad():
        assert torch.equal(text_encoder(ids).last_hidden_state, plain)
    go_on.set()
    thread.join(30)
    handle.remove()
    assert all(torch.equal(found[name], alone[name]) for name in rows)
    start, wrong = threading.Barrier(2), []

    def repeat(name):
        start.wait(30)
        for _ in range(60):
            run(name)
            if not torch.equal(found[name], alone[name]):
                wrong.append(name)

    threads = [threading.Thread(target=repeat, args=(name,)) for name in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert hooks_of(text_encoder) == 0


@pytest.mark.parametrize("in_place", [True, False])
@torch.no_grad()
def test_rows_reach_a_compiled_text_encoder(text, in_place):
    tokenizer, text_encoder = text
    ids, slots = tokens_of(tokenizer, "a <me>")
    expected = encode_text(text_encoder, ids, slots, random_rows(1))
    if in_place:
        text_encoder.compile(backend="eager")
    else:
        text_encoder = torch.compile(text_encoder, backend="eager")
    text_encoder(ids)
    found = encode_text(text_encoder, ids, slots, random_rows(1))
    torch.testing.assert_close(found, expected)


class Wrapped(nn.Module):
    """A text encoder that does not look its token table up, or has no final layer norm."""

    def __init__(self, text_encoder, skip):
        super().__init__()
        self.config, self.own, self.skip = text_encoder.config, [text_encoder], skip

    def get_input_embeddings(self):
        return self.own[0].get_input_embeddings()

    def forward(self, ids, **_):
        if self.skip:
            return (torch.zeros(1, 77, 48),)
        return self.own[0](ids, output_hidden_states=True)


def test_other_text_encoders_are_refused(text):
    tokenizer, text_encoder = text
    ids, slots = tokens_of(tokenizer, "a <me>")
    with pytest.raises(RuntimeError, match="0 times"):
        encode_text(Wrapped(text_encoder, True), ids, slots, random_rows(1))
    assert hooks_of(text_encoder) == 0
    with pytest.raises(ValueError, match="final_layer_norm"):
        encode_text(Wrapped(text_encoder, False), ids, clip_skip=1)


@pytest.mark.parametrize(
    ("slots", "rows", "message"),
    [
        ((2, 77), None, "go together"),
        (None, (2, 2, 48), "go together"),
        ((1, 77), (2, 2, 48), r"slots must be \[2, 77\]"),
        ((2, 77), (1, 2, 48), r"rows \[2, subjects, 48\]"),
        ((2, 77), (2, 2, 64), r"rows \[2, subjects, 48\]"),
        ((2, 77), (2, 0, 48), "row 1 of 0"),
    ],
)
def test_wrong_shapes(text, slots, rows, message):
    ids, _ = tokens_of(text.tokenizer, "a <me>", "a <it>")
    given = (None if slots is None else torch.ones(slots, dtype=torch.int64),)
    given += (None if rows is None else torch.zeros(rows),)
    with pytest.raises(ValueError, match=message):
        encode_text(text.text_encoder, ids, *given)
    assert hooks_of(text.text_encoder) == 0


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("clip_skip", [None, 0, 1])
@torch.no_grad()
def test_hidden_state_and_pooled_embedding_for_sdxl(sdxl_pipeline, number, clip_skip):
    tokenizer, encoder = text_encoders(sdxl_pipeline)[number]
    ids = tokenize_prompts(tokenizer, ["a cat", "a dog in the snow"], []).input_ids
    hidden, pooled = encode_text_pooled(encoder, ids, clip_skip=clip_skip)
    output = encoder(ids, output_hidden_states=True)
    assert torch.equal(hidden, output.hidden_states[-2 - (clip_skip or 0)])
    assert pooled is None if number == 0 else torch.equal(pooled, output.text_embeds)


def test_rows_reach_both_outputs_for_sdxl_and_carry_gradients(sdxl_pipeline):
    tokenizer, encoder = text_encoders(sdxl_pipeline)[1]
    encoder.requires_grad_(False)
    ids, slots = tokenize_prompts(tokenizer, ["a <me>", "the <me> in snow"], [("<me>", [7])])
    rows = random_rows(2, 1, 64).requires_grad_()
    hidden, pooled = encode_text_pooled(encoder, ids, slots, rows)
    (by_hidden,) = torch.autograd.grad(hidden[0].square().sum(), rows, retain_graph=True)
    (by_pooled,) = torch.autograd.grad(pooled[1].square().sum(), rows)
    assert by_hidden[0].any() and not by_hidden[1].any()
    assert by_pooled[1].any() and not by_pooled[0].any()
    for changed, plain in zip((hidden, pooled), encode_text_pooled(encoder, ids), strict=True):
        assert (changed - plain).abs().max() > 1e-2


def test_pipelines_without_clips_text_encoders_are_refused(text):
    tokenizer, encoder = text
    both, short = text._asdict(), copy.copy(tokenizer)
    short.model_max_length = 64
    other = SimpleNamespace(
        bos_token_id=0, eos_token_id=1, unk_token_id=2, convert_tokens_to_ids=lambda _: 2
    )
    for parts, message in [
        ({**both, "tokenizer": None}, "has no tokenizer, which"),
        ({**both, "text_encoder": None}, "has no text_encoder, which"),
        ({**both, "tokenizer": other}, "does not cut text as CLIP's"),
        ({**both, "text_encoder_2": encoder}, "has no tokenizer_2"),
        ({**both, "tokenizer_2": short, "text_encoder_2": encoder}, "take 77 and 64 tokens"),
        ({"text_encoder": None, "text_encoder_2": encoder}, "second text encoder of SDXL alone"),
    ]:
        with pytest.raises(ModelError, match=message):
            encode(SimpleNamespace(**parts), "a")
