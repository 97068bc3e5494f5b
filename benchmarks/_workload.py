"""One contender on one problem's inputs: the calls that speed, memory and correctness all share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _contenders import Contender
from _reference import Inputs, Results
from torch import Tensor


class Workload:
    """forward, backward and both of a contender; the same calls are checked, timed and measured."""

    def __init__(self, contender: Contender, inputs: Inputs) -> None:
        self.contender = contender
        self.inputs = inputs
        self._leaves = (inputs.query, inputs.key, inputs.value)
        self._kept: tuple[Tensor, ...] | None = None

    def forward(self) -> tuple[Tensor, ...]:
        """(output, subject loss) or (output,), recorded for a backward as in training."""
        output, subject_loss = self.contender.run(self.inputs)
        return (output,) if subject_loss is None else (output, subject_loss)

    def _gradients(self, outputs: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        upstream = (self.inputs.grad_output, self.inputs.grad_subject_loss)[: len(outputs)]
        return torch.autograd.grad(outputs, self._leaves, upstream, retain_graph=keep)

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of query, key and value from one kept forward pass."""
        if self._kept is None:
            self._kept = self.forward()
        return self._gradients(self._kept, keep=True)

    def both(self) -> tuple[Tensor, ...]:
        """Forward, then backward: (output, [subject loss,] grad_query, grad_key, grad_value)."""
        outputs = self.forward()
        return outputs + self._gradients(outputs, keep=False)

    def results(self) -> Results:
        """What `both` gives, named."""
        *outputs, grad_query, grad_key, grad_value = self.both()
        subject_loss = outputs[1].detach() if len(outputs) == 2 else None
        return Results(outputs[0].detach(), subject_loss, grad_query, grad_key, grad_value)

    def release(self) -> None:
        """Drop the kept forward pass and what it saved."""
        self._kept = None

    def call(self, direction: str) -> Callable[[], Any]:
        """The call of a direction, inside the contender's context (an SDPA backend's choice)."""
        method = {"forward": self.forward, "backward": self.backward, "both": self.both}[direction]

        def run() -> Any:
            with self.contender.context():
                return method()

        return run
