// SPDX-License-Identifier: MIT
// THE ordered key: a signed integer that sorts exactly as the score does.
//
//   score >= +0 (weights):  key = IEEE bits with the sign cleared, so 0 <= key
//       +0.0  0x00000000     1.0  0x3f800000     inf  0x7f800000     NaN  > inf
//       A masked negative weight is -0.0 = 0x80000000: unless the sign is cleared its pattern,
//       read as unsigned, beats every finite score and the pruned weight comes back.
//   any score:  x + 0.0 turns -0.0 into +0.0; then negative patterns are flipped below zero
//       b = bits(x);  key = b ^ ((b >> 31) & 0x7fffffff)
//       -inf < ... < -1.0 (0xbf800000 -> 0xc07fffff) < 0.0 (0) < 1.0 < ... < inf < NaN
//       (integer tests: a comparison of floats would keep the loop from being vectorized)
//       Every NaN has the largest key, 0x7fffffff: devices differ in the NaNs they make, and one
//       NaN pattern would flip onto kNever.
//   kNever, below every key, marks a weight that may not be kept.
#pragma once

#include "host_device.h"

namespace lap {

template <typename Key>
struct KeyTraits;

template <>
struct KeyTraits<int32_t> {
  using Float = float;
  static constexpr int32_t kMagnitude = 0x7fffffff;
  static constexpr int32_t kInfinity = 0x7f800000;
  static constexpr int32_t kSmallestNormal = 0x00800000;
  static constexpr int32_t kNever = INT32_MIN;
  static constexpr int kBits = 32;
};

template <>
struct KeyTraits<int64_t> {
  using Float = double;
  static constexpr int64_t kMagnitude = 0x7fffffffffffffff;
  static constexpr int64_t kInfinity = 0x7ff0000000000000;
  static constexpr int64_t kSmallestNormal = 0x0010000000000000;
  static constexpr int64_t kNever = INT64_MIN;
  static constexpr int kBits = 64;
};

// Key of a score >= 0 (or NaN, which sorts above infinity).
LAP_HOST_DEVICE int32_t score_key(float score) {
  return bit_cast<int32_t>(score) & KeyTraits<int32_t>::kMagnitude;
}
LAP_HOST_DEVICE int64_t score_key(double score) {
  return bit_cast<int64_t>(score) & KeyTraits<int64_t>::kMagnitude;
}

LAP_HOST_DEVICE bool is_finite(float x) {
  return score_key(x) < KeyTraits<int32_t>::kInfinity;
}
LAP_HOST_DEVICE bool is_finite(double x) {
  return score_key(x) < KeyTraits<int64_t>::kInfinity;
}

// Key of any score. Its own inverse on bits: the same flip takes a key back to its float.
LAP_HOST_DEVICE int32_t flip_negative(int32_t bits) {
  return bits ^ ((bits >> 31) & KeyTraits<int32_t>::kMagnitude);
}
LAP_HOST_DEVICE int64_t flip_negative(int64_t bits) {
  return bits ^ ((bits >> 63) & KeyTraits<int64_t>::kMagnitude);
}
LAP_HOST_DEVICE int32_t ordered_key(float score) {
  const int32_t bits = bit_cast<int32_t>(score + 0.0f);
  const bool nan = (bits & KeyTraits<int32_t>::kMagnitude) > KeyTraits<int32_t>::kInfinity;
  return nan ? KeyTraits<int32_t>::kMagnitude : flip_negative(bits);
}
LAP_HOST_DEVICE int64_t ordered_key(double score) {
  const int64_t bits = bit_cast<int64_t>(score + 0.0);
  const bool nan = (bits & KeyTraits<int64_t>::kMagnitude) > KeyTraits<int64_t>::kInfinity;
  return nan ? KeyTraits<int64_t>::kMagnitude : flip_negative(bits);
}

}  // namespace lap
