// Dense products through cuBLAS.
#include "hm.cuh"

#include <cublas_v2.h>

struct hm_linear_args {
    const void* x;       // [rows, k]
    const void* weight;  // [n, k]
    void* y;             // [rows, n]; row r begins at r * y_stride
    int64_t y_stride;
    int32_t rows, n, k;
    int32_t input_f32;   // x and weight are f32; else bf16
    int32_t output_f32;  // y is f32; else bf16
    int32_t add;         // to what is in y
};

extern "C" {

int hm_blas_create(void** out, void* workspace, int64_t workspace_bytes, cudaStream_t stream) {
    cublasHandle_t handle = nullptr;
    if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS) return int(cudaErrorMemoryAllocation);
    *out = handle;
    cublasStatus_t status = cublasSetStream(handle, stream);
    // After the stream: setting that takes the workspace away. One of its own is what lets products be captured.
    if (status == CUBLAS_STATUS_SUCCESS) status = cublasSetWorkspace(handle, workspace, size_t(workspace_bytes));
    return status == CUBLAS_STATUS_SUCCESS ? 0 : int(cudaErrorInvalidValue);
}
int hm_blas_set_stream(void* handle, void* workspace, int64_t workspace_bytes, cudaStream_t stream) {
    cublasStatus_t status = cublasSetStream(static_cast<cublasHandle_t>(handle), stream);
    if (status == CUBLAS_STATUS_SUCCESS) status = cublasSetWorkspace(static_cast<cublasHandle_t>(handle), workspace, size_t(workspace_bytes));
    return status == CUBLAS_STATUS_SUCCESS ? 0 : int(cudaErrorInvalidValue);
}
int hm_blas_destroy(void* handle) { return cublasDestroy(static_cast<cublasHandle_t>(handle)) == CUBLAS_STATUS_SUCCESS ? 0 : int(cudaErrorInvalidValue); }

// y = x weight^T. cuBLAS counts columns first: to it this is y^T [n, rows] = weight [n, k] x^T [k, rows].
int hm_linear(void* handle, const hm_linear_args* args) {
    float one = 1.0f, keep = args->add ? 1.0f : 0.0f;
    cudaDataType input = args->input_f32 ? CUDA_R_32F : CUDA_R_16BF, output = args->output_f32 ? CUDA_R_32F : CUDA_R_16BF;
    cublasStatus_t status = cublasGemmEx(static_cast<cublasHandle_t>(handle), CUBLAS_OP_T, CUBLAS_OP_N, args->n, args->rows, args->k, &one, args->weight,
                                         input, args->k, args->x, input, args->k, &keep, args->y, output, int(args->y_stride), CUBLAS_COMPUTE_32F,
                                         CUBLAS_GEMM_DEFAULT);
    return status == CUBLAS_STATUS_SUCCESS ? 0 : int(cudaErrorInvalidValue);
}
}
