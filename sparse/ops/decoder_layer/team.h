// The threads of one call: a barrier, memory that is kept between calls, and the time of each stage.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "numbers.h"

namespace decoder_layer {

using native::aligned;

// Threads that run the same function and wait for each other. A waiting thread gives its core away after a short while,
// so that other processes on the machine cost time, but not whole scheduler slices per barrier.
class Team {
 public:
  int size = 1;

  void wait() {
    if (size == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins < kSpins)
        __builtin_ia32_pause();
      else
        sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 20000;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// Runs work(thread, team) on the threads that torch uses.
template <typename Work>
void together(Work&& work) {
  Team team;
  const int wanted = at::get_num_threads();
  if (wanted == 1 || omp_in_parallel()) return work(0, team);
#pragma omp parallel num_threads(wanted)
  {
#pragma omp single
    team.size = omp_get_num_threads();
    work(omp_get_thread_num(), team);
  }
}

struct Range {
  int64_t from, to;
};

// The share of a thread in `count` pieces of work.
inline Range share(int64_t count, int thread, const Team& team) {
  return {count * thread / team.size, count * (thread + 1) / team.size};
}

// Memory of one call; the calling thread keeps it for the next.
class Arena {
 public:
  static Arena& fresh() {
    static thread_local Arena arena;
    if (arena.blocks_.size() > 1) {
      int64_t total = 0;
      for (const Block& block : arena.blocks_) total += block.size;
      arena.blocks_.clear();
      arena.grow(total);
    }
    arena.used_ = 0;
    return arena;
  }

  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
    if (blocks_.empty() || used_ + bytes > blocks_.back().size) grow(bytes);
    char* begin = blocks_.back().memory.get() + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(begin);
  }

 private:
  struct Block {
    std::unique_ptr<char[], decltype(&std::free)> memory;
    int64_t size;
  };

  void grow(int64_t bytes) {
    const int64_t size = std::max<int64_t>(bytes, 1 << 20);
    blocks_.push_back({aligned<char>(size), size});
    used_ = 0;
  }

  std::vector<Block> blocks_;
  int64_t used_ = 0;
};

// Adds the time since the last lap to a stage; does nothing without a place for it.
class Laps {
 public:
  explicit Laps(double* seconds) : seconds_(seconds), last_(now()) {}

  void lap(int stage) {
    if (!seconds_) return;
    const double time = now();
    seconds_[stage] += time - last_;
    last_ = time;
  }

 private:
  double now() const {
    if (!seconds_) return 0;
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  double* seconds_;
  double last_;
};

}  // namespace decoder_layer
