// What surrounds the two grouped GEMMs of experts with many rows: rows into the order of experts, SiLU(gate) * up between them, and weights in
// e4m3 widened for them. All work on 8 elements (16 bytes of bf16) per thread; what comes to R rows is launched for the most there can be.
#include "hm.cuh"

struct hm_gather_rows_args {
    const bf16* x;            // [tokens, width]
    const uint32_t* rows;     // [R] slot of each sorted row; its token is slot / slots
    const uint32_t* offsets;  // [experts + 1], R = offsets[experts] <= max_rows
    bf16* out;                // [max_rows, width]; rows from R on are left as they are
    int32_t experts, max_rows, width, slots;
};

struct hm_silu_mul_args {
    const bf16* gate_up;      // [max_rows, 2 * width]: gate, then up
    const uint32_t* offsets;  // as above
    bf16* out;                // [max_rows, width]; rows from R on are left as they are
    int32_t experts, max_rows, width;
};

struct hm_dequantize_experts_args {
    const uint8_t* weight;    // [experts, n, k] e4m3
    const float* scales;      // [experts, ceil(n / 128), ceil(k / 128)]
    const uint32_t* offsets;  // [experts + 1]; an expert without rows is left out. Null: all of them
    bf16* out;                // [experts, n, k]
    int32_t experts, n, k;
};

namespace {

constexpr int THREADS = 256;
constexpr int CHUNK = 8;
constexpr int SCALE_BLOCK = 128;

// A warp per row.
__global__ void __launch_bounds__(THREADS) gather_rows(hm_gather_rows_args args) {
    uint32_t row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= args.offsets[args.experts]) return;
    const bf16* from = args.x + int64_t(args.rows[row] / args.slots) * args.width;
    bf16* to = args.out + int64_t(row) * args.width;
    for (int i = threadIdx.x % 32 * CHUNK; i < args.width; i += 32 * CHUNK) store16(to + i, load16(from + i));
}

__device__ __forceinline__ uint32_t silu_mul_pair(uint32_t gate, uint32_t up) {
    return pack(silu(low_half(gate)) * low_half(up), silu(high_half(gate)) * high_half(up));
}

__global__ void __launch_bounds__(THREADS) silu_mul(hm_silu_mul_args args) {
    uint32_t chunks = args.width / CHUNK, index = blockIdx.x * THREADS + threadIdx.x;
    uint32_t row = index / chunks, column = index % chunks * CHUNK;
    if (row >= args.offsets[args.experts]) return;
    const bf16* from = args.gate_up + int64_t(row) * 2 * args.width + column;
    uint4 gate = load_streaming(from), up = load_streaming(from + args.width);
    uint4 out = make_uint4(silu_mul_pair(gate.x, up.x), silu_mul_pair(gate.y, up.y), silu_mul_pair(gate.z, up.z), silu_mul_pair(gate.w, up.w));
    store16(args.out + int64_t(row) * args.width + column, out);
}

__device__ __forceinline__ uint32_t scaled(uint32_t pair, float scale) { return pack(low_half(pair) * scale, high_half(pair) * scale); }

// Blocks along y are experts.
__global__ void __launch_bounds__(THREADS) dequantize_experts(hm_dequantize_experts_args args) {
    int expert = blockIdx.y;
    if (args.offsets && args.offsets[expert] == args.offsets[expert + 1]) return;
    uint32_t chunks = args.k / CHUNK, index = blockIdx.x * THREADS + threadIdx.x;
    int row = index / chunks, column = index % chunks * CHUNK;
    if (row >= args.n) return;
    int64_t at = (int64_t(expert) * args.n + row) * args.k + column;
    uint2 values = *reinterpret_cast<const uint2*>(args.weight + at);
    uint32_t pairs[4];
    widen_e4m3(values.x, pairs);
    widen_e4m3(values.y, pairs + 2);
    int64_t scale_rows = ceil_div(args.n, SCALE_BLOCK), scale_columns = ceil_div(args.k, SCALE_BLOCK);
    float scale = args.scales[(expert * scale_rows + row / SCALE_BLOCK) * scale_columns + column / SCALE_BLOCK];
    store16(args.out + at, make_uint4(scaled(pairs[0], scale), scaled(pairs[1], scale), scaled(pairs[2], scale), scaled(pairs[3], scale)));
}

unsigned blocks(int64_t threads) { return unsigned(ceil_div(threads, THREADS)); }

}  // namespace

extern "C" {

int hm_gather_rows(const hm_gather_rows_args* args, cudaStream_t stream) {
    HM_LAUNCH((gather_rows), dim3(blocks(int64_t(args->max_rows) * 32)), dim3(THREADS), 0, stream, *args);
    return hm_check();
}

int hm_silu_mul(const hm_silu_mul_args* args, cudaStream_t stream) {
    HM_LAUNCH((silu_mul), dim3(blocks(int64_t(args->max_rows) * (args->width / CHUNK))), dim3(THREADS), 0, stream, *args);
    return hm_check();
}

int hm_dequantize_experts(const hm_dequantize_experts_args* args, cudaStream_t stream) {
    dim3 grid(blocks(int64_t(args->n) * (args->k / CHUNK)), unsigned(args->experts));
    HM_LAUNCH((dequantize_experts), grid, dim3(THREADS), 0, stream, *args);
    return hm_check();
}
}
