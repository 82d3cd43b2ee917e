// Turns a fault of a kernel, such as a load through a wild pointer, into a failed launch.
#include <signal.h>
#include <stdio.h>
#include <ucontext.h>

#include "accesses.h"

namespace emulator {

namespace {

// The fault may be that a thread's own stack is full.
alignas(16) unsigned char stack_of_handler[64 * 1024];
stack_t stack_before;
struct sigaction segv_before, bus_before;

const void* code_of(const void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
#elif defined(__aarch64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc + 1);
#else
  return nullptr;
#endif
}

void fail_launch(int, siginfo_t* info, void* context) {
  char text[256];
  snprintf(text, sizeof text, "fault at [0x%lx]: no memory at address %p, or the stack of the thread is full",
           place(code_of(context)), info->si_addr);
  fail(text);
}

}  // namespace

void catch_faults() {
  stack_t stack = {};
  stack.ss_sp = stack_of_handler;
  stack.ss_size = sizeof stack_of_handler;
  sigaltstack(&stack, &stack_before);
  struct sigaction action = {};
  action.sa_sigaction = fail_launch;
  // The handler does not return, so the signal must not stay blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv_before);
  sigaction(SIGBUS, &action, &bus_before);
}

void leave_faults() {
  sigaction(SIGSEGV, &segv_before, nullptr);
  sigaction(SIGBUS, &bus_before, nullptr);
  sigaltstack(&stack_before, nullptr);
}

}  // namespace emulator
