// What the scheduler and those who watch the threads' accesses share.
#pragma once

#include "machine.h"

namespace emulator {

constexpr int kMaxWarps = kMaxThreads / kLanes;

// Two accesses are in order if one of these was counted up in between. They are never set back, so that what earlier
// blocks left in the records needs no clearing.
struct Barriers {
  unsigned of_block;
  unsigned of_warp[kMaxWarps];
};

extern Barriers barriers;
// Of the launch that runs.
extern int shared_bytes;

// An address of code as an offset in this library, which Python turns into a line of the source. Given the address
// that a call returns to, it is the place of the call.
long place(const void* code);

// Faults fail the launch from here on; and no longer.
void catch_faults();
void leave_faults();

}  // namespace emulator
