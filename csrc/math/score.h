// SPDX-License-Identifier: MIT
// THE formula: the lookahead score of one weight w[o, i, k] (Park et al., ICLR 2020, section 3).
//
//   score = |w| * (in_norm[i] * out_norm[o])
//
// Only multiplications, each rounded to nearest, so no fused multiply-add can change a bit. The two
// norms are scaled by powers of two beforehand (largest in [0.5, 1)): the product cannot overflow,
// and the scale drops out of every comparison. Where it still underflows, the WIDE form computes
// the same 24-bit roundings in double, whose range holds every product of floats.
#pragma once

#include "host_device.h"

namespace lap {

LAP_HOST_DEVICE float magnitude(float w) {
#if defined(__CUDA_ARCH__)
  return fabsf(w);  // a modifier of the multiplication that follows
#else
  return bit_cast<float>(bit_cast<int32_t>(w) & 0x7fffffff);
#endif
}
LAP_HOST_DEVICE double magnitude(double w) {
#if defined(__CUDA_ARCH__)
  return fabs(w);
#else
  return bit_cast<double>(bit_cast<int64_t>(w) & 0x7fffffffffffffff);
#endif
}

LAP_HOST_DEVICE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
LAP_HOST_DEVICE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// score of one weight; T is float or double
template <typename T>
LAP_HOST_DEVICE T score(T w, T row_norm, T col_norm) {
  return product(magnitude(w), product(row_norm, col_norm));
}

// Rounds a normal double to 24 significant bits, ties to even: float's precision, double's range.
//   bits 51..29 stay | bits 28..0 are rounded away: add half minus one, plus one if the last kept
//   bit is odd. A carry into the exponent is right: 1.11..1 rounds up to 10.0.
LAP_HOST_DEVICE double round24(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x);
  const uint64_t rounded = bits + 0x0fffffff + ((bits >> 29) & 1);
  return bit_cast<double>(rounded & ~uint64_t{0x1fffffff});
}

// The float formula with an unbounded exponent. Each factor has at most 24 bits, so each product is
// exact in double before it is rounded. Zero stays zero: round24(0) = 0.
LAP_HOST_DEVICE double wide_score(double w, double row_norm, double col_norm) {
  return round24(product(magnitude(w), round24(product(row_norm, col_norm))));
}

}  // namespace lap
