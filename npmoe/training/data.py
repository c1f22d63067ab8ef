"""Text for a character model: reading, the vocabulary, and batches that need no saved state."""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from npmoe._checks import check_integer_ids, require
from npmoe._typing import HostArray
from npmoe.errors import DataError

CHARACTER_CLASSES = ("lower", "upper", "digit", "space", "newline", "punctuation", "other")
# Keeps the data order apart from other streams made from the same seed.
_STREAM = int.from_bytes(b"data", "big")


def read_text(path: str | Path) -> str:
    """Return a UTF-8 file as text, newlines as they are and without a byte order mark.

    Raises
    ------
    DataError
        If the file is missing, unreadable, empty or not UTF-8.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"read_text: {path} could not be read: {error.strerror}. Give a UTF-8 text file."
        ) from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"read_text: {path} must be UTF-8 text, got byte 0x{content[error.start]:02x} at "
            f"offset {error.start} ({error.reason}). Convert it, for example with iconv -t utf-8."
        ) from error
    text = text.removeprefix("\ufeff")
    if not text:
        raise DataError(f"read_text: {path} must hold text, got an empty file.")
    return text


def python_topics_text() -> str:
    """Return the language documentation of this Python: ``pydoc_data.topics``, about 465 kB.

    The topics stand in sorted order of their names, a blank line between two: each topic ends
    with a newline, and one more joins them. The text differs between versions of Python.

    Raises
    ------
    DataError
        If this Python comes without pydoc_data.
    """
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - half a megabyte of text
    except ModuleNotFoundError as error:
        raise DataError(
            "python_topics_text: this Python comes without pydoc_data. "
            "Give a text of your own with --text FILE."
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True, slots=True)
class CharVocabulary:
    """The characters a model knows, sorted by code point; a character's id is its place.

    Parameters
    ----------
    characters : str
        Sorted, each once.

    Raises
    ------
    DataError
        If they are not, or there is none.

    Examples
    --------
    >>> vocabulary = CharVocabulary.from_text("banana")
    >>> vocabulary.characters, vocabulary.encode("nab").tolist(), vocabulary.decode([1, 0])
    ('abn', [2, 0, 1], 'ba')
    """

    characters: str

    def __post_init__(self) -> None:
        """Check the order, on which `encode` relies."""
        if not self.characters or self.characters != "".join(sorted(set(self.characters))):
            raise DataError(
                "CharVocabulary: characters must be sorted, each once and at least one, "
                f"got {_shorten(self.characters)}. Make it with CharVocabulary.from_text."
            )

    @classmethod
    def from_text(cls, text: str) -> CharVocabulary:
        """Return the vocabulary of all characters of a text."""
        return cls("".join(sorted(set(text))))

    @property
    def size(self) -> int:
        """How many characters there are."""
        return len(self.characters)

    def encode(self, text: str) -> HostArray:
        """Return the ids of a text, (N,) int32.

        Raises
        ------
        DataError
            If a character is not in the vocabulary; names the first one and its position.
        """
        known, codes = _code_points(self.characters), _code_points(text)
        ids = np.searchsorted(known, codes).astype(np.int32)
        np.minimum(ids, self.size - 1, out=ids)
        unknown = np.flatnonzero(known[ids] != codes)
        if unknown.size:
            position = int(unknown[0])
            char = text[position]
            raise DataError(
                f"CharVocabulary.encode: text must hold known characters only, got {char!r} "
                f"(U+{ord(char):04X}) at position {position}. "
                f"The vocabulary has {self.size} characters: {_shorten(self.characters)}."
            )
        return ids

    def decode(self, ids: HostArray | list[int]) -> str:
        """Return the text of some ids.

        Raises
        ------
        DataError
            If an id is not below the size.
        """
        array = np.asarray(ids, np.int64).reshape(-1)
        wrong = array[(array < 0) | (array >= self.size)]
        if wrong.size:
            raise DataError(
                f"CharVocabulary.decode: ids must be in 0..{self.size - 1}, got {wrong[0]}."
            )
        return "".join(self.characters[i] for i in array.tolist())

    def to_json(self) -> str:
        """Return the vocabulary as JSON text."""
        return json.dumps({"characters": self.characters})

    @classmethod
    def from_json(cls, text: str) -> CharVocabulary:
        """Return the vocabulary that `to_json` wrote.

        Raises
        ------
        DataError
            If the text is something else.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"CharVocabulary.from_json: text must be JSON, got {error}.") from error
        characters = values.get("characters") if isinstance(values, dict) else None
        if not isinstance(characters, str):
            raise DataError(
                "CharVocabulary.from_json: text must be an object with the string "
                f"'characters', got {_shorten(text)}."
            )
        return cls(characters)


def split_text(
    ids: HostArray, context_length: int, validation_fraction: float = 0.1
) -> tuple[HostArray, HostArray]:
    """Return the training part and the validation part, the last ``floor(N * fraction)`` ids.

    Parameters
    ----------
    ids : (N,) int array
        The encoded text.
    context_length : int
        L; both parts must hold a window of L inputs and one more target.
    validation_fraction : float
        Between 0 and 1; its shortest decimal spelling is meant, exactly.

    Returns
    -------
    tuple of (N - V,) and (V,) int array
        Views of `ids`.

    Raises
    ------
    DataError
        If a part is shorter than L + 1.
    """
    require(
        0 < validation_fraction < 1,
        "split_text: validation_fraction must be between 0 and 1, "
        f"got {float(validation_fraction)!r}.",
    )
    check_integer_ids("split_text", "ids", ids)
    cut = ids.size - int(ids.size * Fraction(repr(float(validation_fraction))))
    parts = ids[:cut], ids[cut:]
    for name, part in zip(("training", "validation"), parts, strict=True):
        _check_length("split_text", f"the {name} part of the text", part, context_length)
    return parts


def windows_per_epoch(num_ids: int, context_length: int) -> int:
    """Return how many windows one epoch of `batch` holds: ``max(1, (N - L) // L)``."""
    return max(1, (num_ids - context_length) // context_length)


def batch(
    ids: HostArray, context_length: int, batch_size: int, seed: int, step: int
) -> tuple[HostArray, HostArray]:
    """Return the inputs and targets of one training step, a function of its arguments only.

    An epoch is ``W = windows_per_epoch(N, L)`` windows that touch without overlap: window i has
    the inputs ``ids[o + i L : o + (i + 1) L]`` and as targets the ids one later. The offset o is
    drawn for each epoch from 0 .. N - 1 - W L and the windows are shuffled for each epoch, both
    from (seed, epoch). Step s takes the windows s B .. s B + B - 1 of this endless sequence, so a
    batch may cross into the next epoch. Every target more than 2 L away from both ends of the
    text is seen exactly once in each epoch; those nearer an end are seen less often.

    Parameters
    ----------
    ids : (N,) int array
        The training text.
    context_length, batch_size : int
        L and B.
    seed, step : int
        Not negative.

    Returns
    -------
    tuple of two (B, L) int arrays
        Inputs and targets, new memory.

    Raises
    ------
    DataError
        If the text is shorter than L + 1.
    RangeError
        If a number is out of range.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("step", step, 0),
    ):
        require(value >= least, f"batch: {name} must be at least {least}, got {value}.")
    _check_length("batch", "ids", ids, context_length)
    windows = windows_per_epoch(ids.size, context_length)
    numbers = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, places = np.divmod(numbers, windows)
    starts = np.empty(batch_size, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        starts[here] = _epoch_starts(ids.size, context_length, seed, epoch)[places[here]]
    positions = starts[:, None] + np.arange(context_length)  # (B, L)
    return ids[positions], ids[positions + 1]


def validation_batches(
    ids: HostArray, context_length: int, batch_size: int
) -> Iterator[tuple[HostArray, HostArray]]:
    """Return an iterator of (inputs, targets) whose targets are ids[1:], each exactly once.

    Batches of at most B windows of L, in the order of the text, and a last batch (1, r) for the
    r < L targets left over. Weigh the batches by their number of targets.

    Parameters
    ----------
    ids : (N,) int array
        The validation text.
    context_length, batch_size : int
        L and B.

    Returns
    -------
    iterator of two (b, L) int arrays
        Views of `ids`.

    Raises
    ------
    DataError
        If the text is shorter than L + 1.
    """
    require(
        batch_size >= 1, f"validation_batches: batch_size must be at least 1, got {batch_size}."
    )
    _check_length("validation_batches", "ids", ids, context_length)
    windows = (ids.size - 1) // context_length
    whole = windows * context_length

    def pieces(part: HostArray) -> Iterator[HostArray]:
        full = part[:whole].reshape(windows, context_length)
        for first in range(0, windows, batch_size):
            yield full[first : first + batch_size]
        if whole < part.size:
            yield part[None, whole:]

    return zip(pieces(ids[:-1]), pieces(ids[1:]), strict=True)


def character_class(char: str) -> str:
    """Return which of CHARACTER_CLASSES a character belongs to.

    Examples
    --------
    >>> [character_class(c) for c in "aÉ7 ;漢"]
    ['lower', 'upper', 'digit', 'space', 'punctuation', 'other']
    """
    category = unicodedata.category(char)
    if char in "\n\r":
        return "newline"
    if char.isspace():
        return "space"
    if category[0] in "PS":
        return "punctuation"
    return {"Ll": "lower", "Lu": "upper", "Nd": "digit"}.get(category, "other")


def _check_length(function: str, name: str, ids: HostArray, context_length: int) -> None:
    require(
        context_length >= 1,
        f"{function}: context_length must be at least 1, got {context_length}.",
    )
    if ids.size < context_length + 1:
        raise DataError(
            f"{function}: {name} must hold at least context_length + 1 = {context_length + 1} "
            f"characters, got {ids.size}. Give a longer text or a shorter context."
        )


@functools.lru_cache(maxsize=2)
def _epoch_starts(num_ids: int, context_length: int, seed: int, epoch: int) -> HostArray:
    """Return where the windows of one epoch start, shuffled, (W,)."""
    rng = np.random.default_rng(np.random.SeedSequence([_STREAM, seed, epoch]))
    windows = windows_per_epoch(num_ids, context_length)
    offset = rng.integers(num_ids - windows * context_length)
    starts = offset + context_length * rng.permutation(windows)
    starts.flags.writeable = False
    return starts


def _code_points(text: str) -> HostArray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
