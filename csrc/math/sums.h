// SPDX-License-Identifier: MIT
// The order in which squares are added, fixed so that every ISA, thread count, memory layout and
// device gives the same bits. All sums are double; x * x is rounded once, then added (no FMA).
//
//   rows:    element j of a row (logical C order) goes to segment j / kSegment and, in it, to lane
//            j % kLanes. A lane adds its squares in rising j, from 0. lane[l] += lane[l + h] for
//            h = 16, 8, 4, 2, 1. The row's total adds its segments in order, from 0.
//   columns: column m = (channel, window position) adds its rows in segments of kSegmentRows, each
//            from 0 in rising order; the total adds the segments in order, from 0. A channel's
//            squared norm adds its window positions in order, from 0.
#pragma once

#include "host_device.h"

namespace lap {

constexpr int kSegment = 1024;    // elements of a row that one pass of the lanes covers
constexpr int kLanes = 32;        // one warp, or eight AVX2 registers of doubles
constexpr int kSegmentRows = 64;  // rows that one partial sum of a column covers

constexpr int64_t row_segments(int64_t row_size) {
  return ceil_div(row_size, kSegment);
}
constexpr int64_t col_segments(int64_t rows) {  // of one group
  return ceil_div(rows, kSegmentRows);
}

// Squares of doubles below 2^-537 vanish, so a sum below kVanishing may have lost some. It has if
// the sum of (kEnlarge * x)^2 is not zero.
constexpr double kVanishing = 0x1p-1000;
constexpr double kEnlarge = 0x1p900;

}  // namespace lap
