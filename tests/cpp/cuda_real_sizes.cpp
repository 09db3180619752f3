// SPDX-License-Identifier: MIT
// The selection by the CUDA kernels on emulated threads with the sizes that a GPU gets: blocks of
// 256 and 512 threads, 2048 bins, samples of 2^12 and more, room for 65536 candidates. The other
// tests run with small sizes, so that they reach every path with few elements; here each path is
// taken once per dtype. The CUDA sources are part of this program.
#define LAP_REAL_SIZES
#include "cuda_cases.h"
// clang-format off: after cuda_cases.h, which says LAP_EMULATED
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "doctest.h"
#include "../../csrc/cuda/norms.cu"
#include "../../csrc/cuda/score.cu"
#include "../../csrc/cuda/select.cu"
#include "../../csrc/cuda/select_rows.cu"
#include "../../csrc/cuda/select_scores.cu"
#include "../../csrc/cuda/select_weights.cu"
// clang-format on

using namespace lap::cuda;  // NOLINT
using cases::Buffer;
using cases::Layer;
using cases::Tensor;
using lap::DType;
using Bytes = std::vector<uint8_t>;

namespace {

Layer layer(DType dtype, int64_t rows, int64_t cols, int64_t window, double far = 2) {
  return {dtype,
          rows,
          cols,
          window,
          1,
          cases::spread(rows, 1, -far, 2),
          cases::spread(cols, 2, -far, 2)};
}

Layer ones(DType dtype, int64_t rows, int64_t cols) {
  return {dtype, rows, cols, 1, 1, std::vector<double>(rows, 1.0), std::vector<double>(cols, 1.0)};
}

State check_mask(const Layer& layer,
                 const std::vector<double>& values,
                 int64_t keep,
                 const Bytes& eligible = {},
                 size_t shift = 0) {
  Tensor w(layer.dtype, values, shift);
  const Weight weight = layer.weight(w.data.as());
  Buffer workspace(mask_workspace(weight)), mask(layer.size()), may(eligible.size());
  std::copy(eligible.begin(), eligible.end(), may.as<uint8_t>());
  CHECK(launch_mask(weight, layer.norms(), eligible.empty() ? nullptr : may.as<uint8_t>(), keep,
                    true, mask.as<uint8_t>(), workspace.as(), nullptr) == cudaSuccess);
  const Bytes found(mask.as<uint8_t>(), mask.as<uint8_t>() + layer.size());
  const bool same = found == cases::best(cases::exact_scores(layer, w), keep, eligible);
  CHECK_MESSAGE(same, "dtype " << int(layer.dtype) << ", n " << layer.size() << ", keep " << keep);
  const State state = workspace.at<State>(0);
  CHECK(state.status.out_of_range == 0);
  CHECK(state.status.bad_count == 0);
  return state;
}

// Did the sample's interval hold the bound, in fewer candidates than there is room for?
bool sampled(const State& state, int64_t keep) {
  const Count k = static_cast<Count>(keep);
  return state.candidates <= static_cast<Count>(kLeastCapacity) && state.above < k &&
         k < state.above + state.candidates;
}

void check_list(DType dtype, const std::vector<int64_t>& sizes, int64_t keep, double step) {
  std::vector<Tensor> tensors;
  std::vector<Buffer> masks;
  std::vector<double> all;
  for (size_t t = 0; t < sizes.size(); ++t) {
    std::vector<double> values = cases::normal(sizes[t], 100 + static_cast<unsigned>(t));
    for (double& x : values) x = step > 0 ? std::floor(x / step) * step : x;
    tensors.emplace_back(dtype, values);
    masks.emplace_back(sizes[t]);
  }
  std::vector<Source> sources;
  for (size_t t = 0; t < sizes.size(); ++t) {
    sources.push_back({tensors[t].data.as(), sizes[t], nullptr, masks[t].as<uint8_t>()});
    for (int64_t i = 0; i < sizes[t]; ++i) all.push_back(tensors[t][i]);
  }
  const int count = static_cast<int>(sizes.size());
  Buffer workspace(topk_mask_workspace(sources.data(), count, dtype)), value(8);
  CHECK(launch_topk_mask(sources.data(), count, dtype, keep, true, workspace.as(), nullptr) ==
        cudaSuccess);
  Bytes found;
  for (size_t t = 0; t < sizes.size(); ++t) {
    found.insert(found.end(), masks[t].as<uint8_t>(), masks[t].as<uint8_t>() + sizes[t]);
    sources[t].mask = nullptr;
  }
  const bool same = found == cases::best(all, keep, {});
  CHECK_MESSAGE(same, "dtype " << int(dtype) << ", " << count << " tensors");
  CHECK(launch_kth_largest(sources.data(), count, dtype, keep, true, value.as(), workspace.as(),
                           nullptr) == cudaSuccess);
  std::nth_element(all.begin(), all.begin() + keep - 1, all.end(), std::greater<double>());
  CHECK((dtype == DType::f64 ? value.at<double>(0) : value.at<float>(0)) == all[keep - 1]);
}

}  // namespace

TEST_CASE("masks by a sample, in vectors, element by element, with an eligible mask") {
  emulator::processor_count = 5;
  for (const DType dtype : cases::kDTypes) {
    const Layer rows = layer(dtype, 260, 520, 1);
    for (const int64_t keep : {int64_t{1350}, int64_t{67600}, int64_t{134000}}) {
      const State state = check_mask(rows, cases::normal(rows.size(), 5), keep);
      if (keep != 134000) CHECK(sampled(state, keep));
    }
    const Layer odd = layer(dtype, 131, 521, 3);
    check_mask(odd, cases::normal(odd.size(), 6), odd.size() / 10, {}, 1);
    const Layer conv = layer(dtype, 128, 64, 9);
    check_mask(conv, cases::normal(conv.size(), 7), conv.size() / 3,
               cases::random_bytes(conv.size(), 3, 0.7));
    const Layer few = layer(dtype, 64, 64, 9);
    check_mask(few, cases::normal(few.size(), 7), few.size() / 10);
  }
}

TEST_CASE("ties, all equal, and a sample that misleads") {
  for (const DType dtype : cases::kDTypes) {
    const Layer layer = ones(dtype, 260, 520);
    std::vector<double> values = cases::normal(layer.size(), 8);
    for (double& x : values) x = std::floor(std::fabs(x) * 2) / 2;
    check_mask(layer, values, layer.size() / 4);
    check_mask(layer, std::vector<double>(layer.size(), 0.5), layer.size() / 4 + 1);
    values = cases::normal(layer.size(), 31);
    int bits = kLeastSampleBits;
    while (bits < kMostSampleBits && (int64_t{32} << bits) <= layer.size()) ++bits;
    const lap::SamplePositions position(int64_t{1} << bits, layer.size());
    for (int64_t i = 0; i < int64_t{1} << bits; ++i) values[position(i)] *= 100;
    const int64_t keep = layer.size() / 2;
    CHECK(!sampled(check_mask(layer, values, keep), keep));
  }
}

TEST_CASE("norms whose products leave float's range, many norms in many blocks") {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const Layer wide = layer(dtype, 260, 520, 1, 140);
    check_mask(wide, cases::normal(wide.size(), 9), wide.size() * 9 / 10);
  }
  const Layer tall = layer(DType::f32, 9000, 8, 1);
  check_mask(tall, cases::normal(tall.size(), 10), tall.size() / 5);
}

TEST_CASE("lists of tensors, with and without ties, more of them than one launch describes") {
  for (const DType dtype : cases::kDTypes) {
    check_list(dtype, {40000, 0, 7, 60001, 33, 5000}, 20000, 0);
    check_list(dtype, {40000, 0, 7, 60001, 33, 5000}, 20000, 0.5);
    std::vector<int64_t> many;
    for (int t = 0; t < 70; ++t) many.push_back(1000 + t * 37);
    check_list(dtype, many, 50000, 0);
  }
}

TEST_CASE("a million weights") {
  const Layer big = layer(DType::f32, 1024, 1160, 1);
  const std::vector<double> values = cases::normal(big.size(), 5);
  for (const int64_t keep : {big.size() / 10, big.size() / 2}) {
    CHECK(sampled(check_mask(big, values, keep), keep));
  }
}
