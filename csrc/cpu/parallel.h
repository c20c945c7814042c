// Tasks over ATen's threads, and the memory that each thread keeps for its tiles.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>

namespace lora_kernels {

constexpr int64_t SHARED_WORK = 1 << 18;  // multiply-adds that are worth waking another thread for

// task(0) .. task(count - 1), which make `work` multiply-adds together. Each thread has a share of
// them, in order, and then helps the next one: the same thread writes the same memory in each call,
// which is in its own cache. A little work, or all of it within a parallel region, is done by the
// caller.
template <class Task>
void for_each_task(int64_t count, int64_t work, const Task& task) {
  if (count == 1 || work < SHARED_WORK) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
  };
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) shares[t].next = t * count / threads;
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    for (int64_t k = 0; k < threads; ++k) {
      const int64_t t = (own + k) % threads, end = (t + 1) * count / threads;
      for (int64_t i; (i = shares[t].next.fetch_add(1)) < end;) task(i);
    }
  });
}

// How many of the threads a part of some work may expect for itself.
inline int64_t threads_for(int64_t part, int64_t work) {
  const double share = work == 0 ? 1.0 : double(part) / double(work);
  return std::max<int64_t>(std::llround(share * double(at::get_num_threads())), 1);
}

// Every task of every run, as `for_each_task` does: run.task(0) .. run.task(run.tasks() - 1).
template <class Run>
void for_each_task_of(const std::vector<Run>& runs, int64_t work) {
  if (runs.size() == 1)
    return for_each_task(runs[0].tasks(), work, [&](int64_t task) { runs[0].task(task); });
  std::vector<int64_t> ends;  // of each run's tasks among all of them
  ends.reserve(runs.size());
  int64_t count = 0;
  for (const Run& run : runs) ends.push_back(count += run.tasks());
  for_each_task(count, work, [&](int64_t task) {
    const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    runs[i].task(task - (i == 0 ? 0 : ends[i - 1]));
  });
}

// Floats aligned to a cache line, kept by the thread from call to call: freshly mapped pages cost
// more than the packing that fills them. Its size is bounded by the tile sizes, not by the problem,
// but for rows of s and of decoded x.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  float* reserve(int64_t floats) {
    if (floats > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Hands out consecutive pieces of a thread's scratch, each aligned: first add up, then take.
inline int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

inline Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace lora_kernels
