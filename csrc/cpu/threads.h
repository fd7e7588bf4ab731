// The OpenMP runtime that the process already has (torch brings one), found by name: a second one would spin against
// it. GNU OpenMP's threads do not survive a fork: a forked child that asks for more than one thread hangs, in torch's
// own ops as in ours, unless it calls torch.set_num_threads(1) first, as the workers of a DataLoader do.
#pragma once
#include <atomic>
#include <cstdint>

namespace lorakern {

// True if an OpenMP runtime was found in the process; without one everything runs on the calling thread.
bool has_thread_pool();

// Call body(context) on `threads` threads at once, the caller among them, and wait for all.
void run_on_threads(int threads, void (*body)(void*), void* context);

// Call work(i) for every i < count, in any order, on up to `threads` threads.
template <typename Work>
void parallel_for(int threads, int64_t count, const Work& work) {
  struct Context {
    const Work* work;
    int64_t count;
    std::atomic<int64_t> next;
  } context{&work, count, {0}};
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  run_on_threads(
      threads,
      [](void* opaque) {
        Context& c = *static_cast<Context*>(opaque);
        for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.count;) (*c.work)(i);
      },
      &context);
}

}  // namespace lorakern
