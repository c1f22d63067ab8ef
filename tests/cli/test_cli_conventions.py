"""``npmoe conventions`` prints the tables of `npmoe.conventions`, all or one."""

from __future__ import annotations

import json

from conftest import assert_one_message, npmoe

from npmoe import conventions


def test_all_three_tables(tmp_path):
    path = tmp_path / "tables.json"
    result = npmoe("conventions", "--json", path)
    assert (result.code, result.err) == (0, "")
    texts = (conventions.routing_text(), conventions.balance_text(), conventions.capacity_text())
    assert result.out == "\n\n".join(texts) + "\n"
    values = json.loads(path.read_text(encoding="utf-8"))
    assert list(values) == ["routing", "balance", "capacity"]
    assert [len(values[name]) for name in values] == [14, 15, 9]
    second = values["routing"][1]
    assert second["name"] == "softmax_topk_renorm"
    assert second["topk_ids"][0] == [0, 1]
    assert round(second["topk_weights"][0][0], 4) == 0.6225
    assert second["config"]["renormalize"] is True
    rows = {row["name"]: row["rows_per_expert"][0] for row in values["capacity"]}
    assert rows["megatron"] == {"T": 400, "E": 8, "K": 1, "capacity_factor": "1.1", "rows": 56}
    assert {row["name"]: round(row["value"], 4) for row in values["balance"]}["hf"] == 2.2294


def test_one_table(tmp_path):
    path = tmp_path / "table.json"
    result = npmoe("conventions", "capacity", "--json", path)
    assert result.out == conventions.capacity_text() + "\n"
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["capacity"]


def test_mistakes(tmp_path):
    result = npmoe("conventions", "routings")
    assert result.code == 2
    assert "invalid choice: 'routings'" in result.err
    result = npmoe("conventions", "--json", tmp_path)
    assert_one_message(result, "npmoe conventions: error: --json must name a file")
    assert result.out == ""
