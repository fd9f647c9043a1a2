"""The sharded policy: equal to the plain model, fp32 master weights, inputs not rounded, ties kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models_of_tests import MODELS, build, build_double
from precision_of_tests import InDouble, assert_as_exact, assert_exact
from safetensors.torch import load_file, save_file
from tokenizers_of_tests import byte_level
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from twdpo.batch import collate
from twdpo.checkpoint import export_model
from twdpo.flags import InputError
from twdpo.judge.judge import load_judge, load_sharded_judge
from twdpo.logratio import weighted_logratio
from twdpo.models.attention import ATTENTION_NAME, JudgeCapture
from twdpo.models.build import check_architecture, use_fused_norms
from twdpo.models.memory import FusedKernels, LiveBytes
from twdpo.models.policy import load_policy
from twdpo.models.source import check_length, load_model_config, locate_model
from twdpo.pairs import Pair
from twdpo.rows import MicroBatch, pack
from twdpo.tokens import Example, Response


def make_example(prompt: int, chosen: int, rejected: int, vocabulary: int = 90) -> Example:
    """Random tokens; only the ids matter here."""
    rng = np.random.default_rng([prompt, chosen, rejected])

    def response(length):
        ids = rng.integers(3, vocabulary, length, dtype=np.int32)
        return Response(ids, np.zeros((length, 2), np.int32), np.arange(length) < length - 1)

    prompt_ids = rng.integers(3, vocabulary, prompt, dtype=np.int32)
    return Example(Pair((("user", "x"),), "a", "b", "here:1"), prompt_ids, response(chosen), response(rejected))


EXAMPLES = [make_example(5, 4, 7), make_example(9, 1, 3), make_example(2, 6, 2)]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def plain_logps(model, example: Example, response: Response) -> torch.Tensor:
    """Log-probs of a response from a plain forward of its own sequence."""
    ids = torch.from_numpy(np.concatenate([example.prompt_ids, response.ids])).long()
    logps = model(ids[None]).logits[0].log_softmax(-1)
    start = len(example.prompt_ids)
    return torch.stack([logps[position - 1, ids[position]] for position in range(start, len(ids))])


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory) -> Path:
    """An untied Llama stored in bfloat16."""
    directory = tmp_path_factory.mktemp("bf16")
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
                         attention_dropout=0.5, initializer_range=0.2)
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def test_one_process_in_fp32_holds_everything_once(toy_model, process):
    """Sharding over one process would only keep a gathered copy; in bf16 it makes the copy that computes."""
    whole_policy, sharded = (load_policy(toy_model, dtype, process) for dtype in (torch.float32, torch.bfloat16))
    assert not any(isinstance(parameter, DTensor) for parameter in whole_policy.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())


def test_policy_equals_plain_forwards_of_each_sequence(toy_model, process):
    plain = AutoModelForCausalLM.from_pretrained(toy_model, dtype=torch.float32)
    policy = load_policy(toy_model, torch.float32, process)
    batch = collate(MicroBatch((0, 1, 2)), EXAMPLES, [0, 1, 2])

    def expected() -> torch.Tensor:
        return torch.cat([plain_logps(plain, example, response) for example in EXAMPLES
                          for response in (example.chosen, example.rejected)])
    logps_N, plain_N = policy(batch).logps_N, expected()
    plain.double()
    with InDouble():
        assert_as_exact(logps_N, plain_N, expected())


def test_rotary_buffers_are_computed_after_loading_without_memory(toy_model, process):
    plain = AutoModelForCausalLM.from_pretrained(toy_model, dtype=torch.float32)
    policy = load_policy(toy_model, torch.float32, process)
    buffers = dict(policy.model.named_buffers())
    assert buffers
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_the_heads_cache_reaches_the_op(toy_model, process, monkeypatch):
    seen: list[float] = []
    monkeypatch.setattr("twdpo.models.policy.weighted_logratio",
                        lambda *args: (seen.append(args[-2]), weighted_logratio(*args))[1])
    for given in ({}, {"head_cache_gib": 0.25}):
        policy = load_policy(toy_model, torch.float32, process, **given)
        policy(collate(MicroBatch((0,)), EXAMPLES, [0]))
    assert seen == [0.0, 0.25]


def test_a_head_cache_of_capped_logits_is_refused_before_weights_are_loaded():
    config = build("gemma2", "eager").config
    with pytest.raises(InputError, match=r"--head-cache-gib: .* 0.5 GiB: it must be 0 for .* caps its logits \(at 3\)"):
        check_architecture(config, 0.5)
    check_architecture(config, 0.0)
    check_architecture(build("llama", "eager").config, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # whole in one process, sharded
def test_tied_head_stays_tied(dtype, toy_model, process):
    policy = load_policy(toy_model, dtype, process)
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight


def test_master_weights_are_fp32_and_training_is_on(bf16_checkpoint, process):
    policy = load_policy(bf16_checkpoint, torch.float32, process)
    assert policy.training and policy.model.training
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == torch.float32, name
    stored = AutoModelForCausalLM.from_pretrained(bf16_checkpoint)
    assert stored.dtype == torch.bfloat16
    for name, parameter in stored.named_parameters():
        assert torch.equal(parameter.float(), whole(policy.model.get_parameter(name))), name


def test_dropout_is_off(bf16_checkpoint, process):
    policy = load_policy(bf16_checkpoint, torch.float32, process)
    batch = collate(MicroBatch((0, 1)), EXAMPLES, [0, 1])
    assert torch.equal(policy(batch).logps_N, policy(batch).logps_N)


def test_reference_logps_and_weights_reach_a_bf16_forward_unrounded(bf16_checkpoint, process):
    policy = load_policy(bf16_checkpoint, torch.bfloat16, process)
    batch = collate(MicroBatch((0,)), EXAMPLES, [0])
    batch.ref_logps_N.fill_(-123.456)
    batch.weights_N.fill_(0.3)
    ratio_S, logps_N, *_ = policy(batch)
    assert logps_N.dtype == torch.float32
    terms = 0.3 * (logps_N.double() + 123.456)
    expected_S = torch.stack([part.sum() for part in terms.split(batch.seq_lens_S.tolist())])
    torch.testing.assert_close(ratio_S.double(), expected_S, rtol=1e-5, atol=0)


def test_parameters_stay_sharded_after_an_evaluation(toy_model, process):
    policy = load_policy(toy_model, torch.bfloat16, process)
    with torch.no_grad():
        policy(collate(MicroBatch((0,)), EXAMPLES, [0]))
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())


def test_padding_and_grouping_change_nothing(toy_model, process):
    policy = load_policy(toy_model, torch.float32, process).double()
    with InDouble():
        together = policy(collate(MicroBatch((0, 1, 2)), EXAMPLES, [0, 1, 2])).logps_N
        apart = torch.cat([policy(collate(MicroBatch((pair,)), EXAMPLES, [0, 1, 2])).logps_N for pair in (0, 1, 2)])
    assert_exact(together, apart)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_every_architecture_are_read_in_shards_and_written(name, tmp_path, process):
    """Also those whose tensors have other names in the file than in the model (the head of GPT-NeoX)."""
    build(name, "eager").save_pretrained(tmp_path / "source")
    inputs = [np.arange(3, 23, dtype=np.int32), np.arange(3, 13, dtype=np.int32)]
    outputs = []
    for load in (load_judge, load_sharded_judge):
        capture = JudgeCapture(pack([inputs]), frozenset([1]))
        with torch.no_grad():
            outputs.append([*load(tmp_path / "source", torch.float32, process.device)(capture, True), *capture.rows[1]])
    assert all(torch.equal(*both) for both in zip(*outputs))
    policy = load_policy(tmp_path / "source", torch.float32, process)
    export_model(tmp_path / "export", policy, byte_level(), tmp_path / "source", "", process)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
                     for folder in ("source", "export"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_the_trunk_alone_is_read(tmp_path, process):
    """As GPT-2's: its head is the embedding, and the names lack the trunk's prefix."""
    model = build("gpt2", "eager")
    model.transformer.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, torch.float32, process)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole(policy.model.get_parameter(name))), name


def test_checkpoint_of_another_shape_is_an_input_error(bf16_checkpoint, tmp_path, process):
    shutil.copytree(bf16_checkpoint, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    with pytest.raises(InputError, match="don't match"):
        load_policy(tmp_path / "model", torch.float32, process)


@pytest.fixture
def change_tensors(bf16_checkpoint, tmp_path):
    """A copy of the checkpoint with tensors changed."""
    def change(function) -> Path:
        shutil.copytree(bf16_checkpoint, tmp_path / "model")
        path = tmp_path / "model/model.safetensors"
        tensors = load_file(path)
        function(tensors)
        save_file(tensors, path, {"format": "pt"})
        return tmp_path / "model"
    return change


UP = "model.layers.1.mlp.up_proj.weight"


LOADS = (lambda directory, process: load_judge(directory, torch.float32, process.device),
         lambda directory, process: load_sharded_judge(directory, torch.float32, process.device),
         lambda directory, process: load_policy(directory, torch.float32, process))


@pytest.mark.parametrize("load", LOADS, ids=["judge", "sharded judge", "policy"])
@pytest.mark.parametrize("function, message", [
    (lambda tensors: tensors.pop(UP), f"missing, {UP} among them"),
    (lambda tensors: tensors.update({UP: tensors[UP][:-1].contiguous()}), "size|shape|is \\[47, 32\\] in the file"),
])
def test_a_tensor_that_is_missing_or_has_another_shape_is_an_input_error(load, function, message, change_tensors,
                                                                        process):
    directory = change_tensors(function)
    with pytest.raises(InputError, match=message):
        load(directory, process)


def test_only_the_checkpoint_s_own_files_and_names_are_read(bf16_checkpoint, change_tensors, process):
    directory = change_tensors(lambda tensors: tensors.update({"norm.weight": torch.ones(32)}))
    stray = {name: torch.zeros_like(tensor) for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(stray, directory / "aa_old.safetensors")
    (directory / "training_args.safetensors").write_bytes(b"no tensors")
    expected = AutoModelForCausalLM.from_pretrained(bf16_checkpoint, dtype=torch.float32).state_dict()
    for load in LOADS:
        for name, parameter in load(directory, process).model.named_parameters():
            assert torch.equal(whole(parameter), expected[name]), name


def test_quantised_checkpoints_and_odd_indices_are_input_errors(bf16_checkpoint, change_tensors, tmp_path, process):
    directory = change_tensors(lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}))
    with pytest.raises(InputError, match="is stored as F8_E4M3"):
        load_policy(directory, torch.float32, process)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InputError, match="quantization_config"):
        load_policy(directory, torch.float32, process)
    shutil.copytree(bf16_checkpoint, tmp_path / "index")
    (tmp_path / "index/model.safetensors").unlink()
    for text in ("{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": null}}'):
        (tmp_path / "index/model.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match="names no file by tensor|it may name .safetensors"):
            load_policy(tmp_path / "index", torch.float32, process)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_checkpoint_may_hold_either_name_or_both(kept, toy_model, tmp_path, process):
    shutil.copytree(toy_model, tmp_path / "model")
    tensors = load_file(toy_model / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    path = tmp_path / "model/model.safetensors"
    save_file(tensors | {kept: embedding}, path, {"format": "pt"})
    for load in LOADS[1:]:
        head = load(tmp_path / "model", process).model.get_output_embeddings()
        assert torch.equal(whole(head.weight), embedding)
    save_file(tensors | {"lm_head.weight": embedding * 2, "model.embed_tokens.weight": embedding}, path,
              {"format": "pt"})
    for load in LOADS[1:]:
        with pytest.raises(InputError, match="ties lm_head.weight to model.embed_tokens.weight"):
            load(tmp_path / "model", process)


def test_a_checkpoint_in_several_files_is_read(bf16_checkpoint, tmp_path, process):
    model = AutoModelForCausalLM.from_pretrained(bf16_checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for load in LOADS:
        for name, parameter in load(tmp_path, process).model.named_parameters():
            assert torch.equal(whole(parameter), model.get_parameter(name).float()), name


def test_model_folder_errors_say_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        locate_model(str(tmp_path), "--model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no model.safetensors and no model.safetensors.index.json"):
        locate_model(str(tmp_path), "--model")


def test_lengths_past_the_context(toy_model):
    config = load_model_config(toy_model)
    assert check_length("--x", 512, config) == ""
    assert "513" in check_length("--x", 513, config)  # rotary: a warning
    from transformers import GPT2Config
    with pytest.raises(InputError, match="1025"):
        check_length("--x", 1025, GPT2Config())


WITH_PLAIN_RMS_NORMS = {"llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 13, "phi3": 7, "gpt_oss": 7, "olmo2": 13}


@pytest.mark.parametrize("name", MODELS)
def test_fused_norms_compute_what_the_model_s_own_do(name):
    """In fp64, with weights that are not 1; norms that compute something else (Gemma's 1 + weight) stay."""
    models = [build_double(name, ATTENTION_NAME) for _ in range(2)]
    for model in models:
        for parameter in (module.weight for module in model.modules() if type(module).__name__.endswith("RMSNorm")):
            parameter.data.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    use_fused_norms(models[1])
    fused = [module for module in models[1].modules() if type(module) is torch.nn.RMSNorm]
    assert len(fused) == WITH_PLAIN_RMS_NORMS.get(name, 0)
    assert list(models[1].state_dict()) == list(models[0].state_dict())
    ids = torch.arange(24).view(2, 12)
    with InDouble(), torch.no_grad():
        assert_exact(*(model(ids, use_cache=False).logits for model in reversed(models)))


def test_the_plan_counts_what_fused_norms_keep():
    """As a fused kernel keeps it: what came in, and a number a token. Plain torch keeps copies in fp32."""
    norm = torch.nn.RMSNorm(512, device="meta", dtype=torch.bfloat16)
    hidden = torch.empty(1, 100, 512, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with FusedKernels(), LiveBytes([norm.weight, hidden]) as tally:
        output = norm(hidden)
        assert output.shape == hidden.shape and tally.live == 100 * 512 * 2 + 100 * 4
        output.backward(torch.empty_like(output))
    assert hidden.grad.shape == hidden.shape and norm.weight.grad.shape == (512,)
