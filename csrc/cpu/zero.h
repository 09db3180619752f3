// SPDX-License-Identifier: MIT
// The second half of prune_: w = +0.0 where the mask is 0.
#pragma once

#include "../math/strided.h"
#include "parallel.h"

namespace lap::cpu {

// w.data must be writable; mask [size] in the flat C order.
void zero(const Strided& w, const uint8_t* mask, const Pool& pool);

}  // namespace lap::cpu
