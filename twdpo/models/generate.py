"""Generation in batches, and the policy's answers to prompts."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from twdpo.chat import Chat, plain_end
from twdpo.models.attention import ATTENTION_NAME
from twdpo.models.policy import Policy
from twdpo.models.source import context_length
from twdpo.tokens import Example, encode


def turn_ends(chat: Chat) -> tuple[list[int], str]:
    """(ids that end an answer, text that does when it is several tokens): the end of text, and what ends a turn."""
    end, ids = plain_end(chat), {chat.tokenizer.eos_token_id, *chat.end_ids} - {None}
    last = encode(chat.tokenizer, [end])[0][0][-1:]
    if last and last[0] in chat.special_ids | ids:
        return sorted({*ids, *last}), ""
    return sorted(ids), end


@contextmanager
def writing(model) -> Iterator[None]:
    """Inside this context `model` can generate: with an attention that keeps a cache and masks padding."""
    training, settings = model.training, model.generation_config
    model.eval()
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # softcap and sinks
        model.set_attn_implementation("eager")
    try:
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
        model.generation_config = settings
        model.train(training)


def sample_answers(policy: Policy, chat: Chat, examples: list[Example], max_new_tokens: int) -> list[str]:
    """The policy's own answers to the prompts of some examples. All ranks, which all write the same ones."""
    prompts = [example.prompt_ids.tolist() for example in examples]
    with writing(policy.model):
        return generate(policy.model, chat, prompts, max_new_tokens, policy.generate,
                        synced_gpus=dist.get_world_size() > 1)


@torch.no_grad()
def generate(model, chat: Chat, prompts: list[list[int]], max_new_tokens: int, generate=None, **options) -> list[str]:
    """Greedy continuations of prompts in tokens, up to the end of the turn. Inside `writing`.

    generate: what to call instead of the model's own `generate`.
    """
    room = context_length(model.config) - max(map(len, prompts))
    if room < 1:
        return [""] * len(prompts)  # nothing is matched: the pair is left out and counted
    ends, end = turn_ends(chat)
    rows = continuations(model, chat, prompts, min(max_new_tokens, room), generate, **options)
    answers = [list(itertools.takewhile(lambda id: id not in ends, ids)) for ids in rows]
    texts = chat.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.partition(end)[0] for text in texts] if end else texts


@torch.no_grad()
def continuations(model, chat: Chat, prompts: list[list[int]], max_new_tokens: int, generate=None,
                  sampled: bool = False, **options) -> list[list[int]]:
    """The likeliest next tokens of prompts, as `options` (of transformers' generate) leave them; or sampled ones, at
    temperature 1. One that ends before the longest of its batch, with a token, is padded after it, with what may be a
    word. Inside `writing`."""
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):  # padded on the left, so that all go on from the same place
        input_ids[row, longest - len(ids):] = torch.tensor(ids)
        mask[row, longest - len(ids):] = 1
    # Nothing of the model's generation_config.json: scores depend on what meta.json names alone.
    ends, end = turn_ends(chat)
    how = {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=0, eos_token_id=ends, **how)
    model.generation_config = settings
    stop = TextEnd(chat.tokenizer, end) if end else None
    options |= {"stopping_criteria": StoppingCriteriaList([stop])} if stop else {}
    output = (generate or model.generate)(input_ids=input_ids.to(device), attention_mask=mask.to(device),
                                          generation_config=settings, **options)
    rows = output[:, longest:].tolist()
    if stop is None or stop.stops_P is None:
        return rows
    return [ids[:at - longest] if at else ids for ids, at in zip(rows, stop.stops_P.tolist())]


class TextEnd(StoppingCriteria):
    """Ends rows at a text, which may begin in the prompt, and keeps where: what follows in a row is padding."""

    def __init__(self, tokenizer, end: str):
        self.stops_P, self.finds = None, StopStringCriteria(tokenizer, [end])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options) -> torch.Tensor:
        found_P = self.finds(input_ids, scores)
        before_P = torch.zeros_like(found_P, dtype=torch.long) if self.stops_P is None else self.stops_P
        self.stops_P = torch.where(found_P & (before_P == 0), input_ids.shape[1], before_P)
        return found_P


def with_end(chat: Chat, ids: list[int]) -> list[int]:
    """A row of `continuations` up to its end of the turn and with it; all of one that has none."""
    ends, _ = turn_ends(chat)
    return next((ids[:place] for place, id in enumerate(ids, 1) if id in ends), ids)
