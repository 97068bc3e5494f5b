"""Rows in the text transformer: exact against a changed token table, safe with threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from sefi_fast.prompts import class_token_ids, encode_text, tokenize_prompts


@pytest.fixture
def parts(sd15_pipeline):
    return sd15_pipeline.tokenizer, sd15_pipeline.text_encoder


def tokens_of(tokenizer, prompts):
    names = [
        ("<me>", class_token_ids(tokenizer, "person")),
        ("<it>", class_token_ids(tokenizer, "cat")),
    ]
    return tokenize_prompts(tokenizer, prompts, names)


def random_rows(prompts: int, count: int = 2, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randn(prompts, count, width, generator=torch.Generator().manual_seed(seed))


def with_table_rows(text_encoder, changes: dict[int, torch.Tensor]):
    """A copy of the text encoder whose token table has other rows: an independent way."""
    changed = copy.deepcopy(text_encoder)
    with torch.no_grad():
        for token_id, row in changes.items():
            changed.get_input_embeddings().weight[token_id] = row
    return changed


def hooks_of(text_encoder) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in text_encoder.modules())


@torch.no_grad()
def test_plain_text_is_what_the_encoder_gives(parts):
    tokenizer, text_encoder = parts
    ids, _ = tokens_of(tokenizer, ["a photo of a cat", ""])
    expected = text_encoder(ids).last_hidden_state
    assert torch.equal(encode_text(text_encoder, ids), expected)


@torch.no_grad()
def test_rows_equal_a_changed_token_table(parts):
    tokenizer, text_encoder = parts
    prompts = ["a <me> with <it> in the snow", "<it> and <it>", "a red dog"]
    ids, slots = tokens_of(tokenizer, prompts)
    rows = random_rows(3)
    found = encode_text(text_encoder, ids, slots, rows)
    for index in range(3):
        changed = with_table_rows(
            text_encoder,
            {
                class_token_ids(tokenizer, "person")[0]: rows[index, 0],
                class_token_ids(tokenizer, "cat")[0]: rows[index, 1],
            },
        )
        expected = changed(ids[index : index + 1]).last_hidden_state[0]
        torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-5)
    assert hooks_of(text_encoder) == 0


@torch.no_grad()
def test_the_class_words_own_row_changes_nothing(parts):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a photo of <me> in the forest"])
    row = text_encoder.get_input_embeddings().weight[class_token_ids(tokenizer, "person")[0]]
    found = encode_text(text_encoder, ids, slots, row.expand(1, 1, -1))
    assert torch.equal(found, encode_text(text_encoder, ids))


@torch.no_grad()
def test_the_class_word_beside_the_placeholder_keeps_its_row(parts):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a person and <me>"])
    plain = encode_text(text_encoder, ids)
    found = encode_text(text_encoder, ids, slots, random_rows(1, 1))
    # The transformer is causal: only the placeholder and what follows may change.
    assert torch.equal(found[:, :4], plain[:, :4])
    assert (found[:, 4:] - plain[:, 4:]).abs().amax(-1).gt(1e-4).all()


def test_gradient_reaches_the_rows_and_is_right(parts):
    tokenizer, text_encoder = parts
    text_encoder.requires_grad_(False)
    ids, slots = tokens_of(tokenizer, ["a <me> on the <it>", "red <it>"])
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
def test_float32_rows_in_a_half_precision_encoder(parts, dtype):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a <me>"])
    exact = encode_text(text_encoder, ids, slots, random_rows(1))
    found = encode_text(text_encoder.to(dtype), ids, slots, random_rows(1))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.1)


@torch.no_grad()
def test_clip_skip_takes_earlier_layers_through_the_final_norm(parts):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a <me> in the snow"])
    rows = random_rows(1)
    layers = [m for n, m in text_encoder.named_modules() if n.rpartition(".")[0].endswith("layers")]
    norm = [m for n, m in text_encoder.named_modules() if n.endswith("final_layer_norm")][0]
    seen: list[torch.Tensor] = []

    def keep(module, inputs, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    last = encode_text(text_encoder, ids, slots, rows)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2
    assert torch.equal(encode_text(text_encoder, ids, slots, rows, clip_skip=0), last)
    found = encode_text(text_encoder, ids, slots, rows, clip_skip=1)
    torch.testing.assert_close(found, norm(seen[0]))
    assert not torch.allclose(found, last)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match="2 layers"):
            encode_text(text_encoder, ids, slots, rows, clip_skip=wrong)


def test_clip_skip_needs_a_final_norm(parts):
    tokenizer, text_encoder = parts
    ids, _ = tokens_of(tokenizer, ["a"])

    class Bare(nn.Module):
        config = text_encoder.config

        def forward(self, ids, **_):
            return text_encoder(ids, output_hidden_states=True)

    with pytest.raises(ValueError, match="final_layer_norm"):
        encode_text(Bare(), ids, clip_skip=1)


@pytest.mark.parametrize("end", ["right", "legacy"])
@torch.no_grad()
def test_an_encoder_trained_with_a_mask_gets_it(parts, end):
    tokenizer, text_encoder = parts
    prompts = ["a <me> in the snow", ""]
    ids, slots = tokens_of(tokenizer, prompts)
    mask = tokenizer(
        ["a person in the snow", ""], padding="max_length", max_length=77, return_tensors="pt"
    ).attention_mask
    rows = torch.stack([text_encoder.get_input_embeddings().weight[ids[0, 2]]]).expand(2, 1, -1)
    plain = encode_text(text_encoder, ids)
    text_encoder.config.use_attention_mask = True
    if end == "legacy":
        text_encoder.config.eos_token_id = 2
    expected = text_encoder(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(encode_text(text_encoder, ids), expected)
    assert torch.equal(encode_text(text_encoder, ids, slots, rows), expected)
    assert not torch.allclose(expected, plain)


def test_the_hook_goes_after_an_exception(parts):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a <me>"])
    layers = [m for n, m in text_encoder.named_modules() if n.rpartition(".")[0].endswith("layers")]

    def fail(*_):
        raise ArithmeticError("broken layer")

    handle = layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="broken layer"):
        encode_text(text_encoder, ids, slots, random_rows(1))
    handle.remove()
    assert hooks_of(text_encoder) == 0


@torch.no_grad()
def test_a_call_from_another_thread_in_the_midst_gets_its_own_rows(parts):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a <me> with a hat"])
    rows = {"waiting": random_rows(1, seed=1), "passing": random_rows(1, seed=2)}
    alone = {name: encode_text(text_encoder, ids, slots, rows[name]) for name in rows}
    plain = encode_text(text_encoder, ids)
    arrived, go_on = threading.Event(), threading.Event()
    found = {}

    def hold(module, inputs):
        if threading.current_thread().name == "waiting":
            arrived.set()
            assert go_on.wait(30)

    handle = text_encoder.get_input_embeddings().register_forward_pre_hook(hold)

    def run():
        with torch.no_grad():
            found["waiting"] = encode_text(text_encoder, ids, slots, rows["waiting"])

    thread = threading.Thread(target=run, name="waiting")
    thread.start()
    assert arrived.wait(30)
    found["passing"] = encode_text(text_encoder, ids, slots, rows["passing"])
    found["plain"] = text_encoder(ids).last_hidden_state
    go_on.set()
    thread.join(30)
    handle.remove()
    assert torch.equal(found["plain"], plain)
    for name in rows:
        assert torch.equal(found[name], alone[name])
    assert hooks_of(text_encoder) == 0


def test_two_threads_at_full_speed(parts):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a <me> and <it>"])
    start = threading.Barrier(2)
    wrong: list[int] = []

    def run(seed):
        rows = random_rows(1, seed=seed)
        with torch.no_grad():
            expected = encode_text(text_encoder, ids, slots, rows)
            start.wait(30)
            for repeat in range(60):
                if not torch.equal(encode_text(text_encoder, ids, slots, rows), expected):
                    wrong.append(repeat)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert hooks_of(text_encoder) == 0


@pytest.mark.parametrize("in_place", [True, False])
@torch.no_grad()
def test_rows_reach_a_compiled_text_encoder(parts, in_place):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a <me>"])
    expected = encode_text(text_encoder, ids, slots, random_rows(1))
    if in_place:
        text_encoder.compile(backend="eager")
    else:
        text_encoder = torch.compile(text_encoder, backend="eager")
    text_encoder(ids)
    found = encode_text(text_encoder, ids, slots, random_rows(1))
    torch.testing.assert_close(found, expected)


def test_an_encoder_that_does_not_look_its_table_up_is_told(parts):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a <me>"])

    class Skipping(nn.Module):
        config = text_encoder.config

        def get_input_embeddings(self):
            return text_encoder.get_input_embeddings()

        def forward(self, ids, **_):
            return (torch.zeros(1, 77, 48),)

    with pytest.raises(RuntimeError, match="0 times"):
        encode_text(Skipping(), ids, slots, random_rows(1))
    assert hooks_of(text_encoder) == 0


def test_wrong_shapes_are_told(parts):
    tokenizer, text_encoder = parts
    ids, slots = tokens_of(tokenizer, ["a <me>", "a <it>"])
    for arguments, message in [
        ((slots, None), "go together"),
        ((None, random_rows(2)), "go together"),
        ((slots[:1], random_rows(2)), "shape of input_ids"),
        ((slots, random_rows(1)), r"rows must be \[2, subjects, 48\]"),
        ((slots, random_rows(2, width=64)), r"rows must be \[2, subjects, 48\]"),
        ((slots, random_rows(2, 1)), "row 2 of 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode_text(text_encoder, ids, *arguments)
    assert hooks_of(text_encoder) == 0
