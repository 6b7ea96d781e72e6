// CUDA's run time and its execution model on the processor: the kernels of this folder, compiled by a C++ compiler, compute what they
// would compute on a GPU. For tests; nothing here is fast, and nothing here says how fast a GPU is.
//
// Blocks run one after the other, the threads of a block as fibers on one thread of the operating system. Who goes on after a barrier is
// chosen at random (always the same way), so that a kernel which lacks a barrier is likely to compute something else. Dynamic
// shared memory starts as NaNs. Asynchronous copies arrive when they are waited for and not before. A capture of a stream records instead of running.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One block at a time on each thread.
#define __shared__ static thread_local

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9, cudaErrorNotSupported = 801 };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };

namespace hm_emulator {
struct Stream;
struct Graph;
struct Event;
struct Thread {
    dim3 thread, block;
};
extern thread_local Thread* current;
extern thread_local dim3 block_size, grid_size;

// Runs, or records, one launch.
cudaError_t launch(Stream* stream, dim3 grid, dim3 block, size_t shared_bytes, const char* name, std::function<void()> kernel);
// The arguments are taken now, as a launch takes them.
template <typename Kernel, typename... Arguments>
cudaError_t launch_with(Stream* stream, dim3 grid, dim3 block, size_t shared_bytes, const char* name, Kernel kernel, Arguments... arguments) {
    return launch(stream, grid, block, shared_bytes, name, [=] { kernel(arguments...); });
}
void* dynamic_shared();
void barrier();
// All lanes of `mask` hand in `bytes` bytes; the result is what lane i handed in at `i * 64`, valid until the lane's next collective.
const unsigned char* collective(unsigned mask, const void* mine, size_t bytes);
unsigned lane();
// A copy that arrives when it is waited for.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int pending);
}

using cudaStream_t = hm_emulator::Stream*;
using cudaGraph_t = hm_emulator::Graph*;
using cudaGraphExec_t = hm_emulator::Graph*;
using cudaEvent_t = hm_emulator::Event*;

#define threadIdx (hm_emulator::current->thread)
#define blockIdx (hm_emulator::current->block)
#define blockDim (hm_emulator::block_size)
#define gridDim (hm_emulator::grid_size)
#define warpSize 32

inline void __syncthreads() { hm_emulator::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { hm_emulator::collective(mask, nullptr, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T hm_emulated_from_lane(unsigned mask, T value, unsigned source, bool valid) {
    static_assert(sizeof(T) <= 64, "a lane hands in 64 bytes at most");
    const unsigned char* all = hm_emulator::collective(mask, &value, sizeof(T));
    if (valid) std::memcpy(&value, all + source * 64, sizeof(T));
    return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned lane = hm_emulator::lane(), first = lane & ~unsigned(width - 1);
    return hm_emulated_from_lane(mask, value, first + (unsigned(source) & unsigned(width - 1)), true);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
    unsigned lane = hm_emulator::lane(), source = lane ^ unsigned(other);
    return hm_emulated_from_lane(mask, value, source, source / width <= lane / width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = hm_emulator::lane(), source = lane + delta;
    return hm_emulated_from_lane(mask, value, source, source / width == lane / width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = hm_emulator::lane();
    return hm_emulated_from_lane(mask, value, lane - delta, lane % width >= delta);
}
unsigned __ballot_sync(unsigned mask, int predicate);
unsigned __match_any_sync(unsigned mask, unsigned value);
unsigned __reduce_max_sync(unsigned mask, unsigned value);
unsigned __reduce_min_sync(unsigned mask, unsigned value);
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int __syncthreads_or(int predicate) {
    __shared__ int any;
    hm_emulator::barrier();
    any = 0;
    hm_emulator::barrier();
    if (predicate) any = 1;
    hm_emulator::barrier();
    return any;
}

template <typename T>
T hm_emulated_atomic(T* at, T value, T (*f)(T, T)) {
    T old = *at;
    *at = f(old, value);
    return old;
}
template <typename T> T atomicAdd(T* at, T value) { return hm_emulated_atomic<T>(at, value, [](T a, T b) -> T { return a + b; }); }
template <typename T> T atomicMax(T* at, T value) { return hm_emulated_atomic<T>(at, value, [](T a, T b) -> T { return a > b ? a : b; }); }
template <typename T> T atomicMin(T* at, T value) { return hm_emulated_atomic<T>(at, value, [](T a, T b) -> T { return a < b ? a : b; }); }
template <typename T> T atomicOr(T* at, T value) { return hm_emulated_atomic<T>(at, value, [](T a, T b) -> T { return a | b; }); }
template <typename T> T atomicExch(T* at, T value) { return hm_emulated_atomic<T>(at, value, [](T, T b) -> T { return b; }); }

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
// Byte i of the result is byte `selector >> 4 i` of y x, x being the lower word.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
template <typename T> T __ldg(const T* at) { return *at; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
using std::isfinite;
using std::isnan;

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount, l2CacheSize;
    size_t totalGlobalMem, sharedMemPerBlockOptin;
};
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaMallocAsync(void** at, size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* at, cudaStream_t stream);
cudaError_t cudaMallocHost(void** at, size_t bytes);
cudaError_t cudaFreeHost(void* at);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to);
template <typename F> cudaError_t cudaFuncSetAttribute(F, int, int) { return cudaSuccess; }
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
