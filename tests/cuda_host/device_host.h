// csrc/cuda/device.cuh for a CPU: each CUDA thread is a fiber, switched wherever threads wait for each other, to
// another one chosen at random. So a missing barrier shows as a wrong number sooner or later, and a missing arrival at
// once, as a deadlock. All else is the kernels' own source.
#pragma once

#include <array>
#include <cmath>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"
#include "ptx.h"

#define FUSEDRNN_DEVICE inline
#define FUSEDRNN_KERNEL(threads) void

namespace fusedrnn::cuda {

// ---- inside a kernel -----------------------------------------------------------------------------------------------

inline int thread_index() { return host::self().thread; }
inline int block_threads() { return host::self().block->threads; }
inline Grid block_index() {
  const host::Index3 i = host::self().block->index;
  return {i.x, i.y, i.z};
}
inline Grid grid_size() {
  const host::Index3 i = host::self().block->grid;
  return {i.x, i.y, i.z};
}

inline void sync_block() { host::meet(host::self().block->barrier, host::self().block->threads); }
inline unsigned char* shared_memory() { return host::self().block->shared; }

inline Vector load(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Vector)) host::fail("a load of 16 bytes is not aligned");
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Vector load_if(bool exists, const void* p) { return exists ? load(p) : Vector{}; }
inline Vector load_l2(const void* p) { return load(p); }

inline void signal(uint32_t* counter) {
  host::pass();
  ++*counter;
  host::progress();
}
inline void wait_for(const uint32_t* counter, uint32_t target) {
  while (int32_t(*static_cast<const volatile uint32_t*>(counter) - target) < 0) host::pass_waiting();
}

constexpr bool has_clusters = true;

inline void sync_cluster() {
  host::Cluster& cluster = *host::self().block->cluster;
  host::meet(cluster.barrier, int(cluster.blocks.size()) * block_threads());
}

// What is sent comes at any later time.
struct Mailbox {
  int32_t missing;    // bytes
  uint16_t expected;  // whether a message is
  uint16_t complete;  // messages that are there
};
inline void open(Mailbox* mailbox) { *mailbox = {}; }
inline void settle(Mailbox* mailbox) {
  if (mailbox->expected && mailbox->missing == 0) mailbox->expected = 0, ++mailbox->complete;
  host::progress();
}
inline void expect(Mailbox* mailbox, uint32_t bytes) {
  if (mailbox->expected) host::fail("two messages are expected at once");
  mailbox->expected = 1, mailbox->missing += int32_t(bytes);
  settle(mailbox);
}
inline void wait_for(const Mailbox* mailbox, uint32_t message) {
  while (static_cast<const volatile Mailbox*>(mailbox)->complete % 2 == message % 2) host::pass_waiting();
}

template <class T>
void send_value(const T& value, void* to, const Mailbox* mailbox, int block) {
  const std::span<host::Block> blocks = host::self().block->cluster->blocks;
  if (blocks.size() < 2) host::fail("a block sends, and is alone in its cluster");
  if (block < 0 || size_t(block) >= blocks.size()) host::fail("no block of the cluster");
  const unsigned char* mine = host::self().block->shared;
  unsigned char* others = blocks[size_t(block)].shared;
  auto* target = others + (static_cast<unsigned char*>(to) - mine);
  auto* counter = reinterpret_cast<Mailbox*>(others + (reinterpret_cast<const unsigned char*>(mailbox) - mine));
  if (reinterpret_cast<uintptr_t>(target) % sizeof(T)) host::fail("what is sent is not aligned");
  host::post([value, target, counter] {
    std::memcpy(target, &value, sizeof(value));
    counter->missing -= int32_t(sizeof(value));
    settle(counter);
  });
  host::pass();
}
inline void send(const Vector& v, Vector* to, const Mailbox* mailbox, int block) { send_value(v, to, mailbox, block); }
inline void send(float a, float b, float* to, const Mailbox* mailbox, int block) {
  send_value(std::array{a, b}, to, mailbox, block);
}

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  return bits;
}

inline float widen(bf16 s) { return bits_to_float(uint32_t(s.bits) << 16); }
inline float widen(half s) {
  _Float16 h;
  std::memcpy(&h, &s.bits, sizeof(h));
  return float(h);
}
inline float widen(float s) { return s; }
inline double widen(double s) { return s; }

template <class S>
S narrow(Accumulator<S> a) {
  if constexpr (std::is_same_v<S, bf16>) {
    if (std::isnan(a)) return {0x7fff};
    const uint32_t bits = float_to_bits(a);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<S, half>) {
    const _Float16 h = _Float16(a);
    S s;
    std::memcpy(&s.bits, &h, sizeof(h));
    return s;
  } else {
    return a;
  }
}
// To nearest, ties away from zero.
inline uint32_t round_to_tf32(uint32_t bits) {
  return std::isfinite(bits_to_float(bits)) ? (bits + 0x1000) & ~0x1fffu : bits;
}

inline float approximate_exp2(float x) { return std::exp2(x); }
inline float approximate_inverse(float x) { return 1 / x; }

// A lane's fragments of one product; the last lane to come computes it for the whole warp.
struct MmaOperands {
  float* c;
  const uint32_t *a, *b;
};

// Values per word, elements of k, and what they are.
template <class S>
struct MmaNumbers {
  static constexpr int per_word = 2, k = 16;
  static float at(uint32_t word, int i) { return widen(S{uint16_t(word >> (16 * i))}); }
};
template <>
struct MmaNumbers<float> {
  static constexpr int per_word = 1, k = 8;
  // The hardware ignores the low bits: what was not rounded is cut.
  static float at(uint32_t word, int) { return bits_to_float(word & ~0x1fffu); }
};

template <class S>
void mma_of_warp(const MmaOperands* lane) {
  using Numbers = MmaNumbers<S>;
  constexpr int per_word = Numbers::per_word;
  float a[16][16], b[8][16];
  for (int l = 0; l < warp_size; ++l) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < per_word; ++i) {
      const int low = per_word * t + i, high = low + 4 * per_word;
      a[g][low] = Numbers::at(lane[l].a[0], i), a[g + 8][low] = Numbers::at(lane[l].a[1], i);
      a[g][high] = Numbers::at(lane[l].a[2], i), a[g + 8][high] = Numbers::at(lane[l].a[3], i);
      b[g][low] = Numbers::at(lane[l].b[0], i), b[g][high] = Numbers::at(lane[l].b[1], i);
    }
  }
  for (int l = 0; l < warp_size; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int m = l / 4 + 8 * (i / 2), n = l % 4 * 2 + i % 2;
      float sum = lane[l].c[i];
      for (int k = 0; k < Numbers::k; ++k) sum += a[m][k] * b[n][k];
      lane[l].c[i] = sum;
    }
  }
}

template <class S>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], S) {
  host::Fiber& self = host::self();
  host::Warp& warp = self.block->warps[self.thread / warp_size];
  auto* operands = reinterpret_cast<MmaOperands*>(warp.operands);
  static_assert(sizeof(MmaOperands) * warp_size <= sizeof(warp.operands));
  operands[self.thread % warp_size] = {c, a, b};
  host::meet(warp.barrier, warp_size, [&] { mma_of_warp<S>(operands); });
}

// ---- on the host ---------------------------------------------------------------------------------------------------

struct Stream {};

struct OnDevice {
  explicit OnDevice(int32_t) {}
  Stream stream() const { return {}; }
};

// What streams get is done at join(), one piece after another, of those that nothing is missing for any.
class Fork {
 public:
  Fork(const OnDevice&, int streams) : lanes_(size_t(streams)) {}

  void wait(int stream, int other) {
    const Lane& lane = lanes_.at(size_t(other));
    const size_t before = lane.done + lane.pieces.size();
    lanes_.at(size_t(stream)).pieces.push_back({{}, size_t(other), before});
  }
  void run(int stream, std::function<void(Stream)> work) {
    lanes_.at(size_t(stream)).pieces.push_back({std::move(work), size_t(stream), 0});
  }
  void join() {
    while (true) {
      std::vector<Lane*> ready;
      for (Lane& lane : lanes_) {
        if (lane.pieces.empty()) continue;
        const Piece& next = lane.pieces.front();
        if (lanes_.at(next.other).done >= next.before) ready.push_back(&lane);
      }
      if (ready.empty()) return;
      Lane& lane = *ready[host::any(ready.size())];
      if (lane.pieces.front().work) lane.pieces.front().work({});
      lane.pieces.pop_front(), ++lane.done;
    }
  }

 private:
  struct Piece {
    std::function<void(Stream)> work;  // none: only waits
    size_t other, before;              // until that stream has done so many
  };
  struct Lane {
    std::deque<Piece> pieces;
    size_t done = 0;
  };
  std::vector<Lane> lanes_;
};

// A small device, so that small tests meet every plan.
inline Device device_facts() { return {host::processors(), 100 * 1024, 8}; }

template <class Params>
int64_t resident_blocks(void (*)(Params), const Launch&) {
  return host::free_processors();
}

template <class Params>
int64_t resident_clusters(void (*)(Params), const Launch& l) {
  return host::free_processors() / l.cluster;
}

template <class Params>
void launch(void (*kernel)(Params), const Launch& l, Stream, const Params& p) {
  if (l.shared_bytes > size_t(device_facts().shared_bytes)) throw std::runtime_error("too much shared memory");
  if (l.grid.blocks() == 0 || l.grid.y > 65535 || l.grid.z > 65535) throw std::runtime_error("no such grid");
  if (l.threads > 1024) throw std::runtime_error("too many threads");
  if (l.cooperative && l.grid.blocks() > host::free_processors())
    throw std::runtime_error("too many cooperative blocks");
  if (l.cluster && l.grid.x % unsigned(l.cluster)) throw std::runtime_error("the grid is no number of clusters");
  const host::PtxKernel* ptx = host::find_ptx(reinterpret_cast<const void*>(kernel));
  host::run({l.grid.x, l.grid.y, l.grid.z}, l.threads, l.shared_bytes, size_t(std::max(l.cluster, 1)), l.cooperative,
            [&] { ptx ? host::run_ptx(*ptx, &p) : kernel(p); });
}

inline bool multiply_tf32(float* out, int m, int n, int k, Factor a, Factor b) {
  if (a.pitch < (a.turned ? m : k) || b.pitch < (b.turned ? k : n)) host::fail("rows of a matrix overlap");
  const auto at = [](const Factor& f, int64_t row, int64_t column) {
    const float value = f.turned ? f.data[column * f.pitch + row] : f.data[row * f.pitch + column];
    return bits_to_float(round_to_tf32(float_to_bits(value)));
  };
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float sum = 0;
      for (int l = 0; l < k; ++l) sum += at(a, i, l) * at(b, l, j);
      out[int64_t(i) * n + j] = sum;
    }
  }
  return true;
}

}  // namespace fusedrnn::cuda
