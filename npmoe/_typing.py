"""Types shared by every room, and the one way to find an array's namespace."""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

# An array of whichever backend is in use; host code uses HostArray.
Array: TypeAlias = Any
HostArray: TypeAlias = "npt.NDArray[Any]"


def array_namespace(x: Array) -> Any:
    """Return the module whose functions take `x`: numpy for ndarrays, else the array's own."""
    return np if type(x) is np.ndarray else x.__array_namespace__()
