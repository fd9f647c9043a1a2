"""Statistics of token weights, and what their names mean.

Tables 1 and 2 of the paper, the first tokens' shares before the sink fix (section 3), and Appendix B's delta.
Legend: J judge tokens of one answer, R rounds, L stored layers, N tokens that are weighed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from twdpo.pages.tokens import SIDES
from twdpo.postprocess import average_rounds
from twdpo.weights_file import JudgedAnswer, WeightsFile

MOST_WEIGHTED = 10
MEANINGS = {  # of every name that a report has; a K stands for a number
    "std": "standard deviation of a over an answer's tokens, where a = n\u00b7a / n; 0 is uniform (paper Table 1)",
    "max": "the largest a of an answer (paper Table 1)",
    "length": "n, the tokens of an answer that are weighed",
    "delta": "the largest |n\u00b7a - 1| of an answer: how far a token is from plain DPO, at most (paper Appendix B)",
    "share of token K before the sink fix": "of the judge's attention on an answer, what its K-th judge token has; "
        "first tokens draw attention whatever they say, which is why those up to sink_k are reset to 1/n",
    "std before the sink fix": "standard deviation of the judge's attention over an answer's judge tokens, its sum 1",
    "attention on the answer": "of all that the judge attends to where it gives its verdict, the share on one answer: "
        "the rest is on the judge prompt, the question and the other answer",
    "correlation of the rounds": "Pearson's, over an answer's tokens, of the attention in both rounds: 1 if it does "
        "not matter which answer is shown first",
    "position consistency": "share of pairs where the judge prefers the same answer in both rounds, whichever is shown "
        "first; a coin has 0.5, a judge that always names the same place 0",
    "agreement with the label": "share of verdicts, over pairs and rounds, that prefer the chosen answer; a coin: 0.5",
    "mean weight": "of a token's a, over its occurrences (paper Table 2)",
    "count": "how often a token occurs in these answers",
}


def names_of(report: dict[str, object]) -> list[str]:
    """Every name that a report's figures have, each once; those that differ by a number once."""
    names = [name for side in SIDES for name in report["sides"][side]]
    names += [name for layer in report["layers"] for name in layer if name != "layer"]
    names += [*report["verdicts"], "mean weight", "count"]
    return list({re.sub(r"\d+", "K", name): None for name in names})


def describe_weights(answers: Iterable[tuple[str, np.ndarray, np.ndarray]], tokenizer, min_count: int
                     ) -> dict[str, object]:
    """Of (side, ids [N], n a [N]) of answers: means over answers by side, and the most weighted tokens; as JSON."""
    figures: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in SIDES}
    totals: dict[str, Counter] = {side: Counter() for side in SIDES}
    counts: dict[str, Counter] = {side: Counter() for side in SIDES}
    for side, ids_N, ratio_N in answers:
        weights_N = ratio_N / len(ids_N)
        for name, value in (("std", weights_N.std()), ("max", weights_N.max()), ("length", len(ids_N)),
                            ("delta", np.abs(ratio_N - 1).max())):
            figures[side][name].append(float(value))
        for id, weight in zip(ids_N.tolist(), weights_N.tolist()):
            totals[side][id] += weight
            counts[side][id] += 1
    return {"sides": {side: means(figures[side]) for side in SIDES}, "min_count": min_count,
            "most_weighted_tokens": {side: most_weighted(totals[side], counts[side], tokenizer, min_count)
                                     for side in SIDES}}


def describe_judge(stored: WeightsFile, keys: list[int], rounds: str, shown: list[int]) -> dict[str, object]:
    """Of what the judge attends to, on its own tokens: the first tokens' shares by side in the layers at these places,
    a row a layer, and its verdicts; as JSON. Averages are over answers."""
    sides: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in SIDES}
    layers: list[dict[str, list[float]]] = [defaultdict(list) for _ in stored.layers]
    for key in keys:
        for side, answer in zip(SIDES, stored[key]):
            if not len(answer.ids_J):
                continue
            describe_layers(answer, rounds, layers)
            mass_J = np.mean([average_rounds(answer.attention_LRJ[place], rounds) for place in shown], axis=0)
            for place in range(min(3, len(mass_J))):
                sides[side][f"share of token {place + 1} before the sink fix"].append(float(mass_J[place]))
    return {"sides": {side: means(sides[side]) for side in SIDES},
            "layers": [{"layer": name} | means(figures) for name, figures in zip(stored.layers, layers)],
            "verdicts": stored.verdict_statistics(keys)}


def describe_layers(answer: JudgedAnswer, rounds: str, layers: list[dict[str, list[float]]]) -> None:
    """Add one answer's figures to every layer's."""
    for attention_RJ, figures in zip(answer.attention_LRJ, layers):
        mass_J = average_rounds(attention_RJ, rounds)
        figures["attention on the answer"].append(float(attention_RJ.sum(axis=1).mean()))
        figures["share of token 1 before the sink fix"].append(float(mass_J[0]))
        figures["std before the sink fix"].append(float(mass_J.std()))
        spread = attention_RJ.std(axis=1)
        if len(attention_RJ) == 2 and (spread > 0).all():
            figures["correlation of the rounds"].append(float(np.corrcoef(attention_RJ)[0, 1]))


def means(figures: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in figures.items()}


def most_weighted(totals: Counter, counts: Counter, tokenizer, min_count: int) -> list[dict[str, object]]:
    """Tokens that occur at least `min_count` times, by mean weight (paper Table 2)."""
    weights = {id: totals[id] / count for id, count in counts.items() if count >= min_count}
    first = sorted(weights, key=lambda id: (-weights[id], id))[:MOST_WEIGHTED]
    return [{"token": tokenizer.decode([id]), "id": id, "weight": weights[id], "count": counts[id]} for id in first]


def format_report(report: dict[str, object]) -> str:
    """The statistics as text, and what their names mean."""
    lines = [f"token weights of {report['pairs']} pairs" + "".join(
        f"; {name} {value:.3f}" for name, value in report["verdicts"].items())]
    names = list(dict.fromkeys(name for side in SIDES for name in report["sides"][side]))
    lines.append(f"{'(mean over answers)':36}" + "".join(f"{side:>12}" for side in SIDES))
    for name in names:
        lines.append(f"{name:36}" + "".join(f"{report['sides'][side].get(name, float('nan')):12.4f}" for side in SIDES))
    for side in SIDES:
        tokens = report["most_weighted_tokens"][side]
        listed = ", ".join(f"{token['token']!r} {token['weight']:.4f}" for token in tokens)
        lines.append(f"most weighted in {side} (seen {report['min_count']} times or more): {listed or 'none'}")
    columns = list(dict.fromkeys(name for layer in report["layers"] for name in layer if name != "layer"))
    lines.append(f"{'layer':>10}" + "".join(f"  {name}" for name in columns))
    for layer in report["layers"]:
        values = "".join(f"{layer.get(name, float('nan')):{len(name) + 2}.4f}" for name in columns)
        lines.append(f"{layer['layer']:>10}{values}")
    lines += ["what the names mean:", *(f"  {name}: {MEANINGS[name]}" for name in names_of(report))]
    return "\n".join(lines)
