// How a cluster of blocks divides the recurrent product of 8 batch entries, and a block's shared memory. Forward, a
// block has the rows of its own units and all of k; its warps divide both. Backward, it has all rows, of the k that
// its own units' gate gradients are.
#pragma once

#include <cstdint>

namespace fusedrnn::cuda {

constexpr int cluster_columns = 8, least_columns = 2;  // batch entries of a cluster, at most and at least
constexpr int cluster_warps = 12;                      // of a block, at most: a thread has 168 registers

// Tiles of 16 rows that a warp has at most, backward in one kernel and in another; forward they are the gates.
constexpr int few_tiles = 3, many_tiles = 4;
constexpr int most_tiles(int tiles) { return tiles <= few_tiles ? few_tiles : many_tiles; }
// Fragments (16 rows and one block of k) that a warp keeps in registers: as many as leave the compiler enough of them.
constexpr int forward_near = 12, backward_near = 10;

// Of the first `near` fragments, `tiles` to a block of k, those of the first `count` tiles.
constexpr int near_fragments(int near, int tiles, int count) {
  return near / tiles * count + (near % tiles < count ? near % tiles : count);
}
// Fragments that a warp has no registers for, where `warps` divide the blocks of k.
constexpr int far_fragments(int64_t blocks, int warps, int near, int tiles, int count) {
  const int64_t all = (blocks + warps - 1) / warps * count;
  return all > near_fragments(near, tiles, count) ? int(all) - near_fragments(near, tiles, count) : 0;
}

struct ClusterShape {
  int blocks, groups;                // of the cluster; of 16 units, of a block
  int columns = cluster_columns;     // batch entries of the cluster
  int m_warps, k_warps;              // a block's warps divide the product's rows, and k
  int tiles;                         // of 16 rows, of a warp
  int k_blocks;                      // of Math::k elements, of a block
  int far_fragments;                 // of a warp's weights, in shared memory
  int64_t inbox, outbox, sums, far;  // where they begin in shared memory, after two mailboxes
  int64_t shared_bytes;

  constexpr int warps() const { return m_warps * k_warps; }
};

// Where dh of unit m and a batch entry is in a backward inbox. Pairs of entries change places, so that 16 units of two
// entries of a pair are read without bank conflicts.
constexpr int partial_place(int m, int column) {
  return m * cluster_columns + ((column / 2) ^ (m / 4 % 4)) * 2 + column % 2;
}

// Floats between the sums of neighbouring batch entries: no bank conflicts when lanes store them, nor when 16 units of
// two entries that are sums_apart are read.
constexpr int sums_pitch(int rows) { return rows + 4; }
constexpr int sums_apart = 4;

// The same of a forward cluster, whose sums of an element's gates are side by side, 16 bytes if they are several: the
// elements between those of neighbouring batch entries.
constexpr int gate_floats(int gates) { return gates > 1 ? 4 : 1; }
constexpr int gates_pitch(int groups, int gates) { return gates > 1 ? 16 * groups + 1 : sums_pitch(16 * groups); }

// Of shared memory, for two mailboxes: what other blocks' stores fill begins after them, and should fill 32 bytes.
constexpr int mailboxes_bytes = 32;
// Where so many blocks of a cluster divide k (stepwise.cuh): that, and twice the sums that a block is sent.
constexpr int split_inbox_bytes(int divide_k, int columns) {
  return divide_k > 1 ? mailboxes_bytes + 2 * divide_k * columns * sums_pitch(16) * int(sizeof(float)) : 0;
}

}  // namespace fusedrnn::cuda
