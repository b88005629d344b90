#include "races.h"

#include <algorithm>
#include <cstring>

namespace fusedrnn::cuda::host {
namespace {

constexpr int several = -1;  // threads

using std::ranges::all_of, std::ranges::any_of, std::ranges::find;

[[noreturn]] void race(std::string_view what, const char* with) {
  fail((std::string("a race: ") + std::string(what) + " and " + with + " that nothing puts in an order").c_str());
}

}  // namespace

void Clock::learn(int actor, uint32_t before) {
  if (before_.size() <= size_t(actor)) before_.resize(size_t(actor) + 1);
  before_[size_t(actor)] = std::max(before_[size_t(actor)], before);
}
void Clock::learn(const Clock& other) {
  for (size_t actor = 0; actor < other.before_.size(); ++actor) learn(int(actor), other.before_[actor]);
}

Races::MailboxFacts& Races::facts(const void* mailbox) {
  const auto [found, is_new] = mailboxes_.try_emplace(mailbox);
  if (is_new) found->second.actor = actors_++;
  return found->second;
}

void Races::begin(Block& block) { block.actor = actors_++; }

Races::View Races::view() {
  const Block& block = *self().block;
  return {{block.actor, self().thread, block.interval}, &block.known, &self().known};
}

bool Races::View::is_over(const Moment& moment) const {
  if (moment.actor == now.actor && moment.thread == now.thread) return true;
  return moment.interval < std::max(of_block->of(moment.actor), of_thread->of(moment.actor));
}

template <class Visit>
void Races::each_place(const void* from, size_t bytes, Visit visit) {
  const auto first = reinterpret_cast<uintptr_t>(from) / place_bytes, end = first + bytes / place_bytes;
  for (uintptr_t i = first; i < end;) {
    std::unique_ptr<Page>& page = pages_[i / page_places];
    if (!page) page = std::make_unique<Page>();
    for (const uintptr_t page_end = std::min(end, (i / page_places + 1) * page_places); i < page_end; ++i)
      visit((*page)[i % page_places]);
  }
}

void Races::read(const void* from, size_t bytes, std::string_view what) {
  const View view = this->view();
  const auto is_over = [&](const Moment& moment) { return view.is_over(moment); };
  each_place(from, bytes, [&](Place& place) {
    if (!place.writes.empty() && !any_of(place.writes, is_over)) race(what, "a write");
    const auto mine = find(place.reads, view.now.actor, &Moment::actor);
    if (mine == place.reads.end())
      place.reads.push_back(view.now);
    else if (mine->interval < view.now.interval)
      *mine = view.now;
    else if (mine->thread != view.now.thread)
      mine->thread = several;
  });
}

void Races::write(void* to, const void* value, size_t bytes, std::string_view what) {
  const View view = this->view();
  write(view, view.now, to, value, bytes, what);
}

// What is there already may be written again at any time, also while others read it.
void Races::write(const View& view, const Moment& as, void* to, const void* value, size_t bytes,
                  std::string_view what) {
  const auto is_over = [&](const Moment& moment) { return view.is_over(moment); };
  const bool changes = std::memcmp(to, value, bytes) != 0;
  each_place(to, bytes, [&](Place& place) {
    const bool after_reads = all_of(place.reads, is_over), after_writes = all_of(place.writes, is_over);
    if (changes && !after_reads) race(what, "a read");
    if (changes && !after_writes) race(what, "another write");
    if (after_reads && after_writes) place.reads.clear(), place.writes.clear();
    place.writes.push_back(as);
  });
  std::memcpy(to, value, bytes);
}

void Races::release(const void* counter) { counters_[counter].learn(sender().known); }

void Races::acquire(const void* counter) {
  if (const auto found = counters_.find(counter); found != counters_.end()) {
    self().known.learn(found->second);
    self().block->acquired.learn(found->second);
  }
}

Sender Races::sender() {
  const View view = this->view();
  Sender sender{view.now, *view.of_block};
  sender.known.learn(*view.of_thread);
  return sender;
}
void Races::deliver(const Sender& sender, const void* mailbox, uint32_t phase, void* to, const void* value,
                    size_t bytes, std::string_view what) {
  MailboxFacts& found = facts(mailbox);
  write({sender.moment, &sender.known, &sender.known}, {found.actor, 0, phase}, to, value, bytes, what);
  found.incoming.learn(sender.known);
}
void Races::phase_is_over(const void* mailbox) {
  MailboxFacts& found = facts(mailbox);
  found.complete.learn(found.incoming);
}
void Races::waited_for(const void* mailbox, uint32_t phase) {
  const MailboxFacts& found = facts(mailbox);
  for (Clock* clock : {&self().known, &self().block->acquired}) {
    clock->learn(found.complete);
    clock->learn(found.actor, phase + 1);
  }
}

void Races::block_met(Block& block) {
  block.known.learn(block.acquired);
  block.known.learn(block.actor, ++block.interval);
}
void Races::cluster_met(Cluster& cluster) {
  Clock all;
  for (Block& block : cluster.blocks) {
    block_met(block);
    all.learn(block.known);
  }
  for (Block& block : cluster.blocks) block.known.learn(all);
}

void Races::forget(const Block& block) {
  if (pages_.empty()) return;  // nobody tells what the kernels built for the CPU access
  each_place(block.shared, block.shared_bytes, [](Place& place) { place = {}; });
  for (auto i = mailboxes_.begin(); i != mailboxes_.end();) {
    const auto* at = static_cast<const unsigned char*>(i->first);
    i = at >= block.shared && at < block.shared + block.shared_bytes ? mailboxes_.erase(i) : std::next(i);
  }
}
void Races::forget() { *this = {}; }

}  // namespace fusedrnn::cuda::host
