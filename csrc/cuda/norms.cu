// SPDX-License-Identifier: MIT
// Energies (squared norms) of a weight's channels, in double, in the order that math/sums.h fixes.
//
//   rows:     1. one warp per segment of 1024 elements: lanes, then the tree -> partial [rows, S]
//             2. one thread per row adds its segments in order
//   columns:  1. one thread per (group, segment of 64 rows, column m)      -> partial [G, S, M]
//             2. one thread per (group, m) adds the segments in order      -> total [G, M]
//             3. one thread per (group, channel) adds its window in order
// Each number has one owner and one order of additions: deterministic, and the CPU's bits.
#include "../math/sums.h"
#include "device.cuh"

namespace lap::cuda {
namespace {

// Every lane or column reads this many elements before it adds them, to keep loads in flight.
constexpr int kInFlight = 8;

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

// sum += (x * scale)^2 for one element, rounded step by step
template <typename T>
__device__ double add_square(double sum, T x, double scale) {
  const double value = product(static_cast<double>(widen(x)), scale);
  return sum + product(value, value);
}

// Adds first[0], first[stride], ... (count of them, at most kInFlight) and looks for bad ones.
template <typename T>
__device__ double add_squares(double sum,
                              const T* x,
                              int64_t first,
                              int64_t stride,
                              int count,
                              double scale,
                              Status* status) {
  T values[kInFlight];
  LAP_UNROLL
  for (int i = 0; i < kInFlight; ++i) values[i] = i < count ? x[first + i * stride] : T{};
  int bad = 0;
  int first_bad = 0;
  LAP_UNROLL
  for (int i = kInFlight - 1; i >= 0; --i) {
    const bool finite = is_finite(widen(values[i]));
    bad += !finite;
    first_bad = finite ? first_bad : i;
  }
  if (bad != 0 && status != nullptr) {
    note_bad(&status->bad_count, &status->first_inverted, bad, first + first_bad * stride);
  }
  LAP_UNROLL
  for (int i = 0; i < kInFlight; ++i) {
    if (i < count) sum = add_square(sum, values[i], scale);
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
    double sum = 0;
    for (int j = lane; j < size; j += kLanes * kInFlight) {
      const int count = (size - j + kLanes - 1) / kLanes;
      sum = add_squares(sum, x, base + j, kLanes, count < kInFlight ? count : kInFlight, args.scale,
                        args.status);
    }
    sum = warp_sum(sum);
    if (lane == 0) args.partial[segment] = sum;
  }
}

// energy[r] = partial[r, 0] + partial[r, 1] + ... Thread: one row. Reads 1/128 byte per element.
__global__ void __launch_bounds__(kThreads, kResident)
    row_total_kernel(const double* partial, int64_t rows, int64_t per_row, double* energy) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x; r < rows; r += stride) {
    double total = 0;
    for (int64_t s = 0; s < per_row; ++s) total += partial[r * per_row + s];
    energy[r] = total;
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
    double sum = 0;
    for (int n = 0; n < size; n += kInFlight) {
      const int count = size - n < kInFlight ? size - n : kInFlight;
      sum = add_squares(sum, x, (row + n) * args.width + column, args.width, count, args.scale,
                        args.status);
    }
    args.partial[i] = sum;
  }
}

// total[g, m] = partial[g, 0, m] + partial[g, 1, m] + ..., kept where partial[g, 0, m] was.
// Thread: one column of one group. Reads 1/8 byte per element.
__global__ void __launch_bounds__(kThreads, kResident)
    col_total_kernel(double* partial, int64_t columns, int64_t segments, Divider by_width) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t width = static_cast<int64_t>(by_width.divisor);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < columns; i += stride) {
    const int64_t group = by_width.quotient(i);
    double* first = partial + group * segments * width + (i - group * width);
    double total = 0;
    for (int64_t s = 0; s < segments; ++s) total += first[s * width];
    first[0] = total;
  }
}

// energy[g, c] = total[g, c, 0] + total[g, c, 1] + ... Thread: one channel of one group.
__global__ void __launch_bounds__(kThreads, kResident) col_window_kernel(const double* partial,
                                                                         int64_t channels,
                                                                         int64_t segments,
                                                                         int64_t window,
                                                                         Divider by_cols,
                                                                         double* energy) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t cols = static_cast<int64_t>(by_cols.divisor);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < channels; i += stride) {
    const int64_t group = by_cols.quotient(i);
    const double* first = partial + (group * segments * cols + (i - group * cols)) * window;
    double total = 0;
    for (int64_t k = 0; k < window; ++k) total += first[k];
    energy[i] = total;
  }
}

int64_t row_segments(const Weight& x) {
  return ceil_div(x.row_size(), kSegment);
}
int64_t col_segments(const Weight& x) {
  return ceil_div(x.rows / x.groups, kSegmentRows);
}

template <typename... Params, typename... Args>
cudaError_t launch_over(int64_t threads,
                        void (*kernel)(Params...),
                        cudaStream_t stream,
                        const Args&... args) {
  unsigned blocks = 0;
  const cudaError_t error = grid_for(ceil_div(threads, kThreads), &blocks);
  return error != cudaSuccess ? error : launch(kernel, blocks, kThreads, stream, args...);
}

}  // namespace

size_t row_energy_workspace(const Weight& x) {
  Carver carver(nullptr);
  carver.take<Status>(1);
  carver.take<double>(x.rows * row_segments(x));
  return carver.used();
}

cudaError_t launch_row_energy(const Weight& x,
                              double scale,
                              bool check_finite,
                              double* energy,
                              void* workspace,
                              cudaStream_t stream) {
  Carver carver(workspace);
  Status* status = carver.take<Status>(1);
  double* partial = carver.take<double>(x.rows * row_segments(x));
  cudaError_t error = cudaMemsetAsync(status, 0, sizeof(Status), stream);
  if (error != cudaSuccess || x.rows == 0) return error;
  if (x.row_size() == 0) return cudaMemsetAsync(energy, 0, x.rows * sizeof(double), stream);
  const int64_t per_row = row_segments(x);
  const RowArgs args = {x.data,
                        x.row_size(),
                        x.rows * per_row,
                        Divider(per_row),
                        scale,
                        per_row == 1 ? energy : partial,
                        check_finite ? status : nullptr};
  error = with_type(x.dtype, [&](auto type) {
    return launch_over(args.segments * kWarp, row_segment_kernel<decltype(type)>, stream, args);
  });
  if (error != cudaSuccess || per_row == 1) return error;
  return launch_over(x.rows, row_total_kernel, stream, partial, x.rows, per_row, energy);
}

size_t col_energy_workspace(const Weight& x) {
  Carver carver(nullptr);
  carver.take<Status>(1);
  carver.take<double>(x.groups * col_segments(x) * x.row_size());
  return carver.used();
}

cudaError_t launch_col_energy(const Weight& x,
                              double scale,
                              bool check_finite,
                              double* energy,
                              void* workspace,
                              cudaStream_t stream) {
  Carver carver(workspace);
  const int64_t segments = col_segments(x);
  const int64_t width = x.row_size();
  const int64_t channels = x.groups * x.cols;
  Status* status = carver.take<Status>(1);
  double* partial = carver.take<double>(x.groups * segments * width);
  cudaError_t error = cudaMemsetAsync(status, 0, sizeof(Status), stream);
  if (error != cudaSuccess || channels == 0) return error;
  if (x.size() == 0) return cudaMemsetAsync(energy, 0, channels * sizeof(double), stream);
  const ColArgs args = {x.data,
                        x.rows / x.groups,
                        width,
                        x.groups * segments * width,
                        Divider(width),
                        Divider(segments),
                        scale,
                        partial,
                        check_finite ? status : nullptr};
  error = with_type(x.dtype, [&](auto type) {
    return launch_over(args.sums, col_segment_kernel<decltype(type)>, stream, args);
  });
  if (error != cudaSuccess) return error;
  error = launch_over(x.groups * width, col_total_kernel, stream, partial, x.groups * width,
                      segments, args.by_width);
  if (error != cudaSuccess) return error;
  return launch_over(channels, col_window_kernel, stream, partial, channels, segments, x.window,
                     Divider(x.cols), energy);
}

}  // namespace lap::cuda
