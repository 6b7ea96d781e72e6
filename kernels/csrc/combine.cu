// What experts made, added to the residual stream. A block has one token, which does not depend on others.
#include "hm.cuh"

struct hm_combine_args {
    float* x;                   // [tokens, width]
    const void* y;              // [*, width], sorted rows; bf16 or f32
    const uint32_t* positions;  // [tokens, slots]
    const float* weights;       // [tokens, slots]; NaN where the token is to become NaN
    const void* shared;         // [tokens, width], of y's type; null: there is no shared expert
    const float* gate;          // [tokens]: logit of the shared expert
    const float* norm;          // [width]: weight of the norm that follows; null: none does
    bf16* normed;               // [tokens, width]
    float epsilon;
    int32_t tokens, slots, width;
    int32_t y_f32;
};

namespace {

constexpr int THREADS = 256, MAX_SLOTS = 1024;

__device__ __forceinline__ float4 load4(const float* at) { return *reinterpret_cast<const float4*>(at); }
__device__ __forceinline__ float4 load4(const bf16* at) {
    uint2 pairs = *reinterpret_cast<const uint2*>(at);
    return make_float4(low_half(pairs.x), high_half(pairs.x), low_half(pairs.y), high_half(pairs.y));
}
__device__ __forceinline__ void add_scaled(float4& sum, float scale, float4 v) {
    sum.x += scale * v.x;
    sum.y += scale * v.y;
    sum.z += scale * v.z;
    sum.w += scale * v.w;
}

// The slots of a token that are used, in order.
struct Slots {
    uint32_t position[MAX_SLOTS];
    float weight[MAX_SLOTS];
    int used;
    float rest;  // 0, or NaN where the token has no route because something is wrong with it
};

// One warp packs them.
__device__ __forceinline__ void pack_slots(const hm_combine_args& args, int64_t token, Slots& slots) {
    int lane = threadIdx.x, used = 0;
    float rest = 0.0f;
    for (int first = 0; first < args.slots; first += 32) {
        int slot = first + lane;
        uint32_t position = slot < args.slots ? args.positions[token * args.slots + slot] : NONE;
        float weight = slot < args.slots ? args.weights[token * args.slots + slot] : 0.0f;
        unsigned there = __ballot_sync(FULL, position != NONE);
        if (position != NONE) {
            int place = used + __popc(there & ((1u << lane) - 1));
            slots.position[place] = position;
            slots.weight[place] = weight;
        } else if (isnan(weight)) {
            rest = NAN;
        }
        used += __popc(there);
    }
    rest = warp_sum(rest);
    if (lane == 0) {
        slots.used = used;
        slots.rest = rest;
    }
}

template <typename Y> __global__ void __launch_bounds__(THREADS) combine(hm_combine_args args) {
    __shared__ Slots slots;
    int64_t token = blockIdx.x;
    if (threadIdx.x < 32) pack_slots(args, token, slots);
    __syncthreads();
    const Y* y = static_cast<const Y*>(args.y);
    const Y* shared = static_cast<const Y*>(args.shared);
    float gate = shared ? 1.0f / (1.0f + expf(-args.gate[token])) : 0.0f;
    float squares = 0.0f;
    for (int i = threadIdx.x * 4; i < args.width; i += THREADS * 4) {
        float4 sum = make_float4(slots.rest, slots.rest, slots.rest, slots.rest);
#pragma unroll 4
        for (int slot = 0; slot < slots.used; ++slot) add_scaled(sum, slots.weight[slot], load4(y + int64_t(slots.position[slot]) * args.width + i));
        if (shared) add_scaled(sum, gate, load4(shared + token * args.width + i));
        float4* x = reinterpret_cast<float4*>(args.x + token * args.width + i);
        add_scaled(sum, 1.0f, *x);
        *x = sum;
        squares += sum.x * sum.x + sum.y * sum.y + sum.z * sum.z + sum.w * sum.w;
    }
    if (!args.norm) return;
    float scale = 1.0f / sqrtf(block_sum(squares) / float(args.width) + args.epsilon);
    // Each thread reads what it wrote.
    for (int i = threadIdx.x * 4; i < args.width; i += THREADS * 4) {
        float4 x = load4(args.x + token * args.width + i), norm = load4(args.norm + i);
        uint2 pairs = make_uint2(pack(x.x * scale * norm.x, x.y * scale * norm.y), pack(x.z * scale * norm.z, x.w * scale * norm.w));
        *reinterpret_cast<uint2*>(args.normed + token * args.width + i) = pairs;
    }
}

}  // namespace

extern "C" int hm_combine(const hm_combine_args* args, cudaStream_t stream) {
    if (args->y_f32) HM_LAUNCH((combine<float>), dim3(args->tokens), dim3(THREADS), 0, stream, *args);
    else HM_LAUNCH((combine<bf16>), dim3(args->tokens), dim3(THREADS), 0, stream, *args);
    return hm_check();
}
