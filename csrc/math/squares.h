// SPDX-License-Identifier: MIT
// The square of a score in units of 2^-60, whose sums are integers: neither the order nor the
// chunks in which scores come matter (lap_ext/pruning/normalization.py).
//
//   q = (score * 2^-exponent)^2 in double, below 1 where score < 2^exponent
//   floor(q * 2^60) = upper * 2^30 + lower
//
// Each part is below 2^30, so that conversions to 32 bits, which all levels have, truncate them.
// All but q itself is exact: products with powers of two, and the rest of a truncation.
#pragma once

#include <cmath>

#include "score.h"

namespace lap {

// Divides scores by 2^exponent in two steps, whose factors are within double's range.
struct SquareScale {
  double first;
  double second;

  LAP_HOST_DEVICE explicit SquareScale(int exponent) {
    const int half = (exponent - (exponent < 0 && exponent % 2 != 0)) / 2;  // rounded down
    first = ldexp(1.0, -half);
    second = ldexp(1.0, half - exponent);
  }
};

struct SquareParts {
  int32_t upper;
  int32_t lower;
};

// Of 0 <= score < 2^exponent.
LAP_HOST_DEVICE SquareParts square_parts(double score, const SquareScale& scale) {
  const double scaled = product(product(score, scale.first), scale.second);
  const double units = product(product(scaled, scaled), 0x1p30);
  const int32_t upper = static_cast<int32_t>(units);
  return {upper, static_cast<int32_t>(product(units - upper, 0x1p30))};
}

}  // namespace lap
