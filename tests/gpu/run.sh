#!/usr/bin/env bash
# Everything that only a machine with a GPU can tell about a binary, in one command.
#
#   tests/gpu/run.sh BINARY [--quick] [--tiny] [--limit SECONDS] [--layers N] [--only PART,..] [--pack]
#
#   --quick            fewer shapes and layers, and all of it in under 9 minutes
#   --tiny             toy models: a rehearsal, for a binary built with the feature cuda-emulated
#   --limit SECONDS    what does not fit in is cut off or left out; --quick has 530
#   --layers N         cut the large models to so many layers; --quick has 4
#   --only PART,..     of those that parts.sh lists
#   --pack             one archive beside the summary, where few files can be taken away
#
# Needed: BINARY (`cargo build --release --features cuda`, stripped), this folder, and models/demo beside tests/ (MODEL names another place).
# The part `tuning` is tests/tuning beside this folder. python3 (PYTHON names one) is for comparisons, the bars and, where it has torch, transformers and triton, peer.py. Without it these are left
# out. CUDA's libraries may be in Python packages: they are found. Results go to $OUT, else to gpu-results-DATE: every log and a summary.
#
# Exit status: 0 if no part failed; 1 if one did; 2 for bad arguments; 77 where there is no GPU. README.md says what the figures should be.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "$0"; }
die() { printf 'run.sh: %s\n' "$1" >&2; exit "${2:-2}"; }
whole() { [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 wants a positive number, not '${2:-}'"; }

parts=(machine kernels parity server tuning bench overhead peer memcheck racecheck)
# Seconds for each, with --quick and without.
declare -A quick_limits=([machine]=20 [kernels]=120 [parity]=60 [server]=60 [tuning]=0 [bench]=150 [overhead]=0 [peer]=180 [memcheck]=120 [racecheck]=120)
declare -A full_limits=([machine]=60 [kernels]=1200 [parity]=300 [server]=600 [tuning]=1200 [bench]=2400 [overhead]=1200 [peer]=3600 [memcheck]=1800 [racecheck]=1800)

binary="" limit="" only="" pack=""
export QUICK="" TINY="" LAYERS=""
while (($#)); do
    case $1 in
    --quick) QUICK=1 ;;
    --tiny) TINY=1 ;;
    --pack) pack=1 ;;
    --limit) whole "$@" && limit=$2 && shift ;;
    --layers) whole "$@" && LAYERS=$2 && shift ;;
    --only) only=${2:-} && shift ;;
    -h | --help) usage && exit 0 ;;
    -*) die "unknown flag $1; --help lists them" ;;
    *) [ -z "$binary" ] || die "two binaries: $binary and $1"; binary=$1 ;;
    esac
    shift || die "--only wants names of parts: ${parts[*]}"
done
[ -n "$binary" ] || { usage >&2; exit 2; }
BIN=$(readlink -f "$binary")
[ -x "$BIN" ] || die "no such program: $binary"
MODEL=${MODEL:-$here/../../models/demo}
[ -f "$MODEL/config.json" ] || die "no checkpoint in $MODEL; MODEL names its folder"
for part in ${only//,/ }; do
    [[ " ${parts[*]} " == *" $part "* ]] || die "--only: '$part' is none of ${parts[*]}"
done
[ -n "$limit" ] || limit=${QUICK:+530}
for tool in timeout tar awk sed; do command -v $tool >/dev/null || die "no $tool here"; done
export PYTHONDONTWRITEBYTECODE=1 BIN MODEL PYTHON=${PYTHON:-python3}
RESULTS=${OUT:-gpu-results-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$RESULTS/logs" || die "cannot write to $RESULTS"
RESULTS=$(readlink -f "$RESULTS")
export RESULTS

# shellcheck source-path=SCRIPTDIR
. "$here/libraries.sh"
find_libraries
say=$("$BIN" gpu-check --help 2>&1) || die "$binary does not do \`gpu-check\`; is it built with --features cuda? It says: $(head -n 3 <<<"$say")" 1
if [ -z "$TINY" ]; then
    says=$(nvidia-smi -L 2>&1) || die "no NVIDIA GPU here: ${says##*: }. --quick --tiny rehearses with a binary built with cuda-emulated" 77
fi

# Runs a part with what is left of the time, and notes what came of it.
run() { # PART
    local name=$1 log=$RESULTS/logs/$1.log seconds=${full_limits[$1]} start=$SECONDS status outcome line
    [ -z "$QUICK" ] || seconds=${quick_limits[$name]}
    if [ "$seconds" = 0 ]; then
        note "$name" skipped 0 "not with --quick"
        return
    fi
    if [ -n "$limit" ] && ((seconds > limit - SECONDS)); then seconds=$((limit - SECONDS)); fi
    if ((seconds < 5)); then
        note "$name" skipped 0 "no time left of $limit s"
        return
    fi
    printf -- '-- %s (at most %s s)\n' "$name" "$seconds" >&2
    timeout --kill-after=10 "$seconds" bash "$here/parts.sh" "$name" >"$log" 2>&1 </dev/null
    status=$?
    # Its own words, else the last ones that anything said.
    line=$(sed -n 's/^= //p' "$log" | tail -n 1)
    [ -n "$line" ] || line=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-200)
    case $status in
    0) outcome=passed ;;
    77) outcome=skipped ;;
    124 | 137) outcome=FAILED line="cut off after $seconds s; last: $line" ;;
    *) outcome=FAILED line="exit status $status: $line" ;;
    esac
    note "$name" "$outcome" $((SECONDS - start)) "$line"
}

rows=() failed=0
note() { # PART OUTCOME SECONDS WORDS
    rows+=("| $1 | $2 | $3 | ${4//|/\/} |")
    if [ "$2" = FAILED ]; then failed=$((failed + 1)); fi
    printf '%-10s %-8s %5s s  %s\n' "$1" "$2" "$3" "$4" >&2
}

summary() {
    printf '# hardmax on a GPU, %s\n\n' "$(date -u '+%Y-%m-%d %H:%M UTC')"
    printf '%s%s%s\n\n' "$("$BIN" --version 2>/dev/null)" "${QUICK:+, --quick}" "${TINY:+, --tiny: a rehearsal, its figures mean nothing}"
    cat "$RESULTS/logs/machine.txt" 2>/dev/null && echo
    printf '| part | outcome | seconds | |\n|---|---|---:|---|\n'
    printf '%s\n' "${rows[@]}"
    [ ! -s "$RESULTS/logs/bars.md" ] || { echo && cat "$RESULTS/logs/bars.md"; }
}

for part in "${parts[@]}"; do
    if [ -z "$only" ] || [[ ",$only," == *",$part,"* ]]; then run "$part"; fi
done
if [ -z "$TINY" ] && command -v "$PYTHON" >/dev/null; then "$PYTHON" "$here/bars.py" "$RESULTS/logs" >"$RESULTS/logs/bars.md" 2>"$RESULTS/logs/bars.log"; fi
summary >"$RESULTS/summary.md"
if [ -n "$pack" ]; then tar -C "$RESULTS" -czf "$RESULTS/logs.tar.gz" logs && rm -r "$RESULTS/logs"; fi
cat "$RESULTS/summary.md"
printf '\nresults: %s\n' "$RESULTS"
((failed == 0))
