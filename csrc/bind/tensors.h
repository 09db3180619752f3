// SPDX-License-Identifier: MIT
// What the two torch bindings read from tensors alike.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../math/dtype.h"
#include "check.h"

namespace lap::bind {

inline DType dtype_of(const char* op, const torch::stable::Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::f32;
    case torch::headeronly::ScalarType::Half:
      return DType::f16;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::bf16;
    case torch::headeronly::ScalarType::Double:
      return DType::f64;
    default:
      fail(op, "expected float32, float64, float16 or bfloat16.");
  }
}

inline const uint8_t* eligible_of(const char* op,
                                  const torch::stable::Tensor& mask,
                                  const torch::stable::Tensor& like) {
  if (mask.scalar_type() != torch::headeronly::ScalarType::Bool || mask.numel() != like.numel() ||
      !mask.is_contiguous()) {
    fail(op, "expected a contiguous bool mask with as many elements as the weights.");
  }
  return static_cast<const uint8_t*>(mask.const_data_ptr());
}

}  // namespace lap::bind
