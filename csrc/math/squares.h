// SPDX-License-Identifier: MIT
// The square of a score in units of 2^-60, whose sums are integers: neither the order nor the
// chunks in which scores come matter (lap_ext/ops/reference/chunks.py).
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

// Computes q * 2^30. 2^15 is in the second of the factors of 2^-exponent, which are within double's
// range: the bits are those of q, but where q underflows, and both parts are 0.
struct SquareScale {
  double first;
  double second;

  LAP_HOST_DEVICE explicit SquareScale(int exponent) {
    const int half = exponent / 2;
    first = ldexp(1.0, -half);
    second = ldexp(1.0, half - exponent + 15);
  }
  LAP_HOST_DEVICE double operator()(double score) const {
    const double scaled = product(product(score, first), second);
    return product(scaled, scaled);
  }
};

struct SquareParts {
  int32_t upper;
  int32_t lower;

  LAP_HOST_DEVICE explicit SquareParts(double q30)  // q * 2^30
      : upper(static_cast<int32_t>(q30)),
        lower(static_cast<int32_t>(product(q30 - upper, 0x1p30))) {}
};

}  // namespace lap
