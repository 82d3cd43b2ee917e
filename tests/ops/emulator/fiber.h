// Stacks and the switch between them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#if !(defined(__x86_64__) && defined(__ELF__))
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t kStackBytes = 512 * 1024;
constexpr size_t kGuardPage = 64 * 1024;

// A stack whose pages exist once they are touched; running over its end is a fault, not a wrong number.
inline unsigned char* new_stack() {
  void* pages = mmap(nullptr, kGuardPage + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  mprotect(pages, kGuardPage, PROT_NONE);
  return static_cast<unsigned char*>(pages) + kGuardPage;
}

inline void free_stack(unsigned char* stack) { munmap(stack - kGuardPage, kGuardPage + kStackBytes); }

#if defined(__x86_64__) && defined(__ELF__)

// ucontext saves the signal mask by a system call at every switch; here a switch is a dozen instructions.
extern "C" void emulator_switch(void** saved_stack_pointer, void* stack_pointer);
asm(R"(
  .text
  .type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_switch, . - emulator_switch
)");

struct Fiber {
  void* stack_pointer;

  void start(unsigned char* stack, void (*entry)()) {
    // A return address for the entry that is never used, the entry, and six saved registers.
    uintptr_t* top = reinterpret_cast<uintptr_t*>(stack + kStackBytes);
    for (int i = 1; i <= 8; ++i) top[-i] = 0;
    top[-2] = reinterpret_cast<uintptr_t>(entry);
    stack_pointer = top - 8;
  }

  void switch_to(Fiber& other) { emulator_switch(&stack_pointer, other.stack_pointer); }
};

#else

struct Fiber {
  ucontext_t context;

  void start(unsigned char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }

  void switch_to(Fiber& other) { swapcontext(&context, &other.context); }
};

#endif

}  // namespace emulator
