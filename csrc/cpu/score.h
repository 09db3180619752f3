// SPDX-License-Identifier: MIT
// The scores themselves, stored: float for float, half and bfloat16 weights, double for double.
#pragma once

#include "../math/layout.h"
#include "../math/strided.h"
#include "parallel.h"

namespace lap::cpu {

// out [size], contiguous. Returns false when check_finite is set and a weight is not finite.
bool score(const Strided& w,
           const Layout& layout,
           const Norms& norms,
           bool check_finite,
           const Pool& pool,
           void* out);

}  // namespace lap::cpu
