// SPDX-License-Identifier: MIT
// kernels.inc once per instruction set: namespaces and target pragmas (target_clones crashes under
// ThreadSanitizer; per-file -mavx512f leaks AVX-512 code into shared std templates).
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../math/half.h"
#include "../math/key.h"
#include "../math/score.h"
#include "../math/sums.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lap::cpu {

namespace baseline {
#define LAP_PACK 0
#include "kernels.inc"
#undef LAP_PACK
}  // namespace baseline

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define LAP_PACK 256
#include "kernels.inc"
#undef LAP_PACK
}  // namespace v3
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#define LAP_PACK 512
#include "kernels.inc"
#undef LAP_PACK
}  // namespace v4
#pragma GCC pop_options
#endif

namespace {

bool supported(const std::string& level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == "v3") return __builtin_cpu_supports("x86-64-v3");
  if (level == "v4") return __builtin_cpu_supports("x86-64-v4");
#endif
  return level == "baseline";
}

Kernels choose() {
  const char* asked = std::getenv("LAP_EXT_ISA");
  std::string level = asked ? asked : "";
  if (level.empty()) level = supported("v4") ? "v4" : supported("v3") ? "v3" : "baseline";
  if (!supported(level)) {
    throw std::runtime_error("lap_ext: expected LAP_EXT_ISA to be baseline, v3 or v4 and supported "
                             "by this CPU, got '" + level + "'. Unset it to use the best level.");
  }
#if defined(__x86_64__)
  if (level == "v4") return v4::make("v4");
  if (level == "v3") return v3::make("v3");
#endif
  return baseline::make("baseline");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace lap::cpu
