"""The report of a run as one HTML page that loads nothing from anywhere and runs no script."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from npmoe._checks import require
from npmoe._typing import HostArray
from npmoe.reporting.charts import (
    Line,
    line_chart,
    load_heat_map,
    plan_strip,
    png_data_uri,
    table_heat_map,
)
from npmoe.reporting.series import RunLog, Specialisation, read_run_log
from npmoe.reporting.style import STYLE
from npmoe.stats import coefficient_of_variation, gini, max_violation
from npmoe.training.config import RunConfig, VisionTrainConfig
from npmoe.training.files import RunFolder, write_text_atomic
from npmoe.training.loop import read_config

# The page may show what is inside it, and nothing else.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_HATCH = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
    '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><line class="hatch" x1="0" x2="0" y1="0" y2="5"/></pattern>'
    "</defs></svg>"
)
_WINDOW = 10  # records at the end in which an expert must have been chosen once
_TABLE_ROWS = 200
_ADDED_LATER = {
    "router_entropy": "the router's entropy",
    "kept_per_expert": "kept rows, by which the drop rate of each layer is known",
}


def html_report(folder: RunFolder, *, step: int | None = None, block_size: int = 64) -> str:
    """Return the page.

    Curves; the load of every expert over the steps, and dead experts; what one step did in each
    layer, and its plan; what the experts took in the last evaluation up to that step; and the
    pictures that lie in the folder.

    Parameters
    ----------
    folder : RunFolder
        Of a run, finished or not.
    step : int, optional
        A logged step whose plan to show; the last one by default.
    block_size : int
        Rows per block of the plan.

    Returns
    -------
    str
        HTML. Equal logs give equal pages.

    Raises
    ------
    CheckpointError
        If the folder holds no run, or its log is damaged.
    RangeError
        If the step was not logged, or the block size is below 1.
    """
    require(block_size >= 1, f"report: --block-size must be at least 1, got {block_size}.")
    config, log = read_config(folder), read_run_log(folder)
    chosen = _choose_step(log, step)
    name = html.escape(folder.path.resolve().name)
    sections = [
        _header(name, config, log),
        _curves(log, None if step is None else chosen),
        _load(log),
        _one_step(config, log, chosen, block_size),
        _specialisation(log, chosen),
        _pictures(folder),
        _numbers(log),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>npmoe report: {name}</title><style>{STYLE}</style>"
    )
    body = "\n".join(s for s in sections if s)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{_HATCH}<main>\n{body}\n'
        "</main></body></html>\n"
    )


def write_report(
    folder: RunFolder, path: str | Path, *, step: int | None = None, block_size: int = 64
) -> None:
    """Write `html_report` to a file, whole or not at all.

    Raises
    ------
    CheckpointError, RangeError
        As `html_report` does, and if the file cannot be written.
    """
    write_text_atomic(path, html_report(folder, step=step, block_size=block_size))


def _choose_step(log: RunLog, step: int | None) -> int:
    steps = log.steps
    if step is None:
        return int(steps[-1])
    before, after = steps[steps < step], steps[steps > step]
    near = " and ".join(str(s) for s in (*before[-1:], *after[:1]))
    require(
        bool((steps == step).any()),
        f"report: --step must be a logged step, got {step}. The nearest are {near}.",
    )
    return step


def _header(name: str, config: RunConfig, log: RunLog) -> str:
    model, moe = config.model, config.model.moe
    kind = "dense blocks"
    if moe is not None:
        how = f"top-{moe.top_k}" if moe.chooses_top_k else moe.routing.replace("_", " ")
        kind = f"{model.num_moe_layers} of them with {moe.num_experts} experts ({how})"
    unit = "images" if isinstance(config, VisionTrainConfig) else "sequences"
    last = int(log.steps[-1])
    state = "" if last >= config.steps else f" <strong>Not finished: step {last}.</strong>"
    tiles = [("steps", f"{last} of {config.steps}")]
    for label, field, form in (
        ("training loss, nats", "cross_entropy", "{:.4f}"),
        ("validation loss, nats", "val_loss", "{:.4f}"),
        ("validation accuracy", "val_accuracy", "{:.2%}"),
        ("load imbalance (MaxVio)", "load_imbalance", "{:.3f}"),
        ("dropped routes", "drop_rate", "{:.2%}"),
        ("tokens per second", "tokens_per_second", "{:,.0f}"),
    ):
        if len(log[field]):
            tiles.append((label, form.format(float(log[field].values[-1]))))
    dead = _dead_experts(log)
    if dead is not None:
        tiles.append(("dead experts, all layers", str(sum(len(d) for d in dead))))
    shown = "".join(f"<div><dt>{html.escape(t)}</dt><dd>{v}</dd></div>" for t, v in tiles)
    missing = [why for field, why in _ADDED_LATER.items() if moe and not len(log[field])]
    if moe and not log.specialisations:
        missing.append("what the experts took in evaluations")
    note = ""
    if missing:
        note = (
            f"<p class=note>This log does not hold {'; nor '.join(missing)}. It was written by "
            "another version of npmoe, or before the first such record; the rest is shown.</p>"
        )
    return (
        f"<h1>Run {name}</h1><p>Task {config.task}: {model.num_layers} layers of "
        f"{model.hidden_size}, {kind}; {config.batch_size} {unit} per step, seed "
        f"{config.seed}.{state}</p><dl class=tiles>{shown}</dl>{note}"
    )


def _curves(log: RunLog, mark: int | None) -> str:
    def line(field: str, name: str, *, markers: bool = False, factor: float = 1.0) -> Line:
        series = log[field]
        return Line(name=name, steps=series.steps, values=factor * series.values, markers=markers)

    charts = []

    def add(title: str, lines: list[Line], unit: str = "", **options: bool) -> None:
        if any(len(one.steps) for one in lines):
            charts.append(line_chart(title, lines, unit=unit, mark=mark, **options))

    losses = [line("cross_entropy", "training batch"), line("val_loss", "validation", markers=True)]
    add("Loss", losses, "nats")
    accuracy = line("val_accuracy", "validation", markers=True, factor=100)
    add("Validation accuracy", [accuracy], "%")
    add("Auxiliary losses", [line("auxiliary", "as added")], from_zero=True)
    counts = log["tokens_per_expert"]
    add(
        "Load imbalance",
        [
            Line(
                name=f"layer {i}",
                steps=counts.steps,
                values=np.array([max_violation(c[i]) for c in counts.values]),
            )
            for i in range(counts.values.shape[1])
        ],
        "MaxVio",
        from_zero=True,
    )
    entropy = log["router_entropy"]
    add("Router entropy", _by_layer(entropy.steps, entropy.values), "nats", from_zero=True)
    add("Dropped routes", _drop_lines(log), "%", from_zero=True)
    bias = log["selection_bias_range"]
    add(
        "Range of the selection bias",
        [
            Line(
                name=f"layer {i}",
                steps=bias.steps,
                values=bias.values[:, i, end],
                colour=i,
                dashed=end == 1,
            )
            for i in range(bias.values.shape[1])
            for end in (0, 1)
        ],
        "dashed: the largest",
    )
    add("Learning rate", [line("learning_rate", "learning rate")], from_zero=True)
    add("Gradient norm", [line("grad_norm", "before clipping")], log_scale=True)
    speed = [line("tokens_per_second", "training alone")]
    add("Throughput", speed, "tokens per second", from_zero=True)
    return f"<h2>Curves</h2><div class=grid2>{''.join(charts)}</div>"


def _by_layer(steps: HostArray, values: HostArray) -> list[Line]:
    """Return one line per layer of values (N, layers)."""
    return [
        Line(name=f"layer {i}", steps=steps, values=values[:, i]) for i in range(values.shape[1])
    ]


def _drop_lines(log: RunLog) -> list[Line]:
    """Return the drop rate of each layer, or of all together where no more is known."""
    rates = _drop_rates(log)
    if rates is not None:
        return _by_layer(log["kept_per_expert"].steps, 100 * rates)
    series = log["drop_rate"]
    return [Line(name="all layers", steps=series.steps, values=100 * series.values)]


def _drop_rates(log: RunLog) -> HostArray | None:
    """Return the share of chosen routes that each layer dropped (N, layers)."""
    chosen, kept = log["tokens_per_expert"], log["kept_per_expert"]
    if not len(kept) or not np.array_equal(chosen.steps, kept.steps):
        return None
    before, after = chosen.values.sum(axis=2), kept.values.sum(axis=2)
    rates: HostArray = (before - after) / np.maximum(before, 1)
    return rates


def _dead_experts(log: RunLog) -> list[HostArray] | None:
    """Return, for each layer, the experts that no record of the last window chose."""
    counts = log["tokens_per_expert"]
    if not len(counts):
        return None
    recent = counts.values[-_WINDOW:].sum(axis=0)  # (layers, E)
    return [np.flatnonzero(layer == 0) for layer in recent]


def _load(log: RunLog) -> str:
    counts, dead = log["tokens_per_expert"], _dead_experts(log)
    if dead is None:
        return "<h2>Load</h2><p>There are no experts in this run.</p>"
    shares = counts.values / np.maximum(counts.values.mean(axis=2, keepdims=True), 1e-300)
    maps = "".join(
        load_heat_map(f"MoE layer {i}: load of each expert", counts.steps, shares[:, i])
        for i in range(shares.shape[1])
    )
    window = min(_WINDOW, len(counts))
    found = [f"layer {i}: {', '.join(map(str, d))}" for i, d in enumerate(dead) if d.size]
    text = f"No expert was dead: each was chosen in the last {window} records."
    if found:
        text = (
            f"<span class=bad>Dead experts</span>, not chosen in the last {window} records: "
            f"{'; '.join(found)}."
        )
    return f"<h2>Load</h2><p>{text}</p><div class=grid3>{maps}</div>"


def _one_step(config: RunConfig, log: RunLog, step: int, block_size: int) -> str:
    chosen, kept = log["tokens_per_expert"].at(step), log["kept_per_expert"].at(step)
    if chosen is None:
        return ""
    entropy, bias = log["router_entropy"].at(step), log["selection_bias_range"].at(step)
    heads = ["layer", "choices", "MaxVio", "CV", "Gini", "unused"]
    heads += ["dropped"] if kept is not None else []
    heads += ["entropy"] if entropy is not None else []
    heads += ["bias"] if bias is not None else []
    rows = []
    for i, counts in enumerate(chosen):
        unused = int((counts == 0).sum())
        cells = [
            str(i),
            f"{int(counts.sum()):,}",
            f"{max_violation(counts):.3f}",
            f"{coefficient_of_variation(counts):.3f}",
            f"{gini(counts):.3f}",
            f'<span class="{"bad" if unused else ""}">{unused} of {len(counts)}</span>',
        ]
        if kept is not None:
            cells.append(f"{1 - kept[i].sum() / max(counts.sum(), 1):.2%}")
        if entropy is not None:
            cells.append(f"{entropy[i]:.3f}")
        if bias is not None:
            cells.append(f"{bias[i, 0]:.3g} to {bias[i, 1]:.3g}")
        rows.append(_row("td", cells))
    table = f"<table><thead>{_row('th', heads)}</thead><tbody>{''.join(rows)}</tbody></table>"
    dropped = log["drop_rate"].at(step)
    plan = chosen if kept is None else kept
    what = (
        "Rows in the order of their experts, cut into blocks of one expert each; hatched: padding."
    )
    if config.micro_batches > 1:
        what += f" The {config.micro_batches} micro-batches of the step are drawn as one call."
    if kept is None and dropped is not None and dropped > 0:
        what += " The log holds choices only, so that dropped routes are drawn as well."
    strips = "".join(
        plan_strip(f"MoE layer {i}", counts, block_size) for i, counts in enumerate(plan)
    )
    return (
        f'<h2>Step {step}</h2><div class="scroll" tabindex=0>{table}</div><h2>Plan of step {step}'
        f"</h2><p>{what}</p>{strips}"
    )


def _specialisation(log: RunLog, step: int) -> str:
    known = [s for s in log.specialisations if s.step <= step]
    if not known:
        return ""
    last: Specialisation = known[-1]
    maps = []
    for layer, choices in enumerate(last.choices):
        used = choices.sum(axis=1) > 0
        shares = choices[used] / choices[used].sum(axis=1, keepdims=True)
        names = [name for name, there in zip(last.rows, used, strict=True) if there]
        if names:
            title = f"MoE layer {layer}: experts of each row"
            maps.append(table_heat_map(title, names, shares))
    return (
        f"<h2>Specialisation</h2><p>In the evaluation at step {last.step}: how the choices for "
        f"each kind of input are spread over the experts.</p><div class=grid3>{''.join(maps)}</div>"
    )


def _pictures(folder: RunFolder) -> str:
    """Return the pictures of the run's folder, inside the page."""
    shown = "".join(
        f"<details open><summary>{html.escape(path.name)}</summary>"
        f'<img alt="{html.escape(path.stem)}, as npmoe train drew it" '
        f'src="{png_data_uri(path.read_bytes())}"></details>'
        for path in sorted(folder.path.glob("*.png"))
    )
    return f"<h2>Pictures of the run</h2>{shown}" if shown else ""


def _numbers(log: RunLog) -> str:
    """Return the scalar fields as a table of at most 200 records."""
    fields = [n for n, s in log.fields.items() if s.values.ndim == 1 and len(s)]
    every = -(-len(log.steps) // _TABLE_ROWS)
    steps = log.steps[::-1][::every][::-1]
    rows = []
    for step in steps.tolist():
        values = [log[name].at(step) for name in fields]
        rows.append(_row("td", [str(step), *("" if v is None else f"{v:.5g}" for v in values)]))
    heads = _row("th", ["step", *(name.replace("_", " ") for name in fields)])
    rest = "" if every == 1 else f", every {every}th record"
    return (
        f'<details><summary>The numbers{rest}</summary><div class="scroll" tabindex=0><table>'
        f"<thead>{heads}</thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _row(tag: str, cells: list[str]) -> str:
    scope = " scope=col" if tag == "th" else ""
    return "<tr>" + "".join(f"<{tag}{scope}>{cell}</{tag}>" for cell in cells) + "</tr>"
