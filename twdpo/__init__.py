"""Token-weighted Direct Preference Optimization (TwDPO) and AttentionPO (arXiv 2605.21883).

The files are the pipeline; a file imports only from files above it (tests/test_readme.py holds the order):

    config, files, dist, plugins     every setting; atomic writes and hashes; processes and FSDP2; options of functions
    toy/grammar, pairs, chat, rows   the embedded default; preference pairs; their tokens; which share a micro-batch
    weights_file, align, postprocess raw attention on disk; judge tokens -> training tokens; raw attention -> a_t
    weights, authors_columns, batch  weight sources; the authors' columns; collate and the label shift
    logratio, losses, objective      the fused op (kernels/ has it in Triton); pair losses; a loss and a source, bound
    metrics                          what a step and an evaluation report
    models/                          found, their attention, built, read in shards, the policy, generation, memory
    judge/                           the judge's prompt, the judge, the pass over all pairs; verbalised scores
    logps, inputs                    log-probs of frozen models; what a run is made from, checked first
    run_folder, checkpoint, log      a run's folder; save, load, export; metrics.jsonl, console, wandb
    pages/, toy/                     pages of runs and weights; what is planted in the toy, how its model was made
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parent.parent
if not (_checkout / "twdpo" / "kernels").is_dir():  # in a checkout, kernels/ is twdpo.kernels, as setup.py ships it
    __path__.append(str(_checkout))
