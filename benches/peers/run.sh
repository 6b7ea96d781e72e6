#!/usr/bin/env bash
# Runs hardmax and other engines on the same checkpoints, in turns, and keeps what they print.
#
#   CKPT=checkpoints GGUF=gguf LLAMA_BIN=llama.cpp/build/bin CANDLE_BENCH=... PYTHON=... TORCH_BENCH=... OUT=results benches/peers/run.sh
#   benches/peers/table.py results
#
# CKPT          folder of checkpoints in Hugging Face layout, one folder for each of MODELS (mixtral qwen3_moe)
# GGUF          folder with MODEL-TYPE.gguf of the same weights, TYPE f32, bf16 or Q8_0
# LLAMA_BIN     folder with llama-bench and llama-batched-bench; LLAMA_FLAGS goes to both
# CANDLE_BENCH  program: CHECKPOINT DTYPE BATCH PREFILL DECODE REPEATS; prints a line of JSON with prefill_tps_best and decode_tps_best;
#               where prefill_all and decode_all list the repeats, or _median is given in the place of _best, the median counts
# TORCH_BENCH   script for PYTHON: CHECKPOINT --dtype D.. --experts E.. --batch B.. --prefill N --decode N --repeats N --threads N;
#               prints a line of JSON for each setting with the same fields
# HARDMAX       program (that of this tree, target/release/hardmax)
# OUT           folder for the results; ROUNDS (3), THREADS (2), REPEATS (2) within a round, DTYPES ("bf16 f32 q8") of hardmax
#
# What is not given is left out, and named. Each engine runs next to hardmax with the same weights; odd rounds turn the order round.
set -u
tree=$(cd "$(dirname "$0")/../.." && pwd) || exit 1
hardmax=${HARDMAX:-$tree/target/release/hardmax}
models=${MODELS:-mixtral qwen3_moe} dtypes=${DTYPES:-bf16 f32 q8}
rounds=${ROUNDS:-3} threads=${THREADS:-2} repeats=${REPEATS:-2}
: "${CKPT:?folder of checkpoints}" "${OUT:?folder for the results}"
prompt=512 generate=64 batch=8

have() { # name, variable
    [ -n "${!2:-}" ] || echo "left out: $1 ($2 is not set)" >&2
}
have llama.cpp LLAMA_BIN
have candle-transformers CANDLE_BENCH
have transformers TORCH_BENCH

hardmax_run() { # model, dtype
    "$hardmax" bench --model "$CKPT/$1" --dtype "$2" --threads "$threads" --work prefill,decode --prompt-tokens $prompt \
        --generate $generate --context 0,$prompt --batch 1,$batch --repeats "$repeats" --json "$dir/hardmax.$1.$2.json" \
        >>"$dir/tables.md" 2>>"$dir/log"
}

llama_run() { # model, dtype of hardmax
    local type=$2
    [ "$type" = q8 ] && type=Q8_0
    local file=${GGUF:-gguf}/$1-$type.gguf
    [ -n "${LLAMA_BIN:-}" ] && [ -f "$file" ] || return 0
    # shellcheck disable=SC2086
    "$LLAMA_BIN/llama-bench" -m "$file" -t "$threads" -p $prompt -n $generate -r "$repeats" -o jsonl ${LLAMA_FLAGS:-} \
        >"$dir/llama-bench.$1.$2.jsonl" 2>>"$dir/log"
    # shellcheck disable=SC2086
    "$LLAMA_BIN/llama-batched-bench" -m "$file" -t "$threads" -tb "$threads" -c $(((prompt + generate + 64) * batch)) -b 2048 -ub 512 \
        -npp $prompt -ntg $generate -npl 1,$batch --output-format jsonl ${LLAMA_FLAGS:-} 2>>"$dir/log" |
        grep n_kv_max >"$dir/llama-batched.$1.$2.jsonl"
}

candle_run() { # model
    [ -n "${CANDLE_BENCH:-}" ] || return 0
    for b in 1 $batch; do
        RAYON_NUM_THREADS=$threads "$CANDLE_BENCH" "$CKPT/$1" f32 "$b" $prompt $generate "$repeats" 2>>"$dir/log"
    done >"$dir/candle.$1.f32.jsonl"
}

torch_run() { # model, dtype of hardmax
    local dtype
    case $2 in bf16) dtype=bfloat16 ;; f32) dtype=float32 ;; *) return 0 ;; esac
    [ -n "${TORCH_BENCH:-}" ] || return 0
    "${PYTHON:-python3}" "$TORCH_BENCH" "$CKPT/$1" --dtype $dtype --experts eager grouped_mm --batch 1 $batch --prefill $prompt \
        --decode $generate --repeats "$repeats" --threads "$threads" >"$dir/torch.$1.$2.jsonl" 2>>"$dir/log"
}

pair() { # first, second, arguments: in this order, or in the other
    local first=$1 second=$2
    shift 2
    if [ $((round % 2)) = 1 ]; then "$first" "$@"; "$second" "$@"; else "$second" "$@"; "$first" "$@"; fi
    echo "$(date +%T) round $round: $first and $second of $* (load $(cut -d' ' -f1 /proc/loadavg))" | tee -a "$dir/log" >&2
}

nothing() { :; }

for round in $(seq 1 "$rounds"); do
    dir=$OUT/round$round
    mkdir -p "$dir" || exit 1
    for model in $models; do
        for dtype in $dtypes; do
            pair hardmax_run llama_run "$model" "$dtype"
            pair torch_run "$([ "$dtype" = f32 ] && echo candle_run || echo nothing)" "$model" "$dtype"
        done
    done
done
