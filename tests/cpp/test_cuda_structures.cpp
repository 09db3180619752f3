// SPDX-License-Identifier: MIT
// N:M masks, tiles of 4 by 4, sums and masks of blocks by the CUDA kernels on emulated threads,
// against their definition element by element.
#include "cuda_cases.h"
#include "doctest.h"
#include "naive.h"

using namespace lap;        // NOLINT
using namespace lap::cuda;  // NOLINT
using cases::Buffer;
using cases::Layer;
using cases::Tensor;
using Bytes = std::vector<uint8_t>;

namespace {

Layer layer(DType dtype, const Layout& l, double low = -2, double high = 2) {
  return {dtype,
          l.rows,
          l.cols,
          l.window,
          l.groups,
          cases::spread(l.rows, 1, low, high),
          cases::spread(l.channels(), 2, low, high)};
}

// A weight in device memory with an eligible mask, and the doubles that it scores.
struct Case {
  Layer layer;
  bool scores;  // w holds scores
  Tensor w;
  Bytes eligible;  // empty: all

  Case(const Layer& l,
       const std::vector<double>& values,
       bool scores = false,
       Bytes may = {},
       size_t shift = 0)
      : layer(l), scores(scores), w(l.dtype, values, shift), eligible(std::move(may)) {}

  Layout layout() const { return {layer.rows, layer.cols, layer.window, layer.groups}; }
  Weight weight() { return layer.weight(w.data.as()); }
  Norms norms() const { return scores ? Norms{} : layer.norms(); }
  const uint8_t* may() const { return eligible.empty() ? nullptr : eligible.data(); }
  bool may(int64_t i) const { return eligible.empty() || eligible[i] != 0; }

  std::vector<double> values() const {
    std::vector<double> x;
    for (int64_t i = 0; i < layer.size(); ++i) x.push_back(w[i]);
    if (scores) return x;
    return naive::scores(x, layout(), layer.row_norm, layer.col_norm, layer.dtype != DType::f64);
  }
  std::string text() const {
    return "dtype " + std::to_string(int(layer.dtype)) + " [" + std::to_string(layer.rows) + ", " +
           std::to_string(layer.cols) + ", " + std::to_string(layer.window) + "] groups " +
           std::to_string(layer.groups) + (scores ? " scores" : "") +
           (eligible.empty() ? "" : " masked");
  }
};

// Memory for a mask; `shift` bytes past a 16-byte boundary.
Bytes bytes(Buffer& mask, int64_t n) {
  return Bytes(mask.as<uint8_t>(), mask.as<uint8_t>() + n);
}

// --- N:M --------------------------------------------------------------------------------------

Bytes nm_mask(Case& c, const Pattern& pattern, bool check, Status* status = nullptr) {
  Buffer workspace(nm_mask_workspace(c.weight())), mask(c.layer.size());
  CHECK(launch_nm_mask(c.weight(), c.norms(), pattern, c.may(), check, mask.as<uint8_t>(),
                       workspace.as(), nullptr) == cudaSuccess);
  if (status != nullptr) *status = workspace.at<Status>(0);
  return bytes(mask, c.layer.size());
}

// Larger first, NaN before all.
bool better(double a, double b) {
  return std::isnan(a) ? !std::isnan(b) : a > b;
}

Bytes naive_nm(const Case& c, const Pattern& pattern) {
  const std::vector<double> s = c.values();
  const Layer& l = c.layer;
  Bytes mask(s.size(), 0);
  const auto flat = [&](int64_t r, int64_t col, int64_t k) {
    return (r * l.cols + col) * l.window + k;
  };
  const int64_t down = pattern.rows ? l.rows / pattern.of : l.rows;
  const int64_t right = pattern.rows ? l.cols : l.cols / pattern.of;
  for (int64_t r = 0; r < down; ++r) {
    for (int64_t col = 0; col < right; ++col) {
      for (int64_t k = 0; k < l.window; ++k) {
        std::vector<int64_t> group;
        for (int64_t i = 0; i < pattern.of; ++i) {
          const int64_t at =
              pattern.rows ? flat(r * pattern.of + i, col, k) : flat(r, col * pattern.of + i, k);
          if (c.may(at)) group.push_back(at);
        }
        std::stable_sort(group.begin(), group.end(),
                         [&](int64_t a, int64_t b) { return better(s[a], s[b]); });
        const int64_t kept = std::min<int64_t>(pattern.keep, static_cast<int64_t>(group.size()));
        for (int64_t i = 0; i < kept; ++i) mask[group[i]] = 1;
      }
    }
  }
  return mask;
}

void check_nm(Case c, const Pattern& pattern, bool check = true) {
  Status status = {};
  const bool same = nm_mask(c, pattern, check, &status) == naive_nm(c, pattern);
  CHECK_MESSAGE(same, c.text() << ", " << pattern.keep << ":" << pattern.of
                               << std::string(pattern.rows ? " of rows" : ""));
  CHECK(status.bad_count == 0);
}

std::vector<double> tied(int64_t n, unsigned seed) {
  std::vector<double> values = cases::normal(n, seed);
  for (double& x : values) x = std::floor(x * 2) / 2;
  return values;
}

// --- tiles ------------------------------------------------------------------------------------

Bytes tile_mask(Case& c, bool squared, bool check, Status* status = nullptr) {
  Buffer workspace(transposable_mask_workspace(c.weight())), mask(c.layer.size());
  CHECK(launch_transposable_mask(c.weight(), c.norms(), squared, c.may(), check, mask.as<uint8_t>(),
                                 workspace.as(), nullptr) == cudaSuccess);
  if (status != nullptr) *status = workspace.at<Status>(0);
  return bytes(mask, c.layer.size());
}

using Pair = std::pair<int, int>;
using Choice = std::vector<Pair>;  // of the four rows

std::vector<Choice> all_patterns() {
  const std::vector<Pair> pairs = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
  std::vector<Choice> found;
  for (int n = 0; n < 6 * 6 * 6 * 6; ++n) {
    const Choice choice = {pairs[n / 216], pairs[n / 36 % 6], pairs[n / 6 % 6], pairs[n % 6]};
    int counts[4] = {};
    for (const Pair& p : choice) {
      ++counts[p.first];
      ++counts[p.second];
    }
    if (std::all_of(counts, counts + 4, [](int x) { return x == 2; })) found.push_back(choice);
  }
  return found;
}

Bytes naive_tiles(const Case& c, bool squared) {
  const std::vector<double> s = c.values();
  const std::vector<Choice> choices = all_patterns();
  CHECK(choices.size() == 90);
  const Layer& l = c.layer;
  Bytes mask(s.size(), 0);
  const auto flat = [&](int64_t r, int64_t col, int64_t k) {
    return (r * l.cols + col) * l.window + k;
  };
  const auto value = [&](int64_t i) { return !c.may(i) ? 0 : squared ? s[i] * s[i] : s[i]; };
  for (int64_t r = 0; r < l.rows; r += 4) {
    for (int64_t col = 0; col < l.cols; col += 4) {
      for (int64_t k = 0; k < l.window; ++k) {
        const Choice* best = nullptr;
        double most = 0;
        int64_t named = 0;  // eligible weights that the best keeps
        for (const Choice& choice : choices) {
          double total = 0;
          int64_t count = 0;
          for (int i = 0; i < 4; ++i) {
            total += value(flat(r + i, col + choice[i].first, k)) +
                     value(flat(r + i, col + choice[i].second, k));
          }
          for (int i = 0; i < 4; ++i) {
            count += c.may(flat(r + i, col + choice[i].first, k)) ? 1 : 0;
            count += c.may(flat(r + i, col + choice[i].second, k)) ? 1 : 0;
          }
          if (best != nullptr && (count < named || (count == named && !better(total, most)))) {
            continue;
          }
          best = &choice;
          most = total;
          named = count;
        }
        for (int i = 0; i < 4; ++i) {
          for (const int j : {(*best)[i].first, (*best)[i].second}) {
            mask[flat(r + i, col + j, k)] = c.may(flat(r + i, col + j, k));
          }
        }
      }
    }
  }
  return mask;
}

void check_tiles(Case c, bool check = true) {
  for (const bool squared : {true, false}) {
    const bool same = tile_mask(c, squared, check) == naive_tiles(c, squared);
    CHECK_MESSAGE(same, c.text() << std::string(squared ? " squared" : ""));
  }
}

// --- blocks -----------------------------------------------------------------------------------

Status add_blocks(
    Case& c, const Blocks& blocks, bool squared, bool check, std::vector<double>* sums) {
  Buffer workspace(block_sums_workspace(c.weight(), blocks));
  CHECK(launch_block_sums(c.weight(), c.norms(), blocks, squared, c.may(), check, sums->data(),
                          workspace.as(), nullptr) == cudaSuccess);
  return workspace.at<Status>(0);
}

// One row of a block in the order of math/sums.h, for any number of weights.
double naive_row(const std::vector<double>& x) {
  double total = 0;
  for (size_t begin = 0; begin < x.size(); begin += 1024) {
    double lane[32] = {};
    for (size_t j = begin; j < std::min(begin + 1024, x.size()); ++j) {
      lane[(j - begin) % 32] += x[j];
    }
    for (int half = 16; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    total += lane[0];
  }
  return total;
}

// Number of the row of blocks of a row of the matrix, counted from the top.
int64_t naive_unit(int64_t row, int64_t rows, int64_t height) {
  int64_t unit = 0;
  for (int64_t r = 1; r <= row; ++r) unit += r % height == 0 || r % height % rows == 0;
  return unit;
}

void naive_sums(const Case& c, const Blocks& blocks, bool squared, std::vector<double>* sums) {
  const std::vector<double> s = c.values();
  const Layer& l = c.layer;
  const int64_t across = (l.cols + blocks.cols - 1) / blocks.cols;
  for (int64_t r = 0; r < l.rows; ++r) {
    const int64_t unit = naive_unit(blocks.first + r, blocks.rows, blocks.height);
    for (int64_t b = 0; b < across; ++b) {
      std::vector<double> row;
      for (int64_t col = b * blocks.cols; col < std::min(l.cols, (b + 1) * blocks.cols); ++col) {
        for (int64_t k = 0; k < l.window; ++k) {
          const int64_t i = (r * l.cols + col) * l.window + k;
          row.push_back(!c.may(i) ? 0 : squared ? s[i] * s[i] : s[i]);
        }
      }
      (*sums)[unit * across + b] += naive_row(row);
    }
  }
}

void check_sums(Case c, const Blocks& blocks, bool check = true) {
  const int64_t across = blocks.across(c.layer.cols);
  const int64_t units = naive_unit(blocks.first + c.layer.rows - 1, blocks.rows, blocks.height) + 2;
  for (const bool squared : {true, false}) {
    std::vector<double> sums = cases::normal(units * across, 77), expected = sums;
    add_blocks(c, blocks, squared, check, &sums);
    naive_sums(c, blocks, squared, &expected);
    CHECK_MESSAGE(sums == expected, c.text() << ", blocks " << blocks.rows << "x" << blocks.cols
                                             << ", first " << blocks.first);
  }
}

// Weights in all conditions: norms near 1, some zero; far ones; scores that leave float's range
// although the norms are near; ready scores.
template <typename Check>
void in_all_conditions(DType dtype, const Layout& l, const Check& check) {
  const int64_t n = l.size();
  Layer near = layer(dtype, l);
  check(Case(near, cases::normal(n, 3)));
  check(Case(near, cases::normal(n, 3), false, cases::random_bytes(n, 4, 0.6), 1));
  check(Case(near, cases::normal(n, 5), true));
  check(Case(near, tied(n, 6), true, cases::random_bytes(n, 7, 0.5)));
  near.row_norm[l.rows / 2] = 0;
  near.col_norm[0] = 0;
  check(Case(near, tied(n, 8)));
  check(Case(layer(dtype, l, -59, -50), cases::spread(n, 9, -45, -25)));
  const double far = dtype == DType::f64 ? 60 : 140;
  check(Case(layer(dtype, l, -far, far), cases::normal(n, 10)));
}

}  // namespace

TEST_CASE("N:M: of columns and of rows, every dtype, window and group of rows") {
  const Layout shapes[] = {{24, 48, 1, 1}, {24, 24, 9, 2}, {48, 24, 2, 4}};
  for (const DType dtype : cases::kDTypes) {
    for (const Layout& shape : shapes) {
      for (const bool rows : {false, true}) {
        in_all_conditions(dtype, shape, [&](const Case& c) { check_nm(c, {2, 4, rows}); });
        for (const int64_t of : {2, 3, 6, 8, 12}) {
          if (rows && shape.group_rows() % of != 0) continue;
          check_nm(Case(layer(dtype, shape), cases::normal(shape.size(), 1)), {of / 2, of, rows});
        }
      }
    }
  }
}

TEST_CASE("N:M: groups of any length, any number kept") {
  for (const DType dtype : cases::kDTypes) {
    for (const int64_t of : {1, 2, 5, 8, 11, 16, 20, 32, 33, 70}) {
      const Layout shape = {3, 2 * of, 1, 1};
      const Layout tall = {2 * of, 3, 2, 2};
      for (const int64_t keep : {int64_t{0}, int64_t{1}, of / 2, of, of + 3}) {
        check_nm(Case(layer(dtype, shape), tied(shape.size(), 5)), {keep, of, false});
        check_nm(Case(layer(dtype, tall), cases::normal(tall.size(), 5), false,
                      cases::random_bytes(tall.size(), 8, 0.5)),
                 {keep, of, true});
      }
    }
  }
}

TEST_CASE("N:M: hand-worked") {
  // ties to the lower index; -0.0 equals 0.0; the scores are |w| * row * column
  Layer l = {DType::f32, 1, 8, 1, 1, {2}, {1, 1, 1, 1, 1, 8, 1, 1}};
  Case weights(l, {-0.0, 0.0, 0.0, -1.0, 3.0, 0.5, -3.0, 2.0});
  CHECK(nm_mask(weights, {2, 4, false}, true) == Bytes{1, 0, 0, 1, 1, 1, 0, 0});
  Case scores(l, {-0.0, 0.0, 0.0, -1.0, -3.0, -0.5, -INFINITY, INFINITY}, true);
  CHECK(nm_mask(scores, {2, 4, false}, true) == Bytes{1, 1, 0, 0, 0, 1, 0, 1});
}

TEST_CASE("N:M: values that are no numbers") {
  for (const DType dtype : cases::kDTypes) {
    const Layout shape = {8, 8, 3, 1};
    std::vector<double> values = cases::normal(shape.size(), 12);
    for (const int64_t i : {50, 53, 100, 191}) values[i] = i % 2 ? NAN : -INFINITY;
    Case weights(layer(dtype, shape), values);
    Case scores(layer(dtype, shape), values, true);
    for (const int64_t of : {4, 8}) {
      Status status = {};
      nm_mask(weights, {2, of, false}, true, &status);
      CHECK(status.bad_count == 4);
      CHECK(status.first() == 50);
      nm_mask(scores, {2, of, of == 4}, true, &status);
      CHECK(status.bad_count == 2);
      CHECK(status.first() == 53);
      check_nm(weights, {1, of, false}, false);
      check_nm(scores, {1, of, true}, false);
    }
  }
  const Layout longer = {2, 40, 1, 1};
  std::vector<double> values = cases::normal(80, 12);
  values[41] = INFINITY;
  Case c(layer(DType::bf16, longer), values);
  Status status = {};
  nm_mask(c, {7, 40, false}, true, &status);
  CHECK(status.bad_count == 1);
  CHECK(status.first() == 41);
}

TEST_CASE("structures: bad norms are found, the first of each side") {
  for (const DType dtype : cases::kDTypes) {
    Layer l = layer(dtype, {8, 8, 1, 1});
    l.row_norm[5] = -1;
    l.row_norm[6] = NAN;
    l.col_norm[3] = INFINITY;
    Case c(l, cases::normal(64, 1));
    Status status = {};
    nm_mask(c, {2, 4, false}, true, &status);
    CHECK(status.bad_norm(0));
    CHECK(status.first_norm(0) == 5);
    CHECK(status.bad_norm(1));
    CHECK(status.first_norm(1) == 3);
    tile_mask(c, true, true, &status);
    CHECK(status.first_norm(0) == 5);
    std::vector<double> sums(4, 1.0);
    status = add_blocks(c, {4, 4, 8, 0}, true, true, &sums);
    CHECK(status.first_norm(1) == 3);
    CHECK(sums == std::vector<double>(4, 1.0));
    nm_mask(c, {2, 4, false}, false, &status);
    CHECK(!status.bad_norm(0));
  }
}

TEST_CASE("structures of nothing") {
  Layer l = layer(DType::f32, {0, 8, 1, 1});
  l.col_norm[2] = -1;
  Case none(l, {});
  Status status = {};
  CHECK(nm_mask(none, {2, 4, false}, true, &status).empty());
  CHECK(status.first_norm(1) == 2);
  CHECK(tile_mask(none, true, false, &status).empty());
  CHECK(!status.bad_norm(1));
  std::vector<double> sums(2, 1.0);
  status = add_blocks(none, {4, 4, 4, 0}, true, true, &sums);
  CHECK(status.first_norm(1) == 2);
  CHECK(sums == std::vector<double>(2, 1.0));
  CHECK(launch_block_mask(nullptr, {0, 8, 1, 1}, {4, 4, 4, 0}, nullptr, nullptr, nullptr) ==
        cudaSuccess);
}

TEST_CASE("tiles: the best of 90 patterns, every dtype, window and group of rows") {
  const Layout shapes[] = {{12, 20, 1, 1}, {16, 8, 9, 2}};
  for (const DType dtype : cases::kDTypes) {
    for (const Layout& shape : shapes) {
      in_all_conditions(dtype, shape, [&](const Case& c) { check_tiles(c); });
    }
  }
}

TEST_CASE("tiles: ties, infinite sums and values that are no numbers") {
  for (const DType dtype : cases::kDTypes) {
    const Layout shape = {8, 16, 1, 1};
    check_tiles(Case(layer(dtype, shape), std::vector<double>(shape.size(), 0.0)));
    std::vector<double> values = cases::normal(shape.size(), 4);
    for (const int64_t i : {3, 21, 22, 60, 90}) values[i] = i % 2 ? NAN : INFINITY;
    values[77] = -INFINITY;
    check_tiles(Case(layer(dtype, shape), values), false);
    check_tiles(Case(layer(dtype, shape), values, true), false);
    check_tiles(Case(layer(dtype, shape), values, true, cases::random_bytes(shape.size(), 1, 0.7)),
                false);
    Case weights(layer(dtype, shape), values);
    Status status = {};
    tile_mask(weights, true, true, &status);
    CHECK(status.bad_count == 6);
    CHECK(status.first() == 3);
  }
  const Layout shape = {4, 8, 1, 1};
  std::vector<double> huge = cases::spread(32, 1, 1022, 1023.9);
  for (int64_t i = 0; i < 32; i += 3) huge[i] = -huge[i];  // some sums are infinity minus infinity
  check_tiles(Case(layer(DType::f64, shape), huge, true));
}

TEST_CASE("sums of blocks: every way they are added, every dtype") {
  struct Shape {
    Layout layout;
    Blocks blocks;
  };
  const Shape shapes[] = {
      {{12, 40, 1, 1}, {4, 1, 12, 0}},     // one thread a block: columns of 1, 2, 3, 8 weights
      {{20, 40, 1, 1}, {20, 2, 20, 0}},    //
      {{11, 41, 1, 1}, {3, 3, 11, 0}},     //
      {{33, 40, 1, 1}, {16, 8, 33, 0}},    //
      {{6, 10, 2, 2}, {2, 3, 3, 0}},       //
      {{21, 50, 1, 1}, {4, 9, 21, 0}},     // lanes of a warp: rows of 9, 16, 27, 32
      {{40, 48, 1, 1}, {16, 16, 40, 0}},   //
      {{14, 7, 9, 2}, {3, 3, 7, 0}},       //
      {{20, 70, 1, 1}, {7, 32, 20, 0}},    //
      {{9, 80, 1, 1}, {4, 33, 9, 0}},      // warps: rows of 33, 300, 1025, 2400
      {{6, 150, 4, 2}, {3, 75, 3, 0}},     //
      {{3, 2100, 1, 1}, {1, 1025, 3, 0}},  //
      {{4, 2400, 1, 1}, {2, 2400, 4, 0}},  //
      {{10, 40, 1, 1}, {4, 4, 12, 1}},     // rows of one group, from within a block on
      {{5, 30, 2, 1}, {3, 10, 7, 16}},     //
      {{5, 100, 1, 1}, {3, 50, 7, 8}},     //
  };
  for (const DType dtype : cases::kDTypes) {
    for (const Shape& s : shapes) {
      if (dtype == DType::f32) {
        in_all_conditions(dtype, s.layout, [&](const Case& c) { check_sums(c, s.blocks); });
      } else {
        const Layer l = layer(dtype, s.layout);
        check_sums(Case(l, cases::normal(l.size(), 3)), s.blocks);
        check_sums(Case(l, tied(l.size(), 3), true, cases::random_bytes(l.size(), 4, 0.5)),
                   s.blocks, false);
      }
    }
  }
}

TEST_CASE("sums of blocks do not depend on how the rows come") {
  const Layout shape = {30, 21, 1, 1};
  const Layer whole = layer(DType::f32, shape);
  const std::vector<double> values = cases::normal(shape.size(), 5);
  for (const int64_t cols : {4, 20}) {
    const Blocks blocks = {8, cols, 30, 0};
    std::vector<double> at_once(4 * blocks.across(21), 0.0), in_parts = at_once;
    Case all(whole, values);
    add_blocks(all, blocks, true, true, &at_once);
    for (const int64_t first : {0, 3, 10}) {
      const int64_t end = first == 0 ? 3 : first == 3 ? 10 : 30;
      Layer part = whole;
      part.rows = end - first;
      part.row_norm.assign(whole.row_norm.begin() + first, whole.row_norm.begin() + end);
      Case rows(part, std::vector<double>(values.begin() + first * 21, values.begin() + end * 21));
      add_blocks(rows, {8, cols, 30, first}, true, true, &in_parts);
    }
    CHECK(at_once == in_parts);
  }
}

TEST_CASE("sums of blocks stay as they are where a weight is bad") {
  for (const int64_t cols : {4, 16, 40}) {
    const Layout shape = {8, 40, 1, 1};
    std::vector<double> values = cases::normal(shape.size(), 5);
    values[111] = NAN;
    values[300] = INFINITY;
    const Blocks blocks = {4, cols, 8, 0};
    const std::vector<double> before = cases::normal(2 * blocks.across(40), 9);
    for (const bool ready : {false, true}) {
      Case c(layer(DType::f16, shape), values, ready);
      std::vector<double> sums = before;
      const Status status = add_blocks(c, blocks, true, true, &sums);
      CHECK(status.bad_count == (ready ? 1 : 2));
      CHECK(status.first() == 111);
      CHECK(sums == before);
      add_blocks(c, blocks, true, false, &sums);
      CHECK(sums != before);
    }
  }
}

TEST_CASE("masks of blocks") {
  struct Shape {
    Layout layout;
    Blocks blocks;
  };
  const Shape shapes[] = {{{12, 64, 1, 1}, {4, 16, 12, 0}}, {{11, 41, 1, 1}, {3, 3, 11, 0}},
                          {{14, 7, 9, 2}, {3, 3, 7, 0}},    {{5, 30, 2, 1}, {3, 10, 7, 16}},
                          {{300, 1, 1, 1}, {1, 1, 300, 0}}, {{2, 5000, 1, 1}, {2, 5000, 2, 0}}};
  for (const Shape& s : shapes) {
    const Layout& l = s.layout;
    const int64_t across = s.blocks.across(l.cols);
    const int64_t units =
        naive_unit(s.blocks.first + l.rows - 1, s.blocks.rows, s.blocks.height) + 1;
    const Bytes kept = cases::random_bytes(units * across, 3, 0.5);
    for (const bool some : {false, true}) {
      const Bytes may = some ? cases::random_bytes(l.size(), 4, 0.5) : Bytes{};
      for (const size_t shift : {0, 1}) {
        Buffer mask(l.size(), shift);
        CHECK(launch_block_mask(kept.data(), l, s.blocks, some ? may.data() : nullptr,
                                mask.as<uint8_t>(), nullptr) == cudaSuccess);
        int64_t wrong = 0;
        for (int64_t i = 0; i < l.size(); ++i) {
          const int64_t row = i / l.row_size();
          const int64_t unit = naive_unit(s.blocks.first + row, s.blocks.rows, s.blocks.height);
          const int64_t block = i % l.row_size() / l.window / s.blocks.cols;
          const bool expected = kept[unit * across + block] && (!some || may[i]);
          wrong += mask.at<uint8_t>(i) != (expected ? 1 : 0);
        }
        CHECK(wrong == 0);
      }
    }
  }
}
