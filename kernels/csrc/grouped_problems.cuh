// One problem per expert as CUTLASS's pointer-array kernels read it from the device: filled there, since only the device knows the offsets.
//
// The problem is transposed, y^T [n, rows] = w [n, k] x^T [k, rows]: a tensor-core instruction of Hopper always takes 64 rows of its first
// operand but any multiple of 8 of its second, so an expert with few rows wastes little when the rows of x are the second.
#pragma once

#include "grouped.cuh"

namespace grouped {

// Tables of `experts` entries each.
struct Problems {
    int32_t* shapes;     // [experts, 3]: n, rows, k
    const bf16** w;      // first operand of each expert
    const bf16** x;      // second operand
    bf16** y;            // result
    int64_t* w_strides;  // elements from one row to the next of each
    int64_t* x_strides;
    int64_t* y_strides;
};

constexpr int64_t TABLE_ALIGNMENT = 256;

inline int64_t padded(int64_t bytes) { return ceil_div(bytes, TABLE_ALIGNMENT) * TABLE_ALIGNMENT; }

// Bytes of the tables, and where each is in a workspace.
inline int64_t problems_bytes(int32_t experts) { return padded(3 * sizeof(int32_t) * experts) + 6 * padded(sizeof(int64_t) * experts); }
inline Problems problems_at(void* workspace, int32_t experts) {
    char* next = static_cast<char*>(workspace);
    auto take = [&](int64_t bytes) {
        char* here = next;
        next += padded(bytes);
        return static_cast<void*>(here);
    };
    int64_t words = sizeof(int64_t) * experts;
    Problems problems;
    problems.shapes = static_cast<int32_t*>(take(3 * sizeof(int32_t) * experts));
    problems.w = static_cast<const bf16**>(take(words));
    problems.x = static_cast<const bf16**>(take(words));
    problems.y = static_cast<bf16**>(take(words));
    problems.w_strides = static_cast<int64_t*>(take(words));
    problems.x_strides = static_cast<int64_t*>(take(words));
    problems.y_strides = static_cast<int64_t*>(take(words));
    return problems;
}

// One thread per expert. An expert without rows is a problem without tiles; its pointers stay within (or one past) their arrays.
static __global__ void fill_problems(Problems problems, hm_grouped_args args) {
    int expert = blockIdx.x * blockDim.x + threadIdx.x;
    if (expert >= args.experts) return;
    int64_t first = args.offsets[expert];
    problems.shapes[3 * expert] = args.n;
    problems.shapes[3 * expert + 1] = int32_t(args.offsets[expert + 1] - first);
    problems.shapes[3 * expert + 2] = args.k;
    problems.w[expert] = args.weight + int64_t(expert) * args.n * args.k;
    problems.x[expert] = args.x + first * args.k;
    problems.y[expert] = args.y + first * args.n;
    problems.w_strides[expert] = args.k;
    problems.x_strides[expert] = args.k;
    problems.y_strides[expert] = args.n;
}

inline void launch_fill(const Problems& problems, const hm_grouped_args& args, cudaStream_t stream) {
    constexpr int threads = 128;
    HM_LAUNCH((fill_problems), dim3(unsigned(ceil_div(args.experts, threads))), dim3(threads), 0, stream, problems, args);
}

}  // namespace grouped
