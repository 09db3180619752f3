// SPDX-License-Identifier: MIT
// One tensor to rank, and its elements beside their norms: gathered if they are strided, in tiles
// that fit the L1 cache. A worker takes a chunk of many tiles at a time (parallel.h).
#pragma once

#include "../math/layout.h"
#include "../math/score.h"
#include "elements.h"
#include "scale.h"

namespace lap::cpu {

constexpr int64_t kTile = 1024;    // elements: keys and weights fill a quarter of the L1 cache
constexpr int64_t kLongRow = 128;  // shorter rows are lined up with their norms in a buffer first

// Weights with their norms, or ready scores (no norms). The keys of several weights can be compared
// only where they are absolute: made of the norms as they are, so that a key is its score's bits.
// For this the products of norms must be normal numbers (has_plain_scores).
struct Source {
  Strided x;
  Layout layout;
  Norms norms;
  const uint8_t* eligible = nullptr;  // [size] or null: all
  uint8_t* mask = nullptr;            // [size] or null: only the threshold is wanted
  bool absolute = false;

  bool is_scores() const { return norms.row == nullptr; }
};

// Buffers for one tile, one per worker.
struct Scratch {
  alignas(64) char gathered[kTile * 8];
  alignas(64) char norms[kTile * 8];
};

// Calls visit(x, col_norm, row_norm, first, count) for elements [begin, begin + n), n <= kTile, in
// one call or one a row: col_norm runs along with x, row_norm is constant.
template <typename Float, typename Visit>
void for_each_with_norms(const Strided& x,
                         const Layout& layout,
                         const ScaledNorms<Float>& norms,
                         int64_t begin,
                         int64_t n,
                         Scratch* scratch,
                         const Visit& visit) {
  const char* data = static_cast<const char*>(elements(x, begin, n, scratch->gathered));
  const int64_t item = item_size(x.dtype);
  const int64_t row_size = layout.row_size();
  const int64_t repeat = norms.expanded ? 1 : layout.window;  // elements that share a col entry
  const int64_t entries = row_size / repeat;                  // col entries of one group
  int64_t row = begin / row_size;
  int64_t at = begin % row_size;
  if (repeat == 1 && row_size >= kLongRow) {
    for (int64_t done = 0; done < n; ++row, at = 0) {
      const int64_t count = std::min(n - done, row_size - at);
      const Float* col = norms.col.data() + layout.group_of(row) * entries + at;
      visit(data + done * item, col, norms.row[row], done, count);
      done += count;
    }
    return;
  }
  Float* lined_up = reinterpret_cast<Float*>(scratch->norms);
  for (int64_t done = 0; done < n; ++row, at = 0) {
    const Float* col = norms.col.data() + layout.group_of(row) * entries;
    const Float row_norm = norms.row[row];
    const int64_t stop = std::min(n, done + row_size - at);
    int64_t entry = at / repeat;
    int64_t left = repeat - at % repeat;
    while (done < stop) {
      const Float c = product(row_norm, col[entry++]);
      for (const int64_t end = std::min(stop, done + left); done < end;) lined_up[done++] = c;
      left = repeat;
    }
  }
  visit(data, lined_up, Float{1}, int64_t{0}, n);  // product(1, c) is c
}

}  // namespace lap::cpu
