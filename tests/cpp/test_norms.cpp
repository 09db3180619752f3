// SPDX-License-Identifier: MIT
// Energies, scores, zeroing and the memory walk against their definitions, bit by bit.
#include <numeric>

#include "../../csrc/cpu/norms.h"
#include "../../csrc/cpu/score.h"
#include "../../csrc/math/sums.h"
#include "doctest.h"
#include "layers.h"
#include "naive.h"

using lap::cpu::Pool;
using lap::cpu::Strided;
using layers::DType;
using layers::Layer;
using layers::Layout;

namespace {

double row_energy(const double* x, int64_t n) {
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

double column_energy(const double* x, int64_t rows, int64_t stride) {
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

// Both energies from one reading against one at a time, bit by bit.
void check_energies(const Strided& x, const Layout& layout, const Pool& pool) {
  const size_t rows = layout.rows;
  const size_t cols = layout.groups * layout.cols;
  std::vector<double> right(rows + cols, -1.0);
  std::vector<double> got(rows + cols, -2.0);
  lap::cpu::row_energy(x, layout.rows, 1.0, pool, right.data());
  lap::cpu::col_energy(x, layout, 1.0, pool, right.data() + rows);
  lap::cpu::energies(x, layout, pool, got.data(), got.data() + rows);
  CAPTURE(layout.rows);
  CAPTURE(layout.cols);
  CAPTURE(layout.window);
  CAPTURE(layout.groups);
  CAPTURE(pool.threads);
  CHECK(memcmp(got.data(), right.data(), right.size() * sizeof(double)) == 0);
}

}  // namespace

TEST_CASE("a 3-4-5 row") {
  const double x[] = {3, 4};
  Strided s;
  const int64_t shape[] = {1, 2};
  const int64_t stride[] = {2, 1};
  REQUIRE(lap::cpu::make_strided(x, DType::f64, 2, shape, stride, &s));
  double energy = 0;
  lap::cpu::row_energy(s, 1, 1.0, lap::cpu::std_thread_pool(1), &energy);
  CHECK(energy == 25);
}

TEST_CASE("energies in the documented order, for every dtype, layout and thread count") {
  std::mt19937_64 random(1);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const Layout& layout : {Layout{70, 33, 9, 1}, Layout{3, 5000, 1, 1}, Layout{200, 7, 4, 4},
                                 Layout{1, 1, 1, 1}, Layout{65, 1500, 1, 1}}) {
      const Layer layer = layers::random_layer(dtype, layout, random);
      const Strided x = layer.source(nullptr).x;
      const int64_t width = layout.row_size();
      const int64_t rows = layout.rows / layout.groups;
      for (const int threads : {1, 3}) {
        const Pool pool = lap::cpu::std_thread_pool(threads);
        std::vector<double> row(layout.rows);
        lap::cpu::row_energy(x, layout.rows, 1.0, pool, row.data());
        for (int64_t r = 0; r < layout.rows; ++r) {
          CHECK(row[r] == row_energy(&layer.w[r * width], width));
        }
        std::vector<double> col(layout.groups * layout.cols);
        lap::cpu::col_energy(x, layout, 1.0, pool, col.data());
        for (int64_t c = 0; c < layout.groups * layout.cols; ++c) {
          const double* first =
              &layer.w[c / layout.cols * rows * width + c % layout.cols * layout.window];
          double energy = 0;
          for (int64_t k = 0; k < layout.window; ++k) {
            energy += column_energy(first + k, rows, width);
          }
          CHECK(col[c] == energy);
        }
        check_energies(x, layout, pool);
      }
    }
  }
}

TEST_CASE("both energies from one reading: around the borders of tiles, groups and waves") {
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
      Strided turned;  // the same memory in another order: nothing lies in a run
      const int64_t shape[] = {layout.rows, layout.row_size()};
      const int64_t stride[] = {1, layout.rows};
      REQUIRE(lap::cpu::make_strided(layer.memory.data(), dtype, 2, shape, stride, &turned));
      for (const int threads : {1, 2, 3, 8}) {
        const Pool pool = lap::cpu::std_thread_pool(threads);
        check_energies(layer.source(nullptr).x, layout, pool);
        check_energies(turned, layout, pool);
      }
    }
  }
}

TEST_CASE("both energies from one reading: a wave that ends inside a group") {
  const Layout layout = {90 * 65, 1496, 1, 90};  // 175 segments a wave, two a group
  std::vector<float> w(layout.rows * layout.row_size());
  for (size_t p = 0; p < w.size(); ++p) w[p] = static_cast<float>(p * 2654435761 % 4194301);
  Strided x;
  const int64_t size = static_cast<int64_t>(w.size());
  const int64_t one = 1;
  REQUIRE(lap::cpu::make_strided(w.data(), DType::f32, 1, &size, &one, &x));
  for (const int threads : {1, 2}) check_energies(x, layout, lap::cpu::std_thread_pool(threads));
}

TEST_CASE("both energies from one reading: every exponent, denormals and infinity") {
  constexpr int64_t kSize = 0x10000;  // every pattern of the upper 16 bits, but NaNs
  std::vector<uint64_t> memory(kSize);
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    const uint64_t infinity = dtype == DType::f16 ? 0x7c00 : dtype == DType::f64 ? 0x7ff0 : 0x7f80;
    for (uint64_t i = 0; i < kSize; ++i) {
      const uint64_t upper = (i & 0x7fff) > infinity ? 1 : i;
      const uint64_t lower = (upper & 0x7fff) == infinity ? 0 : 0x12345678;
      const uint64_t bits = upper << 48 | lower << 16;
      const int64_t size = lap::cpu::item_size(dtype);
      char* at = reinterpret_cast<char*>(memory.data()) + i * size;
      memcpy(at, reinterpret_cast<const char*>(&bits) + 8 - size, size);
    }
    Strided x;
    const int64_t one = 1;
    REQUIRE(lap::cpu::make_strided(memory.data(), dtype, 1, &kSize, &one, &x));
    check_energies(x, {64, 1024, 1, 1}, lap::cpu::std_thread_pool(1));
  }
}

TEST_CASE("scores: float products, and the wide form where they leave float's range") {
  std::mt19937_64 random(2);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const int exponent : {0, 40, -120, -160, 130}) {
      Layer layer = layers::random_layer(dtype, {50, 40, 9, 2}, random);
      for (double& x : layer.row_norm) x = std::ldexp(x, exponent);
      for (double& x : layer.col_norm) x = std::ldexp(x, -exponent / 2);
      std::vector<double> out(layer.w.size());
      const Strided x = layer.source(nullptr).x;
      const Pool pool = lap::cpu::std_thread_pool(2);
      REQUIRE(lap::cpu::score(x, layer.layout, layer.row_norm.data(), layer.col_norm.data(), true,
                              pool, out.data()));
      for (size_t p = 0; p < layer.w.size(); ++p) {
        const int64_t row = static_cast<int64_t>(p) / (layer.layout.cols * 9);
        const int64_t col =
            row / 25 * layer.layout.cols + static_cast<int64_t>(p) / 9 % layer.layout.cols;
        const bool to_float = dtype != DType::f64;
        const double c = naive::rounded(naive::rounded(layer.row_norm[row], to_float) *
                                            naive::rounded(layer.col_norm[col], to_float),
                                        to_float);
        const double exact = std::fabs(layer.w[p]) * c;
        if (to_float) {
          CHECK(reinterpret_cast<const float*>(out.data())[p] == static_cast<float>(exact));
        } else {
          CHECK(out[p] == exact);
        }
      }
    }
  }
}

TEST_CASE("every pattern of float16 and bfloat16 is widened exactly") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float half = lap::widen(lap::Half{static_cast<uint16_t>(bits)});
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const double mantissa = bits & 1023;
    double value =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) value = mantissa == 0 ? std::numeric_limits<double>::infinity() : NAN;
    if (bits >> 15) value = -value;
    CHECK((half == value || (std::isnan(half) && std::isnan(value))));
    CHECK(std::signbit(half) == (bits >> 15 != 0));
    const float brain = lap::widen(lap::BFloat16{static_cast<uint16_t>(bits)});
    CHECK(lap::bit_cast<uint32_t>(brain) == bits << 16);
  }
}

TEST_CASE("zeroing writes +0.0 where the mask is 0 and nothing else, through any strides") {
  std::vector<float> memory(2 * 30 * 40, -3.0f);
  Strided x;
  const int64_t shape[] = {30, 40};
  const int64_t stride[] = {2, 60};  // a transposed view of every second element
  REQUIRE(lap::cpu::make_strided(memory.data(), DType::f32, 2, shape, stride, &x));
  std::vector<uint8_t> mask(1200);
  for (size_t p = 0; p < mask.size(); ++p) mask[p] = p % 3 == 0;
  lap::cpu::zero_dropped(x, mask.data(), lap::cpu::std_thread_pool(2));
  for (int64_t p = 0; p < 1200; ++p) {
    const int64_t at = p / 40 * 2 + p % 40 * 60;
    CHECK(memory[at] == (mask[p] ? -3.0f : 0.0f));
    CHECK(std::signbit(memory[at]) == (mask[p] != 0));
    CHECK(memory[at + 1] == -3.0f);
  }
}

TEST_CASE("a walk through strides visits the flat order, from any begin") {
  std::vector<float> memory(7 * 5 * 3 * 4);
  std::iota(memory.begin(), memory.end(), 0.0f);
  Strided x;
  const int64_t shape[] = {4, 1, 5, 3, 7};
  const int64_t stride[] = {1, 99, 12, 4, 60};
  REQUIRE(lap::cpu::make_strided(memory.data(), DType::f32, 5, shape, stride, &x));
  std::vector<float> right;
  for (int64_t p = 0; p < 420; ++p) {
    right.push_back(memory[p / 105 + p / 21 % 5 * 12 + p / 7 % 3 * 4 + p % 7 * 60]);
  }
  std::vector<float> buffer(420);
  for (int64_t begin = 0; begin < 420; begin += 13) {
    const int64_t n = std::min<int64_t>(37, 420 - begin);
    const float* got = static_cast<const float*>(lap::cpu::elements(x, begin, n, buffer.data()));
    CHECK(std::equal(got, got + n, right.begin() + begin));
  }
}
