// Memory that a thread keeps between calls: mapping large temporaries afresh costs more than filling them.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace entrenar {

class Workspace {
 public:
  // At least `bytes` bytes, aligned for any vector; what was there before is lost.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(operator new(bytes, kAlignment));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const { operator delete(memory, kAlignment); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

}  // namespace entrenar
