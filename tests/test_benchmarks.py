"""The benchmarks on tiny settings: rows that come at once, budgets that are kept, and where results go. No timing."""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import attention
import extraction
import harness
import loss_kernel
from loss_peers import Method, find_methods
from twdpo.logratio import HeadOptions, weighted_logratio_chunked, weighted_logratio_spec

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
HEAD = {"machine": {"device": "x", "torch": "1", "date": "today"}, "dtype": "float32"}
TINY = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


# --- harness


def test_rows_are_on_disk_when_they_are_added_and_take_the_place_of_earlier_ones(tmp_path):
    path = tmp_path / "new" / "x.json"
    report = harness.Report(path, HEAD, ("name",))
    report.add({"name": "a", "ms": 1})
    assert read(path) == [{"name": "a", "ms": 1}]
    report.add({"name": "b", "ms": 2})
    again = harness.Report(path, HEAD | {"machine": HEAD["machine"] | {"date": "later"}}, ("name",))
    again.add({"name": "b", "ms": 3})
    assert read(path) == [{"name": "b", "ms": 3}, {"name": "a", "ms": 1}]
    again.add({"name": "a", "note": "left out"})  # no figure: the earlier one stays
    assert read(path) == [{"name": "b", "ms": 3}, {"name": "a", "ms": 1}]
    harness.Report(path, HEAD | {"dtype": "bfloat16"}, ("name",)).add({"name": "c", "ms": 4})
    assert read(path) == [{"name": "c", "ms": 4}]


def test_a_row_without_ratios_does_not_take_the_place_of_one_with(tmp_path):
    for row, kept in (({"ms": 1, "ratio": 2}, 1), ({"ms": 2}, 1), ({"ms": 3, "ratio": 4}, 3)):
        harness.Report(tmp_path / "x.json", HEAD, ("name",), ("ratio",)).add({"name": "a"} | row)
        assert [row["ms"] for row in read(tmp_path / "x.json")] == [kept]


def test_only_record_writes_among_the_committed_results(tmp_path):
    def path(*arguments: str) -> Path:
        parser = argparse.ArgumentParser()
        harness.add_output_flags(parser, "x.json")
        return harness.output_path(parser.parse_args(arguments), CPU, "x.json")
    assert path() == ROOT / "runs/benchmarks/cpu/x.json"
    assert path("--record") == ROOT / "benchmarks/results/cpu/x.json"
    assert path("--out", str(tmp_path / "y.json")) == path("--record", "--out", str(tmp_path / "y.json")) == (
        tmp_path / "y.json")
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()


def test_turns_go_round_and_end_at_the_deadline():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = harness.interleave(functions, CPU, 0.0)
    assert calls == ["a", "b"] * 3 and [len(each) for each in times.values()] == [3, 3]
    calls.clear()
    harness.interleave(functions, CPU, 1e9, deadline=-math.inf)
    assert calls == ["a", "b"]


def test_every_32_made_up_pairs_are_as_long():
    lengths = harness.real_lengths(96)
    blocks = [lengths[start:start + 32] for start in (0, 32, 64)]
    assert {sum(map(sum, block)) for block in blocks} == {sum(map(sum, blocks[0]))}
    assert blocks[0] != blocks[1] and harness.real_lengths(40) == harness.real_lengths(64)[:40]
    assert sum(map(sum, blocks[0])) == pytest.approx(22_500, rel=0.01)
    for median, values in zip(harness.MEDIAN_LENGTHS, zip(*blocks[0])):
        assert sum(value < median for value in values) == 16


# --- loss_kernel.py


def ours(options: HeadOptions | None = None, factor: float = 1.0):
    def op(hidden_ND, head_VD, batch):
        ratio_S, logps_N, _ = weighted_logratio_chunked(factor * hidden_ND, head_VD, **batch, options=options)
        return ratio_S, logps_N
    return op


def fails(*_):
    raise RuntimeError("of its own\nsecond line")


def is_killed(*_):
    raise KeyboardInterrupt


@pytest.fixture
def tiny_heads(monkeypatch):
    """Two heads of a few numbers, one with a softcap; one token count."""
    monkeypatch.setattr(loss_kernel, "CPU_HEADS", {"plain": (300, 16, None), "capped": (300, 16, 30.0)})
    monkeypatch.setattr(loss_kernel, "TOKENS", {"cpu": (24,)})


@pytest.fixture
def methods(monkeypatch, tiny_heads):
    """set_methods(more...): ours and these are the methods that there are."""
    def set_methods(*more: Method) -> None:
        first = Method("twdpo, torch chunks", ours())
        monkeypatch.setattr(loss_kernel, "find_methods", lambda device, softcap: [first, *more])
    return set_methods


def test_a_kill_leaves_the_rows_before_it(methods, tmp_path, capsys):
    methods(Method("broken", fails), Method("killed", is_killed), Method("after", ours()))
    with pytest.raises(KeyboardInterrupt):
        loss_kernel.main(["--seconds", "0", "--out", str(tmp_path / "x.json")])
    first, broken = read(tmp_path / "x.json")
    assert first["method"] == "twdpo, torch chunks" and first["forward_backward_ms"] > 0 and first["rounds"] == 3
    assert broken["note"] == "failed: RuntimeError: of its own"
    printed = capsys.readouterr().out
    assert printed.index("twdpo, torch chunks  ") < printed.index("failed: RuntimeError: of its own")


def test_a_first_call_over_the_limit_is_a_row_and_not_tried_again(methods, tmp_path, capsys):
    methods()
    loss_kernel.main(["--compile-limit", "0", "--out", str(tmp_path / "x.json")])
    first, second = last_line(capsys.readouterr().out)["rows"]
    assert first["note"].startswith("the first call, compilation included, took")
    assert first["note"].endswith("over the limit of 0 s: not timed") and "forward_backward_ms" not in first
    assert second["note"] == "left out: its first call took over 0 s before" and second["head"] == "capped"


def test_what_is_not_here_is_said_once(methods, tmp_path, capsys):
    methods(Method("peer", missing="peer>=1 can't be imported"), Method("no cap", ours(), takes_softcap=False))
    loss_kernel.main(["--seconds", "0", "--out", str(tmp_path / "x.json")])
    printed = capsys.readouterr().out
    assert printed.count("peer>=1 can't be imported") == 1 + 1  # the last line is JSON
    report = last_line(printed)
    assert report["missing"] == {"peer": "peer>=1 can't be imported"}
    assert [(row["head"], row["method"]) for row in report["rows"]] == [
        ("plain", "twdpo, torch chunks"), ("plain", "no cap"), ("capped", "twdpo, torch chunks")]
    assert "take no softcap, so not at capped: no cap" in printed


def test_without_time_left_everything_is_left_out_and_said(methods, tmp_path, capsys):
    methods(Method("other", fails))
    loss_kernel.main(["--minutes", "0", "--out", str(tmp_path / "x.json")])
    printed = capsys.readouterr().out
    assert printed.count("left out, as it does not fit the 0 minutes: twdpo, torch chunks; other") == 2
    assert "Nothing was measured." in printed
    assert [row["note"] for row in read(tmp_path / "x.json")] == ["left out: it does not fit the 0 minutes"] * 4


def test_the_budget_knows_what_a_method_takes(tmp_path):
    """Nothing begins that would not end in time by what others took, or when its head's share is over."""
    flags = argparse.Namespace(minutes=1.0, compile_limit=20.0)
    session = loss_kernel.Session(flags, CPU, None)
    case, plain, slow = loss_kernel.Case("x", 300, 16, None, 24), Method("a"), Method("b", compiles=True)
    assert session.why_left_out(plain, case, 0) == session.why_left_out(slow, case, 0) == ""
    past = time.perf_counter() - 1
    assert "had its share of the 1 minutes" in session.why_left_out(plain, case, past)
    flags.compile_limit = 31.0  # it may take twice as long: there is no way to stop it
    assert "does not fit" in session.why_left_out(slow, case, 0) and not session.why_left_out(plain, case, 0)
    session.first_calls["b"] = 5.0  # known by now
    assert not session.why_left_out(slow, case, 0)
    session.pace = 61 / loss_kernel.CALLS / case.nvd
    assert "does not fit" in session.why_left_out(plain, case, 0)


def test_errors_are_those_of_the_first_tokens_and_the_truth_is_made_once(methods, tmp_path, monkeypatch, capsys):
    made = []
    prepare = loss_kernel.prepare
    monkeypatch.setattr(loss_kernel, "prepare", lambda *args: made.append(args[0].head) or prepare(*args))
    methods(Method("wrong by 1 %", ours(factor=1.01)))
    loss_kernel.main(["--seconds", "0", "--heads", "plain", "--error-tokens", "7", "--out", str(tmp_path / "x.json")])
    right, wrong = last_line(capsys.readouterr().out)["rows"]
    assert made == ["plain"]
    assert all(0 < error < 1e-5 for error in right["relative_error"].values())
    assert all(error > 1e-3 for error in wrong["relative_error"].values())
    operands = prepare(loss_kernel.Case("x", 300, 16, None, 24), CPU, 7)
    whole = prepare(loss_kernel.Case("x", 300, 16, None, 24), CPU, 24)
    assert len(operands.truth[False][0]) == 7
    assert operands.truth.keys() == {False, True}  # the loss with KL has its own
    assert torch.equal(operands.truth[True][0], operands.truth[False][0])
    assert (operands.truth[True][1] - operands.truth[False][1]).norm() > 0.01 * operands.truth[False][1].norm()
    operands, whole = operands._replace(truth=operands.truth[False]), whole._replace(truth=whole.truth[False])
    torch.testing.assert_close(operands.truth[0], whole.truth[0][:7])
    matrices = [matrix.detach().double().requires_grad_() for matrix in operands[:2]]
    output = weighted_logratio_spec(*matrices, **operands.error_batch)
    grad_hidden_ND, grad_head_VD = torch.autograd.grad(loss_kernel.loss_of(output), matrices)
    torch.testing.assert_close(grad_hidden_ND[:7], operands.truth[1])
    torch.testing.assert_close(grad_head_VD, operands.truth[2])
    assert not grad_hidden_ND[7:].any()


def test_a_truth_that_does_not_fit_is_the_end_of_its_case(methods, tmp_path, monkeypatch, capsys):
    prepare, asked = loss_kernel.prepare, []

    def fits_the_second(case, *args):
        asked.append(case.head)
        if case.head == "plain":
            raise torch.OutOfMemoryError
        return prepare(case, *args)
    monkeypatch.setattr(loss_kernel, "prepare", fits_the_second)
    methods(Method("other", ours()))
    loss_kernel.main(["--seconds", "0", "--tokens", "24,24", "--out", str(tmp_path / "x.json")])
    rows = last_line(capsys.readouterr().out)["rows"]
    assert asked == ["plain", "capped"] and [row["head"] for row in rows] == ["plain"] * 2 + ["capped"] * 2
    assert [row.get("note") for row in rows] == ["left out: there is no fp64 to compare with: out of memory"] * 2 + [
        None] * 2


def test_the_closing_sentence_says_what_the_rows_say(methods, tmp_path, capsys):
    methods(Method("other", ours()), Method("own loss", lambda *args: ours()(*args)[1].sum(), reference_row=True))
    loss_kernel.main(["--seconds", "0", "--heads", "plain", "--out", str(tmp_path / "x.json")])
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in last_line(printed)["rows"]}
    assert set(rows) == {"twdpo, torch chunks", "other", "own loss (reference row)"}
    mine, other = rows["twdpo, torch chunks"], rows["other"]
    assert mine["over_ours"] == 1.0 and "relative_error" not in rows["own loss (reference row)"]
    assert other["over_ours"] == other["forward_backward_ms"] / other["ours_ms"]
    for row, faster in ((mine, 1.5), (other, 0.5)):
        other |= {"over_ours": faster, "ours_ms": 77.125}  # in the other's turns
        text = loss_kernel.conclusion(list(rows.values()))
        assert f"the fastest of 2 is {row['method']} ({row['forward_backward_ms']:.2f} ms" in text
        assert f"{row['peak_extra_mib']:.0f} MiB extra" in text
    assert "twdpo, torch chunks takes 2.00 times as long (77.12 ms" in text and "the fastest at 0 of 1" in text
    assert loss_kernel.conclusion([other]).endswith("twdpo was not measured.")
    assert any(line.startswith("plain at 24 tokens: the fastest of 2") for line in printed.splitlines())


def test_methods_with_kl_are_compared_with_each_other_alone(methods, tmp_path, capsys):
    with_kl = [method for method in find_methods(CPU, None) if method.with_kl]
    methods(*with_kl, Method("other", ours()))
    loss_kernel.main(["--seconds", "0", "--heads", "plain", "--out", str(tmp_path / "x.json")])
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in last_line(printed)["rows"]}
    chunks, full = (rows[name] for name in ("twdpo, torch chunks, with KL", "full logits, with KL"))
    assert chunks["over_ours"] == 1.0 and full["over_ours"] == full["forward_backward_ms"] / full["ours_ms"]
    assert full["ours_ms"] != rows["other"]["ours_ms"] and "the fastest of 2 is" in printed
    assert all(max(row["relative_error"].values()) < 1e-5 for row in (chunks, full))
    names = [method.name for method in find_methods(torch.device("cuda"), None) if method.with_kl]
    assert names == ["twdpo, Triton, with KL", "full logits, with KL"]


@pytest.mark.slow
def test_every_method_that_is_here_runs(tiny_heads, tmp_path, capsys):
    loss_kernel.main(["--seconds", "0", "--compile-limit", "600", "--minutes", "60", "--out", str(tmp_path / "x.json")])
    report = last_line(capsys.readouterr().out)
    # What torch.compile compiles needs a C++ compiler, and a processor that it writes for.
    assert not [row for row in report["rows"] if "note" in row and "compiled" not in row["method"]]
    names = {method.name for method in find_methods(CPU, None) if not method.missing}
    assert {row["method"].removesuffix(" (reference row)") for row in report["rows"] if row["head"] == "plain"} == names
    assert all(max(row["relative_error"].values()) < 1e-4 for row in report["rows"] if "relative_error" in row)


def test_on_a_gpu_the_most_worthwhile_comes_first():
    _, cases = loss_kernel.parse([], torch.device("cuda"))
    assert [(case.head, case.tokens) for case in cases[:5]] == [
        ("llama-3-8b", 4096), ("gemma-2-2b", 4096), ("qwen2.5-7b", 4096), ("trl#7244", 8192), ("llama-3-8b", 16384)]
    found = find_methods(torch.device("cuda"), None)
    names = [method.name for method in found]
    assert names[:2] == ["twdpo, Triton", "twdpo, Triton, half of the tiles kept"]
    assert not found[1].takes_softcap and names[-1] == "full logits, compiled"


def test_the_cached_row_asks_for_half_of_the_tiles(monkeypatch):
    asked = {}

    def op(*args, head_cache_gib, **kwargs):
        asked["gib"] = head_cache_gib
        return (None,) * 3
    monkeypatch.setattr("loss_peers.weighted_logratio", op)
    cached = next(method for method in find_methods(torch.device("cuda"), None) if "kept" in method.name)
    cached.op(torch.zeros(64, 2), torch.zeros(1024, 2), {})
    assert asked["gib"] * 2**30 == 64 * 1024 * 2 / 2  # bf16, half of them


@pytest.mark.parametrize("flags, message", [
    (["--tokens", "1"], "at least 2"), (["--only", "nobody"], "no method's name"),
    (["--heads", "x"], "must be of plain"), (["--tokens", "abc"], "no whole number"), (["--tokens", ""], "no whole"),
    (["--minutes", "nan"], "must be a number"), (["--seconds", "-1"], "0 or more"), (["--out", "."], "is a folder"),
])
def test_bad_flags_are_one_message(flags, message, tiny_heads, capsys):
    with pytest.raises(SystemExit):
        loss_kernel.main(flags)
    assert message in capsys.readouterr().err


# --- extraction.py, attention.py


@pytest.fixture
def tiny_models(monkeypatch, tmp_path):
    """Models of a layer; results without --out go below tmp_path."""
    monkeypatch.setattr(extraction, "SHAPES", {"cpu": TINY | {"vocab_size": 99}})
    monkeypatch.setattr(attention, "SHAPES", {"cpu": {name: TINY[name] for name in (
        "hidden_size", "num_attention_heads", "num_key_value_heads")}})
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    return tmp_path / "runs/benchmarks/cpu"


def test_extraction_rows_come_one_by_one(tiny_models, monkeypatch, capsys):
    monkeypatch.setitem(extraction.WAYS, "bare trunk, rounds apart", (is_killed, "sdpa"))
    with pytest.raises(KeyboardInterrupt):
        extraction.main(["--lengths", "330", "--seconds", "0"])
    rows = read(tiny_models / "extraction.json")
    assert [row["way"] for row in rows] == [extraction.OURS, extraction.LIMIT, extraction.EAGER]
    assert all(row["over_limit"] == row["over_ours"] / rows[1]["over_ours"] for row in rows)
    assert all(row["speed_over_eager"] == rows[2]["over_ours"] / row["over_ours"] for row in rows)
    assert not (tiny_models.parents[2] / "benchmarks").exists()


def test_extraction_of_ragged_lengths(tiny_models, monkeypatch, capsys):
    monkeypatch.setitem(extraction.WAYS, extraction.EAGER, (fails, "eager"))
    extraction.main(["--lengths", "330", "--seconds", "0"])
    extraction.main(["--ragged", "--pairs", "4", "--seconds", "0"])
    printed = capsys.readouterr().out
    rows = {row["way"]: row for row in last_line(printed)["rows"]}
    assert list(rows) == list(extraction.WAYS) and all(row["ragged"] for row in rows.values())
    assert rows[extraction.EAGER]["note"] == "failed: RuntimeError: of its own"
    mine = rows[extraction.OURS]
    assert (f"{mine['tokens']:,} tokens on average: {mine['seconds_a_pair']:.3f} s a pair, {mine['over_limit']:.2f} "
            "times the bare trunk.") in printed
    assert len(read(tiny_models / "extraction.json")) == 2 * len(extraction.WAYS)  # those of the first call stay
    extraction.main(["--lengths", "330,340", "--minutes", "0"])
    notes = [row["note"] for row in last_line(capsys.readouterr().out)["rows"]]
    assert notes == ["left out: it does not fit the 0 minutes"] * 2 * len(extraction.WAYS)


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 32])
def test_no_ragged_input_is_as_long_as_one_of_an_earlier_call(num_pairs):
    seen: set[int] = set()
    sums = []
    for call in range(extraction.NEW_CALLS):
        pairs = extraction.ragged_pairs(num_pairs, call, 99)
        lengths = [len(ids) for pair in pairs for ids in pair]
        assert not seen & set(lengths)
        seen |= set(lengths)
        sums.append(sum(lengths) // 2)
    assert max(sums) - min(sums) <= num_pairs % 2 * 2 * extraction.NEW_CALLS
    real = sum(extraction.PREAMBLE + chosen + rejected + extraction.END
               for _, chosen, rejected in harness.real_lengths(num_pairs))
    assert sums[0] == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("minutes, calls", [(15, 1), (25, 2)])
def test_extraction_begins_no_call_that_would_be_over_too_late(monkeypatch, minutes, calls):
    now = [0.0]

    def way():
        now[0] += 10
    monkeypatch.setattr(extraction, "time", argparse.Namespace(perf_counter=lambda: now[0]))
    row = extraction.measure({extraction.OURS: way}, extraction.OURS, 1, CPU, 0.0, minutes)
    assert row == {"note": f"left out: no time for more after {calls} of its calls, 10.0 s the last"}
    assert now[0] == 10 * calls


@pytest.mark.parametrize("mean, trials", [(120, 4), (300, 12), (500, 18)])
def test_no_length_comes_twice(mean, trials):
    seen: set[int] = set()
    for trial in range(trials):
        rows = attention.new_lengths(mean, trial, trials)
        assert [len(set(row)) for row in rows.values()] == [2, 1, 40] and {len(row) for row in rows.values()} == {40}
        assert abs(rows["one_length"][0] - mean) <= trials / 2
        assert sum(rows["40_lengths"]) == 40 * mean == sum(rows["warm-up"])
        for lengths in map(set, rows.values()):
            assert min(lengths) > 0 and not lengths & seen
            seen |= lengths


def test_attention_prints_the_ratio(tiny_models, monkeypatch, capsys):
    monkeypatch.setattr(attention, "sdpa_by_sequence", fails)
    built, clock = [], itertools.count(1)
    pack_layer = attention.packed_layer
    monkeypatch.setattr(attention, "milliseconds", lambda run, device: run() or float(next(clock)))
    monkeypatch.setattr(attention, "packed_layer", lambda decoder, lengths: built.append(
        len(set(lengths))) or pack_layer(decoder, lengths))
    attention.main(["--trials", "1"])
    printed = capsys.readouterr().out
    mine, sdpa = last_line(printed)["rows"]
    # 1 to 4 are the rehearsal's; the trial begins with the row of one length.
    assert (mine["first_ms_one_length"], mine["first_ms_40_lengths"], mine["again_ms_40_lengths"]) == (5, 7, 8)
    assert mine["ratio"] == 7 / 5 and mine["trials"] == 1
    assert sdpa["note"] == "failed: RuntimeError: of its own"
    assert f"40 sequences of 40 new lengths take {mine['ratio']:.2f} times as long" in printed
    assert built == [2, 40, 1, 2, 1, 40]  # warm-up, both rows in turns: the rehearsal, the trial
    assert read(tiny_models / "attention.json") == [mine, sdpa]
    with pytest.raises(SystemExit):
        attention.main(["--trials", "40"])


def test_attention_leaves_cudnn_as_it_was(tiny_models, capsys):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    seen = []
    for on in (True, False):
        with attention.cudnn(on):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert seen == [True, False]
