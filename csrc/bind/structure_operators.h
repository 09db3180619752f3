// SPDX-License-Identifier: MIT
// The operators of structures (lap_ext/ops/reference/structured.py). Only torch has them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/blocks.h"
#include "../cpu/nm.h"
#include "../cpu/transposable.h"
#include "../math/structures.h"
#include "check.h"
#include "operators.h"

namespace lap::bind {

template <typename Core>
struct StructureOperators {
  using Arrays = typename Core::Arrays;
  using Array = typename Arrays::Array;
  using Norm = typename Arrays::Norm;
  using Mask = typename Arrays::Mask;

  static Array nm_mask(const Array& w,
                       const Norm& row_norm,
                       const Norm& col_norm,
                       int64_t groups,
                       int64_t keep,
                       int64_t of,
                       bool rows,
                       const std::optional<Mask>& mask,
                       bool check_finite) {
    const Core core(w);
    Ranked ranked(core, w, row_norm, col_norm, groups, mask, check_finite);
    check_keep(kOp, keep);
    const Layout& layout = ranked.source.layout;
    check_divides(of, rows ? layout.group_rows() : layout.cols, rows);
    const Array out = ranked.mask(core, w);
    const bool finite = cpu::nm_mask(ranked.source, keep, of, rows, core.pool(ranked.source.x));
    ranked.raise(core, check_finite && !finite);
    return out;
  }

  static Array transposable_mask(const Array& w,
                                 const Norm& row_norm,
                                 const Norm& col_norm,
                                 int64_t groups,
                                 bool squared,
                                 const std::optional<Mask>& mask,
                                 bool check_finite) {
    const Core core(w);
    Ranked ranked(core, w, row_norm, col_norm, groups, mask, check_finite);
    const int64_t rows = ranked.source.layout.group_rows();
    const int64_t cols = ranked.source.layout.cols;
    if (rows % kTileSide != 0 || cols % kTileSide != 0) {
      fail(kOp, {"rows of a group and columns that 4 divides",
                 std::to_string(rows) + " and " + std::to_string(cols)});
    }
    const Array out = ranked.mask(core, w);
    const bool finite = cpu::transposable_mask(ranked.source, squared, core.pool(ranked.source.x));
    ranked.raise(core, check_finite && !finite);
    return out;
  }

  static void block_sums_(const Array& sums,
                          const Array& w,
                          const Norm& row_norm,
                          const Norm& col_norm,
                          int64_t groups,
                          const std::vector<int64_t>& block,
                          int64_t first,
                          int64_t height,
                          bool squared,
                          const std::optional<Mask>& mask,
                          bool check_finite) {
    const Core core(w);
    Ranked ranked(core, w, row_norm, col_norm, groups, mask, check_finite);
    const Layout& layout = ranked.source.layout;
    const Blocks blocks = blocks_of(layout, block, first, height);
    check_sums(sums, layout, blocks);
    const bool finite = cpu::block_sums(ranked.source, blocks, squared, core.pool(ranked.source.x),
                                        static_cast<double*>(Arrays::mutable_data(sums)));
    ranked.raise(core, check_finite && !finite);
  }

  static Array block_mask(const Array& kept,
                          const std::vector<int64_t>& shape,
                          const std::vector<int64_t>& block,
                          int64_t first,
                          int64_t height,
                          const std::optional<Mask>& mask) {
    const Layout layout = layout_of_shape(shape, 1);
    const Blocks blocks = blocks_of(layout, block, first, height);
    const Core core(kept);
    const Array held = Arrays::contiguous(kept);
    if (!Arrays::template holds<bool>(kept) || !covers(kept, layout, blocks)) {
      fail(kOp, {"kept of bool, an entry for each block", "one of shape " + text(kept)});
    }
    const Array out = core.template empty<bool>(kept, shape);
    const uint8_t* eligible = mask ? Arrays::eligible(kOp, *mask, out) : nullptr;
    cpu::block_mask(static_cast<const uint8_t*>(Arrays::data(held)), layout, blocks, eligible,
                    core.pool(layout.size()), static_cast<uint8_t*>(Arrays::mutable_data(out)));
    return out;
  }

 private:
  static constexpr const char* kOp = "mask";  // what a user calls

  // A weight with its norms, or ready scores, where row_norm is empty.
  struct Ranked {
    Array held;  // keeps alive what source points to
    std::optional<Weight<Core>> weight;
    cpu::Source source;

    Ranked(const Core& core,
           const Array& w,
           const Norm& row_norm,
           const Norm& col_norm,
           int64_t groups,
           const std::optional<Mask>& mask,
           bool check_finite)
        : held(w) {
      const Layout layout = layout_of_shape(Arrays::sizes(w), groups);
      if (Arrays::size(row_norm) == 0 && layout.rows != 0) {
        source = core.source(kOp, w, &held);
        source.layout = layout;
      } else {
        weight.emplace(core, kOp, w, col_norm, row_norm, groups, false, check_finite);
        source = Core::source_of(*weight);
      }
      if (mask) source.eligible = Arrays::eligible(kOp, *mask, w);
    }

    // The mask to write.
    Array mask(const Core& core, const Array& like) {
      const Array out = core.template empty<bool>(like, Arrays::sizes(like));
      source.mask = static_cast<uint8_t*>(Arrays::mutable_data(out));
      return out;
    }

    void raise(const Core& core, bool not_finite) const {
      if (!not_finite) return;
      const Problems problems = core.problems_in({source});
      if (problems.count == 0) return;
      if (source.is_scores()) fail_nan(kOp, "scores", problems.count, problems.first);
      fail_not_finite(kOp, "w", problems.count, problems.first);
    }
  };

  static Layout layout_of_shape(const Sizes& sizes, int64_t groups) {
    const bool is_matrix = sizes.size() >= 2;
    return layout_of(kOp, sizes, is_matrix ? sizes[1] * groups : 0, is_matrix ? sizes[0] : 0,
                     groups, false);
  }

  static void check_divides(int64_t of, int64_t size, bool rows) {
    if (of >= 1 && size % of == 0) return;
    const std::string what = rows ? "the rows of a group, " : "the columns, ";
    fail(kOp, {"of >= 1 that divides " + what + std::to_string(size), std::to_string(of)});
  }

  static Blocks blocks_of(const Layout& layout,
                          const std::vector<int64_t>& block,
                          int64_t first,
                          int64_t height) {
    if (block.size() != 2 || block[0] < 1 || block[1] < 1) {
      fail(kOp, {"block of two sizes >= 1", text(block)});
    }
    constexpr int64_t kMost = int64_t{1} << 62;
    if (first < 0 || height < 1 || first > kMost) {
      fail(kOp, {"first >= 0 and height >= 1",
                 std::to_string(first) + " and " + std::to_string(height)});
    }
    return {std::min(block[0], height), std::max<int64_t>(1, std::min(block[1], layout.cols)),
            height, first};
  }

  // Whether x [rows of blocks, columns of blocks] has an entry for each block of the weight.
  static bool covers(const Array& x, const Layout& layout, const Blocks& blocks) {
    const Sizes sizes = Arrays::sizes(x);
    if (sizes.size() != 2 || sizes[1] != blocks.across(layout.cols)) return false;
    return layout.rows == 0 || blocks.unit_of(layout.rows - 1) < sizes[0];
  }

  static void check_sums(const Array& sums, const Layout& layout, const Blocks& blocks) {
    if (Arrays::template holds<double>(sums) && Arrays::is_contiguous(sums) &&
        covers(sums, layout, blocks))
      return;
    fail(kOp,
         {"contiguous sums of float64, an entry for each block", "ones of shape " + text(sums)});
  }

  static std::string text(const Array& x) { return text(Arrays::sizes(x)); }
  static std::string text(const Sizes& sizes) {
    std::string out = "[";
    for (size_t d = 0; d < sizes.size(); ++d) {
      out += (d == 0 ? "" : ", ") + std::to_string(sizes[d]);
    }
    return out + "]";
  }
};

}  // namespace lap::bind
