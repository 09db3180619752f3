// SPDX-License-Identifier: MIT
// The definition, element by element, for the tests and the fuzzer of the core: scores in long
// steps of exact arithmetic, ranking by a full sort. Shares nothing with csrc but the Layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../../csrc/math/layout.h"

namespace naive {

// x rounded to 24 significant bits (53 for double weights), exponent unbounded
inline double rounded(double x, bool to_float) {
  if (!to_float || x == 0) return x;
  int exponent = 0;
  const double mantissa = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 24)), exponent - 24);
}

inline double factor(double row_norm, double col_norm, bool to_float) {
  return rounded(rounded(row_norm, to_float) * rounded(col_norm, to_float), to_float);
}

// The factor of each element of a weight [rows, cols, window], in flat order.
inline std::vector<double> factors(const lap::Layout& layout,
                                   const std::vector<double>& row_norm,
                                   const std::vector<double>& col_norm,
                                   bool to_float) {
  std::vector<double> out;
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t group = row * layout.groups / layout.rows;
    for (int64_t col = 0; col < layout.cols; ++col) {
      const double norm = col_norm[group * layout.cols + col];
      for (int64_t k = 0; k < layout.window; ++k) {
        out.push_back(factor(row_norm[row], norm, to_float));
      }
    }
  }
  return out;
}

// The scores as they rank: rounded to 24 bits, exponent unbounded.
inline std::vector<double> scores(const std::vector<double>& w,
                                  const lap::Layout& layout,
                                  const std::vector<double>& row_norm,
                                  const std::vector<double>& col_norm,
                                  bool to_float) {
  std::vector<double> out = factors(layout, row_norm, col_norm, to_float);
  for (size_t p = 0; p < w.size(); ++p) out[p] = rounded(std::fabs(w[p]) * out[p], to_float);
  return out;
}

// The scores as they are stored: rounded once, to what float's range leaves of them.
inline std::vector<double> stored_scores(const std::vector<double>& w,
                                         const lap::Layout& layout,
                                         const std::vector<double>& row_norm,
                                         const std::vector<double>& col_norm,
                                         bool to_float) {
  std::vector<double> out = factors(layout, row_norm, col_norm, to_float);
  for (size_t p = 0; p < w.size(); ++p) {
    const double exact = std::fabs(w[p]) * out[p];  // for float: 24 times 24 bits
    out[p] = to_float ? static_cast<float>(exact) : exact;
  }
  return out;
}

// The eligible elements, the best first: larger scores before, equal ones by rising index.
inline std::vector<int64_t> ranking(const std::vector<double>& scores,
                                    const std::vector<uint8_t>& eligible) {
  std::vector<int64_t> order;
  for (size_t p = 0; p < scores.size(); ++p) {
    if (eligible.empty() || eligible[p]) order.push_back(static_cast<int64_t>(p));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  return order;
}

// A mask of n elements with exactly min(keep, eligible) ones: the first of their ranking.
inline std::vector<uint8_t> mask(const std::vector<int64_t>& ranking, int64_t keep, size_t n) {
  std::vector<uint8_t> out(n);
  const int64_t kept = std::min(keep, static_cast<int64_t>(ranking.size()));
  for (int64_t i = 0; i < kept; ++i) out[ranking[i]] = 1;
  return out;
}

}  // namespace naive
