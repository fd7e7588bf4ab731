#include "faults.h"

#include <dlfcn.h>
#include <pthread.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL};
constexpr size_t kStack = 64 << 10;  // the fiber's own stack may be what ran over

void (*report)(const char*);
pthread_t launcher;

uintptr_t instruction_of(const void* context) {
#if defined(__x86_64__)
  return static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  return static_cast<const ucontext_t*>(context)->uc_mcontext.pc;
#else
  return 0;
#endif
}

void handle(int signal, siginfo_t* info, void* context) {
  if (!pthread_equal(pthread_self(), launcher)) abort();
  const uintptr_t instruction = instruction_of(context);
  Dl_info module;
  char text[600], where[400] = "";
  if (dladdr(reinterpret_cast<void*>(instruction), &module)) {
    const auto offset = instruction - reinterpret_cast<uintptr_t>(module.dli_fbase);
    snprintf(where, sizeof where, "; addr2line -Cfipe %s %#zx", module.dli_fname, static_cast<size_t>(offset));
  }
  if (signal == SIGILL) {  // how the compiler's -fsanitize=alignment,bounds stops a program
    snprintf(text, sizeof text, "misaligned address, or an index outside of its array%s", where);
  } else {
    snprintf(text, sizeof text, "no memory at %p%s", info->si_addr, where);
  }
  report(text);
}

}  // namespace

Faults::Faults(void (*function)(const char*)) {
  static char stack[kStack];
  report = function;
  launcher = pthread_self();
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof stack;
  sigaltstack(&alternate, &stack_before_);
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before_[i]);
}

Faults::~Faults() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  sigaltstack(&stack_before_, nullptr);
}

}  // namespace emulator
