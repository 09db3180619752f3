// SPDX-License-Identifier: MIT
// Fuzzes the selection: bytes become a layer (dtype, shape, keep, eligible weights, values drawn
// from few or many patterns, norms of any finite size), whose mask must equal the definition's.
// With clang: libFuzzer. With gcc (LAP_FUZZ_MAIN): the small driver below, random bytes for
// -max_total_time seconds (-seed repeats a run).
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "layers.h"
#include "naive.h"

namespace {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint64_t take(int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) value = value << 8 | next();
    return value;
  }

 private:
  uint8_t next() {
    return at_ < size_ ? data_[at_++] : static_cast<uint8_t>(mix_ = mix_ * 75 + 74);
  }
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  uint32_t mix_ = 1;  // goes on when the input ends
};

double weight(Bytes& bytes, int kind) {
  switch (kind) {
    case 0:
      return static_cast<double>(bytes.take(1) % 3);
    case 1:
      return 1.0 + static_cast<double>(bytes.take(1)) * 0x1p-23;
    case 2:
      return std::ldexp(static_cast<double>(bytes.take(2)), -static_cast<int>(bytes.take(1)) / 2);
    default: {
      const float x = lap::bit_cast<float>(static_cast<uint32_t>(bytes.take(4)));
      return x - x == 0 ? x : 0;
    }
  }
}

double norm(Bytes& bytes, bool extreme) {
  const uint64_t x = bytes.take(2);
  if (x % 17 == 0) return 0;
  const double mantissa = 1.0 + static_cast<double>(x) * 0x1p-16;
  return extreme ? std::ldexp(mantissa, static_cast<int>(bytes.take(1)) * 2 - 256) : mantissa;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  layers::Layer layer;
  layer.dtype = static_cast<layers::DType>(bytes.take(1) % lap::kDTypes);
  const int64_t groups = 1 + static_cast<int64_t>(bytes.take(1) % 3);
  layer.layout = {groups * static_cast<int64_t>(1 + bytes.take(1) % 40),
                  static_cast<int64_t>(1 + bytes.take(1) % 120),
                  static_cast<int64_t>(1 + bytes.take(1) % 5), groups};
  const int64_t n = layer.layout.size();
  const int64_t keep = static_cast<int64_t>(bytes.take(4)) % (n + 2);
  const int kind = static_cast<int>(bytes.take(1) % 4);
  const bool extreme = layer.dtype != layers::DType::f64 && bytes.take(1) % 2;
  const bool restricted = bytes.take(1) % 3 == 0;
  const int threads = 1 + static_cast<int>(bytes.take(1) % 3);
  for (int64_t r = 0; r < layer.layout.rows; ++r) layer.row_norm.push_back(norm(bytes, extreme));
  for (int64_t c = 0; c < groups * layer.layout.cols; ++c) {
    layer.col_norm.push_back(norm(bytes, extreme));
  }
  for (int64_t p = 0; p < n; ++p) layer.w.push_back(weight(bytes, kind));
  layer.store();
  std::vector<uint8_t> eligible;
  for (int64_t p = 0; p < n && restricted; ++p) eligible.push_back(bytes.take(1) % 4 != 0);

  std::vector<uint8_t> mask(n, 7);
  lap::cpu::Source source = layer.source(mask.data());
  if (restricted) source.eligible = eligible.data();
  const lap::cpu::Pool pool = lap::cpu::thread_pool(threads);
  const lap::cpu::Selection selection = lap::cpu::select({source}, keep, true, pool);
  if (selection.outcome == lap::cpu::Outcome::range) return 0;  // said, not guessed
  const bool to_float = layer.dtype != layers::DType::f64;
  const std::vector<double> scores =
      naive::scores(layer.w, layer.layout, layer.row_norm, layer.col_norm, to_float);
  if (selection.outcome != lap::cpu::Outcome::ok ||
      mask != naive::mask(naive::ranking(scores, eligible), keep, n)) {
    std::fprintf(stderr, "wrong mask: dtype %d, [%ld, %ld, %ld], groups %ld, keep %ld, kind %d\n",
                 static_cast<int>(layer.dtype), layer.layout.rows, layer.layout.cols,
                 layer.layout.window, groups, keep, kind);
    std::abort();
  }
  return 0;
}

#if defined(LAP_FUZZ_MAIN)
int main(int argc, char** argv) {
  int seconds = 20;
  unsigned seed = std::random_device{}();
  for (int i = 1; i < argc; ++i) {
    std::sscanf(argv[i], "-max_total_time=%d", &seconds);
    std::sscanf(argv[i], "-seed=%u", &seed);
  }
  std::fprintf(stderr, "seed %u\n", seed);  // -seed repeats a run
  const auto start = std::chrono::steady_clock::now();
  std::mt19937_64 random(seed);
  int64_t runs = 0;
  for (; std::chrono::steady_clock::now() - start < std::chrono::seconds(seconds); ++runs) {
    std::vector<uint8_t> input(random() % 4096 + 16);
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld inputs in %d s, no difference\n", runs, seconds);
  return 0;
}
#endif
