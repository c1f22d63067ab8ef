"""Every preset against stored values of its upstream block; needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_compare import FLOAT64_BOUND, check_case, config_of

FOLDER = Path(__file__).parent / "goldens"
FAMILIES = (
    *("aria", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "glm4_moe"),
    *("gpt_oss", "granitemoe", "hunyuan_v1_moe", "jamba", "llama4", "minimax", "minimax_m2"),
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "switch_transformers"),
)
CASES = 3


def load(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read what make_goldens.py wrote."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        about, values = json.loads(str(stored["about"])), stored["values"]
    cases = about.pop("cases")
    start = 0
    for case in cases:
        for key, shape in case.pop("shapes").items():
            size = int(np.prod(shape, dtype=np.int64))
            array = values[start : start + size].reshape(shape)
            start += size
            *group, last = key.split("/")
            target = case.setdefault(group[0], {}) if group else case
            target[last] = array.astype(np.int32) if last == "topk_ids" else array
    assert start == len(values)
    return about, cases


@pytest.mark.parametrize("backend", ["naive", "reference", "numpy"])
@pytest.mark.parametrize("number", range(CASES))
@pytest.mark.parametrize("name", FAMILIES)
def test_preset_equals_the_stored_values_of_upstream(name: str, number: int, backend: str) -> None:
    _, cases = load(name)
    check_case(cases[number], backend=backend, bound=FLOAT64_BOUND)


def test_every_file_is_used_and_says_where_it_comes_from() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(FAMILIES)
    for name in FAMILIES:
        about, cases = load(name)
        assert set(about) == {"torch", "transformers"}
        assert len(cases) == CASES
        assert all(case["family"] == name for case in cases)


def test_the_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 400_000


# One wrong setting at a time: the comparison has to notice every one of them.
MISTAKES = (
    ("mixtral", {"renormalize": False}),
    ("mixtral", {"router_order": "topk_score", "renormalize": False, "score_fn": "sigmoid"}),
    ("qwen2_moe", {"shared_combine": "average"}),
    ("deepseek_v3", {"routed_scaling_factor": 1.0}),
    ("deepseek_v3", {"score_fn": "softmax"}),
    ("deepseek_v4", {"activation_limit": 100.0}),
    ("deepseek_v4", {"activation": "swiglu_clamp_post"}),
    ("ernie4_5_moe", {"renorm_eps_mode": "add", "renorm_eps": 0.5}),
    ("gpt_oss", {"activation_alpha": 1.0}),
    ("llama4", {"weight_position": "output"}),
    ("minimax_m2", {"renorm_eps": 1e-6}),
    ("switch_transformers", {"capacity_scope": "batch"}),
)


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_wrong_setting_is_noticed(name: str, mistake: dict[str, Any]) -> None:
    _, cases = load(name)
    wrong = 0
    for case in cases:
        right = config_of(case)
        cfg = config_of({**case, "overrides": {**case["overrides"], **mistake}})
        assert cfg != right
        try:
            check_case(case, backend="naive", bound=FLOAT64_BOUND, cfg=cfg)
        except AssertionError:
            wrong += 1
    assert wrong, "no stored case depends on this setting"


def test_a_flipped_digit_in_any_gradient_is_noticed() -> None:
    _, cases = load("gpt_oss")
    case = cases[0]
    for name in case["grads"]:
        changed = case["grads"][name].copy()
        largest = np.unravel_index(np.argmax(np.abs(changed)), changed.shape)
        changed[largest] *= 1 + 1e-9
        broken = {**case, "grads": {**case["grads"], name: changed}}
        with pytest.raises(AssertionError, match=f"grad {name}"):
            check_case(broken, backend="naive", bound=FLOAT64_BOUND)
