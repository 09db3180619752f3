// SPDX-License-Identifier: MIT
// Every CUDA launcher of lap_ext on one page. No torch: device pointers, sizes, a stream, and a
// workspace whose bytes the *_workspace function above each launcher tells.
//
// A launcher only enqueues: it allocates nothing, never waits for the device and never reads from
// it, so that a CUDA graph can capture it. Decisions that depend on data are made on the device.
// What the host must know afterwards is the Status at the head of the workspace.
// Tensors are contiguous; only zero takes strides. Sizes are int64 everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(LAP_EMULATED)
#include "cuda_emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "../math/layout.h"
#include "../math/strided.h"
#include "../math/structures.h"

namespace lap::cuda {

// What a run found. All zeros: nothing wrong. Inverted counters, so that zeroed memory means "none"
// and atomicMax finds the first.
struct Status {
  unsigned long long bad_count;       // non-finite weights (NaN scores) in the first bad tensor
  unsigned long long first_inverted;  // ~(flat index of the first of them)
  uint32_t source_inverted;           // ~(number of that tensor in its list)
  uint32_t out_of_range;              // products leave the range of double where it matters
  // Norms that are not finite or below zero: ~(index of the first in Norms::row, in Norms::col).
  unsigned long long norm_inverted[2];

  bool bad_norm(int which) const { return norm_inverted[which] != 0; }
  int64_t first_norm(int which) const { return static_cast<int64_t>(~norm_inverted[which]); }
  int64_t first() const { return static_cast<int64_t>(~first_inverted); }
  int source() const { return static_cast<int>(~source_inverted); }
};

struct Weight {
  const void* data;  // [rows, cols, window]
  DType dtype;
  Layout layout;
};

// One tensor to rank.
struct Source {
  const void* data;         // [size]
  int64_t size;             //
  const uint8_t* eligible;  // [size] or null: all may be kept
  uint8_t* mask;            // [size] out, or null: only the threshold is wanted
};

// squared_norm[r] = sum over row r of (x * scale)^2, in the order of math/sums.h.
size_t row_squared_norm_workspace(const Weight& x);
cudaError_t launch_row_squared_norms(const Weight& x,
                                     double scale,
                                     bool check_finite,
                                     double* squared_norm,  // [rows] out
                                     void* workspace,
                                     cudaStream_t stream);

// squared_norm[g * cols + c] = sum over rows r of group g and window k of (x[r, c, k] * scale)^2.
size_t col_squared_norm_workspace(const Weight& x);
cudaError_t launch_col_squared_norms(const Weight& x,
                                     double scale,
                                     bool check_finite,
                                     double* squared_norm,  // [groups * cols] out
                                     void* workspace,
                                     cudaStream_t stream);

// out[r, c, k] = |w[r, c, k]| * (row[r] * col[group_of(r) * cols + c])
size_t score_workspace(const Weight& w);
cudaError_t launch_score(const Weight& w,
                         const Norms& norms,
                         bool check_finite,
                         void* out,  // [rows, cols, window] out, float (double for f64)
                         void* workspace,
                         cudaStream_t stream);

// mask = 1 for exactly min(keep, eligible) weights of the largest scores; ties: lower index first.
size_t mask_workspace(const Weight& w);
cudaError_t launch_mask(const Weight& w,
                        const Norms& norms,
                        const uint8_t* eligible,  // [rows, cols, window] or null
                        int64_t keep,
                        bool check_finite,
                        uint8_t* mask,  // [rows, cols, window] out
                        void* workspace,
                        cudaStream_t stream);

// w = +0.0 where mask is 0: the second half of prune_. w.data must be writable. mask_workspace is
// launch_mask's: with check_finite set nothing is written if that run found anything wrong.
cudaError_t launch_zero(const Strided& w,
                        const uint8_t* mask,
                        bool check_finite,
                        const void* mask_workspace,
                        cudaStream_t stream);

// One ranking over a list of score tensors of one dtype: each one's mask is written.
size_t topk_mask_workspace(const Source* scores, int count, DType dtype);
cudaError_t launch_topk_mask(const Source* scores,  // [count], host memory, read before returning
                             int count,
                             DType dtype,
                             int64_t keep,
                             bool check_finite,
                             void* workspace,
                             cudaStream_t stream);

// value = the k-th largest, 1 <= k <= all elements; same workspace as topk_mask.
cudaError_t launch_kth_largest(const Source* scores,  // [count], host memory
                               int count,
                               DType dtype,
                               int64_t k,
                               bool check_finite,
                               void* value,  // [1] out, float (double for f64)
                               void* workspace,
                               cudaStream_t stream);

// --- structures: norms that are not given say that w holds scores
// ---------------------------------

// `keep` of every `of` consecutive columns of a row at one position of the window; of rows of a
// column, if `rows` is set. `of` divides the columns, or the rows of a group.
struct Pattern {
  int64_t keep;
  int64_t of;
  bool rows;
};

// mask = 1 for the best `keep` of each group of `of`, as far as they are eligible; ties: lower
// index first.
size_t nm_mask_workspace(const Weight& w);
cudaError_t launch_nm_mask(const Weight& w,
                           const Norms& norms,
                           const Pattern& pattern,
                           const uint8_t* eligible,  // [rows, cols, window] or null
                           bool check_finite,
                           uint8_t* mask,  // [rows, cols, window] out
                           void* workspace,
                           cudaStream_t stream);

// mask = 1 for two of four along rows and columns of each tile: of the patterns that keep the most
// of what is eligible, the one whose sum of scores, or of their squares, is the largest; ties: the
// pattern that comes first (math/structures.h). What is not eligible counts 0. 4 divides the
// columns and the rows of a group.
size_t transposable_mask_workspace(const Weight& w);
cudaError_t launch_transposable_mask(const Weight& w,
                                     const Norms& norms,
                                     bool squared,
                                     const uint8_t* eligible,  // [rows, cols, window] or null
                                     bool check_finite,
                                     uint8_t* mask,  // [rows, cols, window] out
                                     void* workspace,
                                     cudaStream_t stream);

// sums[unit of the row, unit of the column] += scores of w, or their squares, in the order of
// math/sums.h within a row of a block, then row by row. With check_finite set nothing is written if
// anything was found wrong.
size_t block_sums_workspace(const Weight& w, const Blocks& blocks);
cudaError_t launch_block_sums(const Weight& w,
                              const Norms& norms,
                              const Blocks& blocks,
                              bool squared,
                              const uint8_t* eligible,  // [rows, cols, window] or null
                              bool check_finite,
                              double* sums,  // [all rows of blocks, blocks.across(cols)] in, out
                              void* workspace,
                              cudaStream_t stream);

// mask = 1 for what is eligible in blocks that are kept.
cudaError_t launch_block_mask(const uint8_t* kept,  // [all rows of blocks, blocks.across(cols)]
                              const Layout& layout,
                              const Blocks& blocks,
                              const uint8_t* eligible,  // [rows, cols, window] or null
                              uint8_t* mask,            // [rows, cols, window] out
                              cudaStream_t stream);

}  // namespace lap::cuda
