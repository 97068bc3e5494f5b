"""SubjectTokens: exact start, determinism, trained parameters, and reach of any tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sefi_fast.subject import SubjectTokens


def embedding(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape or 48, generator=torch.Generator().manual_seed(seed)) * 0.014


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 50),
    stages=st.integers(1, 12),
    split=st.booleans(),
    vectors=st.integers(1, 4),
    heads=st.integers(1, 12),
    train_base=st.booleans(),
    module=st.sampled_from(["attention", "free"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_every_token_starts_as_the_class_embedding(
    width, stages, split, vectors, heads, train_base, module, dtype
):
    start = embedding(vectors, width).to(dtype)
    tokens = SubjectTokens(start, stages, split, heads, train_base, module, seeded())()
    assert tokens.shape == (stages, 2 if split else 1, vectors, width)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, start.float().expand_as(tokens))


def test_zeros_and_a_vector_without_an_axis_start_exactly_too():
    tokens = SubjectTokens(torch.zeros(16), generator=seeded())()
    assert torch.equal(tokens, torch.zeros(5, 2, 1, 16))
    one = SubjectTokens(embedding(), generator=seeded()).state_dict()
    same = SubjectTokens(embedding()[None], generator=seeded()).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in same)


def test_the_generator_alone_determines_the_start():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = SubjectTokens(embedding(), generator=seeded(3)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = SubjectTokens(embedding(), generator=seeded(3)).state_dict()
    other = SubjectTokens(embedding(), generator=seeded(4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["slots"], other["slots"])
    assert not torch.equal(first["in_weight"], other["in_weight"])


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("module", ["attention", "free"])
def test_tokens_of_all_stages_streams_and_vectors_can_differ(module, vectors):
    start = embedding().expand(vectors, -1)
    tokens = SubjectTokens(start, stages=3, module=module, generator=seeded())
    target = embedding() + 0.014 * torch.randn(3, 2, vectors, 48, generator=seeded(1))
    optimizer = torch.optim.Adam(tokens.parameter_groups(1e-3))
    start = (tokens() - target).square().mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        (tokens() - target).square().sum().backward()
        optimizer.step()
    assert (tokens() - target).square().mean().item() < 0.02 * start


@pytest.mark.parametrize("train_base", [True, False])
@pytest.mark.parametrize("module", ["attention", "free"])
def test_parameter_groups_hold_each_parameter_once(module, train_base):
    tokens = SubjectTokens(embedding(), train_base=train_base, module=module)
    grouped = [p for group in tokens.parameter_groups(0.01) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in tokens.parameters()}
    assert ("base" in dict(tokens.named_parameters())) == (train_base and module == "attention")


def test_one_step_moves_a_token_as_far_through_the_attention_as_by_its_row():
    rate = 1e-3
    for width in (32, 768):
        moved = {}
        for train_base in (True, False):
            tokens = SubjectTokens(embedding(width), train_base=train_base, generator=seeded())
            groups = tokens.parameter_groups(rate)
            if train_base:
                groups = groups[:1]
            optimizer = torch.optim.Adam(groups)
            (tokens() * torch.randn(width, generator=seeded(5))).sum().backward()
            optimizer.step()
            moved[train_base] = (tokens() - embedding(width)).abs().mean().item()
        assert moved[True] == pytest.approx(rate, rel=0.01)
        assert 0.2 * rate < moved[False] < 2 * rate


def test_autocast_and_a_state_dict_keep_the_tokens():
    trained = SubjectTokens(embedding(), generator=seeded())
    torch.nn.init.normal_(trained.out_weight, generator=seeded(2))
    with torch.autocast("cpu", torch.bfloat16):
        cast = trained()
    assert cast.dtype == torch.float32 and torch.equal(cast, trained())
    fresh = SubjectTokens(embedding(seed=9), generator=seeded(7))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(), trained())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_embedding": torch.zeros(2, 3, 4)}, r"vectors \[W, C\]"),
        ({"class_embedding": torch.zeros(3, dtype=torch.int64)}, "floating-point"),
        ({"class_embedding": torch.tensor([1.0, float("nan")])}, "NaN"),
        ({"stages": 0}, "stages"),
        ({"heads": 0}, "heads"),
        ({"module": "mlp"}, "module"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SubjectTokens(**{"class_embedding": embedding(), **arguments})
