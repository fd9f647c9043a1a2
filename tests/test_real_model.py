"""benchmarks/gguf_model.py against transformers on a tiny random Llama; real_model.py with the toy in its place."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gguf_model
import real_model

TEMPLATE = "{% for turn in messages %}<|im_start|>{{ turn['role'] + '\n' + turn['content'] }}<|im_end|>\n{% endfor %}"
TEXT = "In 2024, it's 10%  of\n\nthe thing, naïve"


# --- gguf_model.py


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q and k as llama.cpp's converter stores them: row 0 of a head, row 0 of its second half, row 1, ..."""
    heads = weight.view(num_heads, 2, -1, weight.shape[1])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(weight.shape)


def tiny_llama(is_tied: bool, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4}, tie_word_embeddings=is_tied, bos_token_id=1,
        eos_token_id=2)).eval()


def byte_tokens() -> list[str]:
    """Byte-level BPE's letters for all 256 bytes, and the start of a vocabulary around them."""
    from tokenizers.pre_tokenizers import ByteLevel
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "Ġth", "the", "20"]


def write_gguf(gguf, path: Path, model: LlamaForCausalLM, pre: str = "smollm") -> None:
    """The model as llama.cpp has it: fp32, fp16 (v), Q8_0 (feed-forward), which the model itself is rounded to."""
    config, tokens = model.config, byte_tokens()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "Ġ th", "th e", "2 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {other: own for own, other in (gguf_model.NAMES | gguf_model.OUTER_NAMES).items()}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        place = name.removesuffix(".weight").removeprefix("model.layers.")
        layer, _, rest = place.partition(".")
        stored_name = f"blk.{layer}.{names[rest]}.weight" if layer.isdigit() else f"{names[place]}.weight"
        if "mlp" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)))
            writer.add_tensor(stored_name, data, raw_dtype=kind)
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(rest.split(".")[-1])
        data = (interleaved(parameter, heads) if heads else parameter).numpy()
        if "v_proj" in name:
            data = data.astype(np.float16)
            parameter.copy_(torch.from_numpy(data.astype(np.float32)))
        writer.add_tensor(stored_name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("is_tied", [True, False])
@torch.no_grad()
def test_the_folder_has_the_files_logits_and_its_tokenizer(is_tied, gguf, tmp_path):
    model = tiny_llama(is_tied, len(byte_tokens()))
    write_gguf(gguf, tmp_path / "model.gguf", model)
    gguf_model.write_folder(tmp_path / "model.gguf", tmp_path / "out")
    made, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert torch.equal(made(ids).logits, model(ids).logits) and made.config.tie_word_embeddings == is_tied
    assert tokenizer.tokenize("the 20, <|im_end|>") == ["the", "Ġ", "2", "0", ",", "Ġ", "<|im_end|>"]
    assert tokenizer.decode(ids[0]) == TEXT and tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2) == (made.generation_config.bos_token_id,
                                                                          made.generation_config.eos_token_id)


def test_a_wheel_holds_the_file(gguf, tmp_path, monkeypatch, capsys):
    write_gguf(gguf, tmp_path / "model.gguf", tiny_llama(True, len(byte_tokens())))
    with zipfile.ZipFile(tmp_path / "model.whl", "w") as wheel:
        wheel.write(tmp_path / "model.gguf", "package/model.gguf")
    gguf_model.main([str(tmp_path / "model.whl"), "--out", str(tmp_path / "out")])
    assert "What is the capital of France? " in capsys.readouterr().out and (tmp_path / "out/config.json").exists()
    with pytest.raises(SystemExit):
        gguf_model.main([str(tmp_path / "model.whl"), "--out", str(tmp_path / "out")])
    assert "is not empty" in capsys.readouterr().err


def test_what_is_not_known_is_refused(gguf, tmp_path):
    write_gguf(gguf, tmp_path / "model.gguf", tiny_llama(True, len(byte_tokens())), pre="llama-bpe")
    with pytest.raises(SystemExit, match="the file's tokenizer is of the kind .*'llama-bpe'"):
        gguf_model.write_folder(tmp_path / "model.gguf", tmp_path / "out")
    metadata, tensors = gguf_model.read_gguf(tmp_path / "model.gguf")
    with pytest.raises(SystemExit, match="a model of the kind 'gemma'"):
        gguf_model.make_config(metadata | {"general.architecture": "gemma"}, True)
    with pytest.raises(SystemExit, match=r"a tensor rope_freqs\.weight"):
        gguf_model.rename(tensors | {"rope_freqs.weight": tensors["output_norm.weight"]}, tiny_llama(True, 9).config)


def test_without_the_package_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        gguf_model.read_gguf(tmp_path / "model.gguf")


# --- real_model.py


def test_kinds_of_tokens_by_hand():
    """Letters of a word are of its kind, spaces before it aside; a token of white space alone is none of the words."""
    text = "The cat, isn't 7\n"
    spans = np.array([(0, 3), (3, 5), (5, 7), (7, 8), (8, 12), (12, 14), (14, 16), (16, 17), (17, 17)])
    assert [real_model.KINDS[kind] for kind in real_model.kinds_of_tokens(text, spans)] == [
        "stop", "content", "content", "punctuation", "stop", "stop", "other", "other", "other"]


@pytest.fixture
def run(run_pairs, tmp_path, capsys):
    """main(flags) with the toy and its pairs -> the last line."""
    def call(*flags: str) -> dict:
        real_model.main(["--model", "toy", "--pairs", str(run_pairs), "--judge-prompt", "short", "--train", "8",
                         "--held-out", "4", "--steps", "2", "--eval-every", "1", "--max-length", "100",
                         "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"), *flags])
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return call


def test_the_toy_in_place_of_a_real_model(run, tmp_path, monkeypatch):
    report = run("--arms", "dpo")
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert report["pairs"] == {"in the file": 19, "that fit": 18, "train": 8, "held_out": 4}  # one is too long
    judge = report["judge"]
    assert [row["layer"] for row in judge["layers"]] == ["1", "2"] == list(judge["kinds"]["weights"])
    for shares in (judge["kinds"]["tokens"], *judge["kinds"]["weights"].values()):
        assert sum(shares.values()) == pytest.approx(1)
    assert judge["verdicts"]["position consistency"]["of"] == 12 and judge["seconds_a_pair"] > 0
    monkeypatch.setattr(real_model.extract, "main", lambda argv: pytest.fail("the judge's part is finished"))
    more = run("--arms", "dpo,twdpo")
    assert more["judge"] == judge and more["arms"]["dpo"] == report["arms"]["dpo"]
    for arm in more["arms"].values():
        assert [row["step"] for row in arm["evaluations"]] == [0, 1, 2]
    text = real_model.markdown(more)
    assert text.count("\n| `twdpo`, ") == 2 and "| share of the tokens |" in text
    accuracy = more["arms"]["twdpo"]["evaluations"][2]["reward_accuracy"]
    gained = [odds > start for odds, start in zip(more["arms"]["twdpo"]["odds"], more["start"])]
    assert accuracy == sum(gained) / 4  # of the model that was saved
    (line,) = [line for line in text.splitlines() if line.startswith("| `twdpo`, accuracy")]
    assert line.split(" | ")[3].startswith(f"{accuracy:.3f} ± ")


def test_the_difference_is_of_the_policy_as_it_was_trained(run, toy_model, tmp_path):
    """A model in bf16: its arms are saved in fp32, as otherwise most of what few steps have moved is rounded away."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(toy_model, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy_model).save_pretrained(folder)
    report = run("--model", str(folder), "--arms", "dpo")
    arm, start = report["arms"]["dpo"], np.array(report["start"])
    margin = arm["evaluations"][-1]["reward_margin"] / report["settings"]["beta"]
    assert (np.array(arm["odds"]) - start).mean() == pytest.approx(margin, rel=0.05)


def test_the_difference_by_hand():
    """Right of four pairs: the first two, and the first and the last two; +1 of 4, deviations -1/4, -5/4, 3/4, 3/4."""
    report = {"start": [0.0, 1.0, 2.0, -1.0], "arms": {"dpo": {"odds": [1.0, 2.0, 1.0, -2.0]},
                                                       "twdpo": {"odds": [0.5, 0.5, 2.5, 0.0]}}}
    half = 1.96 * ((1 + 25 + 9 + 9) / 16 / 3) ** 0.5 / 2
    assert f"`twdpo` less `dpo` +0.250 ± {half:.3f}." in real_model.describe_difference(report)
    assert real_model.describe_difference(report | {"arms": {"dpo": report["arms"]["dpo"]}}) == ""


def test_too_few_pairs_and_unknown_arms_are_one_message(run, capsys):
    with pytest.raises(SystemExit, match="0 of the 19 pairs"):
        run("--max-length", "16")
    with pytest.raises(SystemExit, match="error: .*/nowhere"):
        run("--model", "/nowhere")
    with pytest.raises(SystemExit):
        run("--arms", "dpo,ipo")
    assert "--arms has 'ipo': choose from dpo, twdpo, consistent" in capsys.readouterr().err
