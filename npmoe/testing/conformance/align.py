"""Plans of padded blocks, judged by their invariants: ``check_align``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from npmoe._checks import require
from npmoe.naive.blocks import align_block_size
from npmoe.plans.blocks import BLOCK_DIALECTS, BlockDialect, InvalidRoutes
from npmoe.plans.validation import PlanFinding, validate_plan
from npmoe.testing.conformance import align_cases as cases
from npmoe.testing.conformance.case import Call, Case, Check, Expected, Finding, Kind
from npmoe.testing.conformance.draw import read_only
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.runner import Settings, run_checks

_CONTENT = ("I1", "I2", "I3", "I4", "I5", "I6")
# What dialect "naive" does not have: rows, padding and maps.
_NEEDS_ROWS = {
    *("sentinel-is-num-routes", "padding-at-block-ends", "experts-ascend", "expert-map"),
    *("empty-experts-get-no-block", "full-blocks-get-no-extra-block", "minus-one-with-a-map"),
}
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a plan is held to: the dialect, and what is left free."""

    dialect: BlockDialect
    invalid: InvalidRoutes
    stable: bool
    strict_tail: bool
    pad_sorted_ids: bool

    def question(self, case: Case) -> dict[str, Any]:
        """Return the arguments that `align_block_size` and `validate_plan` share."""
        given = {"expert_map": None, **case.arguments}
        mapped = given["expert_map"] is not None
        return given | {
            "dialect": self.dialect,
            "invalid": self.invalid if mapped else "keep",
            "pad_sorted_ids": self.pad_sorted_ids,
        }

    def expected(self, case: Case) -> tuple[Expected, ...]:
        """Return the stable plan; nobody is compared with it entry by entry."""
        plain = {n: v.tolist() for n, v in case.arguments.items() if isinstance(v, np.ndarray)}
        rows, experts, total = align_block_size(**(self.question(case) | plain))
        return (
            Expected(value=np.array(rows or [], np.int32), any_shape=True),
            Expected(value=np.array(experts, np.int32), any_shape=True),
            Expected(value=np.array(total)),
        )

    def findings(self, call: Call, case: Case) -> list[PlanFinding]:
        """Call the subject, and return what `validate_plan` says of its outputs."""
        rows, experts, total = call(case)
        if rows.dtype == object and self.dialect != "naive":
            raise Finding("output 0 must be an array, got None.")
        # A plain number, or an array of any integers, is as good as an int32.
        if _INT32.min <= total <= _INT32.max:
            total = total.astype(np.int32)
        return validate_plan(
            (None if rows.dtype == object else rows, experts, total.reshape(1)),
            **self.question(case),
            strict_tail=self.strict_tail,
            stable=self.stable,
        )

    def judge(self, *invariants: str) -> Callable[[Call, Case], None]:
        """Return the judge of some invariants."""

        def judge(call: Call, case: Case) -> None:
            for finding in self.findings(call, case):
                if finding.invariant in invariants:
                    raise Finding(finding.message)

        return judge

    def judge_sentinel(self, call: Call, case: Case) -> None:
        """Raise unless T*K stands where padding belongs."""
        rows = call(case)[0]
        if rows.ndim != 1:
            raise Finding(f"output 0 must have one axis, got shape {rows.shape}.")
        want, _, total = (e.value for e in self.expected(case))
        R, n = case.arguments["topk_ids"].size, int(total)
        need, have = int((want[:n] == R).sum()), int((rows[:n] == R).sum())
        if have < need and rows.size >= n:
            strange = (rows[:n] < 0) | (rows[:n] > R)  # or a route once more
            again = np.ones(n, bool)
            again[np.unique(rows[:n], return_index=True)[1]] = False
            p = int(np.argmax((rows[:n] != R) & (again | strange)))
            raise Finding(
                f"{need} rows of padding must hold T*K = {R}, got {have} of them; row {p} holds "
                f"{rows[p]}."
            )

    def judge_three_calls(self, call: Call, case: Case) -> None:
        """Raise unless a call is right again, after itself and after another problem."""
        judge = self.judge(*_CONTENT)
        ids = case.arguments["topk_ids"]
        for one in (case, case, case.replace(topk_ids=ids[: len(ids) // 2]), case):
            judge(call, one)

    def script(self, case: Case) -> str:
        """Return what a reproducer does with `got`."""
        R, B = case.arguments["topk_ids"].size, case.arguments["block_size"]
        lines = [
            "rows, experts, n = got[0], np.asarray(got[1]), int(np.asarray(got[2]).item())",
            "want, want_experts, total = d['expected0'], d['expected1'], int(d['expected2'])",
            "assert experts.dtype == np.int32, experts.dtype",
            "assert experts.shape == want_experts.shape, (experts.shape, want_experts.shape)",
            'assert n == total, f"num_tokens_post_padded: got {n}, expected {total}"',
            f"b = total // {B}",
            'assert (experts[:b] == want_experts[:b]).all(), f"got {experts}, not {want_experts}"',
        ]
        if self.dialect == "naive":
            return "\n".join([*lines, "assert rows is None, rows", ""])
        bucket = f"bucket = np.full({R} + 1, -9)  # whose block a route belongs to\n"
        bucket += f"bucket[want[:total]] = np.repeat(want_experts[:b], {B})\nbucket[{R}] = -9"
        if self.dialect != "sglang" and self.invalid == "keep":
            bucket = "bucket = np.append(d['arg0'].ravel(), -9)  # whose block a route belongs to"
        lines += [
            "rows = np.asarray(rows)",
            "assert rows.dtype == np.int32, rows.dtype",
            "assert rows.shape == want.shape, (rows.shape, want.shape)",
            'text = f"got\\n{rows[:n]}\\nexpected, but for the order in an expert,\\n{want[:n]}"',
            "assert (np.sort(rows[:n]) == np.sort(want[:n])).all(), text",
            bucket,
            "assert (bucket[rows[:n]] == bucket[want[:n]]).all(), text",
        ]
        if self.stable:
            lines.append("assert (rows[:n] == want[:n]).all(), text")
        if self.strict_tail:
            lines.append("assert (rows[n:] == want[n:]).all(), rows[n:]")
            lines.append("assert (experts[b:] == want_experts[b:]).all(), experts[b:]")
        return "\n".join([*lines, ""])

    def script_of_three_calls(self, case: Case) -> str:
        """Return the same for `judge_three_calls`."""
        once = self.script(case)
        half = len(case.arguments["topk_ids"]) // 2
        again = "got = target(*arguments)\n" + once
        return once + again + f"target(arguments[0][:{half}], *arguments[1:])\n" + again

    def checks(self) -> tuple[Check, ...]:
        """Return what this dialect promises."""
        judge, drawn, shaped, counted = self.judge, cases.drawn, cases.shaped, cases.counted
        every, whole = drawn(*cases.LOADS), judge(*_CONTENT)
        edges = [r + i for r in (32, 64, 256, 1024) for i in (-1, 0, 1)]
        table: list[tuple[str, str, cases.Generator, Callable[[Call, Case], None]]] = [
            ("each-route-exactly-once", "every route of an expert is in one row, no other in any",
             every, judge("I1")),
            ("sentinel-is-num-routes", "padding is T*K: not -1, 0, the last route or any other",
             every, self.judge_sentinel),
            ("padding-at-block-ends", "padding is one value, behind the routes of a block",
             every, judge("I2")),
            ("blocks-hold-one-expert", "a block has routes of one expert, the one in expert_ids",
             every, judge("I3")),
            ("padded-count-formula", "num_tokens_post_padded is the sum of ceil(n_e / B) * B",
             every, judge("I4")),
            ("experts-ascend", "blocks are in the order of their experts",
             cases.chained(counted((1, (1, 2)), (1, (2, 1)), (2, (1, 0, 3, 5)), (2, (5, 4, 1))),
                           every), judge("I5")),
            ("empty-experts-get-no-block", "no routes, no block: first, last, and between",
             counted((4, (1, 0)), (4, (0, 1)), (2, (0, 1, 0)), (4, (3, 0, 0, 1)),
                     (4, (0, 1, 0, 2, 0)), (16, (0,) * 7 + (5,) + (0,) * 8)),
             judge("I4", "I6")),
            ("full-blocks-get-no-extra-block", "B and 2B routes fill one and two blocks; B-1 and "
             "B+1 do not",
             counted((1, (1,)), (2, (2,)), (4, (4, 1)), (4, (8, 4, 3)), (4, (5, 4, 4)),
                     (16, (16, 15, 17, 32, 1)), (64, (64, 128, 63))), judge("I4", "I6")),
            ("first-and-last-expert", "experts 0 and E-1 are experts, alone and together",
             counted((2, (1,)), (2, (1, 0)), (2, (0, 1)), (2, (2, 0, 3)), (4, (0, 0, 5)),
                     (1, (3, 0, 0, 3))), whole),
            ("dtypes-and-lengths", "int32, and the lengths that callers allocate by: "
             "T*K + E*(B-1), at most T*K*B if T*K < E", every, judge("I7")),
            ("minus-one-is-no-expert", "routes of -1 are in no block (sglang: in blocks of -1), "
             "above all not in those of expert E-1",
             drawn("spread", alter=cases.with_minus_one), whole),
            ("ids-out-of-range-are-no-expert", "routes of E and more, or below -1, are in no block",
             drawn("spread", alter=cases.with_ids_out_of_range), whole),
            ("duplicates-are-two-routes", "a token may choose an expert twice",
             drawn("spread", alter=cases.with_duplicates), whole),
            ("no-tokens", "nothing to sort: 0 rows in blocks, and the right dtypes and lengths",
             cases.no_tokens, judge(*_CONTENT, "I7")),
            ("more-experts-than-a-block", "255 to 2,049 experts: no limit at 256 or 1,024, no "
             "power of two", shaped(*((3, 2, E, 4) for E in (255, 256, 257, 1023, 1024, 1025,
                                                              2049))), whole),
            ("blocks-larger-than-the-batch", "few experts, few routes, blocks of 128 and 512",
             shaped((1, 1, 1, 128), (2, 2, 2, 128), (3, 1, 3, 512), (40, 2, 2, 512)), whole),
            ("edges-of-thread-blocks", "routes one below, at and above 32, 64, 256 and 1,024",
             shaped(*((r, 1, 3, 16) for r in edges)), whole),
            ("routes-beyond-16-bits", "more than 65,536 routes: numbers are not cut",
             shaped((66_001, 1, 2, 256)), whole),
            ("calls-do-not-remember", "a second call is right too, also after another problem: "
             "counters and buffers start anew", every, self.judge_three_calls),
            ("read-only-inputs", "ids that must not be written to are only read",
             drawn(*cases.LOADS, alter=lambda _, case: case.replace(
                 topk_ids=read_only(case.arguments["topk_ids"]))), whole),
            ("strided-inputs", "ids with gaps between them are read by their strides",
             drawn("spread", alter=cases.with_gaps), whole),
            ("expert-map", "expert_ids holds the map's number of a block's expert; experts of "
             "other ranks as the dialect says",
             drawn("spread", alter=cases.with_map), judge(*_CONTENT, "I7")),
            ("minus-one-with-a-map", "an id of -1 does not read the map's last entry",
             drawn("spread", alter=cases.with_map_and_minus_one), whole),
        ]  # fmt: skip
        if self.stable:
            table.append(
                ("stable-order", "routes ascend inside an expert",
                 cases.chained(every, shaped(*((r, 1, 2, 16) for r in (257, 1025, 4097)))),
                 judge("I8"))
            )  # fmt: skip
        if self.strict_tail:
            table.append(
                ("strict-tail", "behind the last block are T*K and the dialect's expert id",
                 every, judge("tail"))
            )  # fmt: skip
        return tuple(
            Check(
                name=name,
                about=about,
                cases=source,
                judge=verdict,
                script=self.script_of_three_calls if name == "calls-do-not-remember" else None,
            )
            for name, about, source, verdict in table
            if not (self.dialect == "naive" and name in _NEEDS_ROWS)
        )


def align_kind(
    dialect: BlockDialect = "vllm",
    stable: bool = False,
    strict_tail: bool = False,
    invalid: InvalidRoutes = "keep",
    *,
    pad_sorted_ids: bool = False,
) -> Kind:
    """Return the kind of `check_align`, whose options these are."""
    require(
        dialect in BLOCK_DIALECTS,
        f"check_align: dialect must be one of {', '.join(BLOCK_DIALECTS)}, got {dialect!r}.",
    )
    require(
        invalid in ("keep", "drop"),
        f"check_align: invalid must be 'keep' or 'drop', got {invalid!r}.",
    )
    require(
        invalid == "keep" or dialect in ("vllm", "vllm_old_tail"),
        f"check_align: invalid must be 'keep' in dialect {dialect!r}, got {invalid!r}. It says "
        "what becomes of routes to experts of other ranks.",
    )
    require(
        dialect != "naive" or not (stable or strict_tail or pad_sorted_ids),
        "check_align: stable, strict_tail and pad_sorted_ids must be False in dialect 'naive', "
        "got True. Routes are not sorted there, and no row is padding.",
    )
    rule = Rule(
        dialect=dialect,
        invalid=invalid,
        stable=stable,
        strict_tail=strict_tail,
        pad_sorted_ids=pad_sorted_ids,
    )
    return Kind(
        name="align",
        signature="fn(topk_ids (T,K), block_size, num_experts, expert_map (E,) = None) -> "
        "(sorted_token_ids (P,), expert_ids (P/B rounded up,), num_tokens_post_padded)",
        expected=rule.expected,
        checks=rule.checks(),
        reductions=cases.reductions,
        script=rule.script,
    )


def check_align(
    fn: Callable[..., Any],
    dialect: BlockDialect = "vllm",
    stable: bool = False,
    strict_tail: bool = False,
    *,
    invalid: InvalidRoutes = "keep",
    pad_sorted_ids: bool = False,
    **settings: Unpack[Settings],
) -> Report:
    """Check ``fn(topk_ids (T,K), block_size, num_experts, expert_map=None)``.

    It returns sorted_token_ids, expert_ids and num_tokens_post_padded, a number or an array of
    one. The plan is judged by the invariants of `npmoe.plans.validation`, not by one answer.

    Parameters
    ----------
    fn : callable
        Gets three arguments where there is no map.
    dialect, invalid, pad_sorted_ids
        As in `align_block_size`.
    stable : bool
        Demand that routes ascend inside an expert; else their order is free.
    strict_tail : bool
        Demand the dialect's values behind the last block; else they are free.
    **settings
        Keywords of `run_checks`.

    Returns
    -------
    Report

    Raises
    ------
    RangeError
        For options unknown or in contradiction.
    """
    kind = align_kind(dialect, stable, strict_tail, invalid, pad_sorted_ids=pad_sorted_ids)
    return run_checks(kind, fn, **settings)
