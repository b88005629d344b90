// Threads of a kernel as fibers of one CPU thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace fusedrnn::cuda::host {

class Races;
struct Fiber;

// What a thread knows to be over: of each actor the intervals before this one. Actors are blocks, whose intervals lie
// between their barriers, and mailboxes, whose intervals are phases.
class Clock {
 public:
  uint32_t of(int actor) const { return size_t(actor) < before_.size() ? before_[size_t(actor)] : 0; }
  void learn(int actor, uint32_t before);
  void learn(const Clock& other);

 private:
  std::vector<uint32_t> before_;
};

struct Index3 {
  unsigned x, y, z;
};

struct FiberBarrier {
  int arrived = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  FiberBarrier barrier;
  alignas(16) unsigned char operands[32 * 24];
};

struct Cluster;

struct Block {
  Index3 index, grid;
  int threads;
  unsigned char* shared;
  size_t shared_bytes;
  FiberBarrier barrier;
  std::vector<Warp> warps;
  Cluster* cluster;
  // Of what happens in it, and of what is over for all of its threads, or for some since their last barrier.
  int actor;
  uint32_t interval = 0;
  Clock known, acquired;
};

// Blocks that reach each other's shared memory, and run at the same time.
struct Cluster {
  std::span<Block> blocks;
  FiberBarrier barrier;
};

struct Fiber {
  Block* block;
  int thread;
  Clock known;  // what is over for this one alone
};

Fiber& self();

// Ends the process: the kernel's fault.
[[noreturn]] void fail(const char* what);

// Until `count` fibers have come; the last one does `completion` before any goes on.
void meet(FiberBarrier& barrier, int count, const std::function<void()>& completion = {});

// Lets others run. A fiber that waits for memory to change says so: when all wait and none makes progress, that is a
// deadlock.
void pass();
void pass_waiting();
void progress();

// Does something later, at any time.
void post(std::function<void()> delivery);

// Runs the kernel for every thread of the grid. So many neighbouring blocks are a cluster; the clusters run one after
// another, or all at the same time.
void run(Index3 grid, int threads, size_t shared_bytes, size_t cluster, bool together,
         const std::function<void()>& kernel);

// What of a launch may be read and written in the wrong order.
Races& races();

// A number below `count`, at random.
size_t any(size_t count);

// Blocks that can run at the same time, and those that nothing else keeps from it.
int processors();
int free_processors();

}  // namespace fusedrnn::cuda::host
