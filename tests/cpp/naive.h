// SPDX-License-Identifier: MIT
// The definition, element by element, for the tests and the fuzzer of the core: scores in long
// steps of exact arithmetic, ranking by a full sort. Shares nothing with csrc/cpu but the types it
// is called with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../../csrc/cpu/select.h"

namespace naive {

// x rounded to 24 significant bits (53 for double weights), exponent unbounded
inline double rounded(double x, bool to_float) {
  if (!to_float || x == 0) return x;
  int exponent = 0;
  const double mantissa = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 24)), exponent - 24);
}

inline double score(double w, double row_norm, double col_norm, bool to_float) {
  const double c = rounded(rounded(row_norm, to_float) * rounded(col_norm, to_float), to_float);
  return rounded(std::fabs(w) * c, to_float);
}

// The scores of a weight [rows, cols, window] in flat order.
inline std::vector<double> scores(const std::vector<double>& w,
                                  const lap::cpu::Layout& layout,
                                  const std::vector<double>& row_norm,
                                  const std::vector<double>& col_norm,
                                  bool to_float) {
  std::vector<double> out(w.size());
  for (size_t p = 0; p < w.size(); ++p) {
    const int64_t row = static_cast<int64_t>(p) / (layout.cols * layout.window);
    const int64_t col = static_cast<int64_t>(p) / layout.window % layout.cols;
    const int64_t group = row * layout.groups / layout.rows;
    out[p] = score(w[p], row_norm[row], col_norm[group * layout.cols + col], to_float);
  }
  return out;
}

// Exactly min(keep, eligible) ones: larger scores first, equal ones by rising index.
inline std::vector<uint8_t> mask(const std::vector<double>& scores,
                                 int64_t keep,
                                 const std::vector<uint8_t>& eligible) {
  std::vector<int64_t> order;
  for (size_t p = 0; p < scores.size(); ++p) {
    if (eligible.empty() || eligible[p]) order.push_back(static_cast<int64_t>(p));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  std::vector<uint8_t> out(scores.size());
  const int64_t kept = std::min(keep, static_cast<int64_t>(order.size()));
  for (int64_t i = 0; i < kept; ++i) out[order[i]] = 1;
  return out;
}

}  // namespace naive
