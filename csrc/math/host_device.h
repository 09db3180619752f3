// SPDX-License-Identifier: MIT
// Makes the formulas of csrc/math compile for g++ and nvcc alike.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LAP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LAP_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace lap {

// Reads the bits of one type as another of the same size (std::bit_cast is C++20).
template <typename To, typename From>
LAP_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

LAP_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The upper half of a product of 128 bits.
LAP_HOST_DEVICE uint64_t high64(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

}  // namespace lap
