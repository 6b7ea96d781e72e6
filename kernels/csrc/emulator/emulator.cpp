// See cuda_runtime.h.
#include "cublas_v2.h"
#include "cuda_bf16.h"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <unordered_map>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace hm_emulator {
thread_local Thread* current;
thread_local dim3 block_size, grid_size;

namespace {
constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t MAX_THREADS = 1024;
constexpr size_t MAX_SHARED = 227 << 10;

[[noreturn]] void die(const char* what, const char* kernel) {
    std::fprintf(stderr, "emulator: %s: %s\n", kernel, what);
    std::abort();
}

// Where a fiber goes on.
#if defined(__x86_64__)
extern "C" void hm_emulator_switch(void** save, void* to);
asm(R"(
.text
.globl hm_emulator_switch
.type hm_emulator_switch, @function
hm_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size hm_emulator_switch, .-hm_emulator_switch
)");
struct Context {
    void* stack_pointer = nullptr;
    void prepare(unsigned char* stack, void (*entry)()) {
        auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + STACK_BYTES) & ~uintptr_t(15));
        *--top = nullptr;  // the entry never returns; keeps the stack aligned as after a call
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack_pointer = top;
    }
    static void change(Context& from, Context& to) { hm_emulator_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;
    void prepare(unsigned char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

enum class State { Runnable, AtBarrier, InCollective, Done };

struct Copy {
    void* to;
    unsigned char bytes[16];
    size_t count;
};

struct Fiber : Thread {
    Context context;
    State state;
    unsigned index;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> committed;
};

// The lanes of a warp that meet under one mask.
struct Meeting {
    unsigned mask = 0, arrived = 0;
    unsigned char in[32 * 64], out[32 * 64];
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<std::vector<std::unique_ptr<Meeting>>> meetings;
    std::vector<uint16_t> order;
    std::array<unsigned, MAX_THREADS / 32> resting{};  // rounds that each warp sits out
    unsigned char* stacks;
    std::vector<unsigned char> shared;
    Context scheduler;
    Fiber* running = nullptr;
    const std::function<void()>* kernel = nullptr;
    const char* name = "";
    uint32_t random = 12345;

    Machine() : fibers(MAX_THREADS), meetings(MAX_THREADS / 32), shared(MAX_SHARED + 128) {
        // Pages are given when they are touched.
        void* memory = mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) die("no memory for stacks", "start");
        stacks = static_cast<unsigned char*>(memory);
    }
    ~Machine() { munmap(stacks, MAX_THREADS * STACK_BYTES); }

    uint32_t next_random() { return (random = random * 1664525u + 1013904223u) >> 8; }

    void yield(State state) {
        running->state = state;
        Context::change(running->context, scheduler);
    }

    static Machine& mine() {
        thread_local Machine machine;
        return machine;
    }

    static void entry() {
        Machine& machine = mine();
        (*machine.kernel)();
        if (!machine.running->open.empty() || !machine.running->committed.empty()) die("a copy was never waited for", machine.name);
        machine.yield(State::Done);
    }

    void run_block(dim3 block_index, unsigned threads) {
        unsigned i = 0;
        for (unsigned z = 0; z < block_size.z; ++z)
            for (unsigned y = 0; y < block_size.y; ++y)
                for (unsigned x = 0; x < block_size.x; ++x, ++i) {
                    Fiber& fiber = fibers[i];
                    fiber.thread = dim3(x, y, z);
                    fiber.block = block_index;
                    fiber.state = State::Runnable;
                    fiber.index = i;
                    fiber.context.prepare(stacks + i * STACK_BYTES, entry);
                }
        for (auto& warp : meetings) warp.clear();
        std::memset(shared.data(), 0xff, shared.size());
        order.resize(threads);
        for (unsigned t = 0; t < threads; ++t) order[t] = uint16_t(t);
        for (;;) {
            for (unsigned t = threads; t > 1; --t) std::swap(order[t - 1], order[next_random() % t]);
            unsigned ran = 0, runnable = 0, done = 0, waiting = 0;
            // Some warps fall far behind the others, as they do on a GPU.
            for (unsigned warp = 0; warp * 32 < threads; ++warp) {
                unsigned& rest = resting[warp];
                rest = rest ? rest - 1 : next_random() % 256 == 0 ? next_random() % 1024 : 0;
            }
            for (unsigned t : order) {
                if (fibers[t].state == State::Runnable && !resting[t / 32]) {
                    running = &fibers[t];
                    current = running;
                    Context::change(scheduler, running->context);
                    ++ran;
                }
            }
            for (unsigned t = 0; t < threads; ++t) {
                done += fibers[t].state == State::Done;
                waiting += fibers[t].state == State::AtBarrier;
                runnable += fibers[t].state == State::Runnable;
            }
            if (done == threads) return;
            if (ran == 0 && runnable > 0) {
                resting.fill(0);
            } else if (ran == 0) {
                if (done + waiting != threads) die("lanes wait for others that never come", name);
                if (done > 0) die("some threads wait at a barrier that others have left behind", name);
                for (unsigned t = 0; t < threads; ++t) fibers[t].state = State::Runnable;
            }
        }
    }
};

struct Capture {
    std::vector<std::function<void()>> work;
};
}  // namespace

struct Stream {
    std::unique_ptr<Capture> capture;
};
struct Graph {
    std::vector<std::function<void()>> work;
};
struct Event {
    std::chrono::steady_clock::time_point at;
};

namespace {
thread_local Stream default_stream;
Stream& stream_or_default(Stream* stream) { return stream ? *stream : default_stream; }

void submit(Stream* stream, std::function<void()> work) {
    Stream& to = stream_or_default(stream);
    if (to.capture) to.capture->work.push_back(std::move(work));
    else work();
}
thread_local cudaError_t last_error = cudaSuccess;
}  // namespace

cudaError_t launch(Stream* stream, dim3 grid, dim3 block, size_t shared_bytes, const char* name, std::function<void()> kernel) {
    size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
    if (threads == 0 || threads > MAX_THREADS || blocks == 0 || grid.y > 65535 || grid.z > 65535 || shared_bytes > MAX_SHARED) {
        std::fprintf(stderr, "emulator: %s: grid %u x %u x %u, block %u x %u x %u, %zu bytes shared cannot be launched\n", name, grid.x, grid.y, grid.z,
                     block.x, block.y, block.z, shared_bytes);
        return last_error = cudaErrorInvalidConfiguration;
    }
    submit(stream, [=] {
        Machine& machine = Machine::mine();
        machine.kernel = &kernel;
        machine.name = name;
        block_size = block;
        grid_size = grid;
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) machine.run_block(dim3(x, y, z), unsigned(threads));
    });
    return cudaSuccess;
}

void* dynamic_shared() {
    auto at = reinterpret_cast<uintptr_t>(Machine::mine().shared.data());
    return reinterpret_cast<void*>((at + 127) & ~uintptr_t(127));
}

void barrier() { Machine::mine().yield(State::AtBarrier); }

unsigned lane() { return Machine::mine().running->index % 32; }

const unsigned char* collective(unsigned mask, const void* mine, size_t bytes) {
    Machine& machine = Machine::mine();
    Fiber& me = *machine.running;
    unsigned my_lane = me.index % 32;
    if (!(mask >> my_lane & 1)) die("a lane takes part under a mask without it", machine.name);
    auto& warp = machine.meetings[me.index / 32];
    Meeting* meeting = nullptr;
    for (auto& other : warp)
        if (other->mask == mask) meeting = other.get();
    if (!meeting) {
        warp.push_back(std::make_unique<Meeting>());
        meeting = warp.back().get();
        meeting->mask = mask;
    }
    if (bytes) std::memcpy(meeting->in + my_lane * 64, mine, bytes);
    meeting->arrived |= 1u << my_lane;
    if (meeting->arrived != mask) {
        machine.yield(State::InCollective);
    } else {
        std::memcpy(meeting->out, meeting->in, sizeof meeting->out);
        meeting->arrived = 0;
        unsigned first = me.index & ~31u;
        for (unsigned l = 0; l < 32; ++l)
            if ((mask >> l & 1) && l != my_lane) machine.fibers[first + l].state = State::Runnable;
        // Whoever came last need not be the first to go on.
        machine.yield(State::Runnable);
    }
    return meeting->out;
}

void copy_later(void* to, const void* from, size_t bytes) {
    Copy copy{to, {}, bytes};
    if (from) std::memcpy(copy.bytes, from, bytes);
    Machine::mine().running->open.push_back(copy);
}
void commit_copies() {
    Fiber& me = *Machine::mine().running;
    me.committed.push_back(std::move(me.open));
    me.open.clear();
}
void wait_copies(int pending) {
    Fiber& me = *Machine::mine().running;
    while (me.committed.size() > size_t(pending)) {
        for (Copy& copy : me.committed.front()) std::memcpy(copy.to, copy.bytes, copy.count);
        me.committed.erase(me.committed.begin());
    }
}
}  // namespace hm_emulator

using namespace hm_emulator;

unsigned __ballot_sync(unsigned mask, int predicate) {
    const unsigned char* all = collective(mask, &predicate, sizeof predicate);
    unsigned votes = 0;
    for (unsigned l = 0; l < 32; ++l) {
        int theirs;
        std::memcpy(&theirs, all + l * 64, sizeof theirs);
        if ((mask >> l & 1) && theirs) votes |= 1u << l;
    }
    return votes;
}

namespace {
template <typename F> void each_lane(unsigned mask, unsigned value, F f) {
    const unsigned char* all = collective(mask, &value, sizeof value);
    for (unsigned l = 0; l < 32; ++l) {
        unsigned theirs;
        std::memcpy(&theirs, all + l * 64, sizeof theirs);
        if (mask >> l & 1) f(l, theirs);
    }
}
}  // namespace

unsigned __match_any_sync(unsigned mask, unsigned value) {
    unsigned same = 0;
    each_lane(mask, value, [&](unsigned lane, unsigned theirs) { same |= unsigned(theirs == value) << lane; });
    return same;
}
unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    unsigned largest = value;
    each_lane(mask, value, [&](unsigned, unsigned theirs) { largest = max(largest, theirs); });
    return largest;
}
unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    unsigned smallest = value;
    each_lane(mask, value, [&](unsigned, unsigned theirs) { smallest = min(smallest, theirs); });
    return smallest;
}

// ---- memory ------------------------------------------------------------------------------------------------------

namespace {
constexpr size_t GUARD = 256;
constexpr unsigned char GUARD_BYTE = 0xa5;
std::mutex blocks_lock;
std::unordered_map<void*, size_t> blocks;
size_t used = 0;

size_t total_bytes() {
    const char* text = std::getenv("HM_EMULATED_BYTES");
    return text ? std::strtoull(text, nullptr, 10) : size_t(64) << 30;
}
}  // namespace

cudaError_t cudaMallocAsync(void** at, size_t bytes, cudaStream_t) {
    std::lock_guard<std::mutex> guard(blocks_lock);
    if (bytes > total_bytes() - used) return last_error = cudaErrorMemoryAllocation;
    void* block = nullptr;
    if (posix_memalign(&block, 256, bytes + GUARD)) return last_error = cudaErrorMemoryAllocation;
    // What nobody wrote is NaN. Large blocks stay untouched: memory is given when it is written.
    if (bytes <= size_t(64) << 20) std::memset(block, 0xff, bytes);
    std::memset(static_cast<char*>(block) + bytes, GUARD_BYTE, GUARD);
    blocks[block] = bytes;
    used += bytes;
    *at = block;
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* at, cudaStream_t) {
    if (!at) return cudaSuccess;
    std::lock_guard<std::mutex> guard(blocks_lock);
    auto found = blocks.find(at);
    if (found == blocks.end()) return last_error = cudaErrorInvalidValue;
    const unsigned char* end = static_cast<unsigned char*>(at) + found->second;
    for (size_t i = 0; i < GUARD; ++i)
        if (end[i] != GUARD_BYTE) {
            std::fprintf(stderr, "emulator: something wrote %zu bytes behind a block of %zu\n", i, found->second);
            std::abort();
        }
    used -= found->second;
    blocks.erase(found);
    std::free(at);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void** at, size_t bytes) {
    *at = std::malloc(bytes ? bytes : 1);
    return *at ? cudaSuccess : last_error = cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* at) {
    std::free(at);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    submit(stream, [=] { std::memmove(to, from, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
    submit(stream, [=] { std::memset(at, value, bytes); });
    return cudaSuccess;
}

// ---- the device --------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : last_error = cudaErrorInvalidValue; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = cudaDeviceProp{};
    std::snprintf(properties->name, sizeof properties->name, "emulated");
    properties->major = 9;
    if (const char* text = std::getenv("HM_EMULATED_CAPABILITY")) std::sscanf(text, "%d.%d", &properties->major, &properties->minor);
    properties->multiProcessorCount = 4;
    properties->l2CacheSize = 1 << 20;
    properties->totalGlobalMem = total_bytes();
    properties->sharedMemPerBlockOptin = MAX_SHARED;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    const char* text = std::getenv("HM_EMULATED_DRIVER");
    *version = text ? std::atoi(text) : 13000;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    std::lock_guard<std::mutex> guard(blocks_lock);
    *total = total_bytes();
    *free = *total - used;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotSupported: return "operation not supported";
    }
    return "unrecognized error code";
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// ---- streams, graphs, events -------------------------------------------------------------------------------------

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    *stream = new Stream;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    // As on a GPU, where it would break the capture.
    return stream_or_default(stream).capture ? last_error = cudaErrorNotSupported : cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    Stream& of = stream_or_default(stream);
    if (of.capture) return last_error = cudaErrorInvalidValue;
    of.capture = std::make_unique<Capture>();
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    Stream& of = stream_or_default(stream);
    if (!of.capture) return last_error = cudaErrorInvalidValue;
    *graph = new Graph{std::move(of.capture->work)};
    of.capture.reset();
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = new Graph{graph->work};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    submit(stream, [=] {
        for (auto& work : executable->work) work();
    });
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
    *event = new Event;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    submit(stream, [=] { event->at = std::chrono::steady_clock::now(); });
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return cudaSuccess;
}

// ---- cuBLAS ------------------------------------------------------------------------------------------------------

struct cublasContext {
    cudaStream_t stream = nullptr;
};
cublasStatus_t cublasCreate(cublasHandle_t* handle) {
    *handle = new cublasContext;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }

namespace {
float element(const void* of, cudaDataType type, size_t at) {
    return type == CUDA_R_32F ? static_cast<const float*>(of)[at] : __bfloat162float(static_cast<const __nv_bfloat16*>(of)[at]);
}
}  // namespace

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k, const void* alpha,
                            const void* a, cudaDataType a_type, int lda, const void* b, cudaDataType b_type, int ldb, const void* beta,
                            void* c, cudaDataType c_type, int ldc, cublasComputeType_t, cublasGemmAlgo_t) {
    if (m < 0 || n < 0 || k < 0 || lda < (op_a == CUBLAS_OP_N ? m : k) || ldb < (op_b == CUBLAS_OP_N ? k : n) || ldc < m || a_type != b_type)
        return CUBLAS_STATUS_INVALID_VALUE;
    float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
    submit(handle->stream, [=] {
        std::vector<float> column(k);
        for (int j = 0; j < n; ++j) {
            for (int p = 0; p < k; ++p) column[p] = element(b, b_type, op_b == CUBLAS_OP_N ? size_t(j) * ldb + p : size_t(p) * ldb + j);
            for (int i = 0; i < m; ++i) {
                float sum = 0;
                for (int p = 0; p < k; ++p) sum += element(a, a_type, op_a == CUBLAS_OP_N ? size_t(p) * lda + i : size_t(i) * lda + p) * column[p];
                size_t at = size_t(j) * ldc + i;
                float value = scale * sum + (keep == 0 ? 0 : keep * element(c, c_type, at));
                if (c_type == CUDA_R_32F) static_cast<float*>(c)[at] = value;
                else static_cast<__nv_bfloat16*>(c)[at] = __float2bfloat16_rn(value);
            }
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}
