// SPDX-License-Identifier: MIT
// How a block reads a tensor: tiles of kTile elements, kPerThread of them a thread, in vectors of
// 16 bytes. Vector v of thread t holds V = 16 / sizeof(T) neighbors, and a block's threads read
// neighboring vectors:
//
//   element j of thread t  =  tile + ((j / V) * kThreads + t) * V + j % V,   0 <= j < kPerThread
//
// A tensor that is not aligned, and every tensor's last tile, is read element by element in the
// same order. Bit j of the 16-bit sets below stands for element j.
#pragma once

#include "device.cuh"

namespace lap::cuda {

constexpr int kPerThread = 16;
constexpr int64_t kTile = int64_t{kThreads} * kPerThread;

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Pack {
  T values[kVector<T>];
};

// Mask bytes of one vector, moved as one word.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<8> {
  using Type = uint64_t;
};

// Offset of the thread's element j from the tile's begin.
template <typename T>
__device__ int64_t offset_of(int j) {
  constexpr int V = kVector<T>;
  return (int64_t{j / V} * kThreads + threadIdx.x) * V + j % V;
}

inline bool aligned_for_vectors(const void* data,
                                int64_t item,
                                const uint8_t* eligible,
                                const uint8_t* mask) {
  const uint64_t bytes = 16 / static_cast<uint64_t>(item);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(eligible) % bytes == 0 &&
         reinterpret_cast<uintptr_t>(mask) % bytes == 0;
}

// x[j] = data[begin + offset_of(j)]; returns the set of those that exist. `whole`: the tile is
// full and the tensor aligned.
template <typename T>
__device__ uint32_t
load_values(const T* data, int64_t begin, int64_t size, bool whole, T (&x)[kPerThread]) {
  constexpr int V = kVector<T>;
  if (whole) {
    LAP_UNROLL
    for (int v = 0; v < kPerThread / V; ++v) {
      const T* from = data + begin + offset_of<T>(v * V);
      const Pack<T> pack = bit_cast<Pack<T>>(*reinterpret_cast<const uint4*>(from));
      LAP_UNROLL
      for (int j = 0; j < V; ++j) x[v * V + j] = pack.values[j];
    }
    return (1u << kPerThread) - 1;
  }
  uint32_t present = 0;
  LAP_UNROLL
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t index = begin + offset_of<T>(j);
    x[j] = index < size ? data[index] : T{};
    present |= static_cast<uint32_t>(index < size) << j;
  }
  return present;
}

// to[0 .. n-1] = from, in words of 16 bytes; to is aligned.
template <typename Float, int n>
__device__ void store_vector(Float* to, const Float (&from)[n]) {
  constexpr int kWord = kVector<Float>;
  LAP_UNROLL
  for (int i = 0; i < n; i += kWord) {
    Pack<Float> pack;
    LAP_UNROLL
    for (int j = 0; j < kWord; ++j) pack.values[j] = from[i + j];
    *reinterpret_cast<uint4*>(to + i) = bit_cast<uint4>(pack);
  }
}

// The set of elements whose byte is not zero.
template <typename T>
__device__ uint32_t load_bytes(const uint8_t* bytes, int64_t begin, int64_t size, bool whole) {
  constexpr int V = kVector<T>;
  uint32_t set = 0;
  if (whole) {
    LAP_UNROLL
    for (int v = 0; v < kPerThread / V; ++v) {
      using Word = typename WordOf<V>::Type;
      const uint8_t* from = bytes + begin + offset_of<T>(v * V);
      const uint64_t word = *reinterpret_cast<const Word*>(from);
      LAP_UNROLL
      for (int j = 0; j < V; ++j) {
        set |= static_cast<uint32_t>(((word >> (8 * j)) & 0xff) != 0) << (v * V + j);
      }
    }
    return set;
  }
  LAP_UNROLL
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t index = begin + offset_of<T>(j);
    if (index < size) set |= static_cast<uint32_t>(bytes[index] != 0) << j;
  }
  return set;
}

// bytes[...] = 1 for the elements of the set, 0 for the others.
template <typename T>
__device__ void store_bytes(uint8_t* bytes, int64_t begin, int64_t size, bool whole, uint32_t set) {
  constexpr int V = kVector<T>;
  if (whole) {
    LAP_UNROLL
    for (int v = 0; v < kPerThread / V; ++v) {
      using Word = typename WordOf<V>::Type;
      Word word = 0;
      LAP_UNROLL
      for (int j = 0; j < V; ++j) {
        const Word bit = (set >> (v * V + j)) & 1;
        word = static_cast<Word>(word | (bit << (8 * j)));
      }
      *reinterpret_cast<Word*>(bytes + begin + offset_of<T>(v * V)) = word;
    }
    return;
  }
  LAP_UNROLL
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t index = begin + offset_of<T>(j);
    if (index < size) bytes[index] = static_cast<uint8_t>((set >> j) & 1);
  }
}

// Where element p of a weight's flat order lies: row p / (cols * window), column
// group(row) * cols + (p / window) % cols. Two or three exact divisions a vector, then steps.
struct Places {
  Divider row_size;
  Divider window;
  Divider group_rows;
  int64_t cols = 1;
  int64_t groups = 1;

  Places() = default;
  explicit Places(const Weight& w)
      : row_size(w.row_size()),
        window(w.window),
        group_rows(w.rows / w.groups),
        cols(w.cols),
        groups(w.groups) {}
};

class Place {
 public:
  __device__ Place(const Places& places, int64_t index) : places_(places) {
    row = places.row_size.quotient(index);
    const int64_t rest = index - row * static_cast<int64_t>(places.row_size.divisor);
    col_ = places.window.quotient(rest);
    k_ = rest - col_ * static_cast<int64_t>(places.window.divisor);
    start_group();
  }
  __device__ void step() {
    if (++k_ < static_cast<int64_t>(places_.window.divisor)) return;
    k_ = 0;
    if (++col_ < places_.cols) return;
    col_ = 0;
    ++row;
    start_group();
  }
  __device__ int64_t channel() const { return first_channel_ + col_; }

  int64_t row;

 private:
  __device__ void start_group() {
    first_channel_ = places_.groups == 1 ? 0 : places_.group_rows.quotient(row) * places_.cols;
  }

  const Places& places_;
  int64_t col_;
  int64_t k_;
  int64_t first_channel_;
};

}  // namespace lap::cuda
