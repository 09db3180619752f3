// SPDX-License-Identifier: MIT
// Energies in the order fixed by math/sums.h, one reading of the weight; and scaled norms.
#include "norms.h"

#include <cmath>
#include <limits>

#include "../math/score.h"
#include "../math/sums.h"
#include "isa.h"

namespace lap::cpu {
namespace {

constexpr int64_t kTask = 1 << 17;     // elements a worker takes at a time
constexpr int64_t kMaxTile = 1024;     // columns whose sums stay in the L1 cache: 2 x 8 KB
constexpr int64_t kMinTile = 64;       // columns below which a row's piece wastes cache lines
constexpr int64_t kRowsPerEntry = 32;  // rows a table entry must serve to be expanded: 3 % of w

void column_tile(const Strided& x,
                 int64_t first_row,
                 int64_t rows,
                 int64_t width,
                 int64_t begin,
                 int64_t n,
                 double scale,
                 double* totals) {
  const auto add_squares = kernels().add_squares[static_cast<int>(x.dtype)];
  static constexpr double kZeros[kMaxTile] = {};  // rows that make up the last few: add nothing
  double gathered[kRowsAtOnce][kMaxTile];
  double segment[kMaxTile];
  std::fill(totals, totals + n, 0.0);
  for (int64_t start = 0; start < rows; start += kSegmentRows) {
    const int64_t stop = std::min<int64_t>(rows, start + kSegmentRows);
    std::fill(segment, segment + n, 0.0);
    for (int64_t r = start; r < stop; r += kRowsAtOnce) {
      const void* at[kRowsAtOnce];
      for (int64_t i = 0; i < kRowsAtOnce; ++i) {
        const int64_t element = (first_row + r + i) * width + begin;
        at[i] = r + i < stop ? elements(x, element, n, gathered[i]) : kZeros;
      }
      add_squares(at, n, scale, segment);
    }
    for (int64_t m = 0; m < n; ++m) totals[m] += segment[m];
  }
}

// Largest and smallest nonzero entry; zero when there is none.
struct Range {
  double largest = 0;
  double smallest = 0;
};

Range range_of(const double* norm, int64_t n) {
  Range range;
  for (int64_t i = 0; i < n; ++i) {
    if (!(norm[i] > 0) || std::isinf(norm[i])) continue;  // a NaN or inf ranks by its pattern
    range.largest = std::max(range.largest, norm[i]);
    range.smallest = range.smallest == 0 ? norm[i] : std::min(range.smallest, norm[i]);
  }
  return range;
}

int exponent_of(double x) {
  int exponent = 0;
  std::frexp(x, &exponent);
  return exponent;  // x = m * 2^exponent with m in [0.5, 1); 0 for x = 0
}

template <typename Float>
Float scaled(double norm, int exponent, bool rounded) {
  const double x = std::ldexp(norm, -exponent);
  return static_cast<Float>(rounded && std::isnormal(x) ? round24(x) : x);
}

}  // namespace

void row_energy(const Strided& x, int64_t rows, double scale, const Pool& pool, double* energy) {
  if (rows == 0) return;
  const auto row_segment = kernels().row_segment[static_cast<int>(x.dtype)];
  const int64_t row_size = x.size / rows;
  const int64_t rows_per_task = std::max<int64_t>(1, kTask / std::max<int64_t>(1, row_size));
  for_each_chunk(pool, ceil_div(rows, rows_per_task), [&](int, int64_t task) {
    double gathered[kSegment];
    const int64_t stop = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t r = task * rows_per_task; r < stop; ++r) {
      double total = 0;
      for (int64_t j = 0; j < row_size; j += kSegment) {
        const int64_t n = std::min<int64_t>(kSegment, row_size - j);
        total += row_segment(elements(x, r * row_size + j, n, gathered), n, scale);
      }
      energy[r] = total;
    }
  });
}

void col_energy(
    const Strided& x, const Layout& layout, double scale, const Pool& pool, double* energy) {
  const int64_t width = layout.row_size();
  std::fill(energy, energy + layout.groups * layout.cols, 0.0);
  if (width == 0) return;
  const int64_t rows = layout.rows / layout.groups;  // rows of one group
  const int64_t wanted = ceil_div(width, int64_t{4} * pool.threads);
  const int64_t tile = std::min(kMaxTile, std::max(kMinTile, wanted));
  const int64_t tiles = ceil_div(width, tile);
  std::vector<double> totals(layout.groups * width);
  for_each_chunk(pool, layout.groups * tiles, [&](int, int64_t task) {
    const int64_t group = task / tiles;
    const int64_t begin = task % tiles * tile;
    column_tile(x, group * rows, rows, width, begin, std::min(tile, width - begin), scale,
                totals.data() + group * width + begin);
  });
  for (int64_t c = 0; c < layout.groups * layout.cols; ++c) {
    for (int64_t k = 0; k < layout.window; ++k) energy[c] += totals[c * layout.window + k];
  }
}

template <typename Float>
Norms<Float> scaled_norms(const double* row_norm,
                          const double* col_norm,
                          const Layout& layout,
                          bool rounded) {
  const int64_t cols = layout.groups * layout.cols;
  const Range row = range_of(row_norm, layout.rows);
  const Range col = range_of(col_norm, cols);
  const int row_exponent = exponent_of(row.largest);
  const int col_exponent = exponent_of(col.largest);
  Norms<Float> norms;
  norms.exponent = row_exponent + col_exponent;
  if (row.smallest > 0 && col.smallest > 0) {
    norms.least = std::ldexp(row.smallest, -row_exponent) * std::ldexp(col.smallest, -col_exponent);
  }
  norms.expanded = layout.window > 1 && layout.rows / layout.groups >= kRowsPerEntry;
  const int64_t repeat = norms.expanded ? layout.window : 1;
  norms.row.resize(layout.rows);
  norms.col.resize(cols * repeat);
  for (int64_t r = 0; r < layout.rows; ++r) {
    norms.row[r] = scaled<Float>(row_norm[r], row_exponent, rounded);
  }
  for (int64_t c = 0; c < cols; ++c) {
    const Float value = scaled<Float>(col_norm[c], col_exponent, rounded);
    std::fill_n(norms.col.begin() + c * repeat, repeat, value);
  }
  return norms;
}

template <typename Float>
bool Norms<Float>::normal(int shift) const {
  // The largest stored product is below 1; rounding can lower the smallest by two ulp.
  const double limit = 4 * static_cast<double>(std::numeric_limits<Float>::min());
  return shift < std::numeric_limits<Float>::max_exponent && std::ldexp(least, shift) >= limit;
}

template struct Norms<float>;
template struct Norms<double>;
template Norms<float> scaled_norms(const double*, const double*, const Layout&, bool);
template Norms<double> scaled_norms(const double*, const double*, const Layout&, bool);

}  // namespace lap::cpu
