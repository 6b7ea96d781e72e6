#!/usr/bin/env bash
# One part of run.sh: `parts.sh PART`, with BIN, MODEL, PYTHON, RESULTS, QUICK, TINY and LAYERS in the environment. What it prints is its log;
# a line that begins with "= " is its word in the table. Exit status 77: skipped.
# shellcheck disable=SC2054 # The commas are the flags'.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
logs=$RESULTS/logs
work=$(mktemp -d)
processes=()
finish() {
    [ ${#processes[@]} = 0 ] || kill "${processes[@]}" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
say() { printf -- '-- %s\n' "$*"; }
word() { printf '= %s\n' "$*"; }
skip() { word "$*"; exit 77; }
fail() { word "$*"; exit 1; }
python() { "$PYTHON" "$@"; }
has_python() { command -v "$PYTHON" >/dev/null; }

# What this machine and this binary are.
machine() {
    local bytes stripped
    bytes=$(stat -L -c %s "$BIN")
    stripped=$(if command -v readelf >/dev/null && readelf -S "$BIN" 2>/dev/null | grep -q ' \.symtab '; then echo ", not stripped"; fi)
    {
        printf '* %s UTC, %s\n' "$(date -u '+%Y-%m-%d %H:%M')" "$(uname -srm)"
        printf '* %s cores, %s\n' "$(nproc)" "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
        nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2>/dev/null | sed 's/^/* GPU: /' || echo "* no nvidia-smi"
        printf '* binary: %s MB%s, sha256 %s\n' $((bytes / 1000000)) "$stripped" "$(sha256sum "$BIN" | cut -c 1-16)"
    } | tee "$logs/machine.txt"
    say "libraries"
    ldd "$BIN" || true
    if command -v nvidia-smi >/dev/null; then
        say "nvidia-smi -q"
        nvidia-smi -q -d MEMORY,UTILIZATION,ECC,TEMPERATURE,POWER,CLOCK,PERFORMANCE || true
        nvidia-smi -q | grep -E 'Driver Version|CUDA Version|Product Name|VBIOS|Persistence Mode|Compute Mode|MIG Mode|Current *:' || true
    fi
    if [ -z "$TINY" ] && ((bytes >= 60000000)); then fail "the binary has $((bytes / 1000000)) MB$stripped; it should have less than 60: strip it"; fi
    word "$(sed -n 's/^\* GPU: //p' "$logs/machine.txt" | head -n 1 | grep . || echo "no GPU"), binary of $((bytes / 1000000)) MB"
}

# Every kernel against its definition, and a model on the GPU against the same on the CPU.
kernels() {
    # The emulator takes minutes for what is compared of a model; the next parts run one too.
    "$BIN" gpu-check --model "$MODEL" ${QUICK:+--quick} ${TINY:+--kernels-only}
    word "all within their tolerances"
}

# The demo through the command line, on both devices: logits and routing of one text, and the fidelity report, in which all routings take part.
parity() {
    local device ids tokens=4096 window=256
    ids=$(seq -s , 7 15 1920)
    if [ -n "$QUICK" ]; then tokens=1024; fi
    if [ -n "$TINY" ]; then ids=$(seq -s , 7 60 1920) tokens=48 window=24; fi
    for device in cpu cuda; do
        say "$device"
        "$BIN" forward --model "$MODEL" --device $device --input-ids "$ids" --output "$work/$device.safetensors"
        "$BIN" fidelity --model "$MODEL" --device $device --text "$MODEL/data/heldout.txt" --max-tokens $tokens --window $window --floor-tokens 0 \
            --advice-tokens 0 --json "$work/$device.json"
    done
    has_python || skip "both devices ran; no $PYTHON to compare what they wrote"
    python "$here/compare.py" "$work"
}

# Starts a server: $grpc (a URL) and $metrics.
serve() {
    local log=$logs/serve.log
    "$BIN" serve --model "$MODEL" --device cuda --log-format json --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 2>"$log" &
    processes+=($!)
    until grep -qs '"message":"serving"' "$log"; do
        kill -0 "${processes[0]}" 2>/dev/null || { tail -n 3 "$log"; fail "the server does not start: $(tail -n 1 "$log")"; }
        sleep 0.1
    done
    grpc=http://$(sed -n 's/.*"message":"starting".*"grpc":"\([^"]*\)".*/\1/p' "$log")
    metrics=$(sed -n 's/.*"message":"starting".*"metrics":"\([^"]*\)".*/\1/p' "$log")
}

# Texts of several clients at once, each of its own prompt.
clients() { # COUNT TOKENS
    local n pids=() prompts=("In the beginning" "And it came to pass" "The LORD said unto Moses" "Behold")
    for ((n = 0; n < $1; n++)); do
        "$BIN" generate "${prompts[n % ${#prompts[@]}]}" --url "$grpc" --max-new-tokens "$2" --min-new-tokens "$2" --seed "$n" >"$work/text.$n" 2>>"$logs/clients.log" &
        pids+=($!)
    done
    for n in "${!pids[@]}"; do
        wait "${pids[n]}" || fail "client $n of $1 got no text: $(tail -n 1 "$logs/clients.log")"
        [ -s "$work/text.$n" ] || fail "the text of client $n of $1 is empty"
    done
    cat "$work/text.0" && echo
}

# A real server, real clients, and a soak that compares every stream with a run of its prompt alone.
server() {
    local seconds=120 many=32 tokens=64 load=100 pid
    if [ -n "$QUICK" ]; then seconds=20; fi
    if [ -n "$TINY" ]; then seconds=8 many=4 tokens=4 load=3; fi
    serve
    say "one client, then $many at once"
    clients 1 $tokens
    clients $many $tokens
    say "soak"
    "$BIN" bench --soak $seconds --clients $load --endpoint "$grpc" --metrics-endpoint "$metrics" --routing native,top-1,top-2,soft \
        --prompt-tokens $tokens --generate $tokens --tie-tolerance 0.1 --json "$logs/soak.json"
    say "end"
    pid=${processes[0]}
    kill -TERM "$pid"
    processes=()
    wait "$pid" || fail "the server ended with status $?: $(tail -n 1 "$logs/serve.log")"
    word "$many clients at once and a soak of $seconds s with $load; no stream differs, nothing leaks"
}

# A tuning of the demo on both devices: losses, gradients, and what came of them.
tuning() {
    local script=$here/../tuning/device.sh status=0
    has_python || skip "no $PYTHON to compare with"
    [ -f "$script" ] || skip "no tests/tuning beside tests/gpu"
    if [ -n "$TINY" ]; then
        # What is measured before and after is most of the time.
        head -c 12000 "$MODEL/data/heldout.txt" >"$work/text"
        export STEPS=2 TEXT=$work/text
    fi
    bash "$script" || status=$?
    [ $status != 77 ] || skip "tests/tuning/device.sh lacks a tool: see above"
    [ $status = 0 ] || fail "the devices differ: see above"
    word "losses, gradients and results of both devices agree"
}

# Layers of a shape, in which the run is cut; nothing where it is whole.
layers_of() { # SHAPE
    local free
    if [ -n "$LAYERS" ] || [ -n "$QUICK" ]; then echo "${LAYERS:-4}" && return; fi
    free=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
    # 93 GB of weights.
    if [ "$1" = mixtral-8x7b ] && ((free < 120000)); then echo 16; fi
}

# Decoding and prefill of one shape, with weights of one type.
bench_shape() { # SHAPE DTYPE
    local layers name=$1 file=$logs/bench.$1 decode=(--batch 1,16,64 --context 512 --generate 32) repeats=5
    local prefill=(--batch 1 --prompt-tokens 8192 --step-tokens 8192)
    if [ -n "$QUICK" ]; then repeats=3; fi
    if [ -n "$TINY" ]; then
        # Blocks of fp8 weights are 128 wide.
        name=$1,hidden=128,expert-width=128 repeats=1
        decode=(--batch 1,3 --context 8 --generate 2 --limits-mib 1 --gemm-size 64) prefill=(--batch 1 --prompt-tokens 16 --limits-mib 1 --gemm-size 64)
    else
        layers=$(layers_of "$1")
        name=$1${layers:+,layers=$layers},context=8192
    fi
    if [ "$2" != bf16 ]; then file+=.$2; fi
    say "$name, $2, decode"
    "$BIN" bench --synthetic "$name" --device cuda --dtype "$2" --work decode "${decode[@]}" --repeats $repeats --json "$file.decode.json"
    say "$name, $2, prefill"
    "$BIN" bench --synthetic "$name" --device cuda --dtype "$2" --work prefill "${prefill[@]}" --routing native,top-1,top-2 --repeats $repeats \
        --json "$file.prefill.json"
}

# The three shapes, and one of them with experts in fp8.
bench() {
    local shape shapes=(olmoe-1b-7b qwen3-30b-a3b mixtral-8x7b)
    if [ -n "$TINY" ]; then shapes=(tiny); fi
    for shape in "${shapes[@]}"; do bench_shape "$shape" bf16; done
    bench_shape "${shapes[0]}" fp8
    word "${shapes[*]}, and ${shapes[0]} in fp8"
}

# What watching costs an engine with a full batch.
overhead() {
    local shape=olmoe-1b-7b,context=1024 load=(--batch 16 --prompt-tokens 128 --generate 64 --repeats 20)
    if [ -n "$TINY" ]; then shape=tiny load=(--batch 2 --prompt-tokens 8 --generate 2 --repeats 2); fi
    "$BIN" bench --synthetic $shape --device cuda --dtype bf16 --experiment overhead --routing top-1 "${load[@]}" --json "$logs/overhead.json"
    word "measured"
}

# transformers and the Triton kernel, on the same shapes.
peer() {
    local shape layers flags=() shapes=(olmoe-1b-7b qwen3-30b-a3b mixtral-8x7b) status measured=()
    has_python || skip "no $PYTHON"
    if [ -n "$QUICK" ]; then shapes=(olmoe-1b-7b qwen3-30b-a3b) flags=(--repeats 3); fi
    if [ -n "$TINY" ]; then shapes=(olmoe-1b-7b) flags=(--device cpu --tiny --experts grouped_mm,batched_mm); fi
    for shape in "${shapes[@]}"; do
        layers=$([ -n "$TINY" ] || layers_of "$shape")
        status=0
        python "$here/peer.py" --shapes "$shape" ${layers:+--layers "$layers"} "${flags[@]}" --json "$logs/peer.$shape.json" | tee "$work/peer" || status=$?
        case $status in
        0) measured+=("$shape") ;;
        77) skip "$(sed -n 's/^skipped: //p' "$work/peer")" ;;
        *) fail "$shape: $(tail -n 1 "$work/peer")" ;;
        esac
    done
    word "${measured[*]}${TINY:+, a rehearsal on the CPU}"
}

# The kernels under a tool of compute-sanitizer.
sanitize() { # TOOL
    local folder tool=""
    for folder in "" "${CUDA_HOME:-/usr/local/cuda}/bin/" "${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer/"; do
        if command -v "${folder}compute-sanitizer" >/dev/null; then tool=${folder}compute-sanitizer && break; fi
    done
    [ -n "$tool" ] || skip "no compute-sanitizer here; it is part of the CUDA toolkit"
    [ -z "$TINY" ] || skip "a rehearsal has no GPU to watch"
    "$tool" --tool "$1" --error-exitcode 9 --print-limit 20 "$BIN" gpu-check --quick --kernels-only
    word "$1: no errors"
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

"$1"
