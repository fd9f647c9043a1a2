"""The verbalised pass: pairs -> scores that the model writes for the parts of each answer (paper section 4.2)."""

import re
from pathlib import Path

import numpy as np

from twdpo.chat import Chat, template_pieces
from twdpo.config import SharedConfig
from twdpo.dist import Process, name_of_dtype, pick_dtype
from twdpo.files import cache_directory, hash_json
from twdpo.judge.extraction import EXTRACTION_VERSION, list_work
from twdpo.judge.judge import judge_budget, load_judge
from twdpo.judge.verbalized import SYSTEM_PROMPT, USER_PROMPT, ScoresFile, locate_parts, matched_share, parse_parts
from twdpo.models.generate import generate, writing
from twdpo.models.source import Model, fingerprint_tokenizer
from twdpo.pairs import Pair, show_question
from twdpo.printed import print_pair, without_marks
from twdpo.tokens import encode, encode_pieces
from twdpo.weights_file import cache_name, shard_path, write_shard


class Scoring:
    """The scores that a model writes for the parts of both answers of pairs: run, opened.

    meta: everything that they depend on, as it stands in their folder's meta.json.
    """

    def __init__(self, config: SharedConfig, model: Model, data_fingerprint: str, folder: Path | None,
                 process: Process):
        """folder: None for the cache's own."""
        self.config, self.model, self.process = config, model, process
        self.dtype = pick_dtype(config.judge_dtype, process.device)
        self.meta = {"code": EXTRACTION_VERSION, "source": "verbalized", "model": model.fingerprint,
                     "tokenizer": fingerprint_tokenizer(model.tokenizer),
                     "prompt": hash_json([SYSTEM_PROMPT, USER_PROMPT]),
                     "judge_dtype": name_of_dtype(self.dtype), "data": data_fingerprint, "layers": []}
        self.meta |= {"templated": True} if model.templated else {}
        self.meta |= {"date": model.printed_date} if model.printed_date else {}
        self.folder = folder or cache_directory(config) / "scores" / cache_name(self.meta)

    def run(self, pairs: list[Pair]) -> None:
        """Let the model score all `pairs`; what is stored already is kept. All ranks.

        One generation an answer, greedy, of up to `most_new_tokens`.
        """
        process = self.process
        todo = list_work(self.meta, self.folder, pairs, "verbalised scores", process)
        if not todo:
            return
        model = load_judge(self.model.folder, self.dtype, process.device).model
        budget = judge_budget(self.config, process.device)
        mine = todo[process.rank::process.world_size]
        with process.progress(total=sum(len(group) for _, group in mine), desc="verbalise", unit="pair") as bar:
            for number, group in mine:
                keys = [pair.key for pair in group]
                with writing(model):
                    arrays = score_pairs(model, self.model.chat, group, budget, bar)
                write_shard(shard_path(self.folder, number, keys), arrays, self.meta)
        process.gather(None)  # all ranks have written before any reads

    def open(self) -> ScoresFile:
        """What is stored. Raises InputError."""
        return ScoresFile(self.folder)


def score_pairs(model, chat: Chat, pairs: list[Pair], budget: int, bar) -> dict[str, np.ndarray]:
    """The arrays of one shard (twdpo.judge.verbalized)."""
    tokenizer, ids, answers = chat.tokenizer, [], []
    (before, after), pattern = around_user_turn(chat), chat.special_pattern
    head, between, tail = re.split(r"\{question\}|\{answer\}", USER_PROMPT)
    for pair in pairs:
        printed = [answer.given for answer in print_pair(chat, pair).answers]
        question = show_question(pair, "conversation")
        question = without_marks(chat, question) if chat.templated else question
        for answer in printed:
            pieces = [(before + head, False), (question, True), (between, False), (answer.text, True),
                      (tail + after, False)]
            if pattern.search(question) or pattern.search(answer.text):  # no row can end the turn
                ids.append(encode_pieces(tokenizer, pieces)[0])
            else:
                ids.append(encode(tokenizer, ["".join(text for text, _ in pieces)])[0][0])
            answers.append((answer, encode(tokenizer, [answer.text])[0]))
    outputs = {}
    lengths = [len(ids[place]) + most_new_tokens(len(answers[place][1][0])) for place in range(len(ids))]
    for batch in equal_batches(lengths, budget):
        outputs |= dict(zip(batch, generate(model, chat, [ids[place] for place in batch],
                                            max(most_new_tokens(len(answers[place][1][0])) for place in batch))))
        bar.update(len(batch) / 2)
    spans, scores, matched = [], [], []
    for place, (answer, (_, token_spans)) in enumerate(answers):
        spans_J2, score_J = locate_parts(answer.text, parse_parts(outputs[place]))
        matched.append(matched_share(token_spans, spans_J2, answer.text))
        spans.append(spans_J2 + answer.start)
        scores.append(score_J)
    return {
        "key_E": np.array([pair.key for pair in pairs], dtype=np.int64),
        "length_E2": np.array([len(each) for each in scores], dtype=np.int32).reshape(-1, 2),
        "spans_J2": np.concatenate(spans).astype(np.int32),
        "score_J": np.concatenate(scores),
        "matched_E2": np.array(matched, dtype=np.float32).reshape(-1, 2),
    }


def around_user_turn(chat: Chat) -> tuple[str, str]:
    """Template text before and after what the user says: the system prompt first, or in the user's turn where the
    template has no system turn."""
    try:
        before, after = template_pieces(chat, [{"role": "system", "content": SYSTEM_PROMPT},
                                                {"role": "user", "content": ""}], [1], generation_prompt=True)
        if SYSTEM_PROMPT in before:
            return before, after
    except ValueError:
        pass  # the template refuses a system turn
    before, after = template_pieces(chat, [{"role": "user", "content": ""}], [0], generation_prompt=True)
    return f"{before}{SYSTEM_PROMPT}\n\n", after


def most_new_tokens(num_answer_tokens: int) -> int:
    """Every word of an answer may be a part of its own, with quotes, brackets and a score around it."""
    return 8 * num_answer_tokens + 64


def equal_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices by batch, longest first, each batch padded to its first within the budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
