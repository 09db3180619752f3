// SPDX-License-Identifier: MIT
// Which elements a sample of m out of `size` reads: one in each of m equal chunks, at a hashed
// place, so that no pattern in the data can hide from it and every run reads the same ones.
//
//   step = floor(2^64 / m);  f = i * step + hash(i) * step / 2^64;  position = f * size / 2^64
#pragma once

#include "host_device.h"

namespace lap {

// The i-th number of the generator splitmix64.
LAP_HOST_DEVICE uint64_t hash(int64_t i) {
  uint64_t x = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct SamplePositions {
  uint64_t step = 0;
  uint64_t size = 0;

  SamplePositions() = default;
  SamplePositions(int64_t m, int64_t of)  // 2 <= m
      : step((0 - static_cast<uint64_t>(m)) / static_cast<uint64_t>(m) + 1),
        size(static_cast<uint64_t>(of)) {}

  // Position i, 0 <= i < m. Positions do not fall.
  LAP_HOST_DEVICE int64_t operator()(int64_t i) const {
    const uint64_t fraction = static_cast<uint64_t>(i) * step + high64(hash(i), step);
    return static_cast<int64_t>(high64(fraction, size));
  }
};

}  // namespace lap
