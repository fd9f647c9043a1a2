#!/usr/bin/env bash
# What a GPU shows, in one call of a few minutes:
#
#     benchmarks/gpu.sh [MINUTES]                     8 by default
#     OUT=folder PYTHON=.venv/bin/python benchmarks/gpu.sh 5
#
# Needs beside this repository one CUDA GPU and an environment with torch for CUDA, triton, transformers and pytest.
# Liger, cut-cross-entropy and TRL with datasets are optional: folders on PYTHONPATH will do. No network.
#
# The parts run in the order of their worth. Each has its share of the time that is left, and is ended when it is over;
# one that fails or is ended does not hold up the others. JSON and logs go to $OUT, or runs/gpu-DATE, as they come; the
# last thing printed is a table of all of it (benchmarks/gpu_table.py, which can be run on the folder again). Without a
# GPU it prints what it would run, and ends with exit code 2.
set -u

minutes=${1:-8}
python=${PYTHON:-python}
repository=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
folder=$(realpath -m "${OUT:-$repository/runs/gpu-$(date +%Y%m%d-%H%M%S)}")
cd "$repository" || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

parts=(tests op step attention extraction toy trl)
declare -A share=([tests]=95 [op]=75 [step]=110 [attention]=35 [extraction]=60 [toy]=45 [trl]=60)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The command of part $1, which has $2 seconds, in the array `command`.
command_of() {
    local inner
    inner=$(awk "BEGIN { print 0.9 * $2 / 60 }") # a benchmark ends by itself before its time is over
    case $1 in
    tests) command=("$python" -m pytest -m gpu -q --durations=5 -p no:cacheprovider) ;;
    op) command=("$python" benchmarks/loss_kernel.py --heads llama-3-8b --tokens 4096,16384 --only twdpo,TRL
        --minutes "$inner" --out "$folder/loss_kernel.json") ;;
    step) command=("$python" benchmarks/train_step.py --shape llama-3-8b --else-shape llama-3.2-1b --only ours
        --steps 6 --out "$folder/train_step.json") ;;
    attention) command=("$python" benchmarks/attention.py --out "$folder/attention.json") ;;
    extraction) command=("$python" benchmarks/extraction.py --ragged --seconds 3 --minutes "$inner"
        --out "$folder/extraction.json") ;;
    toy) command=("$python" train.py --output-dir "$scratch/toy" --cache-dir "$scratch/cache") ;;
    trl) command=("$python" benchmarks/train_step.py --shape llama-3.2-1b --only ours,precomputed --checkpointing none
        --steps 4 --out "$folder/trl.json") ;;
    esac
}

# The seconds that part $1 may have of $2 that are left for it and those after it.
limit_of() {
    local left=$2 sum=0 later=0 name
    for name in "${parts[@]}"; do
        [ "$name" = "$1" ] && later=1
        [ "$later" = 1 ] && sum=$((sum + share[$name]))
    done
    echo $((left * share[$1] / sum))
}

note() { # part, status, seconds, limit: a line of parts.jsonl
    printf '{"part": "%s", "status": "%s", "seconds": %d, "limit": %d}\n' "$@" >>"$folder/parts.jsonl"
}

budget=$(awk "BEGIN { print int(60 * $minutes) }")
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $python finds no GPU (torch.cuda.is_available()), so nothing was run. With one, in $minutes minutes:"
    left=$budget
    for part in "${parts[@]}"; do
        limit=$(limit_of "$part" "$left")
        left=$((left - limit))
        command_of "$part" "$limit"
        echo "  $part, at most $limit s: ${command[*]}"
    done
    exit 2
fi

mkdir -p "$folder" || exit 1
for part in "${parts[@]}"; do
    limit=$(limit_of "$part" $((budget - SECONDS)))
    if [ "$limit" -lt 3 ]; then
        note "$part" "left out: no time left" 0 "$limit"
        continue
    fi
    if [ "$part" = trl ] && ! "$python" -c 'import datasets, trl' 2>"$folder/trl.log"; then
        note "$part" "left out: trl and datasets can't be imported" 0 "$limit"
        continue
    fi
    command_of "$part" "$limit"
    echo "== $part, at most $limit s: ${command[*]}"
    started=$SECONDS
    timeout --kill-after=10 "$limit" "${command[@]}" </dev/null 2>&1 | tee "$folder/$part.log"
    code=${PIPESTATUS[0]}
    case $code in
    0) status=ok ;;
    124 | 137) status="ended by its limit" ;;
    *) status="failed: exit code $code" ;;
    esac
    [ "$part" = toy ] && cp "$scratch/toy/metrics.jsonl" "$folder/toy-metrics.jsonl" 2>/dev/null
    note "$part" "$status" $((SECONDS - started)) "$limit"
done
echo
"$python" benchmarks/gpu_table.py "$folder" | tee "$folder/table.txt"
