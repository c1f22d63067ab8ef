"""Trainer: parameters, optimizer and one training step, spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.models.language import LanguageParams, init_language_params, language_loss
from npmoe.stats import max_violation
from npmoe.training.config import TrainConfig
from npmoe.training.data import batch, validation_batches
from npmoe.training.evaluate import BatchEvaluation, Evaluation, evaluate_batch, sum_batches
from npmoe.training.optimizer import AdamW, AdamWState, make_groups
from npmoe.training.schedules import learning_rate, router_noise
from npmoe.training.workers import Workers, shared_array
from npmoe.tree import flatten, named_arrays, unflatten

# The second number of a seed sequence tells the uses of one seed apart.
_STEP_STREAM = 1
_EVALUATION_BATCH = 8  # windows at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did.

    Attributes
    ----------
    step : int
        The step's number, from 0.
    cross_entropy : float
        Nats per character on the step's batch.
    auxiliary : float
        Load-balancing and z-loss as added.
    learning_rate, grad_norm : float
    tokens_per_expert : (MoE layers, E) int array
        Choices before any drop.
    drop_rate : float
        Dropped routes divided by chosen ones.
    """

    step: int
    cross_entropy: float
    auxiliary: float
    learning_rate: float
    grad_norm: float
    tokens_per_expert: HostArray
    drop_rate: float

    @property
    def load_imbalance(self) -> float:
        """MaxVio of the step's choices, mean over MoE layers; 0 for a dense model."""
        counts = self.tokens_per_expert
        return float(np.mean([max_violation(c) for c in counts])) if len(counts) else 0.0


class Trainer:
    """Own the parameters and make steps.

    Step s is a function of the parameters, the moments, the config and s alone, so a run that
    continues from a checkpoint computes the same bits as one that never stopped.

    Parameters
    ----------
    config : TrainConfig
    ids : (N,) int array
        The training text.
    workers : int
        Processes that compute micro-batches at the same time; does not change the result as long
        as every BLAS call runs in one thread.
    backend : str, Backend or None
        Runs the MoE sublayers; a host backend.
    """

    def __init__(
        self,
        config: TrainConfig,
        ids: HostArray,
        *,
        workers: int = 1,
        backend: str | Backend | None = None,
    ) -> None:
        self.config = config
        self.ids = ids
        self.backend = backend
        self.step_number = 0
        initial, like = flatten(init_language_params(config.model, config.seed))
        self.flat_params = shared_array(initial.shape, initial.dtype)
        self.flat_params[...] = initial
        self.params = unflatten(self.flat_params, like)
        self._flat_grads = shared_array((config.micro_batches, initial.size), initial.dtype)
        self._grads = [unflatten(flat, like) for flat in self._flat_grads]
        self.optimizer = AdamW(
            self.flat_params, make_groups(self.params, config.optimizer), config.optimizer
        )
        # Last, since the copies see this object as it is now.
        self.workers = Workers(self, workers)

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()

    def step(self) -> StepReport:
        """Make the next step.

        Raises
        ------
        RangeError
            If logits or gradients are not finite; the parameters are unchanged.
        """
        config, number = self.config, self.step_number
        parts = [(number, index) for index in range(config.micro_batches)]
        results: list[_MicroResult] = self.workers.map("compute_part", parts)
        total = self._flat_grads[0]
        for other in self._flat_grads[1:]:
            total += other
        rate = learning_rate(number, config.schedule)
        grad_norm = self.optimizer.step(total, rate)
        self.step_number += 1
        chosen = sum(result.chosen.sum() for result in results)
        dropped = sum(result.dropped for result in results)
        return StepReport(
            step=number,
            cross_entropy=sum(r.cross_entropy for r in results) / len(results),
            auxiliary=sum(r.auxiliary for r in results) / len(results),
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_expert=np.sum([r.chosen for r in results], axis=0),
            drop_rate=float(dropped / chosen) if chosen else 0.0,
        )

    def evaluate(self, ids: HostArray) -> Evaluation:
        """Return the loss over a text; as `evaluate`, spread over the workers."""
        pairs = list(validation_batches(ids, self.config.model.context_length, _EVALUATION_BATCH))
        return sum_batches(self.workers.map("evaluate_part", pairs))

    def evaluate_part(self, pair: tuple[HostArray, HostArray]) -> BatchEvaluation:
        """Evaluate one batch; runs in a worker."""
        return evaluate_batch(self.params, self.config.model, *pair, backend=self.backend)

    def compute_part(self, part: tuple[int, int]) -> _MicroResult:
        """Put the gradients of micro-batch (step, index) into its row; runs in a worker."""
        number, index = part
        config = self.config
        inputs, targets = (
            array[index :: config.micro_batches]
            for array in batch(
                self.ids, config.model.context_length, config.batch_size, config.seed, number
            )
        )
        moe = config.model.moe
        if moe is not None:
            noise = router_noise(number, config.schedule)
            moe = replace(moe, router_noise_std=noise)
        result = language_loss(
            inputs,
            targets,
            self.params,
            config.model,
            rng=np.random.default_rng((config.seed, _STEP_STREAM, number, index)),
            moe=moe,
            backend=self.backend,
            out=self._grads[index],
            scale=1.0 / config.micro_batches,
        )
        for (_, target), (_, value) in zip(
            named_arrays(self._grads[index]), named_arrays(result.grads), strict=True
        ):
            if target is not value:  # MoE gradients were written in place
                target[...] = value
        stats = result.saved.load_stats()
        return _MicroResult(
            cross_entropy=result.cross_entropy,
            auxiliary=result.auxiliary,
            chosen=np.array([s.chosen_per_expert for s in stats], dtype=np.int64),
            dropped=sum(s.dropped_routes for s in stats),
        )

    def state(self) -> dict[str, HostArray]:
        """Return the arrays of a checkpoint: parameters by name, and the optimizer's moments."""
        moments = self.optimizer.state()
        arrays = {f"params.{name}": leaf for name, leaf in named_arrays(self.params)}
        return {**arrays, "optimizer.m": moments.m, "optimizer.v": moments.v}

    def load_state(self, arrays: dict[str, HostArray], step: int) -> None:
        """Continue from the arrays of `state` after `step` steps."""
        load_params(self.params, arrays)
        self.optimizer.load_state(
            AdamWState(m=arrays["optimizer.m"], v=arrays["optimizer.v"], t=step)
        )
        self.step_number = step


@dataclass(frozen=True, slots=True, kw_only=True)
class _MicroResult:
    """What one micro-batch reports."""

    cross_entropy: float
    auxiliary: float
    chosen: HostArray
    dropped: int


def load_params(params: LanguageParams, arrays: dict[str, HostArray]) -> None:
    """Copy the arrays ``params.<name>`` of a checkpoint into a parameter tree."""
    for name, leaf in named_arrays(params):
        leaf[...] = arrays[f"params.{name}"]
