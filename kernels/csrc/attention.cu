// Causal attention of a ragged batch over a paged cache, by the scheme of FlashAttention-2: scores of a tile of keys, softmax as it goes along,
// products with the values, all in registers.
//
// A row is a pair of a query token and a head of one group (the heads that share keys), in this order; a block makes a tile of rows of one sequence and
// one group, so one token of decoding and a chunk of a prompt are the same to it. What the keys of a sequence say is made by one block, or by several, each with
// a part of the keys (splits), and put together by `combine`.
//
// Tiles of keys begin at multiples of their size whatever the query, and what a query does not see adds exact zeros: the result of a token is a function of its
// sequence, the kind of tile and the number of splits alone; not of its neighbours, nor of where a prompt was cut, where there is one split.
#include "hm.cuh"

struct hm_attend_args {
    const bf16* q;       // [tokens, heads, head_dim]
    const bf16* keys;    // [blocks, kv_heads, block_tokens, head_dim]
    const bf16* values;  // likewise
    const uint32_t* table;        // [sequences, table_stride]: blocks of each sequence
    const uint32_t* query_start;  // [sequences + 1]: first row of q of each sequence
    const uint32_t* past;         // [sequences]: tokens in the cache before the first of the queries
    bf16* out;         // [tokens, heads * head_dim]
    float* workspace;  // splits > 1: sums [tokens, heads, splits, head_dim], then states [tokens, heads, splits, 2]
    float scale;       // of the scores, times log2(e)
    int32_t tokens, sequences, heads, kv_heads, head_dim, block_tokens, table_stride;
    int32_t window;       // positions that a query sees, its own included; 0: all
    int32_t longest_new;  // no sequence has more queries
    int32_t splits;
};

namespace {

// A split with less is not worth its while.
constexpr int LEAST_TILES = 2;
// Shared memory of a block: two fit into a multiprocessor of the large chips; the small ones allow 99 KiB to a block.
constexpr int SHARED_LIMIT = (HM_BUILT_FOR >= 90 && HM_BUILT_FOR < 120 ? 113 : HM_BUILT_FOR == 80 || HM_BUILT_FOR == 87 ? 81 : 99) << 10;

// What a block looks like. Its warps share out the rows (16 ROW_TILES for each), or the keys of every tile (16 for each).
template <int Width, int RowTiles, int RowWarps, int KeyWarps> struct Shape {
    static constexpr int WIDTH = Width;  // head_dim, filled up with zeros
    static constexpr int ROW_TILES = RowTiles, KEY_WARPS = KeyWarps;
    static constexpr int THREADS = 32 * RowWarps * KeyWarps;
    static constexpr int WARP_ROWS = 16 * RowTiles, ROWS = WARP_ROWS * RowWarps;
    // 16 bytes more than a row has: the eight rows of a matrix lie in different banks.
    static constexpr int STRIDE = WIDTH + 8;
    // Queries, two stages of keys and of values, and where in the cache their rows are.
    static constexpr int bytes(int keys) { return (ROWS + 4 * keys) * STRIDE * 2 + 2 * keys * 4; }
    static constexpr int most_keys(int keys) { return bytes(keys) <= SHARED_LIMIT ? keys : most_keys(keys - 16); }
    // More than 32 keys of wide heads do not fit into the registers.
    static constexpr int KEYS = KEY_WARPS > 1 ? 16 * KEY_WARPS : most_keys(WIDTH < 128 ? 64 : 32);
    static constexpr int WARP_KEYS = KEYS / KEY_WARPS;
    static constexpr int BYTES = bytes(KEYS);
    // At least, of a multiprocessor; 0 leaves it to the compiler, which sees to more of them, and the sums of a wide head do not fit into the registers.
    static constexpr int BLOCKS = WIDTH > 128 ? 2 : 0;
    static constexpr bool QUERIES_STAY = ROW_TILES == 1 && WIDTH <= 128;  // in registers

    // What the warps that share keys leave for each other.
    static constexpr int SUM_STRIDE = WIDTH + 8;
    static_assert(KEY_WARPS == 1 || (ROWS == 16 && KEY_WARPS * 16 * (SUM_STRIDE + 2) * 4 <= BYTES), "their sums fit in the place of the tiles");
    static_assert(KEYS * WIDTH / 8 % THREADS == 0, "each thread copies as many chunks");
    static_assert(WARP_KEYS % 16 == 0 && KEYS <= THREADS && BYTES <= SHARED_LIMIT, "the kernel counts on it");
};

// What a block has to do.
struct Work {
    int sequence;
    int token;        // first row of q of the sequence
    int past;         // tokens of the sequence before that
    int group;        // heads that share keys
    int row, rows;    // first row of the tile; rows of the sequence
    int first, last;  // keys that some row of the tile sees
    int tile, tiles;  // first tile of keys, and how many, of all splits
    int share;        // tiles of a split
    int splits;       // with work

    __device__ int position(int of_row) const { return past + of_row / group; }
};

// The place among all tiles where those of a sequence begin: later for later sequences, and with room for all of its own. The first sequence of the
// launch need not be the first of q.
template <int ROWS> __device__ __forceinline__ int tiles_start(const hm_attend_args& args, int group, int sequence) {
    return int(args.query_start[sequence] - args.query_start[0]) * group / ROWS + sequence;
}

// The sequence that a tile belongs to: 32 probes at a time.
template <int ROWS> __device__ int sequence_of(const hm_attend_args& args, int group, int tile) {
    int from = 0, to = args.sequences, lane = threadIdx.x % 32;
    while (to - from > 1) {
        int step = int(ceil_div(to - from, 32)), probe = from + lane * step;
        unsigned begun = __ballot_sync(FULL, probe < to && tiles_start<ROWS>(args, group, probe) <= tile);
        from += (__popc(begun) - 1) * step;
        to = min(to, from + step);
    }
    return from;
}

// Whether there is something to do for tile `blockIdx.x` of rows.
template <int ROWS, int KEYS> __device__ __forceinline__ bool find_work(const hm_attend_args& args, Work& work) {
    int tile = blockIdx.x;
    work.group = args.heads / args.kv_heads;
    if (args.longest_new * work.group <= ROWS) {
        work.sequence = tile;
        tile = 0;
    } else {
        work.sequence = sequence_of<ROWS>(args, work.group, tile);
        tile -= tiles_start<ROWS>(args, work.group, work.sequence);
    }
    work.token = args.query_start[work.sequence];
    work.past = args.past[work.sequence];
    work.rows = (int(args.query_start[work.sequence + 1]) - work.token) * work.group;
    // The last rows see most keys: they come first.
    work.row = (int(ceil_div(work.rows, ROWS)) - 1 - tile) * ROWS;
    if (work.row < 0) return false;

    work.last = work.position(min(work.row + ROWS, work.rows) - 1);
    work.first = args.window ? max(0, work.position(work.row) - args.window + 1) : 0;
    work.tile = work.first / KEYS;
    work.tiles = work.last / KEYS + 1 - work.tile;
    work.share = max(int(ceil_div(work.tiles, args.splits)), LEAST_TILES);
    work.splits = int(ceil_div(work.tiles, work.share));
    return true;
}

// Index of a row in [tokens, heads].
__device__ __forceinline__ int64_t row_of(const hm_attend_args& args, const Work& work, int row) {
    return int64_t(work.token + row / work.group) * args.heads + blockIdx.y * work.group + row % work.group;
}

// Where the sums of a row go, by whoever makes a part of it: divided by the sum of weights to the output, or as they are to the workspace of this split,
// together with its state: the largest score and the sum of weights relative to it.
struct Target {
    bf16* out;  // null: to the workspace
    float* part;
    float scale;

    __device__ __forceinline__ Target(const hm_attend_args& args, const Work& work, int row, float top, float weight, bool state) : out(nullptr), part(nullptr) {
        int64_t at = row_of(args, work, row);
        if (work.splits == 1) {
            out = args.out + at * args.head_dim;
            scale = 1.0f / weight;
            return;
        }
        int64_t parts = int64_t(args.tokens) * args.heads * args.splits;
        at = at * args.splits + blockIdx.z;
        part = args.workspace + at * args.head_dim;
        scale = 1.0f;
        if (state) *reinterpret_cast<float2*>(args.workspace + parts * args.head_dim + at * 2) = make_float2(top, weight);
    }
    __device__ __forceinline__ void put(int dim, float x, float y) const {
        if (out) *reinterpret_cast<uint32_t*>(out + dim) = pack(x * scale, y * scale);
        else *reinterpret_cast<float2*>(part + dim) = make_float2(x, y);
    }
};

// The row of the cache in which a key is; NONE where nobody sees it, or it is not there yet.
__device__ __forceinline__ uint32_t place_of(const hm_attend_args& args, const Work& work, int key) {
    if (key < work.first || key > work.last) return NONE;
    uint32_t block = args.table[int64_t(work.sequence) * args.table_stride + unsigned(key) / unsigned(args.block_tokens)];
    return (block * args.kv_heads + blockIdx.y) * args.block_tokens + unsigned(key) % unsigned(args.block_tokens);
}

// Zeros in the place of what is not there: what a weight of 0 is multiplied with has to be finite.
__device__ __forceinline__ void copy_chunk(const hm_attend_args& args, bf16* key, bf16* value, uint32_t place, int dim) {
    bool take = place != NONE && dim < args.head_dim;
    int64_t from = take ? int64_t(place) * args.head_dim + dim : 0;
    copy_async16(key, args.keys + from, take);
    copy_async16(value, args.values + from, take);
}

template <typename S> __device__ __forceinline__ void copy_keys(const hm_attend_args& args, bf16* keys, bf16* values, const uint32_t* places) {
    constexpr int CHUNKS = S::WIDTH / 8, THREADS = S::THREADS;
    int thread = threadIdx.x;
    if constexpr (THREADS % CHUNKS == 0) {
        // A thread has one column: all but the first address are so many bytes further.
        int key = thread / CHUNKS, dim = thread % CHUNKS * 8, at = key * S::STRIDE + dim;
#pragma unroll
        for (int i = 0; i < S::KEYS; i += THREADS / CHUNKS)
            copy_chunk(args, keys + at + i * S::STRIDE, values + at + i * S::STRIDE, places[key + i], dim);
    } else {
#pragma unroll
        for (int i = 0; i < S::KEYS * CHUNKS; i += THREADS) {
            int key = (i + thread) / CHUNKS, dim = (i + thread) % CHUNKS * 8, at = key * S::STRIDE + dim;
            copy_chunk(args, keys + at, values + at, places[key], dim);
        }
    }
}

template <typename S> __device__ __forceinline__ void copy_queries(const hm_attend_args& args, const Work& work, bf16* q) {
    constexpr int CHUNKS = S::WIDTH / 8;
    for (int i = threadIdx.x; i < S::ROWS * CHUNKS; i += S::THREADS) {
        int row = work.row + i / CHUNKS, dim = i % CHUNKS * 8;
        bool take = row < work.rows && dim < args.head_dim;
        copy_async16(q + i / CHUNKS * S::STRIDE + dim, args.q + (take ? row_of(args, work, row) * args.head_dim + dim : 0), take);
    }
}

// What a warp holds of its rows, spread over its lanes as mma_m16n8k16 says; [2] is for the rows g and g + 8 of a lane.
template <typename S> struct Rows {
    float sums[S::ROW_TILES][S::WIDTH / 8][4];
    float top[S::ROW_TILES][2];     // the largest score so far, times scale
    float weight[S::ROW_TILES][2];  // of all keys of this lane so far
    uint32_t queries[S::QUERIES_STAY ? S::WIDTH / 16 : 1][4];
};

template <typename S> using Scores = float[S::ROW_TILES][S::WARP_KEYS / 8][4];

// Where a lane's row of a 16 x 16 matrix begins for ldmatrix: first the upper and the lower half of the left columns, then of the right ones.
template <typename S> __device__ __forceinline__ int corner() { return threadIdx.x % 16 * S::STRIDE + threadIdx.x % 32 / 16 * 8; }

// Scores of a tile; q and keys are those of the warp.
template <typename S> __device__ __forceinline__ void multiply_keys(Scores<S>& scores, const Rows<S>& rows, const bf16* q, const bf16* keys) {
#pragma unroll
    for (int r = 0; r < S::ROW_TILES; ++r)
#pragma unroll
        for (int n = 0; n < S::WARP_KEYS / 8; ++n) scores[r][n][0] = scores[r][n][1] = scores[r][n][2] = scores[r][n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < S::WIDTH / 16; ++k) {
        uint32_t a[S::ROW_TILES][4];
#pragma unroll
        for (int r = 0; r < S::ROW_TILES; ++r) {
            if constexpr (S::QUERIES_STAY) memcpy(a[r], rows.queries[k], sizeof a[r]);
            else ldmatrix_x4(a[r], q + corner<S>() + r * 16 * S::STRIDE + k * 16);
        }
#pragma unroll
        for (int n = 0; n < S::WARP_KEYS / 16; ++n) {
            uint32_t two[4];
            ldmatrix_x4(two, keys + corner<S>() + n * 16 * S::STRIDE + k * 16);
            uint32_t b[2][2] = {{two[0], two[2]}, {two[1], two[3]}};
#pragma unroll
            for (int r = 0; r < S::ROW_TILES; ++r) {
                mma_m16n8k16(scores[r][2 * n], a[r], b[0]);
                mma_m16n8k16(scores[r][2 * n + 1], a[r], b[1]);
            }
        }
    }
}

// Negative infinity for keys, from `key` on, that their row does not see; `positions` are those of the warp's rows.
template <typename S> __device__ __forceinline__ void hide(Scores<S>& scores, const int* positions, int key, int window) {
    int lane = threadIdx.x % 32, first = key + lane % 4 * 2;
    // In one comparison: what lies ahead is, without a sign, far behind.
    unsigned seen = window ? window : INT32_MAX;
#pragma unroll
    for (int r = 0; r < S::ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int behind = positions[r * 16 + half * 8 + lane / 4] - first;
#pragma unroll
            for (int n = 0; n < S::WARP_KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (unsigned(behind - n * 8 - i) >= seen) scores[r][n][2 * half + i] = -INFINITY;
        }
}

// From scores to weights relative to the largest score so far; what was summed before is brought into line.
template <typename S> __device__ __forceinline__ void weigh(Scores<S>& scores, Rows<S>& rows, float scale) {
#pragma unroll
    for (int r = 0; r < S::ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = -INFINITY;
#pragma unroll
            for (int n = 0; n < S::WARP_KEYS / 8; ++n) top = fmaxf(top, fmaxf(scores[r][n][2 * half], scores[r][n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
            // Scaled and rounded once: where it stays what it was, `shrink` is 1 and not almost 1.
            top = fmaxf(rows.top[r][half], top * scale);
            float base = top == -INFINITY ? 0.0f : top;
            float shrink = exp2_fast(rows.top[r][half] - base), sum = 0.0f;
            rows.top[r][half] = top;
#pragma unroll
            for (int n = 0; n < S::WARP_KEYS / 8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[r][n][i] = exp2_fast(fmaf(scores[r][n][i], scale, -base));
                    sum += scores[r][n][i];
                }
            rows.weight[r][half] = rows.weight[r][half] * shrink + sum;
#pragma unroll
            for (int n = 0; n < S::WIDTH / 8; ++n) {
                rows.sums[r][n][2 * half] *= shrink;
                rows.sums[r][n][2 * half + 1] *= shrink;
            }
        }
}

// Adds the values of the warp's keys, weighted.
template <typename S> __device__ __forceinline__ void multiply_values(Rows<S>& rows, const Scores<S>& weights, const bf16* values) {
#pragma unroll
    for (int k = 0; k < S::WARP_KEYS / 16; ++k) {
        uint32_t a[S::ROW_TILES][4];
#pragma unroll
        for (int r = 0; r < S::ROW_TILES; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* two = weights[r][2 * k + i / 2] + i % 2 * 2;
                a[r][i] = pack(two[0], two[1]);
            }
#pragma unroll
        for (int n = 0; n < S::WIDTH / 16; ++n) {
            uint32_t b[4];
            ldmatrix_x4_transposed(b, values + corner<S>() + k * 16 * S::STRIDE + n * 16);
#pragma unroll
            for (int r = 0; r < S::ROW_TILES; ++r) {
                mma_m16n8k16(rows.sums[r][2 * n], a[r], b);
                mma_m16n8k16(rows.sums[r][2 * n + 1], a[r], b + 2);
            }
        }
    }
}

// Rows that one warp made alone.
template <typename S> __device__ __forceinline__ void put_rows(const hm_attend_args& args, const Work& work, const Rows<S>& rows, int row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < S::ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int mine = row + r * 16 + half * 8 + lane / 4;
            if (mine >= work.rows) continue;
            Target target(args, work, mine, rows.top[r][half], rows.weight[r][half], lane % 4 == 0);
#pragma unroll
            for (int n = 0; n < S::WIDTH / 8; ++n)
                if (n * 8 < args.head_dim) target.put(n * 8 + lane % 4 * 2, rows.sums[r][n][2 * half], rows.sums[r][n][2 * half + 1]);
        }
}

// Rows of which each warp made a part of the keys. `shared` is free.
template <typename S> __device__ __forceinline__ void put_merged(const hm_attend_args& args, const Work& work, const Rows<S>& rows, float* shared) {
    float* states = shared + S::KEY_WARPS * 16 * S::SUM_STRIDE;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int at = warp * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int n = 0; n < S::WIDTH / 8; ++n) {
            float2 two = make_float2(rows.sums[0][n][2 * half], rows.sums[0][n][2 * half + 1]);
            *reinterpret_cast<float2*>(shared + at * S::SUM_STRIDE + n * 8 + lane % 4 * 2) = two;
        }
        if (lane % 4 == 0) *reinterpret_cast<float2*>(states + at * 2) = make_float2(rows.top[0][half], rows.weight[0][half]);
    }
    __syncthreads();
    for (int row = warp; row < min(16, work.rows - work.row); row += S::KEY_WARPS) {
        float top = -INFINITY, weight = 0.0f, of_warp[S::KEY_WARPS];
#pragma unroll
        for (int w = 0; w < S::KEY_WARPS; ++w) top = fmaxf(top, states[(w * 16 + row) * 2]);
        float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
        for (int w = 0; w < S::KEY_WARPS; ++w) {
            of_warp[w] = exp2_fast(states[(w * 16 + row) * 2] - base);
            weight += of_warp[w] * states[(w * 16 + row) * 2 + 1];
        }
        Target target(args, work, work.row + row, top, weight, lane == 0);
        for (int dim = lane * 2; dim < args.head_dim; dim += 64) {
            float x = 0.0f, y = 0.0f;
#pragma unroll
            for (int w = 0; w < S::KEY_WARPS; ++w) {
                float2 two = *reinterpret_cast<const float2*>(shared + (w * 16 + row) * S::SUM_STRIDE + dim);
                x += of_warp[w] * two.x;
                y += of_warp[w] * two.y;
            }
            target.put(dim, x, y);
        }
    }
}

// grid: tiles of rows, kv_heads, splits
template <typename S> __global__ void __launch_bounds__(S::THREADS, S::BLOCKS) attend(hm_attend_args args) {
    constexpr int TILE = S::KEYS * S::STRIDE;
    HM_DYN_SHARED(bf16, q);
    bf16 *keys = q + S::ROWS * S::STRIDE, *values = keys + 2 * TILE;
    uint32_t* places = reinterpret_cast<uint32_t*>(values + 2 * TILE);

    Work found;
    if (!find_work<S::ROWS, S::KEYS>(args, found)) return;
    int tile = found.tile + blockIdx.z * found.share, end = min(tile + found.share, found.tile + found.tiles);
    if (tile >= end) return;

    // Registers are for the sums: what is needed now and then waits elsewhere.
    __shared__ Work work;
    __shared__ int positions[S::ROWS];
    int thread = threadIdx.x, warp = thread / 32;
    int warp_row = warp / S::KEY_WARPS * S::WARP_ROWS, warp_key = warp % S::KEY_WARPS * S::WARP_KEYS;
    if (thread == 0) work = found;
    for (int r = thread; r < S::ROWS; r += S::THREADS) positions[r] = found.position(min(found.row + r, found.rows - 1));
    Rows<S> rows;
#pragma unroll
    for (int r = 0; r < S::ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rows.top[r][half] = -INFINITY;
            rows.weight[r][half] = 0.0f;
#pragma unroll
            for (int n = 0; n < S::WIDTH / 8; ++n) rows.sums[r][n][2 * half] = rows.sums[r][n][2 * half + 1] = 0.0f;
        }

    // The keys of a tile are on their way while those of the one before are used, and where they are was looked up before that. Tiles take turns: even, odd.
    copy_queries<S>(args, found, q);
    if (thread < S::KEYS)
        for (int t = tile; t < tile + 2; ++t) places[t % 2 * S::KEYS + thread] = place_of(args, found, t * S::KEYS + thread);
    __syncthreads();
    copy_keys<S>(args, keys + tile % 2 * TILE, values + tile % 2 * TILE, places + tile % 2 * S::KEYS);
    copy_async_commit();
    for (bool begun = false; tile < end; ++tile, begun = true) {
        int mine = tile % 2, other = 1 - mine;
        copy_async_wait<0>();
        __syncthreads();
        if (tile + 1 < end) copy_keys<S>(args, keys + other * TILE, values + other * TILE, places + other * S::KEYS);
        copy_async_commit();
        uint32_t next = thread < S::KEYS && tile + 2 < end ? place_of(args, work, (tile + 2) * S::KEYS + thread) : NONE;
        if constexpr (S::QUERIES_STAY) {
            if (!begun)
#pragma unroll
                for (int k = 0; k < S::WIDTH / 16; ++k) ldmatrix_x4(rows.queries[k], q + corner<S>() + warp_row * S::STRIDE + k * 16);
        }
        int key = tile * S::KEYS + warp_key, last_key = key + S::WARP_KEYS - 1;
        int lowest = positions[warp_row], highest = positions[warp_row + S::WARP_ROWS - 1];
        bool some = key <= highest && (!args.window || last_key > lowest - args.window);
        if (some && work.row + warp_row < work.rows) {
            Scores<S> scores;
            multiply_keys<S>(scores, rows, q + warp_row * S::STRIDE, keys + mine * TILE + warp_key * S::STRIDE);
            bool all = last_key <= lowest && (!args.window || key > highest - args.window);
            if (!all) hide<S>(scores, positions + warp_row, key, args.window);
            weigh<S>(scores, rows, args.scale);
            multiply_values<S>(rows, scores, values + mine * TILE + warp_key * S::STRIDE);
        }
        if (thread < S::KEYS) places[mine * S::KEYS + thread] = next;
    }
    copy_async_wait<0>();

#pragma unroll
    for (int r = 0; r < S::ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float& weight = rows.weight[r][half];
            weight += __shfl_xor_sync(FULL, weight, 1);
            weight += __shfl_xor_sync(FULL, weight, 2);
        }
    if constexpr (S::KEY_WARPS == 1) {
        put_rows<S>(args, work, rows, work.row + warp_row);
    } else {
        __syncthreads();
        put_merged<S>(args, work, rows, reinterpret_cast<float*>(q));
    }
}

constexpr int COMBINE_WARPS = 4, COMBINE_ROWS = 16;

// Puts together what the splits made; a warp for each row. grid: tiles of rows as those of `attend`, kv_heads, parts of a tile
template <int ROWS, int KEYS> __global__ void __launch_bounds__(COMBINE_WARPS * 32) combine(hm_attend_args args) {
    Work work;
    if (!find_work<ROWS, KEYS>(args, work) || work.splits == 1) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = work.row + blockIdx.z * COMBINE_ROWS;
    int64_t parts = int64_t(args.tokens) * args.heads * args.splits;
    for (int row = first + warp; row < min(first + COMBINE_ROWS, work.rows); row += COMBINE_WARPS) {
        int64_t at = row_of(args, work, row);
        const float* states = args.workspace + parts * args.head_dim + at * args.splits * 2;
        const float* sums = args.workspace + at * args.splits * args.head_dim;
        float top = -INFINITY, weight = 0.0f;
        for (int split = lane; split < work.splits; split += 32) top = fmaxf(top, states[split * 2]);
        top = warp_max(top);
        float base = top == -INFINITY ? 0.0f : top;
        for (int split = lane; split < work.splits; split += 32) weight += exp2_fast(states[split * 2] - base) * states[split * 2 + 1];
        float scale = 1.0f / warp_sum(weight);
        for (int dim = lane * 2; dim < args.head_dim; dim += 64) {
            float x = 0.0f, y = 0.0f;
            for (int split = 0; split < work.splits; ++split) {
                float of = exp2_fast(states[split * 2] - base);
                float2 two = *reinterpret_cast<const float2*>(sums + split * args.head_dim + dim);
                x += of * two.x;
                y += of * two.y;
            }
            *reinterpret_cast<uint32_t*>(args.out + at * args.head_dim + dim) = pack(x * scale, y * scale);
        }
    }
}

template <typename S> int launch(const hm_attend_args& args, cudaStream_t stream) {
    int group = args.heads / args.kv_heads;
    int tiles = args.longest_new * group <= S::ROWS ? args.sequences : args.tokens * group / S::ROWS + args.sequences;
    HM_LAUNCH((attend<S>), dim3(tiles, args.kv_heads, args.splits), dim3(S::THREADS), S::BYTES, stream, args);
    if (args.splits > 1) {
        dim3 grid(tiles, args.kv_heads, S::ROWS / COMBINE_ROWS);
        HM_LAUNCH((combine<S::ROWS, S::KEYS>), grid, dim3(COMBINE_WARPS * 32), 0, stream, args);
    }
    return hm_check();
}

// A tile for few rows and one for many.
template <int WIDTH> int launch_width(const hm_attend_args& args, cudaStream_t stream) {
    bool few = args.longest_new * (args.heads / args.kv_heads) <= 16;
    return few ? launch<Shape<WIDTH, 1, 1, WIDTH <= 128 ? 4 : 2>>(args, stream) : launch<Shape<WIDTH, WIDTH <= 128 ? 2 : 1, 4, 1>>(args, stream);
}

}  // namespace

extern "C" int hm_attend(const hm_attend_args* args, cudaStream_t stream) {
    int width = args->head_dim;
    if (width <= 32) return launch_width<32>(*args, stream);
    if (width <= 64) return launch_width<64>(*args, stream);
    if (width <= 96) return launch_width<96>(*args, stream);
    if (width <= 128) return launch_width<128>(*args, stream);
    if (width <= 192) return launch_width<192>(*args, stream);
    return launch_width<256>(*args, stream);
}
