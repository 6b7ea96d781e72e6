# shellcheck shell=bash
# shellcheck disable=SC2034 # what it sets is for those who source it
# For the scripts beside it: a server that tunes, and what it says. To be sourced in the root of the repository.
#
# BIN and MODEL name the program and the checkpoint, TEXT the files to learn from, SERVE and TUNE are more flags of serve and tune.

BIN=$(readlink -f "${BIN:-target/release/hardmax}")
MODEL=${MODEL:-models/demo}
[ -x "$BIN" ] || { echo "no such program: $BIN; build it first, or name one in BIN" >&2 && exit 1; }
for tool in python3 curl; do command -v $tool >/dev/null || { echo "no $tool" && exit 77; }; done

# Else what the demo holds out, which is in English as good as any.
read -ra text <<<"${TEXT:-models/demo/data/heldout.txt}"
read -ra serve_flags <<<"${SERVE:-}"
read -ra tune_flags <<<"${TUNE:-}"

work=$(mktemp -d)
processes=()
finish() {
    [ ${#processes[@]} = 0 ] || kill -9 "${processes[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
say() { printf -- '-- %s\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# Starts a server that keeps its jobs in a folder: $pid, $grpc (a URL) and $metrics.
serve() { # FOLDER
    local log=$work/serve.log tries=0
    # What an earlier server said there is not of this one.
    : >"$log"
    "$BIN" serve --model "$MODEL" --log-format json --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 --tuning-dir "$1" \
        "${serve_flags[@]}" 2>"$log" &
    pid=$!
    processes+=("$pid")
    until grep -qs '"message":"serving"' "$log"; do
        if ! kill -0 "$pid" 2>/dev/null || ((++tries > 1200)); then cat "$log" >&2 && die "the server does not serve"; fi
        sleep 0.1
    done
    grpc=http://$(sed -n 's/.*"message":"starting".*"grpc":"\([^"]*\)".*/\1/p' "$log")
    metrics=$(sed -n 's/.*"message":"starting".*"metrics":"\([^"]*\)".*/\1/p' "$log")
}

# Ends $pid, and waits until it is gone.
put_down() { # SIGNAL
    kill "-$1" "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

# The value of a series, 0 where it is not there.
series() { # SERIES, without the label model
    curl -fsS "http://$metrics/metrics" | python3 -c '
import re, sys
name, *labels = re.split("[{,}]", sys.argv[1])
for line in sys.stdin:
    if re.match(re.escape(name) + r"[ {]", line) and all(label in line for label in labels):
        print(line.rsplit(" ", 1)[1].strip()); break
else:
    print(0)' "$1"
}

# Waits until a series is above a value; dies where that takes too long.
until_above() { # SERIES VALUE [SECONDS]
    local end=$((SECONDS + ${3:-600}))
    until python3 -c "import sys; sys.exit(not $(series "$1") > $2)"; do
        ((SECONDS < end)) || die "$1 does not get above $2"
        sleep 0.5
    done
}

# A field of a JSON file, by its path.
json() { # FILE PATH
    python3 -c '
import json, sys
value = json.load(open(sys.argv[1]))
for key in sys.argv[2].split("."):
    value = value[int(key)] if isinstance(value, list) else value[key]
print(value)' "$1" "$2"
}
