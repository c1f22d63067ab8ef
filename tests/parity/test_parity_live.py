# ruff: noqa: E402  # imports follow importorskip
"""Every preset against its upstream block: random configurations, output and all gradients."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

WHY = "parity with transformers needs the extra npmoe[parity]"
pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

import other_blocks  # noqa: F401  # completes OTHERS
from families import FAMILIES
from other_families import NOT_EXPRESSIBLE, OTHERS
from parity_compare import FLOAT32_BOUND, FLOAT64_BOUND, check_case, config_of
from parity_upstream import run_case

import npmoe

CONFIGS, OTHER_CONFIGS = 12, 4
BACKENDS = ("naive", "reference", "numpy")


@pytest.mark.parametrize("seed", range(CONFIGS))
@pytest.mark.parametrize("name", FAMILIES)
def test_preset_equals_upstream_in_float64(name: str, seed: int) -> None:
    case = run_case(name, seed, FAMILIES[name].build, raised=True)
    for backend in BACKENDS:
        check_case(case, backend=backend, bound=FLOAT64_BOUND)


@pytest.mark.parametrize("seed", range(CONFIGS, CONFIGS + 3))
@pytest.mark.parametrize("name", FAMILIES)
def test_preset_equals_upstream_with_its_own_casts(name: str, seed: int) -> None:
    case = run_case(name, seed, FAMILIES[name].build, raised=False)
    check_case(case, backend="numpy", bound=FLOAT32_BOUND)


@pytest.mark.parametrize("name", FAMILIES)
def test_preset_has_the_fields_of_the_family_and_no_others(name: str) -> None:
    case = run_case(name, 0, FAMILIES[name].build, raised=True)
    fields = {**case["sizes"], **FAMILIES[name].fields, **case["overrides"]}
    assert config_of(case) == npmoe.MoEConfig(**fields)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_upstream_casts_to_float32_only_where_known(name: str) -> None:
    family = FAMILIES.get(name) or OTHERS[name]
    cases = [run_case(name, seed, family.build, raised=True) for seed in range(4)]
    assert {call for case in cases for call in case["raised"]} == family.raised


@pytest.mark.parametrize("seed", range(OTHER_CONFIGS))
@pytest.mark.parametrize("name", OTHERS)
def test_fields_express_the_other_blocks_too(name: str, seed: int) -> None:
    case = run_case(name, seed, OTHERS[name].build, raised=True)
    cfg = npmoe.MoEConfig(**case["sizes"], **{**OTHERS[name].fields, **case["overrides"]})
    for backend in BACKENDS:
        check_case(case, backend=backend, bound=FLOAT64_BOUND, cfg=cfg)


def test_the_draws_reach_what_makes_the_families_differ() -> None:
    """Without drops, groups, hash layers and identity experts the comparison would say little."""

    def cases(name: str, seeds: int) -> list[dict]:
        build = (FAMILIES.get(name) or OTHERS[name]).build
        return [run_case(name, seed, build, raised=True) for seed in range(seeds)]

    assert any((case["topk_ids"] == -1).any() for case in cases("switch_transformers", CONFIGS))
    assert {case["replay"] for case in cases("deepseek_v4", CONFIGS)} == {True, False}
    for name in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        kinds = {
            (case["overrides"]["num_groups"] > 1, case["sizes"]["top_k"] > 1)
            for case in cases(name, CONFIGS)
        }
        assert {(True, True), (False, True)} <= kinds
    assert any((c["params"]["selection_bias"] < -1).all() for c in cases("deepseek_v3", CONFIGS))
    assert any(
        (case["topk_ids"] >= case["sizes"]["num_experts"]).any()
        for case in cases("longcat_flash", OTHER_CONFIGS)
    )
    assert any(
        (case["params"]["selection_bias"] < -1).all() for case in cases("axk2", OTHER_CONFIGS)
    )
    assert {case["overrides"]["renorm_p"] for case in cases("dbrx", CONFIGS)} == {1, 2}
    assert any(case["overrides"]["renorm_eps"] for case in cases("lfm2_moe", OTHER_CONFIGS))


def test_the_twenty_presets_are_all_here() -> None:
    assert len(FAMILIES) == 20
    assert set(FAMILIES) <= set(npmoe.presets())
    assert not set(FAMILIES) & set(OTHERS)


def test_every_mixture_of_experts_of_the_release_is_accounted_for() -> None:
    """A newer release that brings another model type with experts has to be looked at."""
    folder = Path(transformers.__file__).parent / "models"
    known = {name.split(" ")[0] for name in (*FAMILIES, *OTHERS, *NOT_EXPRESSIBLE)}
    words = re.compile(r"class \w*(Experts|Moe|MoE)\w*\(nn\.Module", re.MULTILINE)
    found = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if words.search(path.read_text())
    }
    assert set(FAMILIES) <= found
    assert found - known == set()
