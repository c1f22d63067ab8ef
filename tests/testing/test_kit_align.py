"""check_align: right plans of any order pass, planted mistakes die by name, no check is idle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit_reproducers import reproduces

from npmoe import RangeError
from npmoe.naive import blocks as naive
from npmoe.plans.blocks import align_block_size
from npmoe.testing.conformance.align import align_kind, check_align
from npmoe.testing.faults.align import FAULTS

NAMES = [check.name for check in align_kind(stable=True, strict_tail=True).checks]
DIALECTS = [
    ("vllm", "keep"),
    ("vllm", "drop"),
    ("vllm_old_tail", "keep"),
    ("vllm_old_tail", "drop"),
    ("sglang", "keep"),
    ("naive", "keep"),
]


def right(topk_ids, block_size, num_experts, expert_map=None):
    return align_block_size(topk_ids, block_size, num_experts, expert_map)


def right_sglang(topk_ids, block_size, num_experts, expert_map=None):
    return align_block_size(topk_ids, block_size, num_experts, expert_map, "sglang")


def from_lists(topk_ids, block_size, num_experts, expert_map=None, **options):
    rows, experts, total = naive.align_block_size(
        topk_ids, block_size, num_experts, expert_map, **options
    )
    rows = None if rows is None else np.array(rows, np.int32)
    return rows, np.array(experts, np.int32), total


def unordered(topk_ids, block_size, num_experts, expert_map=None, **options):
    """Descending routes, garbage behind the last block, a plain number."""
    plan = align_block_size(topk_ids, block_size, num_experts, expert_map, **options)
    rows, experts, total = plan[0].copy(), plan[1].copy(), int(plan[2][0])
    owner = np.append(topk_ids.ravel(), -9)[rows]
    for e in np.unique(topk_ids):
        rows[owner == e] = rows[owner == e][::-1]
    rows[total:] = 77
    experts[total // block_size :] = -55
    return rows, experts, total


def in_dialect(subject, dialect: str, invalid: str):
    def ask(topk_ids, block_size, num_experts, expert_map=None):
        kept = "keep" if expert_map is None else invalid
        return subject(topk_ids, block_size, num_experts, expert_map, dialect=dialect, invalid=kept)

    return ask


@pytest.mark.parametrize(("dialect", "invalid"), DIALECTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_plans_pass(dialect: str, invalid: str, seed: int) -> None:
    strict = dialect != "naive"
    # The plans of npmoe, of lists, and in another order: in turns but for vLLM's.
    subjects = (align_block_size, from_lists, unordered) if strict else (from_lists,) * 3
    for turn, subject in enumerate(subjects):
        usual = (dialect, invalid) == ("vllm", "keep")
        if not usual and turn != seed:
            continue
        ordered = strict and subject is not unordered
        report = check_align(
            in_dialect(subject, dialect, invalid),
            *(dialect, ordered, ordered),
            invalid=invalid,
            seed=seed,
            quick=not usual or turn != seed,
        )
        assert report.passed, str(report)
        assert all(r.cases > 0 for r in report.results)


def test_order_and_tail_are_free_only_if_they_may_be() -> None:
    subject = in_dialect(unordered, "vllm", "keep")
    assert check_align(subject, quick=True).passed
    report = check_align(subject, stable=True, strict_tail=True, quick=True)
    assert {f.check for f in report.failures} == {"stable-order", "strict-tail"}


def test_a_length_padded_to_whole_blocks_is_an_option() -> None:
    def padded(topk_ids, block_size, num_experts, expert_map=None):
        return align_block_size(topk_ids, block_size, num_experts, expert_map, pad_sorted_ids=True)

    assert check_align(padded, pad_sorted_ids=True, quick=True).passed
    names = {f.check for f in check_align(padded, quick=True).failures}
    assert names <= {"dtypes-and-lengths", "no-tokens", "expert-map"}
    assert "dtypes-and-lengths" in names


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_mistakes_die_by_name_and_small(fault, tmp_path: Path) -> None:
    options = dict(fault.options)
    for seed in (0, 1, 2):
        report = check_align(fault.subject, **options, only=[fault.check], quick=True, seed=seed)
        assert [f.check for f in report.failures] == [fault.check]
    case = report.failures[0].case
    T, K = case.arguments["topk_ids"].shape
    assert K <= 4
    assert T <= 4 or fault.check in ("routes-beyond-16-bits", "edges-of-thread-blocks")
    assert case.arguments["num_experts"] <= 4 or fault.check == "more-experts-than-a-block"
    assert reproduces(report, tmp_path)
    mended = "right_sglang" if options.get("dialect") == "sglang" else "right"
    assert not reproduces(report, tmp_path, target=f"{__name__}:{mended}")


def test_scripts_leave_free_what_is_free(tmp_path: Path) -> None:
    for fault in FAULTS:
        if not fault.options:
            report = check_align(fault.subject, only=[fault.check], quick=True)
            assert not reproduces(report, tmp_path, target=f"{__name__}:unordered")


def lost_when(condition):
    """Return what loses the first route in some cases."""

    def subject(topk_ids, block_size, num_experts, expert_map=None):
        plan = right(topk_ids, block_size, num_experts, expert_map)
        if condition(topk_ids, block_size, num_experts):
            plan.sorted_token_ids[plan.sorted_token_ids == 0] = topk_ids.size
        return plan

    return subject


IDLE_OTHERWISE = {
    "blocks-larger-than-the-batch": lost_when(lambda ids, B, E: B > 64),
    "read-only-inputs": lost_when(lambda ids, B, E: not ids.flags.writeable),
    "strided-inputs": lost_when(lambda ids, B, E: not ids.flags.c_contiguous),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_check_can_fail(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in IDLE_OTHERWISE:
        assert name in {fault.check for fault in FAULTS}
        return
    subject = IDLE_OTHERWISE[name]
    monkeypatch.setitem(globals(), "subject", subject)
    report = check_align(subject, only=[name], quick=True, name=f"{__name__}:subject")
    assert not report.passed
    assert reproduces(report, tmp_path)


def test_mistakes_of_the_same_kinds_die_too() -> None:
    def sentinel_by_tokens(ids, B, E, local_ids=None):
        rows, experts, total = right(ids, B, E, local_ids)
        return np.where(rows == ids.size, len(ids), rows).astype(np.int32), experts, total

    def total_of_all_rows(ids, B, E, local_ids=None):
        rows, experts, _ = right(ids, B, E, local_ids)
        return rows, experts, len(rows)

    def descending(ids, B, E, local_ids=None):
        rows, experts, total = right(E - 1 - ids, B, E, local_ids)
        return rows, np.where(experts < 0, -1, E - 1 - experts).astype(np.int32), total

    def tokens_not_routes(ids, B, E, local_ids=None):
        rows, experts, total = right(ids, B, E, local_ids)
        return np.where(rows < ids.size, rows // ids.shape[1], rows), experts, total

    def first_256(ids, B, E, local_ids=None):
        return right(np.where(ids < 256, ids, -1), B, E, local_ids)

    def first_expert_ignored(ids, B, E, local_ids=None):
        return right(np.where(ids == 0, -1, ids), B, E, local_ids)

    def one_block_each(ids, B, E, local_ids=None):
        """Give an expert of many routes one large block."""
        rows, experts, total = right(ids, B, E, local_ids)
        experts[1:][experts[1:] == experts[:-1]] = -1
        return rows, experts, total

    def columns_first(ids, B, E, local_ids=None):
        rows, experts, total = right(np.ascontiguousarray(ids.T), B, E, local_ids)
        return rows, experts, total

    def map_drops(ids, B, E, local_ids=None):
        """Drop where the dialect keeps."""
        invalid = "keep" if local_ids is None else "drop"
        return align_block_size(ids, B, E, local_ids, invalid=invalid)

    def floats(ids, B, E, local_ids=None):
        rows, experts, total = right(ids, B, E, local_ids)
        return rows.astype(np.float32), experts, total

    def none(ids, B, E, local_ids=None):
        return None, *right(ids, B, E, local_ids)[1:]

    def three_totals(ids, B, E, local_ids=None):
        return *right(ids, B, E, local_ids)[:2], np.zeros(3, np.int32)

    def far_total(ids, B, E, local_ids=None):
        return *right(ids, B, E, local_ids)[:2], 2**40

    def matrix(ids, B, E, local_ids=None):
        rows, experts, total = right(ids, B, E, local_ids)
        return rows[:, None], experts, total

    wrong = (sentinel_by_tokens, total_of_all_rows, descending, tokens_not_routes, first_256)
    garbage = (floats, none, three_totals, far_total, matrix)
    more = (first_expert_ignored, one_block_each, columns_first, map_drops)
    for subject in (*wrong, *more, *garbage):
        report = check_align(subject, quick=True, stop=True)
        assert not report.passed, subject.__name__
    assert check_align(map_drops, invalid="drop", quick=True).passed


def test_garbage_is_a_finding_and_never_a_crash() -> None:
    rng = np.random.default_rng(0)

    def garbage(ids, B, E, local_ids=None):
        def draw():
            shape = [(), (0,), (1,), (2, 2), (ids.size,), (ids.size * B,)][rng.integers(6)]
            far = [1, 2**20, 2**62][rng.integers(3)]
            dtype = ["i4", "i8", "u1", "u8"][rng.integers(4)]
            return rng.integers(-far, far, shape, endpoint=True).astype(dtype)

        return draw(), draw(), draw().reshape(-1)[:1].sum()

    for seed, dialect in enumerate(("vllm", "sglang", "naive")):
        report = check_align(garbage, dialect, quick=True, seed=seed)
        assert len(report.failures) >= len(report.results) - 4


def test_options_that_make_no_sense() -> None:
    for options, words in (
        ({"dialect": "vllm2"}, "dialect must be one of vllm, vllm_old_tail, sglang, naive, got"),
        ({"invalid": "lose"}, "invalid must be 'keep' or 'drop', got 'lose'."),
        (
            {"dialect": "sglang", "invalid": "drop"},
            "invalid must be 'keep' in dialect 'sglang', got 'drop'. It says what becomes of",
        ),
        (
            {"dialect": "naive", "stable": True},
            "stable, strict_tail and pad_sorted_ids must be False in dialect 'naive', got True.",
        ),
    ):
        with pytest.raises(RangeError) as caught:
            check_align(right, **options)
        assert str(caught.value).startswith(f"check_align: {words}")
