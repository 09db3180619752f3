// SPDX-License-Identifier: MIT
// Sums of the scores in blocks, and the masks of blocks that are kept. The order of additions is
// fixed (math/sums.h within a row of a block, then row by row); each number has one owner:
// deterministic, and the CPU's bits.
//
//   blocks of at most 8 weights a row   one thread per block adds it all
//   wider ones  1. some lanes of a warp per row of a block (up to 32), a warp per segment of 1024
//               2. one thread per block adds these in order
#include "../math/sums.h"
#include "scored.cuh"

namespace lap::cuda {
namespace {

constexpr int64_t kNarrow = 8;  // weights of a block's row that one thread adds
constexpr int kRowsAtOnce = 8;  // rows of a block that some lanes have under way

struct BlockArgs {
  Scored scored;
  const uint8_t* eligible;  // or null
  bool squared;
  Layout layout;
  Blocks blocks;
  int64_t width;     // of a block in weights: columns times window
  int64_t across;    // blocks
  int64_t segments;  // of a row of a block
  int64_t top;       // the first row of blocks that has rows of this weight, and
  int64_t units;     // how many blocks there are from it on
  Divider by_across;
  Divider by_segments;
  Divider by_window;
  Divider by_group;
  double* partial;     // [rows, across, segments]
  const double* sums;  // [units], as they were
  double* out;         // [units]
};

// One row of w, as its elements are looked up.
struct Row {
  int64_t row;
  int64_t first;    // flat index
  int64_t channel;  // of its first column

  __device__ Row(const BlockArgs& args, int64_t row)
      : row(row),
        first(row * args.layout.row_size()),
        channel(args.layout.groups == 1 ? 0 : args.by_group.quotient(row) * args.layout.cols) {}
};

// What is added of element j of a row.
template <typename T, bool kWeights>
__device__ double added(
    const BlockArgs& args, const Scores<T, kWeights>& scores, const Row& row, int64_t j, T x) {
  const int64_t col = args.layout.window == 1 ? j : args.by_window.quotient(j);
  const double s = scores.value(x, row.first + j, row.row, row.channel + col);
  const bool counts = args.eligible == nullptr || args.eligible[row.first + j] != 0;
  return !counts ? 0 : args.squared ? product(s, s) : s;
}

// The rows of w, [begin, end), that are in the row of blocks `unit`.
struct Rows {
  int64_t begin;
  int64_t end;

  __device__ Rows(const BlockArgs& args, int64_t unit) {
    const Blocks& blocks = args.blocks;
    const int64_t group = unit / blocks.down();
    const int64_t top = (unit - group * blocks.down()) * blocks.rows;
    const int64_t below = top + blocks.rows < blocks.height ? top + blocks.rows : blocks.height;
    begin = group * blocks.height + top - blocks.first;
    end = group * blocks.height + below - blocks.first;
    begin = begin < 0 ? 0 : begin;
    end = end < args.layout.rows ? end : args.layout.rows;
  }
};

// Thread: one block whose rows have at most kWidth weights, some rows at once. Bytes per element:
// sizeof(T) read (eligible: 1), 16 a block.
template <typename T, bool kWeights, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident) narrow_block_kernel(BlockArgs args) {
  constexpr int kRows = 2 * static_cast<int>(kNarrow) / kWidth;
  const Scores<T, kWeights> scores(args.scored);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.units; i += step) {
    const int64_t down = args.by_across.quotient(i);
    const int64_t begin = (i - down * args.across) * args.width;
    const int64_t left = args.layout.row_size() - begin;
    const int64_t width = left < args.width ? left : args.width;
    const Rows rows(args, args.top + down);
    double sum = args.sums[i];
    for (int64_t top = rows.begin; top < rows.end; top += kRows) {
      T x[kRows][kWidth];
      LAP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const T* from = scores.data() + (top + r) * args.layout.row_size() + begin;
        LAP_UNROLL
        for (int j = 0; j < kWidth; ++j) {
          x[r][j] = top + r < rows.end && j < width ? from[j] : T{};
        }
      }
      LAP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (top + r >= rows.end) continue;
        const Row row(args, top + r);
        double lanes[kWidth];
        LAP_UNROLL
        for (int j = 0; j < kWidth; ++j) {
          lanes[j] = j < width ? added(args, scores, row, begin + j, x[r][j]) : 0;
        }
        LAP_UNROLL
        for (int half = kWidth / 2; half > 0; half /= 2) {
          LAP_UNROLL
          for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
        }
        sum += lanes[0];
      }
    }
    args.out[i] = sum;
  }
}

// partial[row, block] for blocks of at most 32 weights a row. Thread: one lane of some rows of a
// block; `lanes`, a power of two, of the warp are of the same block: the others' sums of
// math/sums.h are zero. Bytes per element: sizeof(T) read (eligible: 1), 8 a block's row written.
template <typename T, bool kWeights>
__global__ void __launch_bounds__(kThreads, kResident)
    short_row_kernel(BlockArgs args, int lanes, int64_t batches) {
  const Scores<T, kWeights> scores(args.scored);
  const int per_warp = kWarp / lanes;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const int64_t pieces = batches * args.across;
  const int lane = lane_id() % lanes;
  int64_t first = (int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp) * per_warp;
  for (; first < pieces; first += warps * per_warp) {  // all lanes of a warp stay together
    const int64_t piece = first + lane_id() / lanes;
    const int64_t batch = args.by_across.quotient(piece);
    const int64_t block = piece - batch * args.across;
    const int64_t j = block * args.width + lane;
    const bool inside = piece < pieces && lane < args.width && j < args.layout.row_size();
    const int64_t top = batch * kRowsAtOnce;
    T x[kRowsAtOnce];
    double sums[kRowsAtOnce];
    LAP_UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const bool exists = inside && top + r < args.layout.rows;
      x[r] = exists ? scores.load((top + r) * args.layout.row_size() + j) : T{};
    }
    LAP_UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const bool exists = inside && top + r < args.layout.rows;
      sums[r] = exists ? added(args, scores, Row(args, top + r), j, x[r]) : 0;
    }
    for (int half = lanes / 2; half > 0; half /= 2) {
      LAP_UNROLL
      for (int r = 0; r < kRowsAtOnce; ++r) sums[r] += __shfl_down_sync(kAllLanes, sums[r], half);
    }
    if (lane != 0 || piece >= pieces) continue;
    LAP_UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (top + r < args.layout.rows) args.partial[(top + r) * args.across + block] = sums[r];
    }
  }
}

// partial[row, block, segment]. Thread: one lane of one segment, elements lane, lane + 32, ...;
// bytes per element: sizeof(T) read (eligible: 1), 8 a segment written.
template <typename T, bool kWeights>
__global__ void __launch_bounds__(kThreads, kResident) long_row_kernel(BlockArgs args) {
  const Scores<T, kWeights> scores(args.scored);
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const int64_t pieces = args.layout.rows * args.across * args.segments;
  int64_t piece = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  for (; piece < pieces; piece += warps) {
    const int64_t slice = args.by_segments.quotient(piece);
    const int64_t at = args.by_across.quotient(slice);
    const Row row(args, at);
    const int64_t block = (slice - at * args.across) * args.width;
    const int64_t begin = block + (piece - slice * args.segments) * kSegment;
    const int64_t end_of_row = args.layout.row_size();
    int64_t end = begin + kSegment;
    end = end < block + args.width ? end : block + args.width;
    end = end < end_of_row ? end : end_of_row;
    double sum = 0;
    for (int64_t first = begin + lane_id(); first < end; first += kInFlight * kLanes) {
      T x[kInFlight];
      LAP_UNROLL
      for (int b = 0; b < kInFlight; ++b) {
        const int64_t j = first + b * kLanes;
        x[b] = j < end ? scores.load(row.first + j) : T{};
      }
      LAP_UNROLL
      for (int b = 0; b < kInFlight; ++b) {
        const int64_t j = first + b * kLanes;
        if (j < end) sum += added(args, scores, row, j, x[b]);
      }
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) args.partial[piece] = sum;
  }
}

// out = sums + the rows of partial, in order. Thread: one block, so a warp reads neighbors.
__global__ void __launch_bounds__(kThreads, kResident) block_total_kernel(BlockArgs args) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t row_size = args.across * args.segments;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.units; i += step) {
    const int64_t down = args.by_across.quotient(i);
    const double* block = args.partial + (i - down * args.across) * args.segments;
    const Rows rows(args, args.top + down);
    double sum = args.sums[i];
    int64_t row = rows.begin;
    for (; args.segments == 1 && row + kInFlight <= rows.end; row += kInFlight) {
      double x[kInFlight];
      LAP_UNROLL
      for (int b = 0; b < kInFlight; ++b) x[b] = block[(row + b) * row_size];
      LAP_UNROLL
      for (int b = 0; b < kInFlight; ++b) sum += x[b];
    }
    for (; row < rows.end; ++row) {
      double total = 0;
      for (int64_t s = 0; s < args.segments; ++s) total += block[row * row_size + s];
      sum += total;
    }
    args.out[i] = sum;
  }
}

// sums = from, unless something was found wrong. Thread: one block.
__global__ void __launch_bounds__(kThreads, kResident)
    commit_kernel(double* sums, const double* from, int64_t count, const Status* status) {
  if (!may_write(status)) return;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    sums[i] = from[i];
  }
}

// What a call needs beside its arguments.
struct BlockSpace {
  ScoredSpace scored;
  double* partial;  // null: narrow blocks
  double* next;     // the new sums until all is known to be well

  BlockSpace(Carver* carver, const Weight& w, const Blocks& blocks)
      : scored(carver, w), partial(nullptr) {
    const int64_t across = blocks.across(w.layout.cols);
    const int64_t rows = w.layout.rows;
    const int64_t width = blocks.cols * w.layout.window;
    if (width > kNarrow) partial = carver->take<double>(rows * across * row_segments(width));
    next = carver->take<double>(touched(blocks, rows) * across);
  }
  // Rows of blocks that have some of the rows.
  static int64_t touched(const Blocks& blocks, int64_t rows) {
    return rows == 0 ? 0 : blocks.unit_of(rows - 1) - blocks.unit_of(0) + 1;
  }
};

template <typename T, bool kWeights>
cudaError_t launch_sums(const BlockArgs& args, cudaStream_t stream) {
  if (args.width <= kNarrow) {
    const auto kernel = args.width == 1   ? narrow_block_kernel<T, kWeights, 1>
                        : args.width == 2 ? narrow_block_kernel<T, kWeights, 2>
                        : args.width <= 4 ? narrow_block_kernel<T, kWeights, 4>
                                          : narrow_block_kernel<T, kWeights, 8>;
    return launch_over(args.units, kernel, stream, args);
  }
  cudaError_t error = cudaSuccess;
  if (args.width <= kLanes) {
    const int lanes = args.width <= kLanes / 2 ? kLanes / 2 : kLanes;
    const int64_t batches = ceil_div(args.layout.rows, kRowsAtOnce);
    error = launch_over(batches * args.across * lanes, short_row_kernel<T, kWeights>, stream, args,
                        lanes, batches);
  } else {
    const int64_t pieces = args.layout.rows * args.across * args.segments;
    error = launch_over(pieces * kWarp, long_row_kernel<T, kWeights>, stream, args);
  }
  return error != cudaSuccess ? error : launch_over(args.units, block_total_kernel, stream, args);
}

}  // namespace

size_t block_sums_workspace(const Weight& w, const Blocks& blocks) {
  Carver carver(nullptr);
  BlockSpace(&carver, w, blocks);
  return carver.used();
}

cudaError_t launch_block_sums(const Weight& w,
                              const Norms& norms,
                              const Blocks& blocks,
                              bool squared,
                              const uint8_t* eligible,
                              bool check_finite,
                              double* sums,
                              void* workspace,
                              cudaStream_t stream) {
  Carver carver(workspace);
  const BlockSpace space(&carver, w, blocks);
  Scored scored = {};
  cudaError_t error = prepare_scored(w, norms, check_finite, space.scored, stream, &scored);
  const Layout& layout = w.layout;
  if (error != cudaSuccess || layout.size() == 0) return error;
  const int64_t across = blocks.across(layout.cols);
  const int64_t width = blocks.cols * layout.window;
  const int64_t top = blocks.unit_of(0);
  const int64_t units = BlockSpace::touched(blocks, layout.rows) * across;
  const int64_t segments = row_segments(width);
  double* mine = sums + top * across;
  const BlockArgs args = {scored,
                          eligible,
                          squared,
                          layout,
                          blocks,
                          width,
                          across,
                          segments,
                          top,
                          units,
                          Divider(across),
                          Divider(segments),
                          Divider(layout.window),
                          Divider(layout.group_rows()),
                          space.partial,
                          mine,
                          check_finite ? space.next : mine};
  error = with_scores(w, norms, [&](auto type, auto weights) {
    return launch_sums<decltype(type), decltype(weights)::value>(args, stream);
  });
  if (error != cudaSuccess || !check_finite) return error;
  return launch_over(units, commit_kernel, stream, mine, args.out, units, scored.status);
}

// --- masks of blocks ---------------------------------------------------------------------------

namespace {

constexpr int kBytes = 16;  // of a mask that a thread writes at once

struct BlockMaskArgs {
  const uint8_t* kept;
  const uint8_t* eligible;  // or null
  uint8_t* mask;
  int64_t size;
  bool words;  // both masks are aligned to kBytes
  int64_t row_size;
  int64_t across;
  Blocks blocks;
  int64_t down;
  Divider by_row;
  Divider by_width;  // of a block in weights
  Divider by_height;
  Divider by_rows;  // of a block
};

// Whether neighboring elements are in blocks that are kept: some divisions a row, then steps.
class Walk {
 public:
  __device__ Walk(const BlockMaskArgs& args, int64_t index) : args_(args) {
    row_ = args.by_row.quotient(index);
    column_ = index - row_ * args.row_size;
    find();
  }
  __device__ bool kept() const { return kept_; }
  __device__ void step() {
    ++column_;
    if (--left_ > 0) return;
    if (column_ == args_.row_size) {
      column_ = 0;
      ++row_;
    }
    find();
  }

 private:
  __device__ void find() {
    left_ = 1;
    kept_ = false;
    const int64_t width = static_cast<int64_t>(args_.by_width.divisor);
    const int64_t at = args_.blocks.first + row_;
    const int64_t group = args_.by_height.quotient(at);
    const int64_t inside = args_.by_rows.quotient(at - group * args_.blocks.height);
    const int64_t block = args_.by_width.quotient(column_);
    const int64_t end = (block + 1) * width < args_.row_size ? (block + 1) * width : args_.row_size;
    left_ = end - column_;
    kept_ = args_.kept[(group * args_.down + inside) * args_.across + block] != 0;
  }

  const BlockMaskArgs& args_;
  int64_t row_;
  int64_t column_;  // in weights
  int64_t left_;    // weights of this block in this row, this one included
  bool kept_;
};

// Thread: kBytes neighbors. Bytes per element: 1 written (eligible: 1 read).
__global__ void __launch_bounds__(kThreads, kResident) block_mask_kernel(BlockMaskArgs args) {
  const int64_t step = int64_t{gridDim.x} * kThreads * kBytes;
  int64_t begin = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kBytes;
  for (; begin < args.size; begin += step) {
    const int64_t left = args.size - begin;
    const int count = static_cast<int>(left < kBytes ? left : kBytes);
    const bool words = args.words && count == kBytes;
    Walk walk(args, begin);
    uint32_t word[kBytes / 4] = {};
    LAP_UNROLL
    for (int b = 0; b < kBytes; ++b) {
      if (b >= count) continue;
      bool kept = walk.kept();
      if (args.eligible != nullptr) kept = kept && args.eligible[begin + b] != 0;
      word[b / 4] |= static_cast<uint32_t>(kept) << (8 * (b % 4));
      if (!words) args.mask[begin + b] = kept ? 1 : 0;
      if (b + 1 < count) walk.step();
    }
    if (words) *reinterpret_cast<uint4*>(args.mask + begin) = {word[0], word[1], word[2], word[3]};
  }
}

}  // namespace

cudaError_t launch_block_mask(const uint8_t* kept,
                              const Layout& layout,
                              const Blocks& blocks,
                              const uint8_t* eligible,
                              uint8_t* mask,
                              cudaStream_t stream) {
  const int64_t size = layout.size();
  if (size == 0) return cudaSuccess;
  const BlockMaskArgs args = {kept,
                              eligible,
                              mask,
                              size,
                              reinterpret_cast<uintptr_t>(mask) % kBytes == 0,
                              layout.row_size(),
                              blocks.across(layout.cols),
                              blocks,
                              blocks.down(),
                              Divider(layout.row_size()),
                              Divider(blocks.cols * layout.window),
                              Divider(blocks.height),
                              Divider(blocks.rows)};
  return launch_over(ceil_div(size, kBytes), block_mask_kernel, stream, args);
}

}  // namespace lap::cuda
