// Allreduce of vectors: through shared memory between the ranks of a node, through the leaders'
// channel between nodes, otherwise in Python.

#pragma once

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "channel.h"
#include "interface.h"

namespace batch_norm {

constexpr int64_t kMicrosecond = 1000, kSecond = 1000000000;  // nanoseconds, as all times here

inline int64_t now() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

// SharedMemorySum of shared_memory.py, which explains it; ranks may mix both implementations.
class SharedSum {
 public:
  // `channel` is the leader's, of several nodes; `stream` that of its sums.
  SharedSum(int serial, int file, int64_t calls, int index, int size, int capacity,
            bool one_node, std::shared_ptr<Channel> channel, uint32_t stream)
      : serial_(serial), calls_(calls), index_(index), size_(size), capacity_(capacity),
        one_node_(one_node), channel_(std::move(channel)), stream_(stream) {
    bytes_ = 8 * int64_t(size) * (kCacheLine + 2 * capacity);
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  ~SharedSum() {
    if (mapped()) munmap(memory_, bytes_);
  }
  bool mapped() const { return memory_ != MAP_FAILED; }

  bool operator()(std::vector<double>* values) {
    double* slots = reinterpret_cast<double*>(&counter(size_)) + calls_ % 2 * (size_ * capacity_);
    std::copy(values->begin(), values->end(), slots + index_ * capacity_);
    ++calls_;
    if (one_node_) {
      counter(index_).store(calls_, std::memory_order_release);
      if (!wait_for(0, size_)) return false;
      add(slots, values);
      return true;
    }
    if (channel_) return lead(slots, values);
    counter(index_).store(calls_, std::memory_order_release);
    if (!wait_for(0, 1)) return false;
    std::copy(slots, slots + values->size(), values->begin());
    return true;
  }

 private:
  static constexpr int kCacheLine = 8;  // numbers

  std::atomic<int64_t>& counter(int peer) {
    return static_cast<std::atomic<int64_t>*>(memory_)[peer * kCacheLine];
  }

  void add(const double* slots, std::vector<double>* values) const {
    std::fill(values->begin(), values->end(), 0);
    for (int peer = 0; peer < size_; ++peer, slots += capacity_)
      for (size_t i = 0; i < values->size(); ++i) (*values)[i] += slots[i];
  }

  // The leader's part: its counter says that the sum over all nodes is in its slot.
  bool lead(double* slots, std::vector<double>* values) {
    if (!wait_for(1, size_)) {
      counter(0).store(-kLost, std::memory_order_release);
      channel_->abandon();
      return false;
    }
    add(slots, values);
    const Outcome outcome = channel_->sum(stream_, calls_, values->data(), values->size());
    if (outcome == kSummed) std::copy(values->begin(), values->end(), slots);
    counter(0).store(outcome == kSummed ? calls_ : -outcome, std::memory_order_release);
    if (outcome != kSummed) api.look(serial_, calls_);  // says what happened
    return outcome == kSummed;
  }

  bool wait_for(int first, int last) {
    for (int peer = first; peer < last; ++peer)
      if (!wait_for(peer)) return false;
    return true;
  }

  bool wait_for(int peer) {
    const int64_t start = now();
    int64_t look_at = start + kSecond;
    while (counter(peer).load(std::memory_order_acquire) < calls_) {
      const int64_t time = now();
      // Sleeping would add up to 50 microseconds, the kernel's timer slack.
      if (time - start < 2000 * kMicrosecond) {
        sched_yield();
        continue;
      }
      // Back off: sleep for an eighth of the time waited so far, up to a millisecond.
      usleep(std::min<int64_t>((time - start) / (8 * kMicrosecond), 1000));
      if (time < look_at) continue;
      if (!api.look(serial_, calls_)) return false;
      look_at = time + kSecond / 5;
    }
    return true;
  }

  const int serial_;
  int64_t calls_;
  const int index_, size_, capacity_;
  const bool one_node_;
  const std::shared_ptr<Channel> channel_;
  const uint32_t stream_;
  int64_t bytes_;
  void* memory_;
};

// The sum of one RankSum. Operators in flight keep it alive, even after the RankSum is gone.
struct Sum {
  bool operator()(std::vector<double>* values) {
    if (!shared) return api.python_sum(serial, values->data(), values->size());
    const int64_t start = now();
    const bool done = (*shared)(values);
    __atomic_fetch_add(api.nanoseconds, now() - start, __ATOMIC_RELAXED);
    return done;
  }
  int serial;
  std::unique_ptr<SharedSum> shared;
};

// All sums in use, by the RankSum's serial.
class Sums {
 public:
  std::shared_ptr<Sum> of(int serial) {
    std::lock_guard<std::mutex> guard(mutex_);
    std::shared_ptr<Sum>& sum = sums_[serial];
    if (!sum) sum.reset(new Sum{serial, nullptr});
    return sum;
  }
  void forget(int serial) {
    std::lock_guard<std::mutex> guard(mutex_);
    sums_.erase(serial);
  }
  // Back to Python's sums; while no operator is in flight.
  void unshare(int serial) { of(serial)->shared.reset(); }

 private:
  std::mutex mutex_;
  std::map<int, std::shared_ptr<Sum>> sums_;
};

}  // namespace batch_norm
