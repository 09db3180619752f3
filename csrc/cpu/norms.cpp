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
constexpr int64_t kWave = 1 << 18;     // column sums kept at a time: 2 MB, of 16 M elements
constexpr int64_t kRowsPerEntry = 32;  // rows a table entry must serve to be expanded: 3 % of w
static_assert(kMaxTile >= kSegment);

// Buffers for kRowsAtOnce pieces of rows that do not lie in one run.
struct Gathered {
  double rows[kRowsAtOnce][kMaxTile];
};

// at[i] = n elements of row r + i from column begin on; zeros, which add nothing, from row stop on.
void rows_at(const Strided& x,
             int64_t r,
             int64_t stop,
             int64_t width,
             int64_t begin,
             int64_t n,
             Gathered* gathered,
             const void** at) {
  static constexpr double kZeros[kMaxTile] = {};
  for (int64_t i = 0; i < kRowsAtOnce; ++i) {
    const int64_t element = (r + i) * width + begin;
    at[i] = r + i < stop ? elements(x, element, n, gathered->rows[i]) : kZeros;
  }
}

void column_tile(const Strided& x,
                 int64_t first_row,
                 int64_t rows,
                 int64_t width,
                 int64_t begin,
                 int64_t n,
                 double scale,
                 double* totals) {
  const auto add_squares = kernels().add_squares[static_cast<int>(x.dtype)];
  Gathered gathered;
  double segment[kMaxTile];
  std::fill(totals, totals + n, 0.0);
  for (int64_t start = first_row; start < first_row + rows; start += kSegmentRows) {
    const int64_t stop = std::min<int64_t>(first_row + rows, start + kSegmentRows);
    std::fill(segment, segment + n, 0.0);
    for (int64_t r = start; r < stop; r += kRowsAtOnce) {
      const void* at[kRowsAtOnce];
      rows_at(x, r, stop, width, begin, n, &gathered, at);
      add_squares(at, n, scale, segment);
    }
    for (int64_t m = 0; m < n; ++m) totals[m] += segment[m];
  }
}

// A weight cut for both sums: segments of at most kSegmentRows rows, none across a group's end,
// times pieces of kSegment columns.
struct Tiles {
  int64_t width;
  int64_t rows;      // of one group
  int64_t of_group;  // segments of one group
  int64_t segments;
  int64_t pieces;

  explicit Tiles(const Layout& layout)
      : width(layout.row_size()),
        rows(layout.rows / layout.groups),
        of_group(ceil_div(rows, kSegmentRows)),
        segments(layout.groups * of_group),
        pieces(ceil_div(width, kSegment)) {}

  int64_t first_row(int64_t s) const { return s / of_group * rows + s % of_group * kSegmentRows; }
  int64_t stop_row(int64_t s) const {
    return std::min((s / of_group + 1) * rows, first_row(s) + kSegmentRows);
  }
};

// One segment of each row and of each column of a tile.
void tile_energies(const Strided& x,
                   const Tiles& tiles,
                   int64_t segment,
                   int64_t piece,
                   double* row_sums,  // [rows, pieces] out: those of this tile
                   double* sums) {    // [width] out: those of this tile
  const auto add_energies = kernels().add_energies[static_cast<int>(x.dtype)];
  const int64_t begin = piece * kSegment;
  const int64_t n = std::min<int64_t>(kSegment, tiles.width - begin);
  const int64_t stop = tiles.stop_row(segment);
  Gathered gathered;
  std::fill(sums + begin, sums + begin + n, 0.0);
  for (int64_t r = tiles.first_row(segment); r < stop; r += kRowsAtOnce) {
    const void* at[kRowsAtOnce];
    double found[kRowsAtOnce];
    rows_at(x, r, stop, tiles.width, begin, n, &gathered, at);
    const bool more = x.contiguous() && r + 2 * kRowsAtOnce <= stop;
    add_energies(at, n, more ? kRowsAtOnce * tiles.width : 0, found, sums + begin);
    for (int64_t i = 0; i < std::min<int64_t>(kRowsAtOnce, stop - r); ++i) {
      row_sums[(r + i) * tiles.pieces + piece] = found[i];
    }
  }
}

// totals[group, m] += sums[s - begin, m] for s = begin .. stop - 1, in order
void add_segments(const Tiles& tiles,
                  int64_t begin,
                  int64_t stop,
                  const double* sums,
                  const Pool& pool,
                  double* totals) {
  const int64_t columns = std::max(kMinTile, kWave / (stop - begin));
  for_each_chunk(pool, ceil_div(tiles.width, columns), [&](int, int64_t task) {
    const int64_t last = std::min(tiles.width, (task + 1) * columns);
    for (int64_t s = begin; s < stop; ++s) {
      const double* segment = sums + (s - begin) * tiles.width;
      double* total = totals + s / tiles.of_group * tiles.width;
      for (int64_t m = task * columns; m < last; ++m) total[m] += segment[m];
    }
  });
}

// energy[r] = the segments of row r, added in order
void add_pieces(
    const double* row_sums, int64_t rows, int64_t pieces, const Pool& pool, double* energy) {
  const int64_t block = std::max<int64_t>(1, kWave / pieces);
  for_each_chunk(pool, ceil_div(rows, block), [&](int, int64_t task) {
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r) {
      energy[r] = 0;
      for (int64_t p = 0; p < pieces; ++p) energy[r] += row_sums[r * pieces + p];
    }
  });
}

// energy[c] = the window positions of channel c, added in order
void add_windows(const double* totals, const Layout& layout, double* energy) {
  for (int64_t c = 0; c < layout.groups * layout.cols; ++c) {
    energy[c] = 0;
    for (int64_t k = 0; k < layout.window; ++k) energy[c] += totals[c * layout.window + k];
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
  add_windows(totals.data(), layout, energy);
}

// In waves of segments, so that the columns' sums of one wave are all that is kept: 2 MB, or 64 KB
// a thread where that is more. Beside them 8 bytes a row and 1024 columns.
void energies(const Strided& x, const Layout& layout, const Pool& pool, double* row, double* col) {
  const bool has_kernel = kernels().add_energies[static_cast<int>(x.dtype)] != nullptr;
  const Tiles tiles(layout);
  if (!has_kernel || tiles.rows < kRowsAtOnce || tiles.width == 0) {
    row_energy(x, layout.rows, 1.0, pool, row);
    col_energy(x, layout, 1.0, pool, col);
    return;
  }
  const int64_t tile = kSegmentRows * std::min<int64_t>(kSegment, tiles.width);
  const int64_t block = std::max<int64_t>(1, kTask / tile);  // segments a worker takes at a time
  const int64_t busy = ceil_div(int64_t{4} * pool.threads, tiles.pieces) * block;
  const int64_t wave = std::min(tiles.segments, std::max(busy, kWave / tiles.width));
  std::vector<double> row_sums(layout.rows * tiles.pieces);
  std::vector<double> sums(wave * tiles.width);
  std::vector<double> totals(layout.groups * tiles.width);
  for (int64_t begin = 0; begin < tiles.segments; begin += wave) {
    const int64_t stop = std::min(tiles.segments, begin + wave);
    const int64_t chunks = ceil_div(stop - begin, block) * tiles.pieces;
    for_each_chunk(pool, chunks, [&](int, int64_t task) {
      const int64_t first = begin + task / tiles.pieces * block;
      for (int64_t s = first; s < std::min(stop, first + block); ++s) {
        tile_energies(x, tiles, s, task % tiles.pieces, row_sums.data(),
                      sums.data() + (s - begin) * tiles.width);
      }
    });
    add_segments(tiles, begin, stop, sums.data(), pool, totals.data());
  }
  add_pieces(row_sums.data(), layout.rows, tiles.pieces, pool, row);
  add_windows(totals.data(), layout, col);
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

template <typename Float>
void Norms<Float>::unscale() {
  for (Float& norm : row) norm = std::ldexp(norm, exponent);
  exponent = 0;
}

template <typename Float>
bool plain(const double* row_norm, const double* col_norm, const Layout& layout, bool rounded) {
  const Norms<Float> norms = scaled_norms<Float>(row_norm, col_norm, layout, rounded);
  return norms.normal() && norms.normal(norms.exponent);
}

bool has_plain_scores(DType dtype,
                      const double* row_norm,
                      const double* col_norm,
                      const Layout& layout) {
  return dtype == DType::f64 ? plain<double>(row_norm, col_norm, layout, false)
                             : plain<float>(row_norm, col_norm, layout, true);
}

template struct Norms<float>;
template struct Norms<double>;
template Norms<float> scaled_norms(const double*, const double*, const Layout&, bool);
template Norms<double> scaled_norms(const double*, const double*, const Layout&, bool);

}  // namespace lap::cpu
