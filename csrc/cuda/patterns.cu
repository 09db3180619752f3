// SPDX-License-Identifier: MIT
// N:M masks, and 2:4 along rows and columns at once. One pass over the weights; scores stay in
// registers. A thread has a group of weights (or a tile) to itself: no atomics, deterministic.
#include <utility>

#include "scored.cuh"

namespace lap::cuda {
namespace {

// Where a group or a tile begins.
struct Place {
  int64_t first;  // flat index
  int64_t row;
  int64_t channel;
};

// A weight cut into pieces of `down` rows by `right` columns at one position of the window. Pieces
// of the same rows follow each other, and among them the positions, so that neighboring threads
// read neighbors.
struct Cut {
  int64_t count;
  int64_t down;
  int64_t right;
  Divider by_strip;  // pieces of the same rows
  Divider by_window;
  Divider by_group;
  Layout layout;

  Cut(const Layout& l, int64_t down, int64_t right)
      : count(l.rows / down * (l.cols / right) * l.window),
        down(down),
        right(right),
        by_strip(l.cols / right * l.window),
        by_window(l.window),
        by_group(l.group_rows()),
        layout(l) {}

  __device__ Place at(int64_t piece) const {
    const int64_t strip = by_strip.quotient(piece);
    const int64_t rest = piece - strip * static_cast<int64_t>(by_strip.divisor);
    const int64_t across = layout.window == 1 ? rest : by_window.quotient(rest);
    const int64_t k = rest - across * layout.window;
    const int64_t row = strip * down;
    const int64_t col = across * right;
    const int64_t group = layout.groups == 1 ? 0 : by_group.quotient(row);
    return {(row * layout.cols + col) * layout.window + k, row, group * layout.cols + col};
  }
};

struct PatternArgs {
  Scored scored;
  const uint8_t* eligible;  // or null
  uint8_t* mask;
  Cut cut;
  bool words;    // four neighbors of a row are moved at once
  int64_t keep;  // of a group of N:M
  int64_t of;
  bool rows;
  int64_t stride;  // between members of a group
  bool squared;    // of tiles
};

// --- N:M --------------------------------------------------------------------------------------

// Bytes of 1 and 0 for the lowest four bits.
__device__ inline uint32_t bytes_of(uint32_t bits) {
  return (bits & 1) | (bits & 2) << 7 | (bits & 4) << 14 | (bits & 8) << 21;
}

// The bits of four bytes that are not zero.
__device__ inline uint32_t bits_of(uint32_t bytes) {
  uint32_t bits = 0;
  LAP_UNROLL
  for (int b = 0; b < 4; ++b) bits |= static_cast<uint32_t>(((bytes >> 8 * b) & 0xff) != 0) << b;
  return bits;
}

// A group of at most kMost weights in registers: kMost is 4 or more, args.of may be less.
template <typename T, bool kWeights, int kMost>
class Group {
 public:
  using Key = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;

  __device__ Group(const PatternArgs& args, const Scores<T, kWeights>& scores, const Place& place)
      : args_(args), scores_(scores), place_(place), of_(static_cast<int>(args.of)) {
    const T* w = scores.data() + place.first;
    const uint8_t* eligible = args.eligible == nullptr ? nullptr : args.eligible + place.first;
    if (args.words) {
      LAP_UNROLL
      for (int i = 0; i < kMost; i += 4) {
        const bool exist = i < of_;
        const Four<T> four = exist ? *reinterpret_cast<const Four<T>*>(w + i) : Four<T>{};
        uint32_t bytes = exist ? 0x01010101u : 0;
        if (exist && eligible != nullptr) bytes = *reinterpret_cast<const uint32_t*>(eligible + i);
        LAP_UNROLL
        for (int j = 0; j < 4; ++j) x_[i + j] = four.values[j];
        may_ |= bits_of(bytes) << i;
      }
      return;
    }
    LAP_UNROLL
    for (int i = 0; i < kMost; ++i) {
      const bool exists = i < of_;
      x_[i] = exists ? w[i * args.stride] : T{};
      const bool may = exists && (eligible == nullptr || eligible[i * args.stride] != 0);
      may_ |= static_cast<uint32_t>(may) << i;
    }
  }

  // The members that are kept; by ranks in registers where their keys say all.
  __device__ uint32_t kept() const {
    Key key[kMost];
    if (keys(key)) return best(key);
    uint32_t bits = 0;
    LAP_NO_UNROLL
    for (int i = 0; i < of_; ++i) {
      scores_.note(scores_.load(place_.first + i * args_.stride), place_.first + i * args_.stride);
      bits |= static_cast<uint32_t>(wins(args_, scores_, place_, i)) << i;
    }
    return bits;
  }

  __device__ void store(uint32_t bits) const {
    uint8_t* mask = args_.mask + place_.first;
    LAP_UNROLL
    for (int i = 0; i < kMost; ++i) {
      if (i >= of_) continue;
      if (!args_.words) {
        mask[i * args_.stride] = (bits >> i) & 1;
      } else if (i % 4 == 0) {
        *reinterpret_cast<uint32_t*>(mask + i) = bytes_of(bits >> i);
      }
    }
  }

 private:
  // Returns false where floats do not say the order.
  __device__ bool keys(Key (&key)[kMost]) const {
    if constexpr (Scores<T, kWeights>::kNarrow) {
      return scores_.near() && narrow_keys(key);
    } else {
      LAP_UNROLL
      for (int i = 0; i < kMost; ++i) {
        if (i < of_) key[i] = plain_key(i);
      }
      return true;
    }
  }

  __device__ Key plain_key(int i) const {
    const int64_t index = place_.first + i * args_.stride;
    scores_.note(x_[i], index);
    if constexpr (kWeights) {
      const int64_t row = place_.row + (args_.rows ? i : 0);
      return ordered_key(scores_.wide(x_[i], row, place_.channel + (args_.rows ? 0 : i)));
    } else {
      return ordered_key(widen(x_[i]));
    }
  }

  __device__ bool narrow_keys(Key (&key)[kMost]) const {
    const float* row = scores_.row_narrow() + place_.row;
    const float* col = scores_.col_narrow() + place_.channel;
    const float fixed = args_.rows ? *col : *row;
    const float* along = args_.rows ? row : col;
    bool hold = true;
    LAP_UNROLL
    for (int i = 0; i < kMost; i += 4) {
      Four<float> norms = {};
      if (args_.words && i < of_) norms = *reinterpret_cast<const Four<float>*>(along + i);
      LAP_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (!args_.words && i + j < of_) norms.values[j] = along[i + j];
        const float w = widen(x_[i + j]);
        const float factor = product(fixed, norms.values[j]);
        const float s = score(w, fixed, norms.values[j]);
        hold = hold && Scores<T, kWeights>::holds(s, w, factor);
        key[i + j] = score_key(s);
      }
    }
    return hold;
  }

  // The keep best of the eligible ones. Of two members the earlier one is first unless its key is
  // less; what may not be kept is behind all others. A byte counts who is before a member.
  __device__ uint32_t best(Key (&key)[kMost]) const {
    uint32_t before[kMost / 4] = {};
    LAP_UNROLL
    for (int i = 0; i < kMost; ++i) {
      if (!((may_ >> i) & 1)) key[i] = KeyTraits<Key>::kNever;
    }
    LAP_UNROLL
    for (int i = 0; i < kMost; ++i) {
      LAP_UNROLL
      for (int j = i + 1; j < kMost; ++j) {
        const bool first = key[i] >= key[j];
        if (first) {
          before[j / 4] += 1u << (8 * (j % 4));
        } else {
          before[i / 4] += 1u << (8 * (i % 4));
        }
      }
    }
    uint32_t bits = 0;
    LAP_UNROLL
    for (int i = 0; i < kMost; ++i) {
      const uint32_t count = (before[i / 4] >> (8 * (i % 4))) & 0xff;
      bits |= static_cast<uint32_t>(static_cast<int64_t>(count) < args_.keep) << i;
    }
    return bits & may_;
  }

  const PatternArgs& args_;
  const Scores<T, kWeights>& scores_;
  const Place& place_;
  const int of_;
  T x_[kMost];
  uint32_t may_ = 0;
};

// Is member i of a group kept? By wide scores, each computed anew: for what is rare.
template <typename T, bool kWeights>
__device__ bool wins(const PatternArgs& args,
                     const Scores<T, kWeights>& scores,
                     const Place& place,
                     int64_t i) {
  const auto key_of = [&](int64_t j) {
    const int64_t index = place.first + j * args.stride;
    const int64_t row = place.row + (args.rows ? j : 0);
    return ordered_key(scores.wide(scores.load(index), row, place.channel + (args.rows ? 0 : j)));
  };
  const auto may = [&](int64_t j) {
    return args.eligible == nullptr || args.eligible[place.first + j * args.stride] != 0;
  };
  if (!may(i)) return false;
  const int64_t key = key_of(i);
  int64_t before = 0;
  LAP_NO_UNROLL
  for (int64_t j = 0; j < args.of && before < args.keep; ++j) {
    if (j == i || !may(j)) continue;
    const int64_t other = key_of(j);
    before += other > key || (other == key && j < i);
  }
  return before < args.keep;
}

// Thread: one group of at most kMost; 32 of them take more registers. Bytes per element: sizeof(T)
// read, 1 written (eligible: 1 read).
template <typename T, bool kWeights, int kMost>
__global__ void __launch_bounds__(kThreads, kMost == 32 ? 1 : kResident)
    group_kernel(PatternArgs args) {
  const Scores<T, kWeights> scores(args.scored);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.cut.count; i += step) {
    const Place place = args.cut.at(i);
    const Group<T, kWeights, kMost> group(args, scores, place);
    group.store(group.kept());
  }
}

// Longer groups. Thread: one member, which looks at all others; the group stays in the caches.
template <typename T, bool kWeights>
__global__ void __launch_bounds__(kThreads, kResident)
    long_group_kernel(PatternArgs args, Divider by_count) {
  const Scores<T, kWeights> scores(args.scored);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t size = args.cut.count * args.of;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += step) {
    const int64_t member = by_count.quotient(i);
    const Place place = args.cut.at(i - member * args.cut.count);
    const int64_t index = place.first + member * args.stride;
    scores.note(scores.load(index), index);
    args.mask[index] = wins(args, scores, place, member) ? 1 : 0;
  }
}

// --- tiles of 4 by 4 ---------------------------------------------------------------------------

using PairSums = double[kTileSide][kPairs];

struct Found {
  double sum;
  uint32_t marks;  // bit 4 * row + column
};

// One of 6^3 choices of the first three rows' pairs: a pattern if a fourth one completes it.
// kAny: some of the tile may not be kept, so that first of all patterns must keep the most of `may`
// (bits as marks); or some sum may be NaN, which is the largest.
template <bool kAny, int kChoice>
__device__ void consider(const PairSums& sums, uint32_t may, Found* found) {
  constexpr int a = kChoice / (kPairs * kPairs);
  constexpr int b = kChoice / kPairs % kPairs;
  constexpr int c = kChoice % kPairs;
  constexpr int d = fourth_pair(a, b, c);
  if constexpr (d >= 0) {
    constexpr uint32_t marks =
        pair_bits(a) | pair_bits(b) << 4 | pair_bits(c) << 8 | pair_bits(d) << 12;
    const double sum = sums[0][a] + sums[1][b] + sums[2][c] + sums[3][d];
    bool better = sum > found->sum || found->marks == 0;
    if constexpr (kAny) {
      const int more = __popc(marks & may) - __popc(found->marks & may);
      better = better || (sum != sum && found->sum == found->sum);
      better = more > 0 || (more == 0 && better);
    }
    if (better) *found = {sum, marks};
  }
}

template <bool kAny, int... kChoices>
__device__ uint32_t best_pattern(const PairSums& sums,
                                 uint32_t may,
                                 std::integer_sequence<int, kChoices...>) {
  Found found = {0, 0};
  (consider<kAny, kChoices>(sums, may, &found), ...);
  return found.marks;
}

// The tile's values: what is added of each weight. Returns which of them may be kept.
template <typename T, bool kWeights>
__device__ uint32_t load_tile(const PatternArgs& args,
                              const Scores<T, kWeights>& scores,
                              const Place& place,
                              double (&values)[kTileSide][kTileSide]) {
  uint32_t all = 0;
  const int64_t row_size = args.cut.layout.row_size();
  LAP_UNROLL
  for (int r = 0; r < kTileSide; ++r) {
    const int64_t first = place.first + r * row_size;
    Four<T> x = {};
    uint32_t may = 0xf;
    if (args.words) {
      x = *reinterpret_cast<const Four<T>*>(scores.data() + first);
      if (args.eligible != nullptr) {
        may = bits_of(*reinterpret_cast<const uint32_t*>(args.eligible + first));
      }
    } else {
      LAP_UNROLL
      for (int c = 0; c < kTileSide; ++c) {
        const int64_t index = first + c * args.stride;
        x.values[c] = scores.load(index);
        if (args.eligible != nullptr && args.eligible[index] == 0) may &= ~(1u << c);
      }
    }
    LAP_UNROLL
    for (int c = 0; c < kTileSide; ++c) {
      const int64_t index = first + c * args.stride;
      const double s = scores.value(x.values[c], index, place.row + r, place.channel + c);
      const bool counts = ((may >> c) & 1) != 0;
      values[r][c] = !counts ? 0 : args.squared ? product(s, s) : s;
    }
    all |= may << (4 * r);
  }
  return all;
}

// Thread: one tile. Bytes per element: sizeof(T) read, 1 written (eligible: 1 read); some 20
// additions and comparisons of doubles.
template <typename T, bool kWeights>
__global__ void __launch_bounds__(kThreads, kResident) tile_kernel(PatternArgs args) {
  using Choices = std::make_integer_sequence<int, kPairs * kPairs * kPairs>;
  const Scores<T, kWeights> scores(args.scored);
  const int64_t row_size = args.cut.layout.row_size();
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.cut.count; i += step) {
    const Place place = args.cut.at(i);
    double values[kTileSide][kTileSide];
    const uint32_t may = load_tile(args, scores, place, values);
    PairSums sums;
    int64_t largest = 0;
    LAP_UNROLL
    for (int r = 0; r < kTileSide; ++r) {
      const double (&x)[kTileSide] = values[r];
      LAP_UNROLL
      for (int c = 0; c < kTileSide; ++c) {
        const int64_t key = score_key(x[c]);
        largest = key > largest ? key : largest;
      }
      const double added[kPairs] = {x[0] + x[1], x[0] + x[2], x[0] + x[3],
                                    x[1] + x[2], x[1] + x[3], x[2] + x[3]};
      LAP_UNROLL
      for (int p = 0; p < kPairs; ++p) sums[r][p] = added[p];
    }
    constexpr double kFar = 0x1p1000;  // eight of less cannot overflow
    const bool plain = may == 0xffff && largest < score_key(kFar);
    const uint32_t marks = plain ? best_pattern<false>(sums, may, Choices{})
                                 : best_pattern<true>(sums, may, Choices{}) & may;
    LAP_UNROLL
    for (int r = 0; r < kTileSide; ++r) {
      uint8_t* mask = args.mask + place.first + r * row_size;
      const uint32_t bits = (marks >> (4 * r)) & 0xf;
      if (args.words) {
        *reinterpret_cast<uint32_t*>(mask) = bytes_of(bits);
        continue;
      }
      LAP_UNROLL
      for (int c = 0; c < kTileSide; ++c) mask[c * args.stride] = (bits >> c) & 1;
    }
  }
}

// Are groups of four neighbors words of the weights, of both masks?
bool in_words(const Weight& w, const uint8_t* eligible, const uint8_t* mask) {
  return w.layout.window == 1 && aligned_for_four(w.data, item_size(w.dtype)) &&
         aligned_for_four(eligible, 1) && aligned_for_four(mask, 1);
}

template <typename T, bool kWeights>
cudaError_t launch_groups(const PatternArgs& args, cudaStream_t stream) {
  if (args.of > 32) {
    const int64_t size = args.cut.count * args.of;
    return launch_over(size, long_group_kernel<T, kWeights>, stream, args, Divider(args.cut.count));
  }
  const auto kernel = args.of <= 4    ? group_kernel<T, kWeights, 4>
                      : args.of <= 8  ? group_kernel<T, kWeights, 8>
                      : args.of <= 16 ? group_kernel<T, kWeights, 16>
                                      : group_kernel<T, kWeights, 32>;
  return launch_over(args.cut.count, kernel, stream, args);
}

size_t scored_workspace(const Weight& w) {
  Carver carver(nullptr);
  ScoredSpace(&carver, w);
  return carver.used();
}

}  // namespace

size_t nm_mask_workspace(const Weight& w) {
  return scored_workspace(w);
}

cudaError_t launch_nm_mask(const Weight& w,
                           const Norms& norms,
                           const Pattern& pattern,
                           const uint8_t* eligible,
                           bool check_finite,
                           uint8_t* mask,
                           void* workspace,
                           cudaStream_t stream) {
  Carver carver(workspace);
  const ScoredSpace space(&carver, w);
  Scored scored = {};
  const cudaError_t error = prepare_scored(w, norms, check_finite, space, stream, &scored);
  const Layout& layout = w.layout;
  if (error != cudaSuccess || layout.size() == 0) return error;
  const int64_t of = pattern.of;
  const Cut cut = pattern.rows ? Cut(layout, of, 1) : Cut(layout, 1, of);
  const bool words = !pattern.rows && of % 4 == 0 && in_words(w, eligible, mask);
  const int64_t stride = pattern.rows ? layout.row_size() : layout.window;
  const PatternArgs args = {scored,       eligible, mask,         cut,    words,
                            pattern.keep, of,       pattern.rows, stride, false};
  return with_scores(w, norms, [&](auto type, auto weights) {
    return launch_groups<decltype(type), decltype(weights)::value>(args, stream);
  });
}

size_t transposable_mask_workspace(const Weight& w) {
  return scored_workspace(w);
}

cudaError_t launch_transposable_mask(const Weight& w,
                                     const Norms& norms,
                                     bool squared,
                                     const uint8_t* eligible,
                                     bool check_finite,
                                     uint8_t* mask,
                                     void* workspace,
                                     cudaStream_t stream) {
  Carver carver(workspace);
  const ScoredSpace space(&carver, w);
  Scored scored = {};
  const cudaError_t error = prepare_scored(w, norms, check_finite, space, stream, &scored);
  if (error != cudaSuccess || w.layout.size() == 0) return error;
  const Cut cut(w.layout, kTileSide, kTileSide);
  const PatternArgs args = {
      scored, eligible,        mask,   cut, in_words(w, eligible, mask), 2, kTileSide,
      false,  w.layout.window, squared};
  return with_scores(w, norms, [&](auto type, auto weights) {
    const auto kernel = tile_kernel<decltype(type), decltype(weights)::value>;
    return launch_over(args.cut.count, kernel, stream, args);
  });
}

}  // namespace lap::cuda
