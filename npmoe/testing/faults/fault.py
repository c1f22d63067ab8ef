"""A planted mistake: a subject that is wrong in one plausible way, and the check that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One mistake.

    Attributes
    ----------
    name : str
        Lower case, hyphens: what is wrong.
    kind : str
        Of the subject, as in ``check_<kind>``.
    check : str
        The check that must find it, by name.
    seen : str
        Where it really happened, or the rule it breaks: "vllm#13474", "SGLang sgl-kernel".
    subject : callable
        The wrong function, of the kind's signature.
    options : dict
        Keywords of ``check_<kind>``, for example a dialect or convention.
    """

    name: str
    kind: str
    check: str
    seen: str
    subject: Callable[..., Any]
    options: tuple[tuple[str, Any], ...] = ()
