// SPDX-License-Identifier: MIT
// The members of a group are brought into lines, one member a line, and many groups are decided
// side by side. Members of rows lie in lines already; of four columns the best two are decided in
// place (structures.inc).
#include "nm.h"

#include <algorithm>
#include <vector>

#include "exact_keys.h"

namespace lap::cpu {
namespace {

constexpr int64_t kTask = int64_t{1} << 16;  // elements a worker takes at a time
constexpr int64_t kCompared = 32;            // larger groups are not compared each with each
constexpr int64_t kHeld = int64_t{1} << 13;  // keys of a few rows: half of the L1 cache
constexpr int64_t kNarrowest = 64;           // columns of a few rows

// The same for groups of any size, one after another.
template <typename Key>
void keep_best_of_many(const Key* keys,
                       int64_t step,
                       int64_t of,
                       int64_t keep,
                       int64_t n,
                       uint8_t* marks,
                       int64_t mark_step) {
  std::vector<Key> sorted(of);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < of; ++i) sorted[i] = keys[i * step + j];
    const auto last = sorted.begin() + std::max<int64_t>(keep, 1) - 1;
    std::nth_element(sorted.begin(), last, sorted.end(), std::greater<Key>());
    const Key threshold = *last;
    int64_t ties = keep - std::count_if(sorted.begin(), last, [&](Key k) { return k > threshold; });
    for (int64_t i = 0; i < of; ++i) {
      const Key key = keys[i * step + j];
      const bool tie = key == threshold && ties > 0;
      ties -= tie;
      marks[i * mark_step + j] = keep > 0 && (key > threshold || tie);
    }
  }
}

template <typename Key>
void keep_best(const Key* keys,
               int64_t step,
               int64_t of,
               int64_t keep,
               int64_t n,
               uint8_t* marks,
               int64_t mark_step) {
  if (of <= kCompared) {
    structure_kernels<Key>().keep_best(keys, step, of, keep, n, marks, mark_step);
  } else {
    keep_best_of_many(keys, step, of, keep, n, marks, mark_step);
  }
}

// What one worker has of columns: lines of keys, and of marks, one member of each group a line.
struct ColumnBuffers {
  std::vector<int32_t> narrow;
  std::vector<int64_t> wide;
  std::vector<uint8_t> marks;

  std::vector<int32_t>& lines(int32_t) { return narrow; }
  std::vector<int64_t>& lines(int64_t) { return wide; }
};

// n elements in flat order, groups of `of` columns by `window` positions.
template <typename Key>
void column_groups(const Key* keys,
                   int64_t n,
                   int64_t window,
                   int64_t of,
                   int64_t keep,
                   ColumnBuffers* buffers,
                   uint8_t* mask) {
  const int64_t groups = n / (of * window);
  const int64_t step = groups * window;
  std::vector<Key>& lines = buffers->lines(Key{});
  lines.resize(n);
  buffers->marks.resize(n);
  const auto for_each_member = [&](const auto& visit) {
    if (window == 1) {
      for (int64_t i = 0; i < of; ++i) {
        for (int64_t g = 0; g < groups; ++g) visit(g * of + i, i * step + g);
      }
      return;
    }
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < of; ++i) {
        const int64_t from = (g * of + i) * window;
        const int64_t to = i * step + g * window;
        for (int64_t k = 0; k < window; ++k) visit(from + k, to + k);
      }
    }
  };
  for_each_member([&](int64_t flat, int64_t at) { lines[at] = keys[flat]; });
  keep_best(lines.data(), step, of, keep, step, buffers->marks.data(), step);
  for_each_member([&](int64_t flat, int64_t at) { mask[flat] = buffers->marks[at]; });
}

void mask_columns(const ExactKeys& keys,
                  int64_t keep,
                  int64_t of,
                  const Pool& pool,
                  std::vector<KeyBuffers>* workers) {
  const int64_t size = keys.source().x.size;
  const int64_t window = keys.layout().window;
  const int64_t unit = of * window;
  const int64_t tile = std::max<int64_t>(1, kTile / unit) * unit;
  const int64_t task = ceil_div(kTask, tile) * tile;
  const bool two_of_four = of == 4 && keep == 2 && window == 1;
  std::vector<ColumnBuffers> columns(pool.threads);
  for_each_chunk(pool, ceil_div(size, task), [&](int worker, int64_t c) {
    KeyBuffers* buffers = &(*workers)[worker];
    const int64_t end = std::min(size, (c + 1) * task);
    for (int64_t begin = c * task; begin < end; begin += tile) {
      const int64_t n = std::min(tile, end - begin);
      uint8_t* mask = keys.source().mask + begin;
      if (two_of_four && keys.two_of_four(begin, n, buffers, mask)) continue;
      keys.with_keys({begin, 0, 1, n}, buffers, [&](const auto* found) {
        if constexpr (sizeof(*found) == 4) {
          if (two_of_four) return kernels().structures.two_of_four(found, n, mask);
        }
        column_groups(found, n, window, of, keep, &columns[worker], mask);
      });
      keys.restrict_mask(begin, n, mask);
    }
  });
}

void mask_rows(const ExactKeys& keys,
               int64_t keep,
               int64_t of,
               const Pool& pool,
               std::vector<KeyBuffers>* workers) {
  const int64_t row_size = keys.layout().row_size();
  const int64_t width = std::min(kTile, std::max(kNarrowest, kHeld / of));
  const int64_t across = ceil_div(row_size, width);
  const int64_t pieces = keys.layout().rows / of * across;
  const int64_t task = std::max<int64_t>(1, kTask / (of * width));
  for_each_chunk(pool, ceil_div(pieces, task), [&](int worker, int64_t c) {
    for (int64_t piece = c * task; piece < std::min(pieces, (c + 1) * task); ++piece) {
      const int64_t left = piece % across * width;
      const int64_t begin = piece / across * of * row_size + left;
      const int64_t n = std::min(width, row_size - left);
      uint8_t* mask = keys.source().mask + begin;
      keys.with_keys({begin, row_size, of, n}, &(*workers)[worker],
                     [&](const auto* found) { keep_best(found, n, of, keep, n, mask, row_size); });
      for (int64_t i = 0; i < of; ++i) {
        keys.restrict_mask(begin + i * row_size, n, mask + i * row_size);
      }
    }
  });
}

}  // namespace

bool nm_mask(const Source& source, int64_t keep, int64_t of, bool rows, const Pool& pool) {
  const ExactKeys keys(source);
  if (source.x.size == 0) return true;
  std::vector<KeyBuffers> workers(pool.threads);
  const int64_t kept = std::min(keep, of);
  if (rows) {
    mask_rows(keys, kept, of, pool, &workers);
  } else {
    mask_columns(keys, kept, of, pool, &workers);
  }
  return all_finite(workers);
}

}  // namespace lap::cpu
