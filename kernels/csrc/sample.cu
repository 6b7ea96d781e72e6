// From rows of logits to tokens: greedy, or temperature, min-p, top-k, top-p and a draw, without a sort.
//
// A block makes one row, in a few passes over it. Masses of tokens are whole numbers, so that their sums are exact in any order: what comes out depends
// neither on the other rows nor on how many threads there are.
#include "hm.cuh"

struct hm_sample_choice {
    float temperature;  // below 1e-6: the likeliest
    uint32_t top_k;     // 0: off
    float top_p;        // from 1: off
    float min_p;        // 0: off
    float uniform;      // in [0, 1)
    uint32_t wanted;    // 0: the row is left out, and its token as it is
};

struct hm_sample_args {
    const float* logits;              // [rows, vocabulary]
    const hm_sample_choice* choices;  // [rows]
    uint32_t* tokens;                 // [rows]; NONE: not all of the row is finite
    int32_t rows, vocabulary;
};

namespace {

constexpr int MOST_THREADS = 512, LEAST_THREADS = 64;
// Loads under way in each thread: a pass takes as long as its loads wait.
constexpr int DEPTH = 8;
constexpr float GREEDY_BELOW = 1e-6f;

// Mass of the likeliest token. 2^18 tokens of it, as many as a vocabulary may have, stay below 2^63.
constexpr float UNIT = 17592186044416.0f;  // 2^44

// Thresholds that one pass tries.
constexpr int PIVOTS = 3;
// Tokens between two thresholds that are looked at in shared memory rather than in the row.
constexpr uint32_t LISTED = 4096;

constexpr uint64_t ABOVE_ALL = ~uint64_t(0);

// ---- tokens ------------------------------------------------------------------------------------------------------

// Grows with the logit.
__device__ __forceinline__ uint32_t ordered(float logit) {
    uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 is no less than 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Grows with the logit, of equal ones with a lower token: no two tokens have the same.
__device__ __forceinline__ uint64_t key_of(float logit, uint32_t token) { return uint64_t(ordered(logit)) << 32 | uint32_t(~token); }
__device__ __forceinline__ uint32_t token_of(uint64_t key) { return ~uint32_t(key); }
__device__ __forceinline__ float logit_of(uint64_t key) {
    uint32_t bits = uint32_t(key >> 32);
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

struct Row {
    const float* logits;
    int vocabulary;
    float max;    // of the logits
    float scale;  // 1 / temperature
    float floor;  // min-p: how far below max a logit may be, as a number up to 0
};

__device__ __forceinline__ bool above_floor(const Row& row, float logit) { return logit - row.max >= row.floor; }
__device__ __forceinline__ uint64_t mass_of(const Row& row, float logit) { return uint64_t(expf((logit - row.max) * row.scale) * UNIT); }

// Visits the logits from `from` on, each `step` behind the one before.
template <typename F> __device__ __forceinline__ void each_logit(const float* logits, int from, int to, int step, F visit) {
    for (int i = from; i < to; i += DEPTH * step) {
        float values[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) values[d] = i + d * step < to ? logits[i + d * step] : 0.0f;
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (i + d * step < to) visit(values[d], uint32_t(i + d * step));
    }
}

// ---- blocks ------------------------------------------------------------------------------------------------------

struct Greater {
    template <typename T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};
struct Less {
    template <typename T> __device__ T operator()(T a, T b) const { return a < b ? a : b; }
};

template <typename T, typename Op> __device__ T warp_reduce(T x, Op op) {
    for (int other = 16; other > 0; other >>= 1) x = op(x, __shfl_xor_sync(FULL, x, other));
    return x;
}

// In all threads of the block. `op` of a number and itself is that number.
template <typename T, typename Op> __device__ T block_reduce(T x, Op op) {
    __shared__ T partial[MOST_THREADS / 32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_reduce(x, op);
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_reduce(partial[lane < warps ? lane : 0], op);
}

// ---- the first pass ----------------------------------------------------------------------------------------------

struct Extremes {
    uint64_t best;     // the largest key; ABOVE_ALL: not all logits are finite
    uint64_t least;    // no key is below it
    uint64_t reached;  // by a token of each thread: a place where some hundreds or thousands are above. 0: not each has a token
};

__device__ Extremes extremes(const float* logits, int vocabulary) {
    uint64_t best = 0;
    uint32_t least = ~0u;
    bool finite = true;
    each_logit(logits, threadIdx.x, vocabulary, blockDim.x, [&](float logit, uint32_t token) {
        finite = finite && fabsf(logit) < INFINITY;
        best = Greater()(best, key_of(logit, token));
        least = Less()(least, ordered(logit));
    });
    if (!finite) best = ABOVE_ALL;
    uint32_t mine = uint32_t(best >> 32);
    return {block_reduce(best, Greater()), uint64_t(block_reduce(least, Less())) << 32, uint64_t(block_reduce(mine, Less())) << 32};
}

// ---- the filters -------------------------------------------------------------------------------------------------

// Of the tokens from a threshold up.
struct Sum {
    uint64_t mass;
    uint32_t count;
};

// What a filter has to keep at least, in the order of keys.
struct Enough {
    uint32_t count;
    uint64_t mass;
    __device__ bool operator()(Sum sum) const { return sum.count >= count && sum.mass >= mass; }
};

// Two thresholds: enough tokens are from `low` up, and not enough from `high` up.
struct Bracket {
    uint64_t low, high;
    Sum at_low, at_high;

    __device__ uint32_t between() const { return at_low.count - at_high.count; }

    // Makes it narrower, if the pivot is inside.
    __device__ void offer(uint64_t pivot, Sum sum, Enough enough) {
        if (pivot <= low || pivot >= high) return;
        if (enough(sum)) {
            low = pivot;
            at_low = sum;
        } else {
            high = pivot;
            at_high = sum;
        }
    }
};

// The tokens that min-p leaves: those of the row, or some of them in a list.
struct Tokens {
    Row row;
    uint64_t* list;
    // The list has the keys of [from, to), and `beyond` is the sum from `to` up. It has none: `from` is ABOVE_ALL.
    uint64_t from, to;
    Sum beyond;
    uint32_t listed;

    __device__ bool lists(const Bracket& bracket) const { return bracket.low >= from && bracket.high <= to; }

    template <typename F> __device__ void each_of_row(F visit) const {
        each_logit(row.logits, threadIdx.x, row.vocabulary, blockDim.x, [&](float logit, uint32_t token) {
            if (above_floor(row, logit)) visit(key_of(logit, token));
        });
    }
    template <typename F> __device__ void each_of_list(F visit) const {
        for (uint32_t i = threadIdx.x; i < listed; i += blockDim.x) visit(list[i]);
    }
};

// sums[p]: of the tokens from pivots[p] up. With `from_list`, the pivots are in the list's range.
__device__ void measure(const Tokens& tokens, bool from_list, const uint64_t pivots[PIVOTS], Sum sums[PIVOTS]) {
    __shared__ Sum partial[PIVOTS][MOST_THREADS / 32];
    Sum mine[PIVOTS] = {};
    auto add = [&](uint64_t key) {
        uint64_t mass = mass_of(tokens.row, logit_of(key));
        for (int p = 0; p < PIVOTS; ++p) {
            bool in = key >= pivots[p];
            mine[p].mass += in ? mass : 0;
            mine[p].count += in;
        }
    };
    if (from_list) tokens.each_of_list(add);
    else tokens.each_of_row(add);

    auto plus = [](auto a, auto b) { return a + b; };
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    __syncthreads();
    for (int p = 0; p < PIVOTS; ++p) {
        Sum sum = {warp_reduce(mine[p].mass, plus), warp_reduce(mine[p].count, plus)};
        if (lane == 0) partial[p][warp] = sum;
    }
    __syncthreads();
    for (int p = 0; p < PIVOTS; ++p) {
        sums[p] = from_list ? tokens.beyond : Sum{};
        for (int w = 0; w < warps; ++w) {
            sums[p].mass += partial[p][w].mass;
            sums[p].count += partial[p][w].count;
        }
    }
}

// Lists what is between the thresholds; there is room for it. The order is that of chance.
__device__ void gather(Tokens& tokens, const Bracket& bracket) {
    __shared__ unsigned count;
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    tokens.each_of_row([&](uint64_t key) {
        if (key >= bracket.low && key < bracket.high) tokens.list[atomicAdd(&count, 1u)] = key;
    });
    __syncthreads();
    tokens.listed = count;
    tokens.from = bracket.low;
    tokens.to = bracket.high;
    tokens.beyond = bracket.at_high;
}

// Until only one token is between the thresholds: `low` is then the largest threshold from which enough are up.
__device__ void search(Tokens& tokens, Bracket& bracket, Enough enough) {
    while (bracket.between() > 1) {
        bool list = tokens.lists(bracket);
        if (!list && bracket.between() <= LISTED) {
            gather(tokens, bracket);
            list = true;
        }
        uint64_t width = bracket.high - bracket.low, step = Greater()(width / (PIVOTS + 1), uint64_t(1)), pivots[PIVOTS];
        for (int p = 0; p < PIVOTS; ++p) pivots[p] = Less()(bracket.low + step * (p + 1), bracket.high);
        Sum sums[PIVOTS];
        measure(tokens, list, pivots, sums);
        for (int p = 0; p < PIVOTS; ++p) bracket.offer(pivots[p], sums[p], enough);
    }
}

// The least key that the filters keep, of those that min-p leaves.
__device__ uint64_t least_kept(const Row& row, const hm_sample_choice& choice, const Extremes& known) {
    __shared__ uint64_t list[LISTED];
    if (choice.top_k == 0 && !(choice.top_p < 1.0f)) return 0;
    Tokens tokens = {row, list, ABOVE_ALL, 0, {}, 0};
    const uint64_t pivots[PIVOTS] = {known.least, known.reached, known.best};
    Sum sums[PIVOTS];
    measure(tokens, false, pivots, sums);
    auto narrowed = [&](uint64_t low, Sum at_low, Enough enough) {
        Bracket bracket = {low, ABOVE_ALL, at_low, {}};
        for (int p = 1; p < PIVOTS; ++p) bracket.offer(pivots[p], sums[p], enough);
        return bracket;
    };

    uint64_t least = known.least;
    Sum kept = sums[0];
    if (choice.top_k > 0 && choice.top_k < kept.count) {
        Enough enough = {choice.top_k, 0};
        Bracket bracket = narrowed(least, kept, enough);
        search(tokens, bracket, enough);
        least = bracket.low;
        kept = bracket.at_low;
    }
    if (choice.top_p < 1.0f) {
        // The product is below the mass that is there: so near to 1 no float is.
        Enough enough = {1, uint64_t(ceil(double(fmaxf(choice.top_p, 0.0f)) * double(kept.mass)))};
        Bracket bracket = narrowed(least, kept, enough);
        search(tokens, bracket, enough);
        least = bracket.low;
    }
    return least;
}

// ---- the draw ----------------------------------------------------------------------------------------------------

// The first token at which the mass of those from `least` up, summed in order of tokens, exceeds the share `uniform` of all of it.
__device__ uint32_t draw(const Row& row, uint64_t least, float uniform) {
    __shared__ uint64_t masses[MOST_THREADS / 32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    uint64_t before = 0;
    // Each of two warps or more sums a part of the range; the one where it happens is the next range.
    for (int from = 0, to = row.vocabulary, first = 1;; first = 0) {
        int part = int(ceil_div(to - from, warps)), begin = from + warp * part, end = min(begin + part, to);
        uint64_t mass = 0;
        each_logit(row.logits, begin + lane, end, 32, [&](float logit, uint32_t token) {
            if (above_floor(row, logit) && key_of(logit, token) >= least) mass += mass_of(row, logit);
        });
        mass = warp_reduce(mass, [](uint64_t a, uint64_t b) { return a + b; });
        __syncthreads();
        if (lane == 0) masses[warp] = mass;
        __syncthreads();
        if (first) {
            uint64_t all = 0;
            for (int w = 0; w < warps; ++w) all += masses[w];
            before = Less()(uint64_t(double(fmaxf(uniform, 0.0f)) * double(all)), all - 1);
        }
        int chosen = 0;
        for (; chosen < warps - 1 && before >= masses[chosen]; ++chosen) before -= masses[chosen];
        if (part == 1) return uint32_t(from + chosen);
        from += chosen * part;
        to = min(from + part, to);
    }
}

__global__ void __launch_bounds__(MOST_THREADS) sample(hm_sample_args args) {
    const hm_sample_choice choice = args.choices[blockIdx.x];
    if (choice.wanted == 0) return;
    const float* logits = args.logits + int64_t(blockIdx.x) * args.vocabulary;
    Extremes known = extremes(logits, args.vocabulary);
    uint32_t token;
    if (known.best == ABOVE_ALL) {
        token = NONE;
    } else if (!(choice.temperature >= GREEDY_BELOW) || choice.top_k == 1) {
        token = token_of(known.best);
    } else {
        // A normal number, not 0, whatever the temperature.
        float scale = 1.0f / fminf(choice.temperature, 1e30f);
        float floor = choice.min_p > 0.0f ? fminf(choice.temperature * logf(choice.min_p), 0.0f) : -INFINITY;
        Row row = {logits, args.vocabulary, logit_of(known.best), scale, floor};
        token = draw(row, least_kept(row, choice, known), choice.uniform);
    }
    if (threadIdx.x == 0) args.tokens[blockIdx.x] = token;
}

}  // namespace

extern "C" {

int hm_sample(const hm_sample_args* args, cudaStream_t stream) {
    // No more warps than have a load for each thread to be under way.
    int threads = int(ceil_div(args->vocabulary, 32 * DEPTH)) * 32;
    threads = threads < LEAST_THREADS ? LEAST_THREADS : threads > MOST_THREADS ? MOST_THREADS : threads;
    HM_LAUNCH((sample), dim3(args->rows), dim3(threads), 0, stream, *args);
    return hm_check();
}
}
