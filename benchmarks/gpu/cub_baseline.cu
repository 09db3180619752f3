// SPDX-License-Identifier: MIT
// A rival: the mask of the `keep` largest scores by cub::DeviceRadixSort of (score, index) pairs.
// Called through ctypes (cub.py); device pointers, sizes below 2^31, a stream.
#include <cub/device/device_radix_sort.cuh>

#include <cstdint>

namespace {

constexpr int kThreads = 256;
constexpr int64_t kAlignment = 256;

int64_t padded(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

__global__ void count_up(int32_t* index, int32_t n) {
  const int32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < n) index[i] = i;
}

__global__ void set(const int32_t* index, int32_t keep, uint8_t* mask) {
  const int32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < keep) mask[index[i]] = 1;
}

unsigned blocks(int64_t n) {
  return static_cast<unsigned>((n + kThreads - 1) / kThreads);
}

size_t sort_bytes(int32_t n) {
  size_t bytes = 0;
  const float* keys = nullptr;
  float* sorted = nullptr;
  const int32_t* in = nullptr;
  int32_t* out = nullptr;
  cub::DeviceRadixSort::SortPairsDescending(nullptr, bytes, keys, sorted, in, out, n);
  return bytes;
}

}  // namespace

extern "C" int64_t lap_radix_workspace(int64_t n) {
  return 3 * padded(4 * n) + padded(static_cast<int64_t>(sort_bytes(static_cast<int32_t>(n))));
}

extern "C" int lap_radix_mask(const float* scores,
                              int64_t n,
                              int64_t keep,
                              uint8_t* mask,
                              void* workspace,
                              int64_t workspace_bytes,
                              void* stream_handle) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  char* room = static_cast<char*>(workspace);
  float* sorted = reinterpret_cast<float*>(room);
  int32_t* in = reinterpret_cast<int32_t*>(room + padded(4 * n));
  int32_t* out = reinterpret_cast<int32_t*>(room + 2 * padded(4 * n));
  size_t bytes = static_cast<size_t>(workspace_bytes - 3 * padded(4 * n));
  count_up<<<blocks(n), kThreads, 0, stream>>>(in, static_cast<int32_t>(n));
  cudaError_t error = cub::DeviceRadixSort::SortPairsDescending(
      room + 3 * padded(4 * n), bytes, scores, sorted, in, out, static_cast<int32_t>(n), 0, 32,
      stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(mask, 0, static_cast<size_t>(n), stream);
  if (error != cudaSuccess || keep == 0) return error;
  set<<<blocks(keep), kThreads, 0, stream>>>(out, static_cast<int32_t>(keep), mask);
  return cudaGetLastError();
}
