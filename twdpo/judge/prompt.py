"""The judge prompt, in both orders, and where each answer's tokens stand in it.

The prompt is built from pieces, so the place of an answer is known by construction and never searched for.
Round 0 shows the chosen answer as A, round 1 the rejected one.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twdpo.chat import Chat, template_pieces
from twdpo.flags import InputError
from twdpo.pairs import Pair, show_question
from twdpo.printed import Answer, print_pair, without_marks
from twdpo.tokens import encode, encode_pieces, overlapping

ROUNDS = 2
QUESTION_FLOOR = 64  # tokens: a question is not cut below this while answers still have tokens to give
ANSWER_FLOOR = 8  # tokens: a pair whose answers would keep fewer (of at least as many) is not judged

JUDGE_PROMPTS = {
    # Paper Fig. 6.
    "paper": """\
Please act as an impartial judge and evaluate the quality of the two responses to the user prompt displayed below. \
You will be given answer A and answer B. Your job is to evaluate which answer is better.

Consider if the answers are helpful, relevant, and concise. Helpful means the answer correctly responds to the prompt \
or follows the instructions. Relevant means all parts of the response closely connect or are appropriate to what is \
being asked. Concise means the response is clear and not verbose or excessive.

Then consider the creativity and novelty of the answers when needed. Finally, identify any missing important \
information in the answers that would be beneficial to include when responding to the user prompt.

After providing your explanation, you must output exactly one of the following choices as your final verdict:

1. Answer A is better: A
2. Answer B is better: B

<|The Start of User Prompt|>
{question}
<|The End of User Prompt|>

<|The Start of Answer A|>
{answer_a}
<|The End of Answer A|>

<|The Start of Answer B|>
{answer_b}
<|The End of Answer B|>

Now, output one of the following identifiers and nothing else (no quotes, no spaces, no new lines, no thinking or \
reasoning, ...): A or B.

Your choice:""",
    # For small contexts and the toy.
    "short": """\
Which answer to the question is better?

Question: {question}

Answer A: {answer_a}

Answer B: {answer_b}

Reply with A or B only.

Better answer:""",
}


# The prompt as the authors' code spells it.
JUDGE_PROMPTS["authors"] = JUDGE_PROMPTS["paper"].replace("better.\n\nConsider", "better.\n    \nConsider")

# Their rule for an answer's last judge token, by what recognises a tokenizer's vocabulary: the answer ends so many
# tokens before the one that begins so many characters after it ("\n<|The End of Answer A|>").
AUTHORS_END_RULES = (
    ({"<|begin_of_text|>": 128000, "<|eot_id|>": 128009}, 3, 2),  # Llama-3
    ({"<s>": 1, "\u2581the": 272}, 2, 0),  # Mistral v0.1 and v0.2, zephyr
    ({"<start_of_turn>": 105, "<end_of_turn>": 106}, 0, 0),  # Gemma-3
)
AUTHORS_LIMIT, AUTHORS_ANSWER, AUTHORS_TEMPLATE = 2048, 768, 300  # tokens: of an input, of an answer, of all else


@dataclass(frozen=True)
class JudgedPair:
    """Both judge inputs of a pair. Sides: 0 chosen, 1 rejected.

    input_ids[round]: tokens of the input; its last position is the query that predicts the verdict.
    ranges[round][side]: [first, stop) of the side's tokens in that input.
    ids[side], spans_N2[side]: the judge tokens of the answer and the characters of the row's answer that they cover,
    clipped to it; the same in both rounds.
    """

    input_ids: tuple[np.ndarray, np.ndarray]
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    ids: tuple[np.ndarray, np.ndarray]
    spans_N2: tuple[np.ndarray, np.ndarray]


def load_judge_prompt(name: str) -> str:
    """The text of `paper`, `short` or a file. Raises InputError when a placeholder is missing or repeated."""
    text = JUDGE_PROMPTS.get(name)
    if text is None:
        try:
            text = Path(name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--judge-prompt is {name!r}: neither {' nor '.join(JUDGE_PROMPTS)} nor a text file that "
                             f"can be read ({error})") from error
    for field in ("question", "answer_a", "answer_b"):
        if text.count("{" + field + "}") != 1:
            raise InputError(f"--judge-prompt {name}: {{{field}}} must stand in it once, not "
                             f"{text.count('{' + field + '}')} times")
    return text


class JudgeInputs:
    """Builds judge inputs for one tokenizer and prompt; `counts` holds what was cut or tokenised apart."""

    def __init__(self, chat: Chat, prompt: str, max_length: int, question: str = "conversation", strip: bool = False,
                 cut: str = "common", spans: str = "exact"):
        """max_length: most tokens of one input; the others as the flags of their names (--judge-strip, --judge-cut).

        Raises InputError when the chat template does not print the prompt.
        """
        tokenizer = chat.tokenizer
        self.chat, self.tokenizer, self.max_length = chat, tokenizer, max_length
        self.question, self.strip, self.cut = question, strip, cut
        self.end_rule = find_end_rule(tokenizer, prompt) if spans == "authors" else None
        self.pattern = chat.special_pattern
        self.counts = Counter()
        try:
            before, after = template_pieces(chat, [{"role": "user", "content": ""}], [0], generation_prompt=True)
        except ValueError as error:
            raise InputError(f"the chat template of {tokenizer.name_or_path} can't show the judge prompt: {error}"
                             ) from error
        split = re.split(r"\{(question|answer_a|answer_b)\}", before + prompt + after)
        # Fixed text as a piece, a field by its name.
        self.parts = [part if place % 2 else (part, False) for place, part in enumerate(split)]

    def build_all(self, pairs: list[Pair]) -> list[JudgedPair | ValueError]:
        """Both rounds of every pair, or why it can't be judged. Texts are tokenised together, on all cores."""
        shown, texts = [], []
        for pair in pairs:
            try:
                shown.append(self._show(pair))
            except ValueError as error:
                shown.append(error)
                continue
            texts += ["".join(text for text, _ in self._pieces(shown[-1][0], shown[-1][1:], swapped))
                      for swapped in (False, True)]
        encoded = iter(encode(self.tokenizer, texts))
        limit = self.max_length if self.cut == "common" else min(self.max_length, AUTHORS_LIMIT - 1)
        results: list[JudgedPair | ValueError] = []
        for pair, parts in zip(pairs, shown):
            if isinstance(parts, ValueError):
                results.append(parts)
                continue
            question, *sides = parts
            both = next(encoded), next(encoded)
            fits = max(len(ids) for ids, _ in both) <= limit
            if fits and not any(self.pattern.search(text) for text in (question, *(side.text for side in sides))):
                rounds = [self._round(question, tuple(sides), swapped, False, each)
                          for swapped, each in zip((False, True), both)]
                if rounds[0][1] == rounds[1][1]:
                    results.append(self._join(rounds)[0])
                    continue
            try:
                results.append(self.build(pair))
            except ValueError as error:
                results.append(error)
        return results

    def _show(self, pair: Pair) -> tuple[str, Answer, Answer]:
        """What the judge sees of a pair: question, chosen, rejected. Raises ValueError."""
        chosen, rejected = (answer.given for answer in print_pair(self.chat, pair).answers)
        if self.strip:
            chosen, rejected = (Answer(answer.text.strip(),
                                       answer.start + len(answer.text) - len(answer.text.lstrip()))
                                if answer.text.strip() else answer for answer in (chosen, rejected))
        question = show_question(pair, self.question)
        return without_marks(self.chat, question) if self.chat.templated else question, chosen, rejected

    def build(self, pair: Pair) -> JudgedPair:
        """Both rounds of one pair. Raises ValueError when it can't be judged, with the reason."""
        question, chosen, rejected = self._show(pair)
        if self.cut == "authors":
            return self._cut_as_authors(question, chosen, rejected)
        judged, length, question_tokens = self._build(question, chosen, rejected)
        if length <= self.max_length:
            return judged
        whole = [len(ids) for ids in judged.ids]
        question, judged, length = self._cut_question(question, chosen, rejected, length, question_tokens)
        if length > self.max_length:
            judged = self._cut_answers(question, chosen, rejected, judged, length, whole)
        return judged

    def _cut_question(self, question, chosen, rejected, length, question_tokens):
        """Drop tokens of the question from the left, down to the floor."""
        self.counts["judge questions cut"] += 1
        judged = None
        while length > self.max_length and len(question_tokens) > QUESTION_FLOOR:
            keep = max(QUESTION_FLOOR, len(question_tokens) - (length - self.max_length))
            start = int(question_tokens[len(question_tokens) - keep][0])
            question = question[max(start, 1):]  # a token may share its characters with the one before: still advance
            judged, length, question_tokens = self._build(question, chosen, rejected)
        if judged is None:
            judged, length, question_tokens = self._build(question, chosen, rejected)
        return question, judged, length

    def _cut_answers(self, question, chosen, rejected, judged, length, whole):
        """Keep the first tokens of both answers: the largest common number that fits."""
        self.counts["judge answers cut"] += 1
        other = length - sum(whole)
        keep = max(whole)
        while keep > 0:
            while sum(min(keep, num) for num in whole) > self.max_length - other and keep > 0:
                keep -= 1
            if any(min(keep, num) < min(ANSWER_FLOOR, num) for num in whole) or keep == 0:
                break
            short = [Answer(answer.text[:int(spans_N2[min(keep, num) - 1, 1]) - answer.start], answer.start)
                     for answer, spans_N2, num in zip((chosen, rejected), judged.spans_N2, whole)]
            cut, length, _ = self._build(question, *short)
            if length <= self.max_length:
                return cut
            keep -= 1
        raise ValueError(f"a judge input of {self.max_length} tokens leaves its answers {max(keep, 0)} tokens of "
                         f"{whole[0]} and {whole[1]}, fewer than {ANSWER_FLOOR} of a longer answer or all of a shorter "
                         "one: raise --judge-max-length or use --judge-prompt short")

    def _cut_as_authors(self, question: str, chosen: Answer, rejected: Answer) -> JudgedPair:
        """Each round is cut by itself: at their limit answers keep their first tokens, the question its last ones."""
        apart = self._is_apart(question, chosen, rejected)
        rounds = []
        for swapped in (False, True):
            built = self._round(question, (chosen, rejected), swapped, apart)
            if len(built[0]) >= AUTHORS_LIMIT:
                self.counts["judge inputs cut"] += 1
                sides, room = [], AUTHORS_LIMIT - AUTHORS_TEMPLATE
                for answer in (chosen, rejected):
                    ids = encode(self.tokenizer, [answer.text])[0][0][:AUTHORS_ANSWER]
                    sides.append(Answer(self.tokenizer.decode(ids, skip_special_tokens=False), answer.start))
                    room -= len(ids)
                ids = encode(self.tokenizer, [question])[0][0][-room:]
                built = self._round(self.tokenizer.decode(ids, skip_special_tokens=False), tuple(sides), swapped, apart)
            rounds.append(built)
        if any(rounds[0][1][side] != rounds[1][1][side] for side in (0, 1)):
            raise ValueError("the two rounds see other tokens of an answer (--judge-cut authors cuts each by itself)")
        judged, length, _ = self._join(rounds)
        if length > self.max_length:
            raise ValueError(f"a judge input of {length} tokens is longer than {self.max_length}: --judge-cut common "
                             "cuts it")
        return judged

    def _is_apart(self, question: str, chosen: Answer, rejected: Answer) -> bool:
        """Whether the data spells a special token, so that its text must be tokenised in pieces."""
        apart = any(self.pattern.search(text) for text in (question, chosen.text, rejected.text))
        self.counts["judge inputs that spell a special token, tokenised in pieces"] += apart
        return apart

    def _build(self, question: str, chosen: Answer, rejected: Answer):
        """(JudgedPair, tokens of the longer round, spans of the question's tokens in the question)."""
        sides = (chosen, rejected)
        apart = self._is_apart(question, chosen, rejected)
        rounds = [self._round(question, sides, swapped, apart) for swapped in (False, True)]
        if any(rounds[0][1][side] != rounds[1][1][side] for side in (0, 1)):
            # The text around A and B makes an answer's border tokens differ: tokenised apart they can't.
            self.counts["judge inputs whose answers merge with the prompt, tokenised in pieces"] += 1
            rounds = [self._round(question, sides, swapped, apart=True) for swapped in (False, True)]
        return self._join(rounds)

    @staticmethod
    def _join(rounds: list[tuple]):
        """As `_build`, of two rounds that hold the same tokens of both answers."""
        _, ids, spans_N2, _, _ = rounds[0]
        judged = JudgedPair(tuple(np.array(each[0], dtype=np.int32) for each in rounds),
                            tuple(each[3] for each in rounds),
                            tuple(np.array(side, dtype=np.int32) for side in ids),
                            tuple(side.astype(np.int32) for side in spans_N2))
        return judged, max(len(each[0]) for each in rounds), rounds[0][4]

    def _pieces(self, question: str, sides: tuple[Answer, Answer], swapped: bool) -> list[tuple[str, bool]]:
        """One order of the prompt in pieces, those of the data marked."""
        shown = {"question": question, "answer_a": sides[swapped].text, "answer_b": sides[not swapped].text}
        return [part if isinstance(part, tuple) else (shown[part], True) for part in self.parts]

    def _round(self, question: str, sides: tuple[Answer, Answer], swapped: bool, apart: bool, encoded=None):
        """One order: (input ids, ids per side, spans per side, ranges per side, spans of the question's tokens).

        encoded: (ids, spans) of the whole text, when it has been tokenised already.
        """
        pieces = self._pieces(question, sides, swapped)
        place, starts, shown = 0, {}, {}
        for part, (text, _) in zip(self.parts, pieces):
            if not isinstance(part, tuple):
                starts[part], shown[part] = place, text
            place += len(text)
        if encoded is None:
            encoded = (encode_pieces(self.tokenizer, pieces) if apart
                       else encode(self.tokenizer, ["".join(text for text, _ in pieces)])[0])
        ids, spans_T2 = encoded

        def locate(field: str) -> tuple[int, int]:
            end = starts[field] + len(shown[field])
            first, stop = overlapping(spans_T2, starts[field], end)
            if self.end_rule and field != "question":
                before, characters = self.end_rule
                stop = max(int(np.argmax(spans_T2[:, 0] >= end + characters)) - before, first + 1)
            return first, stop

        ranges = tuple(locate("answer_b" if swapped == (side == 0) else "answer_a") for side in (0, 1))
        side_ids, side_spans = [], []
        for side, (first, stop) in enumerate(ranges):
            field = "answer_b" if swapped == (side == 0) else "answer_a"
            side_ids.append(ids[first:stop])
            clipped = np.clip(spans_T2[first:stop] - starts[field], 0, len(sides[side].text))
            side_spans.append(clipped + sides[side].start)
        first, stop = locate("question")
        question_spans = np.clip(spans_T2[first:stop] - starts["question"], 0, len(question))
        return ids, tuple(side_ids), tuple(side_spans), ranges, question_spans


def find_end_rule(tokenizer, prompt: str) -> tuple[int, int] | None:
    """The authors' rule (tokens, characters) for this tokenizer, None when their code does not know it or the prompt
    is not theirs."""
    if "{answer_a}\n<|The End of Answer A|>" not in prompt:
        return None
    for probes, tokens, characters in AUTHORS_END_RULES:
        if all(tokenizer.convert_tokens_to_ids(token) == id for token, id in probes.items()):
            return tokens, characters
    return None


def verdict_ids(tokenizer) -> tuple[list[int], list[int]]:
    """Ids that spell A and B as a next token, with and without the leading space.

    Raises InputError when the tokenizer has no single token for one of them.
    """
    found = []
    for letter in "AB":
        ids = {encode(tokenizer, [text])[0][0][-1] for text in (letter, " " + letter)}
        ids = sorted(id for id in ids if tokenizer.decode([id]).strip() == letter)
        if not ids:
            raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no token for the verdict {letter!r}")
        found.append(ids)
    return tuple(found)
