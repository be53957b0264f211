// Counts the bytes of CPU tensors that are alive in this process.
#pragma once

#include "base/tensor.h"

#include <c10/core/CPUAllocator.h>

#include <mutex>
#include <unordered_map>

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
  int64_t peak() const { return peak_; }  // since the start, or grown()

  // The most bytes that were alive at once of those that came while f ran. What came before may go meanwhile: a collective that
  // has ended keeps its tensors for a moment.
  template <typename F>
  int64_t grown(const F& f) {
    {
      std::lock_guard lock(mutex_);
      ++round_, live_ = peak_ = 0;
    }
    f();
    return peak_;
  }

  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr memory = base_->allocate(bytes);
    void* place = memory.get();
    if (place == nullptr) return memory;
    std::lock_guard lock(mutex_);
    live_ += static_cast<int64_t>(bytes);
    peak_ = std::max(peak_, live_);
    blocks_.emplace(place, Block{std::move(memory), static_cast<int64_t>(bytes), round_});
    return {place, place, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  struct Block {
    c10::DataPtr memory;
    int64_t bytes;
    int round;
  };
  explicit TensorBytes(c10::Allocator* base) : base_(base) {}
  static void release(void* place) {
    TensorBytes& counted = install();
    std::lock_guard lock(counted.mutex_);
    auto block = counted.blocks_.extract(place);
    if (block.mapped().round == counted.round_) counted.live_ -= block.mapped().bytes;
  }

  c10::Allocator* base_;
  std::mutex mutex_;
  std::unordered_map<void*, Block> blocks_;
  int round_ = 0;
  int64_t live_ = 0, peak_ = 0;
};

}  // namespace trireme::test
