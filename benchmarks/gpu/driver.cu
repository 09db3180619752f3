// SPDX-License-Identifier: MIT
// Every launcher of csrc/cuda on small data, without torch or Python, for compute-sanitizer: each
// buffer is an allocation of its own of exactly the bytes it needs. Also checks what is cheap to
// check: exactly `keep` are kept, two runs give the same bytes, pruned weights are zero.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/launch.h"

using namespace lap;        // NOLINT
using namespace lap::cuda;  // NOLINT

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    require(cudaMalloc(&data_, bytes == 0 ? 1 : bytes), "cudaMalloc");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T>
  void fill(const std::vector<T>& from) {
    require(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "fill");
  }
  template <typename T>
  std::vector<T> read(size_t count) const {
    std::vector<T> to(count);
    require(cudaMemcpy(to.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost), "read");
    return to;
  }
  template <typename T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

std::mt19937_64 random_bits(20200426);  // NOLINT: the same data on every run

std::vector<double> normal(int64_t n) {
  std::normal_distribution<double> distribution(0, 1);
  std::vector<double> values(n);
  for (double& x : values) x = distribution(random_bits);
  return values;
}

std::vector<double> norms(int64_t n, double spread) {
  std::uniform_real_distribution<double> exponent(-spread, 0);
  std::vector<double> values(n);
  for (double& x : values) x = std::exp2(exponent(random_bits));
  return values;
}

// Float bits cut to a 16-bit type: bfloat16, or float16 for 2^-14 <= |x| < 2^15.
uint16_t bfloat(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits = 0;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>(bits >> 16);
}
uint16_t half(double x) {
  int exponent = 0;
  const double m = std::frexp(std::fabs(x), &exponent);
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x == 0 || exponent < -13) return sign;
  return static_cast<uint16_t>(sign | ((exponent + 14) << 10) | (int(m * 2048) - 1024));
}

void upload(Buffer* buffer, const std::vector<double>& values, DType dtype) {
  if (dtype == DType::f64) return buffer->fill(values);
  if (dtype == DType::f32) {
    return buffer->fill(std::vector<float>(values.begin(), values.end()));
  }
  std::vector<uint16_t> bits;
  for (const double x : values) bits.push_back(dtype == DType::f16 ? half(x) : bfloat(x));
  buffer->fill(bits);
}

struct Case {
  const char* name;
  int64_t rows, cols, window, groups;
  double spread;     // of the norms' exponents: large ones need wide ranks
  int values;        // distinct ones, 0: all
  bool half_eligible;
};

std::vector<double> values_of(const Case& c) {
  std::vector<double> values = normal(c.rows * c.cols * c.window);
  for (double& x : values) {
    if (c.values != 0) x = std::fmod(std::floor(std::fabs(x) * 1000), c.values);
  }
  return values;
}

void run_weights(const Case& c, DType dtype) {
  const int64_t n = c.rows * c.cols * c.window;
  const size_t item = static_cast<size_t>(item_size(dtype));
  Buffer w(n * item), row(8 * c.rows), col(8 * c.cols * c.groups), may(n), mask(n);
  const std::vector<double> values = values_of(c);
  upload(&w, values, dtype);
  row.fill(norms(c.rows, dtype == DType::f64 ? 1 : c.spread));
  col.fill(norms(c.cols * c.groups, dtype == DType::f64 ? 1 : c.spread));
  std::vector<uint8_t> eligible(n);
  for (int64_t i = 0; i < n; ++i) eligible[i] = i % 2 == 0;
  may.fill(eligible);
  const Weight weight = {w.as(), dtype, {c.rows, c.cols, c.window, c.groups}};
  const Norms given = {row.as<double>(), col.as<double>()};
  const int64_t keep = n / 5;
  Buffer workspace(mask_workspace(weight));
  std::vector<uint8_t> first;
  for (int run = 0; run < 2; ++run) {
    require(launch_mask(weight, given, c.half_eligible ? may.as<uint8_t>() : nullptr, keep, true,
                        mask.as<uint8_t>(), workspace.as(), nullptr),
            c.name);
    require(cudaDeviceSynchronize(), c.name);
    const std::vector<uint8_t> found = mask.read<uint8_t>(n);
    int64_t kept = 0;
    for (const uint8_t byte : found) kept += byte;
    expect(kept == keep, c.name);
    if (run == 0) first = found;
    expect(found == first, "two runs differ");
  }
  const Status status = workspace.read<Status>(1)[0];
  expect(status.bad_count == 0 && !status.bad_norm(0) && !status.bad_norm(1), "status");
  Buffer scores(n * (dtype == DType::f64 ? 8 : 4)), score_space(score_workspace(weight));
  require(launch_score(weight, given, true, scores.as(), score_space.as(), nullptr), "score");
  Buffer row_squared_norms(8 * c.rows), row_space(row_squared_norm_workspace(weight));
  require(launch_row_squared_norms(weight, 1, true, row_squared_norms.as<double>(), row_space.as(), nullptr), "row");
  Buffer col_squared_norms(8 * c.cols * c.groups), col_space(col_squared_norm_workspace(weight));
  require(launch_col_squared_norms(weight, 1, true, col_squared_norms.as<double>(), col_space.as(), nullptr), "col");
  const int64_t shape[3] = {c.rows, c.cols, c.window};
  const int64_t straight[3] = {c.cols * c.window, c.window, 1};
  const int64_t turned[3] = {1, c.rows, c.rows * c.cols};
  for (const int64_t* stride : {straight, turned}) {
    Strided target;
    expect(make_strided(w.as(), dtype, 3, shape, stride, &target), "strides");
    require(launch_zero(target, mask.as<uint8_t>(), true, workspace.as(), nullptr), "zero");
  }
  require(cudaDeviceSynchronize(), c.name);
}

void run_list(DType dtype, int count, int64_t each) {
  std::vector<Buffer*> held;
  std::vector<Source> sources;
  int64_t n = 0;
  for (int t = 0; t < count; ++t) {
    const int64_t size = each + t;
    held.push_back(new Buffer(size * item_size(dtype)));
    upload(held.back(), normal(size), dtype);
    held.push_back(new Buffer(size));
    sources.push_back({held[held.size() - 2]->as(), size, nullptr, held.back()->as<uint8_t>()});
    n += size;
  }
  const int64_t keep = n / 10;
  Buffer workspace(topk_mask_workspace(sources.data(), count, dtype)), value(8);
  require(launch_topk_mask(sources.data(), count, dtype, keep, true, workspace.as(), nullptr), "topk");
  require(cudaDeviceSynchronize(), "topk");
  int64_t kept = 0;
  for (int t = 0; t < count; ++t) {
    for (const uint8_t byte : held[2 * t + 1]->read<uint8_t>(sources[t].size)) kept += byte;
    sources[t].mask = nullptr;
  }
  expect(kept == keep, "topk_mask keeps another number");
  require(launch_kth_largest(sources.data(), count, dtype, keep, true, value.as(), workspace.as(),
                             nullptr),
          "kth");
  require(cudaDeviceSynchronize(), "kth");
  for (Buffer* buffer : held) delete buffer;
}

}  // namespace

int main() {
  const Case cases[] = {
      {"small", 30, 10, 1, 1, 2, 0, false},
      {"rows of vectors", 61, 16, 9, 1, 2, 0, false},
      {"odd rows", 37, 29, 3, 1, 2, 0, false},
      {"groups", 24, 5, 9, 6, 2, 0, false},
      {"sampled", 500, 400, 1, 1, 2, 0, false},
      {"sampled, odd", 500, 401, 1, 1, 2, 0, true},
      {"sampled, pruned", 500, 400, 1, 1, 2, 0, true},
      {"ties", 300, 400, 1, 1, 0, 2, false},
      {"wide", 100, 1000, 1, 1, 140, 0, false},
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const Case& c : cases) run_weights(c, dtype);
    run_list(dtype, 40, 50);
    run_list(dtype, 3, 60000);
  }
  std::printf(failures == 0 ? "driver: all right\n" : "driver: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
