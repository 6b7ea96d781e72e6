// Grouped GEMM of experts on any GPU from sm_80 on: y[r] = w[e] x[r], tiles of rows of x by 128 rows of w, copied to shared memory ahead of
// use (cp.async, three stages) and multiplied by warps on tensor cores (mma m16n8k16, f32 accumulators). Which expert a tile belongs to is
// found on the device; the grid is for the most tiles that max_rows rows can make, and blocks beyond the real ones leave at once.
//
// A row's result depends on no other row: each is summed along k in the same order whatever tile it falls into.

#include "grouped.cuh"

namespace {

constexpr int DEPTH = 32;             // elements of k in a stage
constexpr int STAGES = 3;             // of which two are on their way while one is multiplied
constexpr int COLUMNS = 128;          // rows of w, i.e. columns of y, in a tile
constexpr int CHUNK = 8;              // elements in 16 bytes
constexpr int CHUNKS = DEPTH / CHUNK; // of a row in a stage
constexpr int WARP_COLUMNS = 32;
constexpr int WARPS_ACROSS = COLUMNS / WARP_COLUMNS;

// A block of Rows x 128, in warps of WarpRows x 32.
template <int Rows_, int WarpRows_>
struct Tile {
    static constexpr int Rows = Rows_, WarpRows = WarpRows_;
    static constexpr int Threads = Rows / WarpRows * WARPS_ACROSS * 32;
    static constexpr int StageElements = (Rows + COLUMNS) * DEPTH;
    // The result passes through the same memory; rows are 16 bytes apart from a power of two, so that a warp's stores meet few bank conflicts.
    static constexpr int ResultPitch = COLUMNS + CHUNK;
    static constexpr int Elements = STAGES * StageElements > Rows * ResultPitch ? STAGES * StageElements : Rows * ResultPitch;
    static constexpr int RowMmas = WarpRows / 16, ColumnMmas = WARP_COLUMNS / 8;
};

// Where in a stage a chunk of a row lies. Rows are 64 bytes, so eight of one column of chunks would share two groups of banks: they are spread.
__device__ __forceinline__ int place(int row, int chunk) { return row * DEPTH + (chunk ^ (row >> 1 & 3)) * CHUNK; }

// Rows first .. end of the sorted ones, all of one expert; expert < 0: none.
struct Span {
    int expert, first, end;
};

// The tile number `wanted`, counting each expert's tiles in order. Every warp finds it for itself: a lane counts the tiles of a run of experts,
// the lane whose run has the wanted one walks it.
template <int Rows> __device__ Span find_tile(const uint32_t* offsets, int experts, int wanted) {
    int lane = threadIdx.x % 32, run = int(ceil_div(experts, 32));
    int from = min(lane * run, experts), to = min(from + run, experts);
    auto tiles_of = [&](int expert) { return int(ceil_div(int(offsets[expert + 1] - offsets[expert]), Rows)); };
    int mine = 0;
    for (int expert = from; expert < to; ++expert) mine += tiles_of(expert);
    int through = mine;
    for (int distance = 1; distance < 32; distance <<= 1) {
        int lower = __shfl_up_sync(FULL, through, distance);
        if (lane >= distance) through += lower;
    }
    unsigned past = __ballot_sync(FULL, through > wanted);
    Span span{-1, 0, 0};
    if (past == 0) return span;
    int owner = __ffs(int(past)) - 1;
    if (lane == owner) {
        int left = wanted - (through - mine), expert = from;
        for (int tiles = tiles_of(expert); left >= tiles; tiles = tiles_of(expert)) {
            left -= tiles;
            ++expert;
        }
        span = {expert, int(offsets[expert]) + left * Rows, int(offsets[expert + 1])};
    }
    return {__shfl_sync(FULL, span.expert, owner), __shfl_sync(FULL, span.first, owner), __shfl_sync(FULL, span.end, owner)};
}

// `Count` rows of a matrix [.., k] into one stage: rows from `valid` on and what is beyond k become zeros.
template <int Count, int Threads> __device__ __forceinline__ void fetch(bf16* stage, const bf16* rows, int valid, int depth, int k) {
#pragma unroll
    for (int i = threadIdx.x; i < Count * CHUNKS; i += Threads) {
        int row = i / CHUNKS, chunk = i % CHUNKS, at = depth + chunk * CHUNK;
        bool take = row < valid && at < k;
        copy_async16(stage + place(row, chunk), take ? rows + int64_t(row) * k + at : rows, take);
    }
}

// One step of 16 along k of a warp's part of the tile.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[T::RowMmas][T::ColumnMmas][4], const bf16* x, const bf16* w, int row, int column, int step) {
    int lane = threadIdx.x % 32;
    uint32_t a[T::RowMmas][4], b[T::ColumnMmas][2];
#pragma unroll
    for (int i = 0; i < T::RowMmas; ++i) ldmatrix_x4(a[i], x + place(row + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < T::ColumnMmas; j += 2) {
        uint32_t both[4];
        ldmatrix_x4(both, w + place(column + j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
        b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < T::RowMmas; ++i)
#pragma unroll
        for (int j = 0; j < T::ColumnMmas; ++j) mma_m16n8k16(sums[i][j], a[i], b[j]);
}

// The warp's sums as bf16 into the tile's result in shared memory.
template <typename T> __device__ __forceinline__ void put(const float (&sums)[T::RowMmas][T::ColumnMmas][4], bf16* result, int row, int column) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < T::RowMmas; ++i)
#pragma unroll
        for (int j = 0; j < T::ColumnMmas; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                bf16* at = result + (row + i * 16 + half * 8 + lane / 4) * T::ResultPitch + column + j * 8 + lane % 4 * 2;
                *reinterpret_cast<uint32_t*>(at) = pack(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
            }
}

template <typename T> __global__ void __launch_bounds__(T::Threads) grouped_tiled(hm_grouped_args args) {
    HM_DYN_SHARED(bf16, shared);
    Span span = find_tile<T::Rows>(args.offsets, args.experts, blockIdx.y);
    if (span.expert < 0) return;
    int first_column = blockIdx.x * COLUMNS, k = args.k;
    const bf16* x = args.x + int64_t(span.first) * k;
    const bf16* w = args.weight + (int64_t(span.expert) * args.n + first_column) * k;
    int rows = span.end - span.first, columns = args.n - first_column;  // those of the tile and maybe more

    auto stage_of = [&](int step) { return shared + step % STAGES * T::StageElements; };
    int steps = int(ceil_div(k, DEPTH));
    auto fetch_step = [&](int step) {
        if (step < steps) {
            fetch<T::Rows, T::Threads>(stage_of(step), x, rows, step * DEPTH, k);
            fetch<COLUMNS, T::Threads>(stage_of(step) + T::Rows * DEPTH, w, columns, step * DEPTH, k);
        }
        copy_async_commit();  // empty groups too: what is waited for is counted in groups
    };

    int warp = threadIdx.x / 32;
    int row = warp / WARPS_ACROSS * T::WarpRows, column = warp % WARPS_ACROSS * WARP_COLUMNS;
    float sums[T::RowMmas][T::ColumnMmas][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) fetch_step(step);
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // this step's stage has arrived for all, and all have done with the one that is overwritten next
        fetch_step(step + STAGES - 1);
        const bf16* stage = stage_of(step);
        for (int part = 0; part < DEPTH / 16; ++part) multiply<T>(sums, stage, stage + T::Rows * DEPTH, row, column, part);
    }
    copy_async_wait<0>();
    __syncthreads();

    put<T>(sums, shared, row, column);
    __syncthreads();
    for (int i = threadIdx.x; i < T::Rows * (COLUMNS / CHUNK); i += T::Threads) {
        int r = i / (COLUMNS / CHUNK), c = i % (COLUMNS / CHUNK) * CHUNK;
        if (r < rows && c < columns) store16(args.y + int64_t(span.first + r) * args.n + first_column + c, load16(shared + r * T::ResultPitch + c));
    }
}

template <typename T> int run(const hm_grouped_args& args, cudaStream_t stream) {
    // An expert with rows adds at most one tile that is not full.
    int64_t tiles = args.max_rows / T::Rows + (args.experts < args.max_rows ? args.experts : args.max_rows);
    if (tiles > 65535) return cudaErrorInvalidConfiguration;
    dim3 grid(unsigned(ceil_div(args.n, COLUMNS)), unsigned(tiles));
    HM_LAUNCH((grouped_tiled<T>), grid, dim3(T::Threads), T::Elements * sizeof(bf16), stream, args);
    return hm_check();
}

}  // namespace

int hm_grouped_tiled(const hm_grouped_args* args, cudaStream_t stream) {
    if (!hm_grouped_valid(*args)) return cudaErrorInvalidValue;
    if (args->max_rows == 0) return cudaSuccess;
    switch (args->tile_rows) {
        case 32: return run<Tile<32, 32>>(*args, stream);
        case 64: return run<Tile<64, 32>>(*args, stream);
        case 128: return run<Tile<128, 64>>(*args, stream);
        default: return cudaErrorInvalidValue;
    }
}

// Callers choose by the device; what is not compiled in is no device's.
#if !defined(HM_HOPPER) && !defined(HM_EMULATED)
int hm_grouped_sm90(const hm_grouped_args*, cudaStream_t) { return cudaErrorNotSupported; }
int64_t hm_grouped_sm90_workspace(int32_t, int32_t) { return 0; }
#endif
