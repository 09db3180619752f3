// SPDX-License-Identifier: MIT
// Selection against a full sort of the definition's scores: every dtype, shape, keep, thread count.
#include <numeric>

#include "doctest.h"
#include "layers.h"
#include "naive.h"

using lap::cpu::Outcome;
using lap::cpu::Pool;
using lap::cpu::Source;
using layers::DType;
using layers::Layer;
using layers::Layout;

namespace {

constexpr DType kAllDTypes[] = {DType::f32, DType::f16, DType::bf16, DType::f64};

std::vector<uint8_t> selected(const Layer& layer,
                              int64_t keep,
                              int threads,
                              const std::vector<uint8_t>& eligible = {}) {
  std::vector<uint8_t> mask(layer.w.size(), 7);
  Source source = layer.source(mask.data());
  if (!eligible.empty()) source.eligible = eligible.data();
  const Pool pool = lap::cpu::thread_pool(threads);
  REQUIRE(lap::cpu::select({source}, keep, true, pool).outcome == Outcome::ok);
  return mask;
}

std::vector<int64_t> ranking(const Layer& layer, const std::vector<uint8_t>& eligible = {}) {
  const bool to_float = layer.dtype != DType::f64;
  return naive::ranking(
      naive::scores(layer.w, layer.layout, layer.row_norm, layer.col_norm, to_float), eligible);
}

// Masks for each keep against one full sort.
void check_layer(const Layer& layer,
                 std::initializer_list<int64_t> keeps,
                 const std::vector<uint8_t>& eligible = {}) {
  const std::vector<int64_t> right = ranking(layer, eligible);
  for (const int64_t keep : keeps) {
    CAPTURE(keep);
    CHECK(selected(layer, keep, 2, eligible) == naive::mask(right, keep, layer.w.size()));
  }
}

void check_layer(const Layer& layer) {
  const int64_t n = static_cast<int64_t>(layer.w.size());
  check_layer(layer, {0, 1, n / 100, n / 10, n / 2, n - 1, n, n + 5});
}

// 300 819 weights, so that the sample, the scan and the candidates are all at work
Layer large(DType dtype, std::mt19937_64& random) {
  return layers::random_layer(dtype, {509, 591, 1, 1}, random);
}

}  // namespace

TEST_CASE("one weight by hand: 2 * 5 * 1 beats 9 * 1 * 1") {
  Layer layer;
  layer.layout = {1, 2, 1, 1};
  layer.w = {-2, 9};
  layer.row_norm = {1};
  layer.col_norm = {5, 1};
  layer.store();
  CHECK(selected(layer, 1, 1) == std::vector<uint8_t>{1, 0});
}

TEST_CASE("shapes: short and long rows, windows, groups, odd sizes") {
  std::mt19937_64 random(1);
  const Layout layouts[] = {{1, 1, 1, 1},   {3, 5, 1, 1},    {7, 127, 1, 1},  {5, 129, 1, 1},
                            {40, 6, 9, 1},  {8, 6, 9, 1},    {64, 40, 9, 1},  {12, 5, 9, 4},
                            {96, 1, 9, 96}, {128, 16, 4, 2}, {1, 5000, 1, 1}, {5000, 1, 1, 1}};
  for (const DType dtype : kAllDTypes) {
    for (const Layout& layout : layouts) {
      CAPTURE(layout.rows);
      CAPTURE(layout.cols);
      check_layer(layers::random_layer(dtype, layout, random));
    }
  }
}

TEST_CASE("large layers, one to four threads") {
  std::mt19937_64 random(2);
  for (const DType dtype : kAllDTypes) {
    const Layer layer = large(dtype, random);
    const std::vector<int64_t> right = ranking(layer);
    for (const int64_t keep : {10, 10000, 100000, 150001}) {
      CAPTURE(keep);
      const std::vector<uint8_t> mask = naive::mask(right, keep, layer.w.size());
      for (const int threads : {1, 2, 4}) CHECK(selected(layer, keep, threads) == mask);
    }
  }
}

TEST_CASE("eligible: pruned weights never return") {
  std::mt19937_64 random(3);
  const Layer layer = large(DType::f32, random);
  std::vector<uint8_t> eligible(layer.w.size());
  for (uint8_t& e : eligible) e = random() % 3 == 0;
  const int64_t count = std::accumulate(eligible.begin(), eligible.end(), int64_t{0});
  check_layer(layer, {1, count / 2, count - 1, count, count + 1000}, eligible);
}

TEST_CASE("ties: the lower index is kept, whatever plan the data leads to") {
  std::mt19937_64 random(4);
  Layer layer = large(DType::f32, random);
  std::fill(layer.row_norm.begin(), layer.row_norm.end(), 1.0);
  std::fill(layer.col_norm.begin(), layer.col_norm.end(), 1.0);
  const int64_t n = static_cast<int64_t>(layer.w.size());
  SUBCASE("all equal") {
    for (double& x : layer.w) x = random() % 2 ? 1.0 : -1.0;
  }
  SUBCASE("60 % zeros of either sign") {
    for (double& x : layer.w) x = random() % 10 < 6 ? (random() % 2 ? 0.0 : -0.0) : x;
  }
  SUBCASE("three values") {
    for (double& x : layer.w) x = static_cast<double>(random() % 3);
  }
  SUBCASE("equal leading bits") {
    for (double& x : layer.w) x = 1.0 + static_cast<double>(random() % 256) * 0x1p-23;
  }
  SUBCASE("a block in a constant sea") {
    for (int64_t p = 0; p < n; ++p) layer.w[p] = p / 4096 == 37 ? 1.0 + p % 4096 * 0x1p-20 : 0.5;
  }
  SUBCASE("rising") {
    std::sort(layer.w.begin(), layer.w.end());
  }
  layer.store();
  check_layer(layer, {1, n / 100, n / 10, n / 2, n - 1});
}

TEST_CASE("underflow never decides: float products far below float's range") {
  std::mt19937_64 random(5);
  for (const double scale : {0x1p-120, 0x1p-140, 0x1p100}) {
    Layer layer = layers::random_layer(DType::f32, {300, 301, 1, 1}, random);
    for (double& x : layer.w) x = std::ldexp(x, -static_cast<int>(random() % 20));
    for (double& x : layer.row_norm) x *= scale;
    for (size_t i = 0; i < layer.col_norm.size(); i += 2) layer.col_norm[i] *= 0x1p-130;
    layer.store();
    check_layer(layer);
  }
}

TEST_CASE("underflow never decides: small weights between ordinary norms") {
  std::mt19937_64 random(9);
  Layer layer = layers::random_layer(DType::f32, {300, 301, 1, 1}, random);
  for (double& x : layer.w) x = std::ldexp(x, -100);
  for (size_t r = 0; r < layer.row_norm.size(); r += 2) layer.row_norm[r] *= 0x1p-40;
  layer.store();
  check_layer(layer);  // half of the scores lie near 2^-140, where float keeps a few bits
}

TEST_CASE("a list of score tensors is one ranking; empty tensors do not matter") {
  std::mt19937_64 random(6);
  std::normal_distribution<double> normal;
  std::vector<Layer> tensors(5);
  const size_t sizes[] = {100000, 0, 1, 250000, 0};
  std::vector<double> all;
  for (size_t t = 0; t < 5; ++t) {
    tensors[t].w.resize(sizes[t]);
    for (double& x : tensors[t].w) x = std::round(normal(random) * 1000) / 1000;  // signed, ties
    tensors[t].store();
    all.insert(all.end(), tensors[t].w.begin(), tensors[t].w.end());
  }
  const std::vector<int64_t> right = naive::ranking(all, {});
  for (const int64_t keep : {int64_t{1}, int64_t{35000}, int64_t{300000}}) {
    std::vector<uint8_t> mask(all.size(), 7);
    std::vector<Source> sources;
    size_t first = 0;
    for (const Layer& tensor : tensors) {
      sources.push_back(tensor.source(mask.data() + first));
      sources.back().norms = {};
      first += tensor.w.size();
    }
    const Pool pool = lap::cpu::thread_pool(2);
    CHECK(lap::cpu::select(sources, keep, true, pool).threshold == all[right[keep - 1]]);
    CHECK(mask == naive::mask(right, keep, all.size()));
    for (Source& source : sources) source.mask = nullptr;  // only the threshold
    CHECK(lap::cpu::select(sources, keep, true, pool).threshold == all[right[keep - 1]]);
  }
}

TEST_CASE("several weights with their norms are one ranking of their scores, beside ready scores") {
  std::mt19937_64 random(7);
  bool doubles = false;
  SUBCASE("float, bfloat16 and float16") {}
  SUBCASE("double") {
    doubles = true;
  }
  std::vector<Layer> layers;
  const DType narrow[] = {DType::f32, DType::bf16, DType::f16};
  for (int t = 0; t < 6; ++t) {
    const DType dtype = doubles ? DType::f64 : narrow[t % 3];
    layers.push_back(layers::random_layer(dtype, {40 + 60 * t, 97, t % 2 ? 9 : 1, 2}, random));
    for (double& norm : layers.back().row_norm) norm *= std::ldexp(1.0, 3 * t - 9);  // far apart
  }
  layers[4].dtype = doubles ? DType::f64 : DType::f32;  // ready scores: of any sign, infinite ones
  layers[4].w[5] = HUGE_VAL;
  layers[4].store();
  std::vector<double> all;
  for (size_t t = 0; t < layers.size(); ++t) {
    const Layer& layer = layers[t];
    const std::vector<double> scores =
        t == 4 ? layer.w
               : naive::scores(layer.w, layer.layout, layer.row_norm, layer.col_norm, !doubles);
    all.insert(all.end(), scores.begin(), scores.end());
  }
  const int64_t n = static_cast<int64_t>(all.size());
  const std::vector<int64_t> right = naive::ranking(all, {});
  for (const int64_t keep : {int64_t{0}, int64_t{1}, n / 100, n / 2, n - 1, n}) {
    CAPTURE(keep);
    std::vector<uint8_t> mask(all.size(), 7);
    std::vector<Source> sources;
    size_t first = 0;
    for (size_t t = 0; t < layers.size(); ++t) {
      sources.push_back(layers[t].source(mask.data() + first));
      sources.back().absolute = true;
      if (t == 4) sources.back().norms = {};
      first += layers[t].w.size();
    }
    const Pool pool = lap::cpu::thread_pool(2);
    CHECK(lap::cpu::select(sources, keep, true, pool).outcome == Outcome::ok);
    CHECK(mask == naive::mask(right, keep, all.size()));
  }
}

TEST_CASE("an infinite weight is found beside infinite scores") {
  std::mt19937_64 random(8);
  for (const int bad : {0, 1, 2}) {  // nothing, the weight, a score that is not a number
    Layer weight = layers::random_layer(DType::f32, {100, 90, 1, 1}, random);
    Layer scores = layers::random_layer(DType::f32, {100, 90, 1, 1}, random);
    scores.w[3] = bad == 2 ? NAN : HUGE_VAL;
    if (bad == 1) weight.w[8] = -HUGE_VAL;
    weight.store();
    scores.store();
    for (const int64_t keep : {int64_t{0}, int64_t{9000}, int64_t{18000}}) {
      std::vector<uint8_t> mask(18000);
      std::vector<Source> sources = {weight.source(mask.data()), scores.source(mask.data() + 9000)};
      sources[0].absolute = true;
      sources[1].norms = {};
      const Pool pool = lap::cpu::thread_pool(2);
      CHECK((lap::cpu::select(sources, keep, true, pool).outcome == Outcome::ok) == (bad == 0));
    }
  }
}

TEST_CASE("strides: the same bits as the contiguous weight") {
  std::mt19937_64 random(7);
  const Layer layer = layers::random_layer(DType::f32, {300, 200, 1, 1}, random);
  std::vector<float> transposed(layer.w.size());
  for (int64_t r = 0; r < 300; ++r) {
    for (int64_t c = 0; c < 200; ++c)
      transposed[c * 300 + r] = static_cast<float>(layer.w[r * 200 + c]);
  }
  std::vector<uint8_t> mask(layer.w.size());
  Source source = layer.source(mask.data());
  const int64_t shape[] = {300, 200};
  const int64_t stride[] = {1, 300};
  REQUIRE(lap::make_strided(transposed.data(), DType::f32, 2, shape, stride, &source.x));
  const Pool pool = lap::cpu::thread_pool(2);
  REQUIRE(lap::cpu::select({source}, 6000, true, pool).outcome == Outcome::ok);
  CHECK(mask == selected(layer, 6000, 1));
}

TEST_CASE("infinities and NaNs are found, counted, and ranked only on request") {
  std::mt19937_64 random(8);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
    Layer layer = large(dtype, random);
    layer.w[70001] = std::numeric_limits<double>::quiet_NaN();
    layer.w[200000] = -std::numeric_limits<double>::infinity();
    layer.store();
    std::vector<uint8_t> mask(layer.w.size());
    const Source source = layer.source(mask.data());
    const Pool pool = lap::cpu::thread_pool(2);
    for (const int64_t keep : {int64_t{0}, int64_t{1000}, int64_t{1} << 40}) {
      CHECK(lap::cpu::select({source}, keep, true, pool).outcome == Outcome::not_finite);
    }
    const lap::cpu::NotFinite found = lap::cpu::find_not_finite(source.x, false);
    CHECK(found.count == 2);
    CHECK(found.first == 70001);
    CHECK(lap::cpu::select({source}, 1000, false, pool).outcome == Outcome::ok);
    CHECK(std::accumulate(mask.begin(), mask.end(), int64_t{0}) == 1000);
    CHECK(mask[70001] + mask[200000] == 2);
  }
}
