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

}  // namespace lap
