#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Switches stacks: saves what a function must keep, stores the stack pointer in *from and goes on at `to`.
extern "C" void fusedrnn_switch_stack(void** from, void* to);
asm(R"(
.text
.globl fusedrnn_switch_stack
.hidden fusedrnn_switch_stack
.type fusedrnn_switch_stack,@function
fusedrnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusedrnn_switch_stack,.-fusedrnn_switch_stack
)");

namespace fusedrnn::cuda::host {
namespace {

constexpr size_t stack_bytes = 64 * 1024;

struct Running : Fiber {
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // the address sanitizer's
};

// One launch at a time, on the thread that launches.
struct Scheduler {
  std::mutex one_launch;
  std::mt19937_64 random{1};
  std::vector<char*> stacks;
  std::vector<Fiber*> runnable;
  std::vector<std::function<void()>> posted;
  Running* current = nullptr;
  void* main_stack_pointer = nullptr;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  size_t waited = 0;  // fibers in a row that found nothing to do
  size_t alive = 0;
  const Block* late_block = nullptr;  // whose fibers are left behind,
  int late_warp = -1;                 // those of this warp alone, if it isn't negative,
  size_t late_turns = 0;              // for so long
  const std::function<void()>* kernel = nullptr;
  int processors = 12, busy = 0;
  Races races;
} scheduler;

void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* to, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, to, size);
#endif
}
void after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** from,
                  [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, from, size);
#endif
}

// Leaves a fiber for the scheduler's loop; for good if `ends`.
void leave(bool ends) {
  Running* fiber = scheduler.current;
  before_switch(ends ? nullptr : &fiber->fake_stack, scheduler.main_stack, scheduler.main_stack_size);
  fusedrnn_switch_stack(&fiber->stack_pointer, scheduler.main_stack_pointer);
  after_switch(fiber->fake_stack, nullptr, nullptr);
}

void enter(Running* fiber) {
  scheduler.current = fiber;
  before_switch(&scheduler.main_fake_stack, fiber->stack, stack_bytes);
  fusedrnn_switch_stack(&scheduler.main_stack_pointer, fiber->stack_pointer);
  after_switch(scheduler.main_fake_stack, nullptr, nullptr);
}

void body() {
  after_switch(nullptr, &scheduler.main_stack, &scheduler.main_stack_size);
  (*scheduler.kernel)();
  --scheduler.alive;
  leave(true);
}

// A stack that starts in body().
void prepare(Running& fiber) {
  if (scheduler.stacks.empty()) {
    void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a stack");
    scheduler.stacks.push_back(static_cast<char*>(memory));
  }
  fiber.stack = scheduler.stacks.back();
  scheduler.stacks.pop_back();
  void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes) - 1;  // aligned as a call leaves it
  *--top = reinterpret_cast<void*>(&body);
  fiber.stack_pointer = top - 6;  // the registers that the switch pops
  std::memset(fiber.stack_pointer, 0, 6 * sizeof(void*));
}

// One of them, at random, taken out.
template <class T>
T take_any(std::vector<T>& all) {
  std::swap(all[scheduler.random() % all.size()], all.back());
  T taken = std::move(all.back());
  all.pop_back();
  return taken;
}

bool is_late(const Fiber& fiber) {
  if (scheduler.late_turns == 0 || fiber.block != scheduler.late_block) return false;
  return scheduler.late_warp < 0 || fiber.thread / 32 == scheduler.late_warp;
}

// Now and then a warp, or a whole block, is left behind until the others have gone as far as they can without it.
void choose_who_is_late(const std::vector<Block>& blocks) {
  if (scheduler.late_turns > 0) {
    const bool others_only_wait = scheduler.waited > 2 * scheduler.runnable.size();
    scheduler.late_turns = others_only_wait ? 0 : scheduler.late_turns - 1;
  } else if (scheduler.random() % 1024 == 0) {
    const Block& block = blocks[scheduler.random() % blocks.size()];
    const size_t warps = block.warps.size();
    scheduler.late_block = &block, scheduler.late_warp = int(scheduler.random() % (warps + 1)) - 1;
    scheduler.late_turns = scheduler.random() % (128 * scheduler.alive);
  }
}

Running* next_fiber() {
  Fiber* fiber = take_any(scheduler.runnable);
  for (int i = 0; i < 32 && is_late(*fiber); ++i) {  // in the end perhaps all that can run are late
    scheduler.runnable.push_back(fiber);
    fiber = take_any(scheduler.runnable);
  }
  return static_cast<Running*>(fiber);
}

// So many neighbouring ones are a cluster.
void run_together(std::vector<Block>& blocks, size_t cluster) {
  std::vector<Cluster> clusters(blocks.size() / cluster);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i].blocks = {&blocks[i * cluster], cluster};
  std::vector<std::unique_ptr<unsigned char[]>> shared;
  std::vector<Running> fibers(blocks.size() * size_t(blocks[0].threads));
  size_t i = 0;
  for (Block& block : blocks) {
    shared.push_back(std::make_unique<unsigned char[]>(block.shared_bytes));
    block.shared = shared.back().get(), block.cluster = &clusters[(shared.size() - 1) / cluster];
    scheduler.races.begin(block);
    std::memset(block.shared, 0xff, block.shared_bytes);  // NaN, until somebody writes
    block.warps.resize(size_t(block.threads + 31) / 32);
    for (int thread = 0; thread < block.threads; ++thread, ++i) {
      fibers[i].block = &block, fibers[i].thread = thread;
      prepare(fibers[i]);
      scheduler.runnable.push_back(&fibers[i]);
    }
  }
  scheduler.alive = fibers.size(), scheduler.waited = 0, scheduler.late_turns = 0;
  while (scheduler.alive > 0) {
    if (!scheduler.posted.empty() && scheduler.random() % 4 == 0) take_any(scheduler.posted)();
    if (scheduler.runnable.empty()) fail("deadlock: all threads wait at barriers that others never reach");
    choose_who_is_late(blocks);
    enter(next_fiber());
  }
  if (!scheduler.posted.empty()) fail("a block has ended before all that was sent to it has come");
  for (const Block& block : blocks) scheduler.races.forget(block);
  for (Running& fiber : fibers) scheduler.stacks.push_back(fiber.stack);
}

}  // namespace

Fiber& self() { return *scheduler.current; }

void fail(const char* what) {
  std::fprintf(stderr, "fusedrnn host device: %s\n", what);
  std::abort();
}

void meet(FiberBarrier& barrier, int count, const std::function<void()>& completion) {
  if (++barrier.arrived < count) {
    barrier.waiting.push_back(scheduler.current);
    leave(false);
    return;
  }
  if (completion) completion();
  barrier.arrived = 0;
  progress();
  scheduler.runnable.insert(scheduler.runnable.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
  pass();
}

void pass() {
  scheduler.runnable.push_back(scheduler.current);
  leave(false);
}

void pass_waiting() {
  // Many more turns than there are fibers: at random, all had theirs.
  if (++scheduler.waited > 1000 + 100 * scheduler.runnable.size()) fail("deadlock: a signal never comes");
  pass();
}

void progress() { scheduler.waited = 0; }

Races& races() { return scheduler.races; }

void post(std::function<void()> delivery) { scheduler.posted.push_back(std::move(delivery)); }

void run(Index3 grid, int threads, size_t shared_bytes, size_t cluster, bool together,
         const std::function<void()>& kernel) {
  const std::lock_guard lock(scheduler.one_launch);
  scheduler.kernel = &kernel;
  std::vector<std::vector<Block>> sets;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (sets.empty() || (!together && sets.back().size() == cluster)) sets.emplace_back();
        sets.back().push_back({{x, y, z}, grid, threads, nullptr, shared_bytes, {}, {}, nullptr, 0, 0, {}, {}});
      }
    }
  }
  std::shuffle(sets.begin(), sets.end(), scheduler.random);
  for (std::vector<Block>& set : sets) run_together(set, cluster);
  scheduler.races.forget();
}

size_t any(size_t count) { return scheduler.random() % count; }

int processors() { return scheduler.processors; }
int free_processors() { return scheduler.processors - scheduler.busy; }

}  // namespace fusedrnn::cuda::host

// For the tests: the order in which threads run; how many blocks at the same time, and room for how many something else
// takes.
extern "C" void fusedrnn_cuda_host_configure(uint64_t seed, int processors, int busy) {
  using fusedrnn::cuda::host::scheduler;
  scheduler.random.seed(seed);
  scheduler.processors = processors, scheduler.busy = busy;
}
