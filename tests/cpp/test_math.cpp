// SPDX-License-Identifier: MIT
// The formula and the ordered key at their boundaries.
#include <cmath>
#include <limits>

#include "../../csrc/math/key.h"
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
