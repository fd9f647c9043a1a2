"""Methods that read more of the policy than log-probs: distributions, hidden states, input gradients, what it writes.

A run is the same however rows are laid out, the work is split, or the run is stopped and resumed."""

import pytest
from processes_of_tests import run_ranks
from runs_of_tests import assert_close_rows, read_rows

import train

WAYS = {"packed": {"packing": "on", "micro_batch_tokens": 100_000},
        "plain": {"packing": "off", "micro_batch_tokens": 100_000},
        "accumulated": {"packing": "on", "micro_batch_tokens": 150}}
METHODS = {
    "tdpo1": {"loss": "tdpo1", "weights": "decay"},
    "tdpo2 from disk": {"loss": "tdpo2", "ref_states": "disk"},
    "tisdpo": {"loss": "tisdpo", "weights": "decay"},
    "wpo": {"loss": "wpo", "beta": 1},
    "otpo": {"loss": "dpo", "weights": "otpo"},
    "selective": {"loss": "dpo", "weights": "selective"},
    "tidpo": {"loss": "tidpo"},
    "tidpo of the code": {"loss": "tidpo", "loss_options": "base=tdpo2,gamma=0.5",
                          "weights_options": "lam=0.2,sigma_div=8,prior=sum1,scope=all"},
    "a sum": {"loss": "twdpo+0.5*tdpo2+0.2*sft", "weights": "decay"},
}
FEW = {"twdpo.needs.ANCHOR_TOKENS": 8}
methods = pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
# Each thing that they read of the policy or the reference, once.
some = pytest.mark.parametrize("flags", [METHODS[name] for name in ("tdpo2 from disk", "otpo", "tidpo of the code",
                                                                  "a sum")])


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """Of an anchor."""
    for name, value in FEW.items():
        monkeypatch.setattr(name, value)


@methods
def test_packed_plain_and_accumulated_are_one_run(flags, tmp_path, run_arguments):
    for name, more in WAYS.items():
        train.main(run_arguments(tmp_path / name, **flags | {"max_steps": 3, "eval_every": 2} | more))
    packed = read_rows(tmp_path / "packed")
    assert len(packed) == 1 + 3 + 2 and packed[1]["grad_norm"] > 0
    for name in ("plain", "accumulated"):
        assert_close_rows(read_rows(tmp_path / name), packed)


@methods
def test_a_resumed_run_is_the_whole_one(flags, tmp_path, run_arguments):
    flags = flags | {"max_steps": 3, "eval_every": 2, "save_every": 1, "keep_last": 0, "micro_batch_tokens": 400}
    argv = run_arguments(tmp_path / "run", **flags)
    train.main(argv)
    rows = read_rows(tmp_path / "run")
    train.main([*argv, "--resume", str(tmp_path / "run/checkpoints/step-0000001")])
    assert read_rows(tmp_path / "run") == rows


@pytest.mark.slow
@some
def test_two_processes_are_one(flags, tmp_path, run_arguments):
    """With recomputation, and gradients reduced at the last micro-batch alone."""
    flags = flags | {"max_steps": 3, "eval_every": 2, "micro_batch_tokens": 250, "checkpointing": "full"}
    train.main(run_arguments(tmp_path / "one", **flags))
    run_ranks("train", [*run_arguments(tmp_path / "two", **flags), "--no-sync"], constants=FEW)
    assert_close_rows(read_rows(tmp_path / "two"), read_rows(tmp_path / "one"))


@methods
def test_it_runs_in_bfloat16_shards(flags, tmp_path, run_arguments):
    """Of one process in bf16 the parameters are sharded."""
    train.main(run_arguments(tmp_path / "run", **flags | {"max_steps": 2, "eval_every": 2, "dtype": "bfloat16"}))
    assert [row["step"] for row in read_rows(tmp_path / "run") if "grad_norm" in row] == [1, 2]
