// SPDX-License-Identifier: MIT
// Which elements a sample of m out of `size` reads: one in each of m equal chunks, at a hashed
// place, so that no pattern in the data can hide from it and every run reads the same ones.
//
//   step = floor(2^64 / m);  f = i * step + hash(i) * step / 2^64;  position = f * size / 2^64
#pragma once

#include "random.h"

namespace lap {

LAP_HOST_DEVICE uint64_t hash(int64_t i) {
  return mixed((static_cast<uint64_t>(i) + 1) * kGolden);
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
