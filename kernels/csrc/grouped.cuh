// The grouped GEMM of experts with many rows: y[r] = w[e] x[r] for the rows r in offsets[e] .. offsets[e + 1] of expert e. Here: what its two
// implementations (grouped_sm90.cu for Hopper, grouped_tiled.cu for sm_80 and later) and their callers share.
#pragma once

#include "hm.cuh"

extern "C" {
struct hm_grouped_args {
    const bf16* x;            // [R, k] rows sorted by expert
    const bf16* weight;       // [experts, n, k]
    bf16* y;                  // [R, n]
    const uint32_t* offsets;  // [experts + 1], ascending, R = offsets[experts] <= max_rows
    void* workspace;          // aligned to 256 bytes; the kernel on Hopper keeps its tables there until it has run
    int64_t workspace_bytes;
    int32_t experts;
    int32_t max_rows;         // what the host knows of R
    int32_t n, k;             // multiples of 8
    int32_t multiprocessors;  // to fill
    int32_t tile_rows;        // rows of x in a tile: which variant runs
};

int hm_grouped_sm90(const hm_grouped_args* args, cudaStream_t stream);
int64_t hm_grouped_sm90_workspace(int32_t experts, int32_t multiprocessors);
int hm_grouped_tiled(const hm_grouped_args* args, cudaStream_t stream);
}

// TMA and 16-byte copies need rows that start at multiples of 16 bytes.
inline bool hm_grouped_valid(const hm_grouped_args& args) {
    auto aligned = [](const void* at, uintptr_t to) { return reinterpret_cast<uintptr_t>(at) % to == 0; };
    return args.experts > 0 && args.max_rows >= 0 && args.n > 0 && args.k > 0 && args.n % 8 == 0 && args.k % 8 == 0 && args.multiprocessors > 0 &&
           aligned(args.x, 16) && aligned(args.weight, 16) && aligned(args.y, 16);
}
