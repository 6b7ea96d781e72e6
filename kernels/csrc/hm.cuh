// What all kernels share. Everything that only a GPU's compiler knows (launches, inline PTX, dynamic shared memory) is here, in two forms: see
// emulator/cuda_runtime.h for the other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

constexpr unsigned FULL = 0xffffffffu;
// An expert id, a position, a token that is none.
constexpr uint32_t NONE = 0xffffffffu;

#define HM_UNPAREN_(...) __VA_ARGS__

// HM_LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...)
#ifdef HM_EMULATED
#define HM_LAUNCH(kernel, grid, block, shared, stream, ...) \
    hm_emulator::launch_with(stream, grid, block, shared, #kernel, [](auto... arguments) { (HM_UNPAREN_ kernel)(arguments...); }, __VA_ARGS__)
#define HM_DYN_SHARED(type, name) type* name = reinterpret_cast<type*>(hm_emulator::dynamic_shared())
#else
#define HM_LAUNCH(kernel, grid, block, shared, stream, ...)                                                             \
    do {                                                                                                                \
        auto hm_kernel = HM_UNPAREN_ kernel;                                                                            \
        size_t hm_shared = (shared);                                                                                    \
        if (hm_shared > 48 * 1024) cudaFuncSetAttribute(hm_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(hm_shared)); \
        hm_kernel<<<grid, block, hm_shared, stream>>>(__VA_ARGS__);                                                     \
    } while (0)
#define HM_DYN_SHARED(type, name)                        \
    extern __shared__ __align__(128) unsigned char hm_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(hm_dynamic_shared)
#endif

// What a launcher returns: 0, or the error of its launches.
inline int hm_check() { return int(cudaGetLastError()); }

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- numbers -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }

// Two bf16 in a register, the first in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Four e4m3, the first in the lowest byte, as two pairs of bf16, exactly. bf16 has more bits of exponent, and its bias is larger by 120. What
// is NaN in e4m3 becomes 480 or -480.
__device__ __forceinline__ void widen_e4m3(uint32_t four, uint32_t pairs[2]) {
    uint32_t moved[2] = {__byte_perm(four, 0, 0x1404), __byte_perm(four, 0, 0x3424)};
    uint32_t power = 0x7b807b80;  // 2^120, twice
    __nv_bfloat162 scale, pair;
    memcpy(&scale, &power, 4);
    for (int i = 0; i < 2; ++i) {
        uint32_t bits = (moved[i] & 0x80008000u) | (moved[i] & 0x7f007f00u) >> 4;
        memcpy(&pair, &bits, 4);
        pair = __hmul2(pair, scale);
        memcpy(&pairs[i], &pair, 4);
    }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// 2^x to two units in the last place; 0 where that is below the normal numbers.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef HM_EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// ---- memory ------------------------------------------------------------------------------------------------------

// 16 bytes, aligned, that are read once: they need not stay in a cache.
__device__ __forceinline__ uint4 load_streaming(const void* at) {
#ifdef HM_EMULATED
    return *static_cast<const uint4*>(at);
#else
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(at));
    return value;
#endif
}
__device__ __forceinline__ uint4 load16(const void* at) { return *static_cast<const uint4*>(at); }
__device__ __forceinline__ void store16(void* at, uint4 value) { *static_cast<uint4*>(at) = value; }

// 16 bytes from global to shared memory, zeros where `take` is false. They are there after commit_group and wait_group.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool take = true) {
#ifdef HM_EMULATED
    hm_emulator::copy_later(shared, take ? global : nullptr, 16);
#else
    unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(take ? 16 : 0));
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#ifdef HM_EMULATED
    hm_emulator::commit_copies();
#else
    asm volatile("cp.async.commit_group;");
#endif
}
// All but the last `Pending` groups of this thread have arrived; other threads need a barrier besides.
template <int Pending> __device__ __forceinline__ void copy_async_wait() {
#ifdef HM_EMULATED
    hm_emulator::wait_copies(Pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending));
#endif
}

// ---- warps and blocks --------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
    for (int other = 16; other > 0; other >>= 1) x += __shfl_xor_sync(FULL, x, other);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int other = 16; other > 0; other >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, other));
    return x;
}

// The sum over a block of up to 1,024 threads, a multiple of 32, in all of them. Two barriers; ends with none of them behind.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? partial[lane] : 0.0f);
}
__device__ __forceinline__ float block_max(float x) {
    __shared__ float partial[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? partial[lane] : -INFINITY);
}

// ---- tensor cores (sm_80) ----------------------------------------------------------------------------------------

// d += a b for a [16, 16], b [16, 8] of bf16, d [16, 8] of f32, spread over a warp. With g = lane / 4 and t = lane % 4:
//   a[0] row g, columns 2t and 2t + 1;  a[1] row g + 8;  a[2] row g, columns 2t + 8 and 2t + 9;  a[3] row g + 8 of those
//   b[0] rows 2t and 2t + 1 of column g;  b[1] rows 2t + 8 and 2t + 9
//   d[0], d[1] row g, columns 2t and 2t + 1;  d[2], d[3] row g + 8
__device__ __forceinline__ void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef HM_EMULATED
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned char* all = hm_emulator::collective(FULL, mine, sizeof mine);
    auto word = [&](unsigned lane, unsigned index) {
        uint32_t value;
        memcpy(&value, all + lane * 64 + index * 4, 4);
        return value;
    };
    auto half = [](uint32_t pair, unsigned index) { return index ? high_half(pair) : low_half(pair); };
    unsigned lane = hm_emulator::lane(), g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
        unsigned row_half = i / 2, column = 2 * t + i % 2;
        float sum = 0;
        for (unsigned k = 0; k < 16; ++k) {
            unsigned from = (k % 8) / 2, upper = k / 8;
            sum += half(word(g * 4 + from, row_half + 2 * upper), k % 2) * half(word(column * 4 + from, 4 + upper), k % 2);
        }
        d[i] += sum;
    }
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned), and gets
// of matrix m, in m's register, the elements 2t and 2t + 1 of row g.
__device__ __forceinline__ void ldmatrix_x4(uint32_t out[4], const void* row) {
#ifdef HM_EMULATED
    const unsigned char* all = hm_emulator::collective(FULL, row, 16);
    unsigned lane = hm_emulator::lane();
    for (unsigned m = 0; m < 4; ++m) memcpy(&out[m], all + (m * 8 + lane / 4) * 64 + (lane % 4) * 4, 4);
#else
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
#endif
}

// As ldmatrix_x4 of the transposed matrices: the elements g of rows 2t and 2t + 1.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t out[4], const void* row) {
#ifdef HM_EMULATED
    const unsigned char* all = hm_emulator::collective(FULL, row, 16);
    unsigned lane = hm_emulator::lane(), g = lane / 4, t = lane % 4;
    for (unsigned m = 0; m < 4; ++m) {
        uint16_t low, high;
        memcpy(&low, all + (m * 8 + 2 * t) * 64 + g * 2, 2);
        memcpy(&high, all + (m * 8 + 2 * t + 1) * 64 + g * 2, 2);
        out[m] = uint32_t(low) | uint32_t(high) << 16;
    }
#else
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
#endif
}
