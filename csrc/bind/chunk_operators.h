// SPDX-License-Identifier: MIT
// The operators that rank scores chunk by chunk (csrc/cpu/chunks.h). Only torch on a CPU has them;
// elsewhere the reference does it.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/chunks.h"
#include "check.h"
#include "operators.h"

namespace lap::bind {

template <typename Core>
struct ChunkOperators {
  using Arrays = typename Core::Arrays;
  using Array = typename Arrays::Array;
  using Mask = typename Arrays::Mask;

  static std::tuple<Array, Array> count_keys(
      const Array& scores, const std::optional<Mask>& mask, int64_t low, int64_t high, bool take) {
    constexpr const char* op = "count_keys";
    return by_key(op, scores, [&](auto zero) {
      using Key = decltype(zero);
      const Core core(scores);
      const Chunk<Key> chunk(op, scores, mask);
      const cpu::Interval<Key> interval = interval_of<Key>(op, low, high);
      const cpu::Counted counted = cpu::count_keys(chunk.keys, interval, core.pool());
      const Array totals = Arrays::template empty<int64_t>(scores, {2});
      integers(totals)[0] = counted.total.above;
      integers(totals)[1] = counted.total.inside;
      const Array keys = Arrays::template empty<Key>(scores, {take ? counted.total.inside : 0});
      if (take) {
        cpu::take_keys(chunk.keys, counted, core.pool(),
                       static_cast<Key*>(Arrays::mutable_data(keys)));
      }
      return std::make_tuple(totals, keys);
    });
  }

  static Array key_histogram(const Array& scores,
                             const std::optional<Mask>& mask,
                             int64_t low,
                             int64_t high,
                             int64_t shift,
                             int64_t bins) {
    constexpr const char* op = "key_histogram";
    return by_key(op, scores, [&](auto zero) {
      using Key = decltype(zero);
      const Chunk<Key> chunk(op, scores, mask);
      const cpu::Interval<Key> interval = interval_of<Key>(op, low, high);
      const uint64_t width = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
      if (shift < 0 || shift >= KeyTraits<Key>::kBits || bins < 1 || bins > kMostBins ||
          width >> shift >= static_cast<uint64_t>(bins)) {
        fail(op, {"(high - low) >> shift < bins <= " + std::to_string(kMostBins),
                  "shift " + std::to_string(shift) + " and bins " + std::to_string(bins)});
      }
      const Array counts = Arrays::template empty<int64_t>(scores, {bins});
      cpu::key_histogram(chunk.keys, interval, static_cast<int>(shift), bins, Core(scores).pool(),
                         integers(counts));
      return counts;
    });
  }

  static Array squares_above(const Array& scores,
                             const std::optional<Mask>& mask,
                             int64_t key,
                             int64_t exponent) {
    constexpr const char* op = "squares_above";
    return by_key(op, scores, [&](auto zero) {
      using Key = decltype(zero);
      const Chunk<Key> chunk(op, scores, mask);
      if (exponent < -1073 || exponent > 1024) {
        fail(op, {"-1073 <= exponent <= 1024", std::to_string(exponent)});
      }
      const Array sums = Arrays::template empty<int64_t>(scores, {2});
      const bool below =
          cpu::squares_above(chunk.keys, key_of<Key>(op, key), static_cast<int>(exponent),
                             Core(scores).pool(), integers(sums));
      if (!below) fail(op, {"scores below 2**" + std::to_string(exponent), "larger ones"});
      return sums;
    });
  }

  static std::tuple<Array, Array> threshold_mask(const Array& scores,
                                                 const std::optional<Mask>& mask,
                                                 int64_t key,
                                                 int64_t ties) {
    constexpr const char* op = "threshold_mask";
    return by_key(op, scores, [&](auto zero) {
      using Key = decltype(zero);
      const Core core(scores);
      const Chunk<Key> chunk(op, scores, mask);
      const Array kept = core.template empty<bool>(scores, Arrays::sizes(scores));
      const Array taken = Arrays::template empty<int64_t>(scores, {1});
      *integers(taken) = cpu::threshold_mask(chunk.keys, key_of<Key>(op, key), ties, core.pool(),
                                             static_cast<uint8_t*>(Arrays::mutable_data(kept)));
      return std::make_tuple(kept, taken);
    });
  }

  static void random_scores_(const Array& out, int64_t start, int64_t first, int64_t step) {
    constexpr const char* op = "random_scores_";
    by_key(op, out, [&](auto zero) {
      using Float = typename KeyTraits<decltype(zero)>::Float;
      if (!out.is_contiguous()) fail(op, {"a contiguous out"});
      cpu::random_scores(static_cast<uint64_t>(start), static_cast<uint64_t>(first),
                         static_cast<uint64_t>(step), Arrays::size(out), Core(out).pool(),
                         static_cast<Float*>(Arrays::mutable_data(out)));
    });
  }

  static void masked_zero_(const Array& weight, const Mask& mask) {
    constexpr const char* op = "masked_zero_";
    Core(weight).zero(op, weight, Arrays::eligible(op, mask, weight));
  }

  static std::tuple<Array, Array> nonzero_mask(const Array& weight,
                                               const std::optional<Mask>& mask) {
    constexpr const char* op = "nonzero_mask";
    const DType dtype = Arrays::dtype(op, weight);
    const Core core(weight);
    const Array held = Arrays::contiguous(weight);
    const uint8_t* may = mask ? Arrays::eligible(op, *mask, weight) : nullptr;
    const Array live = core.template empty<bool>(weight, Arrays::sizes(weight));
    const Array count = Arrays::template empty<int64_t>(weight, {1});
    *integers(count) =
        cpu::nonzero_mask(Arrays::data(held), dtype, Arrays::size(weight), may, core.pool(),
                          static_cast<uint8_t*>(Arrays::mutable_data(live)));
    return std::make_tuple(live, count);
  }

 private:
  static constexpr int64_t kMostBins = int64_t{1} << 15;

  // The scores as csrc/cpu reads them, with what holds them.
  template <typename Key>
  struct Chunk {
    Array held;
    cpu::ScoreChunk<Key> keys;

    Chunk(const char* op, const Array& scores, const std::optional<Mask>& mask)
        : held(Arrays::contiguous(scores)),
          keys{static_cast<const typename KeyTraits<Key>::Float*>(Arrays::data(held)),
               mask ? Arrays::eligible(op, *mask, scores) : nullptr, Arrays::size(scores)} {}
  };

  // use(Key{0}) for the type of the keys of scores
  template <typename Use>
  static auto by_key(const char* op, const Array& scores, const Use& use) {
    const DType dtype = Arrays::dtype(op, scores);
    if (dtype == DType::f64) return use(int64_t{0});
    if (dtype != DType::f32) Arrays::fail_dtype(op, {"scores of float32 or float64"});
    return use(int32_t{0});
  }

  template <typename Key>
  static Key key_of(const char* op, int64_t key) {
    return interval_of<Key>(op, key, std::numeric_limits<Key>::max()).low;
  }

  template <typename Key>
  static cpu::Interval<Key> interval_of(const char* op, int64_t low, int64_t high) {
    constexpr int64_t largest = std::numeric_limits<Key>::max();
    if (low < -1 || low > high || high > largest) {
      fail(op, {"keys from -1 to " + std::to_string(largest) + " that do not fall",
                std::to_string(low) + " and " + std::to_string(high)});
    }
    return {static_cast<Key>(low), static_cast<Key>(high)};
  }

  static int64_t* integers(const Array& x) {
    return static_cast<int64_t*>(Arrays::mutable_data(x));
  }
};

}  // namespace lap::bind
