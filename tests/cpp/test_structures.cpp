// SPDX-License-Identifier: MIT
// Masks of structures and sums of blocks against their definition, bit by bit.
#include <cmath>
#include <initializer_list>
#include <random>
#include <vector>

#include "../../csrc/cpu/blocks.h"
#include "../../csrc/cpu/nm.h"
#include "../../csrc/cpu/transposable.h"
#include "doctest.h"
#include "layers.h"
#include "naive.h"

using lap::Blocks;
using lap::cpu::Source;
using layers::DType;
using layers::Layer;
using layers::Layout;

namespace {

constexpr DType kAll[] = {DType::f32, DType::f16, DType::bf16, DType::f64};

enum class Kind { plain, ties, tiny, wide, scores };
constexpr Kind kKinds[] = {Kind::plain, Kind::ties, Kind::tiny, Kind::wide, Kind::scores};

// A layer of some kind, which of it counts, and its scores.
struct Ranked {
  Layer layer;
  std::vector<uint8_t> counts;
  std::vector<double> scores;
  bool is_scores;

  template <typename Random>
  Ranked(DType dtype, const Layout& layout, Kind kind, Random& random)
      : layer(layers::random_layer(dtype, layout, random)), is_scores(kind == Kind::scores) {
    std::uniform_int_distribution<int> few(-2, 2);
    std::uniform_int_distribution<int> exponent(-60, 60);
    for (double& x : layer.w) {
      if (kind == Kind::ties) x = few(random);
      if (kind == Kind::tiny) x = std::ldexp(x, -140);  // scores of a few bits in float
    }
    for (double& norm : layer.row_norm) {
      if (kind == Kind::ties) norm = 1;
      if (kind == Kind::wide) norm = std::ldexp(norm, exponent(random));
    }
    for (double& norm : layer.col_norm) {
      if (kind == Kind::ties) norm = few(random) + 2;
      if (kind == Kind::wide) norm = std::ldexp(norm, exponent(random));
    }
    layer.store();
    scores = is_scores ? layer.w
                       : naive::scores(layer.w, layout, layer.row_norm, layer.col_norm,
                                       dtype != DType::f64);
    for (size_t p = 0; p < scores.size(); ++p) counts.push_back(random() % 4 != 0);
  }

  Source source(uint8_t* mask, bool some) const {
    Source out = layer.source(mask);
    if (is_scores) out.norms = {};
    out.eligible = some ? counts.data() : nullptr;
    return out;
  }
  std::vector<uint8_t> counted(bool some) const {
    return some ? counts : std::vector<uint8_t>(counts.size(), 1);
  }
  std::vector<double> values(bool squared, bool some) const {
    std::vector<double> out;
    for (size_t p = 0; p < scores.size(); ++p) {
      const double x = some && !counts[p] ? 0 : scores[p];
      out.push_back(squared ? x * x : x);
    }
    return out;
  }
};

// body(ranked, some, threads) for every dtype and kind
template <typename Body>
void for_each(const Layout& layout, const Body& body) {
  std::mt19937_64 random(7);
  for (const DType dtype : kAll) {
    for (const Kind kind : kKinds) {
      const Ranked ranked(dtype, layout, kind, random);
      CAPTURE(static_cast<int>(dtype));
      CAPTURE(static_cast<int>(kind));
      CAPTURE(layout.cols);
      for (const bool some : {false, true}) body(ranked, some, some ? 1 : 3);
    }
  }
}

}  // namespace

TEST_CASE("N:M masks keep the best of every group, of equal ones the lower index") {
  struct Case {
    Layout layout;
    int64_t keep, of;
    bool rows;
  };
  const std::initializer_list<Case> cases = {
      {{3, 260, 1, 1}, 2, 4, false}, {{2, 1300, 1, 1}, 2, 4, false}, {{70, 8, 9, 2}, 2, 4, false},
      {{5, 48, 1, 1}, 4, 8, false},  {{3, 99, 2, 1}, 1, 3, false},   {{2, 120, 1, 1}, 7, 40, false},
      {{8, 300, 1, 1}, 2, 4, true},  {{12, 5, 9, 3}, 1, 2, true},    {{80, 70, 1, 1}, 9, 40, true},
      {{4, 8, 1, 1}, 0, 4, false},   {{4, 8, 1, 1}, 5, 4, true},
  };
  for (const Case& c : cases) {
    for_each(c.layout, [&](const Ranked& ranked, bool some, int threads) {
      std::vector<uint8_t> mask(ranked.scores.size(), 7);
      const lap::cpu::Pool pool = lap::cpu::thread_pool(threads);
      CHECK(lap::cpu::nm_mask(ranked.source(mask.data(), some), c.keep, c.of, c.rows, pool));
      CHECK(mask ==
            naive::nm_mask(ranked.scores, ranked.counted(some), c.layout, c.keep, c.of, c.rows));
    });
  }
}

TEST_CASE("transposable masks keep the pattern of the largest sum") {
  for (const Layout& layout : {Layout{4, 76, 1, 1}, Layout{8, 8, 3, 2}, Layout{4, 4, 1, 1}}) {
    for_each(layout, [&](const Ranked& ranked, bool some, int threads) {
      for (const bool squared : {false, true}) {
        std::vector<uint8_t> mask(ranked.scores.size(), 7);
        const lap::cpu::Pool pool = lap::cpu::thread_pool(threads);
        CHECK(lap::cpu::transposable_mask(ranked.source(mask.data(), some), squared, pool));
        CHECK(mask ==
              naive::transposable_mask(ranked.values(squared, some), ranked.counted(some), layout));
      }
    });
  }
}

TEST_CASE("sums of blocks add in the documented order, and their masks name their elements") {
  struct Case {
    Layout layout;
    Blocks blocks;  // rows, columns, height of a group, first row
  };
  const std::initializer_list<Case> cases = {
      {{33, 70, 1, 1}, {16, 16, 33, 0}},  {{9, 40, 1, 1}, {2, 32, 9, 0}},
      {{9, 70, 1, 1}, {4, 33, 20, 17}},   {{12, 10, 9, 2}, {4, 4, 6, 0}},
      {{3, 2500, 1, 1}, {2, 1025, 3, 0}}, {{5, 40, 1, 1}, {1, 1, 5, 10}},
      {{20, 1100, 1, 1}, {20, 8, 20, 0}}, {{2, 30, 100, 1}, {2, 30, 2, 0}},
  };
  for (const Case& c : cases) {
    const int64_t across = c.blocks.across(c.layout.cols);
    const std::vector<int64_t> places =
        naive::blocks_of(c.layout, c.blocks.rows, c.blocks.cols, c.blocks.first, c.blocks.height);
    const int64_t count = (places.back() / across + 1) * across;
    for_each(c.layout, [&](const Ranked& ranked, bool some, int threads) {
      const lap::cpu::Pool pool = lap::cpu::thread_pool(threads);
      for (const bool squared : {false, true}) {
        std::vector<double> sums(count);
        std::vector<double> right(count);
        const Source source = ranked.source(nullptr, some);
        for (int call = 0; call < 2; ++call) {  // the second adds to the sums of the first
          CHECK(lap::cpu::block_sums(source, c.blocks, squared, pool, sums.data()));
          naive::add_to_blocks(ranked.values(squared, some), places, c.layout.row_size(), &right);
        }
        CHECK(memcmp(sums.data(), right.data(), right.size() * sizeof(double)) == 0);
      }
      std::vector<uint8_t> kept(count);
      for (size_t b = 0; b < kept.size(); ++b) kept[b] = b % 3 == 0;
      std::vector<uint8_t> mask(places.size(), 7);
      const uint8_t* eligible = some ? ranked.counts.data() : nullptr;
      lap::cpu::block_mask(kept.data(), c.layout, c.blocks, eligible, pool, mask.data());
      std::vector<uint8_t> named = ranked.counted(some);
      for (size_t p = 0; p < named.size(); ++p) named[p] = named[p] && kept[places[p]];
      CHECK(mask == named);
    });
  }
}

TEST_CASE("weights that are not finite are reported, scores only where they are no numbers") {
  std::mt19937_64 random(3);
  for (const double value : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    for (const bool is_scores : {false, true}) {
      Ranked ranked(DType::f32, {8, 32, 1, 1}, is_scores ? Kind::scores : Kind::plain, random);
      ranked.layer.w[77] = value;
      ranked.layer.store();
      const bool good = is_scores && !std::isnan(value);
      std::vector<uint8_t> mask(ranked.scores.size());
      std::vector<double> sums(64);
      const Source source = ranked.source(mask.data(), false);
      const lap::cpu::Pool pool = lap::cpu::thread_pool(1);
      CHECK(lap::cpu::nm_mask(source, 2, 4, false, pool) == good);
      CHECK(lap::cpu::nm_mask(source, 2, 4, true, pool) == good);
      CHECK(lap::cpu::transposable_mask(source, true, pool) == good);
      CHECK(lap::cpu::block_sums(source, {4, 4, 8, 0}, true, pool, sums.data()) == good);
    }
  }
}
