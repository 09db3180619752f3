// SPDX-License-Identifier: MIT
// Torch's tensors as the operators read them (LibTorch stable ABI), and the list of the operators
// for torch's registry. The model of an Arrays: NumpyArrays has the same members.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "../math/dtype.h"
#include "check.h"
#include "operators.h"

namespace lap::bind {

struct TorchArrays {
  using Array = torch::stable::Tensor;
  using Norm = Array;  // in_norm, out_norm
  using Mask = Array;  // which weights may be kept
  using ScalarType = torch::headeronly::ScalarType;
  static constexpr const char* kNoun = "tensor";  // what an error calls an Array

  static DType dtype(const char* op, const Array& x) {
    switch (x.scalar_type()) {
      case ScalarType::Float:
        return DType::f32;
      case ScalarType::Half:
        return DType::f16;
      case ScalarType::BFloat16:
        return DType::bf16;
      case ScalarType::Double:
        return DType::f64;
      default:
        fail_dtype(op, {"float32, float64, float16 or bfloat16"});
    }
  }
  [[noreturn]] static void fail_dtype(const char* op, const Mistake& mistake) { fail(op, mistake); }
  static bool same_dtype(const Array& a, const Array& b) {
    return a.scalar_type() == b.scalar_type();
  }

  // strides counts in elements; it returns false where one is no multiple of the element size.
  static Sizes sizes(const Array& x) { return x.sizes().vec(); }
  static int64_t size(const Array& x) { return x.numel(); }
  static bool strides(const Array& x, Sizes* out) {
    *out = x.strides().vec();
    return true;
  }
  static const void* data(const Array& x) { return x.const_data_ptr(); }
  static void* mutable_data(const Array& x) { return x.mutable_data_ptr(); }
  static Array contiguous(const Array& x) { return torch::stable::contiguous(x); }

  static bool is_contiguous(const Array& x) { return x.is_contiguous(); }
  template <typename T>
  static bool holds(const Array& x) {
    return x.scalar_type() == torch::headeronly::CppTypeToScalarType<T>::value;
  }

  // A new contiguous array of T on the device of `like`.
  template <typename T>
  static Array empty(const Array& like, const Sizes& sizes) {
    return torch::stable::new_empty(like, sizes, torch::headeronly::CppTypeToScalarType<T>::value);
  }

  // Contiguous float64.
  static Array norm(const char* op, const Array& x) {
    if (x.scalar_type() != ScalarType::Double) {
      fail(op, {"in_norm and out_norm of float64"});
    }
    return contiguous(x);
  }
  // The bytes of a mask for `like`.
  static const uint8_t* eligible(const char* op, const Array& mask, const Array& like) {
    if (mask.scalar_type() != ScalarType::Bool || mask.numel() != like.numel() ||
        !mask.is_contiguous()) {
      fail(op, {"a contiguous bool mask with as many elements as the weights"});
    }
    return static_cast<const uint8_t*>(mask.const_data_ptr());
  }
};

// Registers the operators that CPU and CUDA have in common.
template <typename Operators, typename Library>
void implement(Library& m) {
  m.impl("row_squared_norms", TORCH_BOX(&Operators::row_squared_norms));
  m.impl("col_squared_norms", TORCH_BOX(&Operators::col_squared_norms));
  m.impl("squared_norms", TORCH_BOX(&Operators::squared_norms));
  m.impl("score", TORCH_BOX(&Operators::score));
  m.impl("mask", TORCH_BOX(&Operators::template mask<false>));
  m.impl("prune_", TORCH_BOX(&Operators::template mask<true>));
  m.impl("topk_mask", TORCH_BOX(&Operators::topk_mask));
  m.impl("kth_largest", TORCH_BOX(&Operators::kth_largest));
}

// The same for those of structures.
template <typename Operators, typename Library>
void implement_structures(Library& m) {
  m.impl("nm_mask", TORCH_BOX(&Operators::nm_mask));
  m.impl("transposable_mask", TORCH_BOX(&Operators::transposable_mask));
  m.impl("block_sums_", TORCH_BOX(&Operators::block_sums_));
  m.impl("block_mask", TORCH_BOX(&Operators::block_mask));
}

}  // namespace lap::bind
