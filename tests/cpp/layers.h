// SPDX-License-Identifier: MIT
// Random and hostile layers for the tests and the fuzzer of the core.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/select.h"
#include "../../csrc/math/half.h"

namespace layers {

using lap::DType;
using lap::Layout;

inline float as_bfloat16(float x) {  // cut off, which is all that a test value needs
  return lap::bit_cast<float>(lap::bit_cast<uint32_t>(x) & 0xffff0000u);
}

// A weight in memory of its dtype, and the same values as doubles.
struct Layer {
  DType dtype = DType::f32;
  Layout layout;
  std::vector<double> w;
  std::vector<char> memory;
  std::vector<double> row_norm;
  std::vector<double> col_norm;

  // Stores w in memory, in logical order, and takes back what the dtype made of it.
  void store() {
    memory.resize(w.size() * lap::item_size(dtype));
    for (size_t p = 0; p < w.size(); ++p) store(p);
  }
  void store(size_t p) {
    char* at = memory.data() + p * lap::item_size(dtype);
    if (dtype == DType::f64) {
      memcpy(at, &w[p], 8);
    } else if (dtype == DType::f32) {
      const float x = static_cast<float>(w[p]);
      memcpy(at, &x, 4);
      w[p] = x;
    } else if (dtype == DType::bf16) {
      const float x = as_bfloat16(static_cast<float>(w[p]));
      const uint16_t bits = static_cast<uint16_t>(lap::bit_cast<uint32_t>(x) >> 16);
      memcpy(at, &bits, 2);
      w[p] = x;
    } else {  // any pattern of a finite float16
      const uint16_t random = static_cast<uint16_t>(lap::bit_cast<uint64_t>(w[p]) >> 37);
      const uint16_t bits = (random & 0x7c00) == 0x7c00 ? random & 0x83ff : random;
      memcpy(at, &bits, 2);
      w[p] = lap::widen(lap::Half{bits});
    }
  }

  lap::cpu::Source source(uint8_t* mask) const {
    lap::cpu::Source source;
    const int64_t size = static_cast<int64_t>(w.size());
    const int64_t one = 1;
    lap::make_strided(memory.data(), dtype, 1, &size, &one, &source.x);
    source.layout = layout;
    source.norms = {row_norm.data(), col_norm.data()};
    source.mask = mask;
    return source;
  }
};

template <typename Random>
Layer random_layer(DType dtype, Layout layout, Random& random) {
  Layer layer;
  layer.dtype = dtype;
  layer.layout = layout;
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(0.5, 2.0);
  layer.w.resize(layout.size());
  for (double& x : layer.w) x = normal(random);
  layer.row_norm.resize(layout.rows);
  layer.col_norm.resize(layout.channels());
  for (double& x : layer.row_norm) x = uniform(random);
  for (double& x : layer.col_norm) x = uniform(random);
  layer.store();
  return layer;
}

}  // namespace layers
