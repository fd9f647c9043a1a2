"""Small tokenizers of the kinds that real models use, built on the spot."""

import errno
import json
import os
import signal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["The quick brown fox jumps over the lazy dog. Question: what? Answer: A or B. Hello there, friend!"] * 3

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
          "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TRIMMED = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>"
           "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PLAIN = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
         "{{ 'User: ' if m.role == 'user' else 'Bot: ' }}{{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}Bot: {% endif %}")


def byte_level(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE: a rare character is several tokens with the same span."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>", "<|eos|>"],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>",
                                   additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=template)


def gemma_like() -> PreTrainedTokenizerFast:
    """Line breaks are tokens of their own, spaces go with the word after them; turn marks have Gemma-3's ids."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<unused{number}>" for number in range(101)), "<start_of_turn>",
                "<end_of_turn>"]
    breaks = ["\n" * number for number in range(1, 8)]
    marked = [text.replace(" ", "\u2581") for text in TEXT]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.train_from_iterator(marked, trainers.BpeTrainer(
        vocab_size=560, special_tokens=[*specials, *breaks, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokenizer = Tokenizer(models.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]], unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in breaks])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    template = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role "
                "}}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
                "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
                                   additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
                                   chat_template=template)


def sentencepiece_like(template: str) -> PreTrainedTokenizerFast:
    """BPE with space marks, one of them before the text, and byte fallback, as in Llama-2."""
    marked = [text.replace(" ", "\u2581") for text in TEXT]
    trainer_model = Tokenizer(models.BPE(unk_token="<unk>"))
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer_model.train_from_iterator(marked, trainers.BpeTrainer(vocab_size=360, special_tokens=specials,
                                                                  show_progress=False))
    model = json.loads(trainer_model.to_str())["model"]
    tokenizer = Tokenizer(models.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]], unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   chat_template=template)


class BrokenChat:
    """Of which nothing can be had, for one reason or another."""

    def __init__(self, kind: str):
        self.kind = kind

    @property
    def templated(self):
        if self.kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left") if self.kind == "full" else ZeroDivisionError("in a worker")
