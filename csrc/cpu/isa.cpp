// SPDX-License-Identifier: MIT
// kernels.inc once per instruction set: namespaces and target pragmas (target_clones crashes under
// ThreadSanitizer; per-file -mavx512f leaks AVX-512 code into shared std templates).
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../math/half.h"
#include "../math/key.h"
#include "../math/random.h"
#include "../math/score.h"
#include "../math/squares.h"
#include "../math/sums.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LAP_X86_LEVELS 1  // clang spells target pragmas otherwise: it builds the baseline only
#include <immintrin.h>
#else
#define LAP_X86_LEVELS 0
#endif

namespace lap::cpu {

namespace baseline {
#define LAP_PACK 0
#include "kernels.inc"
#undef LAP_PACK
}  // namespace baseline

#if LAP_X86_LEVELS
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
#if LAP_X86_LEVELS
  __builtin_cpu_init();
  if (level == "v3") return __builtin_cpu_supports("x86-64-v3");
  if (level == "v4") return __builtin_cpu_supports("x86-64-v4");
#endif
  return level == "baseline";
}

// The level asked for, or the best; none when this CPU lacks what was asked for.
std::string chosen_level() {
  const char* asked = std::getenv("LAP_EXT_ISA");
  const std::string level = asked == nullptr ? "" : asked;
  if (level.empty()) return supported("v4") ? "v4" : supported("v3") ? "v3" : "baseline";
  return supported(level) ? level : "";
}

Kernels choose() {
  const std::string level = chosen_level();
#if LAP_X86_LEVELS
  if (level == "v4") return v4::make("v4");
  if (level == "v3") return v3::make("v3");
#endif
  if (level == "baseline") return baseline::make("baseline");
  throw std::runtime_error(
      "lap_ext: expected LAP_EXT_ISA to be baseline, v3 or v4, and a level that this CPU has. "
      "Unset it to use the best.");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

bool level_is_usable() {
  return !chosen_level().empty();
}

}  // namespace lap::cpu
