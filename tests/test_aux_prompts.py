"""--aux-prompts: pairs behind a text, by template; one model's log-probs behind two texts, as a source reads them."""

import json
import shutil

import numpy as np
import pytest
import torch
from processes_of_tests import run_ranks
from runs_of_tests import assert_close_rows, read_rows
from templates_of_tests import TEMPLATES, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from twdpo import needs
from twdpo.aux_prompts import add_prompt, prompted_examples, read_aux_prompts
from twdpo.chat import Chat
from twdpo.flags import InputError
from twdpo.pairs import Pair
from twdpo.tokens import tokenize_pairs

TEXT = "Be good, fox."
UNPRINTED = ("gemma", "mistral")  # templates that refuse, or leave out, a system turn


def make_pair(*turns: tuple[str, str], chosen: str = "yes.", extras: str = "") -> Pair:
    return Pair(turns, chosen, "no!", "pairs.jsonl:1", extras)


def chat_of(name: str) -> Chat:
    return Chat(byte_tokenizer(TEMPLATES[name], True))


def behind(chat: Chat, pair: Pair, process, lengths=(1000, 999), text: str = TEXT):
    """(the pair's example, the one behind the text, reasons why there is none)."""
    examples, bad, _ = tokenize_pairs(chat, [pair], *lengths)
    assert not bad
    made, bad = prompted_examples(chat, examples, text, False, process, "test")
    return examples[0], made.get(pair.key), [row.reason for row in bad]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_printed_and_the_answers_are_the_same_tokens(name, process):
    """As a system turn, or before the first user turn's text: once, and the rest of the prompt as it was."""
    for turns in ([("user", "What?")], [("user", "What?"), ("assistant", "dog"), ("user", "Why?")],
                  [("system", "Be lazy."), ("user", "What?")]):
        if name == "gemma" and turns[0][0] == "system":
            continue  # such rows are bad ones without a text too
        chat = chat_of(name)
        own, made, bad = behind(chat, make_pair(*turns), process)
        assert not bad
        for side in ("chosen", "rejected"):
            assert getattr(made, side) is getattr(own, side)
        prompts = [chat.tokenizer.decode(example.prompt_ids) for example in (own, made)]
        if turns[0][0] == "user":
            expected = [("user", f"{TEXT}\n\nWhat?"), *turns[1:]] if name in UNPRINTED else [("system", TEXT), *turns]
        elif name in UNPRINTED:
            expected = [turns[0], ("user", f"{TEXT}\n\nWhat?")]
        else:
            expected = [("system", f"{TEXT}\n\nBe lazy."), *turns[1:]]
        messages = [{"role": role, "content": text} for role, text in [*expected, ("assistant", "yes.")]]
        assert chat.tokenizer.apply_chat_template(messages, tokenize=False).startswith(prompts[1])
        assert TEXT not in prompts[0] and prompts[1].count(TEXT) == 1


def test_the_text_goes_into_the_users_turn_with_fold_system():
    pair = make_pair(("user", "What?"))
    assert add_prompt(chat_of("chatml"), pair, TEXT, True).messages == (("user", f"{TEXT}\n\nWhat?"),)


@pytest.mark.parametrize("name, fold, said", [("chatml", False, ""), ("chatml", True, "as --fold-system asks"),
                                              ("mistral", False, "as the chat template prints no system turn")])
def test_where_the_text_goes_is_said(name, fold, said, process, capsys):
    examples, _, _ = tokenize_pairs(chat_of(name), [make_pair(("user", "What?"))], 1000, 900)
    prompted_examples(chat_of(name), examples, TEXT, fold, process, "tokenise positive")
    line = f"tokenise positive: 1 of 1 pairs have the text before their first user turn's, {said}\n"
    assert capsys.readouterr().out == (line if said else "")


def test_what_turns_hold_beside_their_texts_moves_with_them():
    """The turn of a call of tools is one later behind a system turn."""
    call = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "fox"}}}]}
    turns = [("user", "What?"), ("assistant", ""), ("tool", "a fox"), ("user", "Why?")]
    pair = make_pair(*turns, extras=json.dumps({"turns": {"1": call}}))
    led = add_prompt(chat_of("qwen2.5"), pair, TEXT, False)
    assert led.messages[0] == ("system", TEXT) and led.to_row()["prompt"][2]["tool_calls"] == call["tool_calls"]
    assert led.to_row()["prompt"][1:] == pair.to_row()["prompt"]


def test_a_pair_without_a_turn_that_takes_the_text_is_a_bad_row(process):
    examples, _, _ = tokenize_pairs(chat_of("mistral"), [make_pair(("system", "Be lazy."))], 100, 99)
    made, (bad,) = prompted_examples(chat_of("mistral"), examples, TEXT, False, process, "test")
    assert not made and bad.row == examples[0].pair.to_row() and "no user turn can take the text" in bad.reason


def test_answers_that_become_other_tokens_are_a_bad_row(process):
    """A template that speaks of its system turn in the answer's."""
    template = TEMPLATES["chatml"].replace("{{ m.content }}<|im_end|>", "{{ m.content }}{{ ' Well.' if m.role == "
                                           "'assistant' and messages[0].role == 'system' }}<|im_end|>")
    _, made, (reason,) = behind(Chat(byte_tokenizer(template, True)), make_pair(("user", "What?")), process)
    assert made is None and "its answers are other tokens" in reason


def test_a_long_prompt_is_cut_as_in_training_and_the_text_is_whole(process):
    """Nor does it take tokens from the answers, which training has cut."""
    chat, question = chat_of("chatml"), "the lazy dog and " * 40
    pair = make_pair(("user", question), chosen="The quick brown fox. " * 40)
    own, made, _ = behind(chat, pair, process, (64, 40))
    assert own.prompt_is_cut and own.chosen.is_cut and len(own.prompt_ids) == 40 and made.chosen is own.chosen
    text = chat.tokenizer.decode(made.prompt_ids)
    assert text.startswith(f"<|im_start|>system\n{TEXT}<|im_end|>\n")
    whole, led = (behind(chat, pair, process)[place].prompt_ids for place in (0, 1))
    assert len(led) - len(made.prompt_ids) == len(whole) - 40
    assert made.prompt_ids[-40:].tolist() == own.prompt_ids.tolist()


@pytest.fixture
def prompts(tmp_path) -> str:
    """Two files."""
    (tmp_path / "good.txt").write_text("Answer kindly, please.\n")
    (tmp_path / "bad.txt").write_text("No.")
    return f"{tmp_path / 'good.txt'},{tmp_path / 'bad.txt'}"


@pytest.mark.parametrize("is_named", [False, True], ids=["the start", "named"])
def test_log_probs_are_those_behind_either_text(is_named, tmp_path, run_arguments, toy_model, prompts, monkeypatch):
    """Of the policy's start or of the model of --aux-model: against plain forwards over conversations that the template
    prints with a system turn."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy_model), AutoTokenizer.from_pretrained(toy_model)
    if is_named:
        shutil.copytree(toy_model, tmp_path / "other")
        for parameter in model.parameters():
            parameter.data *= 0.5
        model.save_pretrained(tmp_path / "other")
    seen, original = [], needs.prompted_logps

    def record(*given):
        seen.append((given[2], original(*given)))
        return seen[-1][1]
    monkeypatch.setattr(needs, "prompted_logps", record)
    train.main(run_arguments(tmp_path / "run", loss="dpo", weights="tis", aux_prompts=prompts, max_steps=1,
                             **({"aux_model": tmp_path / "other"} if is_named else {})))
    (examples, logps), = seen
    for example in examples[:4]:
        for name, text in (("positive", "Answer kindly, please."), ("negative", "No.")):
            messages = [{"role": "system", "content": text}, *example.pair.to_row()["prompt"]]
            prompt = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
                               add_special_tokens=False).input_ids
            for response, ours in zip((example.chosen, example.rejected), logps[name][example.pair.key]):
                ids = torch.tensor([*prompt, *response.ids.tolist()])
                with torch.no_grad():
                    logps_TV = model(ids[None]).logits[0].log_softmax(-1)
                expected = logps_TV[len(prompt) - 1:-1].gather(1, ids[len(prompt):, None])[:, 0]
                np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)


def test_what_is_cached_needs_no_model_and_another_text_does(tmp_path, run_arguments, prompts, monkeypatch):
    flags = {"loss": "dpo", "weights": "tis", "aux_prompts": prompts, "max_steps": 1, "cache_dir": tmp_path / "cache"}
    train.main(run_arguments(tmp_path / "run", **flags))
    monkeypatch.setattr("twdpo.logps.load_policy", None)
    train.main(run_arguments(tmp_path / "again", **flags))
    assert read_rows(tmp_path / "again") == read_rows(tmp_path / "run")
    (tmp_path / "bad.txt").write_text("No!")
    with pytest.raises(TypeError, match="NoneType"):
        train.main(run_arguments(tmp_path / "changed", **flags))


def test_two_equal_texts_are_no_contrast(tmp_path, run_arguments, prompts):
    """Importance 1 everywhere: DPO."""
    flags = {"loss": "dpo", "max_steps": 2}
    train.main(run_arguments(tmp_path / "dpo", weights="uniform", **flags))
    good = prompts.split(",")[0]
    train.main(run_arguments(tmp_path / "tis", weights="tis", aux_prompts=f"{good},{good}", **flags))
    assert read_rows(tmp_path / "tis") == read_rows(tmp_path / "dpo")


def test_packed_plain_and_accumulated_are_one_run(tmp_path, run_arguments, prompts):
    flags = {"loss": "simpo", "weights": "sepo", "aux_prompts": prompts, "weights_options": "k=0.5"}
    for name, more in (("packed", {"packing": "on", "micro_batch_tokens": 100_000}), ("plain", {"packing": "off"}),
                       ("accumulated", {"packing": "on", "micro_batch_tokens": 150})):
        train.main(run_arguments(tmp_path / name, **flags, **more))
    for name in ("plain", "accumulated"):
        assert_close_rows(read_rows(tmp_path / name), read_rows(tmp_path / "packed"))


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, run_arguments, prompts):
    flags = {"loss": "dpo", "weights": "tis", "aux_prompts": prompts, "micro_batch_tokens": 250}
    train.main(run_arguments(tmp_path / "one", **flags, cache_dir=tmp_path / "a"))
    run_ranks("train", run_arguments(tmp_path / "two", **flags, cache_dir=tmp_path / "b"))
    assert_close_rows(read_rows(tmp_path / "two"), read_rows(tmp_path / "one"))


def test_a_resume_goes_on_with_the_same_texts_alone(tmp_path, run_arguments, prompts, capsys):
    argv = run_arguments(tmp_path / "run", loss="dpo", weights="tis", aux_prompts=prompts, save_every=2)
    train.main(argv)
    rows = read_rows(tmp_path / "run")
    train.main([*argv, "--resume", str(tmp_path / "run/checkpoints/step-0000004")])
    assert read_rows(tmp_path / "run") == rows
    (tmp_path / "bad.txt").write_text("Never.")
    with pytest.raises(SystemExit):
        train.main([*argv, "--resume"])
    assert "the texts of --aux-prompts" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--weights", "tis", "--aux-prompts", "GOOD"], "it takes two text files, POSITIVE,NEGATIVE"),
    (["--weights", "tis", "--aux-prompts", "GOOD,nowhere.txt"], "--aux-prompts nowhere.txt: it can't be read"),
    (["--weights", "tis", "--aux-prompts", "GOOD,EMPTY"], "it is empty"),
    (["--weights", "tis", "--aux-prompts", "GOOD,MARK"], "it spells the special token '<|user|>'"),
    (["--weights", "tis", "--aux-prompts", "GOOD,GOOD", "--aux-model", "TOY,TOY"], "compares two prompts of one model"),
    (["--weights", "uniform", "--aux-prompts", "GOOD,GOOD"], "--aux-prompts GOOD,GOOD is given, but the weight source"),
    (["--weights", "cdpo", "--aux-prompts", "GOOD,GOOD"], "contrasts whole distributions of two models"),
])
def test_bad_input_is_one_message(flags, message, tmp_path, run_arguments, toy_model, capsys):
    for name, text in (("GOOD", "Answer well."), ("EMPTY", " \n"), ("MARK", "a <|user|>")):
        (tmp_path / name).write_text(text)
        flags = [flag.replace(name, str(tmp_path / name)) for flag in flags]
        message = message.replace(name, str(tmp_path / name))
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run"), "--loss", "dpo",
                    *(flag.replace("TOY", str(toy_model)) for flag in flags)])
    assert message in capsys.readouterr().err


def test_texts_with_the_templates_marks_take_no_prompt(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(InputError, match="--templated"):
        read_aux_prompts(f"{tmp_path / 'a'},{tmp_path / 'a'}", Chat(byte_tokenizer(TEMPLATES["chatml"], True), True))


def test_a_text_past_the_models_context_is_said(tmp_path, run_arguments, prompts, capsys):
    (tmp_path / "good.txt").write_text("please " * 600)
    train.main(run_arguments(tmp_path / "run", loss="dpo", weights="tis", aux_prompts=prompts, max_steps=1))
    assert "warning: the longest sequence behind --aux-prompts" in capsys.readouterr().out
