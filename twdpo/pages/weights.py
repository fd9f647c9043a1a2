"""The page of token weights, weights.html, with a picture of it and report.json: of an extraction, or of a run.

Of an extraction the tokens are the judge's own, as it read the answers, and their weights those of its attention alone,
each stored layer's, with the sink fix on them: what a run makes of them (cuts, alignment, several layers, another
--sink-k) is not known there. Of a run they are what it trains with, from `Objective.weigh`: training tokens after the
cut to --max-length, with n a as the loss multiplies them, whatever the source and its options; text that was cut stands
there, struck through. The judge's other stored layers are weighed likewise, as if --layer named them.

Legend: J judge tokens of one answer, N training tokens of it, L stored layers.
"""

import html
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from twdpo.chat import Chat
from twdpo.config import ExtractConfig, TrainConfig
from twdpo.files import make_directory, write_atomic, write_json
from twdpo.objective import Objective
from twdpo.pages.figures import MEANINGS, describe_judge, describe_weights, format_report, names_of
from twdpo.pages.pairs import count_prompt, count_tokens, describe_pair
from twdpo.pages.show import token_weights
from twdpo.pages.style import render_document
from twdpo.pages.tokens import (
    ANSWER,
    CUT,
    DARKEST,
    MOST_OPAQUE,
    SIDES,
    TOKENS_STYLE,
    UNJUDGED,
    Piece,
    ShownAnswer,
    draw_pairs,
    render_answer,
    render_foot,
    render_key,
)
from twdpo.pairs import Pair, show_question
from twdpo.postprocess import average_rounds, pin_and_share
from twdpo.run_folder import describe_code
from twdpo.tokens import Example
from twdpo.weights import WEIGHTS, WeightContext, source_needs
from twdpo.weights_file import JudgedAnswer, WeightsFile

RUN_PAIRS, RUN_MIN_COUNT = 24, 10  # of a run: pairs on its page; least occurrences of the most weighted tokens

# Other weights in place of those that the page holds: for each answer, for each choice, n a in hundredths by piece.
CHOICE_SCRIPT = f"""
const weights = JSON.parse(document.getElementById("weights").textContent), choice = document.getElementById("choice");
const answers = document.querySelectorAll("article .answer");
choice.addEventListener("change", () => {{
  answers.forEach((answer, number) => {{
    const ratios = weights[number][choice.selectedIndex];
    [...answer.children].filter(token => token.style.length).forEach((token, place) => {{
      const ratio = ratios[place] / 100;
      token.style.setProperty("--a", (Math.min(ratio / {DARKEST}, 1) * {MOST_OPAQUE}).toFixed(3));
      token.title = token.title.replace(/n\u00b7a .*/, "n\u00b7a " + ratio.toFixed(2));
    }});
  }});
  say();
}});
"""


@dataclass(frozen=True)
class ShownWeights:
    """A pair on the page: both answers in pieces, and for each of them n a of its tokens by every choice."""

    title: str
    prompt: str
    answers: list[ShownAnswer]
    choices: list[list[np.ndarray]]


@dataclass(frozen=True)
class WeightsPage:
    """about: facts by name. what: in words, which tokens and weights these are. choices: what the weights can be of,
    the first is shown. home: the page to link back to."""

    about: dict[str, object]
    what: str
    report: dict[str, object]
    pairs: list[ShownWeights]
    choices: list[str]
    home: str = ""


def write_page(directory: Path, page: WeightsPage) -> None:
    """report.json, weights.html and weights.svg, two of the pairs."""
    write_json(directory / "report.json", {"about": page.about} | page.report)
    picture = draw_pairs([(pair.prompt, pair.answers) for pair in page.pairs[:1] + page.pairs[1:][-1:]])
    for name, text in (("weights.html", render_page(page)), ("weights.svg", picture)):
        write_atomic(directory / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))


def sample(items: list, count: int, seed: int) -> list:
    """So many of them, by chance, in their order."""
    return [items[place] for place in sorted(np.random.default_rng(seed).permutation(len(items))[:count].tolist())]


def merge_figures(weighed: dict[str, object], judged: dict[str, object]) -> dict[str, object]:
    """One report of what `describe_weights` and `describe_judge` give."""
    return weighed | judged | {"sides": {side: weighed["sides"][side] | judged["sides"][side] for side in SIDES}}


def name_layer(layer: str) -> str:
    """--layer in words."""
    if "," in layer or "+" in layer:
        return f"{'sum' if '+' in layer else 'mean'} of layers {', '.join(layer.replace('+', ',').split(','))}"
    return f"layer {layer}" if layer.isdigit() else layer


def versions() -> str:
    """Of what the page was made with."""
    return ", ".join(f"{name} {value}" for name, value in describe_code().items() if value)


# ----------------------------------------------------------------------------------------------------------------------
# Of an extraction

def write_report(directory: Path, stored: WeightsFile, pairs: list[Pair], tokenizer, config: ExtractConfig) -> str:
    """The page, the picture and the statistics of these pairs' attention; the statistics as text."""
    make_directory(directory, "--report")
    page = page_of_extraction(stored, pairs, tokenizer, config, TrainConfig())
    write_page(directory, page)
    return format_report(page.report)


def page_of_extraction(stored: WeightsFile, pairs: list[Pair], tokenizer, config: ExtractConfig, fix: TrainConfig
                       ) -> WeightsPage:
    """fix: its sink_k and sink_k_min. Figures are of the last numbered layer."""
    shown = shown_layer(stored.layers)
    places = [shown, *(place for place in range(len(stored.layers)) if place != shown)]
    answers = ((side, answer.ids_J, judged_ratios(answer, shown, config.judge_rounds, fix))
               for pair in pairs for side, answer in zip(SIDES, stored[pair.key]) if len(answer.ids_J))
    report = {"pairs": len(pairs)} | merge_figures(
        describe_weights(answers, tokenizer, config.report_min_count),
        describe_judge(stored, [pair.key for pair in pairs], config.judge_rounds, [shown]))
    about = {"judge": config.model or "toy", "data": config.data, "judge prompt": config.judge_prompt,
             "heads": config.judge_heads, "rounds": config.judge_rounds, "sink_k": spell_sink(fix),
             "layers stored": ", ".join(stored.layers), "made with": versions()}
    what = ("Tokens are the judge's own, and n\u00b7a is of its attention alone, after the sink fix. A run that trains "
            "with it cuts, aligns and normalises it by its own settings, and has such a page of its own.")
    texts = [pair for pair in pairs if not pair.answers_call]  # others' texts are not what was judged
    if others := len(pairs) - len(texts):
        what += f" {others} pairs whose answers call tools count in the figures and are not shown."
    seen = [judged_pair(stored[pair.key], pair, places, config.judge_rounds, fix)
            for pair in sample(texts, config.report_pairs, fix.seed)]
    return WeightsPage(about, what, report, seen, [name_layer(stored.layers[place]) for place in places])


def shown_layer(layers: list[str]) -> int:
    """The place of the last numbered layer; of the rollout when there is nothing else."""
    return max((place for place, name in enumerate(layers) if name.isdigit()), default=len(layers) - 1)


def spell_sink(config: TrainConfig) -> str:
    return f"{config.sink_k}, in answers of {config.sink_k_min} judge tokens and more"


def judged_ratios(answer: JudgedAnswer, place: int, rounds: str, fix: TrainConfig) -> np.ndarray:
    """n a of the judge's own tokens in one layer, with the sink fix on them (paper section 2.6), [J]."""
    mass_J = average_rounds(answer.attention_LRJ[place], rounds)
    sink_k = fix.sink_k if len(mass_J) >= fix.sink_k_min else 0
    return len(mass_J) * pin_and_share(mass_J, np.arange(len(mass_J)) < sink_k)


def judged_pair(judged: tuple[JudgedAnswer, JudgedAnswer], pair: Pair, places: list[int], rounds: str, fix: TrainConfig
                ) -> ShownWeights:
    """A pair as the judge read it, in the layers at these places."""
    choices = [[judged_ratios(answer, place, rounds, fix) for place in places] for answer in judged]
    answers = [ShownAnswer(side, split_judged(getattr(pair, side), answer, ratios[0]), answer.ids_J.tolist(), [])
               for side, answer, ratios in zip(SIDES, judged, choices)]
    return ShownWeights(pair.where, show_question(pair, "conversation"), answers, choices)


def split_judged(text: str, judged: JudgedAnswer, ratio_J: np.ndarray) -> list[Piece]:
    """An answer in its judge tokens, those of one character together, and text that none of them covers."""
    pieces, place = [], 0

    def skip(end: int) -> None:
        if end > place:
            between = text[place:end]
            pieces.append(Piece(between, UNJUDGED if between.strip() else ANSWER, (), None))
    for (start, end), id, ratio in zip(judged.spans_J2.tolist(), judged.ids_J.tolist(), ratio_J.tolist()):
        if pieces and end <= place:
            last = pieces.pop()
            pieces.append(replace(last, ids=(*last.ids, id), weights=(*last.weights, ratio)))
            continue
        skip(start)
        start, place = max(start, place), end
        pieces.append(Piece(text[start:end], ANSWER, (id,), (ratio,)))
    skip(len(text))
    return pieces


# ----------------------------------------------------------------------------------------------------------------------
# Of a run

def write_run_weights(directory: Path, examples: list[Example], objective: Objective, context: WeightContext, chat: Chat
                      ) -> None:
    """weights/ of a run, of held-out pairs; nothing for weights that are made while training, or are 1 everywhere."""
    if examples and not objective.is_online and objective.source_name != "uniform":
        make_directory(directory, "--output-dir")
        write_page(directory, page_of_run(examples, objective, context, chat))


def page_of_run(examples: list[Example], objective: Objective, context: WeightContext, chat: Chat) -> WeightsPage:
    """The weights that these pairs would be trained with."""
    config, attention = context.config, context.attention
    ratios = [token_weights(example, objective, context) for example in examples]
    weighed = describe_weights(((side, getattr(example, side).ids, ratio_N) for example, both in zip(examples, ratios)
                                for side, ratio_N in zip(SIDES, both)), chat.tokenizer, RUN_MIN_COUNT)
    judged = {"sides": {side: {} for side in SIDES}, "layers": [], "verdicts": {}}
    if attention is not None:
        judged = describe_judge(attention, [example.pair.key for example in examples], config.judge_rounds,
                                list(range(len(attention.layers))))
    what = (f"Tokens and n\u00b7a are those that the run trains with, here of held-out pairs: the weights of "
            f"{objective.source_name} after the cut to --max-length, normalised.")
    shown = sample(list(range(len(examples))), RUN_PAIRS, config.seed)
    contexts = layer_contexts(objective, context, {examples[place].pair.key for place in shown})
    seen = []
    for place in shown:
        example, pair = examples[place], describe_pair(chat, examples[place], ratios[place])
        others = [token_weights(example, objective, other) for other in list(contexts.values())[1:]]
        seen.append(ShownWeights(f"{pair.where}; {count_prompt(pair)}", show_question(example.pair, "conversation"),
                                 pair.answers, [list(of_side) for of_side in zip(ratios[place], *others)]))
    names = list(map(name_layer, contexts))
    names[0] = f"{names[0]}, as trained" if attention is not None else "what is trained"
    return WeightsPage(about_run(objective, context), what, {"pairs": len(examples)} | merge_figures(weighed, judged),
                       seen, names, "../report.html")


def about_run(objective: Objective, context: WeightContext) -> dict[str, object]:
    """Facts of a run that its weights depend on."""
    config, attention = context.config, context.attention
    options = f" ({config.weights_options})" if config.weights_options else ""
    path = f", of {config.weights}" if config.weights not in ("", *WEIGHTS) else ""
    about = {"model": config.model, "data": config.data, "loss": config.loss,
             "weights": f"{objective.source_name}{options}{path}"}
    if attention is not None:
        about |= {"layer": name_layer(config.layer), "heads": attention.meta.get("heads", "not known"),
                  "rounds": config.judge_rounds, "sink_k": spell_sink(config), "always 1": spell_pins(config)}
    return about | {"max_length": config.max_length, "made with": versions()}


def spell_pins(config: TrainConfig) -> str:
    """Which tokens have n a of 1 whatever the judge attends to (twdpo.postprocess.pinned_tokens)."""
    pins = ["what stands where the first judge tokens do, up to sink_k"] * (config.sink_on == "training")
    pins += ["the end of the turn, and what the judge did not see"] * (config.unseen == "mean")
    return "; ".join(pins) or "none"


def layer_contexts(objective: Objective, context: WeightContext, keys: set[int]) -> dict[str, WeightContext]:
    """The run's own context, and for pairs of these keys those in which the attention is of other layers that are
    stored, by layer; for sources that read the judge's attention from one file."""
    contexts, attention = {context.config.layer: context}, context.attention
    if (isinstance(attention, WeightsFile) and "attention_against" not in source_needs(objective.source)
            and attention.directory.exists()):  # it was read hours ago
        stored = WeightsFile(attention.directory, ",".join(map(str, attention.meta["layers"])), keys)
        for layer in stored.layers:
            contexts.setdefault(layer, replace(context, attention=stored.of_layer(layer)))
    return contexts


# ----------------------------------------------------------------------------------------------------------------------
# As HTML

def render_page(page: WeightsPage) -> str:
    """A page that needs no network."""
    report, pieces = page.report, [piece for pair in page.pairs for answer in pair.answers for piece in answer.pieces]
    about = {"pairs": f"{report['pairs']}, {len(page.pairs)} of them shown below"} | page.about
    about |= {name: f"{value:.3f}" for name, value in report["verdicts"].items()}
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in about.items())
    back = f' <a href="{html.escape(page.home)}">The run.</a>' if page.home else ""
    names = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(MEANINGS[name])}</dd>" for name in names_of(report))
    chooser, script, data = "", "", ""
    if len(page.choices) > 1:
        options = "".join(f"<option>{html.escape(name)}</option>" for name in page.choices)
        chooser = f'<label>Weights of <select id="choice" autocomplete="off">{options}</select></label>'
        data = f'<script type="application/json" id="weights">{spell_choices(page.pairs)}</script>'
        script = CHOICE_SCRIPT
    return render_document("Token weights", TOKENS_STYLE, f"""
<p class="note">{html.escape(page.what)} Figures and shades: {html.escape(page.choices[0])}.
<a href="#pairs">To the pairs.</a>{back}</p>
<dl>{facts}</dl>
<div class="tables">
{statistics_table(report)}
{"".join(tokens_table(report, side) for side in SIDES)}
</div>
{layers_table(report)}
<h2>What the names mean</h2>
<dl>{names}</dl>
<h2 id="pairs">Pairs</h2>
{render_key({piece.kind for piece in pieces})}
{"".join(render_pair(pair, number) for number, pair in enumerate(page.pairs, 1))}
{data}{render_foot(chooser, script)}""")


def render_pair(pair: ShownWeights, number: int) -> str:
    """Its prompt, and its answers side by side."""
    panels = []
    for answer in pair.answers:
        cut = "; ".join(remark for remark in answer.remarks if remark.startswith(CUT))
        panels.append(f"<div><h3>{html.escape(count_tokens(answer))}</h3>{render_answer(answer)}"
                      + (f'<p class="note">{html.escape(cut)}</p>' if cut else "") + "</div>")
    return (f'<article id="pair-{number}"><h3>{html.escape(pair.title)}</h3>'
            f'<div class="prompt">{html.escape(pair.prompt)}</div><div class="sides">{"".join(panels)}</div></article>')


def spell_choices(pairs: list[ShownWeights]) -> str:
    """JSON: for each answer on the page, by choice, n a of each piece in hundredths."""
    return json.dumps([[piece_ratios(answer, ratio_N) for ratio_N in ratios] for pair in pairs
                       for answer, ratios in zip(pair.answers, pair.choices)], separators=(",", ":"))


def piece_ratios(answer: ShownAnswer, ratio_N: np.ndarray) -> list[int]:
    """Means over the tokens of each piece that has any, in hundredths."""
    sizes = [len(piece.ids) for piece in answer.pieces if piece.ids]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.rint(100 * np.add.reduceat(ratio_N, starts) / sizes).astype(int).tolist() if sizes else []


def statistics_table(report: dict[str, object]) -> str:
    names = list(dict.fromkeys(name for side in SIDES for name in report["sides"][side]))
    rows = "".join(f"<tr><td>{html.escape(name)}</td>" + "".join(
        f"<td>{report['sides'][side].get(name, float('nan')):.4f}</td>" for side in SIDES) + "</tr>" for name in names)
    return (f'<div class="scroll"><h2>Weights (mean over answers)</h2><table><tr><th></th><th>chosen</th>'
            f"<th>rejected</th></tr>{rows}</table></div>")


def tokens_table(report: dict[str, object], side: str) -> str:
    rows = "".join(f"<tr><td><code>{html.escape(json.dumps(token['token'], ensure_ascii=False))}</code></td>"
                   f"<td>{token['weight']:.4f}</td><td>{token['count']}</td></tr>"
                   for token in report["most_weighted_tokens"][side])
    rows = rows or f"<tr><td>no token occurs {report['min_count']} times</td><td></td><td></td></tr>"
    return (f'<div class="scroll"><h2>Most weighted in {side}</h2><table><tr><th>token</th><th>mean weight</th>'
            f"<th>count</th></tr>{rows}</table></div>")


def layers_table(report: dict[str, object]) -> str:
    if not report["layers"]:
        return ""
    columns = list(dict.fromkeys(name for layer in report["layers"] for name in layer if name != "layer"))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = "".join(f"<tr><td>{html.escape(layer['layer'])}</td>" + "".join(
        f"<td>{layer.get(name, float('nan')):.4f}</td>" for name in columns) + "</tr>" for layer in report["layers"])
    return ('<h2>Layers</h2><p class="note">Of the judge&#8217;s own tokens, the whole answers.</p><div class="scroll">'
            f'<table><tr><th>layer</th>{head}</tr>{rows}</table></div>')
