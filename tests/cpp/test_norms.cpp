// SPDX-License-Identifier: MIT
// Squared norms against their definition, bit by bit.
#include "../../csrc/cpu/norms.h"
#include "../../csrc/math/sums.h"
#include "doctest.h"
#include "layers.h"

using lap::Strided;
using lap::cpu::Pool;
using layers::DType;
using layers::Layer;
using layers::Layout;

namespace {

double row_squared_norms(const double* x, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += lap::kSegment) {
    double lane[lap::kLanes] = {};
    for (int64_t j = begin; j < std::min<int64_t>(begin + lap::kSegment, n); ++j) {
      lane[(j - begin) % lap::kLanes] += x[j] * x[j];
    }
    for (int h = lap::kLanes / 2; h > 0; h /= 2) {
      for (int l = 0; l < h; ++l) lane[l] += lane[l + h];
    }
    total += lane[0];
  }
  return total;
}

double column_squared_norm(const double* x, int64_t rows, int64_t stride) {
  double total = 0;
  for (int64_t begin = 0; begin < rows; begin += lap::kSegmentRows) {
    double sum = 0;
    for (int64_t r = begin; r < std::min<int64_t>(begin + lap::kSegmentRows, rows); ++r) {
      sum += x[r * stride] * x[r * stride];
    }
    total += sum;
  }
  return total;
}

// The squared norms of rows and of columns, each from a reading of its own.
std::vector<double> squared_norms_apart(const Strided& x, const Layout& layout, const Pool& pool) {
  std::vector<double> squared_norms(layout.rows + layout.channels(), -1.0);
  lap::cpu::row_squared_norms(x, layout.rows, 1.0, pool, squared_norms.data());
  lap::cpu::col_squared_norms(x, layout, 1.0, pool, squared_norms.data() + layout.rows);
  return squared_norms;
}

// Both squared norms from one reading, bit by bit, with so many threads each time.
void check_squared_norms(const Strided& x,
                         const Layout& layout,
                         std::initializer_list<int> threads) {
  const std::vector<double> right = squared_norms_apart(x, layout, lap::cpu::thread_pool(3));
  for (const int workers : threads) {
    std::vector<double> got(right.size(), -2.0);
    const Pool pool = lap::cpu::thread_pool(workers);
    lap::cpu::squared_norms(x, layout, pool, got.data(), got.data() + layout.rows);
    CAPTURE(layout.rows);
    CAPTURE(layout.cols);
    CAPTURE(layout.window);
    CAPTURE(layout.groups);
    CAPTURE(workers);
    CHECK(memcmp(got.data(), right.data(), right.size() * sizeof(double)) == 0);
  }
}

}  // namespace

TEST_CASE("a 3-4-5 row") {
  const double x[] = {3, 4};
  Strided s;
  const int64_t shape[] = {1, 2};
  const int64_t stride[] = {2, 1};
  REQUIRE(lap::make_strided(x, DType::f64, 2, shape, stride, &s));
  double squared_norm = 0;
  lap::cpu::row_squared_norms(s, 1, 1.0, lap::cpu::thread_pool(1), &squared_norm);
  CHECK(squared_norm == 25);
}

TEST_CASE("squared_norms in the documented order, for every dtype, layout and thread count") {
  std::mt19937_64 random(1);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const Layout& layout : {Layout{70, 33, 9, 1}, Layout{3, 5000, 1, 1}, Layout{200, 7, 4, 4},
                                 Layout{1, 1, 1, 1}, Layout{65, 1500, 1, 1}}) {
      const Layer layer = layers::random_layer(dtype, layout, random);
      const Strided x = layer.source(nullptr).x;
      const int64_t width = layout.row_size();
      const int64_t rows = layout.rows / layout.groups;
      for (const int threads : {1, 3}) {
        const Pool pool = lap::cpu::thread_pool(threads);
        std::vector<double> row(layout.rows);
        lap::cpu::row_squared_norms(x, layout.rows, 1.0, pool, row.data());
        for (int64_t r = 0; r < layout.rows; ++r) {
          CHECK(row[r] == row_squared_norms(&layer.w[r * width], width));
        }
        std::vector<double> col(layout.groups * layout.cols);
        lap::cpu::col_squared_norms(x, layout, 1.0, pool, col.data());
        for (int64_t c = 0; c < layout.groups * layout.cols; ++c) {
          const double* first =
              &layer.w[c / layout.cols * rows * width + c % layout.cols * layout.window];
          double squared_norm = 0;
          for (int64_t k = 0; k < layout.window; ++k) {
            squared_norm += column_squared_norm(first + k, rows, width);
          }
          CHECK(col[c] == squared_norm);
        }
      }
      check_squared_norms(x, layout, {1, 3});
    }
  }
}

TEST_CASE("both squared_norms from one reading: around the borders of tiles, groups and waves") {
  std::mt19937_64 random(3);
  std::vector<Layout> layouts;
  for (const int64_t rows : {1, 3, 4, 5, 63, 64, 65, 68, 129, 200}) {
    for (const int64_t width : {1, 7, 31, 32, 33, 1023, 1024, 1025, 2079}) {
      layouts.push_back({rows, width, 1, 1});
    }
  }
  for (const int64_t groups : {2, 3, 7}) {
    for (const int64_t rows : {1, 4, 64, 66}) layouts.push_back({rows * groups, 5, 9, groups});
  }
  layouts.push_back({70, 130, 25, 1});
  layouts.push_back({0, 5, 2, 1});
  layouts.push_back({5, 0, 2, 1});
  layouts.push_back({5, 3, 0, 1});
  layouts.push_back({1500, 1024, 1, 300});  // two waves of segments, each the end of a group
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const Layout& layout : layouts) {
      const Layer layer = layers::random_layer(dtype, layout, random);
      Strided turned;  // the same memory in another order: nothing is contiguous
      const int64_t shape[] = {layout.rows, layout.row_size()};
      const int64_t stride[] = {1, layout.rows};
      REQUIRE(lap::make_strided(layer.memory.data(), dtype, 2, shape, stride, &turned));
      check_squared_norms(layer.source(nullptr).x, layout, {1, 2, 3, 8});
      check_squared_norms(turned, layout, {1, 2, 3, 8});
    }
  }
}

TEST_CASE("both squared_norms from one reading: a wave that ends inside a group") {
  const Layout layout = {90 * 65, 1496, 1, 90};  // 175 segments a wave, two a group
  std::vector<float> w(layout.rows * layout.row_size());
  for (size_t p = 0; p < w.size(); ++p) w[p] = static_cast<float>(p * 2654435761 % 4194301);
  Strided x;
  const int64_t size = static_cast<int64_t>(w.size());
  const int64_t one = 1;
  REQUIRE(lap::make_strided(w.data(), DType::f32, 1, &size, &one, &x));
  check_squared_norms(x, layout, {1, 2});
}

TEST_CASE("both squared_norms from one reading: every exponent, denormals and infinity") {
  constexpr int64_t kSize = 0x10000;  // every pattern of the upper 16 bits, but NaNs
  std::vector<uint64_t> memory(kSize);
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    const uint64_t infinity = dtype == DType::f16 ? 0x7c00 : dtype == DType::f64 ? 0x7ff0 : 0x7f80;
    for (uint64_t i = 0; i < kSize; ++i) {
      const uint64_t upper = (i & 0x7fff) > infinity ? 1 : i;
      const uint64_t lower = (upper & 0x7fff) == infinity ? 0 : 0x12345678;
      const uint64_t bits = upper << 48 | lower << 16;
      const int64_t size = lap::item_size(dtype);
      char* at = reinterpret_cast<char*>(memory.data()) + i * size;
      memcpy(at, reinterpret_cast<const char*>(&bits) + 8 - size, size);
    }
    Strided x;
    const int64_t one = 1;
    REQUIRE(lap::make_strided(memory.data(), dtype, 1, &kSize, &one, &x));
    check_squared_norms(x, {64, 1024, 1, 1}, {1});
  }
}
