// The scheduler: which thread runs next, and whether those that meet belong together.
#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "accesses.h"
#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

Current current;
alignas(128) unsigned char shared_memory[kMaxSharedBytes + kGuardBytes];

namespace {

constexpr unsigned char kPoison = 0xff;  // as float32, bfloat16 and float16: NaN

struct Thread {
  Fiber fiber;
  unsigned char* stack;
  Meeting at;
};

// The lanes of a warp run in the order first, first + stride, ... (mod 32).
struct Turn {
  int warp, first, stride, done;
};

Fiber scheduler;
Thread threads[kMaxThreads];
Turn turn;
Body body;
const void* argument;
uint64_t random_state;
bool failed;
char message[1024];

bool shuffled() { return random_state != 0; }

// Below limit; xorshift64*.
unsigned draw(unsigned limit) {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return unsigned((random_state * 0x2545f4914f6cdd1dull) >> 32) % limit;
}

__attribute__((format(printf, 1, 2))) void report(const char* format, ...) {
  if (failed) return;
  failed = true;
  int written = snprintf(message, sizeof message, "block (%d, %d, %d): ", current.block[0], current.block[1],
                         current.block[2]);
  va_list values;
  va_start(values, format);
  vsnprintf(message + written, sizeof message - written, format, values);
  va_end(values);
}

const char* place_of(const Meeting& meeting, char (&text)[256]) {
  if (meeting.name == nullptr) return "has returned";
  const char* slash = strrchr(meeting.site.file, '/');
  snprintf(text, sizeof text, "%s (%s:%d)", meeting.name, slash ? slash + 1 : meeting.site.file, meeting.site.line);
  return text;
}

bool same(const Meeting& a, const Meeting& b) {
  // One literal has one address in a library; comparing the text would be half of the time of a warp operation.
  return a.name == b.name && a.site.line == b.site.line && a.site.file == b.site.file;
}

Thread& lane_of(int warp, int lane) { return threads[warp * kLanes + lane]; }

void enter_kernel() {
  body(argument);
  meet(Meeting{});
}

void start_threads(int count) {
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    if (thread.stack == nullptr) thread.stack = new_stack();
#if defined(__SANITIZE_ADDRESS__)
    // A launch that failed leaves the frames of its threads behind.
    ASAN_UNPOISON_MEMORY_REGION(thread.stack, kStackBytes);
#endif
    thread.fiber.start(thread.stack, enter_kernel);
  }
}

void resume_next_lane(Fiber& from) {
  const int lane = (turn.first + turn.done * turn.stride) % kLanes;
  current.thread = turn.warp * kLanes + lane;
  from.switch_to(threads[current.thread].fiber);
}

// Lets each lane run to its next meeting; the last one comes back here.
void run_lanes(int warp) {
  turn = {warp, 0, 1, 0};
  if (shuffled()) {
    turn.first = draw(kLanes);
    turn.stride = 2 * draw(kLanes / 2) + 1;
  }
  resume_next_lane(scheduler);
}

// Of the places where members stand the one where most do; the first of those that stand elsewhere is `astray`.
template <typename Place>
int most_common(int count, int& astray, const Place& place) {
  int best = 0, best_votes = 0;
  for (int i = 0; i < count; ++i) {
    int votes = 0;
    for (int j = 0; j < count; ++j) votes += same(place(i), place(j));
    // Who returned is the odd one out, however many did.
    if (place(i).name == nullptr) votes = 1;
    if (votes > best_votes) best = i, best_votes = votes;
  }
  for (astray = 0; astray < count && same(place(astray), place(best));) ++astray;
  return best;
}

template <typename Place>
void report_astray(const char* member, int warp, int count, const Place& place) {
  int astray;
  const int best = most_common(count, astray, place);
  char there[256], here[256], where[32] = "";
  if (warp >= 0) snprintf(where, sizeof where, " of warp %d", warp);
  report("%s %d%s did not take part in %s: it %s%s", member, astray, where, place_of(place(best), there),
         place(astray).name ? "is at " : "", place_of(place(astray), here));
}

// All lanes stand at the same meeting; does the operation of a warp.
void hold_meeting(int warp) {
  const Meeting& first = lane_of(warp, 0).at;
  bool together = true;
  for (int lane = 1; lane < kLanes; ++lane) together = together && same(first, lane_of(warp, lane).at);
  if (!together) {
    report_astray("lane", warp, kLanes, [&](int lane) -> const Meeting& { return lane_of(warp, lane).at; });
    return;
  }
  if (first.operation == nullptr) {
    // A barrier; data that lanes hand each other in an operation puts nothing else in order.
    ++barriers.of_warp[warp];
    return;
  }
  void* operands[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) operands[lane] = lane_of(warp, lane).at.operands;
  first.operation(operands);
}

bool waits(const Meeting& meeting) { return meeting.name == nullptr || meeting.of_block; }

// Runs all warps until each waits for the others. In a drawn order they overtake each other at warp operations.
void run_warps(int n_warps) {
  int running[kMaxWarps], n_running = n_warps;
  for (int i = 0; i < n_warps; ++i) running[i] = i;
  int chosen = 0;
  while (n_running > 0 && !failed) {
    if (shuffled() && draw(8) == 0) chosen = draw(n_running);
    run_lanes(running[chosen]);
    if (failed) return;
    hold_meeting(running[chosen]);
    if (!waits(lane_of(running[chosen], 0).at)) continue;
    // The order of those that remain is kept.
    for (int i = chosen + 1; i < n_running; ++i) running[i - 1] = running[i];
    --n_running;
    chosen = shuffled() && n_running > 0 ? draw(n_running) : 0;
  }
}

void run_block(const Launch& launch) {
  const int n_warps = launch.threads / kLanes;
  ++current.serial;
  memset(shared_memory, kPoison, launch.shared_bytes + kGuardBytes);
  start_threads(launch.threads);
  auto place = [](int warp) -> const Meeting& { return lane_of(warp, 0).at; };
  bool returned = false;
  while (!failed && !returned) {
    ++barriers.of_block;
    run_warps(n_warps);
    bool together = true;
    for (int warp = 1; warp < n_warps; ++warp) together = together && same(place(0), place(warp));
    if (!failed && !together) report_astray("warp", -1, n_warps, place);
    returned = place(0).name == nullptr;
  }
  for (int i = 0; i < kGuardBytes && !failed; ++i) {
    if (shared_memory[launch.shared_bytes + i] != kPoison) {
      report("byte %d of shared memory was written, the launch has %d bytes", launch.shared_bytes + i,
             launch.shared_bytes);
    }
  }
}

int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

// What the hardware refuses.
bool refused(const Launch& launch) {
  current = {0, {0, 0, 0}, {0, 0, 0}, current.serial};
  const int* grid = launch.grid;
  if (launch.threads < kLanes || launch.threads > kMaxThreads || launch.threads % kLanes != 0) {
    report("%d threads, a block has 32 to %d in whole warps", launch.threads, kMaxThreads);
  } else if (launch.shared_bytes < 0 || launch.shared_bytes > kMaxSharedBytes) {
    report("%d bytes of shared memory, a block has at most %d", launch.shared_bytes, kMaxSharedBytes);
  } else if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || grid[1] > 65535 || grid[2] > 65535) {
    report("grid (%d, %d, %d), it has at least 1 block each way and at most 65535 in y and z", grid[0], grid[1],
           grid[2]);
  }
  return failed;
}

}  // namespace

void meet(const Meeting& meeting) {
  Fiber& mine = threads[current.thread].fiber;
  threads[current.thread].at = meeting;
  if (++turn.done < kLanes) {
    resume_next_lane(mine);
  } else {
    mine.switch_to(scheduler);
  }
}

void fail(const char* text) {
  report("thread %d: %s", current.thread, text);
  // This thread is never resumed.
  threads[current.thread].fiber.switch_to(scheduler);
}

const char* wrong_words(int got, int wanted) {
  snprintf(message, sizeof message, "the call has %d words, the kernel's argument %d", got, wanted);
  return message;
}

// A process may have 65,530 pieces of memory on Linux, two of them a stack, and every source keeps stacks of its own.
void free_stacks() {
  for (auto& thread : threads) {
    if (thread.stack != nullptr) free_stack(thread.stack);
    thread.stack = nullptr;
  }
}

const char* run(const Launch& launch, Body kernel, const void* call) {
  failed = false;
  if (refused(launch)) return message;
  body = kernel;
  argument = call;
  shared_bytes = launch.shared_bytes;
  random_state = launch.seed * 0x9e3779b97f4a7c15ull;
  const int64_t n_blocks = int64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  int64_t index = 0, stride = 1;
  if (shuffled()) {
    index = draw(n_blocks < 1000000 ? n_blocks : 1000000);
    do stride = 1 + draw(1000000); while (common_divisor(stride, n_blocks) != 1);
  }
#if !defined(__SANITIZE_ADDRESS__)
  catch_faults();
#endif
  memcpy(current.grid, launch.grid, sizeof current.grid);
  for (int64_t done = 0; done < n_blocks && !failed; ++done) {
    current.block[0] = index % launch.grid[0];
    current.block[1] = index / launch.grid[0] % launch.grid[1];
    current.block[2] = index / launch.grid[0] / launch.grid[1];
    run_block(launch);
    index = (index + stride) % n_blocks;
  }
  free_stacks();
#if !defined(__SANITIZE_ADDRESS__)
  leave_faults();
#endif
  return failed ? message : nullptr;
}

}  // namespace emulator
