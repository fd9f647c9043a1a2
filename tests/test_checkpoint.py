"""Checkpoints that can be trusted, and exports that load."""

import json

import pytest
import safetensors.torch
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from twdpo.checkpoint import export_model, load_checkpoint, save_checkpoint
from twdpo.flags import InputError
from twdpo.models.policy import load_policy, make_optimizer
from twdpo.run_folder import list_checkpoints


def make(directory, process, dtype=torch.float32):
    policy = load_policy(directory, dtype, process)
    return policy, make_optimizer(policy, 1e-2, 0.1)


def origin(identity: dict[str, str]) -> dict[str, object]:
    return {"run_id": "a", "settings": {}, "identity": identity}


def step(policy, optimizer) -> None:
    """One optimizer step on an arbitrary loss."""
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 0.1) * parameter.detach()
    optimizer.step()


def snapshot(policy, optimizer) -> dict[str, torch.Tensor]:
    tensors = {name: whole(parameter) for name, parameter in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = whole(value)
    return tensors


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # held whole by one process; sharded
def test_a_loaded_checkpoint_is_the_saved_state(dtype, toy_model, process, tmp_path):
    policy, optimizer = make(toy_model, process, dtype)
    for _ in range(3):
        step(policy, optimizer)
    save_checkpoint(tmp_path, 3, policy, optimizer, origin({"the pairs": "x"}), process, keep_last=2)
    state, random = snapshot(policy, optimizer), torch.get_rng_state()
    step(policy, optimizer)
    torch.rand(3)
    fresh, fresh_optimizer = make(toy_model, process, dtype)
    with pytest.raises(InputError, match="another run: since then the pairs changed"):
        load_checkpoint(list_checkpoints(tmp_path)[-1], fresh, fresh_optimizer, {"the pairs": "y"}, process)
    assert load_checkpoint(list_checkpoints(tmp_path)[-1], fresh, fresh_optimizer, {"the pairs": "x"}, process) == 3
    loaded = snapshot(fresh, fresh_optimizer)
    assert loaded.keys() == state.keys() and len(state) > 40
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert torch.equal(torch.get_rng_state(), random)
    step(fresh, fresh_optimizer)  # and goes on in the same way
    after, expected = snapshot(fresh, fresh_optimizer), snapshot(policy, optimizer)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


@pytest.mark.parametrize("damage, word", [("flip", "has changed"), ("cut", "has changed"), ("missing", "is missing"),
                                          ("extra", "does not belong"), ("manifest", "has no digest, files"),
                                          ("step", "is not as it was written")])
def test_a_damaged_checkpoint_is_named(damage, word, toy_model, process, tmp_path):
    policy, optimizer = make(toy_model, process)
    step(policy, optimizer)
    path = save_checkpoint(tmp_path, 1, policy, optimizer, origin({}), process, keep_last=1)
    (file, *_) = sorted(path.glob("*.safetensors"))
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-7] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest":
        (path / "manifest.json").write_text("{}")
    elif damage == "step":
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"step": 2}))
    else:
        (path / "shard-stray.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=word):
        load_checkpoint(path, policy, optimizer, {}, process)


def test_no_pickle_is_written_and_old_checkpoints_go(toy_model, process, tmp_path):
    policy, optimizer = make(toy_model, process)
    for number in (1, 2, 3):
        step(policy, optimizer)
        path = save_checkpoint(tmp_path, number, policy, optimizer, origin({}), process, keep_last=2)
    assert [each.name for each in list_checkpoints(tmp_path)] == ["step-0000002", "step-0000003"]
    assert {file.suffix for file in path.iterdir()} <= {".safetensors", ".json"}
    assert not [each for each in (tmp_path / "checkpoints").iterdir() if each.name.startswith(".")]


@pytest.fixture(scope="module", params=["tied", "untied bf16"])
def source(request, toy_model, tmp_path_factory):
    """A model folder with a tokenizer."""
    if request.param == "tied":
        return toy_model
    directory = tmp_path_factory.mktemp("untied")
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, tie_word_embeddings=False, attention_dropout=0.25)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(toy_model).save_pretrained(directory)
    return directory


def test_an_untrained_export_is_the_source(source, process, tmp_path):
    policy = load_policy(source, torch.float32, process)
    export_model(tmp_path / "final", policy, AutoTokenizer.from_pretrained(source), source, "", process)
    stored, exported = (safetensors.torch.load_file(directory / "model.safetensors")
                        for directory in (source, tmp_path / "final"))
    assert stored.keys() == exported.keys()  # no wrapper's prefix, no tied head twice
    assert all(torch.equal(stored[name], exported[name]) and stored[name].dtype == exported[name].dtype
               for name in stored)
    configs = [json.loads((directory / "config.json").read_text()) for directory in (source, tmp_path / "final")]
    assert configs[0] == configs[1]  # dtype and dropout included
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(source)(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert (tmp_path / "final/generation_config.json").exists()


def test_export_in_another_dtype_replaces_an_older_one(toy_model, process, tmp_path):
    policy, tokenizer = load_policy(toy_model, torch.float32, process), AutoTokenizer.from_pretrained(toy_model)
    export_model(tmp_path / "best", policy, tokenizer, toy_model, "", process)
    (tmp_path / "best/old").write_text("x")
    export_model(tmp_path / "best", policy, tokenizer, toy_model, "bfloat16", process)
    assert not (tmp_path / "best/old").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "best").dtype == torch.bfloat16
