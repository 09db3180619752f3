// SPDX-License-Identifier: MIT
// Where a sweep puts the weights it cannot decide: one allocation, handed to the workers in slabs
// as they fill, so that its size bounds the memory of all of them together.
#pragma once

#include <atomic>
#include <memory>

#include "isa.h"

namespace lap::cpu {

constexpr int64_t kSlab = 8192;  // candidates handed to a worker at a time

// Some candidates of one chunk, in order of position.
template <typename Key>
struct Run {
  int64_t chunk;
  const Key* keys;
  const uint16_t* offsets;  // from the chunk's first element
  int64_t count;
};

// Hands out stretches of one allocation to the workers, as they fill.
template <typename Key>
class CandidateRoom {
 public:
  explicit CandidateRoom(int64_t slabs) : room_(new char[slabs * kBytes]), slabs_(slabs) {}

  // An empty slab, or none once all are taken.
  bool next(Candidates<Key>* slab) {
    const int64_t taken = next_.fetch_add(1);
    if (taken >= slabs_) return false;
    char* at = room_.get() + taken * kBytes;
    *slab = {reinterpret_cast<Key*>(at), reinterpret_cast<uint16_t*>(at + kEntries * sizeof(Key)),
             0};
    return true;
  }
  std::unique_ptr<char[]> release() { return std::move(room_); }

 private:
  static constexpr int64_t kEntries = kSlab + 8;  // spare ones, and keys aligned in every slab
  static_assert(kSpareCandidates <= 8, "room for what classify may write in vain");
  static constexpr int64_t kBytes = kEntries * static_cast<int64_t>(sizeof(Key) + sizeof(uint16_t));
  std::unique_ptr<char[]> room_;
  int64_t slabs_;
  std::atomic<int64_t> next_{0};
};

}  // namespace lap::cpu
