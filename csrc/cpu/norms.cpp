// SPDX-License-Identifier: MIT
// One reading of the weight, in tiles: a segment of some rows times a segment of some columns (see
// math/sums.h for both).
#include "norms.h"

#include <vector>

#include "../math/sums.h"
#include "elements.h"
#include "isa.h"

namespace lap::cpu {
namespace {

constexpr int64_t kTask = 1 << 17;  // elements a worker takes at a time
constexpr int64_t kMaxTile = 1024;  // columns whose sums stay in the L1 cache: 2 x 8 KB
constexpr int64_t kMinTile = 64;    // columns below which a tile's rows waste cache lines
constexpr int64_t kWave = 1 << 18;  // column sums kept at a time: 2 MB, of 16 M elements
static_assert(kMaxTile >= kSegment);

// Buffers for kRowsAtOnce rows of a tile that are not contiguous.
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

// The tiles of both sums: column segments of at most kSegmentRows rows, none across a group's end,
// times row segments of kSegment columns.
struct Tiles {
  int64_t width;
  int64_t rows;      // of one group
  int64_t of_group;  // column segments of one group
  int64_t segments;  // column segments of all groups
  int64_t of_row;    // row segments of one row

  explicit Tiles(const Layout& layout)
      : width(layout.row_size()),
        rows(layout.group_rows()),
        of_group(col_segments(rows)),
        segments(layout.groups * of_group),
        of_row(row_segments(width)) {}

  int64_t first_row(int64_t s) const { return s / of_group * rows + s % of_group * kSegmentRows; }
  int64_t stop_row(int64_t s) const {
    return std::min((s / of_group + 1) * rows, first_row(s) + kSegmentRows);
  }
};

// The sums of one tile: column segment `segment`, the row segments at `along`.
void tile_squared_norms(const Strided& x,
                        const Tiles& tiles,
                        int64_t segment,
                        int64_t along,
                        double* row_sums,  // [rows, of_row] out: those of this tile
                        double* sums) {    // [width] out: those of this tile
  const auto add_squared_norms = kernels().add_squared_norms[static_cast<int>(x.dtype)];
  const int64_t begin = along * kSegment;
  const int64_t n = std::min<int64_t>(kSegment, tiles.width - begin);
  const int64_t stop = tiles.stop_row(segment);
  Gathered gathered;
  std::fill(sums + begin, sums + begin + n, 0.0);
  for (int64_t r = tiles.first_row(segment); r < stop; r += kRowsAtOnce) {
    const void* at[kRowsAtOnce];
    double found[kRowsAtOnce];
    rows_at(x, r, stop, tiles.width, begin, n, &gathered, at);
    const bool more = x.contiguous() && r + 2 * kRowsAtOnce <= stop;
    add_squared_norms(at, n, more ? kRowsAtOnce * tiles.width : 0, found, sums + begin);
    for (int64_t i = 0; i < std::min<int64_t>(kRowsAtOnce, stop - r); ++i) {
      row_sums[(r + i) * tiles.of_row + along] = found[i];
    }
  }
}

// totals[group, m] += sums[s - begin, m] for s = begin .. stop - 1, in order
void add_col_segments(const Tiles& tiles,
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

// squared_norm[r] = the segments of row r, added in order
void add_row_segments(
    const double* row_sums, int64_t rows, int64_t of_row, const Pool& pool, double* squared_norm) {
  const int64_t chunk = std::max<int64_t>(1, kWave / of_row);
  for_each_chunk(pool, ceil_div(rows, chunk), [&](int, int64_t task) {
    for (int64_t r = task * chunk; r < std::min(rows, (task + 1) * chunk); ++r) {
      squared_norm[r] = 0;
      for (int64_t s = 0; s < of_row; ++s) squared_norm[r] += row_sums[r * of_row + s];
    }
  });
}

// squared_norm[c] = the window positions of channel c, added in order
void add_windows(const double* totals, const Layout& layout, double* squared_norm) {
  for (int64_t c = 0; c < layout.channels(); ++c) {
    squared_norm[c] = 0;
    for (int64_t k = 0; k < layout.window; ++k) squared_norm[c] += totals[c * layout.window + k];
  }
}

}  // namespace

void row_squared_norms(
    const Strided& x, int64_t rows, double scale, const Pool& pool, double* squared_norm) {
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
      squared_norm[r] = total;
    }
  });
}

void col_squared_norms(
    const Strided& x, const Layout& layout, double scale, const Pool& pool, double* squared_norm) {
  const int64_t width = layout.row_size();
  std::fill(squared_norm, squared_norm + layout.channels(), 0.0);
  if (width == 0) return;
  const int64_t rows = layout.group_rows();
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
  add_windows(totals.data(), layout, squared_norm);
}

// In waves of segments, so that the columns' sums of one wave are all that is kept: 2 MB, or 64 KB
// a thread where that is more. Beside them 8 bytes a row and 1024 columns.
void squared_norms(
    const Strided& x, const Layout& layout, const Pool& pool, double* row, double* col) {
  const bool has_kernel = kernels().add_squared_norms[static_cast<int>(x.dtype)] != nullptr;
  const Tiles tiles(layout);
  if (!has_kernel || tiles.rows < kRowsAtOnce || tiles.width == 0) {
    row_squared_norms(x, layout.rows, 1.0, pool, row);
    col_squared_norms(x, layout, 1.0, pool, col);
    return;
  }
  const int64_t tile = kSegmentRows * std::min<int64_t>(kSegment, tiles.width);
  const int64_t chunk = std::max<int64_t>(1, kTask / tile);  // segments a worker takes at a time
  const int64_t busy = ceil_div(int64_t{4} * pool.threads, tiles.of_row) * chunk;
  const int64_t wave = std::min(tiles.segments, std::max(busy, kWave / tiles.width));
  std::vector<double> row_sums(layout.rows * tiles.of_row);
  std::vector<double> sums(wave * tiles.width);
  std::vector<double> totals(layout.groups * tiles.width);
  for (int64_t begin = 0; begin < tiles.segments; begin += wave) {
    const int64_t stop = std::min(tiles.segments, begin + wave);
    const int64_t tasks = ceil_div(stop - begin, chunk) * tiles.of_row;
    for_each_chunk(pool, tasks, [&](int, int64_t task) {
      const int64_t first = begin + task / tiles.of_row * chunk;
      for (int64_t s = first; s < std::min(stop, first + chunk); ++s) {
        tile_squared_norms(x, tiles, s, task % tiles.of_row, row_sums.data(),
                           sums.data() + (s - begin) * tiles.width);
      }
    });
    add_col_segments(tiles, begin, stop, sums.data(), pool, totals.data());
  }
  add_row_segments(row_sums.data(), layout.rows, tiles.of_row, pool, row);
  add_windows(totals.data(), layout, col);
}

}  // namespace lap::cpu
