"""What the cells of benchmarks/methods.py say: differences with intervals, tables and sentences.

Everything here is a function of the cells (dicts of "arm", "key", "validation", "test", ...), so that a test makes the
pages and the sentences of the README again from the committed file.
"""

import math
import statistics
from collections.abc import Callable

from methods_lab import STEPS, choose_step, worth

NAMES = {  # of the parts
    "headline": "Confounded filler",
    "control": "The plain toy",
    "judges": "Judges",
    "sources": "Weight sources, confounded filler",
    "losses": "Losses with uniform weights, confounded filler",
}
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval); infinite for one value."""
    if len(values) < 2:
        return values[0], math.inf
    quantile = T975[min(len(values) - 1, len(T975)) - 1]
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def best_tried(cells: list[dict]) -> dict:
    """The cell of a search that is best on neutral validation pairs, at its own best step."""
    return min(cells, key=lambda cell: min(map(worth, cell["validation"]["neutral"])))


def has_neighbours(best: dict, tried: list[dict], name: str, fixed: str) -> bool:
    """Whether a smaller and a larger value of a setting were tried with the other one as it is in the best; also of a
    setting that was never varied: beta, where a loss does not read it."""
    if len({arm[name] for arm in tried}) == 1:
        return True
    beside = [arm[name] for arm in tried if arm[fixed] == best[fixed]]
    return min(beside) < best[name] < max(beside)


class Trained:
    """An arm at the setting that its search found: cells by seed. `inside`: whether all neighbours of that setting were
    tried (of a beta that a loss reads, and of the rate)."""

    def __init__(self, searched: list[dict], cells: list[dict]):
        best = best_tried(searched)["arm"]
        self.arm, self.beta = best, best_tried(searched)["beta"]
        self.finals = {cell["arm"]["seed"]: cell for cell in cells
                       if (cell["arm"]["factor"], cell["arm"]["lr"]) == (best["factor"], best["lr"])}
        tried = [cell["arm"] for cell in searched]
        self.inside = all(has_neighbours(best, tried, *names) for names in (("factor", "lr"), ("lr", "factor")))

    @property
    def name(self) -> str:
        arm = self.arm
        judge = f", judge {arm['judge'] or 'of the toy'}" if arm["judge"] or not arm["sink_k"] else ""
        return f"{arm['loss']}, {arm['source']}{judge}{'' if arm['sink_k'] else ', no sink fix'}"

    def value(self, seed: int, where: str, measure: str, criterion: str = "neutral") -> float:
        """A figure of one seed at the step that validation pairs choose."""
        cell = self.finals[seed]
        return cell["test"][where][choose_step(cell["validation"][criterion])][measure]

    def mean(self, where: str, measure: str, criterion: str = "neutral") -> tuple[float, float]:
        """(mean over the seeds, half its 95 % interval)."""
        return interval([self.value(seed, where, measure, criterion) for seed in self.finals])

    def gain(self, other: "Trained", where: str, measure: str, criterion: str = "neutral") -> tuple[float, float]:
        """(mean difference to another arm, paired by seed, half its 95 % interval)."""
        return interval([self.value(seed, where, measure, criterion) - other.value(seed, where, measure, criterion)
                         for seed in self.finals if seed in other.finals])

    def lift(self) -> float:
        """The mean lift of its weights."""
        return statistics.fmean(cell["lift"] for cell in self.finals.values())

    def steps(self, criterion: str = "neutral") -> float:
        """The median of the chosen steps."""
        return statistics.median(STEPS[choose_step(cell["validation"][criterion])] for cell in self.finals.values())


def trained_arms(cells: list[dict]) -> dict[tuple, Trained]:
    """Every arm that was searched for and trained, by (world, loss, source, judge, sink_k)."""
    searched: dict[tuple, list[dict]] = {}
    finals: dict[tuple, list[dict]] = {}
    for cell in cells:
        arm = cell["arm"]
        name = tuple(arm[field] for field in ("world", "loss", "source", "judge", "sink_k"))
        (searched if arm["tests"] == "none" else finals).setdefault(name, []).append(cell)
    arms = {name: Trained(group, finals.get(name, [])) for name, group in searched.items()}
    return {name: arm for name, arm in arms.items() if arm.finals}


def arms_in(part: str, cells: list[dict]) -> list[Trained]:
    """The arms of a part that there are cells of, uniform weights first."""
    every = trained_arms(cells)
    world = "plain" if part == "control" else "confounded"
    base = every.get((world, "twdpo", "uniform", "", 1))
    if base is None:
        return []

    def belongs(arm: Trained) -> bool:
        is_curve = any(cell["arm"]["tests"] == "all" for cell in arm.finals.values())
        if arm is base or arm.arm["world"] != world:
            return False
        if part in ("headline", "control"):
            return is_curve
        if part == "judges":
            return arm.arm["source"] == "attention"
        return not is_curve and (arm.arm["loss"] == "twdpo") == (part == "sources") and not arm.arm["judge"] and (
            arm.arm["source"] != "attention")
    order = {"attention": 0, "attention_surprise": 1, "shuffled": 2, "oracle": 3}
    found = [arm for arm in every.values() if belongs(arm)]
    if part == "judges" and not any(arm.arm["judge"] for arm in found):
        return []
    if part == "judges":
        return [base, *sorted(found, key=lambda arm: (-arm.arm["sink_k"], arm.lift()))]
    return [base, *sorted(found, key=lambda arm: (order.get(arm.arm["source"], 4), arm.name))]


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def plus_minus(value: tuple[float, float], digits: int = 3, sign: str = "") -> str:
    """Mean and half its interval; with one digit more where the half would be written as 0."""
    mean, half = value
    digits += 0 < half < 0.5 * 10 ** -digits
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half < math.inf else "")


def columns_of(part: str, base: Trained) -> list[tuple[str, Callable[[Trained], str]]]:
    """(head, cell) of a part's table."""
    def gain(where: str, criterion: str = "neutral"):
        return lambda arm: "" if arm is base else plus_minus(arm.gain(base, where, "accuracy", criterion), sign="+")

    def mean(where: str, measure: str, digits: int = 3):
        return lambda arm: plus_minus(arm.mean(where, measure), digits)
    key, tested = "neutral" if part == "control" else "reversed", [] if part == "control" else ["reversed"]
    columns = [("lift", lambda arm: f"{arm.lift():.1f}")]
    if part == "judges":
        columns.append(("right verdicts", lambda arm: f"{verdicts(arm):.2f}" if arm is not base else ""))
    for where in [*tested, "neutral"]:
        columns += [(f"accuracy, {where}", mean(where, "accuracy")), ("- uniform", gain(where))]
    if part == "headline":
        columns.append(("- uniform, reversed, step chosen by pairs like training", gain("reversed", "like training")))
    return [*columns, ("planted alone", mean(key, "planted_accuracy")), ("signal", mean(key, "signal", 1)),
            ("drift", mean(key, "drift")), ("step", lambda arm: f"{arm.steps():g}"),
            ("beta", lambda arm: f"{arm.beta:.3g}"),
            ("lr", lambda arm: f"{arm.arm['lr']:.3g}{'' if arm.inside else ' (edge)'}")]


def verdicts(arm: Trained) -> float:
    """The share of right verdicts of an arm's judge on training pairs."""
    return statistics.fmean(cell["verdicts"] for cell in arm.finals.values())


def part_table(part: str, cells: list[dict]) -> str:
    """Markdown: a line an arm; mean over seeds ± half its 95 % interval. "" without cells."""
    arms = arms_in(part, cells)
    if len(arms) < 2:
        return ""
    columns = columns_of(part, arms[0])
    lines = ["| arm | " + " | ".join(head for head, _ in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join(lines + [f"| {arm.name} | " + " | ".join(cell(arm) for _, cell in columns) + " |" for arm in arms])


def judge_table(cells: list[dict]) -> str:
    """Markdown: a line a judge, by lift: accuracy on reversed pairs less that of uniform weights. "" without cells."""
    arms = arms_in("judges", cells)
    lines = ["| judge | right verdicts | lift | with the sink fix | without it |", "|---" * 5 + "|"]
    without = {arm.arm["judge"]: arm for arm in arms if not arm.arm["sink_k"]}
    for arm in (arm for arm in arms[1:] if arm.arm["sink_k"]):
        gains = [plus_minus(each.gain(arms[0], "reversed", "accuracy"), sign="+") if each else "" for each in
                 (arm, without.get(arm.arm["judge"]))]
        name = arm.arm["judge"].replace("/step-", ", step ") or "the toy's"
        lines.append(f"| {name} | {verdicts(arm):.2f} | {arm.lift():.1f} | {gains[0]} | {gains[1]} |")
    return "\n".join(lines) if arms else ""


def curve_table(part: str, cells: list[dict]) -> str:
    """Markdown: accuracy after each of STEPS, mean over the seeds, of the arms that were tested there."""
    arms = arms_in(part, cells)
    lines = ["| arm | pairs | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |",
             "|---" * (2 + len(STEPS)) + "|"]
    for where in ("reversed", "neutral"):
        for arm in arms:
            if points := curve(arm, where):
                lines.append(f"| {arm.name} | {where} | " + " | ".join(f"{mean:.3f}" for mean, _ in points) + " |")
    return "\n".join(lines)


def written_table(part: str, cells: list[dict]) -> str:
    """Markdown: what the policy of the chosen step writes."""
    lines = ["| arm | good words | grammar | tokens | answers that end |", "|---|---|---|---|---|"]
    for arm in arms_in(part, cells):
        lines.append(f"| {arm.name} | " + " | ".join(plus_minus(arm.mean("written", name), digits) for name, digits in (
            ("good", 3), ("grammar", 3), ("length", 1), ("ended", 3))) + " |")
    return "\n".join(lines)


def curve(arm: Trained, where: str) -> list[tuple[float, float]]:
    """(mean, half its 95 % interval) of the accuracy after each of STEPS; [] where not all were tested."""
    rows = [cell["test"].get(where, [None]) for cell in arm.finals.values()]
    if any(figures is None for row in rows for figures in row):
        return []
    return [interval([row[place]["accuracy"] for row in rows]) for place in range(len(STEPS))]


def describe(part: str, cells: list[dict]) -> str:
    """A part as text: its table and its sentences."""
    return "\n".join([NAMES[part], part_table(part, cells), *sentences(part, cells)])


# ----------------------------------------------------------------------------------------------------------------------
# Sentences: what README and docs may say. Nothing is called better whose interval holds 0.

def told(difference: tuple[float, float]) -> str:
    """ "more", "less", or "not told apart": the interval holds 0."""
    mean, half = difference
    return "not told apart" if abs(mean) <= half else "more" if mean > 0 else "less"


def compared(difference: tuple[float, float], more: str, less: str, digits: int = 2) -> str:
    """`more accurate (+0.12 ± 0.03)`, or that the interval holds 0."""
    words = {"more": more, "less": less}
    return f"{words.get(told(difference), told(difference))} ({plus_minus(difference, digits, '+')})"


def sentences(part: str, cells: list[dict]) -> list[str]:
    """What a part's figures say, in words that follow its intervals; [] where arms are missing."""
    arms = arms_in(part, cells)
    if len(arms) < 2:
        return []
    if part == "judges":
        return judge_sentences(*arms)
    if part in ("sources", "losses"):
        return [list_sentence(part, *arms)]
    return control_sentences(part, {arm.arm["source"]: arm for arm in arms})


def control_sentences(part: str, arms: dict[str, Trained]) -> list[str]:
    """Of the headline or the control: attention and the two controls, by source."""
    named = [arms.get(source) for source in ("uniform", "attention", "oracle", "shuffled")]
    if None in named:
        return []
    uniform, attention, oracle, shuffled = named
    seeds = len(uniform.finals)

    def gain(arm: Trained, where: str, measure: str = "accuracy") -> str:
        words = ("more", "less") if measure == "drift" else ("more accurate", "less accurate")
        return compared(arm.gain(uniform, where, measure), *words)
    if part == "control":
        return [f"On the plain toy, against uniform weights: attention {gain(attention, 'neutral')}, the planted words "
                f"alone {gain(oracle, 'neutral')}, shuffled attention {gain(shuffled, 'neutral')}; drift of filler "
                f"with attention: {gain(attention, 'neutral', 'drift')}."]
    of = {name: f"{arm.mean('reversed', 'accuracy')[0]:.2f}" for name, arm in
          (("uniform", uniform), ("attention", attention), ("oracle", oracle), ("shuffled", shuffled))}
    return [f"Where filler goes with the preference in training and against it in the test, uniform weights reach an "
            f"accuracy of {of['uniform']}, the judge's attention {of['attention']}, the planted words alone "
            f"{of['oracle']}, and the same attention in shuffled places {of['shuffled']} ({seeds} seeds).",
            f"Against uniform weights there: attention {gain(attention, 'reversed')}, planted words alone "
            f"{gain(oracle, 'reversed')}, shuffled attention {gain(shuffled, 'reversed')}.",
            f"Where filler says nothing in the test: attention {gain(attention, 'neutral')}, planted words alone "
            f"{gain(oracle, 'neutral')}, shuffled attention {gain(shuffled, 'neutral')}."]


def judge_sentences(uniform: Trained, *arms: Trained) -> list[str]:
    """How good a judge must be, and what the sink fix does, on reversed pairs."""
    pinned = sorted((arm for arm in arms if arm.arm["sink_k"]), key=Trained.lift)
    found = [told(arm.gain(uniform, "reversed", "accuracy")) for arm in pinned]
    worse = [place for place, word in enumerate(found) if word != "more"]
    first = worse[-1] + 1 if worse else 0  # of those from which on all are better

    def count(words: list[str]) -> str:
        more, less, same = map(words.count, ("more", "less", "not told apart"))
        return f"{more} more accurate, {less} less, {same} not told apart"
    said = f"Of {len(pinned)} judges, with lifts from {pinned[0].lift():.1f} to {pinned[-1].lift():.1f}, "
    if first < len(pinned):
        said += (f"the attention of {'all' if not first else f'all {len(pinned) - first}'} with a lift of at least "
                 f"{pinned[first].lift():.1f} is more accurate than uniform weights on reversed pairs")
        said += f"; of the {first} below it, {count(found[:first])}" if first else ""
    else:
        said += f"against uniform weights on reversed pairs: {count(found)}"
    other = {arm.arm["judge"]: arm for arm in arms if not arm.arm["sink_k"]}
    without = [told(other[arm.arm["judge"]].gain(arm, "reversed", "accuracy"))
               for arm in pinned if arm.arm["judge"] in other]
    return [f"{said}.", f"Without the sink fix against with it, of {len(without)} judges: {count(without)}."]


def list_sentence(part: str, base: Trained, *arms: Trained) -> str:
    """Which sources or losses are more accurate on reversed pairs, in the order of their gains."""
    kind = "source" if part == "sources" else "loss"
    gains = {arm.arm[kind]: arm.gain(base, "reversed", "accuracy") for arm in arms}
    what = "uniform weights" if part == "sources" else "`twdpo`, both with uniform weights"
    groups = []
    for word in ("more", "less", "not told apart"):
        names = [name for name in sorted(gains, key=lambda name: -gains[name][0]) if told(gains[name]) == word]
        listed = ", ".join(f"`{name}` ({plus_minus(gains[name], 2, '+')})" for name in names) or "none"
        groups.append(f"{word}{' accurate' * (word != 'not told apart')}: {listed}")
    return f"On reversed pairs, against {what}, each by its own interval, {'; '.join(groups)}."


def summary(cells: list[dict]) -> str:
    """What the README says: attention against uniform weights, in words that follow the intervals."""
    parts = {part: {arm.arm["source"]: arm for arm in arms_in(part, cells)} for part in ("headline", "control")}
    headline = parts["headline"]

    def compare(part: str, source: str, where: str, than: str = "") -> str:
        mean, half = parts[part][source].gain(parts[part]["uniform"], where, "accuracy")
        if abs(mean) <= half:
            return f"not told apart{' from uniform weights' * bool(than)} ({plus_minus((mean, half), 2, '+')})"
        return f"{'more' if mean > 0 else 'less'} accurate{than} by {plus_minus((abs(mean), half), 2)}"
    figures = ", ".join(f"{headline[name].mean('reversed', 'accuracy')[0]:.2f}" for name in ("attention", "uniform"))
    said = (f"where filler goes with the preference in training and against it in the test, the judge's attention is "
            f"{compare('headline', 'attention', 'reversed', ' than uniform weights')} ({figures}), and in shuffled "
            f"places {compare('headline', 'shuffled', 'reversed')}; where filler says nothing in the test, "
            f"attention is {compare('headline', 'attention', 'neutral')}")
    if parts["control"]:
        said += f", and on the plain toy {compare('control', 'attention', 'neutral')}"
    return f"{said} ({len(headline['uniform'].finals)} seeds, 95 % intervals)"
