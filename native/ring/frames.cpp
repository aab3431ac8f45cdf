#ifdef __linux__
#include "frames.h"

#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <algorithm>

#include "bell.h"

namespace trinity {

namespace {

constexpr double kTickS = 0.05;
constexpr uint32_t kSilentMs = 3000;  // connection.py:SILENCE_S

// The first `done` bytes of the pieces are dealt with.
void skip(iovec*& pieces, int& num, size_t done) {
  while (num && done >= pieces->iov_len) done -= pieces->iov_len, ++pieces, --num;
  if (num) pieces->iov_base = static_cast<char*>(pieces->iov_base) + done, pieces->iov_len -= done;
}

// Whether its host, which is asked every second, has said nothing for long: it has vanished, or the way to it. False where a socket
// is none of TCP.
bool is_silent(int fd) {
  tcp_info state = {};
  socklen_t size = sizeof state;
  if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &state, &size)) return false;
  return std::max(state.tcpi_retransmits, state.tcpi_probes) > 1 && state.tcpi_last_ack_recv > kSilentMs;
}

}  // namespace

Boxes::Boxes(int num) : num_bytes_(static_cast<uint64_t>(num) * kBoxBytes) {
  void* memory = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory != MAP_FAILED) memory_ = static_cast<char*>(memory);
}

Boxes::~Boxes() {
  if (memory_) munmap(memory_, num_bytes_);
}

bool FrameSocket::is_over(double until_s) { return now_s() >= until_s || is_silent(fd_); }

bool FrameSocket::receive(iovec* pieces, int num, double until_s) {
  for (skip(pieces, num, 0); num;) {
    msghdr message = {};
    message.msg_iov = pieces, message.msg_iovlen = static_cast<size_t>(num);
    const ssize_t got = recvmsg(fd_, &message, MSG_WAITALL);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) return false;
    skip(pieces, num, got < 0 ? 0 : static_cast<size_t>(got));
    if (num && is_over(until_s)) return false;
  }
  return true;
}

bool FrameSocket::send_some(iovec*& pieces, int& num) {
  msghdr message = {};
  message.msg_iov = pieces, message.msg_iovlen = static_cast<size_t>(num);
  const ssize_t sent = sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent < 0 && errno != EAGAIN && errno != EINTR) return false;
  skip(pieces, num, sent < 0 ? 0 : static_cast<size_t>(sent));
  return true;
}

bool FrameSocket::wait(short events, double until_s, short& ready) {
  for (;;) {
    pollfd asked = {fd_, events, 0};
    const double left_s = std::min(kTickS, std::max(0.0, until_s - now_s()));
    if (poll(&asked, 1, static_cast<int>(1000 * left_s) + 1) > 0) return ready = asked.revents, true;
    if (is_over(until_s)) return false;
  }
}

bool FrameSocket::is_readable() {
  pollfd asked = {fd_, POLLIN, 0};
  return poll(&asked, 1, 0) > 0;
}

}  // namespace trinity
#endif
