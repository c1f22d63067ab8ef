"""What goes wrong before a kernel runs; what goes wrong while it runs is in findings.py."""

from __future__ import annotations

from npmoe.errors import BackendUnavailableError, NpmoeError, UnsupportedError

__all__ = ["CompilerMissingError", "PtxSyntaxError", "PtxUnsupportedError", "TranslationError"]


class PtxSyntaxError(NpmoeError, SyntaxError):
    """A text is not PTX, or not as far as this parser reads it."""


class PtxUnsupportedError(UnsupportedError):
    """An instruction is PTX, but the translator does not know it."""


class CompilerMissingError(BackendUnavailableError):
    """There is no C++ compiler, or it cannot compile the translation."""


class TranslationError(NpmoeError, RuntimeError):
    """The C++ compiler rejected a translation: a mistake of the translator."""
