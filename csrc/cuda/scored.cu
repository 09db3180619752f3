// SPDX-License-Identifier: MIT
// What is done with the norms before the kernels of structures read them.
#include "scored.cuh"

namespace lap::cuda {
namespace {

constexpr double kLeastNear = 0x1p-60;  // products of two such norms are normal floats
constexpr double kMostNear = 0x1p60;

struct NarrowArgs {
  Norms norms;
  int64_t rows;
  int64_t channels;
  float* row_narrow;
  float* col_narrow;
  uint32_t* far;
  Status* status;
};

// Rounds the norms to floats, and checks them. Thread: one norm; reads 8 bytes, writes 4.
__global__ void __launch_bounds__(kThreads, kResident) narrow_kernel(NarrowArgs args) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t count = args.rows + args.channels;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    const bool col = i >= args.rows;
    const int64_t at = col ? i - args.rows : i;
    const double norm = (col ? args.norms.col : args.norms.row)[at];
    if (args.far != nullptr) {
      (col ? args.col_narrow : args.row_narrow)[at] = static_cast<float>(norm);
      const bool near = norm == 0 || (norm >= kLeastNear && norm <= kMostNear);
      if (!near) atomicMax(args.far, uint32_t{1});
    }
    const bool bad = bit_cast<uint64_t>(norm) >= KeyTraits<int64_t>::kInfinity && norm != 0;
    if (bad && args.status != nullptr) {
      atomicMax(args.status->norm_inverted + (col ? 1 : 0), ~static_cast<Count>(at));
    }
  }
}

}  // namespace

cudaError_t prepare_scored(const Weight& w,
                           const Norms& norms,
                           bool check_finite,
                           const ScoredSpace& space,
                           cudaStream_t stream,
                           Scored* out) {
  const bool narrow = norms.given() && w.dtype != DType::f64;
  Status* status = check_finite ? space.status : nullptr;
  *out = {w.data, norms, space.row_narrow, space.col_narrow, narrow ? space.far : nullptr, status};
  cudaError_t error = cudaMemsetAsync(space.status, 0, sizeof(Status), stream);
  if (error != cudaSuccess || !norms.given()) return error;
  error = cudaMemsetAsync(space.far, 0, sizeof(uint32_t), stream);
  const int64_t count = w.layout.rows + w.layout.channels();
  if (error != cudaSuccess || count == 0 || (!narrow && !check_finite)) return error;
  const NarrowArgs args = {norms,
                           w.layout.rows,
                           w.layout.channels(),
                           space.row_narrow,
                           space.col_narrow,
                           narrow ? space.far : nullptr,
                           status};
  return launch_over(count, narrow_kernel, stream, args);
}

}  // namespace lap::cuda
