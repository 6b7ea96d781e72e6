// The dispatch plan: a stable counting sort of slots by expert. One block for few slots; else each of several blocks has a range of them:
// it counts, one block adds up, each places its own.
#include "routing.cuh"

namespace {

constexpr int PLAN_THREADS = 256, PLAN_WARPS = PLAN_THREADS / 32, SCAN_THREADS = 1024;

__global__ void __launch_bounds__(PLAN_THREADS) plan_small(hm_plan_args args) { plan_in_block(args); }

// The slots of a block, or of one of its warps.
struct Range {
    int from, to;
    __device__ __forceinline__ Range part(int index, int parts) const {
        int each = int(ceil_div(to - from, parts)), first = min(from + index * each, to);
        return {first, min(first + each, to)};
    }
};
__device__ __forceinline__ Range slots_of_block(const hm_plan_args& args) {
    return Range{0, args.tokens * args.slots}.part(blockIdx.x, args.blocks);
}

__global__ void __launch_bounds__(PLAN_THREADS) plan_count(hm_plan_args args) {
    HM_DYN_SHARED(uint32_t, counts);  // [experts]
    for (int expert = threadIdx.x; expert < args.experts; expert += PLAN_THREADS) counts[expert] = 0;
    __syncthreads();
    Range mine = slots_of_block(args).part(threadIdx.x / 32, PLAN_WARPS);
    count_slots(args, mine.from, mine.to, counts, threadIdx.x % 32);
    __syncthreads();
    uint32_t* out = args.workspace + int64_t(blockIdx.x) * args.experts;
    for (int expert = threadIdx.x; expert < args.experts; expert += PLAN_THREADS) out[expert] = counts[expert];
}

__global__ void __launch_bounds__(SCAN_THREADS) plan_scan(hm_plan_args args) { place_experts(args, args.workspace, args.blocks); }

__global__ void __launch_bounds__(PLAN_THREADS) plan_place(hm_plan_args args) {
    HM_DYN_SHARED(uint32_t, counts);  // [warps, experts]
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < PLAN_WARPS * args.experts; i += PLAN_THREADS) counts[i] = 0;
    __syncthreads();
    Range mine = slots_of_block(args).part(warp, PLAN_WARPS);
    uint32_t* own = counts + warp * args.experts;
    count_slots(args, mine.from, mine.to, own, lane);
    __syncthreads();
    const uint32_t* first = args.workspace + int64_t(blockIdx.x) * args.experts;
    for (int expert = threadIdx.x; expert < args.experts; expert += PLAN_THREADS) {
        uint32_t row = first[expert];
        for (int w = 0; w < PLAN_WARPS; ++w) {
            uint32_t count = counts[w * args.experts + expert];
            counts[w * args.experts + expert] = row;
            row += count;
        }
    }
    __syncthreads();
    place_slots(args, mine.from, mine.to, own, lane, [](uint32_t, int) {});
}

// A block for each expert, and one for the tokens.
__global__ void __launch_bounds__(PLAN_THREADS) plan_report(hm_plan_args args) {
    int expert = blockIdx.x;
    if (expert == args.experts) {
        report_tokens(args);
        return;
    }
    uint32_t first = args.offsets[expert], end = args.offsets[expert + 1];
    float sum = 0.0f;
    for (uint32_t row = first + threadIdx.x; row < end; row += PLAN_THREADS) sum += args.weights[args.rows[row]];
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        args.report[expert] = end - first;
        args.report[args.experts + expert] = __float_as_uint(sum);
    }
}

}  // namespace

extern "C" {

// One block for up to SMALL_SLOTS slots, and no workspace.
int hm_plan(const hm_plan_args* args, cudaStream_t stream) {
    if (args->blocks == 1) {
        HM_LAUNCH((plan_small), dim3(1), dim3(PLAN_THREADS), 0, stream, *args);
        return hm_check();
    }
    size_t counters = sizeof(uint32_t) * args->experts;
    HM_LAUNCH((plan_count), dim3(args->blocks), dim3(PLAN_THREADS), counters, stream, *args);
    HM_LAUNCH((plan_scan), dim3(1), dim3(SCAN_THREADS), 0, stream, *args);
    HM_LAUNCH((plan_place), dim3(args->blocks), dim3(PLAN_THREADS), PLAN_WARPS * counters, stream, *args);
    HM_LAUNCH((plan_report), dim3(args->experts + 1), dim3(PLAN_THREADS), 0, stream, *args);
    return hm_check();
}
}
