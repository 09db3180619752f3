// SPDX-License-Identifier: MIT
// The selection's kernels for weights whose vectors of 16 bytes lie in rows: nearly all large ones.
// See select.cuh.
#include "select_kernels.cuh"

namespace lap::cuda {

cudaError_t launch_row_steps(DType dtype, const SelectArgs& args, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Key = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;
    return launch_steps<T, WeightKeys<T, Key, true>>(args, stream);
  });
}

}  // namespace lap::cuda
