#include "threads.h"

#include <dlfcn.h>

namespace lorakern {
namespace {

// The entry point of `#pragma omp parallel` in GNU OpenMP, which LLVM's and Intel's runtimes export too.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel find_parallel() {
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

bool has_thread_pool() { return find_parallel() != nullptr; }

void run_on_threads(int threads, void (*body)(void*), void* context) {
  if (const Parallel parallel = find_parallel())
    parallel(body, context, static_cast<unsigned>(threads), 0);
  else
    body(context);
}

}  // namespace lorakern
