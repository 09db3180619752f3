// SPDX-License-Identifier: MIT
// Weights whose vectors of 16 bytes lie in rows take kernels of their own (select_rows.cu, and
// score_kernel with kRows): windows, ends of tiles within a row, dead and pruned weights, and the
// list in which a warp collects candidates.
#include "cuda_cases.h"
#include "doctest.h"
// after cuda_cases.h, which says LAP_EMULATED
#include "../../csrc/cuda/select_kernels.cuh"

using namespace lap;        // NOLINT
using namespace lap::cuda;  // NOLINT
using cases::Buffer;
using cases::Layer;
using cases::Tensor;
using Bytes = std::vector<uint8_t>;

namespace {

// rows * cols * window weights; cols * window is a multiple of 8, so of every dtype's vector
Layer straight_layer(DType dtype, int64_t rows, int64_t cols, int64_t window) {
  return {
      dtype, rows, cols, window, 1, cases::spread(rows, 11, -2, 2), cases::spread(cols, 12, -2, 2)};
}

Bytes masked(const Layer& layer, Tensor& w, int64_t keep, const Bytes& eligible, State* state) {
  const Weight weight = layer.weight(w.data.as());
  CHECK(straight(weight));
  Buffer workspace(mask_workspace(weight));
  Buffer mask(layer.size());
  Buffer may(eligible.size());
  std::copy(eligible.begin(), eligible.end(), may.as<uint8_t>());
  CHECK(launch_mask(weight, layer.norms(), eligible.empty() ? nullptr : may.as<uint8_t>(), keep,
                    true, mask.as<uint8_t>(), workspace.as(), nullptr) == cudaSuccess);
  *state = workspace.at<State>(0);
  return Bytes(mask.as<uint8_t>(), mask.as<uint8_t>() + layer.size());
}

void check(const Layer& layer,
           const std::vector<double>& values,
           int64_t keep,
           const Bytes& eligible = {}) {
  Tensor w(layer.dtype, values);
  State state = {};
  const bool same = masked(layer, w, keep, eligible, &state) ==
                    cases::best(cases::exact_scores(layer, w), keep, eligible);
  CHECK_MESSAGE(same, "dtype " << int(layer.dtype) << ", keep " << keep);
  CHECK(state.status.out_of_range == 0);
}

}  // namespace

TEST_CASE("rows: masks of every dtype, window and tile's end") {
  struct Shape {
    int64_t rows, cols, window;
  };
  // rows that are shorter than a vector's block, as long as a tile, and longer
  const Shape shapes[] = {{300, 8, 1}, {61, 8, 9}, {9, 128, 8}, {3, 1000, 2}, {1, 4096, 1}};
  for (const DType dtype : cases::kDTypes) {
    for (const Shape& s : shapes) {
      const Layer layer = straight_layer(dtype, s.rows, s.cols, s.window);
      const int64_t n = layer.size();
      const std::vector<double> values = cases::normal(n, 21);
      for (const int64_t keep : {int64_t{1}, n / 10, n / 2, n - 3}) check(layer, values, keep);
      check(layer, values, n / 3, cases::random_bytes(n, 5, 0.5));
      std::vector<double> pruned = values;
      for (int64_t i = 0; i < n; ++i) pruned[i] = i % 3 ? 0 : values[i];
      for (const int64_t keep : {n / 4, n / 2}) check(layer, pruned, keep);
    }
  }
}

TEST_CASE("rows: underflow does not decide, dead channels are last") {
  Layer layer = straight_layer(DType::f32, 50, 16, 5);
  const std::vector<double> tiny = cases::spread(layer.size(), 3, -140, -100);
  for (const int64_t keep : {100, 2500, 3999}) check(layer, tiny, keep);
  for (int64_t r = 0; r < 50; r += 2) layer.row_norm[r] = 0;
  layer.col_norm[3] = 0;
  for (const int64_t keep : {700, 2000, 3000}) check(layer, cases::normal(layer.size(), 4), keep);
}

TEST_CASE("rows: bad weights are found") {
  for (const DType dtype : cases::kDTypes) {
    const Layer layer = straight_layer(dtype, 50, 16, 5);
    Tensor w(dtype, cases::normal(layer.size(), 4));
    w.set(3456, NAN);
    w.set(1234, -INFINITY);
    State state = {};
    masked(layer, w, 2000, {}, &state);
    CHECK(state.status.bad_count == 2);
    CHECK(state.status.first() == 1234);
  }
}

TEST_CASE("rows: scores with windows, zeros, and numbers that leave the range") {
  for (const DType dtype : cases::kDTypes) {
    const bool is_double = dtype == DType::f64;
    for (const double range : {2.0, 60.0}) {  // the second: some products are denormal in float
      Layer layer = straight_layer(dtype, 61, 16, 9);
      layer.row_norm = cases::spread(61, 8, -range, range);
      layer.col_norm = cases::spread(16, 9, -range, range);
      layer.row_norm[7] = 0;
      std::vector<double> values = cases::normal(layer.size(), 2);
      for (int64_t i = 0; i < layer.size(); i += 5) values[i] = i % 2 ? 0.0 : -0.0;
      Tensor w(dtype, values);
      const Weight weight = layer.weight(w.data.as());
      Buffer workspace(score_workspace(weight));
      Buffer out(layer.size() * (is_double ? 8 : 4));
      CHECK(launch_score(weight, layer.norms(), true, out.as(), workspace.as(), nullptr) ==
            cudaSuccess);
      int64_t wrong = 0;
      for (int64_t i = 0; i < layer.size(); ++i) {
        const double row = layer.row_norm[i / 144];
        const double col = layer.col_norm[i % 144 / 9];
        const double x = std::fabs(w[i]);
        // |w| has 24 bits, so has the rounded product: theirs is exact in double
        const double expected =
            is_double ? x * (row * col)
                      : static_cast<float>(x * lap::round24(lap::round24(row) * lap::round24(col)));
        wrong += (is_double ? out.at<double>(i) : out.at<float>(i)) != expected;
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("rows: a warp's list overflows, and is written in parts") {
  // Half of the elements are candidates: eligible ones beyond what the sample expects.
  const int64_t n = 16384;
  const Layer layer = {DType::f32, 1, n, 1, 1, {1.0}, std::vector<double>(n, 1.0)};
  std::vector<double> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = 1 + static_cast<double>((i * 7919) % n) / n / 4;
  for (const int64_t keep : {100, 5000, 12000}) check(layer, values, keep);
}
