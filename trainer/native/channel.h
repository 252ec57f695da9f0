// Sums over nodes: the leader of each node exchanges vectors with others' over TCP connections.
//
// Connections come from dist/channel.py, which explains who is connected with whom. A sum has a
// stream, the layer that it belongs to: sums of different streams may be under way at once and
// begin in a different order on each node. Those of one stream follow each other.

#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace batch_norm {

// What a message begins with; `count` numbers of 8 bytes follow.
struct Header {
  uint32_t stream, call, count, flags;
};
constexpr uint32_t kInteger = 1, kDiffers = 2;  // flags
constexpr uint32_t kBeat = 0xffffffff;          // a stream whose messages only say: I am alive

struct Message {
  Header header;
  std::vector<uint64_t> numbers;
};

// A connection with another leader, shared by all threads that add up.
class Link {
 public:
  explicit Link(int socket) : socket_(socket) {}
  ~Link() { close(socket_); }

  bool lost() const { return lost_; }

  void lose() {
    lost_ = true;
    shutdown(socket_, SHUT_RDWR);  // ends every poll, and tells the peer
    std::lock_guard<std::mutex> guard(mutex_);
    arrived_.notify_all();
  }

  bool send(const Header& header, const void* numbers) {
    std::lock_guard<std::mutex> guard(writing_);
    return write(header, numbers);
  }

  // Waits for the next message of a stream; false if there will be none.
  bool receive(uint32_t stream, Message* message) {
    std::unique_lock<std::mutex> lock(mutex_);
    std::map<uint32_t, std::deque<Message>>::iterator messages;
    while ((messages = messages_.find(stream)) == messages_.end()) {
      if (lost_) return false;
      if (reading_) {
        arrived_.wait(lock);
        continue;
      }
      lock.unlock();
      take_in(POLLIN, 200);
      lock.lock();
    }
    *message = std::move(messages->second.front());
    messages->second.pop_front();
    if (messages->second.empty()) messages_.erase(messages);
    return true;
  }

  // Called at regular intervals: says that this leader is alive, and loses a peer that has not
  // said so for `patience` of them. Intervals in which this process was stopped do not count.
  void beat(int patience) {
    take_in(POLLIN, 0);
    silence_ = heard_.exchange(false) ? 0 : silence_ + 1;
    if (silence_ > patience) lose();
    std::unique_lock<std::mutex> lock(writing_, std::try_to_lock);  // whoever writes is heard
    if (lock && ready(POLLOUT, 0)) write({kBeat, 0, 0, 0}, nullptr);
  }

 private:
  bool write(const Header& header, const void* numbers) {
    std::vector<char> bytes(sizeof header + 8 * header.count);
    std::memcpy(bytes.data(), &header, sizeof header);
    if (header.count) std::memcpy(bytes.data() + sizeof header, numbers, 8 * header.count);
    for (size_t sent = 0; sent < bytes.size() && !lost_;) {
      const ssize_t more = ::send(socket_, bytes.data() + sent, bytes.size() - sent,
                                  MSG_DONTWAIT | MSG_NOSIGNAL);
      if (more > 0)
        sent += more;
      else if (errno == EAGAIN) {
        // The peer may be waiting here as well, until what it sends is taken in.
        if (!take_in(POLLIN | POLLOUT, 200)) ready(POLLOUT, 10);
      } else if (errno != EINTR)
        lose();
    }
    return !lost_;
  }

  bool ready(short events, int milliseconds) {
    pollfd polled{socket_, events, 0};
    return poll(&polled, 1, milliseconds) > 0 && polled.revents & events;
  }

  // Waits for one of `events` and reads what has arrived; false if another thread is reading.
  bool take_in(short events, int milliseconds) {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      if (reading_) return false;
      reading_ = true;
    }
    ready(events, milliseconds);
    ssize_t more;
    while ((more = recv(socket_, chunk_, sizeof chunk_, MSG_DONTWAIT)) > 0) {
      heard_ = true;
      unread_.insert(unread_.end(), chunk_, chunk_ + more);
    }
    const bool ended = more == 0 || (errno != EAGAIN && errno != EINTR);
    std::lock_guard<std::mutex> guard(mutex_);
    sort_out();
    if (ended) lost_ = true;
    reading_ = false;
    arrived_.notify_all();
    return true;
  }

  // Moves whole messages from the bytes that have been read to their streams.
  void sort_out() {
    size_t done = 0;
    Message message;
    while (unread_.size() - done >= sizeof message.header) {
      std::memcpy(&message.header, &unread_[done], sizeof message.header);
      const size_t size = 8 * size_t(message.header.count);
      if (unread_.size() - done < sizeof message.header + size) break;
      done += sizeof message.header;
      message.numbers.resize(message.header.count);
      if (size) std::memcpy(message.numbers.data(), &unread_[done], size);
      done += size;
      if (message.header.stream != kBeat) messages_[message.header.stream].push_back(message);
    }
    unread_.erase(unread_.begin(), unread_.begin() + done);
  }

  const int socket_;
  std::atomic<bool> lost_{false}, heard_{true};
  int silence_ = 0;     // in calls of beat()
  std::mutex writing_;  // held for a message
  std::mutex mutex_;    // of what follows
  std::condition_variable arrived_;
  bool reading_ = false;  // one thread at a time, which alone uses the next two
  char chunk_[1 << 16];
  std::vector<char> unread_;
  std::map<uint32_t, std::deque<Message>> messages_;  // by stream; none that is empty
};

// What became of a sum; SharedMemorySum of shared_memory.py knows the numbers.
enum Outcome { kSummed = 0, kLost = 1, kMismatch = 2 };
constexpr int kBeats = 5;  // missed at least before a peer counts as lost

// The leader of node `node` among those of all nodes.
class Channel {
 public:
  Channel(int node, int nodes, const std::vector<int>& peers, const std::vector<int>& sockets,
          double timeout)
      : node_(node), nodes_(nodes) {
    for (size_t i = 0; i < peers.size(); ++i) links_[peers[i]].reset(new Link(sockets[i]));
    const auto interval = std::chrono::duration<double>(std::min(1., timeout / kBeats));
    const int patience = std::max<int>(kBeats, timeout);
    pulse_ = std::thread([=] {
      std::unique_lock<std::mutex> lock(mutex_);
      while (!closing_.wait_for(lock, interval, [=] { return closed_; }))
        for (auto& link : links_) link.second->beat(patience);
    });
  }
  ~Channel() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      closed_ = true;
    }
    closing_.notify_all();
    pulse_.join();
  }

  // The first peer without which a sum could not be made; -1 if none was.
  int lost() const { return lost_; }

  // Loses all peers, which would otherwise wait for sums that this node will not make.
  void abandon() {
    for (auto& link : links_) link.second->lose();
  }

  // Replaces values, of the calls-th sum of a stream, by their sum over nodes: recursive doubling,
  // as in Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
  // MPICH", 2005. Each pair adds the same two vectors, the lower node's first, so that all nodes
  // get the same bits.
  template <typename T>
  Outcome sum(uint32_t stream, int64_t call, T* values, int count) {
    const uint32_t kind = std::is_integral<T>::value ? kInteger : 0;
    Header own{stream, uint32_t(call), uint32_t(count), kind};
    int whole = 1;  // nodes that double; each of the others has one of them add its values first
    while (2 * whole <= nodes_) whole *= 2;
    const int helper = node_ - whole, helped = node_ + whole;
    bool done = true;
    if (helper >= 0) {
      done = send(helper, own, values) && receive(helper, &own, values, false);
    } else {
      if (helped < nodes_) done = receive(helped, &own, values, true);
      for (int distance = 1; done && distance < whole; distance *= 2) {
        const int peer = node_ ^ distance;
        done = send(peer, own, values) && receive(peer, &own, values, true);
      }
      if (done && helped < nodes_) done = send(helped, own, values);
    }
    if (!done) abandon();
    return !done ? kLost : own.flags & kDiffers ? kMismatch : kSummed;
  }

 private:
  bool send(int peer, const Header& header, const void* values) {
    return links_[peer]->send(header, values) || lose(peer);
  }

  // Adds what a peer sends, or takes it over. A difference is passed on, to end the sum everywhere.
  template <typename T>
  bool receive(int peer, Header* own, T* values, bool add) {
    Message message;
    if (!links_[peer]->receive(own->stream, &message)) return lose(peer);
    const Header& theirs = message.header;
    const bool alike = theirs.call == own->call && theirs.count == own->count;
    if (!alike || theirs.flags != own->flags) {
      own->flags |= kDiffers;
      return true;
    }
    for (uint32_t i = 0; i < theirs.count; ++i) {
      T number;
      std::memcpy(&number, &message.numbers[i], sizeof number);
      values[i] = !add ? number : peer < node_ ? number + values[i] : values[i] + number;
    }
    return true;
  }

  bool lose(int peer) {
    int none = -1;
    lost_.compare_exchange_strong(none, peer);
    return false;
  }

  const int node_, nodes_;
  std::map<int, std::unique_ptr<Link>> links_;
  std::atomic<int> lost_{-1};
  std::mutex mutex_;
  std::condition_variable closing_;
  bool closed_ = false;
  std::thread pulse_;
};

}  // namespace batch_norm
