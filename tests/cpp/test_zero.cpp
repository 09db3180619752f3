// SPDX-License-Identifier: MIT
// Zeroing, and the order in which strides are read, against index arithmetic.
#include <cmath>
#include <numeric>
#include <vector>

#include "../../csrc/cpu/elements.h"
#include "../../csrc/cpu/zero.h"
#include "doctest.h"

using lap::DType;
using lap::Strided;

TEST_CASE("zeroing writes +0.0 where the mask is 0 and nothing else, through any strides") {
  std::vector<float> memory(2 * 30 * 40, -3.0f);
  Strided x;
  const int64_t shape[] = {30, 40};
  const int64_t stride[] = {2, 60};  // a transposed view of every second element
  REQUIRE(lap::make_strided(memory.data(), DType::f32, 2, shape, stride, &x));
  std::vector<uint8_t> mask(1200);
  for (size_t p = 0; p < mask.size(); ++p) mask[p] = p % 3 == 0;
  lap::cpu::zero(x, mask.data(), lap::cpu::thread_pool(2));
  for (int64_t p = 0; p < 1200; ++p) {
    const int64_t at = p / 40 * 2 + p % 40 * 60;
    CHECK(memory[at] == (mask[p] ? -3.0f : 0.0f));
    CHECK(std::signbit(memory[at]) == (mask[p] != 0));
    CHECK(memory[at + 1] == -3.0f);
  }
}

TEST_CASE("elements come in the flat order, through any strides, from any begin") {
  std::vector<float> memory(7 * 5 * 3 * 4);
  std::iota(memory.begin(), memory.end(), 0.0f);
  Strided x;
  const int64_t shape[] = {4, 1, 5, 3, 7};
  const int64_t stride[] = {1, 99, 12, 4, 60};
  REQUIRE(lap::make_strided(memory.data(), DType::f32, 5, shape, stride, &x));
  std::vector<float> right;
  for (int64_t p = 0; p < 420; ++p) {
    right.push_back(memory[p / 105 + p / 21 % 5 * 12 + p / 7 % 3 * 4 + p % 7 * 60]);
  }
  std::vector<float> buffer(420);
  for (int64_t begin = 0; begin < 420; begin += 13) {
    const int64_t n = std::min<int64_t>(37, 420 - begin);
    const float* got = static_cast<const float*>(lap::cpu::elements(x, begin, n, buffer.data()));
    CHECK(std::equal(got, got + n, right.begin() + begin));
  }
}
