"""Token-weighted Direct Preference Optimization (TwDPO) and AttentionPO (arXiv 2605.21883).

The files of this package are the pipeline, in this order; a file imports only from files above it:

    config, files          one flat config per entry point; atomic writes and content hashes
    toy, pairs, chat       the embedded default; preference pairs; chat template and tokens
    rows                   which pairs share a micro-batch, on which process; packed rows
    judge, attention       the judge prompt in both orders; the attention of all models, and the row of a verdict
    align, weights_file    judge tokens -> training tokens; raw attention on disk
    verbalized             the verbalised self-judge: its prompt, its output, its scores on disk
    weights, batch         weight sources and their post-processing; collate and the label shift
    columns, report        the authors' columns; statistics and a page of token weights
    logratio, losses       log-probs and weighted log-ratios; pair losses
    metrics, planted       what a step and an evaluation report; what is known of the toy's answers
    dist, model            process group and FSDP2 plan; the policy and its tokenizer
    extraction, generate   the judge pass; generation in batches
    reference, inputs      the reference pass and its cache; what a run is made from, checked before weights are loaded
    objective, auxiliary   the loss and source that the flags name; log-probs under auxiliary models
    checkpoint, log        save, resume, export; metrics.jsonl, console, wandb
    toy_train              how the toy's model was made
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parent.parent
if not (_checkout / "twdpo" / "kernels").is_dir():  # in a checkout, kernels/ is twdpo.kernels, as setup.py ships it
    __path__.append(str(_checkout))
