// SPDX-License-Identifier: MIT
// Weights as structures score them (lap_ext/ops/reference/structured.py): a score is a double that
// holds the rounded products of math/score.h's wide form. Where the norms are near 1 and the float
// form stays within its normal range, it has the same bits and is what is computed. A weight may
// hold scores itself; then there are no norms.
#pragma once

#include <type_traits>

#include "../math/scale.h"
#include "device.cuh"

namespace lap::cuda {

// What a kernel reads. Members are null where there is no need of them.
struct Scored {
  const void* w;
  Norms norms;
  float* row_narrow;  // the norms as floats, of weights that are no doubles
  float* col_narrow;
  const uint32_t* far;  // not 0: some norm is neither zero nor near, only doubles are right
  Status* status;       // null: no check
};

// What the launchers of structures have at the head of their workspace.
struct ScoredSpace {
  Status* status;
  uint32_t* far;
  float* row_narrow;
  float* col_narrow;

  ScoredSpace(Carver* carver, const Weight& w) {
    status = carver->take<Status>(1);
    far = carver->take<uint32_t>(1);
    row_narrow = carver->take<float>(w.layout.rows);
    col_narrow = carver->take<float>(w.layout.channels());
  }
};

// Enqueues what comes before any kernel that reads *out.
cudaError_t prepare_scored(const Weight& w,
                           const Norms& norms,
                           bool check_finite,
                           const ScoredSpace& space,
                           cudaStream_t stream,
                           Scored* out);

// One score by the wide form, for any norms; the plain product for doubles.
template <typename T>
__device__ double wide_value(T w, double row_norm, double col_norm) {
  if constexpr (sizeof(T) == 8) {
    return score(w, row_norm, col_norm);
  } else {
    return wide_score(static_cast<double>(widen(w)), round24(row_norm), round24(col_norm));
  }
}

// The scores of weights of T, or (kWeights false) scores of T as they are.
template <typename T, bool kWeights>
class Scores {
 public:
  using Float = decltype(widen(T{}));
  // Are floats worth a try?
  static constexpr bool kNarrow = kWeights && sizeof(T) < 8;

  __device__ explicit Scores(const Scored& scored)
      : scored_(scored), near_(kNarrow && *scored.far == 0) {}

  __device__ T load(int64_t index) const { return static_cast<const T*>(scored_.w)[index]; }
  __device__ const T* data() const { return static_cast<const T*>(scored_.w); }
  __device__ bool near() const { return near_; }
  __device__ const float* row_narrow() const { return scored_.row_narrow; }
  __device__ const float* col_narrow() const { return scored_.col_narrow; }

  // Is this float score of w by a product of norms the wide one?
  __device__ static bool holds(float score, float w, float norms) {
    const bool normal = score > static_cast<float>(kSmallestNormal<float>) && is_finite(score);
    return normal || (score == 0 && (w == 0 || norms == 0));
  }

  // The score in double of the weight x at `index`.
  __device__ double value(T x, int64_t index, int64_t row, int64_t channel) const {
    if constexpr (!kWeights) {
      note(x, index);
      return static_cast<double>(widen(x));
    }
    if constexpr (kNarrow) {
      if (near_) {
        const float norms = product(scored_.row_narrow[row], scored_.col_narrow[channel]);
        const float score = product(magnitude(widen(x)), norms);
        if (holds(score, widen(x), norms)) return static_cast<double>(score);
      }
    }
    note(x, index);
    return wide(x, row, channel);
  }

  // The same by the wide form; not noted.
  __device__ double wide(T x, int64_t row, int64_t channel) const {
    if constexpr (kWeights) {
      return wide_value(x, scored_.norms.row[row], scored_.norms.col[channel]);
    } else {
      return static_cast<double>(widen(x));
    }
  }

  // Notes x if it is bad: not finite, or a score that is NaN.
  __device__ void note(T x, int64_t index) const {
    const Float wide = widen(x);
    const bool bad = kWeights ? !is_finite(wide) : wide != wide;
    if (!bad || scored_.status == nullptr) return;
    note_bad(&scored_.status->bad_count, &scored_.status->first_inverted, 1, index);
  }

 private:
  const Scored& scored_;
  bool near_;
};

// Calls run(T{}, weights) with the element type, and a std::bool_constant: are there norms?
template <typename Run>
cudaError_t with_scores(const Weight& w, const Norms& norms, const Run& run) {
  return with_type(w.dtype, [&](auto type) {
    return norms.given() ? run(type, std::true_type{}) : run(type, std::false_type{});
  });
}

// Four neighbors, moved as one word where they are aligned.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

inline bool aligned_for_four(const void* data, int64_t item) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uint64_t>(4 * item) == 0;
}

}  // namespace lap::cuda
