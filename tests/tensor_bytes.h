// Counts the bytes of CPU tensors that are alive in this process.
#pragma once

#include "base/tensor.h"

#include <c10/core/CPUAllocator.h>

#include <atomic>

namespace trireme::test {

// The usual allocator, counted. To be there before the first tensor that counts, and for good.
class TensorBytes final : public c10::Allocator {
 public:
  static TensorBytes& install() {
    static TensorBytes* counted = [] {
      auto* made = new TensorBytes(c10::GetCPUAllocator());
      c10::SetCPUAllocator(made, 255);
      return made;
    }();
    return *counted;
  }
  int64_t live() const { return live_; }
  int64_t peak() const { return peak_; }  // since the start, or reset_peak()
  void reset_peak() { peak_ = live_.load(); }

  // The most bytes more than before that were alive at once while f ran.
  template <typename F>
  int64_t grown(const F& f) {
    reset_peak();
    const int64_t before = live_;
    f();
    return peak_ - before;
  }

  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{this, base_->allocate(bytes), static_cast<int64_t>(bytes)};
    const int64_t now = live_ += block->bytes;
    for (int64_t most = peak_; now > most && !peak_.compare_exchange_weak(most, now);) {
    }
    return {block->memory.get(), block, &release, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  struct Block {
    TensorBytes* owner;
    c10::DataPtr memory;
    int64_t bytes;
  };
  explicit TensorBytes(c10::Allocator* base) : base_(base) {}
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    block->owner->live_ -= block->bytes;
    delete block;
  }

  c10::Allocator* base_;
  std::atomic<int64_t> live_{0}, peak_{0};
};

}  // namespace trireme::test
