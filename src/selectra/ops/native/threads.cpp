// The threads that share the tasks of a call: OpenMP's where the build has it, else one pool a process.
//
// On Linux it is OpenMP: torch brings the same library, so that both wake the same threads, and on eight free cores a
// call was up to 1.6 times as fast as on a pool that waited asleep. Where other work keeps the cores busy it is the
// other way round: OpenMP waits for the last of its threads even if it has nothing to do, the pool does not. Outside
// Linux a second OpenMP beside torch's can crash.
#include "call.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace selectra {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace
}  // namespace selectra

#if defined(_OPENMP)

namespace selectra {

void run_tasks(int64_t tasks, int64_t threads, TaskBody body, const void* context) {
  // One after another as threads become free: tasks differ in length, cores in what else they do.
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)(threads < tasks ? threads : tasks))
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

}  // namespace selectra

#else

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace selectra {
namespace {

// Looks before a waiting thread goes to sleep: some tens of microseconds, about what waking it takes.
constexpr int kLooks = 1000;

class Pool {
 public:
  void run(int64_t tasks, int64_t threads, TaskBody body, const void* context) {
    // One call at a time: another, from another thread, does its tasks itself.
    std::unique_lock<std::mutex> owner(calls_, std::try_to_lock);
    if (!owner.owns_lock()) {
      for (int64_t task = 0; task < tasks; ++task) body(context, task);
      return;
    }
    bool asleep;
    {
      std::lock_guard<std::mutex> guard(state_);
      const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
      start(helpers);
      body_ = body, context_ = context, tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      places_ = helpers;
      asleep = sleepers_ > 0;
    }
    if (asleep) wake_.notify_all();
    work();
    // Threads that wake too late find no place: the call does not wait for them.
    {
      std::lock_guard<std::mutex> guard(state_);
      places_ = 0;
    }
    for (int look = 0; look < kLooks && working_ > 0; ++look) pause();
    std::unique_lock<std::mutex> guard(state_);
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
    for (;;) {
      for (int look = 0; look < kLooks && places_ == 0; ++look) pause();
      std::unique_lock<std::mutex> guard(state_);
      ++sleepers_;
      wake_.wait(guard, [this] { return places_ > 0; });
      --sleepers_;
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
  // Places in the call that threads may still take, and threads at work on it: written under the lock alone.
  std::atomic<int64_t> places_{0}, working_{0};
  // Threads that there are, and that wait for a place.
  int64_t started_ = 0, sleepers_ = 0;
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

#endif

namespace selectra {

void await_flag(const int32_t* flag) {
  // The other thread runs, or waits for this core.
  for (int look = 0; !__atomic_load_n(flag, __ATOMIC_ACQUIRE); ++look) {
    pause();
#if defined(__unix__) || defined(__APPLE__)
    if (look % 256 == 255) sched_yield();
#endif
  }
}

int64_t useful_threads(int64_t wanted) {
#if defined(__linux__)
  // Asked at every call: the cores of a process change, and it takes a quarter of a microsecond. More than 1024 cores
  // are no answer, and no limit.
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0 && CPU_COUNT(&cores) < wanted) return CPU_COUNT(&cores);
#elif !defined(_OPENMP)
  const int64_t cores = std::thread::hardware_concurrency();
  if (cores > 0 && cores < wanted) return cores;
#endif
  return wanted;
}

}  // namespace selectra
