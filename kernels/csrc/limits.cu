// What memory can do at best: a large buffer is copied, or only read, by 16 bytes and many at once.
#include "hm.cuh"

struct hm_limit_args {
    const uint4* from;  // [len]
    uint4* to;          // [len]; null: nothing is written but `sums`
    uint32_t* sums;     // [blocks]: the exclusive or of all words that a block read; null where it copies
    int64_t len;        // a multiple of TILE
    int32_t blocks, reserved;
};

namespace {

constexpr int THREADS = 256;
// Loads under way in each thread.
constexpr int DEPTH = 8;
constexpr int64_t TILE = THREADS * DEPTH;

__global__ void __launch_bounds__(THREADS) stream_copy(hm_limit_args args) {
    for (int64_t tile = blockIdx.x * TILE; tile < args.len; tile += gridDim.x * TILE) {
        uint4 values[DEPTH];
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) values[i] = load_streaming(args.from + tile + i * THREADS + threadIdx.x);
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) store16(args.to + tile + i * THREADS + threadIdx.x, values[i]);
    }
}

__global__ void __launch_bounds__(THREADS) stream_read(hm_limit_args args) {
    __shared__ uint32_t partial[THREADS / 32];
    uint32_t sum = 0;
    for (int64_t tile = blockIdx.x * TILE; tile < args.len; tile += gridDim.x * TILE) {
        uint4 values[DEPTH];
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) values[i] = load_streaming(args.from + tile + i * THREADS + threadIdx.x);
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) sum ^= values[i].x ^ values[i].y ^ values[i].z ^ values[i].w;
    }
    for (int other = 16; other > 0; other >>= 1) sum ^= __shfl_xor_sync(FULL, sum, other);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < THREADS / 32; ++warp) sum ^= partial[warp];
    args.sums[blockIdx.x] = sum;
}

}  // namespace

extern "C" {

int64_t hm_stream_tile_bytes() { return TILE * int64_t(sizeof(uint4)); }

int hm_stream_copy(const hm_limit_args* args, cudaStream_t stream) {
    HM_LAUNCH((stream_copy), dim3(args->blocks), dim3(THREADS), 0, stream, *args);
    return hm_check();
}

int hm_stream_read(const hm_limit_args* args, cudaStream_t stream) {
    HM_LAUNCH((stream_read), dim3(args->blocks), dim3(THREADS), 0, stream, *args);
    return hm_check();
}
}
