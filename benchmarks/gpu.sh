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
# last thing printed is a table of all of it (benchmarks/gpu_table.py, which can be run on the folder again). Ctrl-C
# ends the part that runs, and prints the table of what there is.
#
# Exit codes: 0 if a part succeeded, 1 if none did, 130 if it was stopped, 2 if nothing was begun: without a GPU, where
# it prints what it would run; with MINUTES, OUT or PYTHON that are of no use.
set -u

refuse() { # a line that says why nothing is begun
    echo "gpu.sh: $*" >&2
    exit 2
}

minutes=${1:-8}
if [ $# -gt 1 ] || ! [[ $minutes =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ && $minutes =~ [1-9] ]]; then
    echo "usage: [OUT=folder] [PYTHON=.venv/bin/python] benchmarks/gpu.sh [MINUTES]   MINUTES over 0, 8 by default" >&2
    exit 2
fi
python=$(type -P "${PYTHON:-python}") || refuse "there is no program ${PYTHON:-python}: name one with PYTHON"
python=$(realpath -s "$python") # not the link's target: an environment is found by the link
repository=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
folder=$(realpath -m "${OUT:-$repository/runs/gpu-$(date +%Y%m%d-%H%M%S)}")
cd "$repository" || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

parts=(tests op step attention extraction online toy trl)
declare -A share=([tests]=95 [op]=75 [step]=110 [attention]=35 [extraction]=60 [online]=60 [toy]=45 [trl]=60)
scratch=$(mktemp -d)
running=
trap 'rm -rf "$scratch"' EXIT
trap stop INT TERM HUP

# Runs a command for at most $1 seconds in a process group of its own, with its output in the file $2. Waits for the
# command alone: not for what it left behind, which may hold the output open.
limited() {
    : >"$2" # there before anyone follows it
    timeout --kill-after=10 "$1" "${@:3}" </dev/null >>"$2" 2>&1 &
    running=$!
}

# Waits for what `limited` started, and returns its exit code.
finished() {
    local code
    wait "$running"
    code=$?
    running=
    return "$code"
}

print_table() {
    echo
    "$python" benchmarks/gpu_table.py "$folder" | tee "$folder/table.txt"
}

stop() {
    trap - INT TERM HUP # a second one ends this script at once
    if [ -n "$running" ]; then
        kill "$running" 2>/dev/null
        wait # for the part, ten seconds at most, and what follows its log
    fi
    if [ -n "${started:-}" ]; then
        note "$part" "stopped" $((SECONDS - started)) "$limit"
        print_table
    fi
    exit 130
}

# The command of part $1, which has $2 seconds, in the array `command`.
command_of() {
    local inner
    inner=$(awk "BEGIN { print 0.9 * $2 / 60 }") # a benchmark ends by itself before its time is over
    case $1 in
    tests) command=("$python" -m pytest -m gpu -q --durations=5 -p no:cacheprovider) ;;
    op) command=("$python" benchmarks/loss_kernel.py --heads llama-3-8b --tokens 4096,16384 --only twdpo,TRL,KL
        --minutes "$inner" --out "$folder/loss_kernel.json") ;;
    step) command=("$python" benchmarks/train_step.py --shape llama-3-8b --else-shape llama-3.2-1b --only ours
        --steps 6 --out "$folder/train_step.json") ;;
    attention) command=("$python" benchmarks/attention.py --out "$folder/attention.json") ;;
    extraction) command=("$python" benchmarks/extraction.py --ragged --seconds 3 --minutes "$inner"
        --out "$folder/extraction.json") ;;
    online) command=("$python" benchmarks/online_costs.py --shape llama-3.2-1b --pairs 16 --seconds 4 --minutes "$inner"
        --out "$folder/online_costs.json") ;;
    toy) command=("$python" train.py --output-dir "$scratch/toy" --cache-dir "$scratch/cache") ;;
    trl) command=("$python" benchmarks/train_step.py --shape llama-3.2-1b --only ours,precomputed
        --checkpointing none full --steps 4 --out "$folder/trl.json") ;;
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
[ -e "$folder/parts.jsonl" ] && refuse "$folder holds an earlier run: name another folder with OUT"
limited 120 "$scratch/check.log" "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)'
finished
case $? in
0) ;;
3)
    echo "gpu.sh: $python finds no GPU (torch.cuda.is_available()), so nothing was run. With one, in $minutes minutes:"
    left=$budget
    for part in "${parts[@]}"; do
        limit=$(limit_of "$part" "$left")
        left=$((left - limit))
        command_of "$part" "$limit"
        echo "  $part, at most $limit s: ${command[*]}"
    done
    exit 2
    ;;
124 | 137) refuse "$python had not imported torch and looked for a GPU after 120 s" ;;
*) refuse "$python can't import torch: $(tail -n 1 "$scratch/check.log")" ;;
esac

mkdir -p "$folder" || exit 1
succeeded=0
for part in "${parts[@]}"; do
    limit=$(limit_of "$part" $((budget - SECONDS)))
    if [ "$limit" -lt 3 ]; then
        note "$part" "left out: no time left" 0 "$limit"
        continue
    fi
    started=$SECONDS
    if [ "$part" = trl ]; then
        limited "$limit" "$folder/trl.log" "$python" -c 'import datasets, trl'
        if ! finished; then
            note "$part" "left out: trl and datasets can't be imported" $((SECONDS - started)) "$limit"
            continue
        fi
        limit=$((limit - (SECONDS - started)))
        [ "$limit" -lt 1 ] && limit=1 # 0 would be no limit
        started=$SECONDS
    fi
    command_of "$part" "$limit"
    echo "== $part, at most $limit s: ${command[*]}"
    limited "$limit" "$folder/$part.log" "${command[@]}"
    tail -n +1 -s 0.2 -f --pid="$running" "$folder/$part.log" &
    follower=$!
    finished
    code=$?
    wait "$follower"
    took=$((SECONDS - started))
    case $code in
    0) status=ok succeeded=1 ;;
    124) status="ended by its limit" ;;
    137) [ "$took" -ge "$limit" ] && status="ended by its limit" || status="killed: exit code 137" ;;
    *) status="failed: exit code $code" ;;
    esac
    [ "$part" = toy ] && cp "$scratch/toy/metrics.jsonl" "$folder/toy-metrics.jsonl" 2>/dev/null
    note "$part" "$status" "$took" "$limit"
    started=
done
print_table
[ "$succeeded" = 1 ]
