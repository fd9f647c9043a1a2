"""The reference beside the policy, in memory or on disk: equal where they are one model, right gradients, its cache."""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import test_host_waits
import torch
from models_of_tests import MODELS, build
from processes_of_tests import run_and_die, run_ranks
from reference_of_tests import DRIFT, dpo_kl, gradients, in_bfloat16, made_run, save_model
from runs_of_tests import assert_close_rows, read_rows
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_model import plain_logps
from test_packing import EXAMPLES
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import train
from twdpo import logps
from twdpo.batch import collate
from twdpo.config import TrainConfig
from twdpo.flags import InputError
from twdpo.logps import STATES, StoredStates, read_places, store_states, write_cache
from twdpo.losses import LOSSES
from twdpo.models.attention import ATTENTION_NAME
from twdpo.models.policy import load_policy
from twdpo.models.reference import Reference, StoredReference, keep_head, load_reference, response_logps_of
from twdpo.rows import MicroBatch, RowOptions, evaluation_batches
from twdpo.stored import write_tensors

ALL = MicroBatch((0, 1, 2, 3))
PLACES = ("memory", "disk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2", "phi"])  # a softcap, fp32 cosines, ties, a bias
def test_it_is_the_policy_that_starts_to_the_last_bit(name, dtype, tmp_path, process, monkeypatch):
    monkeypatch.setitem(MODELS, "phi", {})
    model = build(name, "eager")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(tmp_path / "model")
    policy, reference = (load(tmp_path / "model", dtype, process) for load in (load_policy, load_reference))
    assert all(parameter.dtype == dtype and not parameter.requires_grad for parameter in reference.parameters())
    for packs in (True, False):
        batch, rows = collate(ALL, EXAMPLES, [0, 1, 2, 3], packs=packs), RowOptions(packs, 1000)
        states = store_states(policy, process, [(EXAMPLES, [[0, 1, 2, 3]])], rows, tmp_path / str(packs), dtype)
        outputs = policy(batch, with_hidden=True)
        assert torch.equal(response_logps_of(reference, batch), outputs.logps_N)
        for each in (reference, keep_head(policy, states, dtype, process)):
            compared = each(batch, lambda batch: policy(batch, terms=("kl", "reverse_kl"), with_hidden=True))
            assert torch.equal(compared.hidden_ND, outputs.hidden_ND) and compared.batch.ref_states is None
            assert all((compared.terms[term] == 0).all() for term in ("kl", "reverse_kl"))


def test_log_probs_of_sequences_that_are_in_no_pairs(tmp_path, process):
    """As of answers that the policy has just written: any number of sequences, of a batch of their own."""
    reference = load_reference(save_model(tmp_path), torch.float32, process)
    whole = collate(MicroBatch((0, 1)), EXAMPLES, [0, 1])
    tokens = whole.seq_lens_S[:3].sum()
    batch = copy.copy(whole)
    batch.input_ids_RT, batch.positions_RT, batch.ranges = (whole.input_ids_RT[:3], whole.positions_RT[:3],
                                                            whole.ranges[:3])
    batch.predict_N, batch.targets_N, batch.seq_lens_S = (whole.predict_N[:tokens], whole.targets_N[:tokens],
                                                          whole.seq_lens_S[:3])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    sides = [(EXAMPLES[0], EXAMPLES[0].chosen), (EXAMPLES[0], EXAMPLES[0].rejected), (EXAMPLES[1], EXAMPLES[1].chosen)]
    found = response_logps_of(reference, batch)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.cat([plain_logps(model, *side) for side in sides]).detach(), atol=1e-5,
                               rtol=1e-5)


def plain_gradients(directory) -> dict[str, torch.Tensor]:
    """Of the same loss, from two plain models and all their logits."""
    reference, policy = (AutoModelForCausalLM.from_pretrained(directory) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(DRIFT)
    margins, kls = [], []
    for example in EXAMPLES:
        sums = []
        for response in (example.chosen, example.rejected):
            ids = torch.tensor([*example.prompt_ids, *response.ids]).long()[None]
            places = slice(len(example.prompt_ids) - 1, -1)
            logps_TV, ref_TV = (model(ids).logits[0, places].log_softmax(-1) for model in (policy, reference))
            sums.append(logps_TV.gather(1, torch.tensor(response.ids).long()[:, None]).sum())
            kls.append((ref_TV.detach().exp() * (ref_TV.detach() - logps_TV)).sum())
        margins.append(sums[0] - sums[1])
    margin_P, kl_P2 = torch.stack(margins), torch.stack(kls).view(-1, 2)
    mean = kl_P2[:, 0].mean().detach()
    loss_P = -torch.nn.functional.logsigmoid(0.1 * margin_P) + 0.1 * (1 + mean) * kl_P2.sum(1)
    loss_P.mean().backward()
    return {f"model.{name}": parameter.grad for name, parameter in policy.named_parameters()}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each tensor as a whole."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm() > 0, name


def flags(tmp_path, **more) -> dict:
    return {"beta": 0.1, "batch_size": 4, "dtype": "float32", "micro_batch_tokens": 40, "checkpointing": "none",
            "cache_dir": str(tmp_path / "cache")} | more


def expected_gradients(directory, process, cache) -> dict[str, dict[str, torch.Tensor]]:
    """By dtype, of one process that shards nothing."""
    made = [made_run(directory, process, TrainConfig(**flags(cache))) for _ in range(2)]
    return {"float32": gradients(made[0]), "bfloat16": gradients(in_bfloat16(made[1]))}


TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # bf16 gradients of one process are summed in bf16


def test_gradients_are_those_of_plain_autograd_on_full_logits(tmp_path, process):
    """Several micro-batches, after an evaluation; packed rows and plain ones."""
    expected = plain_gradients(save_model(tmp_path / "model"))
    for place in PLACES:
        for packs in (True, False):
            run = made_run(tmp_path / "model", process, TrainConfig(**flags(tmp_path, ref_states=place)), packs)
            assert_near(gradients(run), expected, 1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_one_process_in_bfloat16_has_the_gradients_of_one_that_shards_nothing(place, tmp_path, process):
    expected = expected_gradients(save_model(tmp_path / "model"), process, tmp_path)["bfloat16"]
    run = made_run(tmp_path / "model", process, TrainConfig(**flags(tmp_path, ref_states=place, dtype="bfloat16")))
    assert_near(gradients(run), expected, TOLERANCE["bfloat16"])
    reference = run.context.passes[0].__self__.reference
    if place == "memory":  # the head alone is whole in one process
        assert all(isinstance(parameter, DTensor) for parameter in reference.parameters())
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_a_backward_pass_gathers_its_head_and_none_of_its_layers(tmp_path, process, monkeypatch):
    run = made_run(save_model(tmp_path / "model"), process, TrainConfig(**flags(tmp_path, dtype="bfloat16")))
    layers = set(run.context.passes[0].__self__.reference.model.model.layers)
    gathered, original = [], FSDPParamGroup.unshard

    def unshard(group, *args, **options):
        in_backward = torch._C._current_graph_task_id() != -1
        gathered.append((in_backward, group.modules[0] in layers))
        return original(group, *args, **options)
    monkeypatch.setattr(FSDPParamGroup, "unshard", unshard)
    gradients(run)
    assert (False, True) in gathered and (True, False) in gathered and (True, True) not in gathered


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path, process):
    expected = expected_gradients(save_model(tmp_path / "model"), process, tmp_path)
    ways = [{}, {"no_sync": True, "checkpointing": "full"}, {"replicate": 2}, {"dtype": "bfloat16"}]
    ways = [way | {"ref_states": place} for place in PLACES for way in ways]
    run_ranks("reference_of_tests", [str(tmp_path / "model"), str(tmp_path),
                                     *(json.dumps(flags(tmp_path, **way)) for way in ways)])
    for number, way in enumerate(ways):
        dtype = way.get("dtype", "float32")
        assert_near(load_file(tmp_path / f"{number}.safetensors"), expected[dtype], TOLERANCE[dtype])


# ----------------------------------------------------------------------------------------------------------------------
# On disk

def store(directory, process, folder, pairs: int = 4):
    policy = load_policy(directory, torch.float32, process)
    return store_states(policy, process, [(EXAMPLES, evaluation_batches(pairs, 1))], RowOptions(True, 1000), folder,
                        torch.float32)


def test_hidden_states_are_stored_once_and_read_by_the_pair(tmp_path, process, capsys):
    store(save_model(tmp_path / "model"), process, tmp_path / "cache", 2)
    size = sum(len(example.chosen.ids) + len(example.rejected.ids) for example in EXAMPLES[:2]) * 32 * 4
    assert f"{size / 2**30:.3g} GiB for 2 pairs, 128 bytes a response token; {size / 2**30:.3g} GiB are not yet in" in (
        capsys.readouterr().out)
    for place in read_places(tmp_path / "cache", STATES).values():
        assert size < place.path.stat().st_size < size + 1000
    states = store(tmp_path / "model", process, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the second holds the two that were missing
    policy = load_policy(tmp_path / "model", torch.float32, process)
    batch = collate(MicroBatch((3, 0)), EXAMPLES, [3, 0], packs=True)
    torch.testing.assert_close(states(batch), policy(batch, with_hidden=True).hidden_ND, atol=1e-5, rtol=1e-5)
    store(tmp_path / "model", process, tmp_path / "cache")
    assert "; 0 GiB are not yet in" in capsys.readouterr().out.splitlines()[-1]


def test_pairs_of_equal_tokens_share_what_is_stored(tmp_path, process):
    again = replace(EXAMPLES[1], pair=replace(EXAMPLES[1].pair, chosen="cut to the same tokens"))
    assert again.pair.key != EXAMPLES[1].pair.key
    policy = load_policy(save_model(tmp_path / "model"), torch.float32, process)
    states = store_states(policy, process, [([*EXAMPLES, again], [[1, 4]])], RowOptions(True, 1000), tmp_path / "cache",
                          torch.float32)
    found = [states(collate(MicroBatch((0,)), [each], [0])) for each in (EXAMPLES[1], again)]
    assert torch.equal(*found) and len(read_places(tmp_path / "cache", STATES)) == 1


def test_a_damaged_file_is_made_again_and_a_full_disk_is_one_message(tmp_path, process, capsys, monkeypatch):
    batch = collate(ALL, EXAMPLES, [0, 1, 2, 3], packs=True)
    whole = store(save_model(tmp_path / "model"), process, tmp_path / "cache")(batch)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert torch.equal(store(tmp_path / "model", process, tmp_path / "cache")(batch), whole)
    assert "is damaged" in capsys.readouterr().out
    tensors = load_file(path)  # one that can be read, and is not what it says
    write_tensors(path, tensors | {"states_ND": tensors["states_ND"][:-1].clone()})
    assert torch.equal(store(tmp_path / "model", process, tmp_path / "cache")(batch), whole)
    assert "tokens, and its lengths say" in capsys.readouterr().out
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if name != "states_ND"})
    assert torch.equal(store(tmp_path / "model", process, tmp_path / "cache")(batch), whole)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20 if folder.exists() else 0))
    store(tmp_path / "model", process, tmp_path / "small")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=500))
    with pytest.raises(InputError, match=r"GiB are free: name another --cache-dir, or use --ref-states memory"):
        store(tmp_path / "model", process, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_disk_that_fills_meanwhile_is_one_message(tmp_path, process, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(InputError, match=r"states-.*No space left on device.*make room, or name another --cache-dir"):
        store(save_model(tmp_path / "model"), process, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_pass_that_is_cut_keeps_what_it_has_written(tmp_path, process, monkeypatch):
    """A file every few global batches; the rest is made when it goes on."""
    monkeypatch.setattr(logps, "STATES_FLUSH_BATCHES", 1)
    original, calls = logps.write_cache, []

    def write_twice(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*args)
    monkeypatch.setattr(logps, "write_cache", write_twice)
    with pytest.raises(KeyboardInterrupt):
        store(save_model(tmp_path / "model"), process, tmp_path / "cache")
    assert len(read_places(tmp_path / "cache", STATES)) == 2
    store(tmp_path / "model", process, tmp_path / "cache")
    assert len(calls) == 5 and len(read_places(tmp_path / "cache", STATES)) == 4


def test_a_missing_file_of_another_process_is_one_message(tmp_path, process, monkeypatch):
    monkeypatch.setattr(logps, "write_cache", lambda *_: None)
    with pytest.raises(InputError, match="4 of 4 pairs that other processes have written are not in"):
        store(save_model(tmp_path / "model"), process, tmp_path / "cache")


@pytest.mark.parametrize("place", PLACES)
def test_a_step_does_not_wait_for_it(place, tmp_path, monkeypatch):
    """On a device without values; hidden states come from ordinary memory."""
    monkeypatch.setattr(train, "sum_over_processes", lambda totals, device: totals)
    monkeypatch.setitem(LOSSES, "dpo_kl", dpo_kl)
    run = test_host_waits.made_run("dpo_kl")
    model = build("llama", ATTENTION_NAME).to("meta", torch.bfloat16).requires_grad_(False)
    write_cache(tmp_path, STATES, {example.pair.key: tuple(torch.randn(len(side.ids), 32).bfloat16() for side in
                                                           (example.chosen, example.rejected)) for example in EXAMPLES})
    reference = {"memory": lambda: Reference(model),
                 "disk": lambda: StoredReference(model.lm_head, StoredStates(read_places(tmp_path, STATES)))}[place]()
    run.context = replace(run.context, passes=(lambda policy, run, batch: reference(batch, run),))
    for packs in (True, False):
        test_host_waits.step(run, packs)


# ----------------------------------------------------------------------------------------------------------------------
# Runs

LOSS = "from reference_of_tests import dpo_kl\nfrom twdpo.losses import LOSSES\nLOSSES['dpo_kl'] = dpo_kl\n"


@pytest.fixture
def arguments(tmp_path, run_arguments):
    """Flags of a run of the loss with KL."""
    (tmp_path / "dpo_kl.py").write_text(LOSS)
    return lambda folder, **more: [*run_arguments(folder, **more), "--import", str(tmp_path / "dpo_kl.py"), "--loss",
                                   "dpo_kl"]


def test_a_run_is_the_same_with_the_reference_in_memory_and_on_disk(tmp_path, arguments):
    for place in PLACES:
        train.main(arguments(tmp_path / place, ref_states=place, cache_dir=tmp_path / "cache"))
    rows = read_rows(tmp_path / "memory")
    assert rows == read_rows(tmp_path / "disk")
    assert rows[0]["eval/kl"] == rows[1]["kl"] == 0 < rows[2]["kl"]
    train.main(arguments(tmp_path / "plain", packing="off", micro_batch_tokens=150))
    assert_close_rows(read_rows(tmp_path / "plain"), rows)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_with_the_reference_that_it_started_with(place, tmp_path, arguments):
    """Also when the cache is gone: the policy that is resumed is no longer the reference."""
    more = {"ref_states": place, "save_every": 2, "micro_batch_tokens": 200}
    train.main(arguments(tmp_path / "whole", cache_dir=tmp_path / "other", **more))
    argv = arguments(tmp_path / "run", cache_dir=tmp_path / "cache", **more)
    run_and_die("train", argv, "train.train_step", 4)
    for path in (tmp_path / "cache").rglob("states-*"):
        path.unlink()
    train.main([*argv, "--resume"])
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "whole")


@pytest.mark.parametrize("needs, message", [
    (("ref",), "--ref-states disk is given, but the loss dpo_kl compares no distributions"),
    (("ref", "ref_states", "anchor"), "--ref-states disk is given, but anchors need the reference itself")])
def test_disk_where_nothing_reads_it_is_refused(needs, message, tmp_path, arguments, capsys, monkeypatch):
    argv = arguments(tmp_path / "run", ref_states="disk")
    (tmp_path / "dpo_kl.py").write_text(LOSS.replace("LOSSES['dpo_kl'] = dpo_kl", f"""
def plain(ratio_S, logps_N, batch, config):
    return LOSSES["dpo"](ratio_S, logps_N, batch, config)
plain.needs, plain.__name__ = {needs!r}, "dpo_kl"
LOSSES["dpo_kl"] = plain"""))
    monkeypatch.setitem(train.open_needs.__globals__["NEEDS"], "anchor", train.Need)
    with pytest.raises(SystemExit):
        train.main(argv)
    assert message in capsys.readouterr().err


