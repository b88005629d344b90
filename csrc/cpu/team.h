// Threads that work on one op together and meet at barriers.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace fusedrnn {

// A spin barrier; it yields when it has to wait long (more threads than cores).
class Barrier {
 public:
  void wait(int count);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// One thread's place in a team.
struct Member {
  int id, size;
  Barrier* barrier;
  void meet() const {
    if (size > 1) barrier->wait(size);
  }
};

// Calls work(member) on up to `wanted` threads of torch's pool, all at once, and returns when all are done. The team
// consists of the threads that really arrived, so it is complete, whatever the pool does with nested or concurrent
// regions: the work may rely on barriers.
void run_team(int wanted, const std::function<void(Member)>& work);

// torch.get_num_threads(); 1 in a forked child.
int max_threads();

}  // namespace fusedrnn
