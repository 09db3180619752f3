// SPDX-License-Identifier: MIT
// Norms, scores and zeroing by the CUDA kernels, on emulated threads; selection has its own file.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "cuda_cases.h"
#include "doctest.h"

using namespace lap;        // NOLINT
using namespace lap::cuda;  // NOLINT
using cases::Buffer;
using cases::Layer;
using cases::Tensor;

namespace {

double squared(double x, double scale) {
  const double v = x * scale;
  return v * v;
}

// The documented order, element by element.
std::vector<double> naive_rows(const Tensor& x, int64_t rows, double scale) {
  const int64_t row_size = x.size / rows;
  std::vector<double> squared_norms;
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0;
    for (int64_t begin = 0; begin < row_size; begin += 1024) {
      double lane[32] = {};
      for (int64_t j = begin; j < std::min(begin + 1024, row_size); ++j) {
        lane[(j - begin) % 32] += squared(x[r * row_size + j], scale);
      }
      for (int half = 16; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
      }
      total += lane[0];
    }
    squared_norms.push_back(total);
  }
  return squared_norms;
}

std::vector<double> naive_cols(const Tensor& x, const Layout& shape, double scale) {
  const int64_t width = shape.cols * shape.window;
  const int64_t rows = shape.rows / shape.groups;
  std::vector<double> squared_norms;
  for (int64_t g = 0; g < shape.groups; ++g) {
    for (int64_t c = 0; c < shape.cols; ++c) {
      double squared_norm = 0;
      for (int64_t k = 0; k < shape.window; ++k) {
        double total = 0;
        for (int64_t begin = 0; begin < rows; begin += 64) {
          double sum = 0;
          for (int64_t n = begin; n < std::min(begin + 64, rows); ++n) {
            sum += squared(x[(g * rows + n) * width + c * shape.window + k], scale);
          }
          total += sum;
        }
        squared_norm += total;
      }
      squared_norms.push_back(squared_norm);
    }
  }
  return squared_norms;
}

Status status_of(Buffer& workspace) {
  return workspace.at<Status>(0);
}

template <typename Launch>
std::vector<double> squared_norms(int64_t count,
                                  size_t workspace_bytes,
                                  const Launch& launch,
                                  Status* status = nullptr) {
  Buffer workspace(workspace_bytes);
  Buffer squared_norm(count * sizeof(double));
  CHECK(launch(squared_norm.as<double>(), workspace.as()) == cudaSuccess);
  if (status != nullptr) *status = status_of(workspace);
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(squared_norm.at<double>(i));
  return values;
}

// |w| times the rounded product of the norms, rounded once to the score's type.
double rounded_once(double w, const cases::Exact& factor, bool is_double) {
  const cases::Exact x = cases::exact(w, is_double);
  if (x.mantissa == 0 || factor.mantissa == 0) return 0;
  const int64_t exponent = std::max<int64_t>(-1200, std::min(1200L, x.exponent + factor.exponent));
  const int half = static_cast<int>(exponent / 2);
  const int rest = static_cast<int>(exponent) - half;
  const double s = std::ldexp(x.mantissa, half) * std::ldexp(factor.mantissa, rest);
  return is_double ? s : static_cast<float>(s);
}

void check_score(const Layer& layer, const std::vector<double>& values, size_t shift = 0) {
  const Tensor tensor(layer.dtype, values, shift);
  Tensor w = tensor;
  const Weight weight = layer.weight(w.data.as());
  const bool is_double = layer.dtype == DType::f64;
  Buffer workspace(score_workspace(weight));
  Buffer out(layer.size() * (is_double ? 8 : 4));
  CHECK(launch_score(weight, layer.norms(), true, out.as(), workspace.as(), nullptr) ==
        cudaSuccess);
  CHECK(status_of(workspace).bad_count == 0);
  const Tensor ones(layer.dtype, std::vector<double>(layer.size(), 1.0));
  const std::vector<cases::Exact> factor = cases::exact_scores(layer, ones);  // of 1 * norms
  int64_t wrong = 0;
  for (int64_t i = 0; i < layer.size(); ++i) {
    const double s = is_double ? out.at<double>(i) : out.at<float>(i);
    wrong += s != rounded_once(w[i], factor[i], is_double) || std::signbit(s);
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("a division by multiplication is exact") {
  // through the strided zeroing: every element of an odd shape is reached once
  for (const DType dtype : cases::kDTypes) {
    const int64_t shape[3] = {5, 7, 3};
    Tensor w(dtype, std::vector<double>(2 * 5 * 7 * 3, 1.0));
    Strided strided = {w.data.as(), dtype, 105, 3, {}, {}};
    const int64_t strides[3] = {2, 10, 70};  // a transposed view of every second element
    std::copy(shape, shape + 3, strided.shape);
    std::copy(strides, strides + 3, strided.stride);
    std::vector<uint8_t> mask(105);
    for (int i = 0; i < 105; ++i) mask[i] = i % 4 == 0;
    CHECK(launch_zero(strided, mask.data(), false, nullptr, nullptr) == cudaSuccess);
    int wrong = 0;
    for (int a = 0; a < 5; ++a) {
      for (int b = 0; b < 7; ++b) {
        for (int c = 0; c < 3; ++c) {
          const int64_t at = 2 * a + 10 * b + 70 * c;
          wrong += w[at] != (((a * 7 + b) * 3 + c) % 4 == 0 ? 1.0 : 0.0);
          wrong += w[at + 1] != 1.0;
        }
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("contiguous weights are zeroed where the mask is 0, whole vectors and single ones") {
  for (const DType dtype : cases::kDTypes) {
    for (const size_t shift : {0, 1}) {
      const int64_t n = 2500;
      Tensor w(dtype, std::vector<double>(n, -2.0), shift);
      std::vector<uint8_t> mask(n);
      for (int64_t i = 0; i < n; ++i) mask[i] = i % 100 < 20 || i % 7 == 0;
      const Strided strided = {w.data.as(), dtype, n, 1, {n}, {1}};
      CHECK(launch_zero(strided, mask.data(), false, nullptr, nullptr) == cudaSuccess);
      int64_t wrong = 0;
      for (int64_t i = 0; i < n; ++i) wrong += w[i] != (mask[i] ? -2.0 : 0.0);
      for (int64_t i = 0; i < n; ++i) wrong += !mask[i] && std::signbit(w[i]);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("nothing is zeroed after a run that found something wrong") {
  Tensor w(DType::f32, {1, 2, 3});
  const std::vector<uint8_t> mask(3, 0);
  Status status = {};
  const Strided strided = {w.data.as(), DType::f32, 3, 1, {3}, {1}};
  status.bad_count = 1;
  CHECK(launch_zero(strided, mask.data(), true, &status, nullptr) == cudaSuccess);
  CHECK(w[0] == 1);
  status = {};
  status.out_of_range = 1;
  CHECK(launch_zero(strided, mask.data(), true, &status, nullptr) == cudaSuccess);
  CHECK(w[0] == 1);
  CHECK(launch_zero(strided, mask.data(), false, &status, nullptr) == cudaSuccess);
  CHECK(w[0] == 0);
}

TEST_CASE("row squared_norms have the documented order of additions") {
  for (const DType dtype : cases::kDTypes) {
    for (const int64_t row_size : {1, 9, 31, 32, 33, 300, 1024, 1025, 3000}) {
      const int64_t rows = 5;
      Tensor x(dtype, cases::normal(rows * row_size, 7 + row_size), 1);
      const Weight shape = {x.data.as(), dtype, {rows, row_size, 1, 1}};
      const double scale = row_size == 33 ? 0x1p-3 : 1;
      const auto found =
          squared_norms(rows, row_squared_norm_workspace(shape), [&](double* e, void* space) {
            return launch_row_squared_norms(shape, scale, true, e, space, nullptr);
          });
      CHECK(found == naive_rows(x, rows, scale));
    }
  }
}

TEST_CASE("column squared_norms have the documented order of additions") {
  for (const DType dtype : cases::kDTypes) {
    for (const int64_t rows : {1, 5, 64, 65, 200}) {
      for (const int64_t window : {1, 9}) {
        const int64_t groups = rows % 5 == 0 ? 5 : 1;
        Tensor x(dtype, cases::normal(rows * 11 * window, rows), 1);
        const Weight shape = {x.data.as(), dtype, {rows, 11, window, groups}};
        const auto found = squared_norms(
            groups * 11, col_squared_norm_workspace(shape), [&](double* e, void* space) {
              return launch_col_squared_norms(shape, 1.0, true, e, space, nullptr);
            });
        CHECK(found == naive_cols(x, shape.layout, 1.0));
      }
    }
  }
}

TEST_CASE("squared_norms of nothing are zero") {
  const Weight rows = {nullptr, DType::f32, {3, 0, 1, 1}};
  CHECK(squared_norms(3, row_squared_norm_workspace(rows), [&](double* e, void* space) {
          return launch_row_squared_norms(rows, 1, true, e, space, nullptr);
        }) == std::vector<double>(3, 0.0));
  const Weight cols = {nullptr, DType::f32, {0, 4, 1, 1}};
  CHECK(squared_norms(4, col_squared_norm_workspace(cols), [&](double* e, void* space) {
          return launch_col_squared_norms(cols, 1, true, e, space, nullptr);
        }) == std::vector<double>(4, 0.0));
}

TEST_CASE("non-finite weights are counted, the first one found") {
  for (const DType dtype : cases::kDTypes) {
    std::vector<double> values = cases::normal(40 * 60, 3);
    for (const int64_t i : {1999, 777, 778, 2390}) values[i] = i % 2 ? NAN : -INFINITY;
    Tensor x(dtype, values);
    const Weight shape = {x.data.as(), dtype, {40, 20, 3, 1}};
    Status row = {};
    squared_norms(
        40, row_squared_norm_workspace(shape),
        [&](double* e, void* space) {
          return launch_row_squared_norms(shape, 1, true, e, space, nullptr);
        },
        &row);
    CHECK(row.bad_count == 4);
    CHECK(row.first() == 777);
    Status col = {};
    squared_norms(
        20, col_squared_norm_workspace(shape),
        [&](double* e, void* space) {
          return launch_col_squared_norms(shape, 1, true, e, space, nullptr);
        },
        &col);
    CHECK(col.bad_count == 4);
    CHECK(col.first() == 777);
    Buffer workspace(score_workspace(shape));
    Buffer out(40 * 60 * 8);
    const std::vector<double> ones(40, 1.0);
    launch_score(shape, {ones.data(), ones.data()}, true, out.as(), workspace.as(), nullptr);
    CHECK(status_of(workspace).bad_count == 4);
    CHECK(status_of(workspace).first() == 777);
    launch_score(shape, {ones.data(), ones.data()}, false, out.as(), workspace.as(), nullptr);
    CHECK(status_of(workspace).bad_count == 0);
  }
}

TEST_CASE("a score is |w| times its two norms") {
  // rows 2, 4; columns 1, 8; w = -3, 5, 0, -0.5
  const Layer layer = {DType::f32, 2, 2, 1, 1, {2, 4}, {1, 8}};
  Tensor w(DType::f32, {-3, 5, 0, -0.5});
  Buffer workspace(score_workspace(layer.weight(w.data.as())));
  Buffer out(4 * sizeof(float));
  launch_score(layer.weight(w.data.as()), layer.norms(), true, out.as(), workspace.as(), nullptr);
  CHECK(out.at<float>(0) == 3 * 2 * 1);
  CHECK(out.at<float>(1) == 5 * 2 * 8);
  CHECK(out.at<float>(2) == 0);
  CHECK(out.at<float>(3) == 0.5 * 4 * 8);
}

TEST_CASE("scores are the exact products, rounded once") {
  for (const DType dtype : cases::kDTypes) {
    for (const size_t shift : {0, 1}) {
      check_score({dtype, 12, 10, 9, 3, cases::spread(12, 1, -3, 3), cases::spread(30, 2, -3, 3)},
                  cases::normal(12 * 10 * 9, 4), shift);
      check_score({dtype, 40, 77, 1, 1, cases::spread(40, 1, -3, 3), cases::spread(77, 2, -3, 3)},
                  cases::normal(40 * 77, 5), shift);
    }
    // products that overflow, are denormal, or vanish in float; a zero norm; a zero weight
    std::vector<double> row = cases::spread(30, 8, -130, 130);
    row[3] = 0;
    std::vector<double> values = cases::spread(30 * 50, 9, -14, 14);
    values[100] = -0.0;
    check_score({dtype, 30, 50, 1, 1, row, cases::spread(50, 6, -60, 60)}, values);
    check_score(
        {dtype, 30, 50, 1, 1, cases::spread(30, 8, -1060, 1000), cases::spread(50, 6, -1060, 1000)},
        values);
    check_score(
        {dtype, 30, 50, 1, 1, cases::spread(30, 8, -64, -60), cases::spread(50, 6, -64, -60)},
        values);
  }
}
