// Router logits of few tokens, and routing. A warp routes one token, which does not depend on others.
#include "routing.cuh"

struct hm_router_logits_args {
    const void* x;        // [tokens, width] bf16 or f32
    const float* router;  // [experts, width]
    float* logits;        // [tokens, experts]
    int32_t tokens, width, experts;
    int32_t x_f32;
};

namespace {

constexpr int LOGITS_THREADS = 256, LOGITS_TOKENS = 8;

__device__ __forceinline__ float4 load4(const float* at) { return *reinterpret_cast<const float4*>(at); }
__device__ __forceinline__ float4 load4(const bf16* at) {
    uint2 pairs = *reinterpret_cast<const uint2*>(at);
    return make_float4(low_half(pairs.x), high_half(pairs.x), low_half(pairs.y), high_half(pairs.y));
}

// A block makes the logits of one expert for up to LOGITS_TOKENS tokens. Sums are in an order that only the width decides.
template <typename X> __global__ void __launch_bounds__(LOGITS_THREADS) router_logits(hm_router_logits_args args) {
    int first = blockIdx.y * LOGITS_TOKENS, count = min(args.tokens - first, LOGITS_TOKENS);
    const X* x = static_cast<const X*>(args.x) + int64_t(first) * args.width;
    const float* router = args.router + int64_t(blockIdx.x) * args.width;
    float sum[LOGITS_TOKENS] = {};
    for (int at = threadIdx.x * 4; at < args.width; at += LOGITS_THREADS * 4) {
        float4 r = load4(router + at);
#pragma unroll
        for (int token = 0; token < LOGITS_TOKENS; ++token) {
            if (token < count) {
                float4 v = load4(x + int64_t(token) * args.width + at);
                sum[token] += r.x * v.x + r.y * v.y + r.z * v.z + r.w * v.w;
            }
        }
    }
    __shared__ float partial[LOGITS_TOKENS][LOGITS_THREADS / 32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int token = 0; token < LOGITS_TOKENS; ++token) {
        float of_warp = warp_sum(sum[token]);
        if (lane == 0) partial[token][warp] = of_warp;
    }
    __syncthreads();
    if (int(threadIdx.x) < count) {
        float all = 0.0f;
        for (int w = 0; w < LOGITS_THREADS / 32; ++w) all += partial[threadIdx.x][w];
        args.logits[int64_t(first + threadIdx.x) * args.experts + blockIdx.x] = all;
    }
}

constexpr int ROUTE_WARPS = 4;

template <int N> __global__ void __launch_bounds__(ROUTE_WARPS * 32) route(hm_route_args args) {
    int token = blockIdx.x * ROUTE_WARPS + threadIdx.x / 32;
    if (token < args.tokens) route_token<N>(args, token, threadIdx.x % 32);
}

constexpr int FUSED_WARPS = 16;

// Routing and plan of few tokens by one block.
template <int N> __global__ void __launch_bounds__(FUSED_WARPS * 32, 1) route_and_plan(hm_route_args route, hm_plan_args plan) {
    for (int token = threadIdx.x / 32; token < route.tokens; token += FUSED_WARPS) route_token<N>(route, token, threadIdx.x % 32);
    __syncthreads();
    plan_in_block(plan);
}

template <int N> void launch_route(const hm_route_args& args, cudaStream_t stream) {
    HM_LAUNCH((route<N>), dim3(ceil_div(args.tokens, ROUTE_WARPS)), dim3(ROUTE_WARPS * 32), 0, stream, args);
}
template <int N> void launch_route_and_plan(const hm_route_args& route, const hm_plan_args& plan, cudaStream_t stream) {
    HM_LAUNCH((route_and_plan<N>), dim3(1), dim3(FUSED_WARPS * 32), 0, stream, route, plan);
}

}  // namespace

extern "C" {

int hm_router_logits(const hm_router_logits_args* args, cudaStream_t stream) {
    dim3 grid(args->experts, ceil_div(args->tokens, LOGITS_TOKENS));
    if (args->x_f32) HM_LAUNCH((router_logits<float>), grid, dim3(LOGITS_THREADS), 0, stream, *args);
    else HM_LAUNCH((router_logits<bf16>), grid, dim3(LOGITS_THREADS), 0, stream, *args);
    return hm_check();
}

int hm_route(const hm_route_args* args, cudaStream_t stream) {
    constexpr decltype(&launch_route<1>) WIDTHS[] = {launch_route<1>, launch_route<2>, launch_route<4>,
                                                     launch_route<8>, launch_route<16>, launch_route<32>};
    WIDTHS[logits_width(args->experts)](*args, stream);
    return hm_check();
}

// For up to SMALL_SLOTS slots.
int hm_route_and_plan(const hm_route_args* route, const hm_plan_args* plan, cudaStream_t stream) {
    constexpr decltype(&launch_route_and_plan<1>) WIDTHS[] = {launch_route_and_plan<1>, launch_route_and_plan<2>,  launch_route_and_plan<4>,
                                                              launch_route_and_plan<8>, launch_route_and_plan<16>, launch_route_and_plan<32>};
    WIDTHS[logits_width(route->experts)](*route, *plan, stream);
    return hm_check();
}
}
