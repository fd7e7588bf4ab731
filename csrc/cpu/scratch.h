// A buffer that a thread keeps from call to call, aligned to a cache line.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace lorakern::cpu {

template <typename T>
class Scratch {
 public:
  T* get(int64_t count) {
    if (count > capacity_) {
      void* memory = std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64);
      if (!memory) throw std::bad_alloc();
      data_.reset(static_cast<T*>(memory));
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

}  // namespace lorakern::cpu
