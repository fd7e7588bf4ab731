// Fibers: several stacks on one thread of the system, between which the program itself switches.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

// Whole pages of memory, with one before and one after them that faults when touched.
class Pages {
 public:
  explicit Pages(size_t bytes);
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages();
  char* begin() const { return begin_; }
  char* end() const { return begin_ + size_; }

 private:
  size_t size_;
  char* begin_;
};

#if defined(__x86_64__)
using Context = void*;  // the stack pointer: what a call preserves is on the stack
#else
using Context = ucontext_t;
#endif

class Fiber {
 public:
  Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();
  void prepare(void (*entry)());  // the next resume() calls entry, which never returns
  void resume();                  // goes on with it until it pauses
  void pause();                   // only by the fiber itself: back to where it was resumed

 private:
  static constexpr size_t kStack = 256 << 10;  // of addresses: only what is touched takes memory
  Pages stack_;
  Context context_;
  void* race_state_;  // ThreadSanitizer's
};

}  // namespace emulator
