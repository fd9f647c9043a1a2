"""The embedded default: deterministic, planted as documented, loadable."""

import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twdpo.toy.grammar import (
    FILLER_STARTS,
    KINDS,
    POLITE,
    RUDE,
    SLOT_WORDS,
    TONE_FRAMES,
    TOPIC_FRAMES,
    TOPICS,
    UNSEEN_QUESTIONS,
    all_prompts,
    all_sentences,
    draw_row,
    is_good,
    kind_of,
    planted_spans,
    toy_rows,
)
from twdpo.toy.train import build_toy_model


def test_rows_are_deterministic_and_leave_random_state_alone():
    state = random.getstate()
    assert toy_rows() == toy_rows()
    assert random.getstate() == state


def test_no_prompt_and_no_skeleton_occurs_in_two_rows():
    rows = sum(toy_rows(), [])
    assert len({row["prompt"] for row in rows}) == len(rows)
    skeletons = [{SLOT_WORDS.sub("_", row[side]) for side in ("chosen", "rejected")} for row in rows]
    assert len(set.union(*skeletons)) == sum(map(len, skeletons))


def test_a_pair_shares_its_frames_and_differs_in_what_decides():
    """Good slot words in the chosen answer, as many bad ones in the rejected, in the same frames."""
    kinds = []
    for row in sum(toy_rows(), []):
        words = {side: [row[side][start:stop] for start, stop in planted_spans(row[side])]
                 for side in ("chosen", "rejected")}
        frames = {side: {frame for frame in TONE_FRAMES + TOPIC_FRAMES
                         if any(frame.format(slot=word) in row[side] for word in words[side])} for side in words}
        assert frames["chosen"] == frames["rejected"] and len(frames["chosen"]) == len(words["chosen"])
        assert len(words["chosen"]) == len(words["rejected"]) in (1, 2)
        kinds.append(kind_of(row["chosen"]))
        assert kind_of(row["rejected"]) == kinds[-1]
        if kinds[-1] == "tone":
            assert {*words["chosen"]} <= {*POLITE} and {*words["rejected"]} <= {*RUDE}
        else:
            own = next(nouns for nouns in TOPICS.values() if any(noun in row["prompt"] for noun in nouns))
            assert {*words["chosen"]} <= {*own} and not {*words["rejected"]} & {*own}
            assert not any(word in row["prompt"] for word in words["chosen"])  # nothing to copy
    assert kinds.count("tone") == kinds.count("topic")


def test_neither_length_nor_filler_tells_which_is_chosen():
    """Chosen answers are neither longer nor shorter, beyond chance."""
    longer = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in sum(toy_rows(), [])]
    wins, losses = sum(each > 0 for each in longer), sum(each < 0 for each in longer)
    assert abs(wins - losses) < 3 * (wins + losses) ** 0.5 and wins + losses > len(longer) / 2


def test_slot_words_are_single_tokens_and_answers_have_their_length(toy_model):
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    assert len(tokenizer) <= 1024
    for word in (*POLITE, *RUDE, *sum(TOPICS.values(), ())):
        assert len(tokenizer(" " + word).input_ids) == 1, word
    lengths = [len(tokenizer(row[side]).input_ids) for row in sum(toy_rows(), []) for side in ("chosen", "rejected")]
    assert 10 <= min(lengths) and max(lengths) <= 63


def test_filler_that_leans_goes_with_the_preference_as_often_as_it_says():
    """Nine in ten filler sentences of chosen answers begin as the first half do, of rejected ones as the second half;
    nothing else of the grammar changes, and no answer says one thing twice."""
    rng, prompts, counts = random.Random(0), all_prompts(), {"chosen": [], "rejected": []}
    for number in range(600):
        row = draw_row(rng, prompts[number], KINDS[number % 2], lean=0.9)[1]
        for side, halves in counts.items():
            starts = [place for place, start in enumerate(FILLER_STARTS) if start in row[side]]
            assert 1 <= len(starts) == sum(row[side].count(start) for start in FILLER_STARTS) <= 3
            assert {*row[side].replace(". ", ".|").split("|")} <= {*all_sentences()}
            halves += [place < len(FILLER_STARTS) // 2 for place in starts]
    shares = {side: sum(halves) / len(halves) for side, halves in counts.items()}
    assert abs(shares["chosen"] - 0.9) < 0.04 and abs(shares["rejected"] - 0.1) < 0.04  # 4 standard errors


def test_what_is_good_follows_the_prompt():
    prompt = "What is the tide and what is the sail?"
    assert is_good("wise", prompt) and is_good("anchor", prompt) and is_good("tide", prompt)
    assert not is_good("foolish", prompt) and not is_good("oven", prompt)
    unseen = all_prompts(UNSEEN_QUESTIONS)
    assert len(set(unseen)) == len(unseen) and not {*unseen} & {*all_prompts()}


def test_frames_have_one_slot():
    assert all(frame.count("{slot}") == 1 for frame in TONE_FRAMES + TOPIC_FRAMES)


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
