from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe.errors import DataError, DTypeError, RangeError
from npmoe.training import (
    CHARACTER_CLASSES,
    CharVocabulary,
    batch,
    character_class,
    python_topics_text,
    read_text,
    split_text,
    validation_batches,
    windows_per_epoch,
)

sizes = st.tuples(st.integers(1, 12), st.integers(0, 200)).map(
    lambda pair: (pair[0], pair[0] + 1 + pair[1])
)


def test_text_is_read_as_it_is(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffnaïve\r\n漢\n".encode())
    assert read_text(file) == "naïve\r\n漢\n"
    assert read_text(str(file)) == "naïve\r\n漢\n"


def test_unusable_files_are_named(tmp_path):
    file = tmp_path / "text.txt"
    with pytest.raises(DataError) as error:
        read_text(file)
    assert str(error.value) == (
        f"read_text: {file} could not be read: No such file or directory. Give a UTF-8 text file."
    )
    with pytest.raises(DataError, match=r"could not be read: (Is a directory|Permission denied)"):
        read_text(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(DataError) as error:
        read_text(file)
    assert str(error.value) == f"read_text: {file} must hold text, got an empty file."
    file.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError, match="must hold text, got an empty file"):
        read_text(file)
    file.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError) as error:
        read_text(file)
    assert str(error.value) == (
        f"read_text: {file} must be UTF-8 text, got byte 0xef at offset 2 "
        "(invalid continuation byte). Convert it, for example with iconv -t utf-8."
    )


def test_a_file_without_permission_is_named(monkeypatch, tmp_path):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match=r"text\.txt could not be read: Permission denied\. Give"):
        read_text(tmp_path / "text.txt")


def test_the_topics_of_python():
    text = python_topics_text()
    from pydoc_data.topics import topics

    assert len(text) > 300_000
    names = sorted(topics)
    assert text.startswith(topics[names[0]])
    assert text.endswith("\n\n" + topics[names[-1]])
    assert len(text) == sum(map(len, topics.values())) + len(topics) - 1


def test_topics_are_sorted_whatever_their_order(monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "two\n", "a": "one\n"})
    assert python_topics_text() == "one\n\ntwo\n"


def test_a_python_without_topics_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError) as error:
        python_topics_text()
    assert str(error.value) == (
        "python_topics_text: this Python comes without pydoc_data. "
        "Give a text of your own with --text FILE."
    )


@given(st.text(min_size=1))
def test_a_vocabulary_goes_there_and_back(text):
    vocabulary = CharVocabulary.from_text(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == [sorted(set(text)).index(char) for char in text]
    assert vocabulary.decode(ids) == text
    assert vocabulary.size == len(set(text))
    assert CharVocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_lone_surrogates_are_characters_like_others():
    vocabulary = CharVocabulary.from_text("a\ud800b")
    assert vocabulary.decode(vocabulary.encode("\ud800a")) == "\ud800a"


def test_vocabulary_messages():
    vocabulary = CharVocabulary.from_text("banana")
    for text, char, code, position in (
        ("banané", "é", "00E9", 5),
        ("na!ve", "!", "0021", 2),
        ("bax漢", "x", "0078", 2),
    ):
        with pytest.raises(DataError) as error:
            vocabulary.encode(text)
        assert str(error.value) == (
            "CharVocabulary.encode: text must hold known characters only, "
            f"got {char!r} (U+{code}) at position {position}. "
            "The vocabulary has 3 characters: 'abn'."
        )
    for wrong in (3, -1):
        with pytest.raises(DataError) as error:
            vocabulary.decode([0, wrong])
        assert str(error.value) == f"CharVocabulary.decode: ids must be in 0..2, got {wrong}."
    for characters in ("ba", "aab", ""):
        with pytest.raises(DataError) as error:
            CharVocabulary(characters)
        assert str(error.value) == (
            "CharVocabulary: characters must be sorted, each once and at least one, "
            f"got {characters!r}. Make it with CharVocabulary.from_text."
        )
    with pytest.raises(DataError, match=r"from_json: text must be JSON, got Expecting value"):
        CharVocabulary.from_json("abn")
    for text in ('{"characters": 3}', "[]", "{}"):
        with pytest.raises(DataError) as error:
            CharVocabulary.from_json(text)
        assert str(error.value) == (
            "CharVocabulary.from_json: text must be an object with the string 'characters', "
            f"got {text!r}."
        )


def test_the_last_tenth_is_for_validation():
    ids = np.arange(30, dtype=np.int32)
    train, validation = split_text(ids, 2)
    assert train.tolist() == list(range(27))
    assert validation.tolist() == [27, 28, 29]
    assert int(100 * 0.29) == 28  # binary falls short; the decimal is meant
    train, validation = split_text(np.arange(100, dtype=np.int32), 1, 0.29)
    assert validation.size == 29


def test_a_text_that_is_too_short_says_what_to_do():
    ids = np.arange(30, dtype=np.int32)
    with pytest.raises(DataError) as error:
        split_text(ids, 3)
    assert str(error.value) == (
        "split_text: the validation part of the text must hold at least context_length + 1 = 4 "
        "characters, got 3. Give a longer text or a shorter context."
    )
    with pytest.raises(
        DataError, match=r"the training part of the text .* = 28 characters, got 27"
    ):
        split_text(ids, 27)
    with pytest.raises(DataError, match=r"batch: ids must hold .* = 31 characters, got 30"):
        batch(ids, 30, 1, seed=0, step=0)
    with pytest.raises(DataError, match=r"validation_batches: ids must .* = 31 .* got 30"):
        validation_batches(ids, 30, 1)


def test_split_messages():
    ids = np.arange(30, dtype=np.int32)
    for fraction in (0, 1.0, -0.1, float("nan")):
        with pytest.raises(RangeError, match="validation_fraction must be between 0 and 1, got"):
            split_text(ids, 2, fraction)
    with pytest.raises(RangeError, match="split_text: context_length must be at least 1, got 0"):
        split_text(ids, 0)
    with pytest.raises(DTypeError, match="split_text: ids must be an integer array, got float64"):
        split_text(np.zeros(30), 2)


def test_batch_messages():
    ids = np.arange(30, dtype=np.int32)
    with pytest.raises(RangeError, match="batch: batch_size must be at least 1, got 0"):
        batch(ids, 4, 0, seed=0, step=0)
    with pytest.raises(RangeError, match="batch: seed must be at least 0, got -1"):
        batch(ids, 4, 1, seed=-1, step=0)
    with pytest.raises(RangeError, match="batch: step must be at least 0, got -1"):
        batch(ids, 4, 1, seed=0, step=-1)
    with pytest.raises(RangeError, match="batch: context_length must be at least 1, got 0"):
        batch(ids, 0, 1, seed=0, step=0)
    with pytest.raises(RangeError, match="validation_batches: batch_size must be at least 1"):
        validation_batches(ids, 4, 0)


@given(sizes, st.integers(1, 7), st.integers(0, 2**70))
def test_an_epoch_covers_the_text_once(size, batch_size, seed):
    context, n = size
    ids = np.arange(n, dtype=np.int32)
    windows = windows_per_epoch(n, context)
    steps = -(-2 * windows // batch_size)  # at least two epochs
    inputs, targets = zip(
        *(batch(ids, context, batch_size, seed, step) for step in range(steps)), strict=True
    )
    assert {x.shape for x in (*inputs, *targets)} == {(batch_size, context)}
    assert {x.dtype for x in (*inputs, *targets)} == {ids.dtype}
    inputs, targets = np.concatenate(inputs), np.concatenate(targets)
    np.testing.assert_array_equal(targets, inputs + 1)
    for epoch in range(2):
        seen = np.sort(targets[epoch * windows : (epoch + 1) * windows].reshape(-1))
        np.testing.assert_array_equal(seen, np.arange(seen[0], seen[0] + windows * context))
        if n > 2 * context:
            assert seen[0] <= 2 * context
            assert seen[-1] >= n - 2 * context


def test_epochs_differ_and_every_target_is_reached():
    ids = np.arange(1000, dtype=np.int32)
    windows = windows_per_epoch(1000, 10)
    assert windows == 99
    epochs = [batch(ids, 10, windows, seed=4, step=epoch)[1] for epoch in range(60)]
    counts = np.bincount(np.concatenate(epochs).reshape(-1), minlength=1000)
    assert counts[0] == 0  # there is nothing before the first character
    assert counts[1:].min() >= 1
    assert (counts[20:981] == 60).all()
    assert {int(e.min()) for e in epochs} == set(range(1, 11))  # every offset
    assert len({tuple(e[:, 0] - e.min()) for e in epochs}) == 60  # the order too


def test_a_batch_depends_on_seed_and_step_alone():
    ids = np.arange(500, dtype=np.int32)
    wanted = batch(ids, 8, 4, seed=1, step=33)
    for step in (0, 34, 5000):
        other = batch(ids, 8, 4, seed=1, step=step)
        assert not np.array_equal(other[0], wanted[0])
    again = batch(ids, 8, 4, seed=1, step=33)
    np.testing.assert_array_equal(again[0], wanted[0])
    np.testing.assert_array_equal(again[1], wanted[1])
    assert not np.array_equal(batch(ids, 8, 4, seed=2, step=33)[0], wanted[0])
    wanted[0][...] = -1  # own memory: the text and later batches do not change
    np.testing.assert_array_equal(batch(ids, 8, 4, seed=1, step=33)[0], again[0])


@given(sizes, st.integers(1, 7))
def test_validation_covers_every_target_once(size, batch_size):
    context, n = size
    ids = np.arange(n, dtype=np.int32)
    pairs = list(validation_batches(ids, context, batch_size))
    assert np.concatenate([t.reshape(-1) for _, t in pairs]).tolist() == list(range(1, n))
    for inputs, targets in pairs:
        np.testing.assert_array_equal(inputs + 1, targets)
    *whole, last = [t.shape for _, t in pairs]
    rest = (n - 1) % context
    assert all(b <= batch_size and length == context for b, length in whole)
    assert last == (1, rest) if rest else last[1] == context


def test_character_classes():
    expected = {
        "lower": "azéß",
        "upper": "AZÉ",
        "digit": "09٣",
        "space": " \t\u00a0",
        "newline": "\n\r",
        "punctuation": "_.,;()[]{}+-*/=<>|\\\"'`~^&%$#@!?:–«",
        "other": "漢\x00ªǅ½",
    }
    assert tuple(expected) == CHARACTER_CLASSES
    for name, characters in expected.items():
        for char in characters:
            assert character_class(char) == name, char
