from collections.abc import Sequence

def forward(
    sizes: Sequence[int],
    dtype: int,
    scale: float,
    inputs: Sequence[Sequence[int]],
    rows: Sequence[Sequence[int]],
    probs_all_heads: bool,
    output: Sequence[int],
    subject_loss: int,
    attn_probs: int,
    scratch: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def backward(
    sizes: Sequence[int],
    dtype: int,
    scale: float,
    inputs: Sequence[Sequence[int]],
    rows: Sequence[Sequence[int]],
    probs_all_heads: bool,
    grad_output: Sequence[int],
    grad_subject_loss: int,
    grad_attn_probs: int,
    reference_grad: bool,
    gradients: Sequence[Sequence[int]],
    scratch: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def forward_scratch(
    sizes: Sequence[int],
    dtype: int,
    scale: float,
    inputs: Sequence[Sequence[int]],
    rows: Sequence[Sequence[int]],
    probs_all_heads: bool,
    output: Sequence[int],
    subject_loss: int,
    attn_probs: int,
    multiprocessors: int,
) -> int: ...
def backward_scratch(
    sizes: Sequence[int],
    dtype: int,
    scale: float,
    inputs: Sequence[Sequence[int]],
    rows: Sequence[Sequence[int]],
    probs_all_heads: bool,
    grad_output: Sequence[int],
    grad_subject_loss: int,
    grad_attn_probs: int,
    reference_grad: bool,
    gradients: Sequence[Sequence[int]],
    multiprocessors: int,
) -> int: ...
def architectures() -> list[str]: ...
def runtime_version() -> int: ...
def driver_version() -> int: ...
