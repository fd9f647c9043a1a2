"""Extract the attention that a model pays to both answers of each pair when it judges them.

    python extract.py --model MODEL --data pairs.jsonl --out weights/
    torchrun --nproc_per_node 8 extract.py --model MODEL --data HUB_ID --layers 1,8,16,24,32 --out weights/

train.py does this by itself when no weights are given; `train.py --weights weights/` uses what is written here.
"""

from pathlib import Path

from twdpo.config import ExtractConfig, parse_config
from twdpo.dist import Process, run_script
from twdpo.extraction import describe_extraction, extract_attention, open_judge_inputs
from twdpo.files import make_directory
from twdpo.judge import build_judge_inputs
from twdpo.model import find_model, fingerprint_model, load_tokenizer
from twdpo.pairs import load_dataset, settle_bad_rows
from twdpo.weights_file import WeightsFile


def main(argv: list[str] | None = None) -> None:
    """Run with a command line (default: sys.argv). Raises SystemExit on a user's error."""
    run_script("extract.py", lambda: parse_config(ExtractConfig, argv, __doc__.split("\n")[0]), extract)


def extract(config: ExtractConfig, process: Process) -> None:
    """pairs -> judge inputs -> attention -> weights file. All ranks."""
    out = process.on_main(lambda: make_directory(Path(config.out), "--out"))
    dataset = load_dataset(config.data, config.eval_data)
    pairs = dataset.train + dataset.held_out
    total = len(pairs) + len(dataset.bad_rows)
    if not config.skip_bad_rows:
        settle_bad_rows(dataset.bad_rows, False, out, total)
    model_dir = find_model(config, process)
    tokenizer = load_tokenizer(model_dir, config.chat_template)
    fingerprint = process.on_main(lambda: fingerprint_model(model_dir))
    meta = describe_extraction(config, config.layers, model_dir, fingerprint, tokenizer, dataset.fingerprint,
                               process.device)
    inputs = open_judge_inputs(config, meta, model_dir, tokenizer, process)
    judged, bad = build_judge_inputs(
        inputs, pairs, lambda items: process.progress(items, desc="tokenise", unit="pair"))
    for what, count in inputs.counts.items():
        process.print(f"{what}: {count}") if count else None
    process.on_main(lambda: settle_bad_rows(dataset.bad_rows + bad, config.skip_bad_rows, out, total))
    extract_attention(config, meta, out, judged, model_dir, tokenizer, process)
    if process.is_main:
        stored = WeightsFile(out)
        print(f"{out}: {len(judged)} pairs, layers {', '.join(map(str, meta['layers']))}; "
              + "; ".join(f"{name} {value:.3f}" for name, value in stored.verdict_statistics(list(judged)).items()))


if __name__ == "__main__":
    main()
