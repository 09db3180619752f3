// SPDX-License-Identifier: MIT
// The selection's kernels for ready scores (topk_mask, kth_largest): see select.cuh.
#include "select_kernels.cuh"

namespace lap::cuda {

cudaError_t launch_score_steps(DType dtype, const SelectArgs& args, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch_steps<T, ScoreKeys<T>>(args, stream);
  });
}

}  // namespace lap::cuda
