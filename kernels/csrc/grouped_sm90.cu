// Grouped GEMM of experts on Hopper: CUTLASS's persistent, warp-specialised pointer-array kernels (TMA loads, wgmma, TMA stores) over problems
// whose sizes and pointers are on the device, so the host launches it without knowing how many rows an expert has. See grouped_problems.cuh
// for the transposition. A run enqueues two kernels on the stream; it neither allocates nor waits, and can be captured in a graph.
//
// Four variants by the rows of x in a tile, each with 128 rows of w: 32 and 64 for experts with few rows, where the weights' way from memory
// is the limit and the small tiles leave shared memory for 8 and more stages; 128 in ping-pong (one warp group multiplies while the other
// stores) and 256 with two warp groups on one tile, both in clusters of two that load their rows of x once by multicast.
//
// SiLU-mul is no epilogue of this kernel: gate and up of a feature are F rows of w apart, hence in different tiles. An epilogue needs weights
// interleaved for this kernel alone, or a second operand per tile; see silu_mul in experts_parts.cu.

// With assertions the kernels call a function, and ptxas then serialises their wgmma instructions (its remark C7510).
#ifndef NDEBUG
#define NDEBUG
#endif

#include "grouped_problems.cuh"

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#ifndef CUTLASS_ARCH_MMA_MODIFIABLE_TMA_SM90_SUPPORTED
#error "grouped_sm90.cu needs CUDA 12.3 or later: it modifies TMA descriptors on the device"
#endif

namespace {

using cute::_0;
using cute::_1;
using cute::_2;
using cute::_64;
using cute::_128;
using cute::Int;
using cute::Shape;

using Element = cutlass::bfloat16_t;
using Problem = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;  // n, rows, k
using KMajor = cutlass::layout::RowMajor;                                // w [n, k]
using KMajorTransposed = cutlass::layout::ColumnMajor;                   // x [rows, k] as [k, rows]
using RowsTransposed = cutlass::layout::ColumnMajor;                     // y [rows, n] as [n, rows]
constexpr int ALIGNMENT = 8;                                             // elements in 16 bytes

struct PingPong {
    using Kernel = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
    using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};
struct Cooperative {
    using Kernel = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
    using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};

template <int TileRows, typename Schedule, typename Cluster>
struct Variant {
    using Tile = Shape<_128, Int<TileRows>, _64>;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
        RowsTransposed*, ALIGNMENT, Element, RowsTransposed*, ALIGNMENT, typename Schedule::Epilogue>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, KMajor*, ALIGNMENT, Element, KMajorTransposed*, ALIGNMENT, float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>, typename Schedule::Kernel>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    // CUTLASS counts stages without all that is beside them in shared memory, and would fail only when it is launched.
    static_assert(Kernel::SharedStorageSize <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes, "fewer stages, or a smaller tile");

    // fill_problems writes these as plain numbers: a shape is three, and of the strides of each operand one is no constant.
    using RowsApart = cute::Stride<int64_t, _1, _0>;
    using ColumnsApart = cute::Stride<_1, int64_t, _0>;
    static_assert(sizeof(typename Problem::UnderlyingProblemShape) == 3 * sizeof(int32_t));
    static_assert(sizeof(RowsApart) == sizeof(int64_t) && sizeof(ColumnsApart) == sizeof(int64_t));
    static_assert(cute::is_same_v<typename Kernel::InternalStrideA, RowsApart>, "w [n, k]");
    static_assert(cute::is_same_v<typename Kernel::InternalStrideB, RowsApart>, "x [rows, k], which is how CUTLASS writes the second operand");
    static_assert(cute::is_same_v<typename Kernel::InternalStrideD, ColumnsApart>, "y [rows, n] as [n, rows]");

    static typename Gemm::Arguments arguments(const grouped::Problems& problems, int32_t experts, int32_t multiprocessors) {
        typename Gemm::Arguments arguments{};
        arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
        arguments.problem_shape = {experts, reinterpret_cast<typename Problem::UnderlyingProblemShape*>(problems.shapes), nullptr};
        arguments.mainloop.ptr_A = reinterpret_cast<const Element**>(problems.w);
        arguments.mainloop.dA = reinterpret_cast<RowsApart*>(problems.w_strides);
        arguments.mainloop.ptr_B = reinterpret_cast<const Element**>(problems.x);
        arguments.mainloop.dB = reinterpret_cast<RowsApart*>(problems.x_strides);
        arguments.epilogue.thread.alpha = 1.0f;
        arguments.epilogue.thread.beta = 0.0f;
        arguments.epilogue.ptr_D = reinterpret_cast<Element**>(problems.y);
        arguments.epilogue.dD = reinterpret_cast<ColumnsApart*>(problems.y_strides);
        arguments.hw_info.sm_count = multiprocessors;
        return arguments;
    }

    static int64_t workspace(int32_t experts, int32_t multiprocessors) {
        return int64_t(Gemm::get_workspace_size(arguments(grouped::Problems{}, experts, multiprocessors)));
    }

    static int run(const hm_grouped_args& args, cudaStream_t stream) {
        int64_t tables = grouped::problems_bytes(args.experts);
        if (args.workspace_bytes < tables + workspace(args.experts, args.multiprocessors)) return cudaErrorInvalidValue;
        grouped::Problems problems = grouped::problems_at(args.workspace, args.experts);
        typename Gemm::Arguments arguments = Variant::arguments(problems, args.experts, args.multiprocessors);
        if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return cudaErrorNotSupported;
        grouped::launch_fill(problems, args, stream);
        Gemm gemm;
        cutlass::Status status = gemm.run(arguments, static_cast<char*>(args.workspace) + tables, stream);
        int error = hm_check();
        return error == cudaSuccess && status != cutlass::Status::kSuccess ? int(cudaErrorUnknown) : error;
    }
};

using Rows32 = Variant<32, PingPong, Shape<_1, _1, _1>>;
using Rows64 = Variant<64, PingPong, Shape<_1, _1, _1>>;
using Rows128 = Variant<128, PingPong, Shape<_2, _1, _1>>;
using Rows256 = Variant<256, Cooperative, Shape<_2, _1, _1>>;

}  // namespace

int64_t hm_grouped_sm90_workspace(int32_t experts, int32_t multiprocessors) {
    int64_t most = 0;
    for (int64_t bytes : {Rows32::workspace(experts, multiprocessors), Rows64::workspace(experts, multiprocessors), Rows128::workspace(experts, multiprocessors),
                          Rows256::workspace(experts, multiprocessors)})
        most = bytes > most ? bytes : most;
    return grouped::problems_bytes(experts) + most;
}

int hm_grouped_sm90(const hm_grouped_args* args, cudaStream_t stream) {
    bool aligned = reinterpret_cast<uintptr_t>(args->workspace) % grouped::TABLE_ALIGNMENT == 0;
    if (!hm_grouped_valid(*args) || !aligned) return cudaErrorInvalidValue;
    if (args->max_rows == 0) return cudaSuccess;
    switch (args->tile_rows) {
        case 32: return Rows32::run(*args, stream);
        case 64: return Rows64::run(*args, stream);
        case 128: return Rows128::run(*args, stream);
        case 256: return Rows256::run(*args, stream);
        default: return cudaErrorInvalidValue;
    }
}
