// grouped_sm90.cu on the processor: the same tables, filled by the same kernel, and plain loops over what they say in place of CUTLASS.
#include "grouped_problems.cuh"

#include <vector>

namespace {

// As many bytes as CUTLASS wants for its descriptors: two for operands and two for results per multiprocessor.
constexpr int64_t DESCRIPTOR_BYTES = 128;
int64_t descriptors_bytes(int32_t multiprocessors) { return grouped::padded(4 * DESCRIPTOR_BYTES * multiprocessors); }

void widen_row(const bf16* from, int32_t count, std::vector<float>& to) {
    to.resize(count);
    for (int32_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

float dot(const float* a, const bf16* b, int32_t count) {
    float sums[8] = {};  // count is a multiple of 8
    for (int32_t i = 0; i < count; i += 8)
        for (int32_t lane = 0; lane < 8; ++lane) sums[lane] += a[i + lane] * widen(b[i + lane]);
    float sum = 0;
    for (float part : sums) sum += part;
    return sum;
}

// One block of one thread per expert.
void multiply(grouped::Problems problems) {
    int expert = blockIdx.x;
    const int32_t* shape = problems.shapes + 3 * expert;
    std::vector<float> x;
    for (int32_t row = 0; row < shape[1]; ++row) {
        widen_row(problems.x[expert] + row * problems.x_strides[expert], shape[2], x);
        bf16* y = problems.y[expert] + row * problems.y_strides[expert];
        for (int32_t column = 0; column < shape[0]; ++column)
            y[column] = narrow<bf16>(dot(x.data(), problems.w[expert] + column * problems.w_strides[expert], shape[2]));
    }
}

}  // namespace

int64_t hm_grouped_sm90_workspace(int32_t experts, int32_t multiprocessors) { return grouped::problems_bytes(experts) + descriptors_bytes(multiprocessors); }

int hm_grouped_sm90(const hm_grouped_args* args, cudaStream_t stream) {
    bool tile = args->tile_rows == 32 || args->tile_rows == 64 || args->tile_rows == 128 || args->tile_rows == 256;
    bool aligned = reinterpret_cast<uintptr_t>(args->workspace) % grouped::TABLE_ALIGNMENT == 0;
    if (!hm_grouped_valid(*args) || !aligned || !tile) return cudaErrorInvalidValue;
    if (args->workspace_bytes < hm_grouped_sm90_workspace(args->experts, args->multiprocessors)) return cudaErrorInvalidValue;
    if (args->max_rows == 0) return cudaSuccess;
    grouped::Problems problems = grouped::problems_at(args->workspace, args->experts);
    grouped::launch_fill(problems, *args, stream);
    HM_LAUNCH((multiply), dim3(unsigned(args->experts)), dim3(1), 0, stream, problems);
    return hm_check();
}
