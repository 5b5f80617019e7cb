// Arrays in a call's scratch memory, one after the other, 256-byte aligned. Without memory they are only counted.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastcompat::cuda {

class Scratch {
 public:
  explicit Scratch(void* memory) : at_(reinterpret_cast<uintptr_t>(memory)), begin_(at_) {}
  template <class T>
  T* take(int64_t count) {
    T* const array = reinterpret_cast<T*>(at_);
    at_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return array;
  }
  size_t bytes() const { return at_ - begin_; }

 private:
  uintptr_t at_, begin_;
};

}  // namespace fastcompat::cuda
