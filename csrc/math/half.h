// SPDX-License-Identifier: MIT
// float16 and bfloat16 as bit patterns, widened exactly with integer steps that vectorize alike on
// every ISA and device.
//
//   bfloat16  s eeeeeeee mmmmmmm          the upper half of a float
//   float16   s eeeee mmmmmmmmmm          moved left by 13 its exponent is 112 too small: one
//             multiplication by 2^112 mends it, subnormals included (exact); an exponent of all
//             ones (inf, NaN) is set to float's all ones afterwards
#pragma once

#include "host_device.h"

namespace lap {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

LAP_HOST_DEVICE float widen(float x) {
  return x;
}
LAP_HOST_DEVICE double widen(double x) {
  return x;
}
LAP_HOST_DEVICE float widen(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
LAP_HOST_DEVICE float widen(Half x) {
  const uint32_t payload = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const float scaled = bit_cast<float>(payload) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | sign);
}

}  // namespace lap
