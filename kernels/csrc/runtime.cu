// The few calls of CUDA's run time that the host needs, with its error codes as results.
#include "hm.cuh"

struct hm_device_properties {
    char name[256];
    int32_t major, minor;
    int32_t multiprocessors;
    int32_t l2_bytes;
    // As CUDA writes versions: 13000 is 13.0.
    int32_t driver, runtime;
    // Compute capability that the kernels were compiled for: 90 is 9.0.
    int32_t built_for;
    int32_t reserved;
    int64_t total_bytes;
};

namespace {

// What a call's own result says must not be said again by the next launch, which asks for the last error.
int told(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return int(error);
}

}  // namespace

extern "C" {

const char* hm_error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

// The versions of driver and run time, for whoever has to say why there is no device; 0 where there is no driver.
int hm_versions(int32_t* driver, int32_t* runtime) {
    int d = 0, r = 0;
    cudaError_t error = cudaDriverGetVersion(&d);
    if (error == cudaSuccess) error = cudaRuntimeGetVersion(&r);
    *driver = d;
    *runtime = r;
    return int(error);
}

int hm_device_open(int32_t ordinal, hm_device_properties* out) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) return int(error);
    if (ordinal < 0 || ordinal >= count) return int(cudaErrorInvalidValue);
    cudaDeviceProp properties;
    if ((error = cudaSetDevice(ordinal)) != cudaSuccess) return int(error);
    if ((error = cudaGetDeviceProperties(&properties, ordinal)) != cudaSuccess) return int(error);
    memset(out, 0, sizeof *out);
    memcpy(out->name, properties.name, sizeof out->name - 1);
    out->major = properties.major;
    out->minor = properties.minor;
    out->multiprocessors = properties.multiProcessorCount;
    out->l2_bytes = properties.l2CacheSize;
    out->total_bytes = int64_t(properties.totalGlobalMem);
    out->built_for = HM_BUILT_FOR;
    return hm_versions(&out->driver, &out->runtime);
}

// Freed memory stays with the process: what is asked for again is there without a call to the driver.
int hm_keep_freed_memory(int32_t ordinal) {
#ifdef HM_EMULATED
    (void)ordinal;
    return 0;
#else
    cudaMemPool_t pool;
    cudaError_t error = cudaDeviceGetDefaultMemPool(&pool, ordinal);
    if (error != cudaSuccess) return int(error);
    uint64_t all = UINT64_MAX;
    return int(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all));
#endif
}

// Gives freed memory back to the device, so that hm_memory counts it as free. Waits for the device.
int hm_release_freed_memory(int32_t ordinal) {
#ifdef HM_EMULATED
    (void)ordinal;
    return 0;
#else
    cudaError_t error = cudaDeviceSynchronize();
    cudaMemPool_t pool;
    if (error == cudaSuccess) error = cudaDeviceGetDefaultMemPool(&pool, ordinal);
    if (error == cudaSuccess) error = cudaMemPoolTrimTo(pool, 0);
    return told(error);
#endif
}

int hm_memory(int64_t* free_bytes, int64_t* total_bytes) {
    size_t free = 0, total = 0;
    cudaError_t error = cudaMemGetInfo(&free, &total);
    *free_bytes = int64_t(free);
    *total_bytes = int64_t(total);
    return int(error);
}

int hm_alloc(void** at, int64_t bytes, cudaStream_t stream) {
    return told(cudaMallocAsync(at, size_t(bytes), stream));
}
int hm_free(void* at, cudaStream_t stream) { return told(cudaFreeAsync(at, stream)); }
int hm_alloc_host(void** at, int64_t bytes) {
    return told(cudaMallocHost(at, size_t(bytes)));
}
int hm_free_host(void* at) { return told(cudaFreeHost(at)); }

int hm_copy(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
    return told(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, stream));
}
int hm_fill(void* at, int32_t byte, int64_t bytes, cudaStream_t stream) { return told(cudaMemsetAsync(at, byte, size_t(bytes), stream)); }
int hm_synchronize(cudaStream_t stream) { return told(cudaStreamSynchronize(stream)); }

int hm_stream_create(cudaStream_t* stream) { return int(cudaStreamCreate(stream)); }
int hm_stream_destroy(cudaStream_t stream) { return int(cudaStreamDestroy(stream)); }

int hm_capture_begin(cudaStream_t stream) { return told(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal)); }
// What was launched since the begin, ready to be launched again; nothing of it has run.
int hm_capture_end(cudaStream_t stream, void** out) {
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaStreamEndCapture(stream, &graph);
    if (error != cudaSuccess) return told(error);
    cudaGraphExec_t executable = nullptr;
    error = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    *out = error == cudaSuccess ? executable : nullptr;
    return told(error);
}
int hm_graph_launch(void* graph, cudaStream_t stream) { return told(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream)); }
int hm_graph_free(void* graph) { return told(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph))); }

int hm_event_create(void** out) {
    cudaEvent_t event = nullptr;
    cudaError_t error = cudaEventCreate(&event);
    *out = event;
    return int(error);
}
int hm_event_free(void* event) { return told(cudaEventDestroy(static_cast<cudaEvent_t>(event))); }
int hm_event_record(void* event, cudaStream_t stream) { return told(cudaEventRecord(static_cast<cudaEvent_t>(event), stream)); }
// Both have to have happened.
int hm_event_milliseconds(float* out, void* from, void* to) {
    return told(cudaEventElapsedTime(out, static_cast<cudaEvent_t>(from), static_cast<cudaEvent_t>(to)));
}
}
