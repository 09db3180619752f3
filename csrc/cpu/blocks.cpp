// SPDX-License-Identifier: MIT
// A worker takes a row of blocks, or some of its columns, and no sum is anybody else's.
#include "blocks.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../math/sums.h"
#include "exact_keys.h"

namespace lap::cpu {
namespace {

constexpr int64_t kTask = int64_t{1} << 16;  // elements a worker takes at a time
static_assert(kTile == kSegment, "a tile of keys is a segment of a sum");

// The rows of the weight cut where rows of blocks end: part i has rows begins[i] .. begins[i + 1].
std::vector<int64_t> parts_of(const Blocks& blocks, int64_t rows) {
  std::vector<int64_t> begins;
  for (int64_t row = 0; row < rows;) {
    begins.push_back(row);
    const int64_t inside = (blocks.first + row) % blocks.height;
    const int64_t end = std::min(inside / blocks.rows * blocks.rows + blocks.rows, blocks.height);
    row += end - inside;
  }
  begins.push_back(rows);
  return begins;
}

// Calls body(worker, part, first column of blocks, its end) for pieces of about kTask elements.
template <typename Body>
void for_each_piece(const std::vector<int64_t>& begins,
                    int64_t across,
                    int64_t width,
                    const Pool& pool,
                    const Body& body) {
  const int64_t parts = static_cast<int64_t>(begins.size()) - 1;
  if (parts == 0 || across == 0) return;
  const int64_t rows = ceil_div(begins.back(), parts);
  const int64_t most = std::max<int64_t>(1, kTask / std::max<int64_t>(1, rows * width));
  const int64_t least = std::min(across, ceil_div(kTile, width));  // columns: rows are read in runs
  const int64_t columns = std::max(least, std::min(most, across));
  const int64_t pieces = ceil_div(across, columns);
  for_each_chunk(pool, parts * pieces, [&](int worker, int64_t c) {
    const int64_t left = c % pieces * columns;
    body(worker, c / pieces, left, std::min(across, left + columns));
  });
}

class BlockSums {
 public:
  BlockSums(const Source& source, const Blocks& blocks, bool squared, int threads)
      : keys_(source),
        row_size_(source.layout.row_size()),
        width_(blocks.cols * source.layout.window),
        squared_(squared),
        workers_(threads) {}

  int64_t width() const { return width_; }
  bool finite() const { return all_finite(workers_); }

  // Adds what one row has in blocks [left, right) to their sums.
  void add_row(int worker, int64_t row, int64_t left, int64_t right, double* sums) {
    const int64_t at_once = std::max<int64_t>(1, kTile / width_);
    for (int64_t block = left; block < right; block += at_once) {
      const int64_t count = std::min(at_once, right - block);
      const int64_t begin = block * width_;
      const int64_t n = std::min(count * width_, row_size_ - begin);
      if (width_ > kTile) {
        sums[block] += 0.0 + wide_block(worker, row * row_size_ + begin, n);
        continue;
      }
      double values[kTile];
      fill(worker, row * row_size_ + begin, n, values);
      const int64_t full = n / width_;
      kernels().structures.add_blocks(values, width_, full, sums + block);
      if (full < count) {
        const int64_t at = full * width_;
        sums[block + full] += 0.0 + kernels().structures.sum_segment(values + at, n - at);
      }
    }
  }

 private:
  double wide_block(int worker, int64_t begin, int64_t n) {
    double total = 0;
    double values[kTile];
    for (int64_t done = 0; done < n; done += kTile) {
      const int64_t count = std::min(kTile, n - done);
      fill(worker, begin + done, count, values);
      total += kernels().structures.sum_segment(values, count);
    }
    return total;
  }

  void fill(int worker, int64_t begin, int64_t n, double* values) {
    keys_.values({begin, 0, 1, n}, squared_, &workers_[worker], values);
  }

  ExactKeys keys_;
  int64_t row_size_;
  int64_t width_;
  bool squared_;
  std::vector<KeyBuffers> workers_;
};

}  // namespace

bool block_sums(
    const Source& source, const Blocks& blocks, bool squared, const Pool& pool, double* sums) {
  if (source.x.size == 0) return true;
  const int64_t across = blocks.across(source.layout.cols);
  const std::vector<int64_t> begins = parts_of(blocks, source.layout.rows);
  BlockSums work(source, blocks, squared, pool.threads);
  for_each_piece(begins, across, work.width(), pool,
                 [&](int worker, int64_t part, int64_t left, int64_t right) {
                   for (int64_t row = begins[part]; row < begins[part + 1]; ++row) {
                     work.add_row(worker, row, left, right, sums + blocks.unit_of(row) * across);
                   }
                 });
  return work.finite();
}

void block_mask(const uint8_t* kept,
                const Layout& layout,
                const Blocks& blocks,
                const uint8_t* eligible,
                const Pool& pool,
                uint8_t* mask) {
  const int64_t row_size = layout.row_size();
  if (layout.size() == 0) return;
  const int64_t width = blocks.cols * layout.window;
  const int64_t across = blocks.across(layout.cols);
  const std::vector<int64_t> begins = parts_of(blocks, layout.rows);
  std::vector<std::vector<uint8_t>> lines(pool.threads);
  for_each_piece(begins, across, width, pool,
                 [&](int worker, int64_t part, int64_t left, int64_t right) {
                   std::vector<uint8_t>& line = lines[worker];
                   const int64_t first = left * width;
                   const int64_t n = std::min(right * width, row_size) - first;
                   line.resize(n);
                   const uint8_t* of_part = kept + blocks.unit_of(begins[part]) * across;
                   for (int64_t block = left; block < right; ++block) {
                     const int64_t at = block * width - first;
                     std::memset(line.data() + at, of_part[block] != 0, std::min(width, n - at));
                   }
                   for (int64_t row = begins[part]; row < begins[part + 1]; ++row) {
                     uint8_t* out = mask + row * row_size + first;
                     std::memcpy(out, line.data(), n);
                     if (eligible == nullptr) continue;
                     const uint8_t* may = eligible + row * row_size + first;
                     for (int64_t j = 0; j < n; ++j) out[j] &= static_cast<uint8_t>(may[j] != 0);
                   }
                 });
}

}  // namespace lap::cpu
