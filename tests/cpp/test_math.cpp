// SPDX-License-Identifier: MIT
// The formulas at their boundaries.
#include <cmath>
#include <initializer_list>
#include <limits>

#include "../../csrc/math/half.h"
#include "../../csrc/math/key.h"
#include "../../csrc/math/sample.h"
#include "../../csrc/math/scale.h"
#include "../../csrc/math/score.h"
#include "doctest.h"

TEST_CASE("24 bits, ties to even") {
  CHECK(lap::round24(1 + 0x1p-24) == 1);                  // half: down to even
  CHECK(lap::round24(1 + 0x3p-24) == 1 + 0x1p-22);        // half: up to even
  CHECK(lap::round24(1 + 0x1.00001p-24) == 1 + 0x1p-23);  // a little more than half
  CHECK(lap::round24(2 - 0x1p-25) == 2);                  // the carry reaches the exponent
  CHECK(lap::round24(0x1.000001p-900) == 0x1p-900);       // half again, far below float
  CHECK(lap::round24(0) == 0);
}

TEST_CASE("keys sort as scores do: one zero, NaN above infinity") {
  const float infinity = std::numeric_limits<float>::infinity();
  const float rising[] = {-infinity, -1.5f, -1e-45f, 0.0f, 1e-45f, 1.5f, infinity, NAN};
  for (int i = 0; i + 1 < 8; ++i) {
    CHECK(lap::ordered_key(rising[i]) < lap::ordered_key(rising[i + 1]));
    CHECK(lap::ordered_key(double{rising[i]}) < lap::ordered_key(double{rising[i + 1]}));
    CHECK(lap::bit_cast<float>(lap::flip_negative(lap::ordered_key(rising[i]))) == rising[i]);
  }
  CHECK(lap::ordered_key(-0.0f) == lap::ordered_key(0.0f));
  CHECK(lap::ordered_key(-0.0) == lap::ordered_key(0.0));
  CHECK(lap::score_key(-0.0f) == 0);
  CHECK(lap::ordered_key(-NAN) == lap::ordered_key(NAN));
}

TEST_CASE("every pattern of float16 and bfloat16 is widened exactly") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float half = lap::widen(lap::Half{static_cast<uint16_t>(bits)});
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const double mantissa = bits & 1023;
    double value =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) value = mantissa == 0 ? std::numeric_limits<double>::infinity() : NAN;
    if (bits >> 15) value = -value;
    CHECK((half == value || (std::isnan(half) && std::isnan(value))));
    CHECK(std::signbit(half) == (bits >> 15 != 0));
    const float brain = lap::widen(lap::BFloat16{static_cast<uint16_t>(bits)});
    CHECK(lap::bit_cast<uint32_t>(brain) == bits << 16);
  }
}

TEST_CASE("a sample reads one element in each of m equal chunks, at places without a pattern") {
  for (const int64_t m : {2, 1000, 1024, 4097}) {
    for (const int64_t size : {4 * m, 5 * m + 3, int64_t{1} << 40}) {
      const lap::SamplePositions position_of(m, size);
      double offsets = 0;  // in chunks
      for (int64_t i = 0; i < m; ++i) {
        const double chunk = static_cast<double>(size) / static_cast<double>(m);
        const double offset = static_cast<double>(position_of(i)) - static_cast<double>(i) * chunk;
        CHECK((offset > -1 && offset < chunk));
        offsets += offset / chunk;
      }
      if (m > 2) CHECK(std::fabs(offsets / static_cast<double>(m) - 0.5) < 0.15);
    }
  }
}

TEST_CASE("norms are scaled by powers of two: the largest into [0.5, 1)") {
  const auto range_of = [](double x) { return lap::with(lap::NormRange::none(), x); };
  CHECK(lap::exponent_of(lap::NormRange::none()) == 0);
  CHECK(lap::exponent_of(range_of(0.5)) == 0);
  CHECK(lap::exponent_of(range_of(1)) == 1);
  CHECK(lap::exponent_of(range_of(0x1.8p-1060)) == -1059);  // not normal
  CHECK(lap::ScaleBy(3)(6, true) == 0.75);
  CHECK(lap::ScaleBy(1)(1 + 0x1p-24, true) == 0.5);  // 24 bits, ties to even
  CHECK(lap::ScaleBy(1)(1 + 0x1p-24, false) == 0.5 + 0x1p-25);
  lap::NormRange range = lap::NormRange::none();
  for (const double x : {0.0, -0.0, 3.0, HUGE_VAL, 0.25, 40.0, -1.0}) range = lap::with(range, x);
  range = lap::with(range, NAN);
  CHECK(lap::bit_cast<double>(range.largest) == 40);
  CHECK(lap::bit_cast<double>(range.smallest) == 0.25);
  // 40 = 0.625 * 2^6, 3 = 0.75 * 2^2: the smallest product is 0.25 / 2^6 * 1 / 2^2
  const lap::Scale scale = lap::scale_of(range, lap::with(range_of(3), 1));
  CHECK(scale.exponent == 8);
  CHECK(scale.least == 0x1p-10);
  CHECK(lap::scale_of(lap::NormRange::none(), range_of(3)).least == 1);
}

TEST_CASE("a norm is scaled in two factors and rounded once, as ldexp does it") {
  const double norms[] = {
      0,           -0.0, 0x1p-1074, 0x1.8p-1074,          0x1.fffffp-1060, 0x1p-1022,
      0x1.3p-1000, 0.1,  1,         0x1.fffffffffffffp52, 0x1.7p1000,      0x1.fffffffffffffp1023,
      HUGE_VAL};
  for (int exponent = -1073; exponent <= 1024; ++exponent) {
    const lap::ScaleBy scaled(exponent);
    for (const double norm : norms) {
      const double expected = std::ldexp(norm, -exponent);
      CHECK(lap::bit_cast<uint64_t>(scaled(norm, false)) == lap::bit_cast<uint64_t>(expected));
    }
  }
}

TEST_CASE("products are normal numbers with a margin for two roundings") {
  CHECK(lap::Scale{0, 0x1p-124}.normal<float>());
  CHECK(!lap::Scale{0, 0x1.fffffp-125}.normal<float>());
  CHECK(lap::Scale{0, 0x1p-1020}.normal<double>());
  CHECK(!lap::Scale{0, 0x1.fffffp-1021}.normal<double>());
  CHECK(lap::Scale{0, 1}.normal<float>(127));
  CHECK(!lap::Scale{0, 1}.normal<float>(128));  // the largest product may be near 1
  CHECK(lap::Scale{0, 1}.normal<float>(-124));
  CHECK(!lap::Scale{0, 1}.normal<float>(-125));
}
