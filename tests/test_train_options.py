"""Options of whole runs: hybrid shards, compiled layers, sampled answers, the profile, the page at the end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes_of_tests import run_ranks
from runs_of_tests import assert_close_rows, read_rows

import train
from twdpo.dist import Process, shard_module
from twdpo.flags import InputError
from twdpo.judge.judge import shards_judge
from twdpo.models.build import build_on_meta
from twdpo.models.source import open_model


def read_samples(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_go_on_from_one_and_one_from_two(tmp_path, run_arguments):
    """Whole tensors of one process, two copies of the parameters (HSDP), and whole ones again: the same rows and
    samples as those of a run that never stopped. The two reduce gradients on the last micro-batch and compute layers
    again; the loss needs means over the global batch."""
    flags = {"micro_batch_tokens": 250, "sample": 2, "save_every": 2, "keep_last": 0, "loss": "kto_pair",
             "weights": "decay"}
    train.main(run_arguments(tmp_path / "one", **flags))

    def go_on(source: str, target: str, step: int) -> list[str]:
        shutil.copytree(tmp_path / source, tmp_path / target)
        return [*run_arguments(tmp_path / target, **flags), "--resume",
                str(tmp_path / target / f"checkpoints/step-{step:07}")]
    run_ranks("train", [*go_on("one", "two", 2), "--replicate", "2", "--no-sync", "--checkpointing", "full"])
    train.main(go_on("two", "three", 4))
    for name in ("two", "three"):
        assert_close_rows(read_rows(tmp_path / name), read_rows(tmp_path / "one"))
        assert read_samples(tmp_path / name) == read_samples(tmp_path / "one")


def test_copies_that_do_not_divide_the_processes_are_refused():
    module = torch.nn.Linear(2, 2)
    import torch.distributed as dist

    from twdpo import dist as ours
    ours.start()
    try:
        with pytest.raises(InputError, match="--replicate is 3: 1 processes"):
            shard_module(module, [], None, torch.device("cpu"), 3)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("extra, message", [
    (("--replicate", "2"), "--replicate is 2: 1 processes"), (("--lr", "inf"), "--lr is inf"),
    (("--head-cache-gib", "-1"), "--head-cache-gib is -1.0"),
])
def test_what_can_t_be_done_is_refused_before_an_old_run_is_touched(extra, message, tmp_path, run_arguments, plain_run,
                                                                          capsys):
    shutil.copytree(plain_run, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run", max_steps=1), "--overwrite", *extra])
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_held_out_loss_that_is_no_number_is_never_the_best(tmp_path, run_arguments):
    (tmp_path / "mine.py").write_text("""
from twdpo.losses import LOSSES, dpo
def odd(ratio_S, logps_N, batch, config):
    loss_P, metrics = dpo(ratio_S, logps_N, batch, config)
    return (loss_P if loss_P.requires_grad else loss_P * float("nan")), metrics
LOSSES["odd"] = odd
""")
    train.main([*run_arguments(tmp_path / "run", loss="odd", weights="uniform", save_every=2, max_steps=2), "--import",
                str(tmp_path / "mine.py")])
    assert not (tmp_path / "run/best").exists() and (tmp_path / "run/final").is_dir()
    assert "No step is best" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "attention", "full"])
def test_compiled_layers_give_the_same_run(checkpointing, tmp_path, run_arguments, monkeypatch):
    """Traced and run by torch.compile's front half: the back half takes minutes on a CPU. Rows of many lengths, layers
    computed again, answers sampled in between: two graphs a layer, before and after its attention."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compile, step = torch.compile, train.train_step
    monkeypatch.setattr(train, "SAMPLED_TOKENS", 16)
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compile(forward, backend=backend, **options))
    in_steps = []

    def count(run):
        before = len(graphs)
        row = step(run)
        in_steps.append(len(graphs) - before)
        return row
    monkeypatch.setattr(train, "train_step", count)
    flags = {"checkpointing": checkpointing, "sample": 1, "micro_batch_tokens": 300, "max_steps": 2,
             "eval_every": 0}
    train.main(run_arguments(tmp_path / "eager", **flags))
    assert not graphs
    train.main([*run_arguments(tmp_path / "compiled", **flags), "--compile"])
    assert 2 <= len(graphs) <= 20  # not one for each row and layer
    assert in_steps[-2] >= 2  # a forward with gradients has graphs of its own
    assert_close_rows(read_rows(tmp_path / "compiled"), read_rows(tmp_path / "eager"))
    assert read_samples(tmp_path / "compiled") == read_samples(tmp_path / "eager")
    torch._dynamo.reset()


def test_the_heads_cache_changes_nothing_on_a_cpu_and_says_so(tmp_path, run_arguments, plain_run, capsys):
    train.main(run_arguments(tmp_path / "run", head_cache_gib=0.5))
    assert capsys.readouterr().out.count("--head-cache-gib 0.5 has no effect on a CPU\n") == 1
    assert read_rows(tmp_path / "run") == read_rows(plain_run)


@pytest.mark.slow
def test_sampled_answers_are_what_the_exported_policy_writes(tmp_path, run_arguments):
    """After the last step, greedily; a resumed run's file is that of one that never stopped."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    train.main(run_arguments(tmp_path / "run", sample=2, save_every=3))
    samples = read_samples(tmp_path / "run")
    assert [sample["step"] for sample in samples] == [0, 0, 3, 3, 6, 6]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    for sample in samples[-2:]:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": sample["prompt"]}], add_generation_prompt=True,
                                            return_tensors="pt", return_dict=True)
        output = policy.generate(**ids, max_new_tokens=train.SAMPLED_TOKENS, do_sample=False)
        assert tokenizer.decode(output[0, ids["input_ids"].shape[1]:], skip_special_tokens=True) == sample["answer"]
    train.main([*run_arguments(tmp_path / "run", sample=2, save_every=3), "--resume",
                str(tmp_path / "run/checkpoints/step-0000003")])
    assert read_samples(tmp_path / "run") == samples


@pytest.mark.slow
def test_sampling_changes_no_figure_and_none_is_the_default(tmp_path, run_arguments, plain_run):
    train.main(run_arguments(tmp_path / "with", sample=1, cache_dir=tmp_path / "cache"))
    assert read_rows(tmp_path / "with") == read_rows(plain_run)
    assert not (plain_run / "samples.jsonl").exists()
    train.main([*run_arguments(tmp_path / "with", max_steps=1), "--overwrite"])
    assert not (tmp_path / "with/samples.jsonl").exists()


def test_a_profile_adds_shares_and_rates(tmp_path, run_arguments):
    train.main([*run_arguments(tmp_path / "run", max_steps=2), "--profile"])
    steps = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    for row in steps:
        shares = [row[f"{stage}_share"] for stage in ("data", "forward", "backward", "optimizer")]
        assert all(share > 0 for share in shares) and sum(shares) == pytest.approx(1)
        assert row["tflops"] > 0 and "mfu" not in row  # no data sheet for a CPU


def test_a_run_ends_with_a_page(tmp_path, run_arguments, capsys):
    train.main(run_arguments(tmp_path / "run", sample=1))
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("<figure>") >= 7 and "What the policy answers" in page
    assert f"{tmp_path / 'run/report.html'}: the curves" in capsys.readouterr().out


def test_a_judge_too_big_for_a_gpu_is_sharded_by_itself(toy_model, process, monkeypatch):
    gpus, model = type("Properties", (), {"total_memory": 10_000_000})(), open_model(str(toy_model), process)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpus)
    two = Process(0, 2, torch.device("cuda"))
    params = sum(parameter.numel() for parameter in
                 build_on_meta(model.config, torch.float32).parameters())
    for memory, expected in ((4 * params / 0.81, True), (4 * params / 0.79, False)):
        gpus.total_memory = memory
        assert shards_judge("auto", model, torch.float32, two) is expected
    assert not shards_judge("off", model, torch.float32, two)
    assert not shards_judge("auto", model, torch.float32, Process(0, 1, torch.device("cuda")))
