"""A report as one self-contained HTML page: the checks, the failing cases, the kill table."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import BackendUnavailableError
from npmoe.testing.conformance.report import Failure, Report
from npmoe.testing.faults.matrix import Kill

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1d2530; background: #fff }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #d8dee6;
         vertical-align: top } td:last-child { white-space: nowrap }
th { background: #f2f5f9 } .ok { color: #14713d } .bad { color: #b3261e; font-weight: 600 }
.dim { color: #667 } pre { background: #f2f5f9; padding: .8rem; overflow-x: auto; font-size: 13px }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem } img { max-width: 100% }
"""


def html_page(reports: Iterable[Report], kills: Iterable[Kill] = ()) -> str:
    """Return the page; it loads nothing from anywhere.

    Parameters
    ----------
    reports : iterable of Report
    kills : iterable of Kill
        For the kill table; left out if empty.

    Returns
    -------
    str
    """
    parts = [_report(report) for report in reports]
    table = list(kills)
    if table:
        parts.append(_kill_table(table))
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>npmoe check</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _report(report: Report) -> str:
    verdict = '<span class="ok">passed</span>'
    if not report.passed:
        verdict = '<span class="bad">WRONG</span>'
    rows = "".join(
        f"<tr><td><code>{html.escape(r.name)}</code><br><span class=dim>{html.escape(r.about)}"
        f'</span></td><td class="{"ok" if r.status in ("passed", "expected failure") else "bad"}">'
        f"{r.status}</td><td>{r.cases}</td><td>{r.seconds:.2f} s</td></tr>"
        for r in report.results
    )
    failures = "".join(_failure(f) for f in report.failures)
    notes = "".join(f"<p class=dim>{html.escape(note)}</p>" for note in report.notes)
    return (
        f"<h1>{html.escape(report.kind)}: <code>{html.escape(report.target)}</code> {verdict}</h1>"
        f"<table><tr><th>check</th><th>verdict</th><th>cases</th><th>time</th></tr>{rows}</table>"
        f"{failures}{notes}"
    )


def _failure(failure: Failure) -> str:
    values = "\n".join(f"{n} =\n{v}" for n, v in failure.case.arguments.items())
    return (
        f"<h2 class=bad>{html.escape(failure.check)}</h2><p>{html.escape(failure.message)}</p>"
        f"<p class=dim>{html.escape(failure.case.note)}</p><pre>{html.escape(values)}</pre>"
        f"{_plan_picture(failure)}"
        f"<details><summary>script</summary><pre>{html.escape(failure.reproducer)}</pre></details>"
    )


def _plan_picture(failure: Failure) -> str:
    """Return the right plan of a failing case drawn as blocks, if the case has one."""
    ids = failure.case.arguments.get("topk_ids")
    size = failure.case.arguments.get("block_size")
    experts = failure.case.arguments.get("num_experts")
    if not isinstance(ids, np.ndarray) or size is None or experts is None:
        return ""
    return f"<p>What the plan should be:</p>{_draw(ids, int(size), int(experts))}"


def _draw(topk_ids: HostArray, block_size: int, num_experts: int) -> str:
    from npmoe.plans.blocks import align_block_size  # noqa: PLC0415  # needed for a picture only
    from npmoe.plots import plot_blocks  # noqa: PLC0415

    plan = align_block_size(topk_ids, block_size, num_experts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.png"
        try:
            plot_blocks(
                plan,
                path,
                block_size=block_size,
                num_routes=topk_ids.size,
                top_k=topk_ids.shape[1],
            )
        except BackendUnavailableError as error:
            return f"<p class=dim>{html.escape(str(error))}</p>"
        data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="the plan as blocks" src="data:image/png;base64,{data}">'


def _kill_table(kills: list[Kill]) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(k.fault.name)}</code><br><span class=dim>"
        f"{html.escape(k.fault.seen)}</span></td><td>{html.escape(k.fault.kind)}</td>"
        f'<td class="{"ok" if k.by_name else "bad"}">{html.escape(k.killed_by or "SURVIVED")}</td>'
        f"<td>{html.escape(k.case)}</td></tr>"
        for k in kills
    )
    named = sum(k.by_name for k in kills)
    return (
        f"<h1>Kill matrix: {named} of {len(kills)} planted mistakes found by the check that names "
        f"them</h1><table><tr><th>mistake</th><th>kind</th><th>killed by</th><th>smallest case</th>"
        f"</tr>{rows}</table>"
    )
