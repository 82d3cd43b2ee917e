// The threads that share the tasks of a call: one pool a process, started as calls ask for them and kept.
//
// They wait asleep: a waiting thread costs a busy machine nothing, and a call goes on without those that wake too late.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "call.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace selectra {
namespace {

class Pool {
 public:
  void run(int64_t tasks, int64_t threads, TaskBody body, const void* context) {
    // One call at a time: another, from another thread, does its tasks itself.
    std::unique_lock<std::mutex> owner(calls_, std::try_to_lock);
    if (!owner.owns_lock()) {
      for (int64_t task = 0; task < tasks; ++task) body(context, task);
      return;
    }
    const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
    {
      std::lock_guard<std::mutex> guard(state_);
      start(helpers);
      body_ = body, context_ = context, tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      places_ = helpers;
    }
    for (int64_t i = 0; i < helpers; ++i) wake_.notify_one();
    work();
    std::unique_lock<std::mutex> guard(state_);
    places_ = 0;
    idle_.wait(guard, [this] { return working_ == 0; });
  }

 private:
  void start(int64_t wanted) {
    for (; started_ < wanted; ++started_) {
      try {
        std::thread(&Pool::serve, this).detach();
      } catch (const std::system_error&) {
        return;
      }
    }
  }

  void serve() {
    std::unique_lock<std::mutex> guard(state_);
    for (;;) {
      wake_.wait(guard, [this] { return places_ > 0; });
      --places_;
      ++working_;
      guard.unlock();
      work();
      guard.lock();
      if (--working_ == 0) idle_.notify_one();
    }
  }

  void work() {
    for (int64_t task; (task = next_.fetch_add(1)) < tasks_;) body_(context_, task);
  }

  std::mutex calls_, state_;
  std::condition_variable wake_, idle_;
  // Threads that there are, that may still join the call, and that are at work on it.
  int64_t started_ = 0, places_ = 0, working_ = 0;
  std::atomic<int64_t> next_{0};
  TaskBody body_ = nullptr;
  const void* context_ = nullptr;
  int64_t tasks_ = 0;
};

// Never destroyed: its threads may wait until the process ends.
alignas(Pool) char memory[sizeof(Pool)];

Pool* make_pool() {
#if defined(__unix__) || defined(__APPLE__)
  // A forked child has none of the threads and perhaps a locked mutex: it begins anew.
  pthread_atfork(nullptr, nullptr, [] { new (memory) Pool; });
#endif
  return new (memory) Pool;
}

}  // namespace

void run_tasks(int64_t tasks, int64_t threads, TaskBody body, const void* context) {
  static Pool* const pool = make_pool();
  pool->run(tasks, threads, body, context);
}

}  // namespace selectra
