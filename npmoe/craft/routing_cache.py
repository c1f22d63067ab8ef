"""A cache of routing decisions: what was chosen for an input is replayed when it comes again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from npmoe._checks import check_integer_ids, require
from npmoe._typing import Array, HostArray
from npmoe.backends import Backend, get_backend
from npmoe.config import MoEConfig
from npmoe.errors import UnsupportedError
from npmoe.layer import moe_forward
from npmoe.params import MoEParams


class RoutingCache:
    """Remember the chosen experts by layer and input ids, and replay them.

    A replay skips the choice: weights come from the current logits, so that the output has the
    bits of an ordinary call as long as the input ids determine the hidden states and the
    parameters are those of the first call. After a change of the parameters call `clear`: the
    replayed choices would be those of the old router.

    Parameters
    ----------
    max_entries : int
        Inputs times layers that are kept; the one used longest ago goes first.

    Attributes
    ----------
    hits, misses : int
        Calls that were replayed, and those that were not.

    Raises
    ------
    RangeError
        If `max_entries` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> from npmoe import init_params
    >>> cfg = MoEConfig(hidden_size=4, num_experts=4)
    >>> cache, params = RoutingCache(), init_params(cfg)
    >>> ids, hidden_states = np.array([7, 8]), np.ones((2, 4), np.float32)
    >>> for _ in range(3):
    ...     output = cache.forward(hidden_states, params, cfg, input_ids=ids, layer=0)
    >>> cache.hits, cache.misses
    (2, 1)
    """

    def __init__(self, max_entries: int = 1024) -> None:
        require(
            max_entries >= 1, f"RoutingCache: max_entries must be at least 1, got {max_entries}."
        )
        self.max_entries = max_entries
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, Array] = OrderedDict()

    def __len__(self) -> int:
        """Entries that are held."""
        return len(self._entries)

    def clear(self) -> None:
        """Forget every choice; needed after the parameters changed."""
        self._entries.clear()

    def forward(
        self,
        hidden_states: Array,
        params: MoEParams,
        cfg: MoEConfig,
        *,
        input_ids: HostArray,
        layer: Hashable = 0,
        backend: str | Backend | None = None,
    ) -> Array:
        """Run `moe_forward` without randomness, replaying the choices of an input seen before.

        Parameters
        ----------
        hidden_states, params, cfg, backend
            As for `moe_forward`.
        input_ids : integer array
            Everything that decides the hidden states: all ids of the sequences, in any shape.
            Two inputs are the same if shape, dtype and values are.
        layer : hashable
            Which layer of the model.

        Returns
        -------
        (..., H) float array
            New.

        Raises
        ------
        DTypeError
            If the ids are no integers.
        UnsupportedError
            If nothing is chosen, or the choice is random.
        ShapeError
            As `moe_forward` does, also when the same ids come with other leading axes.

        Notes
        -----
        **Cost**: a replay saves the top-K choice and pays for the check of the ids that replace
        it; the router's logits and the weights are computed as ever.
        """
        check_integer_ids("RoutingCache.forward", "input_ids", input_ids)
        _check_config(cfg)
        run = get_backend(backend)
        key = (layer, cfg, run.name, input_ids.shape, input_ids.dtype.str, input_ids.tobytes())
        known = self._entries.get(key)
        if known is not None:
            output, _ = moe_forward(hidden_states, params, cfg, run, topk_ids=known, save=False)
            self._entries.move_to_end(key)
            self.hits += 1
            return output
        output, saved = moe_forward(hidden_states, params, cfg, run)
        self.misses += 1
        if saved is not None:
            ids = saved.routing.topk_ids
            self._entries[key] = ids.reshape(*hidden_states.shape[:-1], ids.shape[-1])
        if len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)
        return output


def _check_config(cfg: MoEConfig) -> None:
    """Raise unless the choice depends on the logits alone."""
    if cfg.routing not in ("token_choice", "expert_choice"):
        raise UnsupportedError(
            "RoutingCache.forward: cfg.routing must be 'token_choice' or 'expert_choice', got "
            f"{cfg.routing!r}. There is no choice to remember."
        )
    if cfg.second_expert_policy != "all" or cfg.drop_policy == "random":
        raise UnsupportedError(
            "RoutingCache.forward: cfg must choose and drop without randomness, got "
            f"second_expert_policy={cfg.second_expert_policy!r} and "
            f"drop_policy={cfg.drop_policy!r}. Use cfg.for_evaluation()."
        )
