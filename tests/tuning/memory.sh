#!/usr/bin/env bash
# What a job takes of the memory of a server, over what the server takes alone.
#
#   BIN=target/release/hardmax MODEL=models/demo tests/tuning/memory.sh
#
# For each target a fresh server: some requests, so that it has its buffers; its VmRSS; a short job to its end, beside nothing; its VmHWM
# since then. Printed are both, what the job said before it began that it would take, how much of that are activations (with logits and
# teacher), and the peak less the activations over what the server took alone. Variables: TARGETS, STEPS (4), TUNE, SERVE, TEXT.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tuning/common.sh
[ -w "/proc/$$/clear_refs" ] || { echo "peaks cannot be reset here" && exit 77; }

status() { awk -v name="$1:" '$1 == name { print $2 / 1024 }' "/proc/$pid/status"; }

printf '%-16s %10s %10s %10s %12s %8s\n' target "alone MiB" "peak MiB" "said MiB" "activations" ratio
for target in ${TARGETS:-router router+experts all}; do
    serve "$work/tuning-$target"
    "$BIN" bench --grpc --endpoint "$grpc" --clients 4 --prompt-tokens 64 --generate 32 --repeats 2 >/dev/null 2>&1 || die "bench failed"
    alone=$(status VmRSS)
    echo 5 >"/proc/$pid/clear_refs"
    "$BIN" tune --server "$grpc" --data "${text[@]}" --target "$target" --steps "${STEPS:-4}" --override "${tune_flags[@]}" >"$work/tune.log" 2>&1 ||
        { tail -n 5 "$work/tune.log" >&2 && die "tune --target $target"; }
    peak=$(status VmHWM)
    python3 - "$work/tuning-$target/jobs/t1/job.json" "$target" "$alone" "$peak" <<'END'
import json, sys

path, target, alone, peak = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
memory = json.load(open(path))["job"]["memory"]
activations = sum(memory[part] for part in ("activations", "logits", "teacher")) / 2**20
print(f"{target:16} {alone:10.1f} {peak:10.1f} {memory['total'] / 2**20:10.1f} {activations:12.1f} {(peak - activations) / alone:8.3f}")
END
    put_down TERM
done
