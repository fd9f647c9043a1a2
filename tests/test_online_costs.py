"""benchmarks/online_costs.py on a tiny model."""

import json
import sys
from pathlib import Path

import pytest

from twdpo.losses import LOSSES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import online_costs
import train_step


@pytest.mark.slow
def test_a_row_a_way_and_what_is_not_there_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(train_step.SHAPES, "20m", dict(
        num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1))
    monkeypatch.setattr(train_step, "VOCABULARY", 1024)
    monkeypatch.delitem(LOSSES, "wpo")
    out = tmp_path / "costs.json"
    online_costs.main(["--pairs", "2", "--max-length", "128", "--seconds", "0", "--out", str(out)])
    printed = capsys.readouterr().out
    rows = {row["way"]: row for row in json.loads(printed.strip().splitlines()[-1])["rows"]}
    assert sorted(rows) == sorted(online_costs.WAYS) and json.loads(out.read_text())["rows"][0].keys() >= {"way"}
    assert rows["wpo"]["note"] == "no loss wpo" and "wpo: no loss wpo\n" in printed
    assert rows[online_costs.BASE]["times_dpo"] == 1 and "source_share" not in rows[online_costs.BASE]
    for name in ("otpo", "selective"):
        assert 0 < rows[name]["source_share"] < 1 and rows[name]["times_dpo"] > 0 and rows[name]["rounds"] >= 3


@pytest.mark.parametrize("flags, message", [(["--only", "nobody"], "no way's name"), (["--pairs", "0"], "at least 1"),
                                            (["--seconds", "-1"], "0 or more")])
def test_bad_flags_are_one_message(flags, message, capsys):
    with pytest.raises(SystemExit):
        online_costs.main(flags)
    assert message in capsys.readouterr().err


def test_some_ways_are_those_and_dpo():
    assert online_costs.parse(["--only", "otpo,disk"])[1] == [online_costs.BASE, "otpo", "otpo, reg 0.1",
                                                              "tdpo2, reference on disk"]
