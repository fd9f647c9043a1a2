"""The embedded default: deterministic, planted as documented, loadable."""

import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twdpo.toy import POLITE, RUDE, TONE_FRAMES, build_toy_model, toy_rows


def test_rows_are_deterministic_and_leave_random_state_alone():
    state = random.getstate()
    assert toy_rows() == toy_rows()
    assert random.getstate() == state


def test_no_prompt_or_skeleton_is_in_both_splits():
    train, test = toy_rows()
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert not {row["chosen"] for row in train} & {row["chosen"] for row in test}


def words(text: str) -> list[str]:
    return text.replace(".", " .").replace(",", " ,").split()


def test_answers_of_a_pair_differ_in_slot_words_only():
    for row in sum(toy_rows(), []):
        chosen, rejected = words(row["chosen"]), words(row["rejected"])
        assert len(chosen) == len(rejected)
        differing = [(good, bad) for good, bad in zip(chosen, rejected) if good != bad]
        assert 1 <= len(differing) <= 2
        assert all(good in POLITE and bad in RUDE for good, bad in differing)


def test_slot_words_are_single_tokens_and_answers_have_their_length(toy_model):
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    assert len(tokenizer) <= 1024
    for word in POLITE + RUDE:
        assert len(tokenizer(" " + word).input_ids) == 1, word
    lengths = [len(tokenizer(row[side]).input_ids) for row in sum(toy_rows(), []) for side in ("chosen", "rejected")]
    assert 10 <= min(lengths) and max(lengths) <= 63


def test_frames_have_one_slot():
    assert all(frame.count("{slot}") == 1 for frame in TONE_FRAMES)


def test_model_is_built_to_the_byte_and_leaves_random_state_alone(toy_model, tmp_path):
    state = torch.get_rng_state()
    build_toy_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    names = sorted(path.name for path in toy_model.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (toy_model / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_model_and_template_load_and_a_turn_ends_with_eos(toy_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy_model), AutoTokenizer.from_pretrained(toy_model)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
                                         tokenize=False)
    assert text == "<|bos|><|user|>hi<|eot|><|assistant|>yo<|eot|>" and tokenizer.eos_token == "<|eot|>"
