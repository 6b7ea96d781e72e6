#!/usr/bin/env bash
# What a job in the background costs requests: their throughput with and without one, in turns.
#
#   BIN=target/release/hardmax MODEL=models/demo tests/tuning/alongside.sh
#
# One server; PAIRS times a burst of requests while the job is paused and one while it runs, every second time the other way round. What is
# printed is each pair, both medians, and the ratio of the medians. Variables: DUTY (0.25), CLIENTS (8), PROMPT (128) and GENERATE (128)
# tokens, REPEATS (5) bursts of each measurement, TARGET (router), WINDOW (128) tokens, SERVE and TUNE (more flags of serve and tune), TEXT.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tuning/common.sh
pairs=${PAIRS:-5} duty=${DUTY:-0.25}

serve "$work/tuning"

# Tokens per second and the 99th percentile of the time between tokens, in ms.
burst() {
    "$BIN" bench --grpc --endpoint "$grpc" --metrics-endpoint "$metrics" --clients "${CLIENTS:-8}" --prompt-tokens "${PROMPT:-128}" \
        --generate "${GENERATE:-128}" --repeats "${REPEATS:-5}" --seed "$1" --json "$work/burst.json" >/dev/null 2>"$work/bench.log" ||
        { cat "$work/bench.log" >&2 && die "bench failed"; }
    python3 -c '
import json, sys
of = json.load(open(sys.argv[1]))["grpc"][0]
print(of["tokens_per_second"], of["inter_token"]["p99"] * 1000)' "$work/burst.json"
}
job() { "$BIN" tune --server "$grpc" "$@" >>"$work/tune.log" 2>&1 || { tail -n 5 "$work/tune.log" >&2 && die "tune $*"; }; }
learns() { until_above hardmax_tuning_tokens_total "$(series hardmax_tuning_tokens_total)"; }
with() { job --resume-job t1; learns; burst "$1"; job --pause t1; }

# It never ends by itself, and takes no memory while it is paused.
"$BIN" tune --server "$grpc" --data "${text[@]}" --share "$duty" --target "${TARGET:-router}" --steps 1000000 --window-tokens "${WINDOW:-128}" \
    "${tune_flags[@]}" >>"$work/tune.log" 2>&1 &
processes+=($!)
until_above hardmax_tuning_step 0
job --pause t1
burst 0 >/dev/null

say "$pairs pairs, duty $duty; tokens/s, and p99 between tokens in ms"
for ((n = 1; n <= pairs; n++)); do
    if ((n % 2)); then without=$(burst "$n"); fi
    beside=$(with "$n")
    if ((n % 2 == 0)); then without=$(burst "$n"); fi
    echo "$without $beside" | tee -a "$work/pairs" | awk '{ printf "   without %8.1f (%6.1f ms)   with %8.1f (%6.1f ms)   %.3f\n", $1, $2, $3, $4, $3 / $1 }'
done
python3 -c '
import statistics, sys
rows = [[float(value) for value in line.split()] for line in open(sys.argv[1])]
without, alone, beside, shared = (statistics.median(column) for column in zip(*rows))
print(f"   medians {without:8.1f} ({alone:6.1f} ms)   with {beside:8.1f} ({shared:6.1f} ms)   {beside / without:.3f}")' "$work/pairs"
say "a turn took $(python3 -c "print(f'{1000 * $(series hardmax_tuning_turn_seconds_sum) / max(1, $(series hardmax_tuning_turn_seconds_count)):.0f}')") ms on average"
