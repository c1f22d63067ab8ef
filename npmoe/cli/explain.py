"""``npmoe explain``: what a router did with one token."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npmoe import plots, preset
from npmoe._checks import require
from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.cli._common import check_output, write_json
from npmoe.config import MoEConfig
from npmoe.errors import DataError, RangeError
from npmoe.explanation import explain
from npmoe.layer import moe_forward
from npmoe.models import host_backend, language_forward
from npmoe.params import MoEParams, init_params
from npmoe.training.data import CharVocabulary
from npmoe.training.files import RunFolder
from npmoe.training.loop import load_trained

HELP = "explain how one token was routed, from logits to rows"
DESCRIPTION = (
    "Print everything a router did with one token: logits, scores, biases, groups, choices, "
    "weights, drops and rows. With --preset, of a published design with random numbers; with "
    "--run, of a model that `npmoe train` trained."
)
_DEMO = {"hidden_size": 64, "intermediate_size": 8}
_SIZES = ("num_experts", "top_k", "num_groups", "topk_group", "hidden_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--token", type=int, metavar="N", help="which token (the last one)")
    demo = parser.add_argument_group("a published design, with random hidden states and parameters")
    demo.add_argument("--preset", metavar="NAME", help="see npmoe.presets() (mixtral)")
    demo.add_argument("--tokens", type=int, metavar="T", help="tokens of the sequence (32)")
    demo.add_argument("--num-experts", type=int, metavar="E", help="(as published)")
    demo.add_argument("--top-k", type=int, metavar="K", help="(as published)")
    demo.add_argument("--num-groups", type=int, metavar="G", help="(as published, or none)")
    demo.add_argument("--topk-group", type=int, metavar="N", help="groups to choose from")
    demo.add_argument("--hidden-size", type=int, metavar="H", help="(64)")
    demo.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="field of MoEConfig"
    )
    demo.add_argument("--seed", type=int, metavar="N", help="of everything random (0)")
    trained = parser.add_argument_group("a trained model")
    trained.add_argument("--run", metavar="DIR", dest="folder", help="run folder")
    trained.add_argument("--text", help="what the model reads, for example 'The quick'")
    trained.add_argument("--layer", type=int, metavar="I", help="block, from 0 (the first MoE)")
    parser.add_argument("--block-size", type=int, default=64, metavar="B", help="rows (64)")
    parser.add_argument(
        "--max-experts", type=int, default=16, metavar="N", help="experts to list (16)"
    )
    parser.add_argument("--backend", help="(numpy)")
    parser.add_argument("--plot", metavar="DIR", help="also draw routing, load and drops into DIR")
    parser.add_argument("--json", metavar="FILE", help="also write the explanation to FILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A call of the layer, and how to introduce it."""

    intro: str
    hidden_states: HostArray
    params: MoEParams
    cfg: MoEConfig
    topk_ids: HostArray | None = None
    seed: int | None = None

    def rng(self) -> np.random.Generator | None:
        """Return the same generator at every call."""
        return None if self.seed is None else np.random.default_rng((self.seed, 1))


def run(options: argparse.Namespace) -> int:
    """Explain one token."""
    check_output("--json", options.json)
    require(
        options.max_experts >= 1,
        f"explain: --max-experts must be at least 1, got {options.max_experts}.",
    )
    backend = host_backend("explain", options.backend)
    case = _demonstration(options) if options.folder is None else _trained(options, backend)
    found = explain(
        case.hidden_states.shape[-2] - 1 if options.token is None else options.token,
        case.hidden_states,
        case.params,
        case.cfg,
        topk_ids=case.topk_ids,
        rng=case.rng(),
        backend=backend,
        block_size=options.block_size,
    )
    if options.plot is not None:
        _draw(case, Path(options.plot), backend)
    print(case.intro)
    print()
    print(found.text(max_experts=options.max_experts))
    write_json(options.json, found.to_dict())
    return 0


def _demonstration(options: argparse.Namespace) -> _Case:
    """Return a preset with random numbers."""
    for name in ("text", "layer"):
        require(
            getattr(options, name) is None,
            f"explain: --{name} must come with --run, got {getattr(options, name)}.",
        )
    tokens = 32 if options.tokens is None else options.tokens
    seed = 0 if options.seed is None else options.seed
    require(tokens >= 1, f"explain: --tokens must be at least 1, got {tokens}.")
    require(seed >= 0, f"explain: --seed must not be negative, got {seed}.")
    given = {n: getattr(options, n) for n in _SIZES if getattr(options, n) is not None}
    name = "mixtral" if options.preset is None else options.preset
    cfg = preset(name, **(_DEMO | given | dict(_field(text) for text in options.set)))
    rng = np.random.default_rng((seed, 0))
    params = init_params(cfg, rng)
    shape = params.router_weight.shape
    # Logits with a deviation of about 1, as of a router that has learnt something.
    params.router_weight[...] = rng.standard_normal(shape) / np.sqrt(cfg.hidden_size)
    drawn = "hidden states and parameters"
    if params.selection_bias is not None:
        params.selection_bias[...] = 0.05 * rng.standard_normal(shape[0])
        drawn = "hidden states, parameters and selection bias"
    hidden_states = rng.standard_normal((tokens, cfg.hidden_size)).astype(np.float32)
    ids = None
    if cfg.routing == "hash":
        order = np.argsort(rng.random((tokens, cfg.router_size)), axis=1)
        ids, drawn = order[:, : cfg.top_k].astype(np.int32), f"{drawn}, and a random table of ids"
    return _Case(
        intro=f"preset {name}, H={cfg.hidden_size}: random {drawn} (seed {seed}), no trained model",
        hidden_states=hidden_states,
        params=params,
        cfg=cfg,
        topk_ids=ids,
        seed=seed,
    )


def _trained(options: argparse.Namespace, backend: Backend) -> _Case:
    """Return what reaches one layer of a trained model when it reads a text."""
    for name in ("preset", "tokens", "seed", *_SIZES, "set"):
        value = getattr(options, name)
        require(
            value is None or value == [],
            f"explain: --{name.replace('_', '-')} must not be given with --run, got {value}. "
            "The run has its own settings.",
        )
    require(bool(options.text), "explain: --text must hold what the model reads, got none.")
    config, params, step = load_trained(RunFolder(options.folder))
    model = config.model
    if model.moe is None:
        raise RangeError(f"explain: --run must name a model with experts, got {options.folder}.")
    with_experts = [i for i in range(model.num_layers) if model.is_moe_layer(i)]
    layer = with_experts[0] if options.layer is None else options.layer
    require(
        layer in with_experts,
        f"explain: --layer must be one of {', '.join(map(str, with_experts))}, got {layer}.",
    )
    cfg = model.moe.for_evaluation()
    ids = CharVocabulary(config.characters).encode(options.text)
    _, saved = language_forward(ids[None], params, model, moe=cfg, backend=backend)
    inner, weights = saved.blocks[layer].moe, params.blocks[layer].feed_forward
    if inner is None or not isinstance(weights, MoEParams):
        raise RangeError(f"explain: --layer must name a block with experts, got {layer}.")
    token = len(ids) - 1 if options.token is None else options.token
    character = f"; token {token} is {options.text[token]!r}" if 0 <= token < len(ids) else ""
    return _Case(
        intro=f"run {options.folder}, step {step}, layer {layer}, reading {options.text!r}"
        f"{character}",
        hidden_states=inner.hidden_states.reshape(inner.shape),
        params=weights,
        cfg=cfg,
    )


def _field(text: str) -> tuple[str, Any]:
    """Return field and value of FIELD=VALUE; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    require(bool(name and equals), f"explain: --set must be FIELD=VALUE, got {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, None if value == "None" else {"True": True, "False": False}.get(value, value)


def _draw(case: _Case, folder: Path, backend: Backend) -> None:
    """Draw the call that was explained."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"explain: --plot: {folder} could not be made: {error.strerror}. Choose another folder."
        ) from error
    _, saved = moe_forward(
        *(case.hidden_states, case.params, case.cfg, backend, case.rng()), topk_ids=case.topk_ids
    )
    soft = case.cfg.routing == "soft"
    plan = None if soft else saved.plan
    plots.plot_routing(saved.routing, folder / "routing.png", plan=plan)
    if soft:
        return
    stats = saved.stats()
    plots.plot_load(stats, folder / "load.png")
    if case.cfg.has_capacity:
        plots.plot_drops(stats, folder / "drops.png")
