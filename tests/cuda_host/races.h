// Finds data races of a launch: two accesses of the same memory, one of them a write, that nothing puts in an order. It
// does not matter in which order they happened to come. What orders them are a block's and a cluster's barriers, what a
// thread acquires that another one has released, and messages that a thread waits for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "fibers.h"

namespace fusedrnn::cuda::host {

// Who accesses memory, and when.
struct Moment {
  int actor, thread;
  uint32_t interval;
};
struct Sender {
  Moment moment;
  Clock known;
};

class Races {
 public:
  // The calling fiber's accesses.
  void read(const void* from, size_t bytes, std::string_view what);
  void write(void* to, const void* value, size_t bytes, std::string_view what);

  void release(const void* counter);
  void acquire(const void* counter);

  // What a fiber sends goes into memory later, in a phase of a mailbox; others wait for that phase.
  Sender sender();
  void deliver(const Sender& sender, const void* mailbox, uint32_t phase, void* to, const void* value, size_t bytes,
               std::string_view what);
  void phase_is_over(const void* mailbox);
  void waited_for(const void* mailbox, uint32_t phase);

  void begin(Block& block);
  // By the last that comes.
  void block_met(Block& block);
  void cluster_met(Cluster& cluster);

  // Shared memory ends with its block; all else with the launch.
  void forget(const Block& block);
  void forget();

 private:
  struct Place {
    std::vector<Moment> writes;  // the last one, and others of the same value
    std::vector<Moment> reads;   // of that value, the last of each actor
  };
  struct MailboxFacts {
    int actor;
    Clock incoming, complete;
  };

  // Who accesses memory, and what is over for them.
  struct View {
    Moment now;
    const Clock *of_block, *of_thread;
    bool is_over(const Moment& moment) const;
  };

  View view();
  void write(const View& view, const Moment& as, void* to, const void* value, size_t bytes, std::string_view what);
  MailboxFacts& facts(const void* mailbox);
  template <class Visit>
  void each_place(const void* from, size_t bytes, Visit visit);

  static constexpr size_t place_bytes = 2, page_places = 2048;
  using Page = std::array<Place, page_places>;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::unordered_map<const void*, MailboxFacts> mailboxes_;
  std::unordered_map<const void*, Clock> counters_;
  int actors_ = 0;
};

}  // namespace fusedrnn::cuda::host
