"""Several held-out sets: --eval-data NAME=FILE,NAME=FILE, from the files to metrics.jsonl, the page and the summary."""

import json

import pytest
from runs_of_tests import read_rows

import extract
import train
from twdpo.config import TrainConfig
from twdpo.dataset import load_dataset, parse_eval_data
from twdpo.flags import InputError
from twdpo.log import format_row, held_out_names, row_of_set, summarize
from twdpo.pages.run import render_run
from twdpo.run_folder import settled_settings
from twdpo.toy.grammar import toy_rows


@pytest.fixture
def files(tmp_path):
    """x.jsonl, y.jsonl and a path with = in it, of a few toy rows each."""
    paths = {}
    for number, name in enumerate(("x.jsonl", "y.jsonl", "z=1.jsonl")):
        rows = toy_rows()[1][10 * number:10 * number + 2 + number]
        paths[name[0]] = tmp_path / name
        paths[name[0]].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def test_names_stand_before_their_files(files, tmp_path):
    x, y, z = (str(files[name]) for name in "xyz")
    assert parse_eval_data("") == {"": ""}
    assert parse_eval_data(x) == {"": x}
    assert parse_eval_data(f"{x},{y}") == {"": f"{x},{y}"}
    assert parse_eval_data(f"easy={x}, hard-2={y}") == {"easy": x, "hard-2": y}
    assert parse_eval_data(f"a={x},{y},b={y}:0.5") == {"a": f"{x},{y}", "b": f"{y}:0.5"}
    assert parse_eval_data("a=org/pairs@main:config/test,b=org/other") == {"a": "org/pairs@main:config/test",
                                                                          "b": "org/other"}
    # A path that is there is no name.
    assert parse_eval_data(z) == {"": z} and parse_eval_data(f"a={z},{z}:0.25") == {"a": f"{z},{z}:0.25"}
    for behind in (":/train", ":/train:0.5", ":1e-1"):
        assert parse_eval_data(z + behind) == {"": z + behind}
    comma = tmp_path / "a,b=c.jsonl"
    comma.write_text("")
    assert parse_eval_data(str(comma)) == {"": str(comma)}


def test_a_long_list_of_sets_is_no_name_of_a_file():
    sets = {f"set-{number}": f"{number}.jsonl" for number in range(40)}
    assert parse_eval_data(",".join(f"{name}={file}" for name, file in sets.items())) == sets


@pytest.mark.parametrize("text, message", [
    ("a=x,a=y", "names two sets 'a'"),
    ("my set=x", "'my set' can't name a held-out set"),
    ("data/z=2.jsonl", "no such file, and 'data/z' can't name"),
    ("=x", "'' can't name"),
    ("x.jsonl,b=y", "'x.jsonl' has no name and 'b' has one"),
    ("a=,b=y", "'a=': no file behind the name"),
])
def test_what_names_nothing_is_one_message(text, message):
    with pytest.raises(InputError, match=message):
        parse_eval_data(text)


def test_sets_are_read_apart_and_an_empty_one_is_named(files, tmp_path):
    loaded = load_dataset("toy", f"a={files['x']},b={files['y']}")
    assert {name: len(pairs) for name, pairs in loaded.held_out_sets.items()} == {"a": 2, "b": 3}
    assert loaded.held_out == loaded.held_out_sets["a"] + loaded.held_out_sets["b"]
    assert loaded.eval_data == f"a={files['x']},b={files['y']}"
    assert loaded.fingerprint != load_dataset("toy", f"a={files['x']}").fingerprint
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=f"{tmp_path / 'empty.jsonl'} holds no pair"):
        load_dataset("toy", f"a={files['x']},b={tmp_path / 'empty.jsonl'}")
    assert [*load_dataset("toy", str(files["x"])).held_out_sets] == [""]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Evaluations of two sets; of b the loss rises while a's falls at first."""
    made = []
    for step, (loss_a, loss_b) in ((0, (0.7, 0.7)), (5, (0.4, 0.9)), (8, (0.6, 0.8))):
        of_a = {"loss": loss_a, "loss_stderr": 0.01, "pairs": 2}
        of_b = {"loss": loss_b, "loss_stderr": 0.02, "pairs": 3}
        made.append({"step": step} | {f"eval/{name}": value for name, value in of_a.items()}
                    | {f"eval/a/{name}": value for name, value in of_a.items()}
                    | {f"eval/b/{name}": value for name, value in of_b.items()})
    return made


def test_a_row_is_read_by_set(rows):
    assert held_out_names(rows[0]) == ["a", "b"]
    assert row_of_set(rows[1], "b") == {"step": 5, "eval/loss": 0.9, "eval/loss_stderr": 0.02, "eval/pairs": 3}
    assert format_row(row_of_set(rows[1], "b")) == "step 5 | eval/loss 0.9 ± 0.02 | eval/pairs 3"
    unnamed = {"step": 1, "eval/loss": 0.5, "eval/pairs": 4, "eval/of/a_users": 1.0}
    assert held_out_names(unnamed) == [""] and row_of_set(unnamed, "") == unnamed
    assert held_out_names({"step": 1, "loss": 0.5}) == []
    assert held_out_names({"step": 0, "eval/active/pairs": 0.5, "eval/pairs": 3}) == [""]  # a metric of a fork


def test_summary_and_page_show_each_set(rows, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = summarize(tmp_path)
    first, second = text.index("held out, a (2 pairs)"), text.index("held out, b (3 pairs)")
    assert "0.4000 ± 0.0100" in text[first:second] and "0.9000 ± 0.0200" in text[second:]
    # The best step is that of the first set.
    columns = [" ".join(line.split()[-9:]) for line in text.splitlines() if line.startswith("held out")]
    assert columns == ["start (step 0) best (step 5) last (step 8)"] * 2 and "\nbest: step 5, " in text
    assert "b/" not in text.replace(str(tmp_path), "")
    steps = [{"step": step, "loss": 0.7} for step in (1, 8)]
    config = {"loss": "dpo", "model": "", "data": "toy"}
    page = render_run("run", config, steps + rows, [])
    assert page.index("Held out: a (2 pairs)") < page.index("Held out: b (3 pairs)")
    assert "Held out: 2 pairs of a" in page and "Best: step 5, the lowest held-out loss of a." in page
    assert page.count("<figcaption>") == 2  # one of the run and the first set, one of the second
    section = page.split("Held out: b")[1]
    assert section.count("<title>step ") == 3 and "<td>0.9000 ±&nbsp;0.0200</td><td>0.8000" in section
    assert "best (step&nbsp;5)" in section and section.count('class="ring"') == 1
    alone = [{"step": row["step"]} | {name: value for name, value in row.items() if name.count("/") == 1}
             for row in rows]
    assert "<h2>Held out (2 pairs)</h2>" in render_run("run", config, steps + alone, [])


SETS = {"loss": "dpo", "max_steps": 4, "eval_every": 2}


def test_a_run_evaluates_each_set_and_keeps_the_best_of_the_first(tmp_path, run_arguments, files, monkeypatch, capsys):
    """Each set's figures are those of a run that holds out this set alone; the first gives best/."""
    kept = []
    original = train.keep_best
    monkeypatch.setattr(train, "keep_best", lambda run, row: kept.append(row["eval/loss"]) or original(run, row))
    train.main(run_arguments(tmp_path / "both", **SETS, eval_data=f"a={files['x']},b={files['y']}", sample=3))
    printed = capsys.readouterr().out
    assert all(f"\n{name}: step 2 | eval/kl " in printed for name in "ab")
    both = read_rows(tmp_path / "both")
    for name, file in (("a", "x"), ("b", "y")):
        train.main(run_arguments(tmp_path / name, **SETS, eval_data=files[file]))
        alone = [row for row in read_rows(tmp_path / name) if "eval/pairs" in row]
        assert [row["step"] for row in alone] == [0, 2, 4]
        assert [row_of_set(row, name) for row in both if "eval/pairs" in row] == alone
    assert kept[:2] == [row["eval/a/loss"] for row in both if "eval/pairs" in row][1:]
    samples = [json.loads(line)["prompt"] for line in (tmp_path / "both/samples.jsonl").read_text().splitlines()]
    assert set(samples) == {row["prompt"] for row in map(json.loads, files["x"].read_text().splitlines())}
    assert json.loads((tmp_path / "both/config.json").read_text())["eval_data"] == f"a={files['x']},b={files['y']}"


def test_a_set_of_which_nothing_is_left_is_named(tmp_path, run_arguments, files, capsys):
    files["y"].write_text(json.dumps({"prompt": "", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run", eval_data=f"a={files['x']},b={files['y']}"), "--skip-bad-rows"])
    assert "no pair of b is left" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run", eval_data=str(files["y"])), "--skip-bad-rows"])
    assert "no pair of it is left" in capsys.readouterr().err


def test_a_resume_takes_the_revisions_of_all_hub_ids():
    stored = f"a=org/pairs@{'a' * 40}:config/test,b=org/other@{'b' * 40}"
    for given in ("a=org/pairs:config/test, b=org/other", stored):
        assert settled_settings({"eval_data": stored}, TrainConfig(eval_data=given))["eval_data"] == stored
    assert "eval_data" not in settled_settings({"eval_data": stored}, TrainConfig(eval_data="a=org/pairs,b=org/other"))
    for given, kept in (("a = my pairs.jsonl, b=y", "a=my pairs.jsonl,b=y"), ("a=mypairs.jsonl", "")):
        found = settled_settings({"eval_data": "a=my pairs.jsonl,b=y"}, TrainConfig(eval_data=given))
        assert found.get("eval_data", "") == kept


@pytest.mark.slow
def test_resume_refuses_other_pairs_of_any_set_and_attention_is_of_all(tmp_path, run_arguments, files, capsys):
    argv = run_arguments(tmp_path / "run", max_steps=1, save_every=1, eval_data=f"a={files['x']},b={files['y']}")
    train.main(argv)
    assert (tmp_path / "run/weights/weights.html").is_file()
    files["y"].write_text(files["z"].read_text())
    with pytest.raises(SystemExit):
        train.main([*argv, "--resume"])
    assert "the pairs (or their tokens)" in capsys.readouterr().err


def test_extract_exports_each_set(tmp_path, toy_model, files):
    extract.main(["--model", str(toy_model), "--data", str(files["z"]), "--judge-prompt", "short", "--out",
                  str(tmp_path / "w"), "--eval-data", f"a={files['x']},b={files['y']}", "--export",
                  str(tmp_path / "rows.jsonl")])
    for name, number in (("rows", 4), ("rows_held_out_a", 2), ("rows_held_out_b", 3)):
        assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) == number


def test_an_export_leaves_the_held_out_files_that_are_read(tmp_path, toy_model, files, capsys):
    kept = files["x"].rename(tmp_path / "rows_held_out_a.jsonl")
    before = kept.read_bytes()
    with pytest.raises(SystemExit):
        extract.main(["--model", str(toy_model), "--data", str(files["z"]), "--eval-data", f"a={kept}", "--out",
                      str(tmp_path / "w"), "--export", str(tmp_path / "rows.jsonl")])
    assert "rows_held_out_a.jsonl is a file that is read" in capsys.readouterr().err and kept.read_bytes() == before


def test_no_evaluation_means_no_set(tmp_path, run_arguments):
    train.main(run_arguments(tmp_path / "run", loss="dpo", max_steps=1, eval_fraction=0))
    assert [*map(held_out_names, read_rows(tmp_path / "run"))] == [[]]
