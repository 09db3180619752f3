// SPDX-License-Identifier: MIT
// What the emulated CUDA tests share: buffers that stand for device memory, numbers of every dtype,
// and an oracle that knows nothing of keys, scaling or selection.
//
//   exact score   s = round(|w| * round(round(row) * round(col))) with 24 bits (53 for double) and
//                 an unbounded exponent, as (exponent, mantissa in [0.5, 1)); zero: kZero
//   mask          stable sort by score, best first; the first `keep` eligible ones
#pragma once

#ifndef LAP_EMULATED
#define LAP_EMULATED
#endif

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "../../csrc/cuda/launch.h"

namespace cases {

using lap::DType;
constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16, DType::f64};

// Memory of exactly `bytes` bytes on the heap; `shift` bytes past a 16-byte boundary.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t shift = 0) : memory_(bytes + shift), shift_(shift) {
    std::fill(memory_.begin(), memory_.end(), static_cast<char>(0xa5));
  }
  template <typename T = void>
  T* as() {
    return reinterpret_cast<T*>(memory_.data() + shift_);
  }
  template <typename T>
  T at(int64_t i) const {
    T x;
    std::memcpy(&x, memory_.data() + shift_ + static_cast<size_t>(i) * sizeof(T), sizeof(T));
    return x;
  }

 private:
  std::vector<char> memory_;
  size_t shift_;
};

// --- numbers ----------------------------------------------------------------------------------

inline uint16_t to_half(double x) {  // truncates; within half's range
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return static_cast<uint16_t>(sign | 0x7c00);
  if (x == 0) return sign;
  int exponent = 0;
  const double m = std::frexp(std::fabs(x), &exponent);
  if (exponent < -13) return static_cast<uint16_t>(sign | int(std::ldexp(std::fabs(x), 24)));
  return static_cast<uint16_t>(sign | ((exponent + 14) << 10) | (int(m * 2048) - 1024));
}

inline double from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  double x = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) x = mantissa != 0 ? NAN : INFINITY;
  return bits & 0x8000 ? -x : x;
}

inline uint16_t to_bfloat(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>(bits >> 16);
}

inline double from_bfloat(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// A tensor of any dtype.
struct Tensor {
  DType dtype;
  int64_t size;
  Buffer data;

  Tensor(DType d, const std::vector<double>& values, size_t shift = 0)
      : dtype(d),
        size(static_cast<int64_t>(values.size())),
        data(values.size() * lap::item_size(d), shift * lap::item_size(d)) {
    for (int64_t i = 0; i < size; ++i) set(i, values[i]);
  }
  void set(int64_t i, double x) {
    if (dtype == DType::f64) data.as<double>()[i] = x;
    if (dtype == DType::f32) data.as<float>()[i] = static_cast<float>(x);
    if (dtype == DType::f16) data.as<uint16_t>()[i] = to_half(x);
    if (dtype == DType::bf16) data.as<uint16_t>()[i] = to_bfloat(x);
  }
  double operator[](int64_t i) const {
    if (dtype == DType::f64) return data.at<double>(i);
    if (dtype == DType::f32) return data.at<float>(i);
    const uint16_t bits = data.at<uint16_t>(i);
    return dtype == DType::f16 ? from_half(bits) : from_bfloat(bits);
  }
};

inline std::vector<double> normal(int64_t n, unsigned seed, double scale = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> distribution(0, scale);
  std::vector<double> values(n);
  for (double& x : values) x = distribution(random);
  return values;
}

inline std::vector<double> spread(int64_t n,
                                  unsigned seed,
                                  double low_exponent,
                                  double high_exponent) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> exponent(low_exponent, high_exponent);
  std::vector<double> values(n);
  for (double& x : values) x = std::exp2(exponent(random));
  return values;
}

inline std::vector<uint8_t> random_bytes(int64_t n, unsigned seed, double share) {
  std::mt19937 random(seed);
  std::bernoulli_distribution coin(share);
  std::vector<uint8_t> bytes(n);
  for (uint8_t& b : bytes) b = coin(random);
  return bytes;
}

// --- the oracle -------------------------------------------------------------------------------

struct Exact {
  int64_t exponent;
  double mantissa;
  bool operator>(const Exact& o) const {
    return exponent != o.exponent ? exponent > o.exponent : mantissa > o.mantissa;
  }
  bool operator==(const Exact& o) const { return exponent == o.exponent && mantissa == o.mantissa; }
};
constexpr int64_t kZero = -(int64_t{1} << 40);

inline Exact exact(double x, bool is_double) {
  int exponent = 0;
  double m = std::frexp(std::fabs(x), &exponent);
  if (!is_double) m = static_cast<float>(m);
  if (m == 0) return {kZero, 0};
  if (m == 1) return {exponent + 1, 0.5};
  return {exponent, m};
}

inline Exact times(Exact a, Exact b, bool is_double) {
  Exact c = exact(a.mantissa * b.mantissa, is_double);
  if (c.mantissa == 0) return {kZero, 0};
  c.exponent += a.exponent + b.exponent;
  return c;
}

struct Layer {
  DType dtype;
  int64_t rows;
  int64_t cols;
  int64_t window;
  int64_t groups;
  std::vector<double> row_norm;  // [rows]
  std::vector<double> col_norm;  // [groups * cols]

  int64_t size() const { return rows * cols * window; }
  lap::cuda::Weight weight(const void* data) const {
    return {data, dtype, {rows, cols, window, groups}};
  }
  lap::Norms norms() const { return {row_norm.data(), col_norm.data()}; }
};

inline std::vector<Exact> exact_scores(const Layer& layer, const Tensor& w) {
  const bool is_double = layer.dtype == DType::f64;
  std::vector<Exact> scores;
  for (int64_t r = 0; r < layer.rows; ++r) {
    const int64_t group = r / (layer.rows / layer.groups);
    for (int64_t c = 0; c < layer.cols; ++c) {
      for (int64_t k = 0; k < layer.window; ++k) {
        const Exact factor =
            times(exact(layer.row_norm[r], is_double),
                  exact(layer.col_norm[group * layer.cols + c], is_double), is_double);
        const double x = w[(r * layer.cols + c) * layer.window + k];
        scores.push_back(times(exact(x, is_double), factor, is_double));
      }
    }
  }
  return scores;
}

// The best `keep` of scores, as bytes. Score: anything with > (greater first).
template <typename Score>
std::vector<uint8_t> best(const std::vector<Score>& scores,
                          int64_t keep,
                          const std::vector<uint8_t>& eligible) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) {
    if (eligible.empty() || eligible[i]) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  std::vector<uint8_t> mask(scores.size(), 0);
  const int64_t count = std::min<int64_t>(keep, static_cast<int64_t>(order.size()));
  for (int64_t i = 0; i < count; ++i) mask[order[i]] = 1;
  return mask;
}

}  // namespace cases
