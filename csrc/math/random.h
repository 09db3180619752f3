// SPDX-License-Identifier: MIT
// The numbers of the generator splitmix64 (Steele et al., "Fast splittable pseudorandom number
// generators", OOPSLA 2014): number i follows from i alone.
#pragma once

#include "host_device.h"

namespace lap {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio

// Number i of the generator that starts at s is mixed(s + i * kGolden).
LAP_HOST_DEVICE uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// In (0, 1], from the upper 24 bits: exact in float.
template <typename Float>
LAP_HOST_DEVICE Float random_score(uint64_t x) {
  const int32_t upper = static_cast<int32_t>(mixed(x) >> 40);
  return static_cast<Float>(upper + 1) * static_cast<Float>(0x1p-24);
}

}  // namespace lap
