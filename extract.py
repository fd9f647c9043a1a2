"""Extract the attention that a model pays to both answers of each pair when it judges them.

    python extract.py --model MODEL --data pairs.jsonl --out weights/
    torchrun --nproc_per_node 8 extract.py --model MODEL --data HUB_ID --layers 1,8,16,24,32 --out weights/

train.py does this by itself when no weights are given; `train.py --weights weights/` uses what is written here.
"""

from pathlib import Path

from twdpo.authors_columns import export_columns
from twdpo.config import ExtractConfig, parse_config
from twdpo.data_files import TEST_SPLITS, TRAIN_SPLITS, local_files, parse_sources, read_rows, with_test_split
from twdpo.dataset import Dataset, load_dataset, parse_eval_data, settle_bad_rows
from twdpo.dist import Process
from twdpo.files import check_directory, read_object
from twdpo.flags import InputError
from twdpo.forms import Reading
from twdpo.judge.extraction import Extraction
from twdpo.judge.verbalize import Scoring
from twdpo.judge.verbalized import describe_left_out
from twdpo.models.source import describe_date, open_model
from twdpo.pages.weights import write_report
from twdpo.pairs import Pair
from twdpo.printed import check_templated
from twdpo.script import run_script
from twdpo.weights_file import ROLLOUT, WeightsFile, describe_verdicts, read_meta, warn_of_verdicts


def main(argv: list[str] | None = None) -> None:
    """Run with a command line (default: sys.argv). Raises SystemExit on a user's error."""
    run_script("extract.py", lambda: parse_config(ExtractConfig, argv, __doc__.split("\n")[0]), extract,
               lambda: "; the same command goes on where it was")


def extract(config: ExtractConfig, process: Process) -> None:
    """pairs -> judge inputs -> attention -> weights file, or pairs -> verbalised scores. All ranks."""
    sources = parse_sources(config.data)
    for source in filter(None, parse_eval_data(config.eval_data).values()):
        sources += parse_sources(source, "--eval-data")
    out = process.on_main(lambda: check_directory(Path(config.out), "--out"))
    dataset = load_dataset(config.data, config.eval_data, reading=Reading.of(config))
    for path in exports(config, dataset):
        if path.resolve() in local_files(sources):
            raise InputError(f"--export {config.export}: {path} is a file that is read: choose another name")
    for line in dataset.report.lines():
        process.print(line)
    pairs = dataset.train + dataset.held_out
    total = len(pairs) + len(dataset.bad_rows)
    if not config.skip_bad_rows:
        settle_bad_rows(dataset.bad_rows, False, out, total)
    model = open_model(config.model or "toy", process, config.chat_template, templated=config.templated,
                       date=config.date or stored_date(out))
    if model.printed_date:
        process.print(describe_date(model))
    if line := check_templated(model.chat, pairs):
        process.print(line)
    if config.verbalized:
        process.on_main(lambda: settle_bad_rows(dataset.bad_rows, config.skip_bad_rows, out, total))
        scoring = Scoring(config, model, dataset.fingerprint, out, process)
        scoring.run(pairs)
        process.print(describe_left_out(scoring.open(), [pair.key for pair in pairs]))
        return
    layers = ",".join(filter(None, [config.layers, ROLLOUT * config.rollout]))
    extraction = Extraction(config, model, layers, dataset.fingerprint, out, process)
    bad = extraction.check(pairs)
    process.on_main(lambda: settle_bad_rows(dataset.bad_rows + bad, config.skip_bad_rows, out, total))
    unfit = {row.where for row in bad}
    pairs = [pair for pair in pairs if pair.where not in unfit]
    extraction.run(pairs)
    process.on_main(lambda: finish(config, out, pairs, model.tokenizer, dataset))


def stored_date(out: Path) -> str:
    """The date that the chat template printed for what a folder holds already; "" where there is none."""
    return str((read_object(out / "meta.json") or {}).get("date", ""))


def exports(config: ExtractConfig, dataset: Dataset) -> list[Path]:
    """The files of --export: that of the training rows, then one for each held-out set."""
    path = Path(config.export)
    stems = [path.stem] + ["_".join(filter(None, [path.stem, "held_out", name]))
                           for name in (parse_eval_data(config.eval_data) if dataset.held_out else ())]
    return [path.with_name(stem + path.suffix) for stem in stems] if config.export else []


def finish(config: ExtractConfig, out: Path, pairs: list[Pair], tokenizer, dataset: Dataset) -> None:
    """Say what is stored; write the export and the report."""
    stored = WeightsFile(out, ",".join(map(str, read_meta(out)["layers"])))
    keys = [pair.key for pair in pairs]
    print(f"{out}: {len(pairs)} pairs, layers {', '.join(stored.layers)}")
    for line in filter(None, (describe_verdicts(stored, keys), warn_of_verdicts(stored, keys))):
        print(line)
    if config.export:
        sources = parse_sources(config.data)
        tables = [read_rows(sources, TRAIN_SPLITS)]
        for source in parse_eval_data(config.eval_data).values() if dataset.held_out else ():
            tables.append(read_rows(parse_sources(source, "--eval-data"), TEST_SPLITS + TRAIN_SPLITS)
                          if source else read_rows(with_test_split(sources), TEST_SPLITS))
        for path, rows in zip(exports(config, dataset), tables):
            rows, missing = export_columns(path, rows, stored, tokenizer, config.judge_rounds, Reading.of(config))
            print(f"{path}: {rows} rows" + (f", {missing} of them not judged, with null lists" if missing else ""))
    if config.report:
        print(write_report(Path(config.report), stored, pairs, tokenizer, config))
        print(f"{Path(config.report) / 'weights.html'}: a page to look at; report.json: the same figures")


if __name__ == "__main__":
    main()
