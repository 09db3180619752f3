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

// Bits of the largest and of the smallest entry that is positive and finite: positive numbers sort
// as their bits do, and integers need no branches. 0 and kNone when there is none.
struct NormRange {
  static constexpr uint64_t kNone = ~uint64_t{0};
  uint64_t largest;
  uint64_t smallest;

  LAP_HOST_DEVICE static NormRange none() { return {0, kNone}; }
  LAP_HOST_DEVICE bool any() const { return largest != 0; }
};

LAP_HOST_DEVICE NormRange widest(NormRange a, NormRange b) {
  return {a.largest > b.largest ? a.largest : b.largest,
          a.smallest < b.smallest ? a.smallest : b.smallest};
}

// The range with one more entry in it. Infinity and NaN stay out: they rank by their bits.
LAP_HOST_DEVICE NormRange with(NormRange range, double norm) {
  const uint64_t bits = bit_cast<uint64_t>(norm);
  const bool counts = bits - 1 < uint64_t{KeyTraits<int64_t>::kInfinity} - 1;
  return widest(range, counts ? NormRange{bits, bits} : NormRange::none());
}

// largest = m * 2^exponent with m in [0.5, 1); 0 when there is none
LAP_HOST_DEVICE int exponent_of(NormRange range) {
  int exponent = 0;
  if (range.any()) frexp(bit_cast<double>(range.largest), &exponent);
  return exponent;
}

// Divides by 2^exponent, -1073 <= exponent <= 1024, in two factors: 2^-exponent itself can be too
// large for a double. One of the products is exact, so the quotient is rounded once.
struct ScaleBy {
  double first;
  double second;

  LAP_HOST_DEVICE explicit ScaleBy(int exponent) {
    const int beyond = -exponent > 1000 ? -exponent - 1000 : 0;
    first = ldexp(1.0, -exponent - beyond);
    second = ldexp(1.0, beyond);
  }
  // One entry, scaled. rounded: to the 24 bits of float scores, where it is a normal double.
  LAP_HOST_DEVICE double operator()(double norm, bool rounded) const {
    const double x = product(product(norm, first), second);
    constexpr uint64_t kLeast = KeyTraits<int64_t>::kSmallestNormal;
    constexpr uint64_t kSpan = uint64_t{KeyTraits<int64_t>::kInfinity} - kLeast;
    const bool normal = static_cast<uint64_t>(score_key(x)) - kLeast < kSpan;
    return rounded && normal ? round24(x) : x;
  }
};

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
  const int row_exponent = exponent_of(row);
  const int col_exponent = exponent_of(col);
  Scale scale = {row_exponent + col_exponent, 1};
  if (row.any() && col.any()) {
    scale.least = product(ldexp(bit_cast<double>(row.smallest), -row_exponent),
                          ldexp(bit_cast<double>(col.smallest), -col_exponent));
  }
  return scale;
}

}  // namespace lap
