// SPDX-License-Identifier: MIT
// topk_mask and kth_largest over lists by the CUDA kernels on emulated threads, against a stable
// sort of the values. See test_cuda_select.cpp.
#include "cuda_cases.h"
#include "doctest.h"
// after cuda_cases.h, which says LAP_EMULATED
#include "../../csrc/cuda/select_kernels.cuh"

using namespace lap;        // NOLINT
using namespace lap::cuda;  // NOLINT
using cases::Buffer;
using cases::Tensor;
using Bytes = std::vector<uint8_t>;

namespace {

struct ListResult {
  std::vector<Bytes> masks;
  State state;
  double value = 0;
};

// topk_mask, or kth_largest when `threshold` is set
ListResult run_list(std::vector<Tensor>& scores,
                    int64_t keep,
                    const std::vector<Bytes>& eligible,
                    bool check,
                    bool threshold) {
  std::vector<Source> sources;
  std::vector<Buffer> masks;
  for (const Tensor& t : scores) masks.emplace_back(t.size);
  for (size_t i = 0; i < scores.size(); ++i) {
    const uint8_t* may = eligible.empty() ? nullptr : eligible[i].data();
    uint8_t* mask = threshold ? nullptr : masks[i].as<uint8_t>();
    sources.push_back({scores[i].data.as(), scores[i].size, may, mask});
  }
  const int count = static_cast<int>(sources.size());
  const DType dtype = scores.empty() ? DType::f32 : scores[0].dtype;
  Buffer workspace(topk_mask_workspace(sources.data(), count, dtype));
  Buffer value(8);
  ListResult result;
  if (threshold) {
    CHECK(launch_kth_largest(sources.data(), count, dtype, keep, check, value.as(), workspace.as(),
                             nullptr) == cudaSuccess);
    result.value = dtype == DType::f64 ? value.at<double>(0) : value.at<float>(0);
  } else {
    CHECK(launch_topk_mask(sources.data(), count, dtype, keep, check, workspace.as(), nullptr) ==
          cudaSuccess);
    for (size_t i = 0; i < scores.size(); ++i) {
      result.masks.emplace_back(masks[i].as<uint8_t>(), masks[i].as<uint8_t>() + scores[i].size);
    }
  }
  std::memcpy(static_cast<void*>(&result.state), workspace.as(), sizeof(Status));
  return result;
}

// Both functions on a list against a stable sort of the values (-0.0 == 0.0).
void check_list(std::vector<Tensor>& scores,
                int64_t keep,
                const std::vector<Bytes>& eligible = {}) {
  std::vector<double> all;
  Bytes may;
  for (const Tensor& t : scores) {
    for (int64_t i = 0; i < t.size; ++i) all.push_back(t[i]);
  }
  for (const Bytes& e : eligible) may.insert(may.end(), e.begin(), e.end());
  const Bytes expected = cases::best(all, keep, may);
  const ListResult result = run_list(scores, keep, eligible, true, false);
  Bytes found;
  for (const Bytes& m : result.masks) found.insert(found.end(), m.begin(), m.end());
  CHECK_MESSAGE(found == expected, "n " << all.size() << ", keep " << keep);
  const int64_t n = static_cast<int64_t>(all.size());
  if (keep < 1 || keep > n || !eligible.empty()) return;
  const ListResult threshold = run_list(scores, keep, {}, true, true);
  std::sort(all.begin(), all.end(), std::greater<double>());
  CHECK(threshold.value == all[keep - 1]);
}

}  // namespace

TEST_CASE("lists: one ranking over all tensors, empty ones among them") {
  for (const DType dtype : cases::kDTypes) {
    for (const double grid : {0.0, 0.5}) {  // plain numbers, and heavy ties
      std::vector<Tensor> scores;
      std::vector<Bytes> eligible;
      unsigned seed = 40;
      for (const int64_t n : {0, 1500, 0, 1, 1024, 700, 0, 2048, 3, 0}) {
        std::vector<double> values = cases::normal(n, ++seed);
        for (double& x : values) x = grid > 0 ? std::round(x / grid) * grid : x;
        scores.emplace_back(dtype, values, seed % 2);
        eligible.push_back(cases::random_bytes(n, seed, 0.4));
      }
      const int64_t all = 1500 + 1 + 1024 + 700 + 2048 + 3;
      for (const int64_t keep : {int64_t{0}, int64_t{1}, int64_t{2600}, all - 1, all, all + 5}) {
        check_list(scores, keep);
        check_list(scores, keep, eligible);
      }
    }
  }
}

TEST_CASE("many tensors") {
  std::vector<Tensor> scores;
  for (int i = 0; i < 100; ++i) scores.emplace_back(DType::f32, cases::normal(i % 7 * 20, i));
  for (const int64_t keep : {1, 3000}) check_list(scores, keep);
}

TEST_CASE("raw scores may be negative and infinite") {
  for (const DType dtype : cases::kDTypes) {
    std::vector<double> values = cases::normal(3000, 50);
    values[5] = INFINITY;
    values[2900] = INFINITY;
    values[100] = -INFINITY;
    values[200] = -0.0;
    values[201] = 0.0;
    std::vector<Tensor> scores;
    scores.emplace_back(dtype, values);
    for (const int64_t keep : {1, 2, 3, 1500, 2999, 3000}) check_list(scores, keep);
  }
}

TEST_CASE("no tensors, no elements") {
  std::vector<Tensor> none;
  check_list(none, 3);
  none.emplace_back(DType::f32, std::vector<double>{});
  check_list(none, 3);
}

TEST_CASE("a sample that misleads costs time, not correctness, of raw scores either") {
  const int64_t n = 6000;
  std::vector<double> values = cases::normal(n, 31);
  for (const int bits : {7, 8, 9}) {  // whichever of them the sample has
    for (int i = 0; i < 1 << bits; ++i) values[SamplePositions(1 << bits, n)(i)] = 100 + i;
  }
  std::vector<Tensor> list;
  list.emplace_back(DType::f32, values);
  check_list(list, 3000);
}

TEST_CASE("NaN scores are found, in the first tensor that has any") {
  for (const DType dtype : cases::kDTypes) {
    std::vector<double> values = cases::normal(4000, 60);
    values[1234] = NAN;
    values[999] = INFINITY;
    std::vector<Tensor> scores;
    scores.emplace_back(dtype, cases::normal(2000, 1));
    scores.emplace_back(dtype, values);
    scores.emplace_back(dtype, std::vector<double>(5, NAN));
    const Status status = run_list(scores, 100, {}, true, false).state.status;
    CHECK(status.bad_count == 1);  // of the first tensor that has any; infinite scores are fine
    CHECK(status.source() == 1);
    CHECK(status.first() == 1234);
    CHECK(run_list(scores, 100, {}, false, false).state.status.bad_count == 0);
  }
}
