// Tasks over threads, and the scratch memory of each thread.
#pragma once

#include "call.h"
#include "simd.h"

namespace selectra {
namespace {

// Runs body(0) ... body(tasks - 1) on up to `threads` threads.
template <typename Body>
SELECTRA_INLINE void for_each_task(int64_t tasks, int64_t threads, const Body& body) {
  if (threads > 1 && tasks > 1) {
    run_tasks(tasks, threads, [](const void* context, int64_t task) { (*(const Body*)context)(task); }, &body);
    return;
  }
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

// The threads that are worth waking for so many vector operations: each takes at least about 0.05 ms of them.
SELECTRA_INLINE int64_t threads_for(int64_t threads, int64_t vector_operations) {
  constexpr int64_t kOperationsPerThread = 100000;
  const int64_t worth = smaller(threads, vector_operations / kOperationsPerThread);
  return worth > 1 ? useful_threads(worth) : 1;
}

// Part `part` of `parts` about equal parts of 0 ... count begins here.
SELECTRA_INLINE int64_t part_begin(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

// Hands out pieces of one allocation. A first pass without memory adds the sizes up.
class Arena {
 public:
  explicit Arena(void* memory = nullptr) : memory_((char*)memory) {}

  template <typename Item>
  Item* take(int64_t count) {
    constexpr int64_t kCacheLine = 64;
    Item* piece = memory_ ? (Item*)(memory_ + used_) : nullptr;
    used_ += ((int64_t)sizeof(Item) * count + kCacheLine - 1) / kCacheLine * kCacheLine;
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// A workspace laid out in this thread's scratch memory; `Workspace` takes its pieces from an Arena.
template <typename Workspace, typename... Sizes>
SELECTRA_INLINE Workspace lay_out_workspace(Sizes... sizes) {
  Arena measure;
  Workspace(measure, sizes...);
  Arena arena(thread_workspace((uint64_t)measure.used()));
  return Workspace(arena, sizes...);
}

}  // namespace
}  // namespace selectra
