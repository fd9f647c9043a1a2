"""Sources that read the policy in the step (otpo, selective), and tgdpo: by hand, and in whole runs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_host_waits
import torch
from runs_of_tests import assert_close_rows, read_rows
from test_methods import SCORES, ZEROS, weights

import train
from twdpo import objective as objective_module
from twdpo.batch import collate
from twdpo.chat import Chat
from twdpo.config import TrainConfig
from twdpo.dataset import load_dataset
from twdpo.losses import LOSSES
from twdpo.models.policy import load_policy
from twdpo.models.source import load_tokenizer
from twdpo.objective import bind_objective, forward
from twdpo.plugins import bind_options
from twdpo.rows import MicroBatch
from twdpo.tokens import tokenize_pairs
from twdpo.transport import transport_shares
from twdpo.weights import WEIGHTS, WeightContext

# --- by hand


def test_tgdpo_by_hand():
    """1 + alpha beta d on chosen answers, 1 - alpha beta d on rejected ones; at least 0."""
    context = WeightContext(TrainConfig(beta=0.5), logps={"positive": SCORES, "negative": ZEROS})
    batch = SimpleNamespace(examples=[SimpleNamespace(pair=SimpleNamespace(key=key)) for key in (7, 8)])
    found = WEIGHTS["tgdpo"](batch, context, alpha=0.8)
    assert found.tolist() == pytest.approx([1.4, 0.6, 1.2, 0.6, 0.2, 1.04, 2.2, 0.92, 1.04, 0])
    assert weights("tgdpo", {"alpha": 0.0}, positive=SCORES, negative=ZEROS) == [1] * 10


def selected(ratio: list[float], lens: list[int], **options) -> list[float]:
    batch = SimpleNamespace(logps_N=torch.tensor(ratio) - 3, ref_logps_N=torch.full((len(ratio),), -3.0),
                            seq_lens_S=torch.tensor(lens))
    return WEIGHTS["selective"](batch, None, **options).tolist()


def test_selective_by_hand():
    """At or above the 0.6 quantile of their scores: two of six and one of one (lowest of a chosen answer, highest of a
    rejected one), three of six; `ratio`: the highest of both."""
    chosen, rejected = [0.5, -1.0, 0.2, 0.9, -0.3, 0.1], [0.3, -2.0, 0.8, 0.7, 0.0]
    lens = [6, 5]
    assert selected(chosen + rejected, lens) == [0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert selected(chosen + rejected, lens, direction="ratio") == [1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0]
    assert selected(chosen + rejected, lens, k=0.01) == [0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert selected(chosen + rejected, lens, k=1.0) == [1] * 11
    assert selected([0.3, -0.2], [1, 1]) == [1, 1]


def test_selective_takes_what_the_quantile_takes():
    for length in range(1, 30):
        for k in (0.2, 0.4, 0.5, 0.75):
            ratio = torch.randn(2 * length, dtype=torch.float64).tolist()
            score = torch.tensor(ratio, dtype=torch.float64)[length:]
            expected = (score >= score.quantile(1 - k) - 1e-9).sum()
            assert sum(selected(ratio, [length, length], k=k)[length:]) == expected


def test_tied_tokens_are_selected_together():
    """As in the first step, where every log-ratio is 0, but for how rows are packed."""
    assert selected([0.0] * 7, [4, 3], k=0.3) == [1] * 7
    assert selected([1e-6, 0.0, -1e-6, 0.0, 3e-6], [3, 2], k=0.3) == [1] * 5
    assert selected([0.0, 0.0, 0.1, 0.1, 0.2, 0.3], [4, 2], k=0.3) == [1, 1, 0, 0, 0, 1]


def test_out_of_reach_is_said_before_anything_is_loaded():
    for name, options, message in (("otpo", "reg=0.001", "reg must be at least"), ("otpo", "reg_m=500", "iterations"),
                                   ("selective", "k=0", "must be in")):
        source = bind_options(WEIGHTS[name], options, "--weights-options")
        with pytest.raises(ValueError, match=message):
            if name == "otpo":
                bind_objective(LOSSES["dpo"], source, name)
            else:
                source(None, None)


# --- in the policy's forward


@pytest.fixture
def batch(toy_model):
    examples, _, _ = tokenize_pairs(Chat(load_tokenizer(toy_model, "")), load_dataset("toy", "").train[:3], 200, 100)
    return collate(MicroBatch((0, 1, 2)), examples, [0, 1, 2])


def outputs_of(batch, policy, source: str, options: str = "", loss: str = "dpo"):
    config = TrainConfig()
    objective = bind_objective(LOSSES[loss], bind_options(WEIGHTS[source], options, "--weights-options"), source)
    assert objective.is_online
    return forward(policy, batch, objective, WeightContext(config), config)


def test_otpo_gives_both_answers_the_shorter_ones_mass(toy_model, process, batch):
    policy = load_policy(toy_model, torch.float32, process).eval()
    outputs = outputs_of(batch, policy, "otpo", "reg=0.1")
    used, lens = outputs.batch, batch.seq_lens_S.tolist()
    sums = torch.stack([weights.sum() for weights in used.weights_N.split(lens)]) * used.scale_S
    shorter_S = batch.seq_lens_S.view(-1, 2).amin(dim=1).repeat_interleave(2).float()
    torch.testing.assert_close(sums, shorter_S)
    hidden_ND = policy(batch, with_hidden=True).hidden_ND
    expected = transport_shares(hidden_ND, lens, reg=0.1, reg_m=0.2)
    torch.testing.assert_close(used.weights_N, expected)
    ratio_S = torch.stack([part.sum() for part in (used.weights_N * (outputs.logps_N - batch.ref_logps_N)).split(lens)])
    torch.testing.assert_close(outputs.ratio_S, ratio_S * used.scale_S)
    assert not used.weights_N.requires_grad and outputs.ratio_S.requires_grad and used.hidden_ND is None


def test_an_answer_cut_to_one_token_gives_its_pair_one_tokens_mass(toy_model, process):
    examples, _, _ = tokenize_pairs(Chat(load_tokenizer(toy_model, "")), load_dataset("toy", "").train[:1], 200, 100)
    (example,) = examples
    side = example.rejected
    cut = replace(side, ids=side.ids[:1], spans_N2=side.spans_N2[:1], content_N=side.content_N[:1])
    batch = collate(MicroBatch((0,)), [replace(example, rejected=cut)], [0])
    outputs = outputs_of(batch, load_policy(toy_model, torch.float32, process).eval(), "otpo")
    assert outputs.batch.scale_S.tolist() == [1, 1] and outputs.batch.weights_N[-1] == 1


def test_selective_reads_the_reference_even_where_the_loss_has_none(toy_model, process, batch):
    """At the start every token is selected: the log-probs are those of uniform weights. Later fewer."""
    policy = load_policy(toy_model, torch.float32, process).eval()
    plain = policy(batch)
    batch = replace(batch, ref_logps_N=plain.logps_N.detach())
    assert (outputs_of(batch, policy, "selective").batch.weights_N == 1).all()
    moved = replace(batch, ref_logps_N=plain.logps_N.detach() + torch.randn(len(batch.targets_N)))
    outputs = outputs_of(moved, policy, "selective", loss="simpo")
    assert 0.3 < outputs.batch.weights_N.mean() < 0.5 and (outputs.batch.ref_logps_N == 0).all()
    sums_S = torch.stack([part.sum() for part in (outputs.batch.weights_N * plain.logps_N).split(
        batch.seq_lens_S.tolist())])
    torch.testing.assert_close(outputs.ratio_S, sums_S)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("source", ["otpo", "selective"])
def test_no_source_waits_but_where_weights_are_checked(source, packs, monkeypatch):
    """On `meta`, where reading a value is an error: `raw_weights` and `normalize` read one, marked as syncs."""
    def raw_weights(self, batch, context):
        return self.source(batch, context)

    def normalize(raw_N, seq_lens_S, norm):
        return raw_N, torch.ones(len(seq_lens_S))
    monkeypatch.setattr(train, "sum_over_processes", lambda totals, device: totals)
    monkeypatch.setattr(objective_module.Objective, "raw_weights", raw_weights)
    monkeypatch.setattr(objective_module, "normalize", normalize)
    run = test_host_waits.made_run("dpo")
    run.objective = bind_objective(LOSSES["dpo"], WEIGHTS[source], source)
    examples = test_host_waits.EXAMPLES
    batch = collate(MicroBatch((0, 1, 2, 3)), examples, [0, 1, 2, 3], packs=packs).to(test_host_waits.META)
    with test_host_waits.NoWaits():
        loss_P, _ = train.run_pairs(run, batch, {})
        loss_P.sum().backward()
    assert loss_P.device == test_host_waits.META and run.objective.is_online


def test_tgdpo_guides_a_run(tmp_path, run_arguments, toy_model):
    """A model against itself guides nowhere: the run is that of uniform weights."""
    for folder, flags in (("guided", ["--weights", "tgdpo", "--aux-model", str(toy_model)]),
                          ("uniform", ["--weights", "uniform"])):
        train.main([*run_arguments(tmp_path / folder, max_steps=2, loss="dpo"), *flags])
    assert_close_rows(read_rows(tmp_path / "guided"), read_rows(tmp_path / "uniform"))
