"""Every loss and weight source in whole runs; sources by hand; auxiliary models."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_of_tests import assert_close_rows, read_rows
from transformers import AutoModelForCausalLM

import train
from twdpo import needs
from twdpo.config import TrainConfig
from twdpo.losses import LOSSES
from twdpo.weights import WEIGHTS, WeightContext, normalize

ROOT = Path(__file__).resolve().parent.parent


class Batch:
    """What sources read: two pairs, of three and two tokens, of one and four."""

    def __init__(self, aux=()):
        self.seq_lens_S = torch.tensor([3, 2, 1, 4])
        self.targets_N = torch.zeros(10, dtype=torch.long)
        self.examples = [type("Example", (), {"pair": type("Pair", (), {"key": key})}) for key in (7, 8)]


def weights(name: str, options: dict | None = None, **logps) -> list[float]:
    context = WeightContext(TrainConfig(), logps=logps)
    return WEIGHTS[name](Batch(), context, **(options or {})).tolist()


def logps(*sides) -> dict[int, tuple]:
    sides = [np.array(side, dtype=np.float32) for side in sides]
    return {7: tuple(sides[:2]), 8: tuple(sides[2:])}


ZEROS = logps([0, 0, 0], [0, 0], [0], [0, 0, 0, 0])
SCORES = logps([1, -1, 0.5], [1, 2], [0.1], [-3, 0.2, -0.1, 4])


def test_decay_and_shared_length_by_hand():
    g = 0.9
    assert weights("decay", {"gamma": g}) == pytest.approx([1, g, g * g, 1, g, 1, 1, g, g * g, g ** 3])
    assert weights("decay", {"gamma": g, "start": 1})[:3] == pytest.approx([g, g * g, g ** 3])
    assert weights("ld", {"alpha": 0.25}) == [1, 1, 0.25, 1, 1, 1, 1, 0.25, 0.25, 0.25]


def test_tis_by_hand():
    """Clamped to [-0.5, 1.5]; exp of it on chosen answers, of its negative on rejected ones."""
    e = math.exp
    expected = [e(1), e(-0.5), e(0.5), e(-1), e(-1.5), e(0.1), e(0.5), e(-0.2), e(0.1), e(-1.5)]
    assert weights("tis", positive=SCORES, negative=ZEROS) == pytest.approx(expected)
    assert weights("tis", {"k": 2.0, "mu": 0.5}, positive=SCORES, negative=ZEROS)[0] == pytest.approx(2 * e(0.5))
    ranks = weights("tis", {"transform": "rank"}, positive=SCORES, negative=ZEROS)
    assert ranks == pytest.approx([1.3, 0.7, 1.0, 1.3, 0.7, 1.0, 1.3, 0.9, 1.1, 0.7])
    scaled = weights("tis", {"transform": "scale"}, positive=SCORES, negative=ZEROS)
    assert scaled == pytest.approx([1.2, 0.8, 1.1, 0.8, 0.7, 1.02, 1.3, 0.96, 1.02, 0.7])
    soft = weights("tis", {"transform": "sigmoid"}, positive=SCORES, negative=ZEROS)
    assert soft[:4] == pytest.approx([2 / (1 + e(-1)), 2 / (1 + e(1)), 2 / (1 + e(-0.5)), 2 / (1 + e(1))])
    half = weights("tis", {"transform": "binary", "top": 0.5}, positive=SCORES, negative=ZEROS)
    assert half == [1, 0, 0, 1, 0, 1, 1, 0, 1, 0]
    assert set(weights("tis", {"transform": "binary"}, positive=SCORES, negative=ZEROS)) == {1}


def test_sepo_by_hand():
    """The highest of a chosen answer, the lowest of a rejected one; never none."""
    selected = weights("sepo", {"k": 0.5}, positive=SCORES, negative=ZEROS)
    assert selected == [1, 0, 0, 1, 0, 1, 1, 0, 1, 0]
    later = weights("sepo", {"k": 0.5, "first": False}, positive=SCORES, negative=ZEROS)
    assert later == [0, 0, 1, 0, 1, 1, 0, 0, 1, 0]
    weights_N, scale_S = normalize(torch.tensor(selected), Batch().seq_lens_S, "selected_mean")
    assert weights_N.tolist() == [1, 0, 0, 1, 0, 1, 0.5, 0, 0.5, 0] and scale_S.tolist() == [1, 1, 1, 1]


def test_cdpo_by_hand():
    log_share = logps([-9, -9, -9], [math.log(0.25), 0.0], [-9], [math.log(0.9), -99, math.log(0.5), math.log(0.1)])
    assert weights("cdpo", contrast=log_share) == pytest.approx([1, 1, 1, 0.75, 0, 1, 0.1, 1, 0.5, 0.9], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_with_uniform_and_decay(loss, tmp_path, run_arguments):
    """The loss of all pairs falls with both sources."""
    for source in ("uniform", "decay"):
        train.main(run_arguments(tmp_path / source, loss=loss, weights=source, max_steps=2, eval_fraction=0,
                                 batch_size=19, lr=1e-4))
        losses = [row["loss"] for row in read_rows(tmp_path / source)]
        # One has a bump at 0, one no gradient there.
        assert len(losses) == 2 and (losses[1] < losses[0] or loss in ("discopop", "triplet"))


def test_weights_that_are_no_attention_are_normalised_whatever_renormalize_says(tmp_path, run_arguments):
    """Uniform weights are DPO, and not n times it, under the authors' preset too."""
    rows = []
    for name, extra in (("plain", []), ("authors", ["--no-renormalize", "--multiplier", "judged"])):
        train.main([*run_arguments(tmp_path / name, loss="twdpo", weights="decay", max_steps=2), *extra])
        rows.append(read_rows(tmp_path / name))
    assert rows[0] == rows[1]


def test_positive_and_negative_models_are_not_swapped(tmp_path, run_arguments, toy_model, monkeypatch):
    """The positive model is the first one: its own log-probs come under its name."""
    other = AutoModelForCausalLM.from_pretrained(toy_model)
    for parameter in other.parameters():
        parameter.data *= 0.5
    shutil.copytree(toy_model, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    seen, original = [], needs.auxiliary_logps

    def record(config, names, models, examples, *rest):
        seen.append((examples[0], original(config, names, models, examples, *rest)))
        return seen[-1][1]
    monkeypatch.setattr(needs, "auxiliary_logps", record)
    train.main(run_arguments(tmp_path / "run", aux_model=f"{tmp_path / 'other'},{toy_model}", loss="dpo",
                             weights="tis", max_steps=1))
    (example, aux), = seen
    plain = AutoModelForCausalLM.from_pretrained(toy_model)
    ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.chosen.ids])).long()
    first = len(example.prompt_ids)
    for name, model in (("positive", other), ("negative", plain)):
        with torch.no_grad():
            logps_TV = model(ids[None]).logits[0].log_softmax(-1)
        expected = logps_TV[first - 1:-1].gather(1, ids[first:, None])[:, 0]
        np.testing.assert_allclose(aux[name][example.pair.key][0], expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("loss, options", [("simpo", ""), ("kto_pair", ""), ("cpo", "nll_over=batch"), ("orpo", "")])
def test_how_the_batch_is_split_changes_no_loss(loss, options, tmp_path, run_arguments):
    """Plain rows in one micro-batch, packed rows in many; lengths, means and counts over the batch among them."""
    flags = {"loss": loss, "loss_options": options, "weights": "decay", "max_steps": 3, "eval_every": 0}
    train.main(run_arguments(tmp_path / "whole", packing="off", micro_batch_tokens=100_000, **flags))
    train.main(run_arguments(tmp_path / "split", packing="on", micro_batch_tokens=150, **flags))
    assert_close_rows(read_rows(tmp_path / "split"), read_rows(tmp_path / "whole"))


def test_a_loss_brings_its_own_beta_and_flags_override_it(tmp_path, run_arguments):
    def beta(name: str, *flags) -> float:
        argv = run_arguments(tmp_path / name, max_steps=1, eval_fraction=0)
        place = argv.index("--beta")
        train.main([*argv[:place], *argv[place + 2:], *flags])
        return json.loads((tmp_path / name / "config.json").read_text())["beta"]
    assert beta("a", "--loss", "dpo") == 5e-3 and beta("b", "--loss", "simpo") == 2.0
    assert beta("c", "--loss", "simpo", "--beta", "0.7") == 0.7
    assert beta("d", "--loss", "simpo", "--preset", "tuned", "--batch-size", "3") == 2.5
    config = json.loads((tmp_path / "d/config.json").read_text())
    assert beta("e", "--loss", "simpo", "--preset", "tuned", "--loss-options", "nll=0.1") == 2.5
    merged = json.loads((tmp_path / "e/config.json").read_text())["loss_options"]
    assert merged == "gamma_ratio=0.55,nll=0.1" and config["loss_options"] == "gamma_ratio=0.55"
    assert config["batch_size"] == 3 and config["lr"] == 1e-3
    assert [(each["beta"], each["lr"]) for each in LOSSES["dpo"].settings.values()] == [
        (0.01, 7e-7), (0.01, 5e-7), (0.01, 3e-7)]  # tuned, tuned-base, tuned-v0.2
    assert LOSSES["simpo"].settings["tuned-base"]["beta"] == 2.0


@pytest.mark.slow
def test_one_model_against_itself_is_no_contrast(tmp_path, run_arguments, toy_model, capsys):
    """Equal models: importance 1 everywhere, which is DPO; the second model defaults to the policy's start."""
    flags = {"loss": "dpo", "max_steps": 2}
    train.main(run_arguments(tmp_path / "dpo", weights="uniform", **flags))
    train.main(run_arguments(tmp_path / "tis", weights="tis", aux_model=toy_model, **flags))
    assert read_rows(tmp_path / "tis") == read_rows(tmp_path / "dpo")
    train.main(run_arguments(tmp_path / "sepo", loss="simpo", weights="sepo", aux_model=toy_model))


@pytest.mark.slow
def test_the_contrast_is_the_softmax_of_both_models_logits(tmp_path, run_arguments, toy_model, monkeypatch):
    """Against full logits of both models, on the tokens of a run, and again from the cache."""
    other = AutoModelForCausalLM.from_pretrained(toy_model)
    torch.manual_seed(5)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    shutil.copytree(toy_model, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    seen, original = [], needs.auxiliary_logps

    def record(config, names, models, examples, *rest):
        seen.append((examples, original(config, names, models, examples, *rest)))
        return seen[-1][1]
    monkeypatch.setattr(needs, "auxiliary_logps", record)
    flags = {"loss": "dpo", "weights": "cdpo", "max_steps": 1, "cache_dir": tmp_path / "cache"}
    for name in ("first", "again"):
        train.main(run_arguments(tmp_path / name, aux_model=f"{tmp_path / 'other'},{toy_model}", **flags))
    assert read_rows(tmp_path / "first") == read_rows(tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(toy_model)
    for load in ("load_policy", "settle_packing"):  # what is cached whole needs no model
        monkeypatch.setattr(f"twdpo.logps.{load}", None)
    train.main(run_arguments(tmp_path / "third", aux_model=f"{tmp_path / 'other'},{toy_model}", **flags))
    (examples, aux), (_, again), _ = seen
    for example in examples[:4]:
        for response, ours, cached in zip((example.chosen, example.rejected), aux["contrast"][example.pair.key],
                                          again["contrast"][example.pair.key]):
            ids = torch.from_numpy(np.concatenate([example.prompt_ids, response.ids])).long()
            with torch.no_grad():
                logits = 2 * other(ids[None]).logits[0] - plain(ids[None]).logits[0]
            first = len(example.prompt_ids)
            expected = logits.log_softmax(-1)[first - 1:-1].gather(1, ids[first:, None])[:, 0]
            np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)
            assert (ours == cached).all()


def test_the_contrast_of_models_with_padded_vocabularies(tmp_path, run_arguments, toy_model):
    """Rows that only one of them has are no tokens of the pairs."""
    other = AutoModelForCausalLM.from_pretrained(toy_model)
    other.resize_token_embeddings(other.config.vocab_size + 64, mean_resizing=False)
    shutil.copytree(toy_model, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    train.main(run_arguments(tmp_path / "run", aux_model=tmp_path / "other", loss="dpo", weights="cdpo", max_steps=1))


def test_averages_are_not_divided_by_the_length_again(tmp_path, run_arguments, toy_model):
    """Means by their weights (selected tokens, --length-normalize) are SimPO's averages as they are: with uniform
    weights its own."""
    flags = {"loss": "simpo", "max_steps": 2}
    for name, extra in (("plain", []), ("normed", ["--length-normalize"])):
        train.main([*run_arguments(tmp_path / name, weights="uniform", **flags), *extra])
    plain, normed = read_rows(tmp_path / "plain"), read_rows(tmp_path / "normed")
    assert [row["loss"] for row in plain[1:3]] == pytest.approx([row["loss"] for row in normed[1:3]], rel=1e-5)
    selected = ["--weights-options", "k=1"]  # all of them
    train.main([*run_arguments(tmp_path / "all", weights="sepo", aux_model=toy_model, **flags), *selected])
    assert [row["loss"] for row in plain[1:3]] == pytest.approx(
        [row["loss"] for row in read_rows(tmp_path / "all")[1:3]], rel=1e-5)


@pytest.mark.parametrize("flags, message", [
    (["--weights", "tis"], "--aux-model is ''"),
    (["--weights", "tis", "--aux-model", "nowhere/at/all"], "--aux-model is 'nowhere/at/all'"),
    (["--weights", "uniform", "--aux-model", "x"], "the weight source reads no such model"),
    (["--loss-options", "x=1"], "the options of twdpo are label_smoothing=0.0"),
    (["--weights", "decay", "--weights-options", "gamma=x"], "gamma must be a float"),
    (["--weights", "decay", "--weights-options", "gamma=-0.9"], "decay gives"),
    (["--loss", "hinge", "--loss-options", "label_smoothing=0.1"], "the options of hinge are none"),
    (["--loss", "robust", "--loss-options", "label_smoothing=0.5"],
     "--loss-options label_smoothing=0.5: label_smoothing is 0.5: it must be in [0, 0.5)"),
    (["--weights", "sepo", "--weights-options", "k=2", "--aux-model", "TOY"], "must be in (0, 1]"),
    (["--loss-options", "length_by=mass"], "the options of twdpo are label_smoothing=0.0"),
    (["--loss", "cpo", "--loss-options", "length_by=words"], "length_by must be one of tokens, mass"),
    (["--loss", "cpo", "--loss-options", "length_by=mass"], "length_by=mass is not read: nll_over=token alone divides"),
    (["--loss", "ipo", "--loss-options", "length_by=mass,normalize=sum"], "length_by=mass is not read: normalize=sum"),
    (["--loss", "simpo", "--loss-options", "label_smoothing=0.1,form=hinge"], "label_smoothing is not read: "),
    (["--loss", "dpo", "--loss-options", "alpha=1"], "alpha=1 is not read: it is of f=alpha"),
    (["--loss", "dpo", "--loss-options", "f=alpha,alpha=0"], "alpha is 0.0: it must be > 0"),
    (["--loss", "dpo", "--loss-options", "f=js,over=positions"], "f=js is not read: it is of sums"),
    (["--loss", "ipo", "--preset", "tuned"], "no such settings of ipo are known here, but of dpo, simpo"),
    (["--loss", "exo_pair", "--loss-options", "epsilon=0"], "--loss-options epsilon=0: "),
    (["--loss", "discopop", "--loss-options", "tau=0"], "the loss is no finite number with these"),
    (["--loss", "simpo", "--loss-options", "gamma_ratio=nan"], "gamma_ratio must be finite"),
])
def test_bad_plugin_input_is_one_message(flags, message, tmp_path, run_arguments, toy_model, capsys):
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run"), *(str(toy_model) if flag == "TOY" else flag for flag in flags)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ("def f(:", "mine.py:2: SyntaxError"), ("x = 1\nx.y", "mine.py:3: AttributeError"),
    ("def f(r, l, b, c):\n    return r\nf.settings = {'': {'betta': 1}}\nLOSSES['f'] = f", "'betta', which is no"),
    ("def f(r, l, b, c):\n    return r\nf.norm = 'sum'\nLOSSES['f'] = f", "f.norm is 'sum'"),
    ("def f(r, l, b, c):\n    return r[::2]\nLOSSES['f'] = f", "f returns something else than (one loss a pair"),
    ("def f(r, l, b, c):\n    return r\nf.settings = {'beta': 1}\nLOSSES['f'] = f", "they must be {preset: {field"),
    ("def f(r, l, b, c):\n    return r\nf.settings = {'': {'beta': 'x'}}\nLOSSES['f'] = f", "beta 'x': it must be a"),
    ("from functools import partial\nfrom twdpo.losses import dpo\nLOSSES['f'] = partial(dpo)\n"
     "LOSSES['f'].norm = 'sum'", "dpo.norm is 'sum'"),
    ("def f(r, l, b, c):\n    return r\nf.needs = ('kl',)\nLOSSES['f'] = f", "f.needs is ('kl',)"),
    ("def f(r, l, b, c, *, must: float):\n    return r\nLOSSES['f'] = f", "f needs --loss-options must=VALUE"),
])
def test_a_bad_import_is_one_message(text, message, tmp_path, run_arguments, capsys):
    (tmp_path / "mine.py").write_text("from twdpo.losses import LOSSES\n" + text)
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run"), "--import", str(tmp_path / "mine.py"), "--loss", "f"])
    assert message in capsys.readouterr().err


def test_imports_may_hold_dataclasses_partials_and_any_options(tmp_path, run_arguments):
    (tmp_path / "mine.py").write_text("""
from __future__ import annotations
from dataclasses import dataclass
from functools import partial
from twdpo.losses import LOSSES, simpo

@dataclass
class Limit:
    value: float = 1.0

def capped(ratio_S, logps_N, batch, config, *, cap: float | None = None, flag: bool = False):
    assert cap == 2.0 and flag is True
    return (ratio_S[1::2] - ratio_S[0::2]).clamp(max=cap), {}

LOSSES["capped"] = capped
LOSSES["wide"] = partial(simpo, gamma_ratio=0.55)
""")
    argv = ["--import", str(tmp_path / "mine.py"), "--weights", "uniform", "--loss"]
    train.main([*run_arguments(tmp_path / "a", max_steps=1), *argv, "capped", "--loss-options", "cap=2,flag=Yes"])
    argv = [*argv, "wide", "--loss-options", "nll=0.1"]
    place = (arguments := run_arguments(tmp_path / "b", max_steps=1)).index("--beta")
    train.main([*arguments[:place], *arguments[place + 2:], *argv])
    assert json.loads((tmp_path / "b/config.json").read_text())["beta"] == 2.0  # simpo's
    assert "kl" not in read_rows(tmp_path / "b")[1]  # it needs no reference either


def test_an_imported_source_must_give_a_tensor(tmp_path, run_arguments, capsys):
    (tmp_path / "mine.py").write_text("from twdpo.weights import WEIGHTS\nWEIGHTS['l'] = lambda batch, context: [1.0]")
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run"), "--import", f" {tmp_path / 'mine.py'} ,", "--weights", "l"])
    assert "gives a list: it must be a tensor" in capsys.readouterr().err


def test_a_loss_that_reads_more_of_a_batch_is_run_and_says_that_it_was_not_tried(tmp_path, run_arguments, capsys):
    (tmp_path / "mine.py").write_text("""
from twdpo.losses import LOSSES, dpo

def long(ratio_S, logps_N, batch, config):
    assert all(len(example.prompt_ids) for example in batch.examples)
    return dpo(ratio_S, logps_N, batch, config)

LOSSES["long"] = long
""")
    train.main([*run_arguments(tmp_path / "run", max_steps=1), "--import", str(tmp_path / "mine.py"), "--loss", "long",
                "--weights", "uniform"])
    assert "long can't be tried on two made-up pairs (AttributeError" in capsys.readouterr().out
    assert read_rows(tmp_path / "run")[1]["step"] == 1


def test_help_losses_lists_every_loss_and_source(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help-losses"])
    printed = capsys.readouterr().out
    for name in (*LOSSES, *WEIGHTS):
        assert re.search(rf"^  {name} +\S", printed, re.MULTILINE), name


def test_nothing_but_its_own_file_names_a_loss_or_a_source():
    """Apart from the paper's own, which are the defaults."""
    names = (set(LOSSES) | set(WEIGHTS)) - {"twdpo", "dpo", "attention", "verbalized", "uniform"}
    names -= {"selective", "triplet"}  # a kind of recomputation, and a metric, too
    for path in [*(ROOT / "twdpo").glob("*.py"), *ROOT.glob("*.py")]:
        if path.stem not in ("losses", "vocabulary_losses", "weights"):
            found = names & set(re.findall(r"[\"'](\w+)[\"']", path.read_text(encoding="utf-8")))
            assert not found, (path, found)
