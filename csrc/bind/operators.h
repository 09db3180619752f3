// SPDX-License-Identifier: MIT
// The operators, written once for every kind of array and both cores: they check the arguments,
// allocate the results and raise what the core found wrong. A binding is Operators<Core>:
//
//   _C       CpuCore<TorchCpuArrays>    torch_cpu.cpp, cpu_core.h
//   _np      CpuCore<NumpyArrays>       numpy.cpp, cpu_core.h
//   _C_cuda  CudaCore                   torch_cuda.cpp
//
// A Core is made for one call, for the array that it works on. It holds the threads, or the device
// and its stream, and has the methods that are called on `core` below. Core::Arrays says how arrays
// are read; torch_arrays.h describes its members.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../math/layout.h"
#include "../math/strided.h"
#include "../math/sums.h"
#include "check.h"

namespace lap::bind {

using Sizes = std::vector<int64_t>;

enum class Axis { rows, cols };  // of a weight, whose squares are summed

// What a core found wrong in its input; nothing by default.
struct Problems {
  int64_t count = 0;   // values that are not finite (scores: NaN) in the first bad array
  int64_t first = -1;  // flat index of the first of them
  int64_t source = 0;  // number of that array in its list
  bool range = false;  // products leave float64's range where it matters

  bool any() const { return count != 0 || range; }
};

// Where the elements of x lie in memory. Returns false when it has too many strides, or one that is
// no multiple of the element size.
template <typename Arrays>
bool strided(const typename Arrays::Array& x, DType dtype, Strided* out) {
  const Sizes sizes = Arrays::sizes(x);
  Sizes strides;
  return Arrays::strides(x, &strides) &&
         make_strided(Arrays::data(x), dtype, static_cast<int>(sizes.size()), sizes.data(),
                      strides.data(), out);
}

// One weight as a core reads it, with the norms of its channels if they are given. The pointers in
// x and norms are into the arrays held here: those of the caller, or copies that the core can read.
template <typename Core>
struct Weight {
  using Arrays = typename Core::Arrays;
  using Array = typename Arrays::Array;
  using Norm = typename Arrays::Norm;

  const char* op;
  std::optional<Norm> in_norm, out_norm;
  Array w;
  Strided x;
  Layout layout;
  Norms norms;
  bool transposed = false;

  Weight(const Core& core, const char* op, const Array& weight, const Layout& layout)
      : op(op), w(weight), x(core.view(op, weight, &w)), layout(layout) {}

  Weight(const Core& core,
         const char* op,
         const Array& weight,  // [O, I / groups, *K]
         const Norm& in,       // [I]
         const Norm& out,      // [O]
         int64_t groups,
         bool transposed,
         bool check_finite)
      : op(op),
        in_norm(Arrays::norm(op, in)),
        out_norm(Arrays::norm(op, out)),
        w(weight),
        x(core.view(op, weight, &w)),
        transposed(transposed) {
    const int64_t in_count = Arrays::size(in);
    const int64_t out_count = Arrays::size(out);
    layout = layout_of(op, Arrays::sizes(weight), in_count, out_count, groups, transposed);
    const double* in_data = static_cast<const double*>(Arrays::data(*in_norm));
    const double* out_data = static_cast<const double*>(Arrays::data(*out_norm));
    if (check_finite) {
      core.check_norms(op, "in_norm", in_data, in_count);
      core.check_norms(op, "out_norm", out_data, out_count);
    }
    norms.row = transposed ? in_data : out_data;
    norms.col = transposed ? out_data : in_data;
  }
};

// w [rows, cols, *window] whose columns are those of one of `groups`.
inline Layout matrix_layout(const char* op, const Sizes& sizes, int64_t groups) {
  const bool is_matrix = sizes.size() >= 2;
  return layout_of(op, sizes, is_matrix ? sizes[1] * groups : 0, is_matrix ? sizes[0] : 0, groups,
                   false);
}

// One weight whose structures are ranked, with norms of its rows and columns, or ready scores: an
// empty row_norm says so.
template <typename Core>
struct Structured {
  using Arrays = typename Core::Arrays;
  using Array = typename Arrays::Array;
  using Norm = typename Arrays::Norm;
  using Mask = typename Arrays::Mask;

  std::optional<Weight<Core>> weight;  // not of scores
  Array held;                          // keeps alive what x points to
  Strided x;
  Layout layout;
  Norms norms;
  const uint8_t* eligible = nullptr;  // [size] or null: all

  Structured(const Core& core,
             const char* op,
             const Array& w,
             const Norm& row_norm,
             const Norm& col_norm,
             int64_t groups,
             const std::optional<Mask>& mask,
             bool check_finite)
      : held(w), layout(matrix_layout(op, Arrays::sizes(w), groups)) {
    if (Arrays::size(row_norm) == 0 && layout.rows != 0) {
      x = core.view(op, w, &held);
    } else {
      weight.emplace(core, op, w, col_norm, row_norm, groups, false, check_finite);
      x = weight->x;
      norms = weight->norms;
    }
    if (mask) eligible = Arrays::eligible(op, *mask, w);
  }
};

// A list of arrays of scores, ranked together.
template <typename Core>
struct Scores {
  using Arrays = typename Core::Arrays;

  std::vector<typename Arrays::Array> held;  // what the sources point into
  std::vector<typename Core::Source> sources;
  DType dtype;
  int64_t size = 0;

  Scores(const Core& core, const char* op, const std::vector<typename Arrays::Array>& scores)
      : held(scores), dtype(Arrays::dtype(op, scores[0])) {
    for (size_t t = 0; t < scores.size(); ++t) {
      if (!Arrays::same_dtype(scores[t], scores[0])) {
        Arrays::fail_dtype(op, {"scores of one dtype"});
      }
      sources.push_back(core.source(op, scores[t], &held[t]));
      size += Arrays::size(scores[t]);
    }
  }
};

template <typename Core>
struct Operators {
  using Arrays = typename Core::Arrays;
  using Array = typename Arrays::Array;
  using Norm = typename Arrays::Norm;
  using Mask = typename Arrays::Mask;

  // --- squared norms --------------------------------------------------------------------------

  static Array row_squared_norms(const Array& w, bool check_finite, const std::string& name) {
    const Sizes sizes = Arrays::sizes(w);
    if (sizes.empty()) fail("neighbor_norms", {"at least 1 dimension"});
    const int64_t rows = sizes[0];
    const int64_t row_size = rows == 0 ? 0 : Arrays::size(w) / rows;
    return squared_norm(Axis::rows, w, {rows, row_size, 1, 1}, check_finite, name);
  }

  static Array col_squared_norms(const Array& w,
                                 int64_t groups,
                                 bool check_finite,
                                 const std::string& name) {
    return squared_norm(Axis::cols, w, squared_norm_layout(w, groups), check_finite, name);
  }

  // Both of the above, with the same bits.
  static std::tuple<Array, Array> squared_norms(const Array& w,
                                                int64_t groups,
                                                bool check_finite,
                                                const std::string& name) {
    const Core core(w);
    const Weight<Core> weight(core, "neighbor_norms", w, squared_norm_layout(w, groups));
    Array row = core.template empty<double>(w, {weight.layout.rows});
    Array col = core.template empty<double>(w, {weight.layout.channels()});
    raise_weight("neighbor_norms", name, core.squared_norms(weight, check_finite, row, col));
    if (check_finite) {
      check_range(core, Axis::rows, weight, row, name);
      check_range(core, Axis::cols, weight, col, name);
    }
    return {row, col};
  }

  // --- one weight -----------------------------------------------------------------------------

  static Array score(const Array& w,
                     const Norm& in_norm,
                     const Norm& out_norm,
                     int64_t groups,
                     bool transposed,
                     bool check_finite) {
    const Core core(w);
    const Weight<Core> weight(core, "score", w, in_norm, out_norm, groups, transposed,
                              check_finite);
    return scores_of(core, weight, "w", check_finite);
  }

  // prune_ is mask, and sets w to zero where the mask is.
  template <bool kPrune>
  static Array mask(const Array& w,
                    const Norm& in_norm,
                    const Norm& out_norm,
                    int64_t keep,
                    const std::optional<Mask>& mask,
                    int64_t groups,
                    bool transposed,
                    bool check_finite) {
    constexpr const char* op = kPrune ? "prune_" : "mask";
    const Core core(w);
    const Weight<Core> weight(core, op, w, in_norm, out_norm, groups, transposed, check_finite);
    check_keep(op, keep);
    const uint8_t* eligible = mask ? Arrays::eligible(op, *mask, w) : nullptr;
    Array out = core.template empty<bool>(w, Arrays::sizes(w));
    const Array* pruned = kPrune ? &w : nullptr;
    raise_weight(op, "w", core.mask(weight, eligible, keep, check_finite, out, pruned));
    return out;
  }

  // --- lists of scores ------------------------------------------------------------------------

  static std::vector<Array> topk_mask(const std::vector<Array>& scores,
                                      int64_t keep,
                                      const std::vector<Mask>& masks,
                                      bool check_finite) {
    constexpr const char* op = "topk_mask";
    check_keep(op, keep);
    if (!masks.empty() && masks.size() != scores.size()) {
      fail(op, {std::string("one mask per ") + Arrays::kNoun + " of scores, or none"});
    }
    if (scores.empty()) return {};
    const Core core(scores[0]);
    Scores<Core> list(core, op, scores);
    std::vector<Array> out;
    for (size_t t = 0; t < scores.size(); ++t) {
      out.push_back(core.template empty<bool>(scores[t], Arrays::sizes(scores[t])));
      list.sources[t].mask = static_cast<uint8_t*>(Arrays::mutable_data(out[t]));
      if (!masks.empty()) list.sources[t].eligible = Arrays::eligible(op, masks[t], scores[t]);
    }
    raise_scores(op, list, core.rank(list, keep, check_finite, nullptr));
    return out;
  }

  static Array kth_largest(const std::vector<Array>& scores, int64_t k, bool check_finite) {
    constexpr const char* op = "kth_largest";
    if (scores.empty()) check_rank(op, k, 0);  // raises: there is no scores[0]
    const Core core(scores[0]);
    const Scores<Core> list(core, op, scores);
    check_rank(op, k, list.size);
    Array value = empty_scores(core, scores[0], {}, list.dtype);
    raise_scores(op, list, core.rank(list, k, check_finite, &value));
    return value;
  }

  // --- steps of the above ---------------------------------------------------------------------

  // The scores of a weight that an error calls `name`.
  static Array scores_of(const Core& core,
                         const Weight<Core>& weight,
                         const std::string& name,
                         bool check_finite) {
    Array out = empty_scores(core, weight.w, Arrays::sizes(weight.w), weight.x.dtype);
    raise_weight(weight.op, name, core.score(weight, check_finite, out));
    return out;
  }

  static void raise_weight(const char* op, const std::string& name, const Problems& problems) {
    if (problems.count != 0) fail_not_finite(op, name, problems.count, problems.first);
    if (problems.range) fail_range(op);
  }

 private:
  // Scores are float, those of float64 weights double.
  static Array empty_scores(const Core& core, const Array& like, const Sizes& sizes, DType dtype) {
    return dtype == DType::f64 ? core.template empty<double>(like, sizes)
                               : core.template empty<float>(like, sizes);
  }

  static void raise_scores(const char* op, const Scores<Core>& list, const Problems& problems) {
    if (problems.count == 0) return;
    const bool alone = list.sources.size() == 1;
    const std::string name = alone ? "scores" : "scores[" + std::to_string(problems.source) + "]";
    fail_nan(op, name, problems.count, problems.first);
  }

  static Layout squared_norm_layout(const Array& w, int64_t groups) {
    const Sizes sizes = Arrays::sizes(w);
    if (sizes.size() < 2) fail("neighbor_norms", {"at least 2 dimensions"});
    return layout_of("neighbor_norms", sizes, sizes[1] * groups, sizes[0], groups, false);
  }

  static Array squared_norm(
      Axis axis, const Array& w, const Layout& layout, bool check_finite, const std::string& name) {
    const Core core(w);
    const Weight<Core> weight(core, "neighbor_norms", w, layout);
    const int64_t channels = axis == Axis::rows ? layout.rows : layout.channels();
    Array out = core.template empty<double>(w, {channels});
    raise_weight("neighbor_norms", name, core.squared_norm(axis, weight, 1.0, check_finite, out));
    if (check_finite) check_range(core, axis, weight, out, name);
    return out;
  }

  // Squares of doubles can overflow or vanish (math/sums.h): a channel of nonzero weights with
  // (nearly) no squared norm would pass for a dead one, so such channels are computed again
  // enlarged.
  static void check_range(const Core& core,
                          Axis axis,
                          const Weight<Core>& weight,
                          const Array& squared_norm,
                          const std::string& name) {
    if (weight.x.dtype != DType::f64) return;
    const auto is_finite = [](double e) { return e - e == 0; };
    const auto is_small = [](double e) { return e < kVanishing; };
    const std::vector<double> plain = core.read(squared_norm);
    if (!std::all_of(plain.begin(), plain.end(), is_finite))
      fail_squared_norm("neighbor_norms", name);
    if (std::none_of(plain.begin(), plain.end(), is_small)) return;
    const Array again = core.template empty<double>(squared_norm, Arrays::sizes(squared_norm));
    core.squared_norm(axis, weight, kEnlarge, false, again);
    const std::vector<double> enlarged = core.read(again);
    for (size_t c = 0; c < plain.size(); ++c) {
      if (is_small(plain[c]) && enlarged[c] > 0) fail_squared_norm("neighbor_norms", name);
    }
  }
};

}  // namespace lap::bind
