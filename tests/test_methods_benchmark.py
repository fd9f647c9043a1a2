"""benchmarks/methods.py on a tiny budget: its controls by hand, its search, its figures, and that cells are kept."""

import dataclasses
import json
import math
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import methods
import methods_lab
import methods_pages
import methods_report
from methods_lab import Arm
from twdpo.batch import Outputs, collate
from twdpo.chat import Chat
from twdpo.config import PRESETS, TrainConfig
from twdpo.forms import parse_row
from twdpo.losses import LOSSES
from twdpo.models.source import TOY_MODEL
from twdpo.objective import bind_objective
from twdpo.rows import MicroBatch
from twdpo.tokens import tokenize_pairs
from twdpo.toy.grammar import all_prompts
from twdpo.toy.planted import planted_lift, planted_tokens
from twdpo.weights import WEIGHTS, WeightContext
from twdpo.weights_file import JudgedAnswer

CONTROLS = {name: WEIGHTS.pop(name) for name in ("oracle", "shuffled")}  # other tests see the project's own sources
TINY = {"NUM_PAIRS": 8, "BATCH": 4, "STEPS": (1, 2), "VALIDATION": 8, "TEST": 12, "WRITTEN": 4, "MOST_TOKENS": 8,
        "AUXILIARY": 8, "AUXILIARY_STEPS": 2}


@pytest.fixture(autouse=True)
def controls(registries):
    WEIGHTS.update(CONTROLS)


@pytest.fixture
def tiny(monkeypatch, tmp_path, capsys):
    """main(flags) of a benchmark of two steps -> cells of --out, by their keys."""
    for name, value in TINY.items():
        monkeypatch.setattr(methods_lab, name, value)
        for module in (methods_report, methods_pages):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)

    def run(*flags: str) -> dict[str, dict]:
        methods.main(["--seeds", "2", "--tries", "1", *flags, "--jobs", "1", "--out", str(tmp_path)])
        assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["cells"] > 0
        return methods.read_cells(tmp_path)
    return run


@pytest.fixture
def lab(tiny, tmp_path):
    """A tiny lab."""
    methods.open_lab(tmp_path / "judges")
    yield methods.LAB[0]
    methods.close_lab()


def made_up(validation, test=(), seed: int = 0, tests: str = "all", lift: float = 1.0, **fields) -> dict:
    """A cell: loss on neutral validation pairs after each step; accuracy on both sets of test pairs."""
    figures = [dict.fromkeys(("accuracy", "planted_accuracy", "signal", "drift"), value) for value in test]
    arm, found = Arm(seed=seed, tests=tests, **fields), [{"margin": 3.0, "loss": loss} for loss in validation]
    return {"arm": dataclasses.asdict(arm), "key": repr(arm), "beta": 0.3, "lift": lift, "verdicts": 0.5,
            "validation": {"neutral": found, "like training": found[::-1]},
            "test": {"neutral": figures, "reversed": figures, "written": [
                dict.fromkeys(("good", "grammar", "length", "ended"), value) for value in test]}}


@pytest.mark.slow
def test_the_headline_runs_and_finished_cells_are_kept(tiny, tmp_path, monkeypatch):
    cells = tiny()
    arms = methods_report.trained_arms(list(cells.values()))
    assert {source for _, _, source, *_ in arms} == set(methods.HEADLINE) and len(cells) == 5 * (1 + 2)
    lifts = {arm.arm["source"]: arm.finals[0]["lift"] for arm in arms.values()}
    assert lifts["uniform"] == pytest.approx(1) and lifts["oracle"] > lifts["attention"] > 2
    for arm in arms.values():
        assert set(arm.finals) == {0, 1} and arm.finals[0]["test"] != arm.finals[1]["test"]
        for where in ("neutral", "reversed"):
            assert len(methods_report.curve(arm, where)) == 2 and arm.mean(where, "drift")[0] > 0
    page, plot = ((tmp_path / name).read_text() for name in ("methods.md", "methods.svg"))
    assert "| twdpo, oracle |" in page and plot.count("<polyline") == 2 * 5 and ">shuffled</text>" in plot
    monkeypatch.setattr(methods, "train_arm", None)
    assert tiny() == cells
    # Another machine has the recorded cells and no folder of its own.
    methods.record(list(cells.values()), tmp_path / "recorded")
    monkeypatch.setattr(methods, "RECORDED", tmp_path / "recorded")
    shutil.rmtree(tmp_path / "cells")
    tiny()
    assert (tmp_path / "methods.md").read_text() == page
    with pytest.raises(TypeError):  # another beta of the toy is another arm
        monkeypatch.setitem(PRESETS["toy"], "beta", 0.5)
        tiny()


@pytest.mark.slow
def test_what_reads_the_policy_in_the_step_runs(tiny, tmp_path):
    """Hidden states, log-probs and input gradients of the policy; the reference's distributions; what it writes; two
    auxiliary models; a second judge prompt. Tested after the chosen step alone."""
    cells = tiny("--parts", "sources,losses", "--sources", "otpo,tidpo,tis,cdpo,attention_contrast",
                 "--losses", "tdpo2,wpo,simpo", "--seeds", "1")
    arms = {(loss, source): arm for (_, loss, source, *_), arm in
            methods_report.trained_arms(list(cells.values())).items()}
    assert len(arms) == 1 + 5 + 3 and all(arm.mean("neutral", "drift")[0] > 0 for arm in arms.values())
    assert arms["twdpo", "otpo"].finals[0]["lift"] != 1 == pytest.approx(arms["wpo", "uniform"].finals[0]["lift"])
    assert None in arms["twdpo", "tis"].finals[0]["test"]["neutral"]
    assert arms["simpo", "uniform"].beta == pytest.approx(2.0 * arms["simpo", "uniform"].arm["factor"])
    page = (tmp_path / "methods.md").read_text()
    assert page.index("| twdpo, tidpo |") < page.index("| simpo, uniform |")


@pytest.mark.slow
def test_judges_run_with_the_sink_fix_and_without(tiny, tmp_path, monkeypatch):
    """A judge is a folder; one that is there is not trained again."""
    monkeypatch.setattr(methods, "JUDGES", {"other": ((), (1,))})
    shutil.copytree(TOY_MODEL, tmp_path / "judges/other/step-1")
    cells = list(tiny("--parts", "judges", "--seeds", "1").values())
    arms = methods_report.trained_arms(cells)
    toy, other = (arms["confounded", "twdpo", "attention", judge, 1] for judge in ("", "other/step-1"))
    assert toy.finals[0]["lift"] == other.finals[0]["lift"] and toy.finals[0]["verdicts"] > 0.9
    assert arms["confounded", "twdpo", "attention", "", 0].finals[0]["lift"] == toy.finals[0]["lift"]
    table = methods_report.part_table("judges", cells)
    assert "judge other/step-1, no sink fix" in table and "right verdicts" in table


def test_pools_hold_what_they_say(lab):
    """Prompts of test pairs are new to the toy's model; no set shares a prompt with another; filler leans as told."""
    training, validation, tests = (make("confounded", 0) for make in (lab.training, lab.validation, lab.tests))
    prompts = [{example.pair.messages[-1][1] for example in pool.examples}
               for pool in (training, validation["neutral"], tests["neutral"])]
    assert [len(each) for each in prompts] == [8, 8, 12] and len(set.union(*prompts, set(lab.auxiliary_prompts))) == 36
    assert prompts[0] | prompts[1] <= {*all_prompts()} and not prompts[2] & {*all_prompts()}
    assert set(tests) == {"neutral", "reversed"} and set(validation) == {"neutral", "like training"}
    assert set(lab.tests("plain", 0)) == set(lab.validation("plain", 0)) == {"neutral"}
    leans = []
    lab.pool = lambda prompts, seed, lean: leans.append(lean)
    lab.training("confounded", 5), lab.validation("confounded", 5), lab.tests("confounded", 5), lab.training("plain", 5)
    assert leans == pytest.approx([0.9, 0.5, 0.9, 0.5, 0.1, 0.5])


def test_measures_by_hand(lab):
    """A policy that gives every good word one nat and every bad one minus a half, and to filler what it is told."""
    pool = lab.tests("confounded", 0)["neutral"]
    shift = {}

    def policy(batch):
        planted_N = planted_tokens(batch)
        sides_N = torch.arange(len(batch.seq_lens_S)).remainder(2).repeat_interleave(batch.seq_lens_S)
        gain_N = planted_N * torch.where(sides_N == 0, 1.0, -0.5)
        starts = torch.cat([torch.tensor([0]), batch.seq_lens_S.cumsum(0)[:-1]])
        gain_N[starts[0::2]] += shift["chosen"]  # the first word of an answer is never a slot word
        return Outputs(None, batch.ref_logps_N + gain_N, batch, {})
    lab.policy, shift["chosen"] = policy, 0.0
    words = torch.tensor([len(methods_lab.SLOT_WORDS.findall(example.pair.chosen)) for example in pool.examples])
    found = methods_lab.margins(lab, pool)
    torch.testing.assert_close(found["planted"].sort()[0], 1.5 * words.double().sort()[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["all"], found["planted"], atol=1e-4, rtol=0)
    assert methods_lab.measure(lab, pool)["accuracy"] == methods_lab.measure(lab, pool)["planted_accuracy"] == 1
    shift["chosen"] = -9.0
    figures = methods_lab.measure(lab, pool)
    assert figures["accuracy"] == 0 and figures["planted_accuracy"] == 1 and figures["drift"] > 0
    assert abs(figures["signal"]) > 1000  # the same shift in every pair is no noise
    mean = 1.5 * words.double().mean().item()
    assert methods_lab.validate(lab, pool)["margin"] == pytest.approx(mean - 9, abs=1e-4)
    assert methods_lab.validate(lab, pool)["loss"] == pytest.approx(math.log(2), abs=1e-2)  # no beta makes it less
    shift["chosen"] = -1.9  # margins of pairs with one word are negative, with two positive: some beta is best
    margin_P = 1.5 * words.double() - 1.9
    loss = min(torch.nn.functional.softplus(-beta / 100 * margin_P).mean().item() for beta in range(2000))
    assert methods_lab.validate(lab, pool)["loss"] == pytest.approx(loss, abs=1e-3) and loss < 0.69
    assert methods_lab.share_right(torch.tensor([1.0, -1.0, 1e-5, 3.0])) == 0.625


def test_what_is_written_by_hand(lab, monkeypatch):
    """Slot words, sentences, tokens and ends are counted over all answers together."""
    examples = lab.tests("confounded", 0)["neutral"].examples[:2]
    texts = ["Your question is wise. Set a small goal.", "Your question is dull. Nothing here is known"]
    ids = [lab.model.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    end = lab.model.tokenizer.eos_token_id
    monkeypatch.setattr(methods_lab, "continuations", lambda *args, **options: [[*ids[0], end, 5], ids[1]])
    assert methods_lab.describe_written(lab, examples, 0) == {
        "good": 0.5, "grammar": 0.75, "length": (len(ids[0]) + len(ids[1])) / 2, "ended": 0.5}


def test_what_is_sampled_is_seeded_and_no_greedy_text(lab):
    examples = lab.tests("plain", 0)["neutral"].examples[:4]
    first, again, other = (methods_lab.describe_written(lab, examples, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_figures_are_of_the_step_that_validation_chooses(lab, monkeypatch):
    """By hand: losses on validation pairs choose the step, ties the first; test pairs are read there."""
    reads = []
    found = [{"margin": 3.0, "loss": 0.3}, {"margin": 3.0, "loss": 0.4}]
    monkeypatch.setattr(methods_lab, "validate", lambda lab, pool: reads.append(0) or found[len(reads) > 2])
    monkeypatch.setattr(methods_lab, "measure", lambda lab, pool: {"accuracy": 0.5, "drift": float(
        sum((lab.policy.state_dict()[name] - start).abs().sum() for name, start in lab.start.items()))})
    cell = methods_lab.train_arm(lab, Arm(tests="chosen"))
    assert cell["validation"] == {"neutral": found, "like training": found}
    assert cell["test"]["neutral"][1] is None and cell["test"]["written"][1] is None
    reads.clear()
    both = methods_lab.train_arm(lab, Arm(tests="all"))["test"]["neutral"]
    assert 0 < cell["test"]["neutral"][0]["drift"] == both[0]["drift"] < both[1]["drift"]
    # What has not learned is no choice, however well it orders pairs; where nothing has, what has learned most.
    steps = [{"margin": 1.9, "loss": 0.1}, {"margin": 2.0, "loss": 0.3}, {"margin": 5.0, "loss": 0.3}]
    assert methods_lab.choose_step(steps) == 1
    assert methods_lab.choose_step([steps[0], {"margin": 1.95, "loss": 1.0}]) == 1


def test_the_search_goes_on_until_the_best_has_its_neighbours(monkeypatch, tmp_path):
    """The best lies four factors of beta and two of the rate away; every arm has as many tries."""
    def cell(arm, done, out):
        far = abs(math.log(arm.factor, 3) - 4) + abs(math.log2(arm.lr / methods.LR_START) + 2)
        assert (arm.seed, arm.tests) == (methods.SEARCH_SEED, "none")
        return made_up([0.01 * far], **dataclasses.asdict(arm))
    monkeypatch.setattr(methods, "run_cell", cell)
    cells = methods.search(Arm(seed=3, tests="all"), 30, {}, tmp_path)
    best = methods_report.best_tried(cells)["arm"]
    assert len(cells) == len({cell["key"] for cell in cells}) == 30
    assert best["factor"] == pytest.approx(81) and best["lr"] == pytest.approx(methods.LR_START / 4)
    assert methods_report.Trained(cells, []).inside and not methods_report.Trained(cells[:5], []).inside
    # A loss without beta searches for the rate alone.
    monkeypatch.setattr(methods, "reads_beta", lambda name: False)
    tried = methods.search(Arm(), 5, {}, tmp_path)
    assert {cell["arm"]["factor"] for cell in tried} == {1.0} and methods_report.Trained(tried, []).arm


def test_a_setting_with_corners_tried_alone_is_on_an_edge():
    """Its own four neighbours count, not what was tried beside others."""
    cross = [(1, 1), (3, 1), (1 / 3, 1), (1, 2), (1, 0.5)]
    corners = [(1, 1), (3, 2), (3, 0.5), (1 / 3, 2), (1 / 3, 0.5)]
    inside = [methods_report.Trained([made_up([0.1 * place], tests="none", factor=factor, lr=lr)
                                      for place, (factor, lr) in enumerate(tried)], []).inside
              for tried in (cross, corners, cross[:4])]
    assert inside == [True, False, False]


def test_which_losses_have_a_beta():
    assert methods.reads_beta("dpo") and methods.reads_beta("simpo") and not methods.reads_beta("sft")


def test_intervals_and_words_by_hand():
    """Student's t with two degrees of freedom; nothing is called better whose interval holds 0."""
    mean, half = methods_report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert methods_report.interval([0.5]) == (0.5, math.inf)
    assert methods_report.compared((0.1, 0.05), "more", "less") == "more (+0.10 ± 0.05)"
    assert methods_report.compared((-0.1, 0.05), "more", "less") == "less (-0.10 ± 0.05)"
    assert methods_report.compared((0.1, 0.1), "more", "less") == "not told apart (+0.10 ± 0.10)"
    assert methods_report.compared((0.1, math.inf), "more", "less") == "not told apart (+0.10)"


def test_differences_are_paired_by_seed_and_sentences_follow(monkeypatch):
    """Attention is 0.1 better on every seed, though the seeds differ by more; oracle's gain varies; as cells say it."""
    for module in (methods_report, methods_pages):
        monkeypatch.setattr(module, "STEPS", (4, 8))
    cells = []
    for source, gains in (("uniform", (0, 0, 0)), ("attention", (0.1, 0.1, 0.11)), ("oracle", (0.3, 0, -0.1)),
                          ("shuffled", (-0.2, -0.2, -0.21))):
        cells.append(made_up([0.6, 0.5], tests="none", source=source, seed=methods.SEARCH_SEED))
        for seed, gain in enumerate(gains):
            level = (0.4, 0.6, 0.5)[seed] + gain
            cells.append(made_up([0.6, 0.5], [level - 0.3, level], seed, source=source))
    random.Random(0).shuffle(cells)
    arms = {arm.arm["source"]: arm for arm in methods_report.arms_in("headline", cells)}
    mean, half = arms["attention"].gain(arms["uniform"], "reversed", "accuracy")
    assert mean == pytest.approx(0.31 / 3) and half == pytest.approx(4.303 * math.sqrt(1e-4 / 3) / math.sqrt(3))
    mean, _ = arms["attention"].gain(arms["uniform"], "reversed", "accuracy", "like training")
    assert mean == pytest.approx(0.31 / 3) and arms["uniform"].mean("neutral", "accuracy", "like training")[0] < 0.3
    first, second, _ = methods_report.sentences("headline", cells)
    assert "accuracy of 0.50, the judge's attention 0.60, the planted words alone 0.57" in first
    assert "(3 seeds)" in first
    assert "attention more accurate (+0.10 ± 0.01)" in second and "planted words alone not told apart (+0.07" in second
    assert "shuffled attention less accurate (-0.20 ± 0.01)" in second
    assert arms["uniform"].steps() == 8 and arms["uniform"].steps("like training") == 4
    page = methods_pages.render(cells)
    assert "+0.103 ± 0.014" in page and "What the policy writes" in page
    assert methods_report.sentences("control", cells) == [] == methods_report.arms_in("control", cells)


def trained_cells(level: float, **fields) -> list[dict]:
    """A search and three seeds of an arm whose accuracies are 0.4, 0.6 and 0.5, and this level more in the mean."""
    cells = [made_up([0.5], tests="none", **fields)]
    return cells + [made_up([0.5], [(0.4, 0.6, 0.5)[seed] + level * (1, 1.05, 0.95)[seed]], seed, **fields)
                    for seed in range(3)]


def test_judges_are_told_apart_by_lift_and_by_the_sink_fix(monkeypatch):
    """Better from a lift of 6 on: the one of 4 is better too, but of 5 there is one that is not."""
    monkeypatch.setattr(methods_report, "STEPS", (4,))
    cells = trained_cells(0.0)
    for judge, lift, level, without in (("a", 1.5, -0.1, -0.1), ("b", 4, 0.1, 0.05), ("c", 5, 0.0, 0.1),
                                        ("d", 6, 0.1, 0.0), ("e", 18, 0.2, 0.1)):
        cells += trained_cells(level, judge=judge, source="attention", lift=lift)
        cells += trained_cells(without, judge=judge, source="attention", lift=lift, sink_k=0)
    first, second = methods_report.sentences("judges", cells)
    assert first == ("Of 5 judges, with lifts from 1.5 to 18.0, the attention of all 2 with a lift of at least 6.0 is "
                     "more accurate than uniform weights on reversed pairs; of the 3 below it, 1 more accurate, "
                     "1 less, 1 not told apart.")
    assert second == "Without the sink fix against with it, of 5 judges: 1 more accurate, 3 less, 1 not told apart."
    assert "| a | 0.50 | 1.5 | -0.100 ± 0.012 | -0.100 ± 0.012 |" in methods_report.judge_table(cells)
    assert methods_report.sentences("judges", trained_cells(0.0)) == []


@pytest.mark.parametrize("part, fields", [("sources", [{"source": name} for name in ("tis", "ld", "decay")]),
                                          ("losses", [{"loss": name} for name in ("simpo", "ipo", "dpo")])])
def test_sources_and_losses_are_listed_by_their_gains(part, fields, monkeypatch):
    monkeypatch.setattr(methods_report, "STEPS", (4,))
    cells = trained_cells(0.0)
    for level, each in zip((0.1, -0.2, 0.3), fields):
        cells += [cell | {"arm": cell["arm"] | {"tests": cell["arm"]["tests"].replace("all", "chosen")}}
                  for cell in trained_cells(level, **each)]
    (said,) = methods_report.sentences(part, cells)
    better, worse, best = (next(iter(each.values())) for each in fields)
    assert f"more accurate: `{best}` (+0.30 ± 0.04), `{better}` (+0.10 ± 0.01); less accurate: `{worse}` (-0.20" in said
    assert said.endswith("; not told apart: none.")


def test_what_is_chosen():
    sources, losses = (methods.arms_of(part, [], []) for part in ("sources", "losses"))
    named = {arm.source for arm in sources} | set(methods.HEADLINE)
    assert named == {*WEIGHTS} - {"verbalized"} and {arm.loss for arm in losses} == set(LOSSES)
    assert all(arms[0] == Arm(tests="all") for arms in (sources, losses, methods.arms_of("judges", [], [])))
    assert [arm.source for arm in methods.arms_of("sources", [], ["decay", "ld"])] == ["uniform", "decay", "ld"]
    assert {arm.world for arm in methods.arms_of("control", [], [])} == {"plain"}


@pytest.mark.parametrize("flags, message", [
    (["--losses", "none"], "--losses has 'none'"), (["--sources", "verbalized"], "--sources has 'verbalized'"),
    (["--parts", "all,most"], "--parts has 'most'"), (["--seeds", "0"], "must be at least 1"),
    (["--tries", "x"], "is no whole number"), (["--out", "/proc/here"], "can't be made or written to"),
])
def test_bad_flags_are_one_message(flags, message, capsys):
    with pytest.raises(SystemExit):
        methods.main(flags)
    assert message in capsys.readouterr().err


def test_controls_by_hand(toy_model):
    """oracle: all free mass on the planted word; shuffled: the same weights elsewhere; 1/n on the end of the turn."""
    row = {"prompt": "Hello.", "chosen": "Your question is wise. Set a small goal.",
           "rejected": "Your question is dull."}
    examples, _, _ = tokenize_pairs(Chat(AutoTokenizer.from_pretrained(toy_model)), [parse_row("x", row)], 100, 50)
    batch = collate(MicroBatch((0,)), examples, [0])
    (example,), rng = examples, np.random.default_rng(0)
    stored = {example.pair.key: [JudgedAnswer(side.ids[:-1], side.spans_N2[:-1],
                                              rng.random((1, 2, len(side.ids) - 1)).astype(np.float32))
                                 for side in (example.chosen, example.rejected)]}
    context = WeightContext(TrainConfig(sink_k=0), stored)
    oracle_N = bind_objective(LOSSES["twdpo"], methods_lab.oracle, "oracle").weigh(batch, context).weights_N
    expected = torch.zeros(17)
    expected[[3, 10, 14, 16]] = torch.tensor([10 / 11, 1 / 11, 5 / 6, 1 / 6])
    torch.testing.assert_close(oracle_N, expected)
    assert planted_lift(methods_lab.oracle(batch, context), batch)[0].tolist() == pytest.approx([10, 5])
    plain_N, shuffled_N = (source(batch, context) for source in (WEIGHTS["attention"], methods_lab.shuffled))
    assert not torch.allclose(plain_N, shuffled_N) and torch.equal(shuffled_N, methods_lab.shuffled(batch, context))
    for start, stop in ((0, 10), (11, 16)):
        torch.testing.assert_close(plain_N[start:stop].sort()[0], shuffled_N[start:stop].sort()[0])
    torch.testing.assert_close(shuffled_N[[10, 16]], torch.tensor([1 / 11, 1 / 6]))
    reset = WeightContext(TrainConfig(sink_k=1), stored)
    torch.testing.assert_close(methods_lab.shuffled(batch, reset)[[0, 10, 11, 16]],
                               torch.tensor([1 / 11, 1 / 11, 1 / 6, 1 / 6]))


def test_attention_times_surprise_by_hand(toy_model):
    """Weights in proportion to attention times -log p_ref; the end of the turn keeps 1/n."""
    row = {"prompt": "Hello.", "chosen": "Your question is wise.", "rejected": "Your question is dull."}
    examples, _, _ = tokenize_pairs(Chat(AutoTokenizer.from_pretrained(toy_model)), [parse_row("x", row)], 100, 50)
    (example,) = examples
    logps = {example.pair.key: (np.array([-1, -2, 0, -4, -1, -9], dtype=np.float32), np.full(6, -1, dtype=np.float32))}
    batch = collate(MicroBatch((0,)), examples, [0], logps)
    mass = np.array([1, 1, 5, 2, 0], dtype=np.float32)
    stored = {example.pair.key: [JudgedAnswer(side.ids[:-1], side.spans_N2[:-1], np.stack([mass, mass])[None])
                                 for side in (example.chosen, example.rejected)]}
    raw_N = WEIGHTS["attention_surprise"](batch, WeightContext(TrainConfig(sink_k=0), stored))
    product = np.array([1, 2, 0, 8, 0])
    np.testing.assert_allclose(raw_N[:5], product / product.sum() * 5 / 6, rtol=1e-5)
    np.testing.assert_allclose(raw_N[6:11], mass / mass.sum() * 5 / 6, rtol=1e-5)
    assert raw_N[5].item() == raw_N[11].item() == pytest.approx(1 / 6)
    reset_N = WEIGHTS["attention_surprise"](batch, WeightContext(TrainConfig(sink_k=1), stored))
    np.testing.assert_allclose(reset_N[:6], [1 / 6, 2 / 10 * 4 / 6, 0, 8 / 10 * 4 / 6, 0, 1 / 6], rtol=1e-5)
    objective = bind_objective(LOSSES["simpo"], WEIGHTS["attention_surprise"], "attention_surprise")
    free = objective.weigh(batch, WeightContext(TrainConfig(sink_k=0), stored))
    assert (free.ref_logps_N == 0).all()  # the loss itself has no reference
