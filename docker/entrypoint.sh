#!/bin/sh
# `hardmax` in the CUDA image. A CUDA binary is linked with libcuda and does not start without a driver, so the image has two, and this looks first,
# says in one line on standard error which it takes and why, and becomes it.
#
#   asked for                                  a GPU that can be used      none
#   nothing                                    hardmax-cuda                hardmax-cpu
#   --device cuda, HARDMAX_DEVICE=cuda         hardmax-cuda                an error, exit status 1
#   --device cpu, HARDMAX_DEVICE=cpu           hardmax-cpu                 hardmax-cpu
#
# Commands that compute nothing on a device (healthcheck, generate, ...) are the CPU binary's, without a look and without a line.
set -eu

device=${HARDMAX_DEVICE:-} asked=HARDMAX_DEVICE format=${HARDMAX_LOG_FORMAT:-text} command='' before=''
for word in "$@"; do
    case $before in
    --device) device=$word asked=--device ;;
    --log-format) format=$word ;;
    --log-level) ;;
    *)
        case $word in
        --device=*) device=${word#*=} asked=--device ;;
        --log-format=*) format=${word#*=} ;;
        -*) ;;
        *) command=${command:-$word} ;;
        esac
        ;;
    esac
    before=$word
done

# As the server's log. Messages have neither quotes nor backslashes.
say() { # LEVEL MESSAGE
    now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    case $format in
    json) printf '{"timestamp":"%s","level":"%s","fields":{"message":"%s"},"target":"entrypoint"}\n' "$now" "$1" "$2" >&2 ;;
    *) printf '%s %5s %s\n' "$now" "$1" "$2" >&2 ;;
    esac
}

case $command in
# Those that have --device.
bench | fidelity | forward | serve | train | tune) ;;
# This one is in the CUDA binary alone.
gpu-check) device=cuda asked=gpu-check ;;
*) exec hardmax-cpu "$@" ;;
esac

case $device in
'' | cuda) ;;
cpu)
    say INFO "hardmax-cpu: $asked asks for the CPU"
    exec hardmax-cpu "$@"
    ;;
# Not a device: the binary says so.
*) exec hardmax-cpu "$@" ;;
esac

if found=$(hardmax-cuda-probe); then
    say INFO "hardmax-cuda: $found"
    export HARDMAX_DEVICE=cuda
    exec hardmax-cuda "$@"
elif [ -n "$device" ]; then
    say ERROR "$asked asks for a GPU, and ${found:-hardmax-cuda-probe failed}"
    exit 1
else
    say WARN "hardmax-cpu, without a GPU: ${found:-hardmax-cuda-probe failed}"
    export HARDMAX_DEVICE=cpu
    exec hardmax-cpu "$@"
fi
