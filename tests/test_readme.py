"""The promises of README and docs that a test can check: commands, file tree and import order, links, figures."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from twdpo.config import PRESETS
from twdpo.log import summarize

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS, BENCHMARKS = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("methods", "benchmarks"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "twdpo/toy/model/README.md")]
PAGES += (ROOT / "docs").glob("*.md")

# A file imports only from files before it. README's order, but that folders stand last there.
IMPORT_ORDER = """
    flags config lock files stored dist script plugins toy/grammar data_files messages pairs forms dataset chat
    printed tokens examples aux_prompts rows weights_file align postprocess judge/verbalized importance
    transport weights authors_columns batch kernels/tile_kernels kernels/token_kernels kernels/tiles
    kernels/weighted_logratio chunked_logps logratio loss_parts vocabulary_losses losses loss_sum objective
    leave_out divergence metrics models/source models/varlen models/attention models/build models/shards
    models/policy models/attribution models/reference models/generate models/anchor models/memory judge/prompt
    judge/judge judge/extraction judge/verbalize logps inputs needs run_folder checkpoint log pages/style
    pages/charts pages/run pages/compare pages/tokens pages/pairs pages/show pages/figures pages/weights
    toy/planted toy/train
""".split()


def test_first_two_blocks_set_up_and_run():
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for block, last in zip(blocks, ("torchrun train.py", "python -m pytest")):
        lines = block.splitlines()
        assert lines[0] == "python3 -m venv .venv" and lines[-1].endswith(last) and "$" not in block
    assert blocks[2] == "source .venv/bin/activate\n"  # what every later command takes for granted


def test_the_default_block_has_the_lines_that_a_run_prints(tmp_path):
    """The summary of a run with the figures that the README shows, its steps those of the preset."""
    (block,) = re.findall(r"^    held out \(128 pairs\).*?\n\n", README, re.MULTILINE | re.DOTALL)
    lines = [line[4:] for line in block.splitlines() if line.strip() not in ("", "[...]")]
    steps = [int(step) for step in re.findall(r"\(step (\d+)\)", lines[0])]
    assert steps == [0, 16, 512 // PRESETS["toy"]["batch_size"]] and steps[1] % PRESETS["toy"]["eval_every"] == 0
    rows = [{"step": step, "eval/pairs": 128} for step in steps]
    for line in lines[1:3]:
        name, *figures = re.findall(r"[\w.]+", line)
        for row, mean, error in zip(rows, figures[0::2], figures[1::2], strict=True):
            row |= {f"eval/{name}": float(mean), f"eval/{name}_stderr": float(error)}
    name = re.search(r"runs/([\w-]+)/report", block)[1]
    folder = tmp_path / "runs" / name
    for path in ("best/x", "report.html", "weights/weights.html"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = summarize(folder).replace(f"{tmp_path}/", "").splitlines()
    assert set(lines) == set(printed) - {line for line in printed if "metrics.jsonl" in line}


def test_readme_is_a_front_door():
    assert len(README.encode()) <= 10000


def test_links_lead_to_files_and_headings():
    """Every relative link of a page; behind a # a heading, as GitHub spells its anchor."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text) if "://" not in link]
        for link in links:
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.is_relative_to(ROOT) and target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in anchors, f"{page.name}: {link}"
    assert sum("](" in page.read_text(encoding="utf-8") for page in PAGES) > 6


def listed_files() -> list[str]:
    """Files of the README's tree by their paths, folders with a / at the end."""
    (tree,) = re.findall(r"^(    train\.py .*?)\n\n", README, re.MULTILINE | re.DOTALL)
    folders, listed = [], []
    for line in tree.splitlines():
        names = re.match(r" {4}( {0,4})((?:[\w/]+(?:\.py|/)(?:, )?)+)(?:  |$)", line)
        if not names:
            assert line.startswith(" " * 20), line  # the line above goes on
            continue
        folders = folders[:len(names[1]) // 2]
        for name in names[2].split(", "):
            listed.append("".join(folders) + name)
        folders = folders + [name] if name.endswith("/") else folders
    return listed


def package_files() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "twdpo").rglob("*.py") if path.name != "__init__.py"}


def test_file_tree_lists_every_file_once():
    listed = listed_files()
    assert len(listed) == len(set(listed))
    assert {name for name in listed if name.startswith("twdpo/") and name.endswith(".py")} == package_files()
    assert {"train.py", "extract.py", "kernels/", "tests/", "benchmarks/", "docs/"} <= set(listed)
    assert all((ROOT / name).exists() for name in listed)
    tree = README[README.index("    train.py "):]
    for folder in ("kernels", "docs"):
        assert all(path.stem in tree for path in (ROOT / folder).glob("*.[mp][dy]"))


def test_file_tree_is_in_the_order_of_the_pipeline():
    """Files of the package before its folders, in import order."""
    listed = [name for name in listed_files() if name.startswith("twdpo/")]
    files = [name[6:-3] for name in listed if name.count("/") == 1 and name.endswith(".py")]
    assert files == [name for name in IMPORT_ORDER if "/" not in name]
    assert listed[1:len(files) + 1] == [f"twdpo/{name}.py" for name in files]


def imported_files(path: Path) -> set[str]:
    """Files of this project that a file imports anywhere in it, as IMPORT_ORDER names them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports by full names"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            place = name.replace(".", "/")
            if place in ("train", "extract"):
                found.add(place)
            elif place.startswith("twdpo/"):
                place = place.removeprefix("twdpo/")
                folder = ROOT if place.startswith("kernels/") else ROOT / "twdpo"
                found |= {place} if (folder / f"{place}.py").exists() else set()
    return found


def test_files_import_only_from_files_before_them():
    kernels = {f"kernels/{path.stem}" for path in (ROOT / "kernels").glob("*.py")}
    assert sorted(IMPORT_ORDER) == sorted({name[6:-3] for name in package_files()} | kernels)
    imports = 0
    for place, name in enumerate(IMPORT_ORDER):
        path = ROOT / f"{name}.py" if name in kernels else ROOT / "twdpo" / f"{name}.py"
        used = imported_files(path)
        imports += len(used)
        late = used - set(IMPORT_ORDER[:place])
        assert not late, f"{name}.py imports from files after it: {late}"
    assert imports > 150


def test_example_loss_and_source_run():
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    import torch

    from twdpo.losses import LOSSES
    from twdpo.weights import WEIGHTS
    exec(example, {})  # noqa: S102
    batch = type("Batch", (), {"seq_lens_S": torch.tensor([2, 3])})
    assert WEIGHTS["rising"](batch, None).tolist() == [1, 2, 1, 2, 3]
    config = type("Config", (), {"beta": 0.5})
    assert LOSSES["squared_hinge"](torch.tensor([1.0, 0.0]), None, batch, config)[0].tolist() == [0.25]
    assert LOSSES["squared_hinge"](torch.tensor([1.0, 0.0]), None, batch, config, edge=0.5)[0].tolist() == [0.0]


def test_the_picture_is_small_and_shows_a_pair_of_either_kind():
    """docs/shaded-tokens.svg: the answers of two held-out pairs of the toy, word by word."""
    from twdpo.toy.grammar import kind_of, toy_rows
    picture = ROOT / "docs/shaded-tokens.svg"
    assert picture.stat().st_size < 150_000 and "](docs/shaded-tokens.svg)" in README
    root = ElementTree.parse(picture).getroot()
    answers = {}  # words by the side of the picture that they stand on
    for text in root.findall(".//{*}text[@class='ink']"):
        answers.setdefault(float(text.get("x")) > 400, []).extend(text.text.split())
    pairs = [row for row in toy_rows()[1]
             if all(f" {' '.join(row[side].split())} " in f" {' '.join(answers[place])} "
                    for place, side in enumerate(("chosen", "rejected")))]
    assert sorted(kind_of(row["chosen"]) for row in pairs) == ["tone", "topic"]
    for place, side in enumerate(("chosen", "rejected")):
        assert sum(len(row[side].split()) for row in pairs) == len(answers[place])
    assert len(root.findall(".//{*}rect[@class='shade']")) > 30


def test_counts_of_losses_and_sources():
    from twdpo.losses import LOSSES
    from twdpo.weights import WEIGHTS
    assert f"{len(LOSSES)} losses and {len(WEIGHTS)} sources" in README


def test_tables_of_losses_and_sources_are_their_docstrings():
    from twdpo.loss_parts import loss_needs
    from twdpo.losses import LOSSES
    from twdpo.plugins import describe
    from twdpo.weights import WEIGHTS, source_needs
    for rows in (describe(LOSSES, loss_needs), describe(WEIGHTS, source_needs)):
        bar = "\\|"  # a bare | would begin another cell
        lines = [f"| `{name}` | {what} | {needs} | {options.replace('|', bar)} |"
                 for name, what, needs, options in rows]
        assert "\n".join(lines) in METHODS


def test_figures_of_the_fused_op_are_those_of_the_committed_run():
    """Every row of the table in docs/benchmarks.md, against benchmarks/results/cpu/loss_kernel.json."""
    report = json.loads((ROOT / "benchmarks/results/cpu/loss_kernel.json").read_text())
    rows = {(row["vocabulary"], row["tokens"], row["method"]): row for row in report["rows"]}
    table = re.findall(r"^\| V ([\d,]+), D 512 \| ([\d,]+) \| (.+?) \| (.+?) \| (.+?) MiB \| (.+?) MiB \|$", BENCHMARKS,
                       re.MULTILINE)
    assert len(table) == len({key[:2] for key in rows})
    for vocabulary, tokens, *figures in table:
        case = int(vocabulary.replace(",", "")), int(tokens.replace(",", ""))
        ours, full = rows[(*case, "twdpo, torch chunks")], rows[(*case, "full logits")]
        core = min(row["forward_backward_ms"] for key, row in rows.items()
                   if key[:2] == case and key[2].startswith("F.linear_cross_entropy") and "forward_backward_ms" in row)
        milliseconds = ours["forward_backward_ms"]
        assert figures == [f"{milliseconds / full['forward_backward_ms']:.2f}", f"{milliseconds / core:.2f}",
                           f"{ours['peak_extra_mib']:.0f}", f"{full['peak_extra_mib']:,.0f}"]


def test_figures_of_the_fused_op_with_kl_are_those_of_the_committed_run():
    report = json.loads((ROOT / "benchmarks/results/cpu/loss_kernel_kl.json").read_text())
    rows = {(row["vocabulary"], row["tokens"], row["method"]): row for row in report["rows"]}
    table = re.findall(r"^\| V ([\d,]+), D 512, with KL \| ([\d,]+) \| (.+?) \| (.+?) MiB \| (.+?) MiB \|$", BENCHMARKS,
                       re.MULTILINE)
    assert len(table) == len(rows) / 2 == 4
    for vocabulary, tokens, *figures in table:
        case = int(vocabulary.replace(",", "")), int(tokens.replace(",", ""))
        ours, full = rows[(*case, "twdpo, torch chunks, with KL")], rows[(*case, "full logits, with KL")]
        assert figures == [f"{1 / full['over_ours']:.2f}", f"{ours['peak_extra_mib']:.0f}",
                           f"{full['peak_extra_mib']:,.0f}"]


def test_figures_of_the_extraction_are_those_of_the_committed_runs():
    """Every row of the table, of a CPU and of an H200, and what is said of rollout."""
    table = re.findall(r"^\| (2 CPU cores|H200) \| ([\d,]+) \| (.+?) s \| (.+?) \| (.+?) x \| (.+?) MiB \| (.+?) \|$",
                       BENCHMARKS, re.MULTILINE)
    expected, rollouts, over_eager = [], {}, {}
    for folder, label in (("cpu", "2 CPU cores"), ("nvidia-h200", "H200")):
        report = json.loads((ROOT / f"benchmarks/results/{folder}/extraction.json").read_text())
        ours = [row for row in report["rows"] if row["way"] == "ours"]
        expected += [(label, f"{row['tokens']:,}", f"{row['seconds_a_pair']:.3f}", f"{row['over_limit']:.2f}",
                      f"{row['speed_over_eager']:.1f}", f"{row['peak_extra_mib']:,.0f}",
                      f"{row['memory_over_eager']:.3f}") for row in ours]
        over_eager[label] = sorted(row["speed_over_eager"] for row in ours)
        rollouts[label] = " and ".join(f"{row['over_limit']:.2f}" for row in report["rows"]
                                       if row["way"] == "ours, with rollout")
    assert table == expected and len(table) == 4
    assert (f"{rollouts['2 CPU cores']} times the bare trunk's time on the CPU, {rollouts['H200']} times on the H200"
            in BENCHMARKS.replace("\n", " "))
    least, most = over_eager["2 CPU cores"]
    assert f"extraction {least:.1f} to {most:.1f} times as fast as eager attention" in README


def test_figures_of_the_training_step_are_those_of_the_committed_run():
    report = json.loads((ROOT / "benchmarks/results/cpu/train_step.json").read_text())
    rows = [row for row in report["rows"] if "note" not in row]
    assert len(rows) >= 5
    for row in rows:
        assert (f"| {row['way']} | {row['pairs_per_s']:.3f} | {row['ours_faster']:.2f} x | {row['peak_gib']:.2f} "
                f"| {row['ours_memory']:.2f} x |\n") in BENCHMARKS
    (trl,) = (row for row in rows if row["way"] == "TRL")
    assert f"a training step is {trl['ours_faster']:.1f} times as fast as TRL's" in README


@pytest.mark.slow
def test_no_package_is_called_kernels():
    """transformers looks for a top-level package of that name and would import ours."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    sources = [path for folder in ("twdpo", "kernels", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for path in [*sources, *ROOT.glob("*.py")]:
        assert not re.search(r"^\s*(from|import) kernels\b", path.read_text(encoding="utf-8"), re.MULTILINE), path
    program = ("from transformers import LlamaConfig, LlamaForCausalLM; import twdpo.kernels.weighted_logratio; "
               "LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_toys_figures_are_those_of_its_committed_gates():
    """A row a model, as benchmarks/results/cpu/toy-*.json has it; the first is the one in the package."""
    page = (ROOT / "twdpo/toy/model/README.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks/results/cpu"
    for name, label in (("toy-seed-0", "seed 0 (the one here)"), ("toy-seed-1", "seed 1"),
                        ("toy-seed-0-no-probe", "seed 0, without the probe")):
        gates = json.loads((results / f"{name}.json").read_text())
        assert gates["probe"] == ("no-probe" not in name) and f"seed-{gates['seed']}" in name
        figures = [f"{gates[key]:.3f}" for key in ("verdict_accuracy_chosen_first", "verdict_accuracy_rejected_first")]
        figures += [f"{gates[key]:.2f}" for key in ("planted_lift", "planted_share", "topic_margin")]
        assert f"| {label} | {' | '.join(figures)} |" in page
    assert json.loads((ROOT / "twdpo/toy/model/gates.json").read_text()) == json.loads(
        (results / "toy-seed-0.json").read_text())


def test_what_is_said_of_the_methods_is_what_the_committed_cells_say():
    """Pages, tables, and every sentence of README and docs that compares arms, made again from cells.jsonl: nothing is
    called better whose interval holds 0."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import methods
    import methods_pages
    import methods_report
    folder = ROOT / "benchmarks/results/cpu/methods"
    cells = list(methods.read_cells(folder).values())
    assert len(cells) == len((folder / "cells.jsonl").read_text().splitlines())  # none of an older version
    assert (folder / "methods.md").read_text() == methods_pages.render(cells)
    assert (folder / "methods.svg").read_text() == methods_pages.draw_curves(cells)
    page = " ".join(METHODS.split())
    said = [sentence for part in methods_report.NAMES for sentence in methods_report.sentences(part, cells)]
    assert len(said) >= 3 and all(sentence in page for sentence in said)
    for part in ("headline", "control"):
        assert methods_report.part_table(part, cells) in METHODS
    assert methods_report.judge_table(cells) in METHODS
    assert methods_report.summary(cells) in " ".join(README.split())
    seeds = {cell["arm"]["seed"] for cell in cells if cell["arm"]["tests"] == "all"}
    assert len(seeds) == 10


def test_the_tables_of_the_real_model_are_those_of_the_committed_run():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import real_model
    path = ROOT / "benchmarks/results/cpu/real_model.json"
    if not path.exists():
        pytest.skip("no run of benchmarks/real_model.py is committed")
    assert real_model.markdown(json.loads(path.read_text())) in BENCHMARKS
