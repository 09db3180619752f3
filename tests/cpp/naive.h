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

// --- structures of a weight [rows, cols, window]; `counts` says which elements may be kept
// --------

// The best `keep` of every `of` columns, or rows, at the same place otherwise.
inline std::vector<uint8_t> nm_mask(const std::vector<double>& scores,
                                    const std::vector<uint8_t>& counts,
                                    const lap::Layout& layout,
                                    int64_t keep,
                                    int64_t of,
                                    bool rows) {
  std::vector<uint8_t> out(scores.size());
  const int64_t step = rows ? layout.row_size() : layout.window;
  const int64_t lines = rows ? layout.rows : layout.cols;
  for (int64_t p = 0; p < layout.size(); ++p) {
    if (p / step % lines % of != 0) continue;  // the first of a group
    std::vector<int64_t> group;
    for (int64_t i = 0; i < of; ++i) group.push_back(p + i * step);
    group.erase(std::remove_if(group.begin(), group.end(), [&](int64_t q) { return !counts[q]; }),
                group.end());
    std::stable_sort(group.begin(), group.end(),
                     [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
    for (size_t i = 0; i < group.size() && static_cast<int64_t>(i) < keep; ++i) out[group[i]] = 1;
  }
  return out;
}

// All ways to fill 8 of a tile's 16 places with two in each row and column, found by trying every
// one. Of two the first has the earlier pair in the first row that differs; (0, 1) < (0, 2).
inline std::vector<std::vector<int>> tile_patterns() {
  std::vector<std::vector<int>> patterns;
  for (int bits = 0; bits < 1 << 16; ++bits) {
    int by_row[4] = {};
    int by_col[4] = {};
    std::vector<int> places;
    for (int place = 0; place < 16; ++place) {
      if ((bits >> place & 1) == 0) continue;
      places.push_back(place);
      ++by_row[place / 4];
      ++by_col[place % 4];
    }
    const auto two = [](int n) { return n == 2; };
    if (std::all_of(by_row, by_row + 4, two) && std::all_of(by_col, by_col + 4, two))
      patterns.push_back(places);
  }
  std::sort(patterns.begin(), patterns.end());
  return patterns;
}

// The pattern of every tile that keeps the most of what counts, of these the largest sum.
inline std::vector<uint8_t> transposable_mask(const std::vector<double>& values,
                                              const std::vector<uint8_t>& counts,
                                              const lap::Layout& layout) {
  static const std::vector<std::vector<int>> patterns = tile_patterns();
  std::vector<uint8_t> out(values.size());
  const auto at = [&](int64_t corner, int place) {
    return corner + place / 4 * layout.row_size() + place % 4 * layout.window;
  };
  for (int64_t p = 0; p < layout.size(); ++p) {
    if (p / layout.row_size() % 4 != 0 || p / layout.window % layout.cols % 4 != 0) continue;
    const std::vector<int>* best = nullptr;
    double largest = 0;
    int most = 0;
    for (const std::vector<int>& places : patterns) {
      int named = 0;
      for (const int place : places) named += counts[at(p, place)];
      double sum = 0;
      for (int i = 0; i < 8; i += 2) sum += values[at(p, places[i])] + values[at(p, places[i + 1])];
      if (best != nullptr && (named < most || (named == most && !(sum > largest)))) continue;
      best = &places;
      largest = sum;
      most = named;
    }
    for (const int place : *best) out[at(p, place)] = counts[at(p, place)];
  }
  return out;
}

// The block of each element: its place among all, row by row of blocks.
inline std::vector<int64_t> blocks_of(
    const lap::Layout& layout, int64_t down, int64_t across, int64_t first, int64_t height) {
  std::vector<int64_t> out;
  const int64_t columns = (layout.cols + across - 1) / across;
  for (int64_t p = 0; p < layout.size(); ++p) {
    const int64_t row = first + p / layout.row_size();
    const int64_t unit = row / height * ((height + down - 1) / down) + row % height / down;
    out.push_back(unit * columns + p / layout.window % layout.cols / across);
  }
  return out;
}

// Adds values to the sums of their blocks: in every row, those of a block by 32 lanes (element j of
// each 1024 goes to lane j % 32), then the rows.
inline void add_to_blocks(const std::vector<double>& values,
                          const std::vector<int64_t>& blocks,
                          int64_t row_size,
                          std::vector<double>* sums) {
  for (size_t begin = 0; begin < values.size();) {
    size_t end = begin;
    while (end < values.size() && blocks[end] == blocks[begin] &&
           end / row_size == begin / row_size)
      ++end;
    double total = 0;
    for (size_t from = begin; from < end; from += 1024) {
      double lane[32] = {};
      for (size_t j = from; j < std::min(end, from + 1024); ++j) lane[(j - from) % 32] += values[j];
      for (int half = 16; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
      }
      total += lane[0];
    }
    (*sums)[blocks[begin]] += total;
    begin = end;
  }
}

}  // namespace naive
