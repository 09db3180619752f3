// SPDX-License-Identifier: MIT
// mask by the CUDA kernels on emulated threads, against a stable sort of
// exact scores. Tiles, sample and buffers are small there (device.cuh, select.cuh), so that a few
// thousand elements take every path; tests that aim at one path assert that it was taken.
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

struct Result {
  Bytes mask;
  State state;
};

struct Options {
  bool check = true;
  Bytes eligible;
};

Result run_mask(const Layer& layer, Tensor& w, int64_t keep, const Options& options = {}) {
  const Weight weight = layer.weight(w.data.as());
  Buffer workspace(mask_workspace(weight));
  Buffer mask(layer.size());
  Buffer eligible(options.eligible.size());
  std::copy(options.eligible.begin(), options.eligible.end(), eligible.as<uint8_t>());
  CHECK(launch_mask(weight, layer.norms(),
                    options.eligible.empty() ? nullptr : eligible.as<uint8_t>(), keep,
                    options.check, mask.as<uint8_t>(), workspace.as(), nullptr) == cudaSuccess);
  return {Bytes(mask.as<uint8_t>(), mask.as<uint8_t>() + layer.size()), workspace.at<State>(0)};
}

State check_mask(const Layer& layer,
                 const std::vector<double>& values,
                 int64_t keep,
                 const Options& options = {},
                 size_t shift = 0) {
  Tensor w(layer.dtype, values, shift);
  const Result result = run_mask(layer, w, keep, options);
  CHECK(result.state.status.bad_count == 0);
  CHECK(result.state.status.out_of_range == 0);
  const bool same =
      result.mask == cases::best(cases::exact_scores(layer, w), keep, options.eligible);
  CHECK_MESSAGE(same, "dtype " << int(layer.dtype) << ", n " << layer.size() << ", keep " << keep);
  return result.state;
}

// A layer of n = rows * cols weights with plain norms.
Layer plain(DType dtype, int64_t rows, int64_t cols) {
  return {dtype, rows, cols, 1, 1, cases::spread(rows, 11, -2, 2), cases::spread(cols, 12, -2, 2)};
}

Layer ones(DType dtype, int64_t n) {
  return {dtype, 1, n, 1, 1, {1.0}, std::vector<double>(n, 1.0)};
}

bool fell_back(const State& state, int64_t keep, int64_t capacity) {
  const Count k = static_cast<Count>(keep);
  return state.candidates > static_cast<Count>(capacity) || state.above > k ||
         state.above + state.candidates < k;
}

int64_t capacity_of(int64_t n) {
  return std::max(kLeastCapacity, n / kCapacityShare);
}

}  // namespace

TEST_CASE("hand-worked: two rows, two columns") {
  // scores 3*2*1 = 6, 5*2*8 = 80, 0, 0.5*4*8 = 16
  const Layer layer = {DType::f32, 2, 2, 1, 1, {2, 4}, {1, 8}};
  Tensor w(DType::f32, {-3, 5, 0, -0.5});
  CHECK(run_mask(layer, w, 1).mask == Bytes{0, 1, 0, 0});
  CHECK(run_mask(layer, w, 2).mask == Bytes{0, 1, 0, 1});
  CHECK(run_mask(layer, w, 3).mask == Bytes{1, 1, 0, 1});
}

TEST_CASE("every dtype, shape, alignment and keep") {
  for (const DType dtype : cases::kDTypes) {
    for (const size_t shift : {0, 1}) {
      for (const int64_t keep : {0, 1, 500, 4499, 4500, 9000}) {
        check_mask(plain(dtype, 50, 90), cases::normal(4500, 21), keep, {}, shift);
      }
      for (const int64_t keep : {0, 1, 7, 299, 300}) {  // few: all are candidates
        check_mask(plain(dtype, 30, 10), cases::normal(300, 22), keep, {}, shift);
      }
      const Layer grouped = {
          dtype, 24, 5, 27, 6, cases::spread(24, 1, -2, 2), cases::spread(30, 2, -2, 2)};
      check_mask(grouped, cases::normal(24 * 5 * 27, 23), 1000, {}, shift);
    }
    check_mask(ones(dtype, 1), {0.5}, 1);
    check_mask(ones(dtype, 1), {0.5}, 0);
  }
}

TEST_CASE("the one pass and the buffer suffice on ordinary data") {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const int64_t keep : {90, 900, 4500, 8100}) {
      const State state = check_mask(plain(dtype, 90, 100), cases::normal(9000, 5), keep);
      CHECK(!fell_back(state, keep, capacity_of(9000)));
    }
  }
}

TEST_CASE("launches of one mask") {
  emulator::launches = 0;
  check_mask(plain(DType::f32, 40, 100), cases::normal(4000, 5), 2000);
  CHECK(emulator::launches == 4);  // prepare, sample, scan, finish
  emulator::launches = 0;
  check_mask(plain(DType::f32, 10, 10), cases::normal(100, 5), 50);
  CHECK(emulator::launches == 3);  // no sample
}

TEST_CASE("equal scores: the lower index is kept") {
  for (const DType dtype : cases::kDTypes) {
    for (const int64_t keep : {1, 1000, 2999, 3000}) {
      const State state = check_mask(ones(dtype, 3000), std::vector<double>(3000, 0.5), keep);
      if (keep < 3000) CHECK(fell_back(state, keep, capacity_of(3000)));  // the buffer overflows
    }
    check_mask(ones(dtype, 400), std::vector<double>(400, 0.5), 123);
    std::vector<double> few_values = cases::normal(5000, 6);
    for (double& x : few_values) x = std::round(x * 4) / 4;
    for (const int64_t keep : {10, 700, 2500, 4990})
      check_mask(ones(dtype, 5000), few_values, keep);
  }
}

TEST_CASE("zeros, both of them, are the lowest and equal") {
  std::vector<double> values = cases::normal(4000, 7);
  for (size_t i = 0; i < values.size(); ++i) {
    if (i % 5 < 3) values[i] = i % 2 ? 0.0 : -0.0;
  }
  for (const DType dtype : cases::kDTypes) {
    for (const int64_t keep : {1000, 1599, 1600, 1601, 2500, 3999}) {
      check_mask(ones(dtype, 4000), values, keep);
      check_mask(plain(dtype, 40, 100), values, keep);
    }
    check_mask(ones(dtype, 4000), std::vector<double>(4000, -0.0), 1500);
    Layer dead = plain(dtype, 40, 100);  // a dead neighbor: half of the norms are zero
    for (int r = 0; r < 40; r += 2) dead.row_norm[r] = 0;
    for (const int64_t keep : {700, 2000, 2001, 3000}) check_mask(dead, values, keep);
  }
}

TEST_CASE("only eligible weights are kept, however few survive") {
  for (const DType dtype : cases::kDTypes) {
    for (const double share : {0.0, 0.02, 0.5, 1.0}) {
      for (const int64_t keep : {0, 40, 1800, 4000, 5000}) {
        const Options options = {true, cases::random_bytes(4000, 9, share)};
        check_mask(plain(dtype, 40, 100), cases::normal(4000, 8), keep, options);
        check_mask(ones(dtype, 4000), std::vector<double>(4000, 1.0), keep, options);
      }
    }
  }
}

TEST_CASE("underflow does not decide") {
  const DType floats[] = {DType::f32, DType::f16, DType::bf16};
  std::vector<double> values = cases::spread(4000, 3, -10, 2);
  values[17] = 0;
  for (const DType dtype : floats) {
    // products of the norms span 2^-300: wide ranks from the start
    const Layer far = {
        dtype, 40, 100, 1, 1, cases::spread(40, 1, -150, 0), cases::spread(100, 2, -150, 0)};
    for (const int64_t keep : {1, 2000, 3900, 3999}) {
      const State state = check_mask(far, values, keep);
      CHECK(!state.scale.normal<float>());
    }
    check_mask(far, values, 1500, {true, cases::random_bytes(4000, 2, 0.5)});
  }
  // the norms are fine, the weights are tiny: wide ranks once the threshold is known to be
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Layer near = {
        dtype, 40, 100, 1, 1, cases::spread(40, 1, -20, 0), cases::spread(100, 2, -20, 0)};
    const std::vector<double> tiny = cases::spread(4000, 3, -140, -100);
    for (const int64_t keep : {100, 2500, 3900, 3999}) {
      CHECK(check_mask(near, tiny, keep).scale.normal<float>());
    }
  }
  // large norms do not overflow
  const Layer large = {
      DType::f32, 40, 100, 1, 1, cases::spread(40, 1, 100, 300), cases::spread(100, 2, 100, 300)};
  check_mask(large, values, 1234);
}

TEST_CASE("norms that are equal in 24 bits give equal scores, in wide ranks too") {
  std::vector<double> col(4000);
  for (int64_t c = 0; c < 4000; ++c) col[c] = c % 2 ? 1.0 : 1.0 + 0x1p-24;
  col[3999] = 0x1p-200;  // wide
  const Layer layer = {DType::f32, 1,     4000, 1,
                       1,          {1.5}, col};  // 1.5 * (1 + 2^-24) alone would round up
  CHECK(!check_mask(layer, std::vector<double>(4000, 1.0), 1001).scale.normal<float>());
}

TEST_CASE("norms must be finite and not negative") {
  Tensor w(DType::f32, cases::normal(4000, 61));
  Layer layer = plain(DType::f32, 40, 100);
  layer.col_norm[70] = -1;
  layer.col_norm[90] = NAN;
  const Status col = run_mask(layer, w, 2000).state.status;
  CHECK(!col.bad_norm(0));
  CHECK(col.bad_norm(1));
  CHECK(col.first_norm(1) == 70);
  layer.row_norm[39] = INFINITY;
  CHECK(run_mask(layer, w, 2000).state.status.first_norm(0) == 39);
  CHECK(!run_mask(layer, w, 2000, {false, {}}).state.status.bad_norm(1));
}

TEST_CASE("denormal weights") {
  std::vector<double> values = cases::spread(4000, 3, -148, -120);
  check_mask(ones(DType::f32, 4000), values, 2000);
  check_mask(plain(DType::f32, 40, 100), values, 3000);
  check_mask(plain(DType::f16, 40, 100), cases::spread(4000, 3, -24, -10), 2000);
}

TEST_CASE("double scores beyond double's range are reported, and only those") {
  const std::vector<double> values = cases::spread(4000, 3, -10, 2);
  const Layer far = {
      DType::f64, 40, 100, 1, 1, cases::spread(40, 1, -900, 0), cases::spread(100, 2, -900, 0)};
  Tensor w(DType::f64, values);
  CHECK(run_mask(far, w, 2000).state.status.out_of_range == 1);
  for (const int64_t keep : {int64_t{0}, far.size(), far.size() + 1}) {  // nothing is ranked
    const Result result = run_mask(far, w, keep);
    CHECK(result.state.status.out_of_range == 0);
    CHECK(result.mask == Bytes(far.size(), keep != 0));
  }
  CHECK(run_mask(far, w, 2000).mask.size() == 4000);
  const Layer near = {
      DType::f64, 40, 100, 1, 1, cases::spread(40, 1, -300, 0), cases::spread(100, 2, -300, 0)};
  check_mask(near, values, 2000);
  Tensor tiny(DType::f64, cases::spread(4000, 3, -1070, -400));
  CHECK(run_mask(near, tiny, 3990).state.status.out_of_range == 1);
  CHECK(run_mask(near, tiny, 1).state.status.out_of_range == 0);
}

TEST_CASE("a sample that misleads costs time, not correctness") {
  const int64_t n = 6000;
  for (const double sampled : {100.0, 1e-3}) {  // the sample sees only large, or only small ones
    std::vector<double> values = cases::normal(n, 31);
    int bits = kLeastSampleBits;
    while (bits < kMostSampleBits && (int64_t{32} << bits) <= n) ++bits;
    for (int i = 0; i < 1 << bits; ++i) values[SamplePositions(1 << bits, n)(i)] *= sampled;
    for (const DType dtype : cases::kDTypes) {
      const State state = check_mask(ones(dtype, n), values, 3000);
      CHECK(fell_back(state, 3000, capacity_of(n)));
    }
  }
}

TEST_CASE("no weights") {
  CHECK(check_mask({DType::f32, 0, 4, 1, 1, {}, {1, 1, 1, 1}}, {}, 2).status.bad_count == 0);
}

TEST_CASE("non-finite weights are found; unchecked ones still give exactly keep") {
  for (const DType dtype : cases::kDTypes) {
    std::vector<double> values = cases::normal(4000, 60);
    values[1234] = NAN;
    values[999] = INFINITY;
    values[3999] = -INFINITY;
    Tensor w(dtype, values);
    const Options ineligible = {true, Bytes(4000, 0)};  // bad weights count wherever they are
    for (const Options& options : {Options{}, ineligible}) {
      const Status status = run_mask(plain(dtype, 40, 100), w, 2000, options).state.status;
      CHECK(status.bad_count == 3);
      CHECK(status.first() == 999);
    }
    for (const int64_t keep : {0, 2, 2000, 3999}) {
      const Result result = run_mask(plain(dtype, 40, 100), w, keep, {false, {}});
      CHECK(result.state.status.bad_count == 0);
      CHECK(std::count(result.mask.begin(), result.mask.end(), 1) == keep);
      if (keep >= 3) CHECK(result.mask[1234] + result.mask[999] + result.mask[3999] == 3);
    }
  }
  std::vector<double> norm(100, 1.0);  // non-finite norms, unchecked
  norm[3] = INFINITY;
  norm[4] = NAN;
  const Layer layer = {DType::f32, 40, 100, 1, 1, std::vector<double>(40, 1.0), norm};
  Tensor w(DType::f32, cases::normal(4000, 61));
  const Bytes mask = run_mask(layer, w, 2000, {false, {}}).mask;
  CHECK(std::count(mask.begin(), mask.end(), 1) == 2000);
  CHECK(mask[3] + mask[4] == 2);
}

TEST_CASE("the order in which threads run does not matter") {
  Tensor w(DType::f32, cases::normal(5000, 70));
  const Layer layer = plain(DType::f32, 50, 100);
  const Bytes first = run_mask(layer, w, 2222).mask;
  for (unsigned seed = 1; seed < 6; ++seed) {
    emulator::order = seed * 7919;
    emulator::processor_count = static_cast<int>(seed);
    CHECK(run_mask(layer, w, 2222).mask == first);
  }
  emulator::processor_count = 3;
}
