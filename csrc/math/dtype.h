// SPDX-License-Identifier: MIT
// The element types of weights and scores.
#pragma once

#include <cstdint>

namespace lap {

enum class DType { f32, f16, bf16, f64 };
constexpr int kDTypes = 4;

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

}  // namespace lap
