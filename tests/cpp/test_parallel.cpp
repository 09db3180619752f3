// SPDX-License-Identifier: MIT
// Threads that share chunks: each chunk once, whoever calls; errors; a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/cpu/parallel.h"
#include "doctest.h"

using lap::cpu::for_each_chunk;
using lap::cpu::Pool;
using lap::cpu::thread_pool;

namespace {

bool each_once(const Pool& pool, int64_t chunks) {
  std::vector<std::atomic<int>> count(chunks);
  std::atomic<bool> fine{true};
  for_each_chunk(pool, chunks, [&](int worker, int64_t c) {
    if (worker < 0 || worker >= pool.threads) fine = false;
    ++count[c];
  });
  for (const std::atomic<int>& n : count) fine = fine && n == 1;
  return fine;
}

}  // namespace

TEST_CASE("each chunk is done once, by workers with numbers below the thread count") {
  for (int threads : {1, 2, 7}) {
    for (int64_t chunks : {0, 1, 2, 1000}) CHECK(each_once(thread_pool(threads), chunks));
  }
}

TEST_CASE("several callers at a time, and a call inside a call") {
  std::atomic<int> fine{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      bool all = true;
      for (int turn = 0; turn < 50; ++turn) all = all && each_once(thread_pool(3), 20);
      fine += all;
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(fine == 4);
  std::atomic<int> inner{0};
  for_each_chunk(thread_pool(2), 10, [&](int, int64_t) {
    for_each_chunk(thread_pool(2), 10, [&](int, int64_t) { ++inner; });
  });
  CHECK(inner == 100);
}

TEST_CASE("an error reaches the caller, and the threads work on") {
  for (int turn = 0; turn < 20; ++turn) {
    CHECK_THROWS_AS(for_each_chunk(thread_pool(3), 100,
                                   [](int, int64_t c) {
                                     if (c == 50) throw std::runtime_error("chunk 50");
                                   }),
                    std::runtime_error);
  }
  CHECK(each_once(thread_pool(3), 100));
}

#if !defined(__SANITIZE_THREAD__)  // it does not follow a fork with threads
TEST_CASE("a forked child has threads of its own") {
  CHECK(each_once(thread_pool(3), 100));
  const pid_t child = fork();
  if (child == 0) _exit(each_once(thread_pool(3), 100) ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0);
}
#endif

TEST_CASE("few elements are worth no thread") {
  CHECK(lap::cpu::pool_for(0, thread_pool(8)).threads == 1);
  CHECK(lap::cpu::pool_for(2 * lap::cpu::kGrain - 1, thread_pool(8)).threads == 1);
  CHECK(lap::cpu::pool_for(2 * lap::cpu::kGrain, thread_pool(8)).threads == 2);
  CHECK(lap::cpu::pool_for(int64_t{1} << 40, thread_pool(8)).threads == 8);
}
