// What is added to the end of a preprocessed source: the functions that Python calls.
#pragma once

namespace emulator {

template <typename Call, void (*kernel)(Call)>
void call_kernel(const void* call) {
  kernel(*static_cast<const Call*>(call));
}

// The type of a kernel's only argument.
template <typename Call>
Call argument_of(void (*kernel)(Call));

}  // namespace emulator

// One for each kernel.
#define EMULATOR_ENTRY(kernel)                                                                         \
  extern "C" __attribute__((visibility("default"))) const char* emulator_run_##kernel(                 \
      const emulator::Launch* launch, const long long* words, int count) {                             \
    typedef decltype(emulator::argument_of(kernel)) Call;                                              \
    static_assert(sizeof(Call) % 8 == 0, "the argument of a kernel is a struct of 64-bit words");      \
    if (count * 8 != sizeof(Call)) return emulator::wrong_words(count, sizeof(Call) / 8);              \
    return emulator::run(*launch, emulator::call_kernel<Call, kernel>, words);                         \
  }
