#!/usr/bin/env bash
# Lays out what `--features cuda` needs to compile, from NVIDIA's Python wheels: for machines that have neither CUDA nor a GPU, such as CI. Nothing is
# installed outside the folder, and no privileges are needed; python3 with pip, and gcc, are.
#
#   kernels/toolkit.sh DIR                        CUDA 13.0 and the headers of CUTLASS under DIR: 1.3 GB; a second call does nothing
#   eval "$(kernels/toolkit.sh --print-env DIR)"  the variables, for this shell
#   cargo build --release --features cuda
#
#   HARDMAX_CUDA_TOOLKIT=DIR .ci/run              type-checks the feature with it
#
# CUDA_COMPUTE_CAP, 90 unless it is set, is the GPU that is compiled for: 80 for an A100, 89 for an L40S, 90 for an H100 or H200. NVCC_APPEND_FLAGS has
# nvcc compress what it puts into the binary, to a fifth, unless it is set to something else.
#
# The libcuda in it is for the linker alone: it has every symbol and no function, so nothing runs with it. At run time a binary wants the driver's
# libcuda.so.1 and CUDA's libraries, which the container image has (docs/cuda.md). DIR/toolkit/lib has them too, but not DIR/stub:
#
#   LD_LIBRARY_PATH=DIR/toolkit/lib target/release/hardmax gpu-check
set -euo pipefail

wheels=(
    # Of one release, 13.0.
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-curand==10.4.0.35 nvidia-cublas==13.1.0.3
    # To read what was compiled. The oldest of them are newer than 13.0, whose files they read as well.
    nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86
    # CUTLASS and CuTe, of which the headers are used.
    nvidia-cutlass==4.2.0.0
)
# A folder made by another list is made again.
stamp=$(printf '%s\n' "${wheels[@]}" "layout 1")

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
die() { printf 'toolkit: %s\n' "$*" >&2; exit 1; }
complete() { [ "$(cat "$dir/.complete" 2>/dev/null)" = "$stamp" ]; }

print_env() {
    cat <<END
export CUDA_HOME='$dir/toolkit' CUDA_PATH='$dir/toolkit' CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}"
export CUTLASS_INCLUDE='$dir/wheels/cutlass_library/source/include' NVCC_APPEND_FLAGS="\${NVCC_APPEND_FLAGS:---compress-mode=size}"
export PATH='$dir/toolkit/bin':"\$PATH" LIBRARY_PATH='$dir/toolkit/lib:$dir/stub'"\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
END
}

check_tools() {
    [ "$(uname -sm)" = "Linux x86_64" ] || die "the wheels are for Linux on x86-64, and this is $(uname -sm)"
    command -v python3 >/dev/null || die "needs python3"
    python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip: install it (Debian: python3-pip), or put a virtual environment that has it first on the PATH"
    command -v gcc >/dev/null || die "needs gcc, for the stub of libcuda"
}

download() {
    # No dependencies: the list is complete, and CUTLASS would bring Python packages that its headers do not need.
    python3 -m pip install --quiet --no-deps --root-user-action=ignore --target "$dir/wheels" "${wheels[@]}" || die "pip could not install the wheels: see above"
    ln -sfn wheels/nvidia/cu13 "$dir/toolkit"
    ln -sfn lib "$dir/toolkit/lib64"
    # The names that the linker looks for.
    local library
    for library in libcublas.so.13 libcublasLt.so.13 libcudart.so.13 libcurand.so.10 libnvrtc.so.13; do
        [ -e "$dir/toolkit/lib/$library" ] || die "the wheels have no $library"
        ln -sfn "$library" "$dir/toolkit/lib/${library%.so.*}.so"
    done
}

# A libcuda with every function of cuda.h, under each name that its macros may give it.
stub() {
    mkdir -p "$dir/stub"
    {
        grep -ohE '\bcu[A-Z][A-Za-z0-9_]*[[:space:]]*\(' "$dir/toolkit/include/cuda.h" | tr -d ' \t('
        grep -ohE '^#[[:space:]]*define[[:space:]]+cu[A-Z].*' "$dir/toolkit/include/cuda.h" | grep -oE '\bcu[A-Z][A-Za-z0-9_]*'
    } | awk '
        BEGIN { split("_v2 _v3 _v4 _ptsz _ptds _v2_ptsz _v2_ptds _v3_ptsz", endings) }
        { print "void " $1 "(void) {}"; for (i in endings) print "void " $1 endings[i] "(void) {}" }
    ' | sort -u >"$dir/stub/libcuda.c"
    gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$dir/stub/libcuda.so" "$dir/stub/libcuda.c"
}

case ${1:-} in
-h | --help) usage && exit ;;
--print-env)
    [ $# = 2 ] || die "usage: kernels/toolkit.sh --print-env DIR"
    dir=$(cd "$2" 2>/dev/null && pwd) || die "no such folder: $2"
    complete || die "$2 is not complete: kernels/toolkit.sh $2 makes it so"
    print_env && exit
    ;;
'' | -*) usage >&2 && exit 2 ;;
esac
[ $# = 1 ] || { usage >&2; exit 2; }
mkdir -p "$1" && dir=$(cd "$1" && pwd)
case $dir in *[\'\":\ ]*) die "'$dir' has a quote, a colon or a blank in it, which compilers do not take well" ;; esac
if complete; then
    echo "toolkit: $dir is complete"
else
    check_tools
    rm -rf "$dir/.complete" "$dir/wheels" "$dir/toolkit" "$dir/stub"
    download
    stub
    "$dir/toolkit/bin/nvcc" --version | tail -n 2
    printf '%s\n' "$stamp" >"$dir/.complete"
fi
echo "eval \"\$(kernels/toolkit.sh --print-env $1)\""
