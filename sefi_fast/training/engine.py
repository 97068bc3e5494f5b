"""Train a batch of subjects step by step, as a CUDA graph where that is possible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.attention.processor import AttentionRecord
from sefi_fast.errors import is_out_of_memory
from sefi_fast.pipelines.support import unwrap
from sefi_fast.subject import SubjectTokens
from sefi_fast.training.base_model import TrainingProcessors, autocast
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.latents import LatentDistribution
from sefi_fast.training.losses import AttentionTerm
from sefi_fast.training.noise import LaneDraws, NoiseSchedule, empty_buffers
from sefi_fast.training.optimizer import LaneState, rate_factor
from sefi_fast.training.prompts import LanePrompts, TrainingPrompts
from sefi_fast.training.step import FrozenModels, TrainingStep


@dataclass(frozen=True, eq=False)
class Lane:
    """One subject in training; lanes of one engine share its settings and nothing else.

    Attributes:
        tokens: the start values for each text encoder; the modules themselves are not changed.
        latents: of the image.
        prompts: the training sentences.
        seed: of everything drawn at random for this lane.
        mask: float32 [side, side] in [0, 1], 1 where the image shows the subject;
            `attention_loss="mask"` needs it, the other losses take none.
        time_ids: float32 [6], the image's size and crop (`image.time_ids`), which models with
            two text encoders need and others do not take.
    """

    tokens: tuple[SubjectTokens, ...]
    latents: LatentDistribution
    prompts: TrainingPrompts
    seed: int
    mask: Tensor | None = None
    time_ids: Tensor | None = None


def check_lanes(lanes: Sequence[Lane], attention_loss: str, encoders: int) -> None:
    """Raise ValueError unless these lanes make one batch for this loss and number of encoders."""
    if not lanes:
        raise ValueError("there is no lane to train: give at least one subject")
    first = _shape(lanes[0])
    for number, lane in enumerate(lanes):
        for name, value in _shape(lane).items():
            if value != first[name]:
                raise ValueError(
                    f"lanes 0 and {number} cannot train side by side: {name} is {first[name]} in "
                    f"the first and {value} in the other; give them the same or an engine each"
                )
        if (lane.mask is not None) != (attention_loss == "mask"):
            state = "no mask" if lane.mask is None else "a mask"
            raise ValueError(
                f"lane {number} has {state}, but attention_loss is {attention_loss!r}: give a mask "
                "with attention_loss='mask', and with that only"
            )
        _check_encoders(number, lane, encoders)


def _check_encoders(number: int, lane: Lane, encoders: int) -> None:
    found = {len(lane.tokens), len(lane.prompts.input_ids)}
    if found != {encoders}:
        raise ValueError(
            f"lane {number} has tokens for {len(lane.tokens)} text encoder(s) and sentences for "
            f"{len(lane.prompts.input_ids)}, but the model has {encoders}: give both for each"
        )
    if (lane.time_ids is not None) != (encoders > 1):
        state = "no time_ids" if lane.time_ids is None else "time_ids"
        raise ValueError(
            f"lane {number} has {state}, but the model has {encoders} text encoder(s): give the "
            "image's size and crop for SDXL, which is conditioned on them, and for SDXL only"
        )


def _shape(lane: Lane) -> dict[str, object]:
    first = lane.tokens[0]
    return {
        "the number of stages": first.stages,
        "split": first.split,
        "the tokens' module": first.module,
        "the number of vectors": first.vectors,
        "the tokens' width": [tokens.width for tokens in lane.tokens],
        "the trained parameters": [
            [name for name, _ in tokens.named_parameters()] for tokens in lane.tokens
        ],
        "the number of attention heads": [tokens.heads for tokens in lane.tokens],
        "the shape of the latents": tuple(lane.latents.mean.shape),
        "the shape of the tokenised sentences": tuple(lane.prompts.input_ids.shape),
        "the side of the mask": None if lane.mask is None else tuple(lane.mask.shape),
    }


# What libraries set up on first use, workspaces and compiled kernels, must not fall into a capture.
_REHEARSALS = 3


def wants_capture(capture: str, device: torch.device) -> bool:
    """Whether a run with this setting captures its step.

    Raises:
        ValueError: "always" on a device that captures nothing.
    """
    if capture == "always" and device.type != "cuda":
        raise ValueError(
            f"capture='always' works on CUDA only, and this run is on {device.type}: give 'auto' "
            "or 'never'"
        )
    return capture != "never" and device.type == "cuda"


def rehearse(run: Callable[[], None], changed: Iterable[Tensor], times: int = _REHEARSALS) -> None:
    """Run a few times and put back what it changed, whatever happens."""
    before = [(tensor, tensor.clone()) for tensor in changed]
    try:
        for _ in range(times):
            run()
    finally:
        for tensor, copy in before:
            tensor.copy_(copy)


def is_lost(device: torch.device) -> bool:
    """Whether an illegal access or the like has left this process nothing but errors there."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class Replay:
    """A captured step; a call does what `run()` did, on the same tensors.

    Args:
        run: reads and writes tensors that stay where they are, and does not wait for the device.
        changed: every tensor that outlives `run` and is changed by it.
        device: a CUDA device.

    Raises:
        RuntimeError: something in `run` cannot be captured; `changed` is as it was.
    """

    def __init__(
        self, run: Callable[[], None], changed: Iterable[Tensor], device: torch.device
    ) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                rehearse(run, changed)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self._graph):
                run()

    def __call__(self) -> None:
        self._graph.replay()


logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """One lane's numbers of one step; `finite` is False when it changed nothing."""

    noise: float
    subject_loss: float
    finite: bool


class Engine:
    """Trains the tokens of L subjects side by side; each as if it were alone, up to rounding.

    The lanes share one batch and nothing else: each has its own random numbers, mean loss,
    optimiser state and loss scale. Lanes are named by their place in `lanes` throughout, whoever
    has left the batch. Tokens are those of all text encoders side by side, C being the sum of their
    widths.

    Args:
        unet: frozen, on its device.
        text_encoders: frozen, on their device; two for SDXL.
        scheduler: of the pipeline, for its noise schedule and prediction type.
        lanes: the subjects.
        config: the settings; seeds are the lanes' own.
        dtype: what the frozen models compute in.

    Raises:
        ModelError: the scheduler's configuration cannot be trained on.
        ValueError: `loss_resolutions` names a side that no layer has, the lanes do not fit one
            another or the attention loss, or a capture was asked for where there is no CUDA.
    """

    def __init__(
        self,
        *,
        unet: Any,
        text_encoders: Sequence[Any],
        scheduler: Any,
        lanes: Sequence[Lane],
        config: TrainConfig,
        dtype: torch.dtype,
    ) -> None:
        check_lanes(lanes, config.attention_loss, len(text_encoders))
        own = unwrap(unet)
        self._config = config
        self._device = lanes[0].latents.mean.device
        self._capture = wants_capture(config.capture, self._device)
        self._record = AttentionRecord()
        self.processors = TrainingProcessors(
            unet, self._record, config.attention_backend, config.self_attention
        )
        # forward, not a call: a stage hook of attached subjects must not see the training streams.
        forward = torch.compile(own.forward, dynamic=False) if config.compile else own.forward
        schedule = NoiseSchedule(scheduler, self._device)
        self._models = FrozenModels(own, forward, tuple(text_encoders), schedule, dtype)
        self._replay: Replay | None = None
        self._step: TrainingStep
        self._draws: LaneDraws
        self._begin(lanes)

    @property
    def active(self) -> tuple[int, ...]:
        """The lanes still in training."""
        return tuple(self._rows)

    def step(self, rate: float | None = None) -> list[StepResult | None]:
        """One step of every lane still in training; None for the others.

        Args:
            rate: factor of the learning rate; default: the schedule's at the lane's own step.
        """
        if not self._rows:
            return [None] * len(self._started)
        factors = [
            rate_factor(self._config, self._started[lane]) if rate is None else rate
            for lane in self._rows
        ]
        self._step.state.rate.copy_(torch.tensor(factors, dtype=torch.float64))
        self._draws.load()
        if self._capture:
            self._run_captured()
        else:
            with self.processors.in_place():
                self._step()
        for lane in self._rows:
            self._started[lane] += 1
        if self._device.type != "cpu":
            # While the device computes, the host has time for the next step's numbers.
            self._draws.ahead()
        # One transfer, and so one wait for the device, a step.
        noise, subject_loss, good = self._step.results.tolist()
        results: list[StepResult | None] = [None] * len(self._started)
        for row, lane in enumerate(self._rows):
            results[lane] = StepResult(noise[row], subject_loss[row], bool(good[row]))
        return results

    def drop(self, lane: int) -> None:
        """Take a lane out of the batch; what it has learned is forgotten, the others go on.

        Raises:
            KeyError: the lane is not in training.
        """
        row = self._row(lane)
        kept = [place for place in range(len(self._rows)) if place != row]
        self._rows.remove(lane)
        self._draws.keep(kept)
        index = torch.tensor(kept, dtype=torch.int64, device=self._device)
        self._step.keep(index, self._draws.buffers)
        self._replay = None

    def refill(self, lanes: Sequence[Lane]) -> None:
        """Begin anew with other lanes on the same models.

        As many lanes of the same shapes as are in training now keep the captured graph.
        """
        check_lanes(lanes, self._config.attention_loss, len(self._models.text_encoders))
        before, replay = self._step, self._replay
        self._begin(lanes)
        if replay is None or not before.take_over(self._step):
            self._replay = None
            return
        # The graph reads and writes the tensors it was captured with.
        self._step, self._replay = before, replay
        self._draws.move(before.draws)

    def steps_done(self, lane: int = 0) -> int:
        """Steps a lane has started so far, those that changed nothing included."""
        return self._started[lane]

    def rows(self) -> Tensor:
        """Copies of the tokens in training, [active, S, 2 or 1, W, C], on the device."""
        with torch.no_grad():
            return self._step.state.rows().detach().clone()

    def current(self, lane: int = 0) -> Tensor:
        """A lane's tokens as they are now, float32 [S, 2 or 1, W, C] on the CPU.

        If the latest update took them out of the numbers, the last ones that gave a finite loss.
        """
        rows = self.rows()[self._row(lane)].cpu()
        return rows if bool(torch.isfinite(rows).all()) else self.last_good(lane)

    def last_good(self, lane: int = 0) -> Tensor:
        """The newest of a lane's tokens that gave a finite loss, float32 on the CPU."""
        return self._step.state.last_good[self._row(lane)].to("cpu", copy=True)

    def state_dict(self, lane: int = 0) -> dict[str, Tensor]:
        """All of a lane that changes in training, as tensors on the CPU.

        A lane that `load_state_dict` is given it goes on as this one would, bit for bit on a CPU in
        the same company, else up to rounding.
        """
        row = self._row(lane)
        return {
            **self._step.state.state_dict(row),
            "generator": self._draws.states()[row].clone(),
            "step": torch.tensor(self._started[lane]),
        }

    def load_state_dict(self, lane: int, state: Mapping[str, Any]) -> None:
        """Put a lane back to a state of `state_dict`.

        Raises:
            ValueError: something is missing in it or of another shape; nothing is changed then.
        """
        row = self._row(lane)
        for name, own in self.state_dict(lane).items():
            check_saved(name, state.get(name), own)
        self._step.state.load_state_dict(row, state)
        self._draws.set_state(row, state["generator"])
        self._started[lane] = int(state["step"])

    def _row(self, lane: int) -> int:
        if lane not in self._rows:
            raise KeyError(f"lane {lane} is not in training; these are: {self._rows}")
        return self._rows.index(lane)

    def _begin(self, lanes: Sequence[Lane]) -> None:
        self._rows = list(range(len(lanes)))
        self._started = [0] * len(lanes)
        config = self._config
        latents = LatentDistribution(
            torch.stack([lane.latents.mean for lane in lanes]),
            torch.stack([lane.latents.std for lane in lanes]),
        )
        views, shape = latents.mean.shape[1], latents.mean.shape[2:]
        attention = AttentionTerm(self._models.unet, self._record, config, (shape[1], shape[2]))
        prompts = LanePrompts([lane.prompts for lane in lanes])
        with autocast(self._device, self._models.dtype):
            wanted = attention.needs_reference()
            reference = prompts.reference(self._models.text_encoders) if wanted else None
            masks = [lane.mask for lane in lanes if lane.mask is not None]
            attention.prepare(prompts, reference, torch.stack(masks) if masks else None)
        state = LaneState(
            [lane.tokens for lane in lanes],
            config.learning_rate,
            self._device,
            scaling=self._models.dtype == torch.float16,
        )
        buffers = empty_buffers(
            config.gradient_accumulation, len(lanes), config.batch_size, shape, self._device
        )
        schedule = self._models.schedule
        generators = [torch.Generator().manual_seed(lane.seed) for lane in lanes]
        ids = [lane.time_ids for lane in lanes if lane.time_ids is not None]
        self._step = TrainingStep(
            self._models,
            state,
            latents,
            prompts,
            attention,
            config.weight_lambda,
            buffers,
            torch.stack(ids).to(self._device) if ids else None,
            None if config.snr_gamma is None else schedule.min_snr_weights(config.snr_gamma),
        )
        self._draws = LaneDraws(
            generators,
            buffers,
            {
                "batch_size": config.batch_size,
                "num_train_timesteps": schedule.num_train_timesteps,
                "views": views,
                "templates": prompts.sentences,
                "latent_shape": tuple(shape),
            },
        )

    def _run_captured(self) -> None:
        if self._replay is None:
            changed = [*self._step.state.tensors().values(), self._step.results]
            try:
                with self.processors.in_place():
                    self._replay = Replay(self._step, changed, self._device)
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
        self._replay()


def check_saved(name: str, given: Any, own: Tensor) -> None:
    """Raise ValueError unless a saved tensor is there, of the shape and dtype of one's own."""
    if not isinstance(given, Tensor):
        raise ValueError(f"the saved state has no {name}: it is not one of a run like this")
    if given.shape != own.shape or given.dtype != own.dtype:
        raise ValueError(
            f"{name} of the saved state is {given.dtype} {tuple(given.shape)}, and here it is "
            f"{own.dtype} {tuple(own.shape)}: resume with the model and the settings it began with"
        )
