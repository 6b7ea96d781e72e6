# shellcheck shell=bash
# For run.sh: what the binary needs at start. CUDA's libraries may be anywhere, or in Python packages, which no loader looks into.

# Folders that may have CUDA's libraries, one a line.
library_folders() {
    local root
    for root in "${CUDA_HOME:-}" /usr/local/cuda /usr/local/cuda-13* /usr/local/nvidia /opt/cuda; do
        if [ -n "$root" ] && [ -d "$root" ]; then printf '%s\n' "$root"; fi
    done
    "$PYTHON" -c '
import site, sys
for folder in filter(None, dict.fromkeys([*sys.path, *site.getsitepackages(), site.getusersitepackages()])):
    print(folder + "/nvidia")' 2>/dev/null
}

# Libraries that the loader does not find, one a line.
missing_libraries() { ldd "$BIN" 2>/dev/null | awk '/not found/ { print $1 }'; }

# Names folders in LD_LIBRARY_PATH until all libraries are found; dies with what is missing.
find_libraries() {
    local name root folder missing
    for name in $(missing_libraries); do
        folder=""
        while read -r root; do
            folder=$(find -L "$root" -maxdepth 6 -name "$name" -print -quit 2>/dev/null)
            [ -z "$folder" ] || break
        done < <(library_folders)
        [ -z "$folder" ] || export LD_LIBRARY_PATH=${folder%/*}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    done
    missing=$(missing_libraries | tr '\n' ' ')
    [ "$missing" != "libcuda.so.1 " ] || die "no NVIDIA driver here: $BIN cannot start without libcuda.so.1" 77
    [ -z "$missing" ] || die "$BIN cannot start without ${missing% }: libcuda.so.1 is the driver's, the others are CUDA 13's.
Looked into: $(library_folders | tr '\n' ' ')
They are in a CUDA toolkit, and in the Python packages nvidia-cublas, nvidia-cuda-runtime, nvidia-curand and nvidia-cuda-nvrtc; LD_LIBRARY_PATH names where" 1
}
