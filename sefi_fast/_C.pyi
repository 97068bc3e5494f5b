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
    threads: int,
) -> int: ...
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
    threads: int,
) -> int: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...
def thread_source() -> str: ...
