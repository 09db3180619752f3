// SPDX-License-Identifier: MIT
// Stored scores against the definition, bit by bit: float products, and the wide form where they
// leave float's range.
#include <algorithm>
#include <limits>

#include "../../csrc/cpu/score.h"
#include "doctest.h"
#include "layers.h"
#include "naive.h"

using lap::Norms;
using lap::Strided;
using layers::DType;
using layers::Layer;
using layers::Layout;

namespace {

constexpr DType kAllDTypes[] = {DType::f32, DType::f16, DType::bf16, DType::f64};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Scores {
  bool finite;
  std::vector<double> values;
};

// The scores of x as doubles, by so many threads.
Scores scores_of(const Strided& x,
                 const Layout& layout,
                 const Norms& norms,
                 int threads = 2,
                 bool check_finite = true) {
  const bool to_float = x.dtype != DType::f64;
  const int64_t item = to_float ? 4 : 8;
  std::vector<char> memory(x.size * item, 0x55);
  const lap::cpu::Pool pool = lap::cpu::thread_pool(threads);
  Scores scores = {lap::cpu::score(x, layout, norms, check_finite, pool, memory.data()), {}};
  for (int64_t p = 0; p < x.size; ++p) {
    float narrow = 0;
    double wide = 0;
    memcpy(to_float ? static_cast<void*>(&narrow) : &wide, &memory[p * item], item);
    scores.values.push_back(to_float ? narrow : wide);
  }
  return scores;
}

Scores scores_of(const Layer& layer, int threads = 2, bool check_finite = true) {
  const lap::cpu::Source source = layer.source(nullptr);
  return scores_of(source.x, layer.layout, source.norms, threads, check_finite);
}

void check_layer(const Layer& layer) {
  const std::vector<double> right = naive::stored_scores(layer.w, layer.layout, layer.row_norm,
                                                         layer.col_norm, layer.dtype != DType::f64);
  for (const int threads : {1, 3}) {
    const Scores scores = scores_of(layer, threads);
    CAPTURE(layer.layout.rows);
    CAPTURE(layer.layout.cols);
    CHECK(scores.finite);
    CHECK(scores.values == right);
    CHECK(std::none_of(scores.values.begin(), scores.values.end(),
                       [](double x) { return std::signbit(x); }));
  }
}

// A float (or double) weight [rows, cols] by hand.
std::vector<double> by_hand(DType dtype,
                            const std::vector<double>& w,
                            const std::vector<double>& row_norm,
                            const std::vector<double>& col_norm) {
  Layer layer;
  layer.dtype = dtype;
  layer.layout = {static_cast<int64_t>(row_norm.size()), static_cast<int64_t>(col_norm.size())};
  layer.w = w;
  layer.row_norm = row_norm;
  layer.col_norm = col_norm;
  layer.store();
  return scores_of(layer, 1).values;
}

}  // namespace

TEST_CASE("a score is |w| times its two norms, in every dtype") {
  const float f32[] = {-3, 5, -0.0f, -0.5};
  const double f64[] = {-3, 5, -0.0, -0.5};
  const uint16_t f16[] = {0xc200, 0x4500, 0x8000, 0xb800};
  const uint16_t bf16[] = {0xc040, 0x40a0, 0x8000, 0xbf00};
  const void* data[] = {f32, f16, bf16, f64};  // in DType's order
  const double row[] = {2, 4};
  const double col[] = {1, 8};
  for (const DType dtype : kAllDTypes) {
    Strided x;
    const int64_t shape[] = {2, 2};
    const int64_t stride[] = {2, 1};
    REQUIRE(lap::make_strided(data[static_cast<int>(dtype)], dtype, 2, shape, stride, &x));
    const Scores scores = scores_of(x, {2, 2, 1, 1}, {row, col});
    CHECK(scores.values == std::vector<double>{3 * 2 * 1, 5 * 2 * 8, 0, 0.5 * 4 * 8});
    CHECK(!std::signbit(scores.values[2]));
  }
}

TEST_CASE("each group of rows has columns of its own, a window shares its norms") {
  // [2 rows, 1 column a group, window 2], 2 groups: 1 * 2 * 5, 3 * 2 * 5; 7 * 4 * 9, 11 * 4 * 9
  Layer layer;
  layer.layout = {2, 1, 2, 2};
  layer.w = {1, 3, 7, 11};
  layer.row_norm = {2, 4};
  layer.col_norm = {5, 9};
  layer.store();
  CHECK(scores_of(layer).values == std::vector<double>{10, 30, 252, 396});
}

TEST_CASE("norms and products are rounded to 24 bits, one after the other") {
  // 1 + 2^-24 is 1 in 24 bits (ties to even); 1.5 * (1 + 2^-23) rounds up to 1.5 + 2^-22
  CHECK(by_hand(DType::f32, {1}, {1.5}, {1 + 0x1p-24}) == std::vector<double>{1.5});
  CHECK(by_hand(DType::f32, {1}, {1.5}, {1 + 0x1p-23}) == std::vector<double>{1.5 + 0x1p-22});
  CHECK(by_hand(DType::f64, {1}, {1.5}, {1 + 0x1p-24}) == std::vector<double>{1.5 + 0x1.8p-24});
}

TEST_CASE("scores of every dtype and layout, near one and far from it") {
  std::mt19937_64 random(2);
  const Layout layouts[] = {{1, 1, 1, 1},  {3, 5, 1, 1},   {7, 127, 1, 1},   {5, 129, 1, 1},
                            {40, 6, 9, 1}, {8, 6, 9, 1},   {50, 40, 9, 2},   {12, 5, 9, 4},
                            {9, 1, 9, 9},  {70, 16, 9, 2}, {1, 66000, 1, 1}, {33000, 2, 1, 1}};
  for (const DType dtype : kAllDTypes) {
    for (const Layout& layout : layouts) {
      const Layer near = layers::random_layer(dtype, layout, random);
      check_layer(near);
      // norms that are no floats although their products are, then scores that are denormal, zero,
      // infinite
      const int exponents[][2] = {{40, -20}, {-160, 80}, {-70, -70}, {-160, 0}, {70, 60}};
      for (const auto& [row, col] : exponents) {
        CAPTURE(row);
        Layer far = near;
        for (double& x : far.row_norm) x = std::ldexp(x, row);
        for (double& x : far.col_norm) x = std::ldexp(x, col);
        check_layer(far);
      }
    }
  }
}

TEST_CASE("scores of norms far apart, dead channels and pruned weights") {
  std::mt19937_64 random(3);
  for (const DType dtype : kAllDTypes) {
    Layer layer = layers::random_layer(dtype, {60, 50, 1, 1}, random);
    for (double& x : layer.row_norm) x = std::ldexp(x, static_cast<int>(random() % 280) - 140);
    for (double& x : layer.col_norm) x = std::ldexp(x, static_cast<int>(random() % 120) - 60);
    for (size_t r = 0; r < layer.row_norm.size(); r += 5) layer.row_norm[r] = 0;
    layer.col_norm[7] = 0;
    if (dtype != DType::f16) {  // whose values are patterns, not numbers
      for (size_t p = 0; p < layer.w.size(); p += 3) layer.w[p] = p % 2 ? 0.0 : -0.0;
      layer.store();
    }
    check_layer(layer);
  }
}

TEST_CASE("what leaves float's range is rounded once: denormal, zero or infinite") {
  const std::vector<double> w = {1, 1 + 0x1p-23, 3, 1};
  const std::vector<double> col = {0x1p-65, 0x1p-74, 0x1p-75, 0x1p-80};
  // the second and the third are 1 + 2^-23 and 3/2 of the smallest float: down, and up to even
  CHECK(by_hand(DType::f32, w, {0x1p-75}, col) ==
        std::vector<double>{0x1p-140, 0x1p-149, 0x1p-148, 0});
  CHECK(by_hand(DType::f32, {0x1p-100, 1}, {0x1p100}, {0x1p100, 0x1p90}) ==
        std::vector<double>{0x1p100, kInfinity});
  // a little more than 5/2 of the smallest float: up; 24 bits of it are 5/2, which would go down
  CHECK(by_hand(DType::f32, {1.25 - 0x1p-23}, {(1 + 0x1p-23) * 0x1p-74}, {0x1p-74}) ==
        std::vector<double>{0x3p-149});
}

TEST_CASE("double scores, although the product of their norms leaves double's range") {
  CHECK(by_hand(DType::f64, {0x1p900, 3}, {0x1p-800}, {0x1p-800, 0x1p-100}) ==
        std::vector<double>{0x1p-700, 0x3p-900});
  CHECK(by_hand(DType::f64, {0x1p900, 3}, {0x1p-801}, {0x1p-800, 0x1p-100}) ==  // an odd exponent
        std::vector<double>{0x1p-701, 0x3p-901});
  CHECK(by_hand(DType::f64, {0x1p-600, 3}, {0x1p600}, {0x1p600, 0x1p-100}) ==
        std::vector<double>{0x1p600, 0x3p500});
  CHECK(by_hand(DType::f64, {1, 1}, {0x1p-537, 0}, {0x1p-537}) ==
        std::vector<double>{0x1p-1074, 0});
}

TEST_CASE("a transposed weight with its norms' roles swapped has the same scores") {
  std::mt19937_64 random(4);
  const int64_t rows = 60;
  const int64_t cols = 35;
  for (const DType dtype : kAllDTypes) {
    for (const int64_t window : {1, 9}) {
      for (const int exponent : {0, -150}) {
        Layer layer = layers::random_layer(dtype, {rows, cols, window, 1}, random);
        for (double& x : layer.row_norm) x = std::ldexp(x, exponent);
        const std::vector<double> right = scores_of(layer).values;
        Strided turned;  // the same memory: columns, rows, window
        const int64_t shape[] = {cols, rows, window};
        const int64_t stride[] = {window, cols * window, 1};
        REQUIRE(lap::make_strided(layer.memory.data(), dtype, 3, shape, stride, &turned));
        const Scores scores = scores_of(turned, {cols, rows, window, 1},
                                        {layer.col_norm.data(), layer.row_norm.data()});
        int64_t wrong = 0;
        for (int64_t p = 0; p < turned.size; ++p) {
          const int64_t c = p / (rows * window);
          const int64_t r = p / window % rows;
          wrong += scores.values[p] != right[(r * cols + c) * window + p % window];
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("strided weights have the bits of contiguous ones, for every thread count") {
  std::mt19937_64 random(5);
  for (const DType dtype : kAllDTypes) {
    const Layer layer = layers::random_layer(dtype, {300, 250, 1, 1}, random);
    const std::vector<double> right = scores_of(layer, 1).values;
    const int64_t item = lap::item_size(dtype);
    std::vector<char> apart(3 * layer.memory.size(), 0x55);  // columns, every third element
    for (int64_t r = 0; r < 300; ++r) {
      for (int64_t c = 0; c < 250; ++c) {
        memcpy(&apart[3 * (c * 300 + r) * item], &layer.memory[(r * 250 + c) * item], item);
      }
    }
    Strided x;
    const int64_t shape[] = {300, 250};
    const int64_t stride[] = {3, 900};
    REQUIRE(lap::make_strided(apart.data(), dtype, 2, shape, stride, &x));
    for (const int threads : {1, 2, 8}) {
      CHECK(scores_of(x, layer.layout, layer.source(nullptr).norms, threads).values == right);
      CHECK(scores_of(layer, threads).values == right);
    }
  }
}

TEST_CASE("weights that are not finite are found wherever they are, in both forms") {
  std::mt19937_64 random(6);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
    for (const int exponent : {0, -150}) {
      Layer layer = layers::random_layer(dtype, {300, 250, 1, 1}, random);
      for (double& x : layer.row_norm) x = std::ldexp(x, exponent);
      CHECK(scores_of(layer).finite);
      for (const size_t at : {0, 65535, 65536, 74999}) {  // a chunk's ends
        for (const double bad : {kInfinity, -kInfinity, std::nan("")}) {
          const double good = layer.w[at];
          layer.w[at] = bad;
          layer.store(at);
          CHECK(!scores_of(layer).finite);
          const Scores unchecked = scores_of(layer, 2, false);
          layer.w[at] = good;
          layer.store(at);
          CHECK(unchecked.finite);  // not asked for
          CHECK((std::isnan(bad) ? std::isnan(unchecked.values[at])
                                 : unchecked.values[at] == kInfinity));
        }
      }
    }
  }
}

TEST_CASE("a float16 that is not finite is found") {
  std::mt19937_64 random(7);
  for (const uint16_t bad : {0x7c00, 0xfc00, 0x7e00}) {  // inf, -inf, NaN
    Layer layer = layers::random_layer(DType::f16, {30, 20, 1, 1}, random);
    CHECK(scores_of(layer).finite);
    memcpy(&layer.memory[2 * 333], &bad, sizeof(bad));
    CHECK(!scores_of(layer).finite);
  }
}
