// Turns what a kernel may not do with an address into a call, while an object of this class lives.
#pragma once
#include <signal.h>

namespace emulator {

class Faults {
 public:
  // report is called by the code that faulted and must not return.
  explicit Faults(void (*report)(const char* what));
  Faults(const Faults&) = delete;
  Faults& operator=(const Faults&) = delete;
  ~Faults();

 private:
  struct sigaction before_[3];
  stack_t stack_before_;
};

}  // namespace emulator
