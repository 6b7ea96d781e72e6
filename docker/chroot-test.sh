#!/usr/bin/env bash
# Runs a Dockerfile without a container engine: each stage in its own root, made by debootstrap, then the image as
# a container would run it. For machines that have root and debootstrap but no Docker.
#
#   docker/chroot-test.sh                     docker/Dockerfile, both stages, then the run
#   docker/chroot-test.sh --binary PATH       takes this binary for what the builder stage would make
#   docker/chroot-test.sh --cuda --binary PATH [--cuda-binary PATH]
#                                             docker/Dockerfile.cuda, its runtime stage, on a machine without a GPU: the
#                                             entry point has to take the CPU binary. Needs a C compiler for the probe
#   docker/chroot-test.sh --work DIR          keeps base roots there, so that the next run need not make them again
#
# The Dockerfile itself is read and carried out (FROM, COPY, RUN, ENV, WORKDIR, USER, ...); an instruction that this
# script does not know is an error. What differs from an engine:
#   * bases: `debian:bookworm-slim` is debootstrap's minimal bookworm. `rust:1.95-bookworm` is that plus a C compiler,
#     with this machine's Rust toolchain and crate cache mounted in, since the image itself cannot be had here.
#     `nvidia/cuda:...-base-...` is the minimal bookworm again, without what NVIDIA puts into it;
#   * isolation: own mounts, processes and network, no capabilities, no new privileges, a read-only root. No cgroup,
#     seccomp or user namespace;
#   * layers, labels and the registry are not exercised, nor is compose.
#
# Then, as the image's own user and again as an arbitrary one: start, health check, metrics, a generation, a refused
# write, SIGTERM. Exit status 0: all of it went well.
set -euo pipefail
export LC_ALL=C

self=$(readlink -f "$0")
context=$(dirname "$(dirname "$self")")

say() { printf '\n== %s\n' "$*"; }
die() { printf 'chroot-test: %s\n' "$*" >&2; exit 1; }

# ---- carrying out the Dockerfile ---------------------------------------------------------------------------------

# Base roots, made once and then copied.
base_root() { # NAME PACKAGES
    local base=$work/base-$1 include=()
    [ -z "$2" ] || include=(--include="$2")
    if [ ! -e "$base/.complete" ]; then
        rm -rf "$base"
        say "debootstrap: $1"
        debootstrap --variant=minbase "${include[@]}" bookworm "$base" >"$work/debootstrap.log" 2>&1 ||
            { tail -n 20 "$work/debootstrap.log" >&2; die "debootstrap failed"; }
        rm -rf "$base"/var/cache/apt/archives/*.deb "$base"/var/lib/apt/lists/*
        touch "$base/.complete"
    fi
    cp -a "$base" "$root"
    rm "$root/.complete"
}

from() { # IMAGE [AS NAME]
    stage=${3:-stage}
    root=$work/root-$stage
    workdir=/ user=0:0 env=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
    entrypoint=() cmd=() healthcheck=()
    skip=false
    if [ -n "$binary" ] && [ "$stage" != runtime ]; then
        say "stage $stage: skipped"
        skip=true
        return
    fi
    say "stage $stage: from $1"
    rm -rf "$root"
    case $1 in
    debian:bookworm-slim | nvidia/cuda:*-base-*) base_root slim "" ;;
    rust:*-bookworm)
        base_root builder gcc,g++,libc6-dev,make,pkg-config,ca-certificates
        local sysroot want have
        sysroot=$(rustc --print sysroot)
        want=${1#rust:} want=${want%-bookworm} have=$("$sysroot/bin/rustc" --version | cut -d' ' -f2)
        [ "${have#"$want"}" != "$have" ] || echo "note: the Dockerfile wants Rust $want, this machine has $have"
        env+=(CARGO_HOME=/usr/local/cargo)
        env[0]=PATH=/usr/local/rust/bin:${env[0]#PATH=}
        mkdir -p "$root/usr/local/rust" "$root/usr/local/cargo/registry"
        mount --bind -o ro "$sysroot" "$root/usr/local/rust"
        local cargo=${CARGO_HOME:-$HOME/.cargo}
        mkdir -p "$cargo/registry"
        mount --bind "$cargo/registry" "$root/usr/local/cargo/registry"
        [ ! -f "$cargo/config.toml" ] || cp "$cargo/config.toml" "$root/usr/local/cargo/"
        cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
        # A machine behind a proxy with its own authority needs its own list.
        cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
        ;;
    *) die "no base for $1 can be had here: --binary leaves this stage out" ;;
    esac
    kernel_filesystems
}

kernel_filesystems() {
    mount -t proc proc "$root/proc"
    mount -t tmpfs -o mode=755 dev "$root/dev"
    local node
    for node in null zero full random urandom; do
        touch "$root/dev/$node"
        mount --bind "/dev/$node" "$root/dev/$node"
    done
}

# What the builder stage would have made, from the binaries that were given.
given() {
    local release=$work/built/build/target/release image=$work/built/build/image
    rm -rf "$work/built"
    mkdir -p "$release" "$image/bin" "$image/lib"
    cp "$binary" "$release/hardmax"
    if $cuda; then
        cp "$binary" "$image/bin/hardmax-cpu"
        cp "${cuda_binary:-$binary}" "$image/bin/hardmax-cuda"
        cc -O2 -DBUILT_CUDA=13000 -DBUILT_CAPABILITY=90 -o "$image/bin/hardmax-cuda-probe" "$context/docker/cuda-probe.c" -ldl
    fi
}

# What .dockerignore lets through. It must be an allow-list: `*`, then `!PATH` lines, then exceptions from those.
snapshot() {
    rm -rf "$work/context"
    mkdir -p "$work/context"
    local line
    [ "$(grep -v '^#' "$context/.dockerignore" | head -n 1)" = '*' ] || die ".dockerignore is no allow-list"
    while read -r line; do
        case $line in
        '' | '#'* | '*') ;;
        '!'*) (cd "$context" && cp -a --parents "${line#!}" "$work/context/") ;;
        *) rm -rf "${work:?}/context/$line" ;;
        esac
    done <"$context/.dockerignore"
}

copy() { # [--from=STAGE] SOURCE... DESTINATION
    local source=$work/context from=
    case $1 in --from=*) from=${1#--from=} source=$work/root-$from && shift ;; --*) die "COPY $1: unknown" ;; esac
    if [ "$from" = builder ] && [ -n "$binary" ]; then source=$work/built; fi
    local destination=${*: -1} items=("${@:1:$#-1}") item
    case $destination in /*) ;; *) destination=$workdir/$destination ;; esac
    for item in "${items[@]}"; do
        local path=$source/${item#/}
        [ -e "$path" ] || die "COPY $item: no such file in ${from:-the context}"
        if [ -d "$path" ]; then
            mkdir -p "$root$destination"
            cp -R --preserve=mode,timestamps "$path/." "$root$destination/"
        elif [ "${destination%/}" != "$destination" ] || [ -d "$root$destination" ]; then
            mkdir -p "$root$destination"
            cp --preserve=mode,timestamps "$path" "$root$destination/"
        else
            mkdir -p "$(dirname "$root$destination")"
            cp --preserve=mode,timestamps "$path" "$root$destination"
        fi
    done
}

instruction() { # NAME REST
    local name=$1 rest=$2 words=()
    if [ "$name" = FROM ]; then
        read -ra words <<<"$rest"
        from "${words[@]}"
        return
    fi
    if $skip; then return; fi
    case $name in
    LABEL | EXPOSE | STOPSIGNAL) ;;
    # A variable of this script, so that ENV can use it.
    ARG) declare -g "${rest%%=*}=${rest#*=}" ;;
    ENV) eval "env+=($rest)" ;;
    WORKDIR) workdir=$rest && mkdir -p "$root$rest" ;;
    USER) user=$rest ;;
    COPY) read -ra words <<<"$rest" && copy "${words[@]}" ;;
    RUN)
        echo "RUN $rest"
        chroot "$root" env -i "${env[@]}" ${CARGO_BUILD_JOBS:+CARGO_BUILD_JOBS="$CARGO_BUILD_JOBS"} \
            sh -c "cd $workdir && $rest" </dev/null
        ;;
    HEALTHCHECK) exec_form healthcheck "${rest#*CMD }" ;;
    ENTRYPOINT) exec_form entrypoint "$rest" ;;
    CMD) exec_form cmd "$rest" ;;
    *) die "unknown instruction $name" ;;
    esac
}

exec_form() { # ARRAY JSON
    case $2 in '['*']') ;; *) die "not in exec form: $2" ;; esac
    eval "$1=($(tr '[],' '   ' <<<"$2"))"
}

build() {
    snapshot
    [ -z "$binary" ] || given
    local line logical=
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in '#'* | '') continue ;; esac
        case $line in *\\) logical+=${line%\\} && continue ;; esac
        logical+=$line
        instruction "${logical%% *}" "${logical#* }"
        logical=
    done <"$context/docker/$dockerfile"
    say "image: $(du -sh --one-file-system "$root" | cut -f1), user $user, runs: ${entrypoint[*]} ${cmd[*]}"
    ls -l "$root/usr/local/bin"
    declare -p root user env entrypoint cmd healthcheck >"$work/image"
}

# ---- running the image -------------------------------------------------------------------------------------------

# Replaces this process by a command in the container.
contained() { # UID:GID COMMAND...
    local as=$1 path=${env[0]#PATH=}
    shift
    exec chroot "$root" /usr/bin/setpriv --reuid="${as%:*}" --regid="${as#*:}" --clear-groups --no-new-privs \
        --inh-caps=-all --bounding-set=-all /usr/bin/env -i PATH="$path" "${env[@]}" "$@"
}

exercise() { # UID:GID
    local as=$1 server status tries=0
    say "as $as"
    (contained "$as" "${entrypoint[@]}" "${cmd[@]}") >"$work/server.log" 2>&1 &
    server=$!
    until (contained "$as" "${healthcheck[@]}") >"$work/health.log" 2>&1; do
        kill -0 "$server" 2>/dev/null || { cat "$work/server.log" >&2; die "the server ended"; }
        ((++tries <= 300)) || { cat "$work/server.log" "$work/health.log" >&2; die "not healthy after 60 s"; }
        sleep 0.2
    done
    echo "healthy: ${healthcheck[*]}"
    grep -E '^(Uid|Gid|CapEff|CapBnd|NoNewPrivs)' "/proc/$server/status" | tr '\n\t' '  '
    echo
    grep -qE '^CapEff:\s*0+$' "/proc/$server/status" || die "the server has capabilities"

    local url=http://127.0.0.1:9464
    curl -fsS "$url/healthz" >/dev/null
    curl -fsS "$url/metrics" >"$work/metrics"
    echo "metrics: $(grep -c '^hardmax_' "$work/metrics") series, for example"
    grep -m 3 '^hardmax_' "$work/metrics"
    echo "generate: In the beginning$( (contained "$as" "${entrypoint[@]}" generate "In the beginning" --max-new-tokens 24))"
    if (contained "$as" sh -c 'echo x >/tmp/x || echo x >/opt/hardmax/x') 2>/dev/null; then
        die "something is writable"
    fi
    echo "no write is possible"

    if [ -e "$root/usr/local/bin/hardmax-cuda" ]; then entry_point "$as"; fi

    kill -TERM "$server"
    status=0
    wait "$server" || status=$?
    [ "$status" = 0 ] || { tail -n 20 "$work/server.log" >&2; die "exit status $status after SIGTERM"; }
    echo "SIGTERM: exit status 0; last lines of the log:"
    tail -n 3 "$work/server.log"
    if (contained "$as" "${healthcheck[@]}") >/dev/null 2>&1; then die "healthy without a server"; fi
}

# Without a GPU: the server is the CPU binary and its log says why; whoever asks for a GPU is refused.
entry_point() { # UID:GID
    local status=0
    head -n 1 "$work/server.log" | grep '"level":"WARN".*"hardmax-cpu, without a GPU: no GPU was given to this container' ||
        { head -n 3 "$work/server.log" >&2; die "the first line of the log does not say which binary it is"; }
    (contained "$1" "${entrypoint[@]}" serve --device cuda) >"$work/refused.log" 2>&1 || status=$?
    if [ "$status" != 1 ] || ! grep '"level":"ERROR".*--device asks for a GPU' "$work/refused.log"; then
        cat "$work/refused.log" >&2
        die "--device cuda without a GPU: exit status $status"
    fi
}

run() {
    # shellcheck source=/dev/null
    source "$work/image"
    ip link set lo up
    mount --bind "$root" "$root.ro"
    mount -o remount,ro,bind "$root.ro"
    mount -t proc -o ro proc "$root.ro/proc"
    mount --rbind "$root/dev" "$root.ro/dev"
    mount -o remount,ro,bind "$root.ro/dev"
    root=$root.ro
    exercise "$user"
    exercise 1000660000:0
    say "passed"
}

# ---- arguments ---------------------------------------------------------------------------------------------------

binary='' cuda_binary='' cuda=false dockerfile=Dockerfile work=''
if [ "${1:-}" = --in-namespace ]; then
    # shellcheck source=/dev/null
    source "$2"
    build
    mkdir -p "$root.ro"
    exec unshare --net "$self" --run "$work"
elif [ "${1:-}" = --run ]; then
    work=$2
    run
    exit
fi
while [ $# -gt 0 ]; do
    case $1 in
    --binary) binary=$(readlink -e "$2") || die "no such file: $2" && shift 2 ;;
    --cuda-binary) cuda_binary=$(readlink -e "$2") || die "no such file: $2" && shift 2 ;;
    --cuda) cuda=true dockerfile=Dockerfile.cuda && shift ;;
    --work) mkdir -p "$2" && work=$(readlink -f "$2") && shift 2 ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$self" && exit ;;
    *) die "unknown argument $1" ;;
    esac
done
[ "$(id -u)" = 0 ] || die "needs root, for chroot and mounts"
for tool in debootstrap unshare chroot curl ip; do command -v $tool >/dev/null || die "needs $tool"; done
if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf --one-file-system "$work"' EXIT
fi
declare -p binary cuda_binary cuda dockerfile work >"$work/arguments"
# Mounts and processes end with the namespace, whatever happens.
unshare --mount --pid --fork --kill-child --mount-proc "$self" --in-namespace "$work/arguments"
