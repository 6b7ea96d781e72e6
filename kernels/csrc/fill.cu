// Numbers made in place: random ones for weights that exist nowhere else, and one number everywhere.
//
// Each random number is a hash of its seed and its index, by arithmetic that is exact or rounds once: it is the same on every machine.
#include "hm.cuh"

struct hm_fill_args {
    void* out;  // [len]
    int64_t len;
    int64_t seed;
    float value;     // the number; of random ones the standard deviation
    int32_t narrow;  // `out` is bf16; else f32
};

namespace {

constexpr int THREADS = 256;
constexpr int MOST_BLOCKS = 1 << 14;

// The constants and the output function of SplitMix64 (Steele, Lea and Flood 2014).
constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15ull;
__device__ __forceinline__ uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// A generator for each 2^16 indices, which is asked for the number of this one.
__device__ __forceinline__ uint64_t hash(uint64_t seed, int64_t index) {
    uint64_t chunk = uint64_t(index) >> 16, place = uint64_t(index) & 0xffff;
    return mix(mix(seed + chunk) + (place + 1) * GOLDEN);
}

// Nearly normal, mean 0 and variance 1: the sum of four uniform numbers of 16 bits.
__device__ __forceinline__ float bell(uint64_t bits) {
    uint32_t low = uint32_t(bits), high = uint32_t(bits >> 32);
    uint32_t sum = (low & 0xffff) + (low >> 16) + (high & 0xffff) + (high >> 16);
    // Mean 4 * 65535 / 2; variance 4 * 65536^2 / 12.
    return (float(sum) - 131070.0f) * (1.0f / 37837.227f);
}

template <typename T> __global__ void __launch_bounds__(THREADS) fill_normal(T* out, int64_t len, uint64_t seed, float deviation) {
    int64_t threads = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < len; i += threads) out[i] = narrow<T>(deviation * bell(hash(seed, i)));
}

template <typename T> __global__ void __launch_bounds__(THREADS) fill_value(T* out, int64_t len, float value) {
    int64_t threads = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < len; i += threads) out[i] = narrow<T>(value);
}

dim3 blocks(int64_t len) {
    int64_t all = ceil_div(len, THREADS);
    return dim3(unsigned(all < MOST_BLOCKS ? all : MOST_BLOCKS));
}

}  // namespace

extern "C" {

int hm_fill_normal(const hm_fill_args* args, cudaStream_t stream) {
    uint64_t seed = uint64_t(args->seed);
    if (args->narrow) {
        HM_LAUNCH((fill_normal<bf16>), blocks(args->len), dim3(THREADS), 0, stream, static_cast<bf16*>(args->out), args->len, seed, args->value);
    } else {
        HM_LAUNCH((fill_normal<float>), blocks(args->len), dim3(THREADS), 0, stream, static_cast<float*>(args->out), args->len, seed, args->value);
    }
    return hm_check();
}

int hm_fill_value(const hm_fill_args* args, cudaStream_t stream) {
    if (args->narrow) {
        HM_LAUNCH((fill_value<bf16>), blocks(args->len), dim3(THREADS), 0, stream, static_cast<bf16*>(args->out), args->len, args->value);
    } else {
        HM_LAUNCH((fill_value<float>), blocks(args->len), dim3(THREADS), 0, stream, static_cast<float*>(args->out), args->len, args->value);
    }
    return hm_check();
}
}
