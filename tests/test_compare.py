"""python -m twdpo.pages.compare: what of several runs stands on one page, and what is refused."""

import json
import re
import shutil

import pytest

import train
from twdpo.pages import compare
from twdpo.pages.charts import LIGHT

CONFIG = {"loss": "dpo", "weights": "uniform", "layer": "last", "beta": 0.1, "seed": 1, "lr": 1e-3, "output_dir": "x",
          "micro_batch_tokens": 5, "data": "pairs.jsonl"}
START = {"step": 0, "held_out": {"": "aa"}}


def make_run(folder, losses=(0.7, 0.5, 0.6), held_out="aa", pairs=5, config=(), names=()) -> str:
    """A run of three steps whose evaluations have these losses."""
    rows = []
    for step, loss in enumerate(losses):
        rows += [{"step": step, "loss": loss, "reward_accuracy": 0.5}] * (step > 0)
        figures = {"loss": loss, "loss_stderr": 0.01, "pairs": pairs}
        row = {"step": step} | {f"eval/{key}": value for key, value in figures.items()}
        rows.append(row | {f"eval/{name}/{key}": value for name in names for key, value in figures.items()})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | dict(config)))
    (folder / "environment.json").write_text(json.dumps([START | {"held_out": {"": held_out}}]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def pair(tmp_path) -> list[str]:
    return [make_run(tmp_path / "one"),
            make_run(tmp_path / "two", (0.7, 0.8, 0.9), config={"seed": 2, "layer": "2", "output_dir": "y"})]


def render(tmp_path, runs) -> str:
    compare.main([*runs, "--out", str(tmp_path / "out/page.html")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["page.html"]  # no temporary file is left
    return (tmp_path / "out/page.html").read_text()


def fail(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as ended:
        compare.main([*argv, "--out", "nowhere.html"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_runs_lie_over_each_other_and_their_figures_beside_each_other(tmp_path, pair, capsys):
    page = render(tmp_path, pair)
    assert not re.search(r"<script|<link|src=|https?://", page)
    assert f"<b>A</b> seed 1 ({pair[0]}); best: step 1, the lowest held-out loss<" in page
    assert f"<b>B</b> seed 2 ({pair[1]}); no step was better than the start, whose held-out loss is 0.7000" in page
    (loss,) = re.findall(r"<figure><figcaption>Loss<.*?</figure>", page)
    assert loss.count(' held" points') == loss.count(' train" points') == loss.count('class="ring"') == 2
    assert ">A</text>" in loss and ">B</text>" in loss and ">step</text>" in loss
    for cells in (["A", "0", "1", "2"], ["B", "0", "1", "2"]):
        assert f'<td class="run">{cells[0]}</td>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) in page
    means = [f"{value:.4f} ±&nbsp;0.0100" for value in (0.7, 0.5, 0.6)]
    assert '<td class="run">A</td>' + "".join(f"<td>{cell}</td>" for cell in means) in page
    settings = page.split("Settings that differ")[1].split("</table>")[0]
    assert re.findall(r"<tr><td>(\w[\w ]*)</td><td>(\w+)</td><td>(\w+)</td>", settings) == [
        ("layer", "last", "2"), ("seed", "1", "2"), ("steps done", "2", "2")]
    assert "differ, so" not in page and "not to be set" not in page
    assert capsys.readouterr().out == f"{tmp_path / 'out/page.html'}: 2 runs\n"


def test_what_can_t_be_compared_is_said(tmp_path, pair):
    third = make_run(tmp_path / "three", held_out="bb", config={"loss": "ipo"})
    silent = make_run(tmp_path / "four", losses=())
    (tmp_path / "four/metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    page = render(tmp_path, [*pair, third, silent])
    assert "The held-out pairs differ, so these figures are not of the same pairs: A, B; C." in page
    assert "No evaluation: D." in page and "loss is what each run optimises, and loss differs" in page
    assert "<b>C</b> loss ipo, seed 1 (" in page


def test_where_pairs_are_not_known_their_number_tells(tmp_path, pair):
    for folder in pair:
        (tmp_path / folder / "environment.json").unlink()
    assert "differ, so" not in render(tmp_path, pair)
    more = make_run(tmp_path / "three", pairs=6)
    assert "not of the same pairs: A, B; C." in render(tmp_path, [*pair, more])


def test_losses_of_other_weights_are_not_set_against_each_other(tmp_path):
    """A layer changes what is optimised where weights follow the judge, and nothing where they are uniform."""
    def runs(name: str, weights: str) -> list[str]:
        return [make_run(tmp_path / f"{name}-{layer}", config={"weights": weights, "layer": layer}) for layer in "12"]
    assert "and layer differs: one run" in render(tmp_path, runs("judged", "attention"))
    assert "layer differs" not in render(tmp_path, runs("plain", "uniform"))


def test_sets_with_names_have_charts_and_tables_of_their_own(tmp_path):
    runs = [make_run(tmp_path / name, names=names) for name, names in (("x", ("a", "b")), ("y", ("a",)))]
    page = render(tmp_path, runs)
    assert "<h2>Curves: a</h2>" in page and page.count("<figcaption>Loss<") == 2
    of_b = page.split("<h2>Held out: b</h2>")[1].split("<h2>")[0]
    assert of_b.count(' held" points') == 1 and ">A</text>" in of_b and " train" not in of_b
    assert page.count("<h2>Held out: a</h2>") == 1 and page.count("<h2>Held out: b</h2>") == 2


@pytest.mark.parametrize("named_first", [True, False])
def test_a_run_with_named_sets_beside_one_without_has_each_figure_once(tmp_path, named_first):
    runs = [make_run(tmp_path / name, names=names) for name, names in (("x", ("a", "b")), ("y", ()))]
    page = render(tmp_path, runs if named_first else runs[::-1])
    assert set(re.findall("<figcaption>(.*?)<", page)) == {"Loss", "Reward accuracy, unweighted"}
    charts = page.split("<h2>Settings")[0]
    losses = re.findall("<figure><figcaption>Loss<.*?</figure>", charts)
    assert [loss.count(' held" points') for loss in losses] == [1, 1, 1]
    assert re.findall("<h2>(.*?)<", charts)[:3] == (["Curves: a", "Held out: b", "Held out"] if named_first else
                                                    ["Curves", "Held out: a", "Held out: b"])


def test_what_is_no_run_or_damaged_is_one_message(tmp_path, pair, capsys):
    assert fail(capsys, pair[0]) == (f"compare: error: {pair[0]} alone can't be compared: name two runs or more (a "
                                     "run's own page is its report.html)")
    assert "is named twice" in fail(capsys, *pair, pair[0] + "/../one")
    assert f"{tmp_path} is no run: there is no config.json" in fail(capsys, pair[0], str(tmp_path))
    assert f"{len(LIGHT) + 1} runs: at most {len(LIGHT)}" in fail(capsys, *map(str, range(len(LIGHT) + 1)))
    metrics = tmp_path / "two/metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_bytes(b'{"step": 1}\nrubbish\xff\n' + whole.encode())
    assert f"{metrics}, line 2: 'rubbish\ufffd' is no row" in fail(capsys, *pair)
    metrics.unlink()
    assert "has no metrics yet" in fail(capsys, *pair)
    for value in ('"x"', "null", "NaN", "-Infinity", "true"):
        metrics.write_text(whole + f'{{"step": 9, "loss": {value}}}\n{{"step": 10, "loss": 1}}\n')
        assert "loss of step 9 is " in fail(capsys, *pair)
    metrics.write_text(whole + '{"step": "x"}\n{"step": 10}\n')
    assert """'{"step": "x"}' is no row of a run""" in fail(capsys, *pair)
    metrics.write_text(whole)
    for name, text, message in (("config.json", "{", "not JSON"), ("config.json", "[]", "holds a list, not a dict"),
                                ("environment.json", "{}", "holds a dict, not a list")):
        path = tmp_path / "two" / name
        before = path.read_text()
        path.write_text(text)
        assert message in fail(capsys, *pair)
        path.write_text(before)
    (tmp_path / "two/environment.json").write_text('["a"]')
    compare.main([*pair, "--out", str(tmp_path / "page.html")])  # as without known pairs
    capsys.readouterr()
    with pytest.raises(SystemExit):
        compare.main([*pair, "--out", str(tmp_path)])
    assert "a folder stands there" in capsys.readouterr().err


def test_real_runs_one_of_them_killed(tmp_path, plain_run, run_arguments):
    """Different losses; the second one's last line was being written."""
    train.main(run_arguments(tmp_path / "run", loss="simpo", max_steps=4, eval_every=2))
    shutil.copytree(plain_run, tmp_path / "plain")
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    page = render(tmp_path, [str(tmp_path / "plain"), str(tmp_path / "run")])
    assert "<b>A</b> loss twdpo, weights attention, max_steps 6, ... (" in page
    assert "<b>B</b> loss simpo, weights uniform, max_steps 4, ... (" in page and "differ, so" not in page
    assert "nan" not in page.split("</style>")[1]
