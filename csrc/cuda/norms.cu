// SPDX-License-Identifier: MIT
// Squared norms of a weight's channels, in double, in the order that math/sums.h fixes.
//
//   rows:     1. one warp per segment of 1024 elements: lanes, then the tree -> partial [rows, S]
//             2. one thread per row adds its segments in order (S = 1: not needed)
//   columns:  1. one thread per (group, segment of 64 rows, column m)      -> partial [G, S, M]
//             2. one thread per (group, channel): each window position's segments in order, then
//                the window positions in order (one of each: not needed)
// Each number has one owner and one order of additions: deterministic, and the CPU's bits.
//
// A sum that is not finite is the only sign of a bad weight (or of squares of doubles that
// overflow): its elements are then read again and looked at.
#include "../math/sums.h"
#include "device.cuh"

namespace lap::cuda {
namespace {

struct RowArgs {
  const void* x;
  int64_t row_size;
  int64_t segments;  // of all rows
  Divider per_row;   // segments of one row
  double scale;
  double* partial;  // [rows, segments of a row]
  Status* status;   // null: no check
};

struct ColArgs {
  const void* x;
  int64_t group_rows;
  int64_t width;     // columns: cols * window
  int64_t sums;      // groups * segments * width
  Divider by_width;  //
  Divider by_segments;
  double scale;
  double* partial;  // [groups, segments, width]
  Status* status;
};

// sum + (x * scale)^2, rounded step by step; a scale of 1 changes no bit
template <bool kScaled, typename T>
__device__ double add_square(double sum, T x, double scale) {
  double value = static_cast<double>(widen(x));
  if constexpr (kScaled) value = product(value, scale);
  return sum + product(value, value);
}

// The squares of x[0], x[stride], ... (`count` of them), added in order; 32 bytes of loads at a
// time at the least.
template <bool kScaled, typename T>
__device__ double sum_squares(const T* x, int64_t stride, int count, double scale) {
  constexpr int kBatch = sizeof(T) == 2 ? 2 * kInFlight : kInFlight;
  double sum = 0;
  int i = 0;
  for (; i + kBatch <= count; i += kBatch) {
    T values[kBatch];
    LAP_UNROLL
    for (int b = 0; b < kBatch; ++b) values[b] = x[(i + b) * stride];
    LAP_UNROLL
    for (int b = 0; b < kBatch; ++b) sum = add_square<kScaled>(sum, values[b], scale);
  }
  for (; i < count; ++i) sum = add_square<kScaled>(sum, x[i * stride], scale);
  return sum;
}

// The same for elements first, first + stride, ... of x; bad ones among them are noted.
template <typename T>
__device__ double checked_squares(
    const T* x, int64_t first, int64_t stride, int count, double scale, Status* status) {
  const double sum = scale == 1 ? sum_squares<false>(x + first, stride, count, scale)
                                : sum_squares<true>(x + first, stride, count, scale);
  if (status == nullptr || is_finite(sum)) return sum;
  int bad = 0;
  int first_bad = 0;
  for (int i = count - 1; i >= 0; --i) {
    if (is_finite(widen(x[first + i * stride]))) continue;
    ++bad;
    first_bad = i;
  }
  if (bad != 0) {
    note_bad(&status->bad_count, &status->first_inverted, bad, first + first_bad * stride);
  }
  return sum;
}

// partial[r, s] = squares of segment s of row r. Thread: one lane of one segment, elements
// lane, lane + 32, ...; bytes per element: sizeof(T) read, 8 / 1024 written. No atomics.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) row_segment_kernel(RowArgs args) {
  const T* x = static_cast<const T*>(args.x);
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const int lane = lane_id();
  int64_t segment = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  for (; segment < args.segments; segment += warps) {
    const int64_t row = args.per_row.quotient(segment);
    const int64_t begin = (segment - row * static_cast<int64_t>(args.per_row.divisor)) * kSegment;
    const int64_t left = args.row_size - begin;
    const int size = static_cast<int>(left < kSegment ? left : kSegment);
    const int64_t base = row * args.row_size + begin;
    const int count = size > lane ? (size - lane + kLanes - 1) / kLanes : 0;
    double sum = checked_squares(x, base + lane, kLanes, count, args.scale, args.status);
    sum = warp_sum(sum);
    if (lane == 0) args.partial[segment] = sum;
  }
}

// x[0] + x[stride] + ... (`count` of them), added in order.
__device__ inline double sum_in_order(const double* x, int64_t stride, int64_t count) {
  double total = 0;
  int64_t i = 0;
  for (; i + kInFlight <= count; i += kInFlight) {
    double values[kInFlight];
    LAP_UNROLL
    for (int b = 0; b < kInFlight; ++b) values[b] = x[(i + b) * stride];
    LAP_UNROLL
    for (int b = 0; b < kInFlight; ++b) total += values[b];
  }
  for (; i < count; ++i) total += x[i * stride];
  return total;
}

// squared_norm[r] = partial[r, 0] + partial[r, 1] + ... Thread: one row. Reads 1/128 byte per
// element.
__global__ void __launch_bounds__(kThreads, kResident)
    row_total_kernel(const double* partial, int64_t rows, int64_t per_row, double* squared_norm) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x; r < rows; r += stride) {
    squared_norm[r] = sum_in_order(partial + r * per_row, 1, per_row);
  }
}

// partial[g, s, m] = squares of 64 rows of column m. Thread: one column of one segment, so a warp
// reads neighbors; bytes per element: sizeof(T) read, 8 / 64 written. No atomics.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) col_segment_kernel(ColArgs args) {
  const T* x = static_cast<const T*>(args.x);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.sums; i += stride) {
    const int64_t slice = args.by_width.quotient(i);
    const int64_t column = i - slice * args.width;
    const int64_t group = args.by_segments.quotient(slice);
    const int64_t segment = slice - group * static_cast<int64_t>(args.by_segments.divisor);
    const int64_t left = args.group_rows - segment * kSegmentRows;
    const int size = static_cast<int>(left < kSegmentRows ? left : kSegmentRows);
    const int64_t row = group * args.group_rows + segment * kSegmentRows;
    args.partial[i] =
        checked_squares(x, row * args.width + column, args.width, size, args.scale, args.status);
  }
}

// squared_norm[g, c] = total[g, c, 0] + total[g, c, 1] + ..., total[g, m] = partial[g, 0, m] +
// partial[g, 1, m] + ... Thread: one channel of one group. Reads 1/8 byte per element.
__global__ void __launch_bounds__(kThreads, kResident) col_total_kernel(const double* partial,
                                                                        int64_t channels,
                                                                        int64_t segments,
                                                                        int64_t window,
                                                                        Divider by_cols,
                                                                        double* squared_norm) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t width = static_cast<int64_t>(by_cols.divisor) * window;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < channels; i += stride) {
    const int64_t group = by_cols.quotient(i);
    const int64_t c = i - group * static_cast<int64_t>(by_cols.divisor);
    const double* first = partial + group * segments * width + c * window;
    double sum = 0;
    for (int64_t k = 0; k < window; ++k) sum += sum_in_order(first + k, width, segments);
    squared_norm[i] = sum;
  }
}

cudaError_t clear(Status* status, cudaStream_t stream) {
  return cudaMemsetAsync(status, 0, sizeof(Status), stream);
}

}  // namespace

size_t row_squared_norm_workspace(const Weight& x) {
  Carver carver(nullptr);
  carver.take<Status>(1);
  carver.take<double>(x.layout.rows * row_segments(x.layout.row_size()));
  return carver.used();
}

cudaError_t launch_row_squared_norms(const Weight& x,
                                     double scale,
                                     bool check_finite,
                                     double* squared_norm,
                                     void* workspace,
                                     cudaStream_t stream) {
  Carver carver(workspace);
  Status* status = carver.take<Status>(1);
  const int64_t rows = x.layout.rows;
  const int64_t row_size = x.layout.row_size();
  const int64_t per_row = row_segments(row_size);
  double* partial = carver.take<double>(rows * per_row);
  cudaError_t error = check_finite ? clear(status, stream) : cudaSuccess;
  if (error != cudaSuccess || rows == 0) return error;
  if (row_size == 0) return cudaMemsetAsync(squared_norm, 0, rows * sizeof(double), stream);
  const RowArgs args = {x.data,
                        row_size,
                        rows * per_row,
                        Divider(per_row),
                        scale,
                        per_row == 1 ? squared_norm : partial,
                        check_finite ? status : nullptr};
  error = with_type(x.dtype, [&](auto type) {
    return launch_over(args.segments * kWarp, row_segment_kernel<decltype(type)>, stream, args);
  });
  if (error != cudaSuccess || per_row == 1) return error;
  return launch_over(rows, row_total_kernel, stream, partial, rows, per_row, squared_norm);
}

size_t col_squared_norm_workspace(const Weight& x) {
  Carver carver(nullptr);
  carver.take<Status>(1);
  const Layout& layout = x.layout;
  carver.take<double>(layout.groups * col_segments(layout.group_rows()) * layout.row_size());
  return carver.used();
}

cudaError_t launch_col_squared_norms(const Weight& x,
                                     double scale,
                                     bool check_finite,
                                     double* squared_norm,
                                     void* workspace,
                                     cudaStream_t stream) {
  Carver carver(workspace);
  const Layout& layout = x.layout;
  const int64_t segments = col_segments(layout.group_rows());
  const int64_t width = layout.row_size();
  const int64_t channels = layout.channels();
  Status* status = carver.take<Status>(1);
  double* partial = carver.take<double>(layout.groups * segments * width);
  cudaError_t error = check_finite ? clear(status, stream) : cudaSuccess;
  if (error != cudaSuccess || channels == 0) return error;
  if (layout.size() == 0)
    return cudaMemsetAsync(squared_norm, 0, channels * sizeof(double), stream);
  const bool alone = segments == 1 && layout.window == 1;  // a column is a channel
  const ColArgs args = {x.data,
                        layout.group_rows(),
                        width,
                        layout.groups * segments * width,
                        Divider(width),
                        Divider(segments),
                        scale,
                        alone ? squared_norm : partial,
                        check_finite ? status : nullptr};
  error = with_type(x.dtype, [&](auto type) {
    return launch_over(args.sums, col_segment_kernel<decltype(type)>, stream, args);
  });
  if (error != cudaSuccess || alone) return error;
  return launch_over(channels, col_total_kernel, stream, partial, channels, segments, layout.window,
                     Divider(layout.cols), squared_norm);
}

}  // namespace lap::cuda
