// SPDX-License-Identifier: MIT
// What is asked of chunks of scores and weights, against loops over single ones.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/chunks.h"
#include "doctest.h"

namespace cpu = lap::cpu;

namespace {

constexpr int64_t kLargest = 1 << 20;
constexpr int64_t kSizes[] = {0, 1, 63, 64, 65, 1000, 2 * cpu::kPiece + 65, kLargest};

// Scores with ties, zeros, subnormal and infinite ones, the live ones of a mask, and their keys.
template <typename Key>
struct Case {
  using Float = typename lap::KeyTraits<Key>::Float;

  std::vector<Float> scores;
  std::vector<uint8_t> live;
  std::vector<Key> keys;
  bool masked;

  Case(int64_t n, bool with_mask, bool finite) : masked(with_mask) {
    std::mt19937 random(static_cast<unsigned>(n));
    const auto one_in = [&](unsigned k) { return random() % k == 0; };
    for (int64_t j = 0; j < n; ++j) {
      Float x = std::ldexp(static_cast<Float>(random() % 1000), -10);
      if (one_in(50)) x = std::numeric_limits<Float>::denorm_min() * static_cast<Float>(j);
      if (!finite && one_in(50)) x = std::numeric_limits<Float>::infinity();
      scores.push_back(x);
      live.push_back(!with_mask || !one_in(3));
      Key key;
      std::memcpy(&key, &x, sizeof key);
      keys.push_back(live.back() ? key : -1);
    }
  }
  cpu::ScoreChunk<Key> chunk() const {
    return {scores.data(), masked ? live.data() : nullptr, static_cast<int64_t>(scores.size())};
  }
  Key key_of(double x) const {
    const Float score = static_cast<Float>(x);
    Key key;
    std::memcpy(&key, &score, sizeof key);
    return key;
  }
};

// check(case, pool) for all sizes, with and without a mask, on one thread and on three; the
// largest, which threads share, once
template <typename Key, typename Check>
void for_each_case(bool finite, const Check& check) {
  for (const int64_t n : kSizes) {
    const bool largest = n == kLargest;
    for (const bool masked : {false, true}) {
      if (largest && !masked) continue;
      const Case<Key> x(n, masked, finite);
      if (!largest) check(x, cpu::thread_pool(1));
      check(x, cpu::thread_pool(3));
    }
  }
}

}  // namespace

TEST_CASE_TEMPLATE("keys above and inside are counted, taken in order and binned",
                   Key,
                   int32_t,
                   int64_t) {
  for_each_case<Key>(false, [](const Case<Key>& x, const cpu::Pool& pool) {
    const Key most = std::numeric_limits<Key>::max();
    const Key half = x.key_of(0.5);
    const Key some = x.key_of(0.51);
    for (const cpu::Interval<Key> at : {cpu::Interval<Key>{-1, most},
                                        {half, some},
                                        {half, half},
                                        {-1, -1},
                                        {0, most},
                                        {most, most}}) {
      const int shift = sizeof(Key) == 4 ? 20 : 52;
      int64_t above = 0;
      std::vector<Key> inside;
      std::vector<int64_t> bins(1 << 12);
      for (const Key key : x.keys) {
        above += key > at.high;
        if (key < at.low || key > at.high) continue;
        inside.push_back(key);
        ++bins[static_cast<uint64_t>(static_cast<int64_t>(key) - at.low) >> shift];
      }
      const cpu::Counted counted = cpu::count_keys(x.chunk(), at, pool);
      CHECK(counted.total.above == above);
      REQUIRE(counted.total.inside == static_cast<int64_t>(inside.size()));
      std::vector<Key> taken(inside.size());
      cpu::take_keys(x.chunk(), counted, pool, taken.data());
      CHECK(taken == inside);
      std::vector<int64_t> counts(bins.size(), 7);
      cpu::key_histogram(x.chunk(), at, shift, static_cast<int64_t>(bins.size()), pool,
                         counts.data());
      CHECK(counts == bins);
    }
  });
}

TEST_CASE_TEMPLATE("squares above a key are summed in integers", Key, int32_t, int64_t) {
  for_each_case<Key>(true, [](const Case<Key>& x, const cpu::Pool& pool) {
    for (const int exponent : {0, 1, 5, 300}) {
      for (const double least : {-1.0, 0.0, 0.5, 1.0}) {
        const Key key = least < 0 ? -1 : x.key_of(least);
        int64_t right[2] = {};
        for (size_t j = 0; j < x.keys.size(); ++j) {
          if (x.keys[j] <= key) continue;
          const double q = std::ldexp(static_cast<double>(x.scores[j]), -exponent);
          const int64_t units = static_cast<int64_t>(std::ldexp(q * q, 60));
          right[0] += units >> 30;
          right[1] += units & ((1 << 30) - 1);
        }
        int64_t sums[2] = {7, 7};
        CHECK(cpu::squares_above(x.chunk(), key, exponent, pool, sums));
        CHECK(sums[0] == right[0]);
        CHECK(sums[1] == right[1]);
      }
    }
  });
}

TEST_CASE_TEMPLATE("squares of scores that are not below 2^exponent are refused",
                   Key,
                   int32_t,
                   int64_t) {
  using Float = typename lap::KeyTraits<Key>::Float;
  for (const int exponent : {-40, 0, 7}) {
    std::vector<Float> scores(100, std::ldexp(Float{1}, exponent - 1));
    const cpu::ScoreChunk<Key> chunk = {scores.data(), nullptr, 100};
    int64_t sums[2];
    CHECK(cpu::squares_above(chunk, Key{-1}, exponent, cpu::thread_pool(1), sums));
    CHECK(sums[0] == 100 * (int64_t{1} << 28));
    scores[99] = std::ldexp(Float{1}, exponent);
    CHECK_FALSE(cpu::squares_above(chunk, Key{-1}, exponent, cpu::thread_pool(1), sums));
    scores[99] = std::nextafter(scores[99], Float{0});
    CHECK(cpu::squares_above(chunk, Key{-1}, exponent, cpu::thread_pool(1), sums));
  }
}

TEST_CASE_TEMPLATE("a mask keeps what is above a key and the first ties", Key, int32_t, int64_t) {
  for_each_case<Key>(false, [](const Case<Key>& x, const cpu::Pool& pool) {
    for (const Key key : {Key{-1}, Key{0}, x.key_of(0.5), std::numeric_limits<Key>::max()}) {
      for (const int64_t ties : {int64_t{0}, int64_t{1}, int64_t{300}, int64_t{1} << 40}) {
        int64_t left = ties;
        std::vector<uint8_t> right;
        for (size_t j = 0; j < x.keys.size(); ++j) {
          const bool tie = x.live[j] && x.keys[j] == key && left > 0;
          left -= tie;
          right.push_back(tie || x.keys[j] > key);
        }
        std::vector<uint8_t> kept(x.keys.size(), 7);
        CHECK(cpu::threshold_mask(x.chunk(), key, ties, pool, kept.data()) == ties - left);
        CHECK(kept == right);
      }
    }
  });
}

TEST_CASE("weights that are not zero are marked and counted, whatever their dtype") {
  const auto check = [](lap::DType dtype, auto sign, auto quiet_nan) {
    using Bits = decltype(sign);
    std::mt19937 random(5);
    for (const int64_t n : kSizes) {
      std::vector<Bits> bits(n);
      std::vector<uint8_t> mask(n);
      for (int64_t j = 0; j < n; ++j) {
        const Bits some[] = {0, sign, 1, static_cast<Bits>(sign + 1), quiet_nan};
        bits[j] = some[random() % 5];
        mask[j] = random() % 3 > 0;
      }
      for (const bool masked : {false, true}) {
        int64_t right = 0;
        std::vector<uint8_t> expected(n), live(n, 7);
        for (int64_t j = 0; j < n; ++j) {
          expected[j] = bits[j] != 0 && bits[j] != sign && (!masked || mask[j]);
          right += expected[j];
        }
        for (const int threads : {1, 3}) {
          CHECK(cpu::nonzero_mask(bits.data(), dtype, n, masked ? mask.data() : nullptr,
                                  cpu::thread_pool(threads), live.data()) == right);
          CHECK(live == expected);
        }
      }
    }
  };
  check(lap::DType::f64, uint64_t{1} << 63, uint64_t{0x7ff8} << 48);
  check(lap::DType::f32, uint32_t{1} << 31, uint32_t{0x7fc0} << 16);
  check(lap::DType::f16, uint16_t{0x8000}, uint16_t{0x7e00});
  check(lap::DType::bf16, uint16_t{0x8000}, uint16_t{0x7fc0});
}

TEST_CASE("all of the most weights that are counted at a time may be not zero") {
  const std::vector<uint16_t> ones(3 * cpu::kPiece, 0x3f80);
  std::vector<uint8_t> live(ones.size());
  const int64_t n = static_cast<int64_t>(ones.size());
  CHECK(cpu::nonzero_mask(ones.data(), lap::DType::bf16, n, nullptr, cpu::thread_pool(1),
                          live.data()) == n);
  CHECK(live == std::vector<uint8_t>(ones.size(), 1));
}

TEST_CASE_TEMPLATE("random scores are the upper bits of splitmix64", Float, float, double) {
  // the first numbers of the generator with seed 1234567, as its authors' program prints them
  const uint64_t known[] = {6457827717110365317u, 3203168211198807973u, 9817491932198370423u,
                            4593380528125082431u, 16408922859458223821u};
  Float found[5];
  cpu::random_scores(1234567, 1, 1, 5, cpu::thread_pool(1), found);
  for (int j = 0; j < 5; ++j) {
    CHECK(found[j] == std::ldexp(static_cast<double>((known[j] >> 40) + 1), -24));
  }
  const int64_t n = 3 * cpu::kPiece + 5;
  std::vector<Float> all(n), some(n / 7);
  cpu::random_scores(9, 0, 1, n, cpu::thread_pool(3), all.data());
  cpu::random_scores(9, 3, 7, n / 7, cpu::thread_pool(1), some.data());
  for (int64_t j = 0; j < n / 7; ++j) REQUIRE(some[j] == all[3 + 7 * j]);
}
