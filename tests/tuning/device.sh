#!/usr/bin/env bash
# Tuning on a GPU against the same on the CPU: losses and gradients step by step, and what came of them.
#
#   BIN=target/release/hardmax MODEL=models/demo tests/tuning/device.sh
#
# BIN is built with `--features cuda` and runs where there is a GPU. For each target: once on the CPU in f32, once on the device in f32, once there in
# bf16, and in bf16 with recomputation. Printed are the largest relative differences from the CPU of the losses of the steps, the first norm of
# the gradients, and perplexity after; the script fails where one is above its limit. Variables: STEPS (20), DEVICE (cuda), TEXT, TUNE (more
# flags of tune).
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tuning/common.sh
device=${DEVICE:-cuda}

tune() { # NAME, flags
    local name=$1
    shift
    "$BIN" tune --model "$MODEL" --data "${text[@]}" --steps "${STEPS:-20}" --windows 4 --micro-windows 2 --window-tokens 128 --override \
        --json "$work/$name.json" "${tune_flags[@]}" "$@" 2>"$work/$name.log" >/dev/null || { tail -n 5 "$work/$name.log" >&2 && die "$name"; }
}

printf '%-16s %-16s %10s %10s %10s\n' target run losses gradient after
status=0
for target in router router+experts all; do
    tune cpu --target "$target" --device cpu --dtype f32
    tune f32 --target "$target" --device "$device" --dtype f32
    tune bf16 --target "$target" --device "$device" --dtype bf16
    tune again --target "$target" --device "$device" --dtype bf16 --recompute layer
    for run in "f32 0.002" "bf16 0.05" "again 0.05"; do
        read -r name limit <<<"$run"
        python3 - "$work/cpu.json" "$work/$name.json" "$target" "$name" "$limit" <<'PYTHON' || status=1
import json, sys
cpu, other = (json.load(open(path)) for path in sys.argv[1:3])
target, name, limit = sys.argv[3], sys.argv[4], float(sys.argv[5])
def steps(report):
    found = [event.get("step", event) for event in report["progress"]]
    return [event for event in found if isinstance(event, dict) and "lm_loss" in event]
a, b = steps(cpu), steps(other)
assert a and len(a) == len(b), "the steps of the reports"
apart = lambda x, y: abs(x - y) / max(abs(x), 1e-9)
losses = max(apart(x["lm_loss"], y["lm_loss"]) for x, y in zip(a, b))
gradient = apart(a[0]["grad_norm"], b[0]["grad_norm"])
after = apart(cpu["after"]["reference_perplexity"], other["after"]["reference_perplexity"])
good = losses <= limit and gradient <= 4 * limit and after <= limit
print(f"{target:<16} {name:<16} {losses:>10.6f} {gradient:>10.6f} {after:>10.6f}{'' if good else '  ABOVE THE LIMIT'}")
sys.exit(not good)
PYTHON
    done
done
exit $status
