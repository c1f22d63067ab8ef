"""Exception classes: one for each kind of mistake, each also a standard exception."""


class NpmoeError(Exception):
    """Base class of everything npmoe raises on purpose."""


class ShapeError(NpmoeError, ValueError):
    """An array has a shape that does not fit the axis letters bound so far."""


class RangeError(NpmoeError, ValueError):
    """A value lies outside its allowed range, or options contradict each other."""


class PlanError(NpmoeError, ValueError):
    """Expert ids or a dispatch plan break an invariant."""


class DTypeError(NpmoeError, TypeError):
    """An array has a dtype that the function does not take."""


class BackendUnavailableError(NpmoeError, ImportError):
    """A backend, or a package that a command needs, cannot be used here."""


class UnsupportedError(NpmoeError, NotImplementedError):
    """A combination is legal but this backend does not do it."""


class CheckpointError(NpmoeError, ValueError):
    """A checkpoint or run folder cannot be read, written or continued."""


class DataError(NpmoeError, ValueError):
    """A text or data file cannot be used."""


class GradientError(NpmoeError, AssertionError):
    """A hand-written gradient disagrees with finite differences."""
