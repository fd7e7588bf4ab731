// Tells ThreadSanitizer, in a build with LORAKERN_RACES, what CUDA threads are and where they wait for each other, so
// that it reports races between them whatever order they ran in. Else nothing.
#pragma once
#include <cstddef>

#if defined(LORAKERN_RACES)

#include <sanitizer/tsan_interface.h>

extern "C" {
void __tsan_read_range(void* begin, unsigned long bytes);
void __tsan_write_range(void* begin, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace emulator::races {

constexpr bool kDetected = true;

inline void release(void* place) { __tsan_release(place); }  // what I did so far ...
inline void acquire(void* place) { __tsan_acquire(place); }  // ... happened before what I do from now on
inline void reads(const void* begin, size_t bytes) { __tsan_read_range(const_cast<void*>(begin), bytes); }
inline void writes(void* begin, size_t bytes) { __tsan_write_range(begin, bytes); }

// What no CUDA thread does.
struct Ignored {
  Ignored() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  Ignored(const Ignored&) = delete;
  ~Ignored() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

}  // namespace emulator::races

#else

namespace emulator::races {

constexpr bool kDetected = false;

inline void release(void*) {}
inline void acquire(void*) {}
inline void reads(const void*, size_t) {}
inline void writes(void*, size_t) {}

struct Ignored {
  Ignored() {}
};

}  // namespace emulator::races

inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
constexpr unsigned __tsan_switch_to_fiber_no_sync = 1;

#endif
