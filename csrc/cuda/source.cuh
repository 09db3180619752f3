// SPDX-License-Identifier: MIT
// The tensors of a ranking: a list of sources in the workspace, and their tiles, numbered through.
//
// A position counts through all tensors of a list: position = source.first + flat index.
#pragma once

#include "tile.cuh"

namespace lap::cuda {

// One tensor of a list, as the kernels find it in the workspace.
struct ListedSource : Source {
  int64_t first;       // position of element 0
  int64_t first_tile;  // number of its first tile among all
  Count bad_count;
  Count bad_first_inverted;
  int aligned;
};

// A tile in a thread's hands.
struct Tile {
  const void* data;         // of the source, as the next two
  const uint8_t* eligible;  //
  uint8_t* mask;            //
  int source;               // its number in the list
  int64_t begin;            // of the tile, in the source
  int64_t position;         // ... and among all
  Reach reach;
};

// The last i with start(i) <= x; start rises and start(0) = 0. Skips empty sources.
template <typename Start>
__device__ int last_starting(int count, int64_t x, const Start& start) {
  int low = 0;
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (start(middle) <= x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline const ListedSource& source_at(const ListedSource* sources,
                                                int count,
                                                int64_t position) {
  return sources[last_starting(count, position, [&](int i) { return sources[i].first; })];
}

// The tiles of a list, one after the other by rising numbers: the search for a tile's source starts
// at the last one's, which most often is it.
class TileFinder {
 public:
  // sole: sources[0], where it is the only one, in the kernel's parameters: it takes no loads
  __device__ TileFinder(const ListedSource* sources, int count, const ListedSource& sole)
      : sources_(sources), count_(count), sole_(sole), at_(0) {
    if (count > 1) {
      at_ = last_starting(count, blockIdx.x, [&](int i) { return sources[i].first_tile; });
    }
  }
  template <typename T>
  __device__ Tile find(int64_t number) {
    if (count_ == 1) return tile_of<T>(sole_, number);
    while (at_ + 1 < count_ && sources_[at_ + 1].first_tile <= number) ++at_;
    return tile_of<T>(sources_[at_], number);
  }

 private:
  template <typename T>
  __device__ Tile tile_of(const ListedSource& source, int64_t number) const {
    const int64_t begin = (number - source.first_tile) * kTile;
    const Reach reach = reach_of<T>(begin, source.size, source.aligned != 0);
    return {source.data, source.eligible, source.mask, at_, begin, source.first + begin, reach};
  }

  const ListedSource* sources_;
  int count_;
  const ListedSource& sole_;
  int at_;
};

}  // namespace lap::cuda
