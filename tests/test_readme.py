"""The README's promises that a test can check: its two commands, its file table, its example."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_two_blocks_set_up_and_run():
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for block, last in zip(blocks, ("torchrun train.py", "python -m pytest")):
        lines = block.splitlines()
        assert lines[0] == "python3 -m venv .venv" and lines[-1].endswith(last) and "$" not in block


def test_file_table_lists_the_package_in_import_order():
    listed = re.findall(r"^\| `twdpo/(\w+)\.py`", README, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "twdpo").glob("*.py") if path.stem != "__init__")
    for place, name in enumerate(listed):
        source = (ROOT / "twdpo" / f"{name}.py").read_text(encoding="utf-8")
        used = set(re.findall(r"^\s*from twdpo\.(\w+) import", source, re.MULTILINE))
        used |= set(re.findall(r"^\s*from twdpo import (\w+)", source, re.MULTILINE))
        assert used <= set(listed[:place]), f"{name}.py imports from files below it: {used - set(listed[:place])}"


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


def test_tables_of_losses_and_sources_are_their_docstrings():
    from twdpo.losses import LOSSES, loss_needs
    from twdpo.plugins import describe
    from twdpo.weights import WEIGHTS, source_needs
    for rows in (describe(LOSSES, loss_needs), describe(WEIGHTS, source_needs)):
        bar = "\\|"  # a bare | would begin another cell
        lines = [f"| `{name}` | {what} | {needs} | {options.replace('|', bar)} |"
                 for name, what, needs, options in rows]
        assert "\n".join(lines) in README


def test_figures_of_the_fused_op_are_those_of_the_committed_run():
    """Every row of the README's table, against benchmarks/results/cpu/loss_kernel.json."""
    report = json.loads((ROOT / "benchmarks/results/cpu/loss_kernel.json").read_text())
    rows = {(row["vocabulary"], row["tokens"], row["method"]): row for row in report["rows"]}
    table = re.findall(r"^\| V ([\d,]+), D 512 \| ([\d,]+) \| (.+?) \| (.+?) \| (.+?) MiB \| (.+?) MiB \|$", README,
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


def test_figures_of_the_extraction_are_those_of_the_committed_run():
    report = json.loads((ROOT / "benchmarks/results/cpu/extraction.json").read_text())
    table = re.findall(r"^\| ([\d,]+) \| (.+?) s \| (.+?) \| (.+?) x \| (.+?) MiB \| (.+?) \|$", README, re.MULTILINE)
    ours = [row for row in report["rows"] if row["way"] == "ours"]
    assert len(table) == len(ours) == 2
    for cells, row in zip(table, ours):
        assert list(cells) == [f"{row['tokens']:,}", f"{row['seconds_a_pair']:.2f}", f"{row['over_limit']:.2f}",
                               f"{row['speed_over_eager']:.1f}", f"{row['peak_extra_mib']:.0f}",
                               f"{row['memory_over_eager']:.3f}"]


def test_figures_of_the_training_step_are_those_of_the_committed_run():
    report = json.loads((ROOT / "benchmarks/results/cpu/train_step.json").read_text())
    rows = [row for row in report["rows"] if "note" not in row]
    assert len(rows) >= 5
    for row in rows:
        assert (f"| {row['way']} | {row['pairs_per_s']:.3f} | {row['ours_faster']:.2f} x | {row['peak_gib']:.2f} "
                f"| {row['ours_memory']:.2f} x |\n") in README


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


def test_the_table_of_sources_is_that_of_the_committed_run():
    """The lines of `twdpo` in benchmarks/results/cpu/methods.md, which is made from methods.json beside it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import methods
    results = ROOT / "benchmarks/results/cpu"
    rows = json.loads((results / "methods.json").read_text())["rows"]
    table = methods.markdown_table(rows)
    assert (results / "methods.md").read_text() == table + "\n"
    assert (results / "methods.svg").read_text() == methods.draw_plot(rows)
    lines = [line for line in table.splitlines() if line.startswith(("| loss", "| `twdpo`"))]
    assert all(line in README for line in lines) and len(lines) > 8
    assert len({row["seed"] for row in rows}) >= 3 and {row["pairs"] for row in rows} == {64, 256, 1024}
