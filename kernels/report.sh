#!/usr/bin/env bash
# What nvcc makes of the kernels, as a table in Markdown on standard output: registers, static shared memory, spills, and how many instructions are
# tensor cores'. What is shared dynamically is chosen at launch and not in it.
#
#     kernels/report.sh [ARCHITECTURE...]      90a, 80 and 89 if none is given; JOBS compilers at a time
#
# Fails where a kernel spills, where ptxas sees performance lost, or where a kernel for tensor cores does not use them. Needs nvcc (NVCC, CUDA_HOME or PATH), for 90a also CUTLASS's
# headers (CUTLASS_INCLUDE); without, it says so in one line and exits with 77. No GPU is needed.
set -euo pipefail
cd "$(dirname "$0")/csrc"

HOPPER=grouped_sm90.cu
# Kernels that may spill, as a regular expression, with a reason each. There are none.
MAY_SPILL='^$'
# Which instruction a kernel must have: `regular expression, instruction`, one a line.
MUST_HAVE='^CUTLASS HGMMA
^grouped_tiled HMMA
^attend HMMA'

skip() {
    echo "report.sh: $*" >&2
    exit 77
}

nvcc=${NVCC:-}
if [ -z "$nvcc" ] && [ -x "${CUDA_HOME:-}/bin/nvcc" ]; then nvcc=$CUDA_HOME/bin/nvcc; fi
nvcc=$(command -v "${nvcc:-nvcc}") || skip "no nvcc: set NVCC or CUDA_HOME, or put it on the PATH"
tools=$(dirname "$nvcc")
if [ $# -eq 0 ]; then set -- 90a 80 89; fi
case " $* " in
    *" 90a "*) [ -f "${CUTLASS_INCLUDE:-}/cutlass/cutlass.h" ] || skip "no CUTLASS: set CUTLASS_INCLUDE to the folder of its headers" ;;
esac

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# compile ARCHITECTURE FILE: its cubin, and beside it what ptxas says.
compile() {
    local name=$out/$1.${2%.cu} flags=(-std=c++17 -O3 --expt-relaxed-constexpr "-DHM_BUILT_FOR=${1%a}" -I.)
    if [ "$1" = 90a ]; then flags+=(-DHM_HOPPER "-I$CUTLASS_INCLUDE"); fi
    "$nvcc" -cubin "-gencode=arch=compute_$1,code=sm_$1" -Xptxas -v "${flags[@]}" "$2" -o "$name.cubin" 2>"$name.log" || {
        cat "$name.log" >&2
        return 1
    }
    "$tools/cuobjdump" -sass "$name.cubin" >"$name.sass"
}
export -f compile
export out nvcc tools HOPPER

for arch in "$@"; do
    for file in *.cu; do
        if [ "$file" != $HOPPER ] || [ "$arch" = 90a ]; then echo "$arch $file"; fi
    done
done | xargs -P "${JOBS:-$(nproc)}" -L 1 bash -c 'compile "$0" "$1"'

# A kernel's name as a reader knows it, from the demangled one.
short() {
    sed -E 's/^void //; s/\(anonymous namespace\):://g; s/\(int\)//g
        s/^cutlass::device_kernel<.*MainloopSm90ArrayTmaGmmaWarpSpecialized<([0-9]+), cute::tuple<cute::C<([0-9]+)>, cute::C<([0-9]+)>.*KernelPtrArrayTmaWarpSpecialized([A-Za-z]+)>, cute::tuple<cute::C<([0-9]+)>, cute::C<([0-9]+)>, cute::C<([0-9]+)> *>.*/CUTLASS \5x\6x\7, \4, cluster \2x\3, \1 stages/
        s/\([^()]*\)( *\[clone [^]]*\])?$//'
}

# rows ARCHITECTURE FILE: mangled name, registers, shared bytes, spilled bytes, HGMMA, HMMA of each kernel.
rows() {
    local name=$out/$1.${2%.cu}
    awk '
        FILENAME ~ /log$/ && /Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; order[++count] = kernel }
        FILENAME ~ /log$/ && /spill stores/ { match($0, /[0-9]+ bytes spill stores/); spilled[kernel] = substr($0, RSTART) + 0
                                              match($0, /[0-9]+ bytes spill loads/); spilled[kernel] += substr($0, RSTART) + 0 }
        FILENAME ~ /log$/ && /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); registers[kernel] = substr($0, RSTART + 5) + 0
                                                       shared[kernel] = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART) + 0 : 0 }
        FILENAME ~ /sass$/ && /Function :/ { kernel = $NF }
        FILENAME ~ /sass$/ && /HGMMA/ { hgmma[kernel]++ }
        FILENAME ~ /sass$/ && /[^A-Z]HMMA/ { hmma[kernel]++ }
        END { for (i = 1; i <= count; i++) { k = order[i]; print k, registers[k], shared[k], spilled[k], hgmma[k] + 0, hmma[k] + 0 } }
    ' "$name.log" "$name.sass"
}

bad=0
complain() {
    echo "report.sh: $*" >&2
    bad=1
}

echo "| architecture | file | kernel | registers | static shared memory | spilled bytes | HGMMA | HMMA |"
echo "|---|---|---|---:|---:|---:|---:|---:|"
for arch in "$@"; do
    for file in *.cu; do
        log=$out/$arch.${file%.cu}.log
        [ -f "$log" ] || continue
        # Of wgmma instructions that wait for each other, say, or registers that warp groups cannot pass on.
        if remark=$(grep -m 1 -o '(C[0-9]*) Potential Performance Loss.*' "$log" | cut -c 1-120); then complain "$file, sm_$arch: $remark"; fi
        while read -r mangled registers shared spilled hgmma hmma; do
            kernel=$(c++filt -r "$mangled" | short)
            echo "| sm_$arch | $file | \`$kernel\` | $registers | $shared | $spilled | $hgmma | $hmma |"
            if [ "$spilled" != 0 ] && ! [[ $kernel =~ $MAY_SPILL ]]; then complain "$kernel, sm_$arch: spills $spilled bytes"; fi
            while read -r pattern instruction; do
                count=$hmma
                if [ "$instruction" = HGMMA ]; then count=$hgmma; fi
                if [[ $kernel =~ $pattern ]] && [ "$count" = 0 ]; then complain "$kernel, sm_$arch: no $instruction"; fi
            done <<<"$MUST_HAVE"
        done < <(rows "$arch" "$file")
    done
done
exit $bad
