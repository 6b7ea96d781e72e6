// What comes between the product that makes queries, keys and values and the attention over them: bias, norm, clip, rotation, and the write to the
// cache. A block makes one token, so a token does not depend on others.
#include "hm.cuh"

struct hm_attention_prepare_args {
    const bf16* qkv;  // [tokens, (heads + 2 kv_heads) * head_dim]: the queries of all heads, then the keys, then the values
    const float* q_bias;  // [heads * head_dim]; null: no biases
    const float* k_bias;  // [kv_heads * head_dim]
    const float* v_bias;  // [kv_heads * head_dim]
    const float* q_norm;  // null: no norms; else [head_dim], or where norm_full [heads * head_dim]
    const float* k_norm;  // likewise
    const float* inverse_frequencies;  // [head_dim / 2]
    const uint32_t* sequence;          // [tokens]: row of the table; NONE: nothing is written
    const uint32_t* position;          // [tokens], within the sequence
    const uint32_t* table;             // [*, table_stride]: blocks of each sequence
    bf16* q;       // [tokens, heads, head_dim]
    bf16* keys;    // [blocks, kv_heads, block_tokens, head_dim]
    bf16* values;  // likewise
    float epsilon;
    float clip;  // infinite: none
    float rope_scale;
    int32_t tokens, heads, kv_heads, head_dim, block_tokens, table_stride;
    int32_t norm_full;
};

namespace {

constexpr int THREADS = 256;

// Four elements of a head and the four that they rotate with, half a head further on.
struct Piece {
    float low[4], high[4];
};

__device__ __forceinline__ void load4(float to[4], const bf16* from) {
    uint2 bits = *reinterpret_cast<const uint2*>(from);
    to[0] = low_half(bits.x), to[1] = high_half(bits.x), to[2] = low_half(bits.y), to[3] = high_half(bits.y);
}
__device__ __forceinline__ void store4(bf16* to, const float from[4]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack(from[0], from[1]), pack(from[2], from[3]));
}

// A piece of head `head` of all of qkv, with its bias.
__device__ Piece load_piece(const hm_attention_prepare_args& args, const bf16* row, int head, int first) {
    int half = args.head_dim / 2, at = head * args.head_dim + first;
    Piece x;
    load4(x.low, row + at);
    load4(x.high, row + at + half);
    if (args.q_bias) {
        int queries = args.heads * args.head_dim, keys = args.kv_heads * args.head_dim;
        const float* bias = at < queries ? args.q_bias + at : at < queries + keys ? args.k_bias + (at - queries) : args.v_bias + (at - queries - keys);
        for (int i = 0; i < 4; ++i) x.low[i] += bias[i], x.high[i] += bias[half + i];
    }
    return x;
}

__device__ __forceinline__ float squares(const Piece& x) {
    float sum = 0.0f;
    for (int i = 0; i < 4; ++i) sum += x.low[i] * x.low[i] + x.high[i] * x.high[i];
    return sum;
}

// 1 / sqrt(mean of squares) of `heads` heads from `head` on, over the whole block.
__device__ float scale_of_heads(const hm_attention_prepare_args& args, const bf16* row, int head, int heads) {
    int pieces = args.head_dim / 8;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < heads * pieces; i += THREADS) sum += squares(load_piece(args, row, head + i / pieces, i % pieces * 4));
    return 1.0f / sqrtf(block_sum(sum) / float(heads * args.head_dim) + args.epsilon);
}

__device__ __forceinline__ void normalize(Piece& x, float scale, const float* weight, int half) {
    for (int i = 0; i < 4; ++i) x.low[i] *= scale * weight[i], x.high[i] *= scale * weight[half + i];
}

// NaN stays what it is.
__device__ __forceinline__ float clamp(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }

__device__ __forceinline__ void rotate(Piece& x, const float* cosines, const float* sines) {
    for (int i = 0; i < 4; ++i) {
        float low = x.low[i], high = x.high[i];
        x.low[i] = low * cosines[i] - high * sines[i];
        x.high[i] = high * cosines[i] + low * sines[i];
    }
}

// A team of lanes, a power of two of them, makes a head: each a piece.
__global__ void __launch_bounds__(THREADS) prepare(hm_attention_prepare_args args) {
    __shared__ float cosines[128], sines[128];
    int64_t token = blockIdx.x;
    uint32_t sequence = args.sequence[token];
    if (sequence == NONE) return;
    int half = args.head_dim / 2, heads = args.heads, kv_heads = args.kv_heads, pieces = args.head_dim / 8;
    uint32_t position = args.position[token];
    const bf16* row = args.qkv + token * (heads + 2 * kv_heads) * args.head_dim;
    for (int i = threadIdx.x; i < half; i += THREADS) {
        // In f32, as checkpoints are trained; the functions have to be exact also for angles of a million.
        float sine, cosine;
        sincosf(float(position) * args.inverse_frequencies[i], &sine, &cosine);
        cosines[i] = cosine * args.rope_scale;
        sines[i] = sine * args.rope_scale;
    }
    float q_scale = 1.0f, k_scale = 1.0f;
    if (args.q_norm && args.norm_full) {
        q_scale = scale_of_heads(args, row, 0, heads);
        k_scale = scale_of_heads(args, row, heads, kv_heads);
    }
    __syncthreads();

    int team = 1;
    while (team < pieces) team *= 2;
    int lane = threadIdx.x % team, first = lane * 4, teams = THREADS / team;
    uint32_t block = args.table[int64_t(sequence) * args.table_stride + position / args.block_tokens];
    int64_t place = int64_t(block) * kv_heads * args.block_tokens + position % args.block_tokens;
    int all = heads + 2 * kv_heads;
    // As many rounds for everyone: lanes without a head, or without a piece of it, still add to sums.
    for (int round = 0; round < all; round += teams) {
        int head = round + threadIdx.x / team;
        bool mine = head < all && lane < pieces;
        Piece x = {};
        if (mine) x = load_piece(args, row, head, first);
        bool query = head < heads, value = head >= heads + kv_heads;
        if (args.q_norm) {
            float scale = query ? q_scale : k_scale;
            if (!args.norm_full) {
                float sum = squares(x);
                for (int other = team / 2; other > 0; other /= 2) sum += __shfl_xor_sync(FULL, sum, other);
                scale = 1.0f / sqrtf(sum / float(args.head_dim) + args.epsilon);
            }
            int skip = !args.norm_full ? 0 : (query ? head : head - heads) * args.head_dim;
            if (mine && !value) normalize(x, scale, (query ? args.q_norm : args.k_norm) + skip + first, half);
        }
        if (!mine) continue;
        for (int i = 0; i < 4; ++i) x.low[i] = clamp(x.low[i], args.clip), x.high[i] = clamp(x.high[i], args.clip);
        if (!value) rotate(x, cosines + first, sines + first);
        int kv_head = (head - heads) % kv_heads;
        bf16* to = query   ? args.q + (token * heads + head) * args.head_dim
                   : value ? args.values + (place + int64_t(kv_head) * args.block_tokens) * args.head_dim
                           : args.keys + (place + int64_t(kv_head) * args.block_tokens) * args.head_dim;
        store4(to + first, x.low);
        store4(to + first + half, x.high);
    }
}

}  // namespace

extern "C" int hm_attention_prepare(const hm_attention_prepare_args* args, cudaStream_t stream) {
    HM_LAUNCH((prepare), dim3(args->tokens), dim3(THREADS), 0, stream, *args);
    return hm_check();
}
