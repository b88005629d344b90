#include "team.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <thread>

namespace fusedrnn {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Done>
void spin_until(Done done) {
  constexpr int spins_before_yield = 1 << 11;
  for (int i = 0; !done(); ++i) {
    if (i < spins_before_yield)
      pause();
    else
      std::this_thread::yield();
  }
}

// Threads enter until every chunk of the parallel region is in somebody's hands; that closes the team. A pool that
// cannot run all chunks at the same time (none of torch's usual ones) would never get there: after a while the team
// closes with those who came, and whoever comes later has nothing to do.
class Entrance {
 public:
  explicit Entrance(int wanted) : wanted_(wanted) {}

  // The caller's number in the team, or -1 if the team is closed. Blocks until the team is closed.
  int enter(int chunks) {
    uint64_t seen = state_.load();
    do {
      if (seen & closed) return -1;
    } while (!state_.compare_exchange_weak(seen, seen + (uint64_t(chunks) << 32) + 1));
    const int id = int(seen & 0x7fffffff);
    if (int(seen >> 32) + chunks == wanted_) state_.fetch_or(closed);
    const auto start = std::chrono::steady_clock::now();
    spin_until([&] {
      if (state_.load(std::memory_order_acquire) & closed) return true;
      if (std::chrono::steady_clock::now() - start > std::chrono::milliseconds(200)) state_.fetch_or(closed);
      return false;
    });
    return id;
  }

  int size() const { return int(state_.load() & 0x7fffffff); }

 private:
  static constexpr uint64_t closed = uint64_t(1) << 31;
  const int wanted_;
  std::atomic<uint64_t> state_{0};  // chunks taken (high 32 bits), closed flag, members (low 31 bits)
};

// The pool's threads don't exist in a forked child, and torch's OpenMP would wait for them forever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void Barrier::wait(int count) {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
  } else {
    spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
  }
}

int max_threads() { return forked ? 1 : int(torch::stable::get_num_threads()); }

void run_team(int wanted, const std::function<void(Member)>& work) {
  Barrier barrier;
  if (wanted <= 1) return work({0, 1, &barrier});
  Entrance entrance(wanted);
  torch::stable::parallel_for(0, wanted, 1, [&](int64_t begin, int64_t end) {
    const int id = entrance.enter(int(end - begin));
    if (id >= 0) work({id, entrance.size(), &barrier});
  });
}

}  // namespace fusedrnn
