// SPDX-License-Identifier: MIT
// The scaling of norms by powers of two. Each of a layer's two vectors is divided by the 2^exponent
// that puts its largest entry into [0.5, 1): products cannot overflow then, and the scale drops out
// of every comparison.
#pragma once

#include <cmath>

#include "key.h"
#include "score.h"

namespace lap {

template <typename Float>
constexpr double kSmallestNormal = sizeof(Float) == 4 ? 0x1p-126 : 0x1p-1022;
template <typename Float>
constexpr int kExponentEnd = sizeof(Float) == 4 ? 128 : 1024;  // 2^kExponentEnd overflows

// The largest and the smallest entry that is positive and finite; both zero when there is none.
struct NormRange {
  double largest;
  double smallest;
};

LAP_HOST_DEVICE NormRange widest(NormRange a, NormRange b) {
  if (b.largest == 0) return a;
  if (a.largest == 0) return b;
  return {a.largest > b.largest ? a.largest : b.largest,
          a.smallest < b.smallest ? a.smallest : b.smallest};
}

// The range with one more entry in it. Infinity and NaN stay out: they rank by their bits.
LAP_HOST_DEVICE NormRange with(NormRange range, double norm) {
  return norm > 0 && is_finite(norm) ? widest(range, {norm, norm}) : range;
}

// x = m * 2^exponent with m in [0.5, 1); 0 for x = 0
LAP_HOST_DEVICE int exponent_of(double x) {
  int exponent = 0;
  if (x != 0) frexp(x, &exponent);
  return exponent;
}

// One entry, scaled. rounded: to the 24 bits of float scores, where it is a normal double.
LAP_HOST_DEVICE double scaled(double norm, int exponent, bool rounded) {
  const double x = ldexp(norm, -exponent);
  const bool normal = is_finite(x) && score_key(x) >= KeyTraits<int64_t>::kSmallestNormal;
  return rounded && normal ? round24(x) : x;
}

// What is known of the products of two scaled vectors.
struct Scale {
  int exponent;  // true product = scaled product * 2^exponent
  double least;  // the smallest product of two nonzero entries; 1 when there is none

  // Is the product of any two nonzero entries a normal number of Float? It is below 1; rounding can
  // lower it by two ulp, hence the margin of 4.
  template <typename Float>
  LAP_HOST_DEVICE bool normal() const {
    return least >= 4 * kSmallestNormal<Float>;
  }
  // ... times 2^shift?
  template <typename Float>
  LAP_HOST_DEVICE bool normal(int shift) const {
    return shift < kExponentEnd<Float> && ldexp(least, shift) >= 4 * kSmallestNormal<Float>;
  }
};

LAP_HOST_DEVICE Scale scale_of(NormRange row, NormRange col) {
  const int row_exponent = exponent_of(row.largest);
  const int col_exponent = exponent_of(col.largest);
  Scale scale = {row_exponent + col_exponent, 1};
  if (row.largest > 0 && col.largest > 0) {
    scale.least = product(ldexp(row.smallest, -row_exponent), ldexp(col.smallest, -col_exponent));
  }
  return scale;
}

}  // namespace lap
