#!/usr/bin/env bash
# Every branch of docker/entrypoint.sh and of docker/cuda-probe.c, without a GPU, a driver, CUDA or a container: the binaries are scripts that say how
# they were called, and the driver is a library of a few lines that answers what the test wants.
#
#   docker/entrypoint-test.sh       needs a C compiler: CC, or cc
# shellcheck disable=SC2016 # What is between single quotes is meant as it is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

# Runs the rest with the environment `given` and compares; patterns are those of `case`.
given=()
expect() { # STATUS STDOUT STDERR COMMAND...
    local status=0 want=("$1" "$2" "$3") out err
    shift 3
    env -i PATH="$work/bin:$PATH" "${given[@]}" "$@" >"$work/out" 2>"$work/err" || status=$?
    out=$(cat "$work/out") err=$(cat "$work/err")
    # shellcheck disable=SC2254 # Patterns.
    case "$status|$out|$err" in
    ${want[0]}\|${want[1]}\|${want[2]}) passed=$((passed + 1)) ;;
    *)
        failed=$((failed + 1))
        printf 'FAILED: %s\n  wanted: %s\n  status: %s\n  stdout: %s\n  stderr: %s\n' "${given[*]} $*" "${want[*]}" "$status" "$out" "$err"
        ;;
    esac
}

program() { # NAME, its text on standard input
    cat >"$work/bin/$1"
    chmod +x "$work/bin/$1"
}

# ---- the entry point -----------------------------------------------------------------------------------------------

mkdir -p "$work/bin"
for name in hardmax-cpu hardmax-cuda; do
    program $name <<<'#!/bin/sh
echo "${0##*/}[${HARDMAX_DEVICE-unset}]" "$@"'
done
program hardmax-cuda-probe <<<'#!/bin/sh
echo "$PROBE_SAYS"; exit "$PROBE_STATUS"'
cp "$here/entrypoint.sh" "$work/bin/hardmax"

time='20??-??-??T??:??:??Z'
gpu=(PROBE_STATUS=0 PROBE_SAYS="Some GPU, 80 GiB")
none=(PROBE_STATUS=1 PROBE_SAYS="no GPU was given")

given=("${gpu[@]}")
expect 0 'hardmax-cuda\[cuda] serve --listen 1:2' "$time  INFO hardmax-cuda: Some GPU, 80 GiB" hardmax serve --listen 1:2
expect 0 'hardmax-cuda\[cuda] serve --device cuda' "$time  INFO hardmax-cuda: *" hardmax serve --device cuda
expect 0 'hardmax-cpu\[unset] serve --device cpu' "$time  INFO hardmax-cpu: --device asks for the CPU" hardmax serve --device cpu
expect 0 'hardmax-cpu\[unset] serve --device=cpu' "$time  INFO hardmax-cpu: --device asks *" hardmax serve --device=cpu
expect 0 'hardmax-cuda\[cuda] gpu-check' "$time  INFO hardmax-cuda: *" hardmax gpu-check
given=("${gpu[@]}" HARDMAX_DEVICE=cpu)
expect 0 'hardmax-cpu\[cpu] bench' "$time  INFO hardmax-cpu: HARDMAX_DEVICE asks *" hardmax bench
expect 0 'hardmax-cuda\[cuda] bench --device cuda' "$time  INFO hardmax-cuda: *" hardmax bench --device cuda
# Empty, as compose files make it, is not set.
given=("${gpu[@]}" HARDMAX_DEVICE=)
expect 0 'hardmax-cuda\[cuda] serve' "$time  INFO *" hardmax serve

given=("${none[@]}")
expect 0 'hardmax-cpu\[cpu] serve' "$time  WARN hardmax-cpu, without a GPU: no GPU was given" hardmax serve
expect 1 '' "$time ERROR --device asks for a GPU, and no GPU was given" hardmax serve --device cuda
expect 1 '' "$time ERROR --device asks for a GPU, and *" hardmax fidelity --device=cuda
expect 1 '' "$time ERROR gpu-check asks for a GPU, and *" hardmax gpu-check
given=("${none[@]}" HARDMAX_DEVICE=cuda)
expect 1 '' "$time ERROR HARDMAX_DEVICE asks for a GPU, and *" hardmax serve
expect 0 'hardmax-cpu\[cuda] serve --device cpu' "$time  INFO *" hardmax serve --device cpu
# A probe that dies says nothing.
given=(PROBE_STATUS=139 PROBE_SAYS=)
expect 0 'hardmax-cpu\[cpu] serve' "$time  WARN *: hardmax-cuda-probe failed" hardmax serve
expect 1 '' "$time ERROR * hardmax-cuda-probe failed" hardmax serve --device cuda

# Commands without a device, with options before them and values that look like commands; a probe would fail here.
given=(PROBE_STATUS=1 PROBE_SAYS=x HARDMAX_DEVICE=cuda)
for words in healthcheck 'generate serve' 'inspect DIR' '--log-level debug healthcheck' '--log-format serve healthcheck' --version --help ''; do
    # shellcheck disable=SC2086 # Words.
    expect 0 "hardmax-cpu\[cuda]*$words" '' hardmax $words
done
# What is no device is for the binary to say.
given=("${gpu[@]}")
expect 0 'hardmax-cpu\[unset] serve --device tpu' '' hardmax serve --device tpu

# Arguments arrive as they were.
expect 0 'hardmax-cpu\[unset] generate a  b \* $HOME' '' hardmax generate 'a  b' '*' '$HOME'
expect 0 'hardmax-cuda\[cuda] --log-format text serve --model a  b' "$time  INFO *" hardmax --log-format text serve --model 'a  b'

# One JSON object, as the server's.
given=("${none[@]}" HARDMAX_LOG_FORMAT=json)
line="{\"timestamp\":\"$time\",\"level\":\"WARN\",\"fields\":{\"message\":\"hardmax-cpu, without a GPU: no GPU was given\"},\"target\":\"entrypoint\"}"
expect 0 'hardmax-cpu\[cpu] serve' "$line" hardmax serve
expect 0 'hardmax-cpu\[cpu] serve --log-format text' "$time  WARN *" hardmax serve --log-format text
given=("${none[@]}")
expect 0 'hardmax-cpu\[cpu] serve --log-format json' "$line" hardmax serve --log-format json
expect 0 'hardmax-cpu\[cpu] --log-format=json serve' "$line" hardmax --log-format=json serve

# ---- the probe -----------------------------------------------------------------------------------------------------

cc=${CC:-cc}
compile() { "$cc" -Wall -Wextra -Werror -O1 "$@"; }
compile -o "$work/probe90" -DBUILT_CUDA=13000 -DBUILT_CAPABILITY=90 -DDEVICES="\"$work/dev\"" "$here/cuda-probe.c" -ldl
compile -o "$work/probe80" -DBUILT_CUDA=13000 -DBUILT_CAPABILITY=80 -DDEVICES="\"$work/dev\"" "$here/cuda-probe.c" -ldl

# A driver that answers as the environment says.
mkdir "$work/driver" "$work/other"
cat >"$work/driver.c" <<'END'
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
static int number(const char *name, int otherwise) { const char *text = getenv(name); return text ? atoi(text) : otherwise; }
int cuDriverGetVersion(int *version) { *version = number("VERSION", 13000); return 0; }
int cuInit(unsigned flags) { (void)flags; return number("INIT", 0); }
int cuDeviceGetCount(int *count) { *count = number("COUNT", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { (void)device; *value = number(which == 75 ? "MAJOR" : "MINOR", which == 75 ? 9 : 0); return 0; }
int cuDeviceGetName(char *name, int length, int device) { (void)device; snprintf(name, (size_t)length, "%s", getenv("NAME") ? getenv("NAME") : "GPU"); return number("NAMELESS", 0); }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = (size_t)80 << 30; return 0; }
int cuGetErrorString(int code, const char **words) { *words = "no CUDA-capable device is detected"; return code == 100 ? 0 : 1; }
END
compile -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$work/driver/libcuda.so.1" "$work/driver.c"
echo 'int cuInit(unsigned flags) { return (int)flags; }' >"$work/other.c"
compile -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$work/other/libcuda.so.1" "$work/other.c"

# Where this machine has a driver of its own, its absence cannot be seen.
given=()
if ! grep -q 'cannot open shared object file' <<<"$("$work/probe90")"; then
    echo "note: this machine has a libcuda.so.1; what is said without one is not tested"
else
    expect 1 'no GPU was given to this container (libcuda.so.1: cannot open *' '' "$work/probe90"
    mkdir "$work/dev"
    for node in nvidiactl nvidia0 dxg; do
        touch "$work/dev/$node"
        expect 1 "there is $work/dev/$node but not the library of its driver (libcuda.so.1: *NVIDIA_DRIVER_CAPABILITIES*" '' "$work/probe90"
        rm "$work/dev/$node"
    done
fi

given=(LD_LIBRARY_PATH="$work/driver")
expect 0 'GPU, 80.0 GiB, compute capability 9.0, driver for CUDA 13.0' '' "$work/probe90"
expect 0 '*, driver for CUDA 13.2' '' env VERSION=13020 "$work/probe90"
expect 0 'a b c , 80.0 GiB, *' '' env NAME='a"b\c
' "$work/probe90"
expect 1 'the driver is too old: it knows CUDA 12.4, and hardmax-cuda was built with 13.0' '' env VERSION=12040 "$work/probe90"
expect 1 'the driver refuses: cuInit gives 100, no CUDA-capable device is detected' '' env INIT=100 "$work/probe90"
expect 1 "the driver refuses: cuInit gives 100, * (CUDA_VISIBLE_DEVICES is '')" '' env INIT=100 CUDA_VISIBLE_DEVICES= "$work/probe90"
expect 1 'the driver refuses: cuInit gives 999, unknown error' '' env INIT=999 "$work/probe90"
expect 1 'the driver refuses: cuDeviceGetName gives 3, *' '' env NAMELESS=3 "$work/probe90"
expect 1 'the driver sees no GPU' '' env COUNT=0 "$work/probe90"
expect 1 'GPU has compute capability 8.0, and hardmax-cuda was built for 9.0: build the image with CUDA_COMPUTE_CAP=80' '' env MAJOR=8 "$work/probe90"
expect 1 'GPU has compute capability 10.0, *CUDA_COMPUTE_CAP=100' '' env MAJOR=10 "$work/probe90"
for minor in 0 6 9; do
    expect 0 "*compute capability 8.$minor,*" '' env MAJOR=8 MINOR=$minor "$work/probe80"
done
expect 1 '*built for 8.0*' '' "$work/probe80"
expect 1 '*built for 8.0*' '' env MAJOR=7 MINOR=5 "$work/probe80"
given=(LD_LIBRARY_PATH="$work/other")
expect 1 'libcuda.so.1 has no cuDriverGetVersion: *' '' "$work/probe90"

# Both together.
cp "$work/probe90" "$work/bin/hardmax-cuda-probe"
given=(LD_LIBRARY_PATH="$work/driver")
expect 0 'hardmax-cuda\[cuda] serve' "$time  INFO hardmax-cuda: GPU, 80.0 GiB, compute capability 9.0, driver for CUDA 13.0" hardmax serve
given+=(VERSION=12040)
expect 0 'hardmax-cpu\[cpu] serve' "$time  WARN hardmax-cpu, without a GPU: the driver is too old: *" hardmax serve
expect 1 '' "$time ERROR --device asks for a GPU, and the driver is too old: *" hardmax serve --device cuda

echo "entry point: $passed passed, $failed failed"
[ "$failed" = 0 ]
