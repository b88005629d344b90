// What the blocks of a cluster send each other: stores into each other's shared memory, which a mailbox there counts.
// Every block sends to every block in every step, and only when it has read the message before. So two buffers by turns
// are enough: who sends message m + 2 has got message m + 1 from all, and they had read message m. Every message is
// waited for, so none comes to a block that has ended.
#pragma once

#include "device.cuh"

namespace fusedrnn::cuda {

// Where the block's own message goes, and where it finds the others'. A block that is alone meets its threads instead.
class Inbox {
 public:
  FUSEDRNN_DEVICE explicit Inbox(int blocks)
      : mailboxes_(reinterpret_cast<Mailbox*>(shared_memory())), alone_(blocks == 1) {
    if (thread_index() < 2) open(mailboxes_ + thread_index());
  }
  // Which of the two buffers.
  FUSEDRNN_DEVICE int buffer() const { return int(messages_ % 2); }
  // The next message, of so many bytes, goes to the other buffer.
  FUSEDRNN_DEVICE void expect(uint32_t bytes) {
    ++messages_;
    if (!alone_ && thread_index() == 0) cuda::expect(mailboxes_ + buffer(), bytes);
  }
  FUSEDRNN_DEVICE void receive() const {
    if (alone_)
      sync_block();
    else if (messages_)
      wait_for(mailboxes_ + buffer(), (messages_ - 1) / 2);
  }
  // A part of the message, to the same place in another block or in this one.
  FUSEDRNN_DEVICE void send(const Vector& v, Vector* to, int block) const {
    if (alone_)
      *to = v;
    else
      cuda::send(v, to, mailboxes_ + buffer(), block);
  }
  FUSEDRNN_DEVICE void send(float a, float b, float* to, int block) const {
    if (alone_)
      to[0] = a, to[1] = b;
    else
      cuda::send(a, b, to, mailboxes_ + buffer(), block);
  }

 private:
  Mailbox* mailboxes_;
  uint32_t messages_ = 0;
  bool alone_;
};

}  // namespace fusedrnn::cuda
