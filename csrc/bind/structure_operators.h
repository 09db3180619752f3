// SPDX-License-Identifier: MIT
// The operators of structures (lap_ext/ops/reference/structured.py), for both cores. Only torch has
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

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
    const Structured<Core> weight(core, kOp, w, row_norm, col_norm, groups, mask, check_finite);
    check_keep(kOp, keep);
    const Layout& layout = weight.layout;
    check_divides(of, rows ? layout.group_rows() : layout.cols, rows);
    const Array out = core.template empty<bool>(w, Arrays::sizes(w));
    raise(weight, core.nm_mask(weight, keep, of, rows, check_finite, out));
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
    const Structured<Core> weight(core, kOp, w, row_norm, col_norm, groups, mask, check_finite);
    const int64_t rows = weight.layout.group_rows();
    const int64_t cols = weight.layout.cols;
    if (rows % kTileSide != 0 || cols % kTileSide != 0) {
      fail(kOp, {"rows of a group and columns that 4 divides",
                 std::to_string(rows) + " and " + std::to_string(cols)});
    }
    const Array out = core.template empty<bool>(w, Arrays::sizes(w));
    raise(weight, core.transposable_mask(weight, squared, check_finite, out));
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
    const Structured<Core> weight(core, kOp, w, row_norm, col_norm, groups, mask, check_finite);
    const Blocks blocks = blocks_of(weight.layout, block, first, height);
    check_sums(sums, weight.layout, blocks);
    raise(weight, core.block_sums(weight, blocks, squared, check_finite, sums));
  }

  static Array block_mask(const Array& kept,
                          const std::vector<int64_t>& shape,
                          const std::vector<int64_t>& block,
                          int64_t first,
                          int64_t height,
                          const std::optional<Mask>& mask) {
    const Layout layout = matrix_layout(kOp, shape, 1);
    const Blocks blocks = blocks_of(layout, block, first, height);
    const Core core(kept);
    const Array held = Arrays::contiguous(kept);
    if (!Arrays::template holds<bool>(kept) || !covers(kept, layout, blocks)) {
      fail(kOp, {"kept of bool, an entry for each block", "one of shape " + text(kept)});
    }
    const Array out = core.template empty<bool>(kept, shape);
    const uint8_t* eligible = mask ? Arrays::eligible(kOp, *mask, out) : nullptr;
    core.block_mask(held, layout, blocks, eligible, out);
    return out;
  }

 private:
  static constexpr const char* kOp = "mask";  // what a user calls

  static void raise(const Structured<Core>& weight, const Problems& problems) {
    if (problems.count == 0) return;
    if (!weight.weight) fail_nan(kOp, "scores", problems.count, problems.first);
    fail_not_finite(kOp, "w", problems.count, problems.first);
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
