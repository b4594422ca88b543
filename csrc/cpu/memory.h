// Scratch memory, and what happens when it runs out.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace natrain {

// Memory of one thread, aligned, that grows to the largest unit and is used again by the next.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  T* reserve(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
      capacity_ = data_ ? count : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Scratch memory may run out in any thread, and no exception may leave a parallel region.
class Failure {
 public:
  template <class F>
  void guard(F&& f) {
    if (has_failed_) return;
    try {
      f();
    } catch (const std::bad_alloc&) {
      has_failed_ = true;
    }
  }
  void raise() const {
    if (has_failed_) throw std::bad_alloc();
  }

 private:
  std::atomic<bool> has_failed_{false};
};

}  // namespace natrain
