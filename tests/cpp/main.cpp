// SPDX-License-Identifier: MIT
// The runner of the core's tests. ctest starts it once per SIMD level (LAP_EXT_ISA); a level that
// this CPU lacks ends with 77, which ctest reports as skipped.
#define DOCTEST_CONFIG_IMPLEMENT
#include <cstdio>

#include "../../csrc/cpu/isa.h"
#include "doctest.h"

int main(int argc, char** argv) {
  if (!lap::cpu::level_is_usable()) {
    std::puts("this CPU lacks the level that LAP_EXT_ISA asks for");
    return 77;
  }
  std::printf("SIMD level: %s\n", lap::cpu::kernels().name);
  return doctest::Context(argc, argv).run();
}
