#!/usr/bin/env bash
# Kills a run at random moments: what it leaves in the end must be, byte for byte, what an undisturbed one leaves.
#
#   BIN=target/release/hardmax MODEL=models/demo tests/tuning/kill.sh
#
# Two parts: `hardmax tune --work --resume`, and a job inside a server that is started again. TIMES (20) of each; each is killed with
# SIGKILL at a moment between its start and the time that the undisturbed one took, and, every third time, a second time on its way. The exit
# status is 1 where a result differs. Variables: TIMES, SEED (of the moments), STEPS (12), TARGET (router), PARTS (local server), TUNE, SERVE, TEXT.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tuning/common.sh
# A state after each step, so that there is something to be caught at.
printf '[run]\nsave_every = 1\neval_every = 5\n' >"$work/recipe.toml"
flags=(--data "${text[@]}" --recipe "$work/recipe.toml" --steps "${STEPS:-12}" --windows 4 --micro-windows 2 --window-tokens 64
    --target "${TARGET:-router}" --override "${tune_flags[@]}")
RANDOM=${SEED:-1}
differ=0

# Sleeps until a moment within so many ms. The draw is not in a shell of its own, where it would be another one.
until_a_moment() {
    local ms=$(((RANDOM * 32768 + RANDOM) % $1))
    sleep "$((ms / 1000)).$(printf '%03d' $((ms % 1000)))"
}
now() { date +%s%3N; }
same() { # NUMBER FILE WHOLE
    if cmp -s "$2" "$3"; then return; fi
    echo "   $1: another result" && differ=$((differ + 1))
}

local_part() {
    local begun took name
    # In the background: $pid.
    run() {
        "$BIN" tune --model "$MODEL" "${flags[@]}" --work "$work/$1" --resume --delta "$work/$1.delta" >/dev/null 2>"$work/$1.log" &
        pid=$!
    }
    begun=$(now)
    run whole
    wait "$pid" || { tail -n 5 "$work/whole.log" >&2 && die "the undisturbed run failed"; }
    took=$(($(now) - begun))
    say "local: an undisturbed run takes $took ms"
    for ((n = 1; n <= ${TIMES:-20}; n++)); do
        name=killed-$n
        for ((kills = n % 3 ? 1 : 2; kills > 0; kills--)); do
            run "$name"
            until_a_moment "$took"
            put_down 9
        done
        run "$name"
        wait "$pid" || { tail -n 5 "$work/$name.log" >&2 && die "run $n does not go on"; }
        same "$n" "$work/$name.delta" "$work/whole.delta"
        rm -rf "${work:?}/$name"
    done
}

server_part() {
    local begun took folder candidate=jobs/t1/candidate.safetensors
    ended() { [ -e "$1/$candidate" ] && [ "$(json "$1/jobs/t1/job.json" job.state)" = "done" ]; }
    wait_for() {
        local end=$((SECONDS + 600))
        until ended "$1"; do
            ((SECONDS < end)) || { tail -n 5 "$work/serve.log" >&2 && die "the job does not end"; }
            sleep 0.1
        done
    }
    start() { "$BIN" tune --server "$grpc" "${flags[@]}" >"$work/tune.log" 2>&1 & processes+=($!); }
    serve "$work/server-whole"
    begun=$(now)
    start
    wait_for "$work/server-whole"
    took=$(($(now) - begun))
    put_down TERM
    say "server: an undisturbed job takes $took ms"
    for ((n = 1; n <= ${TIMES:-20}; n++)); do
        folder=$work/server-$n
        serve "$folder"
        start
        until [ -e "$folder/jobs/t1/job.json" ]; do sleep 0.01; done
        for ((kills = n % 3 ? 1 : 2; kills > 0; kills--)); do
            until_a_moment "$took"
            put_down 9
            serve "$folder"
        done
        wait_for "$folder"
        put_down TERM
        same "$n" "$folder/$candidate" "$work/server-whole/$candidate"
        rm -rf "${folder:?}"
    done
}

for part in ${PARTS:-local server}; do "${part}_part"; done
[ "$differ" = 0 ] || die "$differ results differ"
say "all results are those of undisturbed runs"
