// Routing of tokens and the plan of their dispatch, as far as several kernels need them.
#pragma once

#include <float.h>

#include "hm.cuh"

enum hm_policy_kind { HM_POLICY_NONE, HM_POLICY_TOP_K, HM_POLICY_MASS, HM_POLICY_SOFT };
enum hm_weight_form { HM_FORM_RAW, HM_FORM_RENORM, HM_FORM_UNIT };

// How one token is routed.
struct hm_token_policy {
    int32_t kind;  // hm_policy_kind
    int32_t k;     // top-k: experts; mass: at most so many
    float value;   // mass: the threshold; soft: the temperature
    int32_t form;  // hm_weight_form; not of soft
};

// What else was seen of a token.
struct hm_token_note {
    float entropy;   // of softmax(logits), in nats; 0 where there is none
    uint32_t flags;  // the two below
};
constexpr uint32_t NOTE_NON_FINITE = 1, NOTE_NEAR_TIE = 2;

// Logits closer than this are near a tie.
constexpr float NEAR_TIE = 0.01f;

struct hm_route_args {
    const float* logits;              // [tokens, experts]
    const hm_token_policy* policies;  // [tokens]
    uint32_t* expert_ids;             // [tokens, slots]; `experts` where a slot is unused
    float* weights;                   // [tokens, slots]; 0 where a slot is unused, NaN where a logit of the token is not finite
    hm_token_note* notes;             // [tokens]
    int32_t tokens, slots, experts;
};

struct hm_plan_args {
    const uint32_t* expert_ids;  // [tokens, slots]
    const float* weights;        // [tokens, slots]
    const hm_token_note* notes;  // [tokens]
    uint32_t* offsets;           // [experts + 1]: sorted rows of expert e are offsets[e] .. offsets[e + 1]
    uint32_t* rows;              // [tokens * slots]: slot of each sorted row; what is behind offsets[experts] is not written
    uint32_t* positions;         // [tokens, slots]: sorted row of each slot, NONE where it is unused
    uint32_t* active;            // [experts, 4]: expert, its first row, the end of its rows, 0; experts with rows only, then NONE, 0, 0, 0
    uint32_t* report;            // [2 experts + 3]: tokens of each expert, sums of weights (f32), entropy (f32), non-finite, near ties
    uint32_t* workspace;         // [blocks, experts]; only where there are several blocks
    int32_t tokens, slots, experts;
    int32_t blocks;
};

namespace {

// ---- routing: a warp for a token ---------------------------------------------------------------------------------

// Order of floats as order of unsigned numbers; -0 as 0.
__device__ __forceinline__ uint32_t sortable(float x) {
    uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unsortable(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The logits of a token: expert i * 32 + lane in z[i]. -infinity is a place without an expert, or whose expert is taken.
template <int N> struct Logits {
    float z[N];

    // Takes `expert` away, and finds the largest of this lane's others, the lowest index among equals.
    __device__ __forceinline__ void take(uint32_t expert, uint32_t lane, uint32_t& key, uint32_t& index) {
        key = 0;
        index = NONE;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            uint32_t here = i * 32 + lane;
            if (here == expert) z[i] = -INFINITY;
            uint32_t found = sortable(z[i]);
            if (found > key) {
                key = found;
                index = here;
            }
        }
    }
};

// What becomes of the probabilities of the `chosen` experts, which sum to `total`.
__device__ __forceinline__ float weigh(float probability, int32_t form, float total, int chosen) {
    if (form == HM_FORM_UNIT) return 1.0f / float(chosen);
    return form == HM_FORM_RENORM ? probability / fmaxf(total, FLT_MIN) : probability;
}

__device__ __forceinline__ void leave_unused(const hm_route_args& args, int64_t token, int from, float weight, int lane) {
    for (int slot = from + lane; slot < args.slots; slot += 32) {
        args.expert_ids[token * args.slots + slot] = uint32_t(args.experts);
        args.weights[token * args.slots + slot] = weight;
    }
}

// The softmax of one token at a temperature, without its numerators.
struct Softmax {
    float largest, temperature, sum;
    __device__ __forceinline__ float numerator(float z) const { return expf((z - largest) / temperature); }
    __device__ __forceinline__ float probability(float z) const { return numerator(z) / sum; }
};

template <int N> __device__ __forceinline__ Softmax softmax_of(const Logits<N>& logits, float largest, float temperature) {
    Softmax softmax{largest, temperature, 0.0f};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += softmax.numerator(logits.z[i]);
    softmax.sum = warp_sum(sum);
    return softmax;
}

// Of softmax(z), in nats: ln Σe^d - Σ d e^d / Σe^d, with d the distances from the largest.
template <int N> __device__ __forceinline__ float entropy_of(const Logits<N>& logits, const Softmax& softmax) {
    float weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float numerator = softmax.numerator(logits.z[i]);
        if (numerator > 0.0f) weighted += numerator * (logits.z[i] - softmax.largest);
    }
    return logf(softmax.sum) - warp_sum(weighted) / softmax.sum;
}

// Chooses the experts of a token in descending order of their logits, the lowest index among equals, and writes them with their weights.
// Returns whether the first refused is near the last chosen.
template <int N>
__device__ __forceinline__ bool choose(const hm_route_args& args, int64_t token, hm_token_policy policy, Logits<N>& logits, const Softmax& softmax,
                                       int lane) {
    bool soft = policy.kind == HM_POLICY_SOFT;
    int limit = soft ? args.experts : min(policy.k, args.experts);
    limit = max(min(limit, args.slots), 1);
    float enough = policy.kind == HM_POLICY_MASS ? policy.value : INFINITY;
    int32_t form = soft ? int32_t(HM_FORM_RAW) : policy.form;
    uint32_t* expert_ids = args.expert_ids + token * args.slots;
    float* weights = args.weights + token * args.slots;

    uint32_t key, index, mine = 0;
    logits.take(NONE, lane, key, index);
    float total = 0.0f, last = 0.0f, probability = 0.0f;
    int chosen = 0;
    while (chosen < limit && total < enough) {
        uint32_t best = __reduce_max_sync(FULL, key);
        uint32_t expert = __reduce_min_sync(FULL, key == best ? index : NONE);
        last = unsortable(best);
        float its = softmax.probability(last);
        if (lane == chosen % 32) {
            mine = expert;
            probability = its;
        }
        total += its;
        ++chosen;
        // Whoever is full is written as it is, and weighed below, when the total is known.
        if (chosen % 32 == 0) {
            expert_ids[chosen - 32 + lane] = mine;
            weights[chosen - 32 + lane] = probability;
        }
        logits.take(expert, lane, key, index);
    }
    int full = chosen - chosen % 32;
    for (int slot = lane; slot < full; slot += 32) weights[slot] = weigh(weights[slot], form, total, chosen);
    if (lane < chosen % 32) {
        expert_ids[full + lane] = mine;
        weights[full + lane] = weigh(probability, form, total, chosen);
    }
    leave_unused(args, token, chosen, 0.0f, lane);
    return __any_sync(FULL, index != NONE && last - unsortable(key) < NEAR_TIE);
}

// Routes one token; all lanes of the warp. N registers hold the logits of a lane: experts <= 32 N.
template <int N> __device__ __forceinline__ void route_token(const hm_route_args& args, int64_t token, int lane) {
    hm_token_policy policy = args.policies[token];
    Logits<N> logits;
    float largest = -INFINITY;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        int expert = i * 32 + lane;
        bool there = expert < args.experts;
        logits.z[i] = there ? args.logits[token * args.experts + expert] : -INFINITY;
        finite = finite && (!there || isfinite(logits.z[i]));
        largest = fmaxf(largest, logits.z[i]);
    }
    finite = __all_sync(FULL, finite);
    hm_token_note note{0.0f, 0};
    if (policy.kind == HM_POLICY_NONE) {
        leave_unused(args, token, 0, 0.0f, lane);
    } else if (!finite) {
        leave_unused(args, token, 0, NAN, lane);
        note.flags = NOTE_NON_FINITE;
    } else {
        Softmax softmax = softmax_of(logits, warp_max(largest), 1.0f);
        note.entropy = entropy_of(logits, softmax);
        if (policy.kind == HM_POLICY_SOFT && policy.value != 1.0f) softmax = softmax_of(logits, softmax.largest, policy.value);
        if (choose(args, token, policy, logits, softmax, lane)) note.flags = NOTE_NEAR_TIE;
    }
    if (lane == 0) args.notes[token] = note;
}

// Index into a table of kernels for 1, 2, 4 ... 32 registers of logits in a lane.
inline int logits_width(int experts) {
    int index = 0;
    while ((32 << index) < experts) ++index;
    return index;
}

// ---- the plan: a stable counting sort ----------------------------------------------------------------------------

// Exclusive sum over the threads of a block, a multiple of 32, and the sum of all. Two barriers.
__device__ __forceinline__ uint64_t block_prefix(uint64_t x, uint64_t& total) {
    __shared__ uint64_t of_warps[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    uint64_t sum = x;
    for (int step = 1; step < 32; step *= 2) {
        uint64_t other = __shfl_up_sync(FULL, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    uint64_t before = 0;
    total = 0;
    for (int other = 0; other < warps; ++other) {
        if (other == warp) before = total;
        total += of_warps[other];
    }
    return before + sum - x;
}

// Counts the experts of the slots `from .. to` into counts [experts]; a warp.
__device__ __forceinline__ void count_slots(const hm_plan_args& args, int from, int to, uint32_t* counts, int lane) {
    for (int slot = from + lane; slot < to; slot += 32) {
        uint32_t expert = args.expert_ids[slot];
        if (expert < uint32_t(args.experts)) atomicAdd(&counts[expert], 1u);
    }
}

// Makes of counts [groups, experts] the first row of each group's slots of each expert, and writes offsets and active; a block.
__device__ __forceinline__ void place_experts(const hm_plan_args& args, uint32_t* counts, int groups) {
    int each = int(ceil_div(args.experts, blockDim.x)), from = threadIdx.x * each, to = min(from + each, args.experts);
    uint64_t rows = 0, active = 0;
    for (int expert = from; expert < to; ++expert) {
        uint32_t of_expert = 0;
        for (int group = 0; group < groups; ++group) of_expert += counts[int64_t(group) * args.experts + expert];
        rows += of_expert;
        active += of_expert > 0;
    }
    // One sum for both: active experts above, rows below.
    uint64_t total, before = block_prefix(active << 32 | rows, total);
    uint32_t row = uint32_t(before), place = uint32_t(before >> 32);
    uint4* entries = reinterpret_cast<uint4*>(args.active);
    for (int expert = from; expert < to; ++expert) {
        uint32_t first = row;
        for (int group = 0; group < groups; ++group) {
            uint32_t* count = &counts[int64_t(group) * args.experts + expert];
            uint32_t next = row + *count;
            *count = row;
            row = next;
        }
        args.offsets[expert] = first;
        if (row > first) entries[place++] = make_uint4(expert, first, row, 0);
    }
    for (int none = int(total >> 32) + threadIdx.x; none < args.experts; none += blockDim.x) entries[none] = make_uint4(NONE, 0, 0, 0);
    if (threadIdx.x == 0) args.offsets[args.experts] = uint32_t(total);
}

// Gives the slots `from .. to` their rows, in order; a warp. next [experts] is the next row of each expert. `placed(row, slot)` is told.
template <typename Placed>
__device__ __forceinline__ void place_slots(const hm_plan_args& args, int from, int to, uint32_t* next, int lane, Placed placed) {
    for (int first = from; first < to; first += 32) {
        int slot = first + lane;
        uint32_t expert = slot < to ? args.expert_ids[slot] : NONE;
        bool used = expert < uint32_t(args.experts);
        unsigned peers = __match_any_sync(FULL, expert);
        int rank = __popc(peers & ((1u << lane) - 1));
        uint32_t row = used ? next[expert] + rank : NONE;
        __syncwarp();
        if (used && rank == 0) next[expert] = row + __popc(peers);
        __syncwarp();
        if (slot < to) args.positions[slot] = row;
        if (used) {
            args.rows[row] = slot;
            placed(row, slot);
        }
    }
}

// Sums up the tokens' notes; a block.
__device__ __forceinline__ void report_tokens(const hm_plan_args& args) {
    float entropy = 0.0f, non_finite = 0.0f, near_ties = 0.0f;
    for (int token = threadIdx.x; token < args.tokens; token += blockDim.x) {
        hm_token_note note = args.notes[token];
        entropy += note.entropy;
        non_finite += note.flags & NOTE_NON_FINITE ? 1.0f : 0.0f;
        near_ties += note.flags & NOTE_NEAR_TIE ? 1.0f : 0.0f;
    }
    entropy = block_sum(entropy);
    non_finite = block_sum(non_finite);
    near_ties = block_sum(near_ties);
    if (threadIdx.x == 0) {
        uint32_t* report = args.report + 2 * args.experts;
        report[0] = __float_as_uint(entropy);
        report[1] = uint32_t(non_finite);
        report[2] = uint32_t(near_ties);
    }
}

// Slots that one block plans alone, and the counters it has for them.
constexpr int SMALL_SLOTS = 2048, SMALL_COUNTERS = 8192;

// The whole plan by one block, for up to SMALL_SLOTS slots.
__device__ __forceinline__ void plan_in_block(const hm_plan_args& args) {
    __shared__ uint32_t counts[SMALL_COUNTERS];
    __shared__ float sorted[SMALL_SLOTS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    int slots = args.tokens * args.slots;
    // Each warp sorts a range of its own, with counters of its own.
    int groups = min(min(warps, SMALL_COUNTERS / args.experts), int(ceil_div(slots, 32)));
    int each = int(ceil_div(slots, groups)), from = min(warp * each, slots), to = warp < groups ? min(from + each, slots) : from;
    uint32_t* own = counts + (warp < groups ? warp : 0) * args.experts;
    for (int i = threadIdx.x; i < groups * args.experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    count_slots(args, from, to, own, lane);
    __syncthreads();
    place_experts(args, counts, groups);
    __syncthreads();
    place_slots(args, from, to, own, lane, [&](uint32_t row, int slot) { sorted[row] = args.weights[slot]; });
    __syncthreads();
    // The last group stands behind the last row of each expert now.
    const uint32_t* ends = counts + (groups - 1) * args.experts;
    for (int expert = warp; expert < args.experts; expert += warps) {
        uint32_t first = expert == 0 ? 0 : ends[expert - 1], end = ends[expert];
        float sum = 0.0f;
        for (uint32_t row = first + lane; row < end; row += 32) sum += sorted[row];
        sum = warp_sum(sum);
        if (lane == 0) {
            args.report[expert] = end - first;
            args.report[args.experts + expert] = __float_as_uint(sum);
        }
    }
    report_tokens(args);
}

}  // namespace
