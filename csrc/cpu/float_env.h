// SPDX-License-Identifier: MIT
// Pins the floating-point mode while the core computes: round to nearest, subnormals kept. A host
// that set flush-to-zero (torch.set_flush_denormal) would otherwise change scores near the
// smallest floats, and differently on each thread.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#include <cstdint>

namespace lap::cpu {

class FloatEnv {
 public:
#if defined(__SSE2__)
  FloatEnv() : saved_(_mm_getcsr()) {
    if (saved_ & kMode) _mm_setcsr(saved_ & ~kMode);
  }
  ~FloatEnv() {
    if (saved_ & kMode) _mm_setcsr(saved_);
  }
#else
  FloatEnv() = default;
  ~FloatEnv() = default;
#endif
  FloatEnv(const FloatEnv&) = delete;
  FloatEnv& operator=(const FloatEnv&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr uint32_t kMode =
      0x8000 | 0x6000 | 0x0040;  // flush, rounding, denormals-are-zero
  uint32_t saved_;
#endif
};

}  // namespace lap::cpu
