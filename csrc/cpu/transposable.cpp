// SPDX-License-Identifier: MIT
// Tiles of four rows are decided side by side: their 16 entries are brought into 16 lines.
#include "transposable.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "exact_keys.h"

namespace lap::cpu {
namespace {

constexpr int64_t kTask = int64_t{1} << 16;  // elements a worker takes at a time
constexpr int64_t kWidth = 512;              // columns at a time: all buffers fit the L2 cache

struct Buffers {
  std::vector<double> values;     // [4, n]
  std::vector<double> lines;      // [16, tiles, padded]
  std::vector<double> named;      // the same: 1 for what is eligible, 0 else
  std::vector<uint8_t> patterns;  // [tiles, padded]
};

class Masker {
 public:
  Masker(const Source& source, bool squared, int threads)
      : keys_(source), squared_(squared), workers_(threads), buffers_(threads) {
    for (int number = 0; number < kPatternCount; ++number) {
      for (int row = 0; row < kTileSide; ++row) {
        const int pair = kPatterns.pairs[number][row];
        marks_[number][row][kPatterns.low[pair]] = 1;
        marks_[number][row][kPatterns.high[pair]] = 1;
      }
    }
  }

  bool finite() const { return all_finite(workers_); }

  // The mask of n columns times positions of four rows, from element `begin` of the flat order on.
  void mask(int worker, int64_t begin, int64_t n) {
    Buffers& b = buffers_[worker];
    const int64_t row_size = keys_.layout().row_size();
    const int64_t tiles = n / kTileSide;
    const int64_t step = ceil_div(tiles, kTilesPadded) * kTilesPadded;
    b.values.resize(kTileSide * n);
    b.lines.resize(kTileSide * kTileSide * step);
    b.patterns.resize(step);
    keys_.values({begin, row_size, kTileSide, n}, squared_, &workers_[worker], b.values.data());
    const uint8_t* eligible = keys_.source().eligible;
    if (eligible != nullptr) b.named.resize(b.lines.size());
    for (int64_t row = 0; row < kTileSide; ++row) {
      line_up(b.values.data() + row * n, tiles, b.lines.data() + kTileSide * row * step, step);
      if (eligible == nullptr) continue;
      const uint8_t* may = eligible + begin + row * row_size;
      line_up(may, tiles, b.named.data() + kTileSide * row * step, step);
    }
    const double* named = eligible == nullptr ? nullptr : b.named.data();
    kernels().structures.best_patterns(b.lines.data(), named, step, tiles, b.patterns.data());
    for (int64_t row = 0; row < kTileSide; ++row) {
      uint8_t* mask = keys_.source().mask + begin + row * row_size;
      write_row(row, b.patterns.data(), tiles, mask);
      keys_.restrict_mask(begin + row * row_size, n, mask);
    }
  }

 private:
  // Calls visit(entry, column, tile) for the entries of a row of tiles.
  template <typename Visit>
  void for_each_entry(int64_t tiles, const Visit& visit) const {
    const int64_t window = keys_.layout().window;
    if (window == 1) {
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t c = 0; c < kTileSide; ++c) visit(kTileSide * t + c, c, t);
      }
      return;
    }
    for (int64_t first = 0; first < tiles; first += window) {
      for (int64_t c = 0; c < kTileSide; ++c) {
        const int64_t entry = kTileSide * first + c * window;
        for (int64_t k = 0; k < window; ++k) visit(entry + k, c, first + k);
      }
    }
  }

  // Brings the values, or bytes that say yes or no, of a row of tiles into lines.
  template <typename T>
  void line_up(const T* row, int64_t tiles, double* lines, int64_t step) const {
    for_each_entry(tiles, [&](int64_t entry, int64_t column, int64_t tile) {
      lines[column * step + tile] = sizeof(T) == 1 ? double(row[entry] != 0) : double(row[entry]);
    });
  }

  void write_row(int64_t row, const uint8_t* patterns, int64_t tiles, uint8_t* mask) const {
    if (keys_.layout().window == 1) {
      for (int64_t t = 0; t < tiles; ++t) {
        std::memcpy(mask + kTileSide * t, marks_[patterns[t]][row], kTileSide);
      }
      return;
    }
    for_each_entry(tiles, [&](int64_t entry, int64_t column, int64_t tile) {
      mask[entry] = marks_[patterns[tile]][row][column];
    });
  }

  ExactKeys keys_;
  bool squared_;
  std::vector<KeyBuffers> workers_;
  std::vector<Buffers> buffers_;
  uint8_t marks_[kPatternCount][kTileSide][kTileSide] = {};
};

}  // namespace

bool transposable_mask(const Source& source, bool squared, const Pool& pool) {
  if (source.x.size == 0) return true;
  const int64_t row_size = source.layout.row_size();
  const int64_t unit = kTileSide * source.layout.window;
  const int64_t width = std::min(row_size, std::max<int64_t>(1, kWidth / unit) * unit);
  const int64_t across = ceil_div(row_size, width);
  const int64_t pieces = source.layout.rows / kTileSide * across;
  const int64_t task = std::max<int64_t>(1, kTask / (kTileSide * width));
  Masker masker(source, squared, pool.threads);
  for_each_chunk(pool, ceil_div(pieces, task), [&](int worker, int64_t c) {
    for (int64_t piece = c * task; piece < std::min(pieces, (c + 1) * task); ++piece) {
      const int64_t left = piece % across * width;
      const int64_t begin = piece / across * kTileSide * row_size + left;
      masker.mask(worker, begin, std::min(width, row_size - left));
    }
  });
  return masker.finite();
}

}  // namespace lap::cpu
