// Embedding and RMSNorm over the residual stream. A block makes one row, so a row does not depend on others.
#include "hm.cuh"

struct hm_embed_args {
    const bf16* table;       // [vocabulary, width]
    const uint32_t* tokens;  // [rows]; one that is not below vocabulary becomes NaN
    float* x;                // [rows, width]
    int32_t rows, width, vocabulary;
};

struct hm_rms_norm_args {
    const float* x;        // [*, width]
    const uint32_t* pick;  // [rows]: which rows of x; null: the first ones
    const float* weight;   // [width]
    bf16* out;             // [rows, width]
    float* out_f32;        // [rows, width], what `out` says, widened; null: nobody wants it
    float epsilon;
    int32_t rows, width;
};

struct hm_add_bias_args {
    float* x;           // [rows, width]
    const float* bias;  // [width]
    int32_t rows, width;
};

namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS) add_bias(hm_add_bias_args args) {
    float* x = args.x + int64_t(blockIdx.x) * args.width;
    for (int i = threadIdx.x; i < args.width; i += THREADS) x[i] += args.bias[i];
}

__global__ void __launch_bounds__(THREADS) embed(hm_embed_args args) {
    int64_t row = blockIdx.x;
    uint32_t token = args.tokens[row];
    bool known = token < uint32_t(args.vocabulary);
    const bf16* from = args.table + int64_t(known ? token : 0) * args.width;
    float* to = args.x + row * args.width;
    for (int i = threadIdx.x; i < args.width; i += THREADS) to[i] = known ? widen(from[i]) : NAN;
}

__global__ void __launch_bounds__(THREADS) rms_norm(hm_rms_norm_args args) {
    int64_t row = blockIdx.x;
    const float* x = args.x + int64_t(args.pick ? args.pick[row] : row) * args.width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < args.width; i += THREADS) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(block_sum(squares) / float(args.width) + args.epsilon);
    for (int i = threadIdx.x; i < args.width; i += THREADS) {
        bf16 normed = narrow<bf16>(x[i] * scale * args.weight[i]);
        args.out[row * args.width + i] = normed;
        if (args.out_f32) args.out_f32[row * args.width + i] = widen(normed);
    }
}

}  // namespace

extern "C" {

int hm_embed(const hm_embed_args* args, cudaStream_t stream) {
    HM_LAUNCH((embed), dim3(args->rows), dim3(THREADS), 0, stream, *args);
    return hm_check();
}

int hm_add_bias(const hm_add_bias_args* args, cudaStream_t stream) {
    HM_LAUNCH((add_bias), dim3(args->rows), dim3(THREADS), 0, stream, *args);
    return hm_check();
}

int hm_rms_norm(const hm_rms_norm_args* args, cudaStream_t stream) {
    HM_LAUNCH((rms_norm), dim3(args->rows), dim3(THREADS), 0, stream, *args);
    return hm_check();
}
}
