#include "comm/operation.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "comm/flight_recorder.h"

namespace trireme {

namespace {

constexpr int64_t kPieceBytes = 4 << 20;      // of the tensor; keeps what is exchanged and joined in the caches
constexpr int64_t kDirectBytes = 32 << 10;    // received by one rank: up to here one round of messages beats two
constexpr int64_t kAlign = 64;                // parts of a piece begin on cache lines

// Receive buffers, kept for the next operation: fresh memory would cost a page fault every 4 KB.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }
  char* take(int64_t num_bytes) {
    if (num_bytes <= size_) return data_.get();
    release();
    {
      std::lock_guard lock(pool().mutex);
      auto& free = pool().buffers;
      auto best = free.end();
      for (auto it = free.begin(); it != free.end(); ++it)
        if (it->second >= num_bytes && (best == free.end() || it->second < best->second)) best = it;
      if (best != free.end()) {
        data_ = std::move(best->first);
        size_ = best->second;
        free.erase(best);
        return data_.get();
      }
    }
    size_ = num_bytes;
    data_ = std::make_unique_for_overwrite<char[]>(static_cast<size_t>(num_bytes));
    return data_.get();
  }
  void release() {
    if (size_ >= kDirectBytes) {
      std::lock_guard lock(pool().mutex);
      if (pool().buffers.size() < 8) pool().buffers.emplace_back(std::move(data_), size_);
    }
    data_.reset();
    size_ = 0;
  }

 private:
  struct Pool {
    std::mutex mutex;
    std::vector<std::pair<std::unique_ptr<char[]>, int64_t>> buffers;
  };
  static Pool& pool() {
    static Pool* pool = new Pool;  // never destroyed: the background thread may outlive main()
    return *pool;
  }
  std::unique_ptr<char[]> data_;
  int64_t size_ = 0;
};

class AllReduce : public CommOperation {
 public:
  AllReduce(const Exchange& e, CommType type, ReduceOp op, void* data, int64_t n)
      : CommOperation(e.group),
        e_(e),
        type_(type),
        op_(op),
        data_(static_cast<char*>(data)),
        num_bytes_(n * comm_type_bytes(type)) {
    direct_ = num_bytes_ * (e.group->size() - 1) <= kDirectBytes;
  }

 protected:
  bool advance() override {
    if (e_.group->size() == 1) return true;
    for (;;) switch (state_) {
      case kBegin:
        if (begin_ == num_bytes_) return true;
        direct_ ? send_all() : scatter();
        state_ = kScattered;
        break;
      case kScattered:
        if (!requests_.test()) return false;
        join();
        if (direct_) return true;
        gather();
        state_ = kGathered;
        break;
      case kGathered:
        if (!requests_.test()) return false;
        begin_ += length_;
        state_ = kBegin;
        break;
    }
  }

 private:
  // Part p of the present piece, in bytes from begin_.
  int64_t part_begin(int p) const { return std::min(length_, p * stride_); }
  int64_t part_bytes(int p) const { return part_begin(p + 1) - part_begin(p); }

  void send_all() {
    const int n = e_.group->size(), me = e_.group->rank();
    length_ = stride_ = num_bytes_;
    received_ = scratch_.take(num_bytes_ * n);
    for (int i = 1; i < n; ++i) {
      requests_.receive(received_ + ((me + i) % n) * num_bytes_, num_bytes_, (me + i) % n, e_.tag);
      requests_.send(data_, num_bytes_, (me + n - i) % n, e_.tag);
    }
  }
  void scatter() {
    const int n = e_.group->size(), me = e_.group->rank();
    length_ = std::min(kPieceBytes, num_bytes_ - begin_);
    stride_ = ((length_ + n - 1) / n + kAlign - 1) / kAlign * kAlign;
    received_ = scratch_.take(stride_ * n);
    for (int i = 1; i < n; ++i) {
      const int from = (me + i) % n, to = (me + n - i) % n;
      requests_.receive(received_ + from * stride_, part_bytes(me), from, e_.tag);
      requests_.send(data_ + begin_ + part_begin(to), part_bytes(to), to, e_.tag);
    }
  }
  void join() {
    const int n = e_.group->size(), me = e_.group->rank();
    char* mine = data_ + begin_ + (direct_ ? 0 : part_begin(me));
    const int64_t bytes = direct_ ? num_bytes_ : part_bytes(me);
    std::vector<const void*> parts;
    for (int p = 0; p < n; ++p) parts.push_back(p == me ? mine : received_ + p * stride_);
    reduce_parts(type_, op_, parts, mine, bytes / comm_type_bytes(type_));
  }
  void gather() {
    const int n = e_.group->size(), me = e_.group->rank();
    for (int i = 1; i < n; ++i) {
      const int from = (me + i) % n, to = (me + n - i) % n;
      requests_.receive(data_ + begin_ + part_begin(from), part_bytes(from), from, e_.tag);
      requests_.send(data_ + begin_ + part_begin(me), part_bytes(me), to, e_.tag);
    }
  }

  enum State { kBegin, kScattered, kGathered };
  Exchange e_;
  CommType type_;
  ReduceOp op_;
  char* data_;
  int64_t num_bytes_, begin_ = 0, length_ = 0, stride_ = 0;
  bool direct_;
  State state_ = kBegin;
  Scratch scratch_;
  char* received_ = nullptr;
};

class ReduceScatter : public CommOperation {
 public:
  ReduceScatter(const Exchange& e, CommType type, ReduceOp op, void* output, const void* input, int64_t n)
      : CommOperation(e.group), e_(e), type_(type), op_(op), output_(static_cast<char*>(output)),
        input_(static_cast<const char*>(input)), part_bytes_(n * comm_type_bytes(type)) {}

 protected:
  bool advance() override {
    const int n = e_.group->size(), me = e_.group->rank();
    if (n == 1) {
      if (output_ != input_) std::memcpy(output_, input_, static_cast<size_t>(part_bytes_));
      return true;
    }
    for (;;) {
      if (posted_) {
        if (!requests_.test()) return false;
        std::vector<const void*> parts;
        for (int p = 0; p < n; ++p)
          parts.push_back(p == me ? input_ + me * part_bytes_ + begin_ : received_ + p * length_);
        reduce_parts(type_, op_, parts, output_ + begin_, length_ / comm_type_bytes(type_));
        begin_ += length_;
      }
      if (begin_ == part_bytes_) return true;
      length_ = std::min(std::max<int64_t>(kPieceBytes / n / kAlign * kAlign, kAlign), part_bytes_ - begin_);
      received_ = scratch_.take(length_ * n);
      for (int i = 1; i < n; ++i) {
        const int from = (me + i) % n, to = (me + n - i) % n;
        requests_.receive(received_ + from * length_, length_, from, e_.tag);
        requests_.send(input_ + to * part_bytes_ + begin_, length_, to, e_.tag);
      }
      posted_ = true;
    }
  }

 private:
  Exchange e_;
  CommType type_;
  ReduceOp op_;
  char* output_;
  const char* input_;
  int64_t part_bytes_, begin_ = 0, length_ = 0;
  bool posted_ = false;
  Scratch scratch_;
  char* received_ = nullptr;
};

// Down a binomial tree, by pieces: a rank hands one on while it receives the next.
class Broadcast : public CommOperation {
 public:
  Broadcast(const Exchange& e, void* data, int64_t num_bytes, int root)
      : CommOperation(e.group), tag_(e.tag), data_(static_cast<char*>(data)), num_bytes_(num_bytes) {
    const int n = e.group->size(), from_root = (e.group->rank() - root + n) % n;
    auto rank_of = [&](int place) { return (place + root) % n; };
    int below = 1;  // the places from_root + 1, + 2, + 4, ... before the next that hangs on the same parent
    while (below < n && (from_root & below) == 0) below *= 2;
    if (from_root > 0) parent_ = rank_of(from_root - below);
    while ((below /= 2) > 0)
      if (from_root + below < n) children_.push_back(rank_of(from_root + below));
  }

 protected:
  bool advance() override {
    for (;;) {
      if (!requests_.test()) return false;
      if (sent_ == num_bytes_) return true;
      for (int child : children_) requests_.send(data_ + sent_, received_ - sent_, child, tag_);
      sent_ = received_;
      const int64_t next = std::min(kPieceBytes, num_bytes_ - received_);
      if (parent_ >= 0) requests_.receive(data_ + received_, next, parent_, tag_);
      received_ += next;
    }
  }

 private:
  const int tag_;
  char* const data_;
  const int64_t num_bytes_;
  int64_t received_ = 0, sent_ = 0;
  int parent_ = -1;
  std::vector<int> children_;
};

// Round r: a byte to the rank 2^r further on. After log2(n) of them each has heard of all.
class Barrier : public CommOperation {
 public:
  explicit Barrier(const Exchange& e) : CommOperation(e.group), e_(e) {}

 protected:
  bool advance() override {
    const int n = e_.group->size(), me = e_.group->rank();
    for (;; distance_ *= 2) {
      if (!requests_.test()) return false;
      if (distance_ >= n) return true;
      requests_.receive(&received_, 1, (me + n - distance_) % n, e_.tag);
      requests_.send(&sent_, 1, (me + distance_) % n, e_.tag);
    }
  }

 private:
  const Exchange e_;
  int distance_ = 1;
  char received_ = 0;
  const char sent_ = 1;
};

// Begins where it is moved on, not where it is started: the copy of this rank's part, into memory that may be fresh, is the
// background thread's business as well.
class AllGather : public CommOperation {
 public:
  AllGather(const Exchange& e, void* output, const void* input, int64_t num_part_bytes)
      : CommOperation(e.group), e_(e), output_(static_cast<char*>(output)), input_(input), num_part_bytes_(num_part_bytes) {}

 protected:
  bool advance() override {
    const int n = e_.group->size(), me = e_.group->rank();
    if (!posted_) {
      posted_ = true;
      for (int i = 1; i < n; ++i) {
        requests_.receive(output_ + ((me + i) % n) * num_part_bytes_, num_part_bytes_, (me + i) % n, e_.tag);
        requests_.send(input_, num_part_bytes_, (me + n - i) % n, e_.tag);
      }
      char* mine = output_ + me * num_part_bytes_;
      if (mine != input_ && num_part_bytes_ > 0) std::memcpy(mine, input_, static_cast<size_t>(num_part_bytes_));
    }
    return requests_.test();
  }

 private:
  Exchange e_;
  char* output_;
  const void* input_;
  int64_t num_part_bytes_;
  bool posted_ = false;
};

// Everything is posted at once; done when it has arrived.
class OneRound : public CommOperation {
 public:
  explicit OneRound(const Exchange& e) : CommOperation(e.group) {}
  MpiRequests& requests() { return requests_; }

 protected:
  bool advance() override { return requests_.test(); }
};

}  // namespace

std::shared_ptr<CommOperation> make_all_reduce(const Exchange& e, CommType type, ReduceOp op, void* data, int64_t n) {
  return std::make_shared<AllReduce>(e, type, op, data, n);
}

std::shared_ptr<CommOperation> make_reduce_scatter(const Exchange& e, CommType type, ReduceOp op, void* output,
                                                   const void* input, int64_t n) {
  return std::make_shared<ReduceScatter>(e, type, op, output, input, n);
}

std::shared_ptr<CommOperation> make_all_gather(const Exchange& e, void* output, const void* input,
                                               int64_t num_part_bytes) {
  return std::make_shared<AllGather>(e, output, input, num_part_bytes);
}

std::shared_ptr<CommOperation> make_all_to_all(const Exchange& e, void* output, const void* input,
                                               int64_t num_part_bytes) {
  auto operation = std::make_shared<OneRound>(e);
  const int n = e.group->size(), me = e.group->rank();
  char* out = static_cast<char*>(output);
  const char* in = static_cast<const char*>(input);
  if (num_part_bytes > 0)
    std::memcpy(out + me * num_part_bytes, in + me * num_part_bytes, static_cast<size_t>(num_part_bytes));
  for (int i = 1; i < n; ++i) {
    const int from = (me + i) % n, to = (me + n - i) % n;
    operation->requests().receive(out + from * num_part_bytes, num_part_bytes, from, e.tag);
    operation->requests().send(in + to * num_part_bytes, num_part_bytes, to, e.tag);
  }
  return operation;
}

std::shared_ptr<CommOperation> make_broadcast(const Exchange& e, void* data, int64_t num_bytes, int root) {
  return std::make_shared<Broadcast>(e, data, num_bytes, root);
}

std::shared_ptr<CommOperation> make_barrier(const Exchange& e) { return std::make_shared<Barrier>(e); }

std::shared_ptr<CommOperation> make_send(const Exchange& e, const void* data, int64_t num_bytes, int to) {
  auto operation = std::make_shared<OneRound>(e);
  operation->requests().send(data, num_bytes, to, e.tag);
  return operation;
}

std::shared_ptr<CommOperation> make_receive(const Exchange& e, void* data, int64_t num_bytes, int from) {
  auto operation = std::make_shared<OneRound>(e);
  operation->requests().receive(data, num_bytes, from, e.tag);
  return operation;
}

bool CommOperation::try_advance() {
  if (done()) return true;
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return false;
  if (done()) return true;
  try {
    if (!advance()) return false;
  } catch (const SizeError& error) {
    error_ = std::make_exception_ptr(SystemError(flight_name(flight) + ": " + error.what()));
  } catch (...) {
    error_ = std::current_exception();
  }
  flight_end(flight);
  done_.store(true, std::memory_order_release);
  return true;
}

std::vector<int> CommOperation::awaited() {
  std::unique_lock lock(mutex_, std::defer_lock);
  for (int i = 0; i < 100 && !lock.try_lock(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // a device may hang in it
  return !lock.owns_lock() || done() ? std::vector<int>() : requests_.awaited();
}

void CommOperation::rethrow() {
  if (!error_) return;
  new std::shared_ptr<CommOperation>(shared_from_this());
  std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace trireme
