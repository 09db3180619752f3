// SPDX-License-Identifier: MIT
// csrc/cpu as the operators see it, for any kind of array in host memory.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../cpu/blocks.h"
#include "../cpu/memory.h"
#include "../cpu/nm.h"
#include "../cpu/norms.h"
#include "../cpu/parallel.h"
#include "../cpu/score.h"
#include "../cpu/select.h"
#include "../cpu/transposable.h"
#include "../cpu/zero.h"
#include "../math/strided.h"
#include "check.h"
#include "operators.h"

namespace lap::bind {

template <typename ArraysOf>
class CpuCore {
 public:
  using Arrays = ArraysOf;
  using Array = typename Arrays::Array;
  using Source = cpu::Source;
  using Weight = bind::Weight<CpuCore>;
  using Scores = bind::Scores<CpuCore>;
  using Structured = bind::Structured<CpuCore>;

  explicit CpuCore(const Array&) : pool_(Arrays::pool()) {}

  const cpu::Pool& pool() const { return pool_; }
  cpu::Pool pool(int64_t elements) const { return cpu::pool_for(elements, pool_); }
  cpu::Pool pool(const Strided& x) const { return pool(x.size); }

  template <typename T>
  Array empty(const Array& like, const Sizes& sizes) const {
    Array out = Arrays::template empty<T>(like, sizes);
    cpu::prefer_large_pages(Arrays::mutable_data(out), Arrays::size(out) * sizeof(T));
    return out;
  }

  // The elements of x in C order: in place, or copied to *held where strided() fails.
  Strided view(const char* op, const Array& x, Array* held) const {
    const DType dtype = Arrays::dtype(op, x);
    Strided out;
    if (!strided<Arrays>(x, dtype, &out)) {
      *held = Arrays::contiguous(x);
      strided<Arrays>(*held, dtype, &out);
    }
    return out;
  }

  Source source(const char* op, const Array& scores, Array* held) const {
    Source out;
    out.x = view(op, scores, held);
    return out;
  }

  void check_norms(const char* op, const char* name, const double* norm, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      if (!(norm[i] >= 0 && norm[i] <= 1.7976931348623157e308)) fail_norm(op, name, norm[i], i);
    }
  }

  // The squared norm of each row (column) of scale * w.
  Problems squared_norm(
      Axis axis, const Weight& weight, double scale, bool check, const Array& out) const {
    if (axis == Axis::rows) {
      cpu::row_squared_norms(weight.x, weight.layout.rows, scale, pool(weight.x), doubles(out));
    } else {
      cpu::col_squared_norms(weight.x, weight.layout, scale, pool(weight.x), doubles(out));
    }
    return check ? problems_in(weight.x, out) : Problems{};
  }

  // Both from one reading of w.
  Problems squared_norms(const Weight& weight,
                         bool check,
                         const Array& row,
                         const Array& col) const {
    cpu::squared_norms(weight.x, weight.layout, pool(weight.x), doubles(row), doubles(col));
    return check ? problems_in(weight.x, row) : Problems{};
  }

  std::vector<double> read(const Array& x) const {
    return std::vector<double>(doubles(x), doubles(x) + Arrays::size(x));
  }

  Problems score(const Weight& weight, bool check_finite, const Array& out) const {
    const bool finite = cpu::score(weight.x, weight.layout, weight.norms, check_finite,
                                   pool(weight.x), Arrays::mutable_data(out));
    return finite ? Problems{} : problems_in({source_of(weight)});
  }

  // The threshold is known only after all of w is read, so w is pruned in a pass of its own.
  Problems mask(const Weight& weight,
                const uint8_t* eligible,
                int64_t keep,
                bool check_finite,
                const Array& mask,
                const Array* pruned) const {
    Source source = source_of(weight);
    source.eligible = eligible;
    source.mask = static_cast<uint8_t*>(Arrays::mutable_data(mask));
    const Problems problems = select({source}, keep, check_finite);
    if (problems.any() || pruned == nullptr) return problems;
    zero(weight.op, *pruned, source.mask);
    return problems;
  }

  // w = +0.0 where the mask, in the flat C order, is 0.
  void zero(const char* op, const Array& w, const uint8_t* mask) const {
    Strided target;
    if (!strided<Arrays>(w, Arrays::dtype(op, w), &target)) fail(op, {Arrays::kNotInPlace});
    target.data = Arrays::mutable_data(w);
    cpu::zero(target, mask, pool(target));
  }

  // Marks the k largest in the masks of a list, or writes the k-th to value.
  Problems rank(const Scores& list, int64_t k, bool check_finite, const Array* value) const {
    double threshold = 0;
    const Problems problems = select(list.sources, k, check_finite, &threshold);
    if (value == nullptr) return problems;
    if (list.dtype == DType::f64) {
      *doubles(*value) = threshold;
    } else {
      *static_cast<float*>(Arrays::mutable_data(*value)) = static_cast<float>(threshold);
    }
    return problems;
  }

  // Marks the `keep` largest in the masks of the sources.
  Problems select(const std::vector<Source>& sources,
                  int64_t keep,
                  bool check_finite,
                  double* threshold = nullptr) const {
    int64_t size = 0;
    for (const Source& source : sources) size += source.x.size;
    const cpu::Pool pool = cpu::pool_for(size, pool_);
    const cpu::Selection selection = cpu::select(sources, keep, check_finite, pool);
    if (threshold != nullptr) *threshold = selection.threshold;
    Problems problems;
    if (selection.outcome == cpu::Outcome::not_finite) problems = problems_in(sources);
    problems.range = selection.outcome == cpu::Outcome::range;
    return problems;
  }

  // --- structures -----------------------------------------------------------------------------

  Problems nm_mask(const Structured& weight,
                   int64_t keep,
                   int64_t of,
                   bool rows,
                   bool check,
                   const Array& mask) const {
    const Source source = source_of(weight, &mask);
    const bool finite = cpu::nm_mask(source, keep, of, rows, pool(source.x));
    return check && !finite ? problems_in({source}) : Problems{};
  }

  Problems transposable_mask(const Structured& weight,
                             bool squared,
                             bool check,
                             const Array& mask) const {
    const Source source = source_of(weight, &mask);
    const bool finite = cpu::transposable_mask(source, squared, pool(source.x));
    return check && !finite ? problems_in({source}) : Problems{};
  }

  Problems block_sums(const Structured& weight,
                      const Blocks& blocks,
                      bool squared,
                      bool check,
                      const Array& sums) const {
    const Source source = source_of(weight, nullptr);
    const bool finite = cpu::block_sums(source, blocks, squared, pool(source.x), doubles(sums));
    return check && !finite ? problems_in({source}) : Problems{};
  }

  void block_mask(const Array& kept,
                  const Layout& layout,
                  const Blocks& blocks,
                  const uint8_t* eligible,
                  const Array& mask) const {
    cpu::block_mask(static_cast<const uint8_t*>(Arrays::data(kept)), layout, blocks, eligible,
                    pool(layout.size()), static_cast<uint8_t*>(Arrays::mutable_data(mask)));
  }

  static Source source_of(const Weight& weight) { return {weight.x, weight.layout, weight.norms}; }

  static Problems problems_in(const std::vector<Source>& sources) {
    for (size_t t = 0; t < sources.size(); ++t) {
      const cpu::NotFinite bad = cpu::find_not_finite(sources[t].x, sources[t].is_scores());
      if (bad.count > 0) return {bad.count, bad.first, static_cast<int64_t>(t), false};
    }
    return {};
  }

 private:
  static Source source_of(const Structured& weight, const Array* mask) {
    Source source = {weight.x, weight.layout, weight.norms, weight.eligible};
    if (mask != nullptr) source.mask = static_cast<uint8_t*>(Arrays::mutable_data(*mask));
    return source;
  }

  static double* doubles(const Array& x) { return static_cast<double*>(Arrays::mutable_data(x)); }

  // x is read again only where its squared norm is not finite.
  static Problems problems_in(const Strided& x, const Array& squared_norm) {
    const auto is_finite = [](double e) { return e - e == 0; };
    if (std::all_of(doubles(squared_norm), doubles(squared_norm) + Arrays::size(squared_norm),
                    is_finite))
      return {};
    const cpu::NotFinite bad = cpu::find_not_finite(x, false);
    return {bad.count, bad.first, 0, false};
  }

  cpu::Pool pool_;
};

}  // namespace lap::bind
