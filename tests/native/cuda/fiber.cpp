#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "races.h"

namespace emulator {
namespace {

constexpr size_t kPage = 4096;

// Of whoever resumed the fiber that runs.
Context resumer;
void* resumer_race_state;

}  // namespace

Pages::Pages(size_t bytes) : size_((bytes + kPage - 1) / kPage * kPage) {
  void* all = mmap(nullptr, size_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  begin_ = static_cast<char*>(all) + kPage;
  if (size_ > 0 && mprotect(begin_, size_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

Pages::~Pages() { munmap(begin_ - kPage, size_ + 2 * kPage); }

#if defined(__x86_64__)

// Saves the registers that a call preserves on the stack, and the stack pointer at *save; continues where load was
// saved.
extern "C" void lorakern_emulator_switch(Context* save, Context load);
asm(R"(
  .text
  .hidden lorakern_emulator_switch
  .globl lorakern_emulator_switch
  .type lorakern_emulator_switch, @function
lorakern_emulator_switch:
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
  .size lorakern_emulator_switch, . - lorakern_emulator_switch
)");

static void switch_context(Context& save, Context& load) { lorakern_emulator_switch(&save, load); }

static void make_context(Context& context, const Pages& stack, void (*entry)()) {
  constexpr int kSaved = 6;
  // Stacks that begin at the same place of a page would compete for the same lines of the cache.
  static unsigned color = 0;
  char* begin = stack.end() - color++ % (kPage / 64) * 64;
  auto* top = reinterpret_cast<uintptr_t*>(begin) - 3;  // aligned as after a call
  top[0] = 0;                                           // the return address of entry: the stack ends here
  top[-1] = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < kSaved; ++i) top[-2 - i] = 0;
  context = top - 1 - kSaved;
}

#else

static void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }

static void make_context(Context& context, const Pages& stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack.begin();
  context.uc_stack.ss_size = stack.end() - stack.begin();
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

Fiber::Fiber() : stack_(kStack), race_state_(__tsan_create_fiber(0)) {}

Fiber::~Fiber() { __tsan_destroy_fiber(race_state_); }

void Fiber::prepare(void (*entry)()) { make_context(context_, stack_, entry); }

void Fiber::resume() {
  resumer_race_state = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(race_state_, __tsan_switch_to_fiber_no_sync);
  switch_context(resumer, context_);
}

void Fiber::pause() {
  __tsan_switch_to_fiber(resumer_race_state, __tsan_switch_to_fiber_no_sync);
  switch_context(context_, resumer);
}

}  // namespace emulator
