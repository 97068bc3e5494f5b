"""Train a batch of subjects step by step, as a CUDA graph where that is possible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.attention.processor import AttentionRecord
from sefi_fast.errors import is_out_of_memory
from sefi_fast.prompts.text_encoder import unwrap
from sefi_fast.subject import SubjectTokens
from sefi_fast.training.base_model import TrainingProcessors, autocast
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.latents import LatentDistribution
from sefi_fast.training.losses import loss_class
from sefi_fast.training.noise import NoiseSampler, NoiseSchedule, empty_buffers, sample_noise
from sefi_fast.training.optimizer import BatchedAdamW, rate_factor
from sefi_fast.training.prompts import BatchedPrompts, TrainingPrompts
from sefi_fast.training.step import FrozenModels, TrainingStep

logger = logging.getLogger(__name__)

# What libraries set up on first use, workspaces and compiled kernels, must not fall into a capture.
_WARMUP_STEPS = 3


@dataclass(frozen=True, eq=False)
class SubjectInputs:
    """All that the engine needs of one subject.

    Attributes:
        tokens: the start values for each text encoder; the modules themselves are not changed.
        mask: float32 [side, side] in [0, 1], 1 where the image shows the subject, for
            `attention_loss="mask"`.
        time_ids: of the image, for models with two text encoders.
    """

    tokens: tuple[SubjectTokens, ...]
    latents: LatentDistribution
    prompts: TrainingPrompts
    seed: int
    mask: Tensor | None = None
    time_ids: Tensor | None = None


class StepResult(NamedTuple):
    """One subject's numbers of one step; `finite` is False when it changed nothing."""

    noise: float
    subject_loss: float
    finite: bool


def warmup(run: Callable[[], None], changed: Iterable[Tensor]) -> None:
    """Run a few times, and always restore the tensors that it changed."""
    before = [(tensor, tensor.clone()) for tensor in changed]
    try:
        for _ in range(_WARMUP_STEPS):
            run()
    finally:
        for tensor, copy in before:
            tensor.copy_(copy)


def is_lost(device: torch.device) -> bool:
    """Return whether a fault such as an illegal access makes every call on the device fail."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class CUDAGraphStep:
    """A captured step; a call does what `run()` did, on the same tensors.

    Args:
        run: reads and writes tensors at fixed addresses, and does not wait for the device.
        changed: every tensor that outlives `run` and is changed by it; restored after a capture.
        device: a CUDA device.
    """

    def __init__(
        self, run: Callable[[], None], changed: Iterable[Tensor], device: torch.device
    ) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                warmup(run, changed)
            torch.cuda.current_stream().wait_stream(side_stream)
            with torch.cuda.graph(self._graph):
                run()

    def __call__(self) -> None:
        self._graph.replay()


class Engine:
    """Trains the tokens of L subjects together; each as if it were alone, up to rounding.

    The subjects share one batch and nothing else: each has its own random numbers, mean loss,
    optimizer state and loss scale. A subject keeps its index in `subjects` when others leave the
    batch. Tokens are those of all text encoders, concatenated to a width of C.

    Args:
        unet, text_encoders: frozen, on their device.
        scheduler: of the pipeline, for its noise schedule and prediction type.
        subjects: alike in all shapes.
        config: the settings; each subject has its own seed.
        dtype: of the frozen models' computation.
    """

    def __init__(
        self,
        *,
        unet: Any,
        text_encoders: Sequence[Any],
        scheduler: Any,
        subjects: Sequence[SubjectInputs],
        config: TrainConfig,
        dtype: torch.dtype,
    ) -> None:
        own = unwrap(unet)
        self._config = config
        self._device = subjects[0].latents.mean.device
        if config.capture == "always" and self._device.type != "cuda":
            raise ValueError(
                f"capture='always' works on CUDA only, and this run is on {self._device.type}: "
                "give 'auto' or 'never'"
            )
        self._capture = config.capture != "never" and self._device.type == "cuda"
        record = AttentionRecord()
        self.processors = TrainingProcessors(
            unet, record, config.attention_backend, config.self_attention
        )
        # forward, not a call: a stage hook of attached subjects must not see the training streams.
        forward = torch.compile(own.forward, dynamic=False) if config.compile else own.forward
        schedule = NoiseSchedule(scheduler, self._device)
        self._models = FrozenModels(own, forward, tuple(text_encoders), schedule, record, dtype)
        self._graph: CUDAGraphStep | None = None
        self._step: TrainingStep
        self._sampler: NoiseSampler
        self._begin(subjects)

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the subjects still in training."""
        return tuple(self._rows)

    def step(self) -> list[StepResult | None]:
        """Take one step of every subject still in training; the others get None."""
        factors = [rate_factor(self._config, self._started[index]) for index in self._rows]
        self._step.state.rate.copy_(torch.tensor(factors, dtype=torch.float64))
        self._sampler.load()
        if self._capture:
            self._run_captured()
        else:
            with self.processors.in_place():
                self._step()
        for index in self._rows:
            self._started[index] += 1
        if self._device.type != "cpu":
            # While the device computes, the host has time for the next step's numbers.
            self._sampler.prefetch()
        # One transfer, and so one wait for the device, in each step.
        columns = zip(self._rows, *self._step.results.tolist(), strict=True)
        results: list[StepResult | None] = [None] * len(self._started)
        for index, noise, subject_loss, good in columns:
            results[index] = StepResult(noise, subject_loss, bool(good))
        return results

    def drop(self, subject_index: int) -> None:
        """Take a subject out of the batch. Its state is lost, the others go on."""
        kept = [row for row, index in enumerate(self._rows) if index != subject_index]
        self._rows.remove(subject_index)
        self._sampler.keep(kept)
        index = torch.tensor(kept, dtype=torch.int64, device=self._device)
        self._step.keep(index, self._sampler.buffers)
        self._graph = None

    def refill(self, subjects: Sequence[SubjectInputs]) -> None:
        """Begin with other subjects on the same models.

        As many subjects of the same shapes as are in training keep the captured graph.
        """
        before, graph = self._step, self._graph
        self._begin(subjects)
        if graph is None or not before.take_over(self._step):
            self._graph = None
            return
        # The graph reads and writes the tensors it was captured with.
        self._step, self._graph = before, graph
        self._sampler.move(before.noise)

    def rows(self) -> Tensor:
        """Return a copy of the tokens in training, [active, S, 2 or 1, W, C], on the device."""
        return self._step.state.rows().detach().clone()

    def current(self, subject_index: int = 0) -> Tensor:
        """Return a subject's tokens, float32 [S, 2 or 1, W, C] on the CPU.

        If the latest update made them NaN or infinite, the last ones that gave a finite loss.
        """
        rows = self.rows()[self._rows.index(subject_index)].cpu()
        return rows if bool(torch.isfinite(rows).all()) else self.last_good(subject_index)

    def last_good(self, subject_index: int = 0) -> Tensor:
        """Return a subject's newest tokens that gave a finite loss, float32 on the CPU."""
        return self._step.state.last_good[self._rows.index(subject_index)].to("cpu", copy=True)

    def state_dict(self, subject_index: int = 0) -> dict[str, Tensor]:
        """Return all of a subject that changes in training, as tensors on the CPU.

        A subject that loads it goes on as this one would: bit for bit on a CPU in a batch of the
        same subjects, else up to rounding.
        """
        row = self._rows.index(subject_index)
        return {
            **self._step.state.state_dict(row),
            "generator": self._sampler.states()[row].clone(),
            "step": torch.tensor(self._started[subject_index]),
        }

    def load_state_dict(self, subject_index: int, state: Mapping[str, Tensor]) -> None:
        """Restore a subject's state of `state_dict`."""
        row = self._rows.index(subject_index)
        self._step.state.load_state_dict(row, state)
        self._sampler.set_state(row, state["generator"])
        self._started[subject_index] = int(state["step"])

    def _begin(self, subjects: Sequence[SubjectInputs]) -> None:
        self._rows = list(range(len(subjects)))
        self._started = [0] * len(subjects)
        config, models = self._config, self._models
        latents = LatentDistribution(
            torch.stack([one.latents.mean for one in subjects]),
            torch.stack([one.latents.std for one in subjects]),
        )
        views, shape = latents.mean.shape[1], latents.mean.shape[2:]
        attention = loss_class(config)(models.unet, config, (shape[1], shape[2]))
        prompts = BatchedPrompts([one.prompts for one in subjects])
        masks = [one.mask for one in subjects if one.mask is not None]
        with autocast(self._device, models.dtype):
            wanted = attention.is_on and attention.needs_reference
            reference = prompts.reference(models.text_encoders) if wanted else None
            attention.prepare(prompts, reference, torch.stack(masks) if masks else None)
        tokens, scaling = [one.tokens for one in subjects], models.dtype == torch.float16
        state = BatchedAdamW(tokens, config.learning_rate, self._device, scaling)
        sizes = (config.gradient_accumulation, len(subjects), config.batch_size)
        buffers = empty_buffers(sizes, shape, self._device)
        ids = [one.time_ids for one in subjects if one.time_ids is not None]
        gamma = config.snr_gamma
        self._step = TrainingStep(
            models, state, latents, prompts, attention, config.weight_lambda, buffers,
            torch.stack(ids).to(self._device) if ids else None,
            None if gamma is None else models.schedule.min_snr_weights(gamma),
        )  # fmt: skip
        sample = partial(
            sample_noise,
            batch_size=config.batch_size,
            num_train_timesteps=models.schedule.num_train_timesteps,
            views=views,
            templates=prompts.sentences,
            latent_shape=tuple(shape),
        )
        generators = [torch.Generator().manual_seed(one.seed) for one in subjects]
        self._sampler = NoiseSampler(generators, buffers, sample)

    def _run_captured(self) -> None:
        if self._graph is None:
            changed = [*self._step.state.tensors().values(), self._step.results]
            try:
                with self.processors.in_place():
                    self._graph = CUDAGraphStep(self._step, changed, self._device)
            except RuntimeError as error:
                always = self._config.capture == "always"
                if is_out_of_memory(error) or always or is_lost(self._device):
                    raise
                logger.warning(
                    "the training step cannot be captured as a CUDA graph here (%s); it runs "
                    "operation by operation instead, which is slower",
                    error,
                )
                self._capture = False
                with self.processors.in_place():
                    self._step()
                return
        self._graph()
