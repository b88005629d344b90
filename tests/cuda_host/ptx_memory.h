// A PTX kernel, decoded; a thread that runs it; and what instructions do with memory, as the PTX ISA says.
#pragma once

#include <array>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "fibers.h"
#include "races.h"

namespace fusedrnn::cuda::host {

struct Thread;

constexpr int most_operands = 14;  // mma's: d, a, b, c
struct Instruction {
  void (*execute)(Thread&, const Instruction&) = nullptr;
  int guard = no_guard;                 // the predicate's register
  bool unless = false;                  // executed if the guard is false
  std::array<int, most_operands> at{};  // registers, and below 0 constants
  int count = 1;                        // of elements of a vector
  int bytes = 0;                        // of an element in memory
  int64_t offset = 0;                   // of an address
  size_t target = 0;                    // of a branch
  std::string_view text{};

  static constexpr int no_guard = -1;
};

// Registers that every kernel has first.
constexpr std::array<std::string_view, 9> special_registers = {"%tid.x",    "%ntid.x",   "%ctaid.x",
                                                               "%ctaid.y",  "%ctaid.z",  "%nctaid.x",
                                                               "%nctaid.y", "%nctaid.z", "the block's shared memory"};
constexpr int shared_register = int(special_registers.size()) - 1;

struct PtxKernel {
  std::string body;
  size_t param_bytes = 0;
  int registers = int(special_registers.size());
  std::vector<uint64_t> constants;
  std::vector<Instruction> code;
};

[[noreturn]] inline void fail_at(std::string_view text, const std::string& what) {
  fail((what + ": " + std::string(text)).c_str());
}

// A thread while it runs.
struct Thread {
  const PtxKernel& kernel;
  const unsigned char* params;
  std::vector<uint64_t> registers;
  size_t next = 0;
  bool ended = false;
  unsigned until_pass = 1;  // memory accesses until others may run

  template <class T>
  T get(int at) const {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    T value;
    std::memcpy(&value, at < 0 ? &kernel.constants[size_t(~at)] : &registers[size_t(at)], sizeof(T));
    return value;
  }
  template <class T>
  void set(int at, T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    registers[size_t(at)] = bits;
  }
  bool predicate(int at) const { return get<uint64_t>(at) != 0; }
  Block& block() const { return *self().block; }
};

// ---- memory --------------------------------------------------------------------------------------------------------

// Where a block's shared memory begins in the cluster's window, by its rank.
constexpr uint32_t shared_bits = 24, shared_start = 1024;
inline int rank_of(const Block& block) { return int(&block - block.cluster->blocks.data()); }
inline uint32_t shared_base(int rank) { return uint32_t(rank + 1) << shared_bits | shared_start; }

inline unsigned char* in_shared(Thread& t, const Instruction& i, uint32_t address, size_t bytes, bool of_others) {
  const int rank = int(address >> shared_bits) - 1;
  const std::span<Block> blocks = t.block().cluster->blocks;
  if (rank < 0 || rank >= int(blocks.size())) fail_at(i.text, "no block of the cluster has this shared memory");
  if (!of_others && rank != rank_of(t.block())) fail_at(i.text, "shared memory of another block");
  const int64_t offset = int64_t(address) - shared_base(rank);
  if (offset < 0 || size_t(offset) + bytes > t.block().shared_bytes) fail_at(i.text, "beyond the shared memory");
  if (size_t(offset) % bytes) fail_at(i.text, "not aligned");
  return blocks[size_t(rank)].shared + offset;
}

enum class Space { param, shared, global };

template <Space space>
unsigned char* memory(Thread& t, const Instruction& i, int at) {
  const size_t bytes = size_t(i.count * i.bytes);
  if constexpr (space == Space::shared) {
    return in_shared(t, i, t.get<uint32_t>(at) + uint32_t(i.offset), bytes, false);
  } else {
    const int64_t address = t.get<int64_t>(at) + i.offset;
    if (address % int64_t(bytes)) fail_at(i.text, "not aligned");
    if constexpr (space == Space::global) return reinterpret_cast<unsigned char*>(address);
    if (address < 0 || size_t(address) + bytes > t.kernel.param_bytes) fail_at(i.text, "beyond the parameters");
    return const_cast<unsigned char*>(t.params) + address;
  }
}

// A fiber is switched now and then where it reads or writes what others may write or read.
inline void sometimes_pass(Thread& t) {
  if (--t.until_pass > 0) return;
  t.until_pass = 1 + unsigned(any(256));
  pass();
}

template <Space space>
void load(Thread& t, const Instruction& i) {
  if constexpr (space != Space::param) sometimes_pass(t);
  const unsigned char* from = memory<space>(t, i, i.at[size_t(i.count)]);
  if constexpr (space != Space::param) races().read(from, size_t(i.count * i.bytes), i.text);
  for (int e = 0; e < i.count; ++e) {
    uint64_t bits = 0;
    std::memcpy(&bits, from + e * i.bytes, size_t(i.bytes));
    t.set(i.at[size_t(e)], bits);
  }
}
template <Space space>
void store(Thread& t, const Instruction& i) {
  sometimes_pass(t);
  unsigned char* to = memory<space>(t, i, i.at[0]);
  std::array<unsigned char, 16> value;
  for (int e = 0; e < i.count; ++e) {
    const uint64_t bits = t.get<uint64_t>(i.at[size_t(1 + e)]);
    std::memcpy(value.data() + e * i.bytes, &bits, size_t(i.bytes));
  }
  races().write(to, value.data(), size_t(i.count * i.bytes), i.text);
}

// Whoever acquires waits, perhaps.
inline void load_acquire(Thread& t, const Instruction& i) {
  pass_waiting();
  const unsigned char* from = memory<Space::global>(t, i, i.at[1]);
  t.set(i.at[0], *reinterpret_cast<const volatile uint32_t*>(from));
  races().acquire(from);
}
inline void add_release(Thread& t, const Instruction& i) {
  pass();
  unsigned char* counter = memory<Space::global>(t, i, i.at[0]);
  *reinterpret_cast<uint32_t*>(counter) += t.get<uint32_t>(i.at[1]);
  races().release(counter);
  progress();
}

// ---- barriers, and what comes over to another block -----------------------------------------------------------------

inline void sync_block(Thread& t, const Instruction&) {
  meet(t.block().barrier, t.block().threads, [&] { races().block_met(t.block()); });
}
inline void sync_cluster(Thread& t, const Instruction&) {
  Cluster& cluster = *t.block().cluster;
  meet(cluster.barrier, int(cluster.blocks.size()) * t.block().threads, [&] { races().cluster_met(cluster); });
}

// The opaque object in shared memory.
struct Mbarrier {
  int32_t missing_bytes;
  int8_t arrivals, missing_arrivals;
  uint16_t phase;

  void complete_if_all_is_there() {
    if (missing_arrivals == 0 && missing_bytes == 0) {
      ++phase, missing_arrivals = arrivals;
      races().phase_is_over(this);
    }
    progress();
  }
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier(Thread& t, const Instruction& i, int at) {
  return *reinterpret_cast<Mbarrier*>(memory<Space::shared>(t, i, at));
}
inline void mbarrier_init(Thread& t, const Instruction& i) {
  const auto count = t.get<uint32_t>(i.at[1]);
  if (count < 1 || count > 127) fail_at(i.text, "so many arrivals are not for this interpreter");
  mbarrier(t, i, i.at[0]) = {0, int8_t(count), int8_t(count), 0};
}
inline void mbarrier_arrive_expect(Thread& t, const Instruction& i) {
  Mbarrier& barrier = mbarrier(t, i, i.at[1]);
  if (barrier.missing_arrivals == 0) fail_at(i.text, "an arrival too many");
  barrier.missing_bytes += t.get<int32_t>(i.at[2]), --barrier.missing_arrivals;
  barrier.complete_if_all_is_there();
}
// Whether the phase of this parity is over.
inline void mbarrier_try_wait(Thread& t, const Instruction& i) {
  pass_waiting();
  const Mbarrier& barrier = mbarrier(t, i, i.at[1]);
  const bool is_over = barrier.phase % 2 != t.get<uint32_t>(i.at[2]);
  t.set(i.at[0], uint64_t(is_over));
  if (is_over) races().waited_for(&barrier, barrier.phase - 1u);
}

inline void store_async(Thread& t, const Instruction& i) {
  if (t.block().cluster->blocks.size() < 2) fail_at(i.text, "a block sends, and is alone in its cluster");
  std::array<unsigned char, 16> value;
  for (int e = 0; e < i.count; ++e) {
    const auto bits = t.get<uint32_t>(i.at[size_t(1 + e)]);
    std::memcpy(value.data() + e * i.bytes, &bits, sizeof(bits));
  }
  const auto address = t.get<uint32_t>(i.at[0]), counter = t.get<uint32_t>(i.at[size_t(1 + i.count)]);
  if (address >> shared_bits != counter >> shared_bits) fail_at(i.text, "the mbarrier is in another block");
  const size_t bytes = size_t(i.count * i.bytes);
  unsigned char* to = in_shared(t, i, address, bytes, true);
  auto* barrier = reinterpret_cast<Mbarrier*>(in_shared(t, i, counter, sizeof(Mbarrier), true));
  post([=, sender = races().sender(), what = i.text] {
    races().deliver(sender, barrier, barrier->phase, to, value.data(), bytes, what);
    barrier->missing_bytes -= int32_t(bytes);
    barrier->complete_if_all_is_there();
  });
  pass();
}

inline void map_address(Thread& t, const Instruction& i) {
  const auto address = t.get<uint32_t>(i.at[1]), rank = t.get<uint32_t>(i.at[2]);
  if (rank >= t.block().cluster->blocks.size()) fail_at(i.text, "no block of the cluster");
  t.set(i.at[0], uint32_t(address - shared_base(rank_of(t.block())) + shared_base(int(rank))));
}

}  // namespace fusedrnn::cuda::host
