"""Modelled bounds: each term by hand, what must grow with what, and the figures they rest on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os

import kernel_figures as figures
import numpy as np
import pytest

from npmoe.benchmark import CASES, DIRECTIONS, modelled, parse_case
from npmoe.benchmark.card_sheets import CARD_SHEETS, CardSheet, find_sheet
from npmoe.benchmark.modelled import KernelFigures, model_case, occupancy, read_figures
from npmoe.benchmark.modelled_text import LEGEND, modelled_json, modelled_table
from npmoe.benchmark.uniform_load import UniformLoad
from npmoe.errors import BackendUnavailableError, RangeError

# Ten multiprocessors at 1 GHz, everything round.
PLAIN = CardSheet(
    name="plain", arch="sm_0", multiprocessors=10, clock=1e9, tensor_clock=0.5e9, float32_fma=100,
    tensor_fma=1000, mma_sync_share=0.5, memory=1e9, l2=10_000, threads=2048, blocks=32,
    shared=100_000, source="nowhere",
)  # fmt: skip


def kernels(instructions, multiplies):
    names = [f"{n}/{b}" for n in ("gate_up", "down", "down_back", "gate_up_back") for b in (4, 8)]
    figures = {"sm_0": [32, 1000, instructions, multiplies]}
    return dict.fromkeys([*names, "down_wgrad", "gate_up_wgrad"], figures)


@pytest.fixture
def plain(monkeypatch):
    """Know kernels with tiles of 4 or 8 rows, 10 columns and a depth of 5."""
    tiling = {
        "multiply": "FFMA",
        "block_sizes": [4, 8],
        "tile_n": 10,
        "wgrad_tile": [10, 20],
        "depth": 5,
        "threads": {"4": 64, "8": 128, "wgrad": 256},
        "dynamic_shared": {"4": 0, "8": 500, "wgrad": 0},
        "kernels": kernels(300, 100),
    }
    half = tiling | {"multiply": "HMMA.16816", "kernels": kernels(80, 10)}
    figures = {"float32": tiling, "tf32": half | {"multiply": "HMMA.1688"}, "bfloat16": half}
    monkeypatch.setattr(modelled, "read_figures", lambda: figures)


def launches(case, direction="forward", card=PLAIN, precision="float32", weights="float32"):
    found = model_case(parse_case(case), direction, card, precision, weights)
    return found, {launch.name.partition("/")[0]: launch for launch in found.launches}


# --- rows in blocks


# E = 64, K = 8: rows in blocks per row, by simulation elsewhere.
@pytest.mark.parametrize(
    ("num_tokens", "padding"),
    [
        (64, [2.0, 4.0, 8.0, 16.0]),
        (256, [1.22, 1.45, 2.0, 4.0]),
        (1024, [1.06, 1.12, 1.24, 1.48]),
        (4096, [1.01, 1.03, 1.06, 1.12]),
    ],
)
def test_padding_under_uniform_routing(num_tokens, padding):
    load = UniformLoad(parse_case(f"{num_tokens},1,1,64,8"))
    found = [load.padding(size) for size in (16, 32, 64, 128)]
    assert found == pytest.approx(padding, abs=0.008)


@pytest.mark.parametrize(("T", "E", "K"), [(3, 4, 2), (4, 3, 1), (2, 5, 3), (5, 2, 1)])
def test_expected_blocks_by_counting_all_choices(T, E, K):
    ways = list(itertools.combinations(range(E), K))
    blocks, used, count = dict.fromkeys((1, 2, 3), 0), 0, 0
    for choice in itertools.product(ways, repeat=T):
        rows = np.bincount(np.concatenate(choice), minlength=E)
        for size in blocks:
            blocks[size] += int(np.ceil(rows / size).sum())
        used += int((rows > 0).sum())
        count += 1
    load = UniformLoad(parse_case(f"{T},1,1,{E},{K}"))
    assert load.used_experts == pytest.approx(used / count, rel=1e-12)
    for size, total in blocks.items():
        assert load.blocks(size) == pytest.approx(total / count, rel=1e-12)


def test_where_everybody_is_chosen_nothing_is_random():
    load = UniformLoad(parse_case("10,1,1,3,3"))
    assert (load.used_experts, load.blocks(4), load.num_rows) == (3.0, 9.0, 30)


# --- occupancy


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 54, 5_376, 4),  # 1792 registers a warp: 36 warps
        (256, 64, 5_376, 4),  # 2048 a warp: 32
        (256, 65, 5_376, 3),  # 2304 a warp: 28
        (256, 32, 0, 8),  # threads
        (64, 32, 0, 32),  # blocks
        (256, 128, 69_632, 2),  # 16 warps, and 167936 // 70656
        (128, 32, 49_152, 3),  # 167936 // 50176
        (128, 32, 167_936, 0),
    ],
)
def test_occupancy_of_an_a100_by_hand(threads, registers, shared, blocks):
    kernel = KernelFigures(
        threads=threads, registers=registers, shared=shared, instructions_per_multiply=1.0
    )
    assert occupancy(find_sheet("A100"), kernel) == blocks


# --- terms


def test_the_terms_of_a_product_by_hand(plain):
    """All of 2 experts are chosen by 6 tokens: 12 rows in 2 blocks of 8, for 6 <= 8 / 2 * 2."""
    found, by_name = launches("6,12,15,2,2")
    assert found.block_size == 8
    assert list(by_name) == ["gate_up", "down", "combine"]
    up = by_name["gate_up"]
    # 30 columns in 3 tiles, depth 12 in 15: 2 blocks * 8 rows * 30 * 15.
    needed, padded = 12 * 30 * 12, 2 * 8 * 30 * 15
    assert up.flops == 2 * needed
    assert up.padding == padded / needed
    assert up.blocks == 6
    assert up.resident == 16  # 2048 threads; 64 KB of registers and 2560 bytes each allow more
    assert up.waves == 6 / 10 / 16
    assert up.imbalance == 1 / (6 / 10)
    assert up.math_seconds == pytest.approx(padded / (10 * 100 * 1e9), rel=1e-12)
    assert up.issue_seconds == pytest.approx(padded / 32 * 3.0 / (4 * 10 * 1e9), rel=1e-12)
    moved = 4 * (2 * 30 * 12 + 6 * 12 + 12 * 15)  # weights, tokens, activations
    assert up.memory_seconds == pytest.approx(moved / 1e9, rel=1e-12)
    assert (up.seconds, up.bound_by) == (up.memory_seconds, "memory")
    down = by_name["down"]
    # 12 columns in 2 tiles of 10, depth 15.
    assert down.padding == 2 * 8 * 20 * 15 / (12 * 12 * 15)
    assert down.memory_seconds == pytest.approx(4e-9 * (2 * 12 * 15 + 12 * 15 + 12 * 12), rel=1e-12)
    combine = by_name["combine"]
    assert combine.memory_seconds == pytest.approx(4e-9 * (12 + 6) * 12, rel=1e-12)
    assert (combine.flops, combine.bound_by) == (0.0, "memory")
    assert found.seconds == pytest.approx(sum(launch.seconds for launch in found.launches))
    assert found.flops == 6 * 12 * 12 * 15
    assert found.padding == pytest.approx(
        (padded + 2 * 8 * 20 * 15) / (12 * 30 * 12 + 12 * 12 * 15), rel=1e-12
    )


def test_the_terms_of_a_step_by_hand(plain):
    found, by_name = launches("6,12,15,2,2", "forward+backward")
    assert list(by_name) == [
        *("gate_up", "down", "combine", "down_back", "down_wgrad", "gate_up_wgrad"),
        "gate_up_back",
    ]
    assert len(found.launches) == 8  # two combines
    assert found.flops == 18 * 12 * 12 * 15
    moved = {
        "gate_up": 2 * 30 * 12 + 6 * 12 + 12 * 15 + 12 * 30,  # the pre-activation is kept
        "down_back": 2 * 12 * 15 + 6 * 12 + 12 * 30 + 12 * 15 + 12 * 30,
        "down_wgrad": 6 * 12 + 12 * 15 + 2 * 12 * 15,
        "gate_up_wgrad": 6 * 12 + 12 * 30 + 2 * 30 * 12,
        "gate_up_back": 2 * 30 * 12 + 12 * 30 + 12 * 12,
    }
    for name, numbers in moved.items():
        assert by_name[name].memory_seconds == pytest.approx(4e-9 * numbers, rel=1e-12), name
    wgrad = by_name["down_wgrad"]
    # 12 x 15 in 2 x 1 tiles of 10 x 20, 6 rows an expert in 10.
    assert wgrad.blocks == 2 * 2
    assert wgrad.padding == 2 * 10 * 20 * 20 / (12 * 12 * 15)


def test_a_tensor_core_has_its_own_rate_and_clock(plain):
    _, half = launches("6,12,15,2,2", precision="bfloat16", weights="bfloat16")
    padded = 2 * 8 * 30 * 15
    up = half["gate_up"]
    assert up.math_seconds == pytest.approx(padded / (10 * 1000 * 0.5 * 0.5e9), rel=1e-12)
    assert up.issue_seconds == pytest.approx(padded / 2048 * 8.0 / (4 * 10 * 1e9), rel=1e-12)
    assert up.memory_seconds == pytest.approx(2e-9 * (2 * 30 * 12 + 6 * 12 + 12 * 15), rel=1e-12)
    _, tf32 = launches("6,12,15,2,2", precision="tf32")
    assert tf32["gate_up"].math_seconds == pytest.approx(2 * up.math_seconds, rel=1e-12)
    full = dataclasses.replace(PLAIN, mma_sync_share=None)
    _, faster = launches("6,12,15,2,2", card=full, precision="float16", weights="float16")
    assert faster["gate_up"].math_seconds == pytest.approx(up.math_seconds / 2, rel=1e-12)


def test_copies_into_half_precision_count(plain):
    """Tokens always, all weights where they are given in float32, and again for the gradients."""
    case, weights = "6,12,15,2,2", 3 * 2 * 12 * 15
    _, given = launches(case, precision="bfloat16", weights="bfloat16")
    assert given["cast"].memory_seconds == pytest.approx(1e-9 * 6 * 12 * 6, rel=1e-12)
    _, copied = launches(case, precision="bfloat16")
    assert copied["cast"].memory_seconds == pytest.approx(1e-9 * 6 * (6 * 12 + weights), rel=1e-12)
    found, _ = launches(case, "forward+backward", precision="bfloat16")
    casts = [launch for launch in found.launches if launch.name == "cast"]
    assert casts[1].memory_seconds == pytest.approx(1e-9 * 6 * (12 * 12 + weights), rel=1e-12)
    _, none = launches(case, weights="float16")
    assert "cast" not in none
    assert none["down"].memory_seconds == pytest.approx(
        1e-9 * (2 * 2 * 12 * 15 + 4 * (12 * 15 + 12 * 12)), rel=1e-12
    )


def test_rows_beyond_the_cache_are_read_by_every_tile(plain):
    small = dataclasses.replace(PLAIN, l2=4 * 6 * 12 - 1)
    _, by_name = launches("6,12,15,2,2", card=small)
    _, cached = launches("6,12,15,2,2", card=dataclasses.replace(PLAIN, l2=4 * 6 * 12))
    more = by_name["gate_up"].memory_seconds - cached["gate_up"].memory_seconds
    assert more == pytest.approx(4e-9 * 6 * 12 * 2, rel=1e-9)  # by 3 tiles instead of once


def test_rows_of_an_expert_beyond_the_cache_are_read_by_every_tile_of_its_gradient(plain):
    read = 4 * (6 * 12 + 12 * 30)  # tokens, gradients of pre-activations
    seconds = []
    for l2 in (read // 2, read // 2 - 1):
        card = dataclasses.replace(PLAIN, l2=l2)
        _, by_name = launches("6,12,15,2,2", "forward+backward", card=card)
        seconds.append(by_name["gate_up_wgrad"].memory_seconds)
    # 30 x 12 in 3 x 1 tiles: tokens are read by the 3 of a column.
    assert seconds[1] - seconds[0] == pytest.approx(4e-9 * 6 * 12 * 2, rel=1e-9)


def test_the_largest_term_is_the_bound(plain):
    slow = {"float32_fma": 1, "memory": 1e15}
    for changes, term in (
        ({"memory": 1e3}, "memory"),
        (slow, "math"),
        ({"float32_fma": 10**6, "memory": 1e15}, "issue"),
    ):
        found, by_name = launches("6,12,15,2,2", card=dataclasses.replace(PLAIN, **changes))
        up = by_name["gate_up"]
        assert up.bound_by == found.bound_by == term
        busiest = 1.0 if term == "memory" else up.imbalance
        assert up.seconds == busiest * getattr(up, f"{term}_seconds")


# --- what must grow with what, with the real figures


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("card", CARD_SHEETS.values(), ids=CARD_SHEETS)
def test_bounds_grow_and_shrink_as_they_must(precision, card):
    for name in ("decode1_olmoe", "prefill_olmoe", "train_small"):
        case = CASES[name]
        forward, step = (model_case(case, d, card, precision) for d in DIRECTIONS)
        assert 0 < forward.seconds < step.seconds
        assert step.flops == pytest.approx(3 * forward.flops)
        assert forward.padding >= 1.0
        for launch in step.launches:
            assert launch.imbalance >= 1.0
            assert launch.resident >= (launch.flops > 0)
        for field, factor in (("memory", 2), ("tensor_fma", 2), ("float32_fma", 2), ("l2", 100)):
            better = dataclasses.replace(card, **{field: getattr(card, field) * factor})
            assert model_case(case, "forward", better, precision).seconds <= forward.seconds
        for wider in ("hidden_size", "intermediate_size"):
            more = dataclasses.replace(case, **{wider: 2 * getattr(case, wider)})
            assert model_case(more, "forward", card, precision).seconds > forward.seconds
        # Never below what the card can do at all.
        assert forward.flops / forward.seconds < 2 * card.multiprocessors * card.clock * max(
            card.float32_fma, card.tensor_fma
        )


def test_more_tokens_never_take_less(monkeypatch):
    case, card = CASES["prefill_olmoe"], find_sheet("A100")
    seconds = [
        model_case(dataclasses.replace(case, num_tokens=16 * 4**n), "forward", card).seconds
        for n in range(6)
    ]
    assert seconds == sorted(seconds)


# --- cards


def test_rates_are_those_of_the_data_sheets():
    float32 = {"A100": 19.5, "RTX3090": 35.6, "RTX4090": 82.6, "H100": 67, "B200": 75,
               "RTX5090": 104.8}  # fmt: skip
    tensor = {"A100": 312, "RTX3090": 71.2, "RTX4090": 165.2, "H100": 989.4, "B200": 2250,
              "RTX5090": 209.5}  # fmt: skip
    assert CARD_SHEETS.keys() == float32.keys() == tensor.keys()
    for name, card in CARD_SHEETS.items():
        made = 2e-12 * card.multiprocessors * card.float32_fma * card.clock
        assert made == pytest.approx(float32[name], rel=0.01)
        made = 2e-12 * card.multiprocessors * card.tensor_fma * card.tensor_clock
        assert made == pytest.approx(tensor[name], rel=0.01)


@pytest.mark.parametrize("name", ["RTX 4090", "rtx-4090", "RTX4090", "rtx4090"])
def test_spelling_of_a_card(name):
    assert find_sheet(name).arch == "sm_89"


def test_an_unknown_card():
    with pytest.raises(RangeError) as raised:
        find_sheet("RTX 4091")
    assert str(raised.value) == (
        "bench: --modelled must name known cards, got 'RTX 4091'. Did you mean 'RTX4090'? "
        "Known: A100, RTX3090, RTX4090, H100, B200, RTX5090."
    )
    with pytest.raises(RangeError, match=r"got 'x'\. Known: A100"):
        find_sheet("x")


def test_an_unknown_precision():
    with pytest.raises(RangeError, match=(
        r"^bench: --precision must be one of float32, tf32, bfloat16, float16 with --modelled, "
        r"got 'int8'\. Figures"
    )):  # fmt: skip
        model_case(CASES["train_small"], "forward", find_sheet("A100"), "int8")


# --- text and JSON


def test_everything_says_that_it_is_modelled():
    row = [
        model_case(CASES["train_small"], "forward", card, "bfloat16", "bfloat16")
        for card in CARD_SHEETS.values()
    ]
    text = modelled_table(row)
    assert text.startswith("MODELLED, not measured: train_small, forward: T=4096 ")
    assert "MODELLED ms" in text
    assert LEGEND.startswith("MODELLED: nothing of this was measured.")
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[3:9]] == list(CARD_SHEETS)
    assert len({len(line) for line in lines[2:9]}) == 1
    assert lines[9] == (
        "  H100: mma.sync reaches 62.9% of the full tensor rate of sm_90 (Luo et al. 2024), which "
        "the bound assumes."
    )
    assert lines[10].startswith("  B200: mma.sync cannot reach the full tensor rate of sm_100; ")
    assert len(lines) == 11
    assert "mma.sync" not in modelled_table(
        [model_case(CASES["train_small"], "forward", card) for card in CARD_SHEETS.values()]
    )
    values = json.loads(json.dumps(modelled_json(row), allow_nan=False))
    assert values["modelled"] is True
    assert values["kernels_compiled_by"] == read_figures()["compiler"]
    for case in values["cases"]:
        assert case["modelled"] is True
        assert case["modelled_seconds"] == pytest.approx(
            sum(launch["modelled_seconds"] for launch in case["launches"])
        )
        assert "seconds" not in case


# --- the figures


def test_the_geometry_is_that_of_the_backend():
    for precision in figures.PRECISIONS:
        kept, tiling = read_figures()[precision], figures.TILINGS[precision]
        assert {k: v for k, v in kept.items() if k != "kernels"} == figures.geometry(precision)
        names = set(figures.variants(precision))
        assert kept["kernels"].keys() == names
        for rows in (1, 31, 32, 33, 128, 129, 256, 257, 10_000):
            case = parse_case(f"{rows},64,64,4,1")
            chosen = model_case(case, "forward", find_sheet("A100"), precision).block_size
            assert chosen == tiling.block_size(rows, 4)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_grids_are_those_that_the_backend_launches(precision):
    """Exactly for weight gradients; for products the backend launches at least as many blocks."""
    case = parse_case("40,208,112,4,2")
    found = model_case(case, "forward+backward", find_sheet("A100"), precision)
    modelled_blocks = {launch.name.partition("/")[0]: launch.blocks for launch in found.launches}
    for launch in figures.record(precision, 40, (208, 112, 4, 2)):
        blocks = modelled_blocks[launch.name]
        if launch.kernel.entry == "grouped_wgrad":
            assert blocks == math.prod(launch.grid)
        else:
            assert dict(launch.kernel.options)["BLOCK_M"] == found.block_size
            rows = UniformLoad(case).blocks(found.block_size)
            assert blocks == pytest.approx(rows * launch.grid[1])
            assert rows <= launch.grid[0]


def fresh(cases):
    """Compare kept figures with those of cubins that are compiled now."""
    try:
        version = figures.nvrtc_version()
    except BackendUnavailableError as error:
        if "emulate" in os.environ.get("NPMOE_REQUIRE", "").replace(",", " ").split():
            raise
        pytest.skip(str(error))
    if read_figures()["compiler"] != f"NVRTC {version}":
        pytest.skip(f"figures are those of {read_figures()['compiler']}, here is {version}")
    if None in figures.find_programs():
        pytest.skip("needs nvdisasm and cuobjdump")
    for precision, name, arch in cases:
        launch = figures.variants(precision)[name]
        kept = read_figures()[precision]["kernels"][name][arch]
        assert kept == figures.measure(precision, launch, arch), (
            f"{precision} {name} {arch}: run python tests/benchmark/kernel_figures.py"
        )


def test_some_figures_are_those_of_fresh_cubins():
    fresh([("float32", "gate_up/64", "sm_80"), ("bfloat16", "gate_up/128", "sm_90")])


@pytest.mark.exhaustive
def test_all_figures_are_those_of_fresh_cubins():
    fresh(
        [
            (precision, name, arch)
            for precision in figures.PRECISIONS
            for name in figures.variants(precision)
            for arch in figures.ARCHITECTURES
        ]
    )


def test_the_main_loop_is_found_and_its_inner_turns_counted():

    def text(*instructions):
        return "\n".join(
            f"{i}:" if i.startswith(".L") else f"        /*0000*/    {i} ;" for i in instructions
        )

    flat = text("FFMA R1", ".L_x_1", "BAR.SYNC", "FFMA R1", "@P0 FFMA R2", "@P0 BRA `(.L_x_1)")
    assert figures.main_loop(flat, 2) == (4, 2)
    nested = text(
        *(".L_x_1", "BAR.SYNC", "FFMA R0", ".L_x_2", "LDS R1", "FFMA R1", "BRA `(.L_x_2)"),
        "BRA `(.L_x_1)",
    )
    # One multiplication outside, and three turns of three instructions.
    assert figures.main_loop(nested, 4) == (3 + 3 * 3, 4)
    both = text(".L_x_1", "BAR.SYNC", "HMMA.16816.F32 R0", "FFMA R0", "BRA `(.L_x_1)")
    assert figures.main_loop(both, 1) == (4, 1)
