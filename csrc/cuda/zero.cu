// SPDX-License-Identifier: MIT
// The second half of prune_: w = +0.0 where the mask is 0. A kernel of its own, because no weight
// may change before all of them have been read, ranked and found finite.
#include "tile.cuh"

namespace lap::cuda {
namespace {

struct ZeroArgs {
  void* w;
  const uint8_t* mask;  // [size], C order
  int64_t size;
  bool aligned;
  const Status* status;  // null: not asked to check
  int dims;              // strided weights only
  Divider shape[kMaxDims];
  int64_t stride[kMaxDims];
};

// Contiguous w. Thread: kPerThread elements of a tile, in vectors of 16 bytes: one that is dropped
// whole is written, one that is dropped in part is read and written whole (elements of their own
// would be as many writes), one that is kept is left alone. Bytes per element: 1 read; up to
// 2 sizeof(T), least where whole sectors go. Elements are independent: deterministic.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) zero_kernel(ZeroArgs args) {
  constexpr int V = kVector<T>;
  constexpr int kVectors = kPerThread / V;
  constexpr uint32_t kAll = (1u << V) - 1;
  if (!may_write(args.status)) return;
  T* w = static_cast<T*>(args.w);
  const int64_t tiles = ceil_div(args.size, kTile);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t begin = tile * kTile;
    const Reach reach = reach_of<T>(begin, args.size, args.aligned);
    const uint32_t kept = load_bytes<false, T>(args.mask + begin, reach);
    if (!reach.vectors) {
      LAP_UNROLL
      for (int e = 0; e < kPerThread; ++e) {
        const uint32_t offset = offset_of<T>(e);
        if (!((kept >> e) & 1) && offset < reach.count) w[begin + offset] = T{};
      }
      continue;
    }
    uint4 words[kVectors];
    LAP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t offset = offset_of<T>(v * V);
      const uint32_t bits = (kept >> (v * V)) & kAll;
      const bool in_part = bits != 0 && bits != kAll && offset < reach.count;
      words[v] = in_part ? load_once(w + begin + offset) : uint4{0, 0, 0, 0};
    }
    LAP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t offset = offset_of<T>(v * V);
      const uint32_t bits = (kept >> (v * V)) & kAll;
      if (bits == kAll || offset >= reach.count) continue;
      Pack<T> pack = bit_cast<Pack<T>>(words[v]);
      LAP_UNROLL
      for (int j = 0; j < V; ++j) {
        if (!((bits >> j) & 1)) pack.values[j] = T{};
      }
      *reinterpret_cast<uint4*>(w + begin + offset) = bit_cast<uint4>(pack);
    }
  }
}

// Any strides. Thread: one element of the flat C order; bytes as above, in whatever sectors the
// strides reach.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) zero_strided_kernel(ZeroArgs args) {
  if (!may_write(args.status)) return;
  T* w = static_cast<T*>(args.w);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.size; i += step) {
    if (args.mask[i] != 0) continue;
    int64_t rest = i;
    int64_t offset = 0;
    LAP_UNROLL
    for (int d = kMaxDims - 1; d >= 0; --d) {
      if (d >= args.dims) continue;
      const int64_t above = args.shape[d].quotient(rest);
      offset += (rest - above * static_cast<int64_t>(args.shape[d].divisor)) * args.stride[d];
      rest = above;
    }
    w[offset] = T{};
  }
}

}  // namespace

cudaError_t launch_zero(const Strided& w,
                        const uint8_t* mask,
                        bool check_finite,
                        const void* mask_workspace,
                        cudaStream_t stream) {
  if (w.size == 0) return cudaSuccess;
  ZeroArgs args = {};
  args.w = const_cast<void*>(w.data);
  args.mask = mask;
  args.size = w.size;
  args.aligned = aligned_for_vectors(w.data, item_size(w.dtype), mask, nullptr);
  args.status = check_finite ? static_cast<const Status*>(mask_workspace) : nullptr;
  args.dims = w.dims;
  for (int d = 0; d < w.dims; ++d) {
    args.shape[d] = Divider(w.shape[d]);
    args.stride[d] = w.stride[d];
  }
  const bool contiguous = w.contiguous();
  return with_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = contiguous ? zero_kernel<T> : zero_strided_kernel<T>;
    unsigned blocks = 0;
    const cudaError_t error =
        grid_for(kernel, ceil_div(w.size, contiguous ? kTile : kThreads), &blocks);
    return error != cudaSuccess ? error : launch(kernel, blocks, kThreads, stream, args);
  });
}

}  // namespace lap::cuda
