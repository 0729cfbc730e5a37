// Pages of mapped files that are not there any more read as zeros, where the system would end the process (SIGBUS);
// and which file it was is kept for whoever asks.
//
// The handler makes one system call and reads a table that is complete before it is seen, and never freed.

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace {

struct Range {
  uintptr_t begin, end;
};

struct Table {
  std::vector<Range> ranges;
  uintptr_t page_bytes;
  std::atomic<int64_t> lost{-1};
};

std::atomic<Table *> current{nullptr};
struct sigaction before;

void on_bus_error(int, siginfo_t *info, void *) {
  const int kept_errno = errno;
  Table *table = current.load();
  const uintptr_t page = reinterpret_cast<uintptr_t>(info->si_addr) / table->page_bytes * table->page_bytes;
  for (size_t i = 0; i < table->ranges.size(); ++i) {
    const Range &range = table->ranges[i];
    if (page < range.begin || page >= range.end) continue;
    // what lies behind it in the file is gone as well
    void *got = mmap(reinterpret_cast<void *>(page), range.end - page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (got == MAP_FAILED) break;
    table->lost.store(static_cast<int64_t>(i));
    errno = kept_errno;
    return;
  }
  sigaction(SIGBUS, &before, nullptr);  // not ours: it happens again, as if we were not there
}

}  // namespace

extern "C" {

// ranges: begin and end of each, addresses of pages. Takes the place of an earlier table. 0, or an errno.
int watch(const uint64_t *ranges, int64_t count) {
  Table *table = new Table;
  table->page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  for (int64_t i = 0; i < count; ++i) {
    table->ranges.push_back({static_cast<uintptr_t>(ranges[2 * i]), static_cast<uintptr_t>(ranges[2 * i + 1])});
  }
  if (current.exchange(table) != nullptr) return 0;
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  return sigaction(SIGBUS, &action, &before) == 0 ? 0 : errno;
}

// The range that zeros were last put into; -1: none.
int64_t lost() {
  Table *table = current.load();
  return table == nullptr ? -1 : table->lost.load();
}
}
