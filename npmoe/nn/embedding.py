"""Rows of a table by integer ids, and their gradient."""

from __future__ import annotations

import numpy as np

from npmoe._checks import check_integer_ids
from npmoe._typing import HostArray
from npmoe.nn._inputs import Inputs, check_ids


def embedding(ids: HostArray, weight: HostArray) -> HostArray:
    """Return weight[ids].

    Parameters
    ----------
    ids : (...) integer array
        In [0, V).
    weight : (V, H) float array

    Returns
    -------
    (..., H) float array
        New, with the dtype of weight.

    Raises
    ------
    ShapeError, DTypeError
    RangeError
        Naming the first id out of range.
    """
    Inputs("embedding").check("weight", weight, "V", "H")
    check_integer_ids("embedding", "ids", ids)
    check_ids("embedding", "ids", ids, weight.shape[0])
    rows: HostArray = weight.take(ids, axis=0)
    return rows


def embedding_backward(grad_x: HostArray, ids: HostArray, num_embeddings: int) -> HostArray:
    """Sum the gradients of each id's positions.

    Parameters
    ----------
    grad_x : (..., H) float array
    ids : (...) integer array
        As given to `embedding`.
    num_embeddings : int
        V.

    Returns
    -------
    (V, H) float array
        New; exact zeros for ids that do not occur.

    Raises
    ------
    ShapeError, DTypeError
    RangeError
        Naming the first id out of range.

    Notes
    -----
    **Cost**: a stable sort of the ids and two passes over grad_x. **Accuracy**: gamma_n for n
    positions of an id. **Order**: ascending positions, summed pairwise by NumPy; bitwise
    reproducible.
    """
    check_integer_ids("embedding_backward", "ids", ids)
    check_ids("embedding_backward", "ids", ids, num_embeddings)
    rows = Inputs("embedding_backward").rows_like("grad_x", grad_x, ids.shape, "H")
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    grouped = flat.take(order)
    firsts = np.flatnonzero(np.diff(grouped, prepend=-1))  # where an id's run begins
    grad_weight = np.zeros((num_embeddings, rows.shape[1]), rows.dtype)
    grad_weight[grouped[firsts]] = np.add.reduceat(rows.take(order, axis=0), firsts, axis=0)
    return grad_weight
