// SPDX-License-Identifier: MIT
// How the core asks for threads without knowing whose they are: the torch bindings pass torch's
// pool, the NumPy module and the C++ tests pass std::thread, a test may pass one thread.
// Work is divided into chunks whose results do not depend on who takes them; workers draw the next
// chunk from a counter, so a busy core delays nobody.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "float_env.h"

namespace lap::cpu {

struct Pool {
  int threads = 1;
  // runs body(0) ... body(workers - 1), each once, and returns when all are done
  std::function<void(int workers, const std::function<void(int)>& body)> run;
};

inline Pool std_thread_pool(int threads) {
  return {threads, [](int workers, const std::function<void(int)>& body) {
            std::vector<std::thread> others;
            for (int i = 1; i < workers; ++i) others.emplace_back(body, i);
            body(0);
            for (std::thread& other : others) other.join();
          }};
}

// Calls body(worker, chunk) for each chunk in 0 .. chunks-1. Chunks rise within a worker.
template <typename Body>
void for_each_chunk(const Pool& pool, int64_t chunks, const Body& body) {
  const int workers = static_cast<int>(std::min<int64_t>(pool.threads, chunks));
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    const FloatEnv env;
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) body(worker, c);
  };
  if (workers <= 1) {
    if (chunks > 0) work(0);
  } else {
    pool.run(workers, work);
  }
}

}  // namespace lap::cpu
