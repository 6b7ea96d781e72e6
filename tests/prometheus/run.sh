#!/usr/bin/env bash
# A real Prometheus against running servers: the page, the rules, the dashboard and the alerts.
#
#   tests/prometheus/run.sh [BINARY]     default: target/release/hardmax
#
#   * `promtool` on the live page, the configuration, the rules, and their unit tests;
#   * two servers under load, scraped by a Prometheus: models/demo, and a copy of it that checkpoint.py broke; the broken one is tuned a
#     little meanwhile, and goes to and fro between what comes of it and what it was;
#   * check.py asks for everything that the dashboard, the rules and docs/metrics.md ask for: each series must exist and move;
#   * the dead expert and the gap of the broken copy must raise their alerts, and the demo must not.
#
# Rules run with windows and delays of seconds, in a copy. Without Prometheus on the PATH, Debian's package is unpacked into a temporary
# folder; where that cannot be had, the exit status is 77: skipped. About two minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/debian.sh
binary=$(readlink -f "${1:-target/release/hardmax}")
[ -x "$binary" ] || { echo "no such binary: ${1:-target/release/hardmax}; build it first" >&2 && exit 1; }
command -v python3 >/dev/null || { echo "no python3" && exit 77; }
command -v curl >/dev/null || { echo "no curl" && exit 77; }

work=$(mktemp -d)
processes=()
finish() {
    [ ${#processes[@]} = 0 ] || kill "${processes[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
say() { printf -- '-- %s\n' "$*"; }
die() { printf 'prometheus: %s\n' "$*" >&2; exit 1; }

find_prometheus() {
    if command -v prometheus >/dev/null && command -v promtool >/dev/null; then return; fi
    debian "$work/debian" --alone prometheus || { cat "$work/debian/apt.log" >&2 || true; echo "no prometheus, and Debian's cannot be had here" && exit 77; }
    PATH=$work/debian/tree/usr/bin:$PATH
    promtool --version >/dev/null 2>&1 || { echo "the prometheus of the package does not run here" && exit 77; }
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# Starts a server with small limits, so that requests wait, are preempted and are refused. Its addresses: $grpc and $metrics.
serve() { # NAME MODEL
    local log=$work/$1.log tries=0
    "$binary" serve --model-name "$1" --model "$2" --top-k 1 --log-format json --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 \
        --max-batch-requests 4 --max-queue-requests 4 --kv-cache-tokens 256 --expert-metrics per-expert \
        --shadow-rate 1 --shadow-budget 0.3 --tuning-dir "$work/tuning-$1" 2>"$log" &
    processes+=($!)
    until grep -qs '"message":"serving"' "$log"; do
        if ! kill -0 $! 2>/dev/null || ((++tries > 600)); then cat "$log" >&2 && die "$1 does not serve"; fi
        sleep 0.1
    done
    grpc=$(sed -n 's/.*"message":"starting".*"grpc":"\([^"]*\)".*/\1/p' "$log")
    metrics=$(sed -n 's/.*"message":"starting".*"metrics":"\([^"]*\)".*/\1/p' "$log")
    if [ -z "$grpc" ] || [ -z "$metrics" ]; then die "$1 does not say where it listens: $(head -n 2 "$log")"; fi
}

# Bursts of different lengths, of which some are refused, time out, or are too long, until the folder is gone.
load() { # URL
    local lines n=0 long
    mapfile -t lines < <(grep -E '.{40}' models/demo/data/heldout.txt | head -n 400)
    long=$(printf '%s ' "${lines[@]:0:40}")
    while [ -d "$work" ]; do
        # Four continuations at once outgrow the cache together.
        "$binary" generate "${lines[n % ${#lines[@]}]}" --url "$1" -n 4 --max-new-tokens 150 --temperature 1 --seed "$n" >/dev/null 2>&1 || true
        local burst=()
        for _ in 1 2 3 4 5 6 7 8 9 10 11; do
            "$binary" generate "${lines[n++ % ${#lines[@]}]}" --url "$1" --max-new-tokens $((20 + n % 7 * 20)) --temperature 1 --seed "$n" \
                >/dev/null 2>&1 &
            burst+=($!)
        done
        "$binary" generate "${lines[0]}" --url "$1" --max-new-tokens 200 --timeout 0.05 >/dev/null 2>&1 || true
        "$binary" generate "$long" --url "$1" >/dev/null 2>&1 || true
        wait "${burst[@]}" || true
    done
}

# A job beside the load, so small that it mends nothing; its result in force, and out of it again, until the folder is gone.
tune() { # URL
    printf '[run]\neval_every = 3\n[optimizer]\nlearning_rate = 1e-5\n' >"$work/tune.toml"
    "$binary" tune --server "$1" --data models/demo/data/heldout.txt --recipe "$work/tune.toml" --steps 9 --windows 2 --micro-windows 1 \
        --window-tokens 64 --publish --override --watch-seconds 0 >"$work/tune.log" 2>&1 || return
    while [ -d "$work" ]; do
        sleep 2
        "$binary" tune --server "$1" --rollback >/dev/null 2>&1 || true
        sleep 2
        "$binary" tune --server "$1" --rollback 2 >/dev/null 2>&1 || true
    done
}

say tools
find_prometheus
promtool --version | head -n 1

say "configuration and rules"
promtool check config docker/prometheus/prometheus.yml
promtool test rules docker/prometheus/rules/hardmax_test.yml

say servers
python3 tests/prometheus/checkpoint.py models/demo "$work/broken"
serve demo models/demo
demo_grpc=$grpc demo_metrics=$metrics
serve broken "$work/broken"
broken_grpc=$grpc broken_metrics=$metrics

say "promtool check metrics"
curl -fsS "http://$demo_metrics/metrics" | promtool check metrics
curl -fsS "http://$broken_metrics/metrics" | promtool check metrics

say prometheus
# A minute at most, so that what is wrong shows at once; the thresholds of traffic are for windows of minutes.
sed -E 's/\[(5|10|30)m\]/[20s]/g; s/^( *for:) .*/\1 2s/; s/(increase30m) > 500/\1 > 50/' docker/prometheus/rules/hardmax.yml >"$work/rules.yml"
cat >"$work/prometheus.yml" <<END
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: [rules.yml]
scrape_configs: [{job_name: hardmax, static_configs: [{targets: ["$demo_metrics", "$broken_metrics"]}]}]
END
promtool check config "$work/prometheus.yml" >/dev/null
port=$(free_port)
prometheus --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/tsdb" --web.listen-address="127.0.0.1:$port" 2>"$work/prometheus.log" &
processes+=($!)

# Servers at rest are scraped first: what moves is seen to move. Prometheus takes some seconds to find its targets.
tries=0
until curl -fsS "http://127.0.0.1:$port/api/v1/query?query=count(up)" 2>/dev/null | grep -q '"2"'; do
    ((++tries <= 60)) || { tail -n 5 "$work/prometheus.log" >&2 && die "Prometheus does not scrape"; }
    sleep 0.5
done
for address in "$demo_grpc" "$broken_grpc"; do
    load "http://$address" &
    processes+=($!)
done
tune "http://$broken_grpc" &
processes+=($!)
python3 tests/prometheus/check.py "http://127.0.0.1:$port" || { tail -n 5 "$work"/*.log >&2 && exit 1; }

say "promtool check metrics, after the load"
curl -fsS "http://$demo_metrics/metrics" | promtool check metrics
say passed
