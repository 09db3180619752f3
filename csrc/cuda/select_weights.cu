// SPDX-License-Identifier: MIT
// The selection's kernels for weights of any shape and alignment, scored on the fly (mask, prune_):
// see select.cuh.
#include "select_kernels.cuh"

namespace lap::cuda {

cudaError_t launch_weight_steps(DType dtype, const SelectArgs& args, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Key = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;
    return launch_steps<T, WeightKeys<T, Key, false>>(args, stream);
  });
}

}  // namespace lap::cuda
