"""Checks of a backend on one device: accuracy, races, 64-bit offsets, graph replay, side stream."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Literal, NamedTuple

import torch
from _contenders import Contender, contenders, eager_maps
from _feature_checks import wrong_feature
from _reference import Inputs, Results, errors, float64_results, make_inputs, verdict
from _shapes import Problem, problems
from _workload import Workload
from torch import Tensor

ACCURACY = "accuracy against float64"
FEATURES = "maps, masks, weights, reference"
REPEATS = 50
DTYPES = ("bfloat16", "float16", "float32")
_OVERFLOW_PROBLEM = Problem("sd15", 4096, 40, 8)
_INT32_ELEMENTS = 2**31


class Check(NamedTuple):
    """One check's answer; `detail` says what was seen or why it was not run."""

    name: str
    contender: str
    dtype: str
    status: Literal["passed", "failed", "skipped"]
    detail: str


def sefi_contenders(device: torch.device) -> list[Contender]:
    """sefi's own backends that run on `device`."""
    found, _ = contenders(device, ["sefi"])
    return [contender for contender in found if contender.family == "sefi"]


def _answer(
    name: str, contender: Contender, dtype: torch.dtype, body: Callable[[], str | None]
) -> Check:
    """Run one check: None is a pass, words are a failure, NotImplementedError a skip."""
    label = str(dtype).removeprefix("torch.")
    try:
        wrong = body()
    except NotImplementedError as reason:
        return Check(name, contender.name, label, "skipped", str(reason))
    except Exception as error:  # noqa: BLE001 - a check that breaks has failed, whatever broke it
        first = str(error).splitlines()[0] if str(error) else ""
        return Check(name, contender.name, label, "failed", f"{type(error).__name__}: {first}")
    if wrong is None:
        return Check(name, contender.name, label, "passed", "")
    return Check(name, contender.name, label, "failed", wrong)


def accuracy_problems(small: bool) -> list[Problem]:
    """Every head width with its own tile, odd lengths, few and many keys, and real sizes."""
    odd = problems(["100x40x3", "33x72x2", "65x160x2", "130x64x2"], [2])
    odd += [
        problem for keys in (1, 16, 80, 81, 200) for problem in problems(["70x64x2"], [2], keys)
    ]
    if small:
        return odd
    return odd + problems(["sd15", "sd21", "sdxl"], [2])


def accuracy(
    contender: Contender,
    device: torch.device,
    dtype: torch.dtype,
    small: bool,
    places: Container[int] | None = None,
) -> Check:
    """Each result against float64: at most twice the eager path's error in the same dtype.

    places: which of accuracy_problems(small), by their place in the list; None for all.
    """

    def body() -> str | None:
        eager = Contender("eager-maps", "eager", True, eager_maps)
        for seed, problem in enumerate(accuracy_problems(small)):
            if places is not None and seed not in places:
                continue
            inputs = make_inputs(problem, device, dtype, seed)
            wanted = float64_results(inputs)
            measure = errors(Workload(eager, inputs).results(), wanted)
            found = errors(Workload(contender, inputs).results(), wanted)
            wrong = verdict(found, measure, dtype, strict=True)
            if wrong:
                return f"{problem.queries}x{problem.head_dim}, {problem.keys} keys: {wrong}"
        return None

    return _answer(ACCURACY, contender, dtype, body)


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def races(contender: Contender, device: torch.device, dtype: torch.dtype, small: bool) -> Check:
    """Fifty repeats of forward and backward at a large batch give the same bits."""

    def body() -> str | None:
        chosen = ["200x40x4"] if small else ["sd15:4096", "sd15:256", "sd15:64"]
        for problem in problems(chosen, [2 if small else 16]):
            workload = Workload(contender, make_inputs(problem, device, dtype))
            first = workload.both()
            for repeat in range(1, REPEATS):
                if not _same(first, workload.both()):
                    return f"{problem.name}: repeat {repeat} differs from the first"
        return None

    return _answer(f"{REPEATS} bitwise repeats", contender, dtype, body)


def _sample(inputs: Inputs, place: int) -> Inputs:
    """One sample of a batch as a problem of its own, with leaves of its own."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach()[place : place + 1].requires_grad_()

    return inputs._replace(
        query=leaf(inputs.query),
        key=leaf(inputs.key),
        value=leaf(inputs.value),
        grad_output=inputs.grad_output[place : place + 1],
        grad_subject_loss=inputs.grad_subject_loss[place : place + 1],
    )


def overflow(contender: Contender, device: torch.device, dtype: torch.dtype) -> Check:
    """Tensors of more than 2³¹ elements: samples past the edge agree with float64."""

    def body() -> str | None:
        one = _OVERFLOW_PROBLEM
        a_sample = one.heads * one.queries * one.head_dim
        batch = _INT32_ELEMENTS // a_sample + 2
        needed = 6 * batch * a_sample * max(dtype.itemsize, 4)
        free = torch.cuda.mem_get_info(device)[0]
        if free < needed:
            raise NotImplementedError(
                f"wants {needed / 2**30:.0f} GiB of free GPU memory, {free / 2**30:.0f} are"
            )
        problem = Problem(one.model, one.queries, one.head_dim, one.heads, batch, one.keys)
        inputs = make_inputs(problem, device, dtype)
        results = Workload(contender, inputs).results()
        eager = Contender("eager-maps", "eager", True, eager_maps)
        for place in (0, batch // 2, batch - 2, batch - 1):
            alone = _sample(inputs, place)
            wanted = float64_results(alone)
            measure = errors(Workload(eager, alone).results(), wanted)
            here = Results._make(
                None if tensor is None else tensor[place : place + 1] for tensor in results
            )
            wrong = verdict(errors(here, wanted), measure, dtype, strict=True)
            if wrong:
                return f"sample {place} of {batch}: {wrong}"
        return None

    return _answer("more than 2^31 elements", contender, dtype, body)


def graph_replay(contender: Contender, device: torch.device, dtype: torch.dtype) -> Check:
    """A captured forward and backward, replayed on new inputs, gives a plain call's bits."""

    def body() -> str | None:
        from _measure import captured

        (problem,) = problems(["sd15:1024"], [2])
        held = make_inputs(problem, device, dtype, seed=1)
        workload = Workload(contender, held)
        replay = captured(workload.both)
        for seed in (2, 3):
            fresh = make_inputs(problem, device, dtype, seed)
            with torch.no_grad():
                for target, source in zip(held, fresh, strict=True):
                    if isinstance(target, Tensor) and isinstance(source, Tensor):
                        target.copy_(source)
            replayed = tuple(tensor.clone() for tensor in replay())
            torch.cuda.synchronize()
            if not _same(replayed, Workload(contender, fresh).both()):
                return f"replay on inputs of seed {seed} differs from a plain call"
        return None

    return _answer("graph replay on changed inputs", contender, dtype, body)


def side_stream(contender: Contender, device: torch.device, dtype: torch.dtype) -> Check:
    """Work enqueued on a side stream behind slow work there gives the default stream's bits."""

    def body() -> str | None:
        (problem,) = problems(["sd15:1024"], [4])
        wanted = Workload(contender, make_inputs(problem, device, dtype, seed=5)).both()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # The inputs are not ready before this ends: a kernel on another stream would see junk.
            torch.cuda._sleep(200_000_000)
            found = Workload(contender, make_inputs(problem, device, dtype, seed=5)).both()
        stream.synchronize()
        return None if _same(wanted, found) else "differs from the default stream's results"

    return _answer("side stream", contender, dtype, body)


def features(contender: Contender, device: torch.device, dtype: torch.dtype) -> Check:
    """Maps, masks, weights, the reference's gradient and shared keys against the eager float64."""

    def body() -> str | None:
        return wrong_feature(contender.name.removeprefix("sefi-"), device, dtype)

    return _answer(FEATURES, contender, dtype, body)


def repeats(contender: Contender, device: torch.device, small: bool) -> Iterator[Check]:
    """The checks of a device's order and memory: on the CPU bitwise repeats alone."""
    for word in DTYPES:
        dtype = getattr(torch, word)
        yield races(contender, device, dtype, small)
        if device.type == "cuda":
            yield graph_replay(contender, device, dtype)
            yield side_stream(contender, device, dtype)
    if device.type == "cuda" and contender.name != "sefi-eager":
        yield overflow(contender, device, torch.bfloat16)


def all_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """Every check that fits `device`, in this process."""
    for contender in sefi_contenders(device):
        for word in DTYPES:
            dtype = getattr(torch, word)
            yield accuracy(contender, device, dtype, small)
            yield features(contender, device, dtype)
        yield from repeats(contender, device, small)
