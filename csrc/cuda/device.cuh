// SPDX-License-Identifier: MIT
// What every kernel shares: block sizes, launching, exact division, reductions of a block.
// Under LAP_EMULATED the same sources compile with g++ and run on emulated threads (tests/cpp),
// with small sizes (LAP_SMALL) unless LAP_REAL_SIZES is defined.
#pragma once

#include "../math/half.h"
#include "../math/key.h"
#include "../math/score.h"
#include "launch.h"

#if defined(LAP_EMULATED)
#if !defined(LAP_REAL_SIZES)
#define LAP_SMALL
#endif
#define LAP_UNROLL
#define LAP_NO_UNROLL
#define LAP_SHARED(type, name) LAP_EMULATED_SHARED(type, name)
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#define LAP_UNROLL _Pragma("unroll")
#define LAP_NO_UNROLL _Pragma("unroll 1")
#define LAP_SHARED(type, name) __shared__ type name
#endif

namespace lap::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffff;
#if defined(LAP_SMALL)  // so that small tests cross every boundary
constexpr int kThreads = 64;
constexpr int kNormThreads = 128;
#else
constexpr int kThreads = 256;
constexpr int kNormThreads = 512;  // of the kernels that scale norms
#endif
constexpr int kResident = 2;  // blocks of a processor: 128 registers a thread, so nothing spills
// Loads that a thread has under way before it uses the first.
constexpr int kInFlight = 8;

using Count = unsigned long long;  // what 64-bit atomics take

__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarp;
}

// --- launching --------------------------------------------------------------------------------

inline cudaError_t processors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Blocks of `threads` for `work` blocks' worth of work: no more than the device holds of this
// kernel at once (kernels stride; a block more would wait for a whole turn of the others).
template <typename... Params>
cudaError_t grid_for(void (*kernel)(Params...),
                     int64_t work,
                     unsigned* blocks,
                     int threads = kThreads) {
  int count = 0;
  cudaError_t error = processors(&count);
  if (error != cudaSuccess) return error;
#if defined(LAP_EMULATED)
  (void)kernel;
  (void)threads;
  int per_processor = 1;
#else
  int per_processor = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0);
  error = cudaGetLastError();  // and clears it
  if (error != cudaSuccess) return error;
#endif
  const int64_t most = int64_t{count} * per_processor;
  *blocks = static_cast<unsigned>(work < 1 ? 1 : work < most ? work : most);
  return error;
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...),
                   unsigned blocks,
                   int threads,
                   cudaStream_t stream,
                   const Args&... args) {
#if defined(LAP_EMULATED)
  emulator::launch(blocks, threads, stream, [&] { kernel(args...); });
#else
  // clang-format off: it takes <<< for two operators
  kernel<<<blocks, threads, 0, stream>>>(args...);
  // clang-format on
#endif
  return cudaGetLastError();
}

// With blocks of kThreads, for kernels that stride over `threads` threads' worth of work.
template <typename... Params, typename... Args>
cudaError_t launch_over(int64_t threads,
                        void (*kernel)(Params...),
                        cudaStream_t stream,
                        const Args&... args) {
  unsigned blocks = 0;
  const cudaError_t error = grid_for(kernel, ceil_div(threads, kThreads), &blocks);
  return error != cudaSuccess ? error : launch(kernel, blocks, kThreads, stream, args...);
}

// As many blocks as grid_for, and they are on the device at once, so that grid_sync() works.
template <typename Param>
cudaError_t launch_together(
    void (*kernel)(Param), int64_t work, cudaStream_t stream, Param param, int threads = kThreads) {
  unsigned blocks = 0;
  const cudaError_t error = grid_for(kernel, work, &blocks, threads);
  if (error != cudaSuccess) return error;
  if (blocks == 1) return launch(kernel, 1, threads, stream, param);
#if defined(LAP_EMULATED)
  emulator::launch_together(blocks, threads, stream, [&] { kernel(param); });
  return cudaGetLastError();
#else
  void* params[] = {&param};
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(threads), params, 0, stream);
  return cudaGetLastError();  // and clears it, so that no later launch reports it
#endif
}

// Waits for all blocks of launch_together; one alone need not.
__device__ inline void grid_sync() {
  if (gridDim.x == 1) return __syncthreads();
#if defined(LAP_EMULATED)
  emulator::grid_sync();
#else
  cooperative_groups::this_grid().sync();
#endif
}

// True in all threads of the block that is the last to call this; it sees what the others have
// written. *arrived is 0 at first.
__device__ inline bool last_block(uint32_t* arrived) {
  LAP_SHARED(bool, last);
  __threadfence();  // what this thread has written is seen before the block arrives
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// Calls run(T{}) with the element type of dtype.
template <typename Run>
cudaError_t with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::f16:
      return run(Half{});
    case DType::bf16:
      return run(BFloat16{});
    case DType::f64:
      return run(double{});
  }
  return cudaErrorInvalidValue;
}

// --- workspace --------------------------------------------------------------------------------

// Divides a workspace into aligned arrays; with a null base it only measures.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* taken = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    constexpr size_t kAlignment = 256;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// --- arithmetic -------------------------------------------------------------------------------

// n / d for 0 <= n < 2^63 without a division (Granlund and Montgomery 1994):
//   l = ceil(log2 d);  m = floor(2^64 (2^l - d) / d) + 1;  n / d = (high64(m n) + n) >> l
struct Divider {
  uint64_t divisor = 1;
  uint64_t multiplier = 1;
  int shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(static_cast<uint64_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const unsigned __int128 over = (uint64_t{1} << shift) - divisor;
    multiplier = static_cast<uint64_t>((over << 64) / divisor) + 1;
  }
  __device__ int64_t quotient(int64_t n) const {
    const uint64_t x = static_cast<uint64_t>(n);
    return static_cast<int64_t>((high64(multiplier, x) + x) >> shift);
  }
};

// The same for 0 <= n < 2^31 and 1 <= d <= 2^30: one multiplication of 32 bits.
struct NarrowDivider {
  static constexpr int64_t kMost = int64_t{1} << 30;
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  int shift = 0;

  NarrowDivider() = default;
  explicit NarrowDivider(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint32_t{1} << shift) < divisor) ++shift;
    const uint64_t over = (uint32_t{1} << shift) - divisor;
    multiplier = static_cast<uint32_t>((over << 32) / divisor) + 1;
  }
  __device__ uint32_t quotient(uint32_t n) const {
    const uint64_t high = (uint64_t{multiplier} * n) >> 32;
    return (static_cast<uint32_t>(high) + n) >> shift;
  }
};

// --- a block's reductions: every thread of the block calls them --------------------------------

constexpr int kMostWarps = 32;

template <typename T>
struct WarpValues {
  T values[kMostWarps];
};

template <typename T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
  return value;  // in lane 0
}

// Sum of the values of the lanes up to this one, itself included.
template <typename T>
__device__ T warp_inclusive_sum(T value) {
  for (int step = 1; step < kWarp; step *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step) value += other;
  }
  return value;
}

// Sum of the lanes' values, in all lanes.
__device__ inline int warp_total(int value) {
#if defined(LAP_EMULATED)
  return __shfl_sync(kAllLanes, warp_sum(value), 0);
#else
  return __reduce_add_sync(kAllLanes, value);
#endif
}

// What the lanes of a warp have written to shared memory is seen by all of them.
__device__ inline void warp_sync() {
#if defined(LAP_EMULATED)
  __shfl_sync(kAllLanes, 0, 0);
#else
  __syncwarp();
#endif
}

// Sum of the values of the threads before this one; *total is the sum of all.
template <typename T>
__device__ T block_exclusive_sum(T value, T* total) {
  LAP_SHARED(WarpValues<T>, warps);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int count = static_cast<int>(blockDim.x) / kWarp;
  const T inclusive = warp_inclusive_sum(value);
  __syncthreads();  // the previous call's readers are done
  if (lane_id() == kWarp - 1) warps.values[warp] = inclusive;
  __syncthreads();
  const T all = warp_inclusive_sum(lane_id() < count ? warps.values[lane_id()] : T{0});
  *total = __shfl_sync(kAllLanes, all, count - 1);
  const T before = __shfl_sync(kAllLanes, all, warp == 0 ? 0 : warp - 1);
  return (warp == 0 ? T{0} : before) + inclusive - value;
}

// Notes bad values of one tensor; reached only when there are some.
__device__ inline void note_bad(Count* bad_count,
                                Count* first_inverted,
                                int count,
                                int64_t first_index) {
  atomicAdd(bad_count, static_cast<Count>(count));
  atomicMax(first_inverted, ~static_cast<Count>(first_index));
}

// May a kernel change what it was given? status: of the run before it; null: it did not check.
__device__ inline bool may_write(const Status* status) {
  return status == nullptr || (status->bad_count == 0 && status->out_of_range == 0 &&
                               status->norm_inverted[0] == 0 && status->norm_inverted[1] == 0);
}

// NaN from the first value on that is not finite, else zero: one operation a value, where a test
// takes three. The compiler must not fold x * 0.
__device__ inline float trap(float x, float trapped) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(x, 0.0f, trapped);
#else
  return x * 0.0f + trapped;
#endif
}
__device__ inline double trap(double x, double trapped) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(x, 0.0, trapped);
#else
  return x * 0.0 + trapped;
#endif
}

}  // namespace lap::cuda
