// Products of few rows with many weights, for which reading the weights is all the work: the experts of a decode step, and dense products.
//
// Weights are the 16 x 16 operand of the tensor cores and rows of x the columns of the 16 x 8 one. A dot product may be summed in any order of
// k, as long as both operands have the same: a lane takes 16 bytes of a row of weights as they lie, which are its share of two (bf16) or four
// (e4m3) products, and the same columns of x. So weights go from memory to registers and nowhere else.
//
// A block makes two tiles of 16 rows of weights, the gate and the up rows of 16 hidden columns, or 32 neighbours; its warps share k, and their
// sums are added up in order. The order of all sums depends on k alone: a row of y does not depend on the other rows.
#include "hm.cuh"

struct hm_stream_args {
    const void* weight;      // [experts, n, k], gated [experts, 2 n, k]: bf16, or e4m3 with
    const float* scales;     // [experts, ceil(rows of weight / 128), ceil(k / 128)]; of bf16 null
    const bf16* x;           // rows of k
    void* y;                 // rows of n, `stride` apart: bf16 or f32
    const uint32_t* active;  // [entries, 4] as the plan says; null: one expert, all rows
    const uint32_t* rows;    // row i of y is of row rows[i] / slots of x; null: of row i
    int64_t stride;
    int32_t entries, row_count;
    int32_t slots, n, k;
    int32_t e4m3, gated, y_f32, add;
    int32_t few;  // experts have up to 8 rows; with more it takes longer
};

namespace {

constexpr int TILE = 16;         // rows of weights in an operand
constexpr int STEP = 128;        // of k, that a warp takes at once
constexpr int FEW_ROWS = 8;      // of x in one operand
constexpr int MAX_ROWS = 32;     // of x in one pass over the weights
constexpr int SCALE_BLOCK = 128;

__device__ __forceinline__ uint4 zero16() { return make_uint4(0, 0, 0, 0); }

// What one lane reads, and what it sums up. Places are counted in 16 bytes, which is how they are read: 32 bits reach far enough, and a register
// for each row is saved.
template <typename W, int COLUMNS> struct Lane {
    const uint4* weights;  // of the expert
    uint32_t row[4];       // rows g and g + 8 of both tiles
    int scale[2];          // where the scales of the tiles begin; of e4m3 only
    uint32_t x[COLUMNS];   // rows g, g + 8 ... of x
    float sum[2][COLUMNS][4];
};

template <int COLUMNS>
__device__ __forceinline__ void multiply(float sum[COLUMNS][4], uint4 upper, uint4 lower, const uint4 x[COLUMNS]) {
    uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y}, second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
        uint32_t low[2] = {x[n].x, x[n].y}, high[2] = {x[n].z, x[n].w};
        mma_m16n8k16(sum[n], first, low);
        mma_m16n8k16(sum[n], second, high);
    }
}

template <typename W> constexpr int OF_16_BYTES = 16 / sizeof(W);

template <typename W, int COLUMNS> __device__ __forceinline__ uint4 weights_at(const Lane<W, COLUMNS>& lane, int row, int at, int k) {
    return at < k ? load_streaming(lane.weights + (lane.row[row] + at / OF_16_BYTES<W>)) : zero16();
}
template <int COLUMNS> __device__ __forceinline__ void x_at(uint4 out[COLUMNS], const hm_stream_args& args, const uint32_t x[COLUMNS], int at) {
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) out[n] = at < args.k ? load16(reinterpret_cast<const uint4*>(args.x) + (x[n] + at / OF_16_BYTES<bf16>)) : zero16();
}

// How many chunks of a step are asked for at once: as many as there are registers for.
template <int COLUMNS> constexpr int at_once(int chunks) { return COLUMNS < chunks ? chunks / COLUMNS : 1; }

// STEP columns from `from` on; what is behind k counts as 0. Weights come first: they are what is waited for.
template <int COLUMNS> __device__ __forceinline__ void step(const hm_stream_args& args, Lane<bf16, COLUMNS>& lane, int from, int t) {
    constexpr int CHUNK = 32, CHUNKS = at_once<COLUMNS>(STEP / CHUNK);  // a chunk is 8 for each of 4 lanes
#pragma unroll
    for (int first = from; first < from + STEP; first += CHUNKS * CHUNK) {
        uint4 weight[CHUNKS][4];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int row = 0; row < 4; ++row) weight[c][row] = weights_at(lane, row, first + c * CHUNK + t * 8, args.k);
        uint4 x[CHUNKS][COLUMNS];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) x_at<COLUMNS>(x[c], args, lane.x, first + c * CHUNK + t * 8);
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) multiply<COLUMNS>(lane.sum[tile], weight[c][2 * tile], weight[c][2 * tile + 1], x[c]);
    }
}

// Eight e4m3 as bf16.
__device__ __forceinline__ uint4 widen8(uint32_t low, uint32_t high) {
    uint32_t pairs[4];
    widen_e4m3(low, pairs);
    widen_e4m3(high, pairs + 2);
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <int COLUMNS> __device__ __forceinline__ void step(const hm_stream_args& args, Lane<uint8_t, COLUMNS>& lane, int from, int t) {
    static_assert(STEP == SCALE_BLOCK, "a step has one scale");
    constexpr int CHUNK = 64, CHUNKS = at_once<COLUMNS>(STEP / CHUNK);  // a chunk is 16 for each of 4 lanes
    float scale[2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) scale[tile] = args.scales[lane.scale[tile] + from / SCALE_BLOCK];
    float sum[2][COLUMNS][4] = {};
#pragma unroll COLUMNS < 4 ? 2 : 1
    for (int first = from; first < from + STEP; first += CHUNKS * CHUNK) {
        uint4 weight[CHUNKS][4];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int row = 0; row < 4; ++row) weight[c][row] = weights_at(lane, row, first + c * CHUNK + t * 16, args.k);
        // The order of sums is that of k, however many chunks are asked for at once; x, which is at hand, half by half, for want of registers.
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint4 x[COLUMNS];
                x_at<COLUMNS>(x, args, lane.x, first + c * CHUNK + t * 16 + half * 8);
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    uint4 upper = weight[c][2 * tile], lower = weight[c][2 * tile + 1];
                    uint4 first_rows = half ? widen8(upper.z, upper.w) : widen8(upper.x, upper.y);
                    uint4 last_rows = half ? widen8(lower.z, lower.w) : widen8(lower.x, lower.y);
                    multiply<COLUMNS>(sum[tile], first_rows, last_rows, x);
                }
            }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) lane.sum[tile][n][i] += scale[tile] * sum[tile][n][i];
}

// The rows that a block has to do with.
struct Entry {
    uint32_t expert, first, end;
};

// Rows of x are 36 floats apart, so that the lanes of a warp write to different banks.
constexpr int PARTIAL_STRIDE = 2 * TILE + 4;

// `count` rows of y from `first` on, up to 8 COLUMNS of them.
template <typename W, bool GATED, typename Y, int WARPS, int COLUMNS>
__device__ __forceinline__ void pass(const hm_stream_args& args, uint32_t expert, uint32_t first, int count, float* partial) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    constexpr int WIDTH = GATED ? TILE : 2 * TILE;
    int column = blockIdx.x * WIDTH;
    int weight_rows = GATED ? 2 * args.n : args.n, scale_columns = int(ceil_div(args.k, SCALE_BLOCK));
    Lane<W, COLUMNS> lane;
    lane.weights = static_cast<const uint4*>(args.weight) + int64_t(expert) * weight_rows * (args.k / OF_16_BYTES<W>);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // Rows behind the last are read as the last, and not written.
        int row = column + i % 2 * 8 + g + (GATED ? 0 : i / 2 * TILE);
        row = min(row, args.n - 1) + (GATED ? i / 2 * args.n : 0);
        lane.row[i] = uint32_t(row) * (args.k / OF_16_BYTES<W>);
        // Tiles begin at multiples of 16, the gated half too: a tile lies in one block of scales.
        lane.scale[i / 2] = (expert * int(ceil_div(weight_rows, SCALE_BLOCK)) + row / SCALE_BLOCK) * scale_columns;
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
        // Columns behind the last are of the same row, which is read once, and are not written.
        uint32_t row = first + min(n * 8 + g, count - 1);
        lane.x[n] = (args.rows ? args.rows[row] / args.slots : row) * (args.k / OF_16_BYTES<bf16>);
#pragma unroll
        for (int i = 0; i < 8; ++i) lane.sum[i / 4][n][i % 4] = 0.0f;
    }
    // Steps of other warps fill the time: one at once is what there are registers for.
#pragma unroll 1
    for (int from = warp * STEP; from < args.k; from += WARPS * STEP) step<COLUMNS>(args, lane, from, t);

    constexpr int OF_WARP = 8 * COLUMNS * PARTIAL_STRIDE;
    __syncthreads();  // an earlier pass has been read
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                partial[warp * OF_WARP + (n * 8 + 2 * t + i % 2) * PARTIAL_STRIDE + tile * TILE + i / 2 * 8 + g] = lane.sum[tile][n][i];
    __syncthreads();
    auto total = [&](int index, int of) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += partial[w * OF_WARP + index * PARTIAL_STRIDE + of];
        return sum;
    };
    for (int i = threadIdx.x; i < count * WIDTH; i += WARPS * 32) {
        int index = i / WIDTH, of = i % WIDTH;
        if (column + of >= args.n) continue;
        float value = GATED ? silu(total(index, of)) * total(index, TILE + of) : total(index, of);
        Y* y = static_cast<Y*>(args.y) + (first + index) * args.stride + column + of;
        *y = narrow<Y>(args.add ? widen(*y) + value : value);
    }
}

// MOST rows are in one pass; kernels for few of them have more warps at once.
template <typename W, bool GATED, typename Y, int WARPS, int MOST>
__global__ void __launch_bounds__(WARPS * 32, (MOST == FEW_ROWS ? 16 : WARPS == 4 ? 12 : 8) / WARPS) stream(hm_stream_args args) {
    __shared__ float partial[WARPS * MOST * PARTIAL_STRIDE];
    Entry entry{0, 0, uint32_t(args.row_count)};
    if (args.active) {
        uint4 found = load16(args.active + int64_t(blockIdx.y) * 4);
        entry = {found.x, found.y, found.z};
    }
    for (uint32_t first = entry.first; first < entry.end; first += MOST) {
        int count = min(int(entry.end - first), MOST);
        if (MOST == FEW_ROWS || count <= 8) pass<W, GATED, Y, WARPS, 1>(args, entry.expert, first, count, partial);
        else if (count <= 16) pass<W, GATED, Y, WARPS, 2>(args, entry.expert, first, count, partial);
        else pass<W, GATED, Y, WARPS, 4>(args, entry.expert, first, count, partial);
    }
}

template <typename W, bool GATED, typename Y, int WARPS> void launch(const hm_stream_args& args, cudaStream_t to) {
    dim3 grid(ceil_div(args.n, GATED ? TILE : 2 * TILE), args.entries), block(WARPS * 32);
    if (args.few) HM_LAUNCH((stream<W, GATED, Y, WARPS, FEW_ROWS>), grid, block, 0, to, args);
    else HM_LAUNCH((stream<W, GATED, Y, WARPS, MAX_ROWS>), grid, block, 0, to, args);
}

// One expert has few blocks: then more warps have to ask for memory. Batches do not decide it, lest rows depend on them.
constexpr int64_t FEW_BLOCKS = 264;

template <typename W> void launch(const hm_stream_args& args, cudaStream_t to) {
    if (args.gated) launch<W, true, bf16, 4>(args, to);
    else if (args.y_f32) launch<W, false, float, 4>(args, to);
    else launch<W, false, bf16, 4>(args, to);
}

// ---- weights of 8 bits -------------------------------------------------------------------------------------------

}  // namespace

struct hm_quantize_args {
    const bf16* weight;  // [experts, n, k]
    uint8_t* values;     // [experts, n, k]
    float* scales;       // [experts, ceil(n / 128), ceil(k / 128)]
    int32_t experts, n, k;
};

namespace {

constexpr int QUANTIZE_THREADS = 256;
constexpr float LARGEST_E4M3 = 448.0f;

// A block for each 128 x 128 weights. What is not finite makes its scale, and so all of them, NaN.
__global__ void __launch_bounds__(QUANTIZE_THREADS) quantize_blocks(hm_quantize_args args) {
    int64_t expert = blockIdx.z;
    int row = blockIdx.y * SCALE_BLOCK, column = blockIdx.x * SCALE_BLOCK + threadIdx.x % SCALE_BLOCK;
    int rows = min(SCALE_BLOCK, args.n - row);
    int64_t first = (expert * args.n + row) * args.k + column;
    bool here = column < args.k;
    float largest = 0.0f;
    for (int r = threadIdx.x / SCALE_BLOCK; here && r < rows; r += QUANTIZE_THREADS / SCALE_BLOCK) {
        float size = fabsf(widen(args.weight[first + int64_t(r) * args.k]));
        // Maxima pass over NaN.
        largest = fmaxf(largest, isfinite(size) ? size : INFINITY);
    }
    largest = block_max(largest);
    float scale = isfinite(largest) ? (largest > 0.0f ? largest / LARGEST_E4M3 : 1.0f) : NAN;
    for (int r = threadIdx.x / SCALE_BLOCK; here && r < rows; r += QUANTIZE_THREADS / SCALE_BLOCK) {
        int64_t at = first + int64_t(r) * args.k;
        args.values[at] = __nv_cvt_float_to_fp8(widen(args.weight[at]) / scale, __NV_SATFINITE, __NV_E4M3);
    }
    if (threadIdx.x == 0) args.scales[(expert * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = scale;
}

}  // namespace

extern "C" {

int hm_experts_stream(const hm_stream_args* args, cudaStream_t stream) {
    if (args->e4m3) launch<uint8_t>(*args, stream);
    else launch<bf16>(*args, stream);
    return hm_check();
}

// Not gated, bf16, one expert.
int hm_stream_linear(const hm_stream_args* args, cudaStream_t stream) {
    bool few_blocks = ceil_div(args->n, 2 * TILE) < FEW_BLOCKS;
    if (args->y_f32 && few_blocks) launch<bf16, false, float, 8>(*args, stream);
    else if (args->y_f32) launch<bf16, false, float, 4>(*args, stream);
    else if (few_blocks) launch<bf16, false, bf16, 8>(*args, stream);
    else launch<bf16, false, bf16, 4>(*args, stream);
    return hm_check();
}

int hm_quantize_blocks(const hm_quantize_args* args, cudaStream_t stream) {
    dim3 grid(ceil_div(args->k, SCALE_BLOCK), ceil_div(args->n, SCALE_BLOCK), args->experts);
    HM_LAUNCH((quantize_blocks), grid, dim3(QUANTIZE_THREADS), 0, stream, *args);
    return hm_check();
}
}
