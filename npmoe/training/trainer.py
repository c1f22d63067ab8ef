"""Trainer: parameters, optimizer and one training step, spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.balancing import update_selection_bias
from npmoe.errors import ShapeError
from npmoe.params import MoEParams
from npmoe.stats import max_violation
from npmoe.training.config import RunConfig
from npmoe.training.evaluate import Evaluation
from npmoe.training.optimizer import AdamW, AdamWState, make_groups
from npmoe.training.schedules import learning_rate, router_noise
from npmoe.training.tasks import make_task
from npmoe.training.workers import Workers, shared_array
from npmoe.tree import flatten, named_arrays, unflatten

# The second number of a seed sequence tells the uses of one seed apart.
_STEP_STREAM = 1
_NO_GRADIENT = "selection_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did.

    Attributes
    ----------
    step : int
        The step's number, from 0.
    cross_entropy : float
        Nats per character, or per image, on the step's batch.
    auxiliary : float
        Load-balancing and z-loss as added.
    learning_rate, grad_norm : float
    tokens_per_expert : (MoE layers, E) int array
        Choices before any drop.
    kept_per_expert : (MoE layers, E) int array
        Rows after the drop.
    drop_rate : float
        Dropped routes divided by chosen ones.
    router_entropy : (MoE layers,) float64 array
        Mean over tokens of the entropy of their probabilities, in nats.
    selection_bias_range : (MoE layers, 2) float64 array or None
        Least and largest selection bias after the step; None without one.
    """

    step: int
    cross_entropy: float
    auxiliary: float
    learning_rate: float
    grad_norm: float
    tokens_per_expert: HostArray
    kept_per_expert: HostArray
    drop_rate: float
    router_entropy: HostArray
    selection_bias_range: HostArray | None

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
    config : TrainConfig or VisionTrainConfig
    data : (N,) int array or LabelledImages
        The training text, or images.
    workers : int
        Processes that compute micro-batches at the same time; does not change the result as long
        as every BLAS call runs in one thread.
    backend : str, Backend or None
        Runs the MoE sublayers; a host backend.
    initial : LanguageParams or VisionParams, optional
        Copied, in place of drawn parameters; float32.

    Raises
    ------
    ShapeError
        If `initial` is not of the config's model.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Any,
        *,
        workers: int = 1,
        backend: str | Backend | None = None,
        initial: Any = None,
    ) -> None:
        self.config = config
        self.task = make_task(config, data)
        self.backend = backend
        self.step_number = 0
        drawn, like = flatten(self.task.init_params())
        self.flat_params = shared_array(drawn.shape, drawn.dtype)
        self.flat_params[...] = drawn
        self.params = unflatten(self.flat_params, like)
        if initial is not None:
            _copy_initial(self.params, initial)
        self._flat_grads = shared_array((config.micro_batches, drawn.size), drawn.dtype)
        self._grads = [unflatten(flat, like) for flat in self._flat_grads]
        self._targets = [
            [
                leaf
                for name, leaf in named_arrays(tree)
                if not name.endswith(_NO_GRADIENT)  # stays 0
            ]
            for tree in self._grads
        ]
        self._biases = _selection_biases(self.params)
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
        tokens_per_expert = np.sum([r.chosen for r in results], axis=0)
        for bias, counts in zip(self._biases, tokens_per_expert, strict=bool(self._biases)):
            bias[...] = update_selection_bias(bias, counts, rate=config.selection_bias_rate)
        self.step_number += 1
        chosen = sum(result.chosen.sum() for result in results)
        dropped = sum(result.dropped for result in results)
        return StepReport(
            step=number,
            cross_entropy=sum(r.cross_entropy for r in results) / len(results),
            auxiliary=sum(r.auxiliary for r in results) / len(results),
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_expert=tokens_per_expert,
            kept_per_expert=np.sum([r.kept for r in results], axis=0),
            drop_rate=float(dropped / chosen) if chosen else 0.0,
            router_entropy=np.mean([r.entropy for r in results], axis=0),
            selection_bias_range=np.array([(b.min(), b.max()) for b in self._biases], np.float64)
            if self._biases
            else None,
        )

    def evaluate(self, data: Any) -> Evaluation:
        """Return the loss over other data of the task, spread over the workers."""
        return self.task.sum(self.workers.map("evaluate_part", self.task.split(data)))

    def evaluate_part(self, piece: Any) -> Any:
        """Evaluate one batch; runs in a worker."""
        return self.task.evaluate(self.params, piece, self.backend)

    def compute_part(self, part: tuple[int, int]) -> _MicroResult:
        """Put the gradients of micro-batch (step, index) into its row; runs in a worker."""
        number, index = part
        config = self.config
        moe = config.model.moe
        if moe is not None:
            noise = router_noise(number, config.schedule)
            moe = replace(moe, router_noise_std=noise)
        result = self.task.compute_loss(
            self.params,
            number,
            index,
            rng=np.random.default_rng((config.seed, _STEP_STREAM, number, index)),
            moe=moe,
            backend=self.backend,
            out=self._grads[index],
        )
        grads = named_arrays(result.grads)
        for target, (_, value) in zip(self._targets[index], grads, strict=True):
            if target is not value:  # MoE gradients were written in place
                target[...] = value
        stats = result.saved.load_stats()
        return _MicroResult(
            cross_entropy=result.cross_entropy,
            auxiliary=result.auxiliary,
            chosen=np.array([s.chosen_per_expert for s in stats], dtype=np.int64),
            kept=np.array([s.kept_per_expert for s in stats], dtype=np.int64),
            dropped=sum(s.dropped_routes for s in stats),
            entropy=np.array([s.entropy for s in stats], dtype=np.float64),
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
    kept: HostArray
    dropped: int
    entropy: HostArray


def load_params(params: Any, arrays: dict[str, HostArray]) -> None:
    """Copy the arrays ``params.<name>`` of a checkpoint into a parameter tree."""
    for name, leaf in named_arrays(params):
        leaf[...] = arrays[f"params.{name}"]


def _selection_biases(params: Any) -> list[HostArray]:
    """Return the selection bias of every MoE layer, in order; none if there is none."""
    layers = (block.feed_forward for block in params.blocks)
    biases = [layer.selection_bias for layer in layers if isinstance(layer, MoEParams)]
    return [bias for bias in biases if bias is not None]


def _copy_initial(params: Any, initial: Any) -> None:
    """Copy given start values into the parameters, if they are of the same model."""
    wanted, given = (
        {n: (a.shape, str(a.dtype)) for n, a in named_arrays(t)} for t in (params, initial)
    )
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ShapeError(
                f"train: initial.{name} must be {wanted.get(name)}, got {given.get(name)}. "
                "It is bound by config.model."
            )
    for (_, target), (_, value) in zip(named_arrays(params), named_arrays(initial), strict=True):
        target[...] = value
