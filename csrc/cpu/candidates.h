// SPDX-License-Identifier: MIT
// Where a scan puts the elements it cannot decide: one allocation, handed to the workers in parts
// as these fill, so that its size bounds the memory of all of them together.
#pragma once

#include <atomic>
#include <memory>

#include "isa.h"

namespace lap::cpu {

constexpr int64_t kPart = 8192;  // candidates handed to a worker at a time

// Some candidates of one chunk, in order of position.
template <typename Key>
struct CandidateList {
  int64_t chunk;
  const Key* keys;
  const uint16_t* offsets;  // from the chunk's first element
  int64_t count;
};

template <typename Key>
class CandidateBuffer {
 public:
  explicit CandidateBuffer(int64_t parts) : memory_(new char[parts * kBytes]), parts_(parts) {}

  // An empty part, or none once all are taken.
  bool next(Candidates<Key>* part) {
    const int64_t taken = next_.fetch_add(1);
    if (taken >= parts_) return false;
    char* at = memory_.get() + taken * kBytes;
    *part = {reinterpret_cast<Key*>(at), reinterpret_cast<uint16_t*>(at + kEntries * sizeof(Key)),
             0};
    return true;
  }
  std::unique_ptr<char[]> release() { return std::move(memory_); }

 private:
  static constexpr int64_t kEntries = kPart + 8;  // spare ones, and keys aligned in every part
  static_assert(kSpareCandidates <= 8, "classify may write as many in vain");
  static constexpr int64_t kBytes = kEntries * static_cast<int64_t>(sizeof(Key) + sizeof(uint16_t));
  std::unique_ptr<char[]> memory_;
  int64_t parts_;
  std::atomic<int64_t> next_{0};
};

}  // namespace lap::cpu
