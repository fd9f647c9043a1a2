"""What a template does to a pair, over templates of all kinds: prompt, answer, thinking, the end of the turn."""

import numpy as np
import pytest
from templates_of_tests import TEMPLATES, byte_tokenizer
from tokenizers import processors
from tokenizers_of_tests import sentencepiece_like

from twdpo.align import align
from twdpo.batch import collate
from twdpo.chat import THINK, THINK_END, Chat, describe_end
from twdpo.config import TrainConfig
from twdpo.flags import InputError
from twdpo.forms import Reading, parse_row
from twdpo.judge.prompt import JUDGE_PROMPTS, JudgeInputs
from twdpo.objective import find_objective
from twdpo.pairs import Pair, show_question
from twdpo.postprocess import kept_text
from twdpo.printed import Answer, check_templated, print_pair
from twdpo.rows import MicroBatch
from twdpo.tokens import encode, tokenize_pairs
from twdpo.weights import WeightContext

TOKENIZERS = {
    "marks": lambda template: byte_tokenizer(template, True),
    "no marks": lambda template: byte_tokenizer(template, False),
    "sentencepiece": lambda template: sentencepiece_like(template),
}
ANSWERS = {
    "plain": ("yes.", "no!"),
    "a line": ("Sure. \u00e9t\u00e9, a \U0001f980!\nThe fox: 3 < 4", "Lazy dog"),
    "thinking": ("<think>\nhm, so.\n\nWell.\n</think>\n\nyes.", "<think>bad</think>no"),
    "closed": ("hm</think>yes.", "so\n</think>\n\nno"),
    "mixed": ("<think>\nthink\n</think>\n\nyes.", "no."),
    "empty thinking": ("<think>\n\n</think>\n\nyes.", "no."),
}


def pair(chosen: str, rejected: str, *turns: tuple[str, str]) -> Pair:
    return Pair(turns or (("user", "What?"),), chosen, rejected, "pairs.jsonl:1")


def only(chat: Chat, given: Pair, max_length: int = 1000):
    (example,), bad, counts = tokenize_pairs(chat, [given], max_length, max_length - 1)
    assert not bad
    return example, {what for what, count in counts.items() if count}


def render(tokenizer, given: Pair, side: str, next_turn: bool = False) -> str:
    turns = [*given.messages, ("assistant", getattr(given, side)), *[("user", "x")] * next_turn]
    return tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False)


def bare(text: str) -> str:
    """Without white space and marks of thinking, which a template may put elsewhere."""
    return "".join(text.replace(THINK, "").replace(THINK_END, "").split())


@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("tokens", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_the_template_prints(name, tokens, answers):
    tokenizer = TOKENIZERS[tokens](TEMPLATES[name])
    given = pair(*ANSWERS[answers])
    chat = Chat(tokenizer)
    example, _ = only(chat, given)
    (end,) = set(chat.endings.values())
    assert end
    for side, response in (("chosen", example.chosen), ("rejected", example.rejected)):
        answer, ids, spans = getattr(given, side), response.ids, response.spans_N2
        texts = [tokenizer.decode(np.concatenate([example.prompt_ids, ids])),
                 *(render(tokenizer, given, side, next_turn) for next_turn in (False, True))]
        assert bare(texts[0]).endswith(bare(answer[-2:] + end))
        if tokens == "sentencepiece":  # which puts a space before each text that follows a special token
            texts = ["".join(text.split()) for text in texts]
        assert any(text.startswith(texts[0]) for text in texts[1:])
        # Spans cover the answer; content is of the answer alone, up to the token that merges with the turn's end.
        covered = np.zeros(len(answer), dtype=bool)
        for start, stop in spans:
            covered[start:stop] = True
        assert not bare("".join(np.array(list(answer))[~covered]))
        content = tokenizer.decode(ids[response.content_N])
        merged = [answer[start:stop] for start, stop in spans[~response.content_N] if stop > start]
        assert len(merged) <= 1 and bare(content) + "".join(merged) == bare(answer)
        assert bare(answer) == bare("".join(answer[start:stop] for (start, stop), before in
                                            zip(spans, [(-1, -1), *spans.tolist()]) if [start, stop] != before))
        # Mass of any judge tokens is conserved.
        judge_ids, judge_spans = encode(tokenizer, [" " + answer + "\n"])[0]
        mass = np.random.default_rng(0).random(len(judge_ids))
        aligned = align(mass, np.array(judge_ids), np.clip(judge_spans - 1, 0, len(answer)), ids[response.content_N],
                        spans[response.content_N], kept_text(response))
        assert aligned.sum() == pytest.approx(mass.sum())


@pytest.mark.parametrize("name, end", [
    ("llama3", "<|eot_id|>"), ("qwen2.5", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("gemma", "<end_of_turn>"),
    ("phi3", "<|end|>"), ("mistral", "<|eos|>"), ("zephyr", "<|eos|>"), ("chatml", "<|im_end|>"),
    ("alpaca", "\n\n### Instruction:")])
@pytest.mark.parametrize("knows_marks", [True, False])
def test_a_turn_ends_with_the_template_s_own_end(name, end, knows_marks):
    chat = Chat(byte_tokenizer(TEMPLATES[name], knows_marks))
    example, _ = only(chat, pair("yes.", "no!"))
    for response, text in ((example.chosen, "yes."), (example.rejected, "no!")):
        assert chat.tokenizer.decode(response.ids) == text + end
        if knows_marks and name != "alpaca":
            assert (~response.content_N).sum() == 1
    assert describe_end(chat) == f"a turn ends with {end!r}"
    if not knows_marks and name == "gemma":  # `.<` is one token: it belongs to the end, and covers the full stop
        assert chat.tokenizer.decode(example.chosen.ids[example.chosen.content_N]) == "yes"
        assert example.chosen.spans_N2[1].tolist() == [3, 4]


def test_what_ends_generation_ends_a_turn():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }} fox\nfoxes\n{% endfor %}", False)
    (fox,) = tokenizer(" fox").input_ids
    assert only(Chat(tokenizer), pair("a", "b"))[0].chosen.ids[-1] != fox
    assert only(Chat(tokenizer, end_ids=frozenset({fox})), pair("a", "b"))[0].chosen.ids[-1] == fox


def test_an_answer_that_is_one_token_with_the_end_is_tokenised_apart():
    chat = Chat(byte_tokenizer(TEMPLATES["gemma"], False))
    example, counts = only(chat, pair(".", "no!"))
    assert example.chosen.content_N.sum() == 1 and chat.tokenizer.decode(example.chosen.ids) == ".<end_of_turn>"
    assert "answers that merge with the end of the turn, tokenised apart" in counts


def test_a_short_answer_after_an_empty_thinking_block_is_content():
    """Of `.<|im_end|>` in plain text `.<` is one token, and what the template prints before it is no answer."""
    chat = Chat(byte_tokenizer(TEMPLATES["qwen3"], False))
    given = pair(".", "<think>\nhm\n</think>\n\nno")
    example, counts = only(chat, given)
    assert chat.tokenizer.decode(example.chosen.ids) == "<think>\n\n</think>\n\n.<|im_end|>"
    assert chat.tokenizer.decode(example.chosen.ids[example.chosen.content_N]) == "."
    assert "answers that merge with the end of the turn, tokenised apart" in counts
    for length in range(len(example.prompt_ids) + 1, example.longest + 1):
        assert tokenize_pairs(chat, [given], length, len(example.prompt_ids))[0]


def test_thinking_is_trained_whole():
    """Reasoning and rest have exact spans; what the template adds is trained, and is no content."""
    chat = Chat(byte_tokenizer(TEMPLATES["qwen3"], True))
    answer = "hm, so.</think>yes."
    example, _ = only(chat, pair(answer, "no."))
    assert chat.tokenizer.decode(example.prompt_ids).endswith("<|im_start|>assistant\n")
    chosen = example.chosen
    assert chat.tokenizer.decode(chosen.ids) == "<think>\nhm, so.\n</think>\n\nyes.<|im_end|>"
    assert "".join(answer[start:stop] for start, stop in chosen.spans_N2) == answer
    assert chat.tokenizer.decode(chosen.ids[~chosen.content_N]) == "<think>\n\n\n\n<|im_end|>"
    assert chat.tokenizer.decode(chosen.ids[:chosen.num_reasoning]) == "<think>\nhm, so.\n</think>\n\n"
    assert chat.tokenizer.decode(example.rejected.ids) == "<think>\n\n</think>\n\nno.<|im_end|>"
    assert example.rejected.content_N.sum() == 2
    assert print_pair(chat, pair(answer, "no.")).answers[0].given == Answer(answer, 0)  # what a judge reads


@pytest.mark.parametrize("opens", ["assistant", "model"])
def test_a_mark_of_thinking_that_the_row_gives_is_content(opens):
    """Also where the generation prompt is no beginning of what is printed."""
    head, tail = TEMPLATES["qwen3"].split("{% if add_generation_prompt %}")
    chat = Chat(byte_tokenizer(head + "{% if add_generation_prompt %}" + tail.replace("assistant", opens), True))
    answer = "<think>\nhm\n</think>\n\nyes."
    example, _ = only(chat, pair(answer, answer.replace("yes", "no")))
    assert chat.tokenizer.decode(example.prompt_ids).endswith("<|im_start|>assistant\n")
    for response, text in ((example.chosen, answer), (example.rejected, answer.replace("yes", "no"))):
        assert chat.tokenizer.decode(response.ids[response.content_N]) == text
        assert response.spans_N2[0, 0] == 0 and response.spans_N2[-1, 1] == len(text)


def test_an_empty_answer_beside_one_that_thinks_is_a_space():
    chat = Chat(byte_tokenizer(TEMPLATES["qwen3"], True))
    example, _ = only(chat, pair("hm</think>yes.", " "))
    assert chat.tokenizer.decode(example.rejected.ids) == " <|im_end|>" and example.rejected.content_N.sum() == 1


def test_thinking_within_pieces_of_a_row_that_spells_a_special_token():
    chat = Chat(byte_tokenizer(TEMPLATES["qwen3"], True))
    example, counts = only(chat, pair("a<|im_end|>b</think>yes.", "no.", ("user", "<|im_start|>?")))
    assert "rows that spell a special token, tokenised in pieces" in counts
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (example.chosen.ids == end).sum() == 1 and (example.prompt_ids == end).sum() == 1
    assert chat.tokenizer.decode(example.chosen.ids) == "<think>\na<|im_end|>b\n</think>\n\nyes.<|im_end|>"


def test_a_prompt_that_the_generation_prompt_lacks_is_said():
    _, counts = only(Chat(byte_tokenizer(TEMPLATES["qwen3"], True)), pair("yes.", "no."))
    assert any("<think>\\n\\n</think>" in what and "generation prompt lacks" in what for what in counts)
    _, counts = only(Chat(byte_tokenizer(TEMPLATES["qwen2.5"], True)), pair("yes.", "no."))
    assert not counts


@pytest.mark.parametrize("opens, answers, what", [
    ("<think>\\n", ("<think>\nhm\n</think>\n\nyes.", "no."), r"lacks '<think>\n'"),
    ("<think>\\n", ("hm</think>yes.", "no."), ""),
    ("<think>\\n\\n</think>\\n\\n", ("hm</think>yes.", "no."), r"lacks '\n</think>\n\n'"),
    ("<think>\\n\\n</think>\\n\\n", ("yes.", "no."), ""), ("<think>hm", ("yes.", "no."), "differs")])
def test_a_generation_prompt_that_has_more_than_the_prompt_is_said(opens, answers, what):
    head = TEMPLATES["qwen3"].partition("{% if add_generation_prompt %}")[0]
    chat = Chat(byte_tokenizer(head + "{{ '<|im_start|>assistant\\n" + opens + "' if add_generation_prompt }}", True))
    _, counts = only(chat, pair(*answers))
    assert len(counts) == bool(what) and all(f"prompt {what}" in each for each in counts)
    _, counts = only(Chat(byte_tokenizer(TEMPLATES["opened"], True)), pair("yes.", "no."))
    assert [each.partition(",")[0] for each in counts] == ["rows whose prompt lacks '<think>'"]


def test_turns_that_are_not_printed_and_thinking_that_is_left_out_are_said():
    silent = TEMPLATES["chatml"].replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    chat = Chat(byte_tokenizer(silent, True))
    _, counts = only(chat, pair("yes.", "no.", ("system", "What?"), ("user", "What?")))
    (what,) = counts
    assert what.startswith("rows whose turn 1 (system) the chat template does not print (--fold-system")
    drops = TEMPLATES["chatml"].replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    example, counts = only(Chat(byte_tokenizer(drops, True)), pair("hm</think>yes.", "no."))
    assert counts == {"chosen answers of which the chat template leaves out a part, thinking for example"}
    assert example.chosen.spans_N2[0].tolist() == [10, 13]


def test_a_refused_system_turn_names_the_cure():
    given = pair("yes.", "no.", ("system", "be kind"), ("user", "What?"))
    _, bad, _ = tokenize_pairs(Chat(byte_tokenizer(TEMPLATES["gemma"], True)), [given], 100, 50)
    assert "no system role" in bad[0].reason and "--fold-system" in bad[0].reason


@pytest.mark.parametrize("change", ["replace('fox', 'cat')", "replace('. ', '')"])
def test_an_answer_that_is_printed_as_something_else_is_a_bad_row(change):
    template = TEMPLATES["chatml"].replace("{{ m.content }}", "{{ m.content." + change + " + '?' }}")
    _, bad, _ = tokenize_pairs(Chat(byte_tokenizer(template, True)), [pair("a fox. ran", "no")], 100, 50)
    assert "chosen" in bad[0].reason and "not a part of it" in bad[0].reason


def test_calls_of_tools_are_trained_as_the_template_prints_them():
    chat = Chat(byte_tokenizer(TEMPLATES["qwen2.5"], True))
    call = '{"function": {"name": "add", "arguments": {"a": 1}}}'
    extras = f'{{"chosen": {{"tool_calls": [{call}]}}, "turns": {{"1": {{"tool_calls": [{call}]}}}}}}'
    given = Pair((("user", "1+1?"), ("assistant", ""), ("tool", "2")), "", "two", "x:1", extras)
    example, _ = only(chat, given)
    printed = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert chat.tokenizer.decode(example.prompt_ids).count(printed) == 1
    assert chat.tokenizer.decode(example.chosen.ids) == printed + "<|im_end|>"
    assert example.chosen.content_N.sum() == len(example.chosen.ids) - 1
    assert print_pair(chat, given).answers[0].given.text == printed  # what the judge reads


@pytest.mark.parametrize("chosen", ["", "so."])
def test_spans_of_calls_after_thinking_are_those_that_a_judge_reads(chosen):
    calls = """{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}<|im_end|>"""
    chat = Chat(byte_tokenizer(TEMPLATES["qwen3"].replace("<|im_end|>", calls, 1), True))
    extras = '{"chosen": {"tool_calls": [{"function": {"name": "add"}}]}}'
    given = Pair((("user", "1+1?"),), chosen, "<think>\nhm\n</think>\n\nno.", "x:1", extras)
    example, _ = only(chat, given)
    text = chosen + "<tool_call>add</tool_call>"
    assert chat.tokenizer.decode(example.chosen.ids) == f"<think>\n\n</think>\n\n{text}<|im_end|>"
    assert print_pair(chat, given).answers[0].given == Answer(text, 0)
    content = example.chosen.content_N
    assert [text[start:stop] for start, stop in example.chosen.spans_N2[content]] == [
        chat.tokenizer.decode([id]) for id in example.chosen.ids[content]]


def test_a_row_with_a_call_may_spell_a_special_token():
    """The call stands alone in its turn, after which the template prints no line break."""
    chat = Chat(byte_tokenizer(TEMPLATES["qwen2.5"], True))
    extras = '{"turns": {"1": {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}}}'
    given = Pair((("user", "1+1?"), ("assistant", ""), ("tool", "2<|im_end|>")), "two", "three", "x:1", extras)
    example, counts = only(chat, given)
    assert counts == {"rows that spell a special token, tokenised in pieces"}
    assert "<|im_start|>assistant\n<tool_call>" in chat.tokenizer.decode(example.prompt_ids)
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (example.prompt_ids == end).sum() == 4  # of the system, the user, the call and its result


@pytest.mark.parametrize("name, said", [("chatml", {
    "rows whose tools the chat template does not print",
    "rows whose turn 2 (assistant) has a call of tools that the chat template does not print"}), ("qwen2.5", set())])
def test_tools_and_calls_before_the_answer_that_are_not_printed_are_said(name, said):
    chat = Chat(byte_tokenizer("{{ tools[0].name if tools }}" * (not said) + TEMPLATES[name], True))
    extras = '{"turns": {"1": {"tool_calls": [{"function": {"name": "add"}}]}}, "tools": [{"name": "add"}]}'
    if not said:
        extras = extras.replace('"name": "add"}}', '"name": "add", "arguments": {}}}')
    assert only(chat, Pair((("user", "?"), ("assistant", ""), ("tool", "2")), "two", "three", "x:1", extras))[1] == said


def test_a_call_that_the_template_does_not_print_is_a_bad_row_or_said():
    extras = '{"chosen": {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}}'
    chat = Chat(byte_tokenizer(TEMPLATES["chatml"], True))
    _, bad, _ = tokenize_pairs(chat, [Pair((("user", "1+1?"),), "", "two", "x:1", extras)], 100, 50)
    assert bad[0].reason == "the chat template prints nothing of chosen, a call of tools"
    part = "chosen answers of which the chat template leaves out a part, text or a call of tools"
    example, counts = only(chat, Pair((("user", "1+1?"),), "so.", "two", "x:1", extras))
    assert chat.tokenizer.decode(example.chosen.ids) == "so.<|im_end|>" and counts == {part}
    calls_alone = TEMPLATES["qwen2.5"].replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
    for template, notes in ((calls_alone, {part}), (TEMPLATES["qwen2.5"], set())):
        given = Pair((("user", "1+1?"),), "so.", "two", "x:1", extras)
        assert only(Chat(byte_tokenizer(template, True)), given)[1] == notes


LLAMA3 = "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize("prompt, before, after", [
    (LLAMA3, HEADER, "<|eot_id|>"), (LLAMA3 + HEADER, "", "<|eot_id|>"), (LLAMA3 + HEADER, "", ""),
    ("[INST] What? [/INST]", " ", "<|eos|>"), ("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", "", "")])
def test_texts_that_are_templated_already(prompt, before, after):
    chat = Chat(byte_tokenizer(TEMPLATES["llama3"], True))
    rows = [pair(f"{before}{answer}{after}", f"{before}no{after}", ("user", prompt)) for answer in ("yes", "sure")]
    rows.append(pair("plain", "text"))
    with pytest.raises(InputError, match=r"2 of 3 rows hold marks.*--templated"):
        check_templated(chat, rows)
    taken = Chat(chat.tokenizer, templated=True)
    assert "1" in check_templated(taken, rows)
    example, _ = only(taken, rows[0])
    text = prompt + before + "yes" + (after or "<|eot_id|>")
    assert chat.tokenizer.decode(np.concatenate([example.prompt_ids, example.chosen.ids])) == text
    assert chat.tokenizer.decode(example.chosen.ids[example.chosen.content_N]).strip() == "yes"
    start, stop = example.chosen.spans_N2[0, 0], example.chosen.spans_N2[-1, 1]
    assert rows[0].chosen[start:stop].strip() == "yes" and (~example.chosen.content_N).sum() == 1
    header = chat.tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    assert (example.prompt_ids == header).sum() == prompt.count("<|start_header_id|>") + bool(before.strip())


def test_templated_texts_without_the_tokenizer_s_bos_are_said():
    chat = Chat(byte_tokenizer(TEMPLATES["chatml"], True), templated=True)
    given = pair("yes<|im_end|>", "no<|im_end|>", ("user", "<|im_start|>user\nWhat?<|im_end|>\n"))
    assert not print_pair(chat, given).notes
    add_bos = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    chat.tokenizer.backend_tokenizer.post_processor = add_bos
    assert Chat(chat.tokenizer, True).opens_with_bos
    assert "do not begin with '<|bos|>'" in print_pair(Chat(chat.tokenizer, True), given).notes[0]


def test_ordinary_texts_are_not_taken_for_templated():
    chat = Chat(byte_tokenizer(TEMPLATES["llama3"], True))
    assert not check_templated(chat, [pair("yes", "no"), pair("a [INST] b", "no"), pair("yes", "maybe")])


@pytest.mark.parametrize("name, answers", [("opened", "thinking"), ("opened", "mixed"), ("qwen3", "mixed")])
def test_packed_rows_hold_the_same_texts(name, answers):
    chat = Chat(byte_tokenizer(TEMPLATES[name], True))
    examples = [only(chat, pair(*ANSWERS[each]))[0] for each in (answers, "plain")]
    batch = collate(MicroBatch((0, 1)), examples, [0, 1], packs=True)
    sequences = [np.concatenate([batch.input_ids_RT[0, first:stop].numpy() for first, stop in pieces])
                 for pieces in batch.ranges]
    expected = [np.concatenate([example.prompt_ids, response.ids]) for example in examples
                for response in (example.chosen, example.rejected)]
    assert [each.tolist() for each in sequences] == [each.tolist() for each in expected]


def test_the_rest_alone_can_be_weighed(process):
    """--weights-options reasoning=off: no weight on thinking, with any source; the rest shares it."""
    chat = Chat(byte_tokenizer(TEMPLATES["qwen3"], True))
    batch = collate(MicroBatch((0,)), [only(chat, pair(*ANSWERS["mixed"]))[0]], [0])
    weighed = {}
    for options in ("", "reasoning=on", "reasoning=off", "gamma=0.5,reasoning=off"):
        config = TrainConfig(model="toy", data="toy", loss="dpo", weights="decay", weights_options=options)
        objective = find_objective(config, process)
        weighed[options] = objective.weigh(batch, WeightContext(config)).weights_N.numpy()
    lengths = batch.seq_lens_S.tolist()
    thinking = np.concatenate([np.arange(num) < response.num_reasoning for num, response in
                               zip(lengths, (batch.examples[0].chosen, batch.examples[0].rejected))])
    assert 0 < thinking.sum() < len(thinking) and (weighed[""] > 0).all()
    assert (weighed["reasoning=on"] == weighed[""]).all()
    assert (weighed["reasoning=off"] == np.where(thinking, 0, weighed[""])).all()
    assert (weighed["gamma=0.5,reasoning=off"] > 0).tolist() == (~thinking).tolist()
    with pytest.raises(InputError, match="reasoning=maybe"):
        find_objective(TrainConfig(model="toy", data="toy", weights_options="reasoning=maybe"), process)


@pytest.mark.parametrize("row, prompt", [
    ({"prompt": LLAMA3, "chosen": HEADER + "yes<|eot_id|>", "rejected": HEADER + "no<|eot_id|>"}, LLAMA3),
    ({"chosen": LLAMA3 + HEADER + "yes<|eot_id|>", "rejected": LLAMA3 + HEADER + "no<|eot_id|>"}, LLAMA3 + HEADER),
    *[({"prompt": beside, "chosen": LLAMA3 + HEADER + "yes<|eot_id|>", "rejected": LLAMA3 + HEADER + "no<|eot_id|>"},
       LLAMA3 + HEADER) for beside in ("What?", LLAMA3, LLAMA3 + HEADER)]])
def test_rows_of_templated_texts(row, prompt):
    chat = Chat(byte_tokenizer(TEMPLATES["llama3"], True), templated=True)
    given = parse_row("x:1", row, Reading(templated=True))
    assert given.messages == (("user", prompt),)
    example, _ = only(chat, given)
    assert chat.tokenizer.decode(example.prompt_ids) == LLAMA3 + HEADER
    assert chat.tokenizer.decode(example.chosen.ids) == "yes<|eot_id|>"
    question, chosen, _ = JudgeInputs(chat, JUDGE_PROMPTS["short"], 1000)._show(given)
    assert question.split() == ["What?"] and chosen.text == "yes"


@pytest.mark.parametrize("row, reason", [
    ({"chosen": "<|im_start|>a", "rejected": "<|im_start|>b"}, "no turn's header in common"),
    ({"prompt": "x", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}, "takes .* as texts|both")])
def test_rows_that_are_no_templated_texts(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row("x:1", row, Reading(templated=True))


def test_tools_and_calls_that_are_not_printed_are_said():
    calls = '{"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}'
    extras = f'{{"rejected": {calls}, "tools": [{{"name": "add"}}], "turns": {{"1": {calls}}}}}'
    given = Pair((("user", "1+1?"), ("assistant", ""), ("tool", "2")), "two", "let me see", "x:1", extras)
    notes = ["rows whose tools the chat template does not print",
             "rows whose turn 2 (assistant) has a call of tools that the chat template does not print",
             "rejected answers of which the chat template leaves out a part, text or a call of tools"]
    _, bad, counts = tokenize_pairs(Chat(byte_tokenizer(TEMPLATES["zephyr"], True)), [given], 400, 200)
    assert not bad and [count for count in counts if "tools" in count] == notes
    _, bad, counts = tokenize_pairs(Chat(byte_tokenizer(TEMPLATES["qwen2.5"], True)), [given], 400, 200)
    assert not bad and [count for count in counts if "tools" in count] == notes[:1]


def test_a_judge_sees_calls_of_tools():
    call = '{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}'
    extras = '{"turns": {"1": {"tool_calls": [' + call + "]}}}"
    given = Pair((("user", "1+1?"), ("assistant", ""), ("tool", "2")), "two", "three", "x:1", extras)
    assert show_question(given, "conversation") == (
        'user: 1+1?\n\nassistant: \n{"name": "add", "arguments": {"a": 1}}\n\ntool: 2')


@pytest.mark.parametrize("prompt, chosen, reason", [
    (LLAMA3 + HEADER, HEADER + "yes<|eot_id|>", "which the prompt ends with already"),
    (LLAMA3, HEADER + "yes<|eot_id|>" + LLAMA3 + HEADER + "more<|eot_id|>", "chosen holds another turn"),
    (LLAMA3, HEADER + "yes<|eot_id|> and more", "goes on after what ends its turn, with 'and more'"),
    ("[INST] a [/INST]", "yes [INST] b [/INST] no", "chosen holds another turn")])
def test_templated_texts_of_which_a_part_would_be_lost_are_bad_rows(prompt, chosen, reason):
    chat = Chat(byte_tokenizer(TEMPLATES["llama3"], True), templated=True)
    header = HEADER if chosen.startswith(HEADER) else ""
    row = {"prompt": prompt, "chosen": chosen, "rejected": header + "no<|eot_id|>"}
    _, bad, _ = tokenize_pairs(chat, [parse_row("x:1", row, Reading(templated=True))], 100, 90)
    assert reason in bad[0].reason


@pytest.mark.parametrize("user, assistant, end", [
    ("<|im_start|>user<|im_sep|>What?<|im_end|>", "<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    ("<\uff5cUser\uff5c>What?", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>")])
@pytest.mark.parametrize("beside", [False, True])
def test_headers_without_line_breaks(user, assistant, end, beside):
    chat = Chat(byte_tokenizer(TEMPLATES["chatml"], True), templated=True)
    before = assistant if beside else user + assistant
    row = {"chosen": before + "yes" + end, "rejected": before + "no" + end}
    given = parse_row("x:1", row | ({"prompt": user} if beside else {}), Reading(templated=True))
    with pytest.raises(InputError, match="1 of 1 rows hold marks"):
        check_templated(Chat(chat.tokenizer), [given])
    example, _ = only(chat, given)
    assert chat.tokenizer.decode(example.prompt_ids) == user + assistant
    assert chat.tokenizer.decode(example.chosen.ids) == "yes" + end
