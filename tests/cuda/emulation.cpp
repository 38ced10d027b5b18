// Fibers, their scheduler, barriers and warps; see include/emulation.h. Compiled without instrumentation.
#include "emulation.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "fibers switch stacks by instructions of x86-64"
#endif

extern "C" {
// Of the dynamic linker: the address of a variable of this thread, {module, offset}.
void* __tls_get_addr(size_t index[2]);

// Saves the registers a call must preserve on the stack, that stack in *from, and goes on from where `to` was saved.
void emulation_switch(void** from, void* to);
}

asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
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
.size emulation_switch, .-emulation_switch
)");

namespace emulation {

Coordinates current;
int error = 0;

namespace {

constexpr size_t kPage = 4096, kStackBytes = 256 << 10;
constexpr int kSavedRegisters = 6;

// A stack of its own for each thread of a block, with a page below it that must not be touched. Reused by every block.
class Stack {
 public:
  explicit Stack(void (*entry)()) : entry_(entry) {
    void* const memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) std::abort();
    bottom_ = static_cast<char*>(memory);
  }
  // What emulation_switch takes to start `entry` on this stack.
  void* fresh() const {
    void** top = reinterpret_cast<void**>(bottom_ + kStackBytes) - 2;
    *--top = nullptr;  // entry's return address, never used; keeps the alignment of a called function
    *--top = reinterpret_cast<void*>(entry_);
    return top - kSavedRegisters;
  }

 private:
  void (*entry_)();
  char* bottom_;
};

enum class State { ready, waiting, finished };

struct Thread {
  Coordinates at;
  int number = 0;  // in the block
  State state = State::ready;
  std::string waiting_for;
  void* stack_pointer = nullptr;
  uint64_t given = 0;
  int source = 0;
  Received received = {};
};

// A warp operation that some of its lanes have reached.
struct Trade {
  const char* operation;
  unsigned mask, arrived;
};

struct Warp {
  std::vector<Trade> pending;
  unsigned lanes = 0;      // that exist
  unsigned syncwarps = 0;  // of all of them, so far
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> ready, ready_but_slow;
  int first_slow = 0, last_slow = 0;
  int at_barrier = 0, votes = 0, counted = 0, finished = 0;
  unsigned barriers = 0;  // so far
};

// The state of the one launch that runs.
const char* kernel_name;
const std::function<void()>* body;
std::mt19937 order;
Block block;
Thread* running;
std::vector<Stack> stacks;
void* scheduler;

// --- shared memory ----------------------------------------------------------------------------------------------

// __shared__ variables are the thread-local ones of the module that the kernel is in (and nothing else there is).
struct SharedMemory {
  char* data = nullptr;
  size_t size = 0;
};

SharedMemory shared_memory_of(const void* kernel) {
  struct Search {
    const char* kernel;
    SharedMemory found;
  } search{static_cast<const char*>(kernel), {}};
  const auto look = [](dl_phdr_info* module, size_t, void* argument) {
    auto& wanted = *static_cast<Search*>(argument);
    bool contains_kernel = false;
    size_t size = 0;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& segment = module->dlpi_phdr[i];
      const char* const start = reinterpret_cast<const char*>(module->dlpi_addr + segment.p_vaddr);
      if (segment.p_type == PT_LOAD && start <= wanted.kernel && wanted.kernel < start + segment.p_memsz)
        contains_kernel = true;
      if (segment.p_type == PT_TLS) size = segment.p_memsz;
    }
    if (!contains_kernel) return 0;
    size_t index[2] = {module->dlpi_tls_modid, 0};
    if (size) wanted.found = {static_cast<char*>(__tls_get_addr(index)), size};
    return 1;
  };
  dl_iterate_phdr(look, &search);
  return search.found;
}

// Who touched a byte of shared memory last. Accesses of different threads must be ordered, by a barrier of the block
// or by a __syncwarp of their warp, unless all of them read.
struct Access {
  int thread = -1;
  bool several = false, several_warps = false;  // threads, since the last barrier that orders them
  unsigned barriers = 0, syncwarps = 0;
};
struct Byte {
  Access written, read;
};

SharedMemory shared;
std::vector<Byte> history;

void start_shared_memory() {
  std::memset(shared.data, 0xFF, shared.size);  // NaN in every format
  history.assign(shared.size, Byte{});
}

Warp& warp_of(int thread) {
  return block.warps[static_cast<size_t>(thread / kWarpSize)];
}

bool races_with_running(const Access& access) {
  if (access.thread < 0 || access.barriers != block.barriers) return false;
  if (access.several_warps) return true;
  if (access.thread == running->number && !access.several) return false;
  const bool same_warp = access.thread / kWarpSize == running->number / kWarpSize;
  return !same_warp || access.syncwarps == warp_of(running->number).syncwarps;
}

void note(Access& access) {
  const int me = running->number;
  const unsigned syncwarps = warp_of(me).syncwarps;
  const bool earlier = access.thread >= 0 && access.barriers == block.barriers;
  const bool other_warp = earlier && access.thread / kWarpSize != me / kWarpSize;
  const bool unordered = earlier && !other_warp && access.syncwarps == syncwarps;
  access.several = unordered && (access.several || access.thread != me);
  access.several_warps = other_warp || (earlier && access.several_warps);
  access.thread = me;
  access.barriers = block.barriers;
  access.syncwarps = syncwarps;
}

void check_access(const void* address, size_t size, bool writes) {
  if (running == nullptr) return;
  const size_t first = static_cast<size_t>(static_cast<const char*>(address) - shared.data);
  if (first >= shared.size) return;
  for (Byte* byte = &history[first]; byte < history.data() + std::min(first + size, shared.size); ++byte) {
    if (!writes && byte->written.thread < 0) fail("reads shared memory that this block has not written");
    if (races_with_running(byte->written))
      fail("%s shared memory that thread %d writes, with no barrier between", writes ? "writes" : "reads",
           byte->written.thread);
    if (writes && races_with_running(byte->read))
      fail("writes shared memory that thread %d reads, with no barrier between", byte->read.thread);
    note(writes ? byte->written : byte->read);
  }
}

// --- fibers -----------------------------------------------------------------------------------------------------

// From the running thread back to the scheduler. A thread that has finished does not come back.
void leave() {
  emulation_switch(&running->stack_pointer, scheduler);
}

void thread_main() {
  (*body)();
  running->state = State::finished;
  ++block.finished;
  leave();
}

void resume(Thread& thread) {
  running = &thread;
  current = thread.at;
  emulation_switch(&scheduler, thread.stack_pointer);
  running = nullptr;
}

size_t draw(size_t count) {
  return std::uniform_int_distribution<size_t>(0, count - 1)(order);
}

// From one barrier to the next, a thread or its warp runs only when no other can: in an order that is merely random,
// hardly any thread would fall far behind the rest.
void choose_slow_threads() {
  const int thread = static_cast<int>(draw(block.threads.size()));
  const bool whole_warp = draw(2);
  block.first_slow = whole_warp ? thread - thread % kWarpSize : thread;
  block.last_slow = whole_warp ? block.first_slow + kWarpSize - 1 : thread;
}

void make_ready(Thread& thread) {
  thread.state = State::ready;
  const bool slow = block.first_slow <= thread.number && thread.number <= block.last_slow;
  (slow ? block.ready_but_slow : block.ready).push_back(thread.number);
}

// Null when no thread can run.
Thread* take_next() {
  auto& ready = block.ready.empty() ? block.ready_but_slow : block.ready;
  if (ready.empty()) return nullptr;
  std::swap(ready[draw(ready.size())], ready.back());
  Thread* const next = &block.threads[static_cast<size_t>(ready.back())];
  ready.pop_back();
  return next;
}

void wait(std::string what) {
  running->state = State::waiting;
  running->waiting_for = std::move(what);
  leave();
}

void run_block(uint3 index, dim3 grid, dim3 size) {
  const int count = static_cast<int>(size.count());
  block = Block{};
  block.threads.resize(static_cast<size_t>(count));
  block.warps.resize(static_cast<size_t>((count + kWarpSize - 1) / kWarpSize));
  choose_slow_threads();
  for (int t = 0; t < count; ++t) {
    Thread& thread = block.threads[static_cast<size_t>(t)];
    const unsigned n = static_cast<unsigned>(t);
    thread.number = t;
    thread.at = {{n % size.x, n / size.x % size.y, n / size.x / size.y}, index, size, grid, t % kWarpSize};
    thread.stack_pointer = stacks[static_cast<size_t>(t)].fresh();
    warp_of(t).lanes |= 1u << thread.at.lane;
    make_ready(thread);
  }
  start_shared_memory();
  while (Thread* const next = take_next()) resume(*next);
  for (Thread& thread : block.threads)
    if (thread.state == State::waiting) {
      running = &thread;
      current = thread.at;
      fail("waits for ever at %s: %d of the block's %d threads have finished, and the others wait too",
           thread.waiting_for.c_str(), block.finished, count);
    }
}

}  // namespace

int wait_for_block(bool vote) {
  const int count = static_cast<int>(block.threads.size());
  block.votes += vote;
  if (++block.at_barrier < count) {
    wait("__syncthreads");
    return block.counted;
  }
  block.counted = block.votes;
  block.at_barrier = block.votes = 0;
  ++block.barriers;
  choose_slow_threads();
  for (Thread& thread : block.threads)
    if (&thread != running) make_ready(thread);
  // The last to come is not always the first to go on.
  make_ready(*running);
  leave();
  return block.counted;
}

Received trade(const char* operation, unsigned mask, uint64_t value, int source) {
  Warp& warp = warp_of(running->number);
  const unsigned me = 1u << running->at.lane;
  if (!(mask & me)) fail("%s: lane %d is not in its own mask %08x", operation, running->at.lane, mask);
  if (mask & ~warp.lanes) fail("%s: the mask %08x names lanes that this warp does not have", operation, mask);
  Thread* const lanes = &block.threads[static_cast<size_t>(running->number - running->at.lane)];
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1 && lanes[lane].state == State::finished)
      fail("%s: the mask %08x names lane %d, which has finished", operation, mask, lane);

  auto pending = std::find_if(warp.pending.begin(), warp.pending.end(), [&](const Trade& t) { return t.mask & mask; });
  if (pending == warp.pending.end()) pending = warp.pending.insert(pending, {operation, mask, 0});
  if (pending->mask != mask || std::strcmp(pending->operation, operation))
    fail("%s with mask %08x, while lanes that it names are at %s with mask %08x", operation, mask, pending->operation,
         pending->mask);
  running->given = value;
  running->source = source;
  pending->arrived |= me;
  if (pending->arrived != mask) {
    wait(operation);
    return running->received;
  }

  warp.pending.erase(pending);
  if (mask == warp.lanes && !std::strcmp(operation, "__syncwarp")) ++warp.syncwarps;
  unsigned votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1 && lanes[lane].given) votes |= 1u << lane;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const int from = lanes[lane].source;
    lanes[lane].received = {mask >> from & 1 ? lanes[from].given : kPoison, votes};
    make_ready(lanes[lane]);
  }
  leave();
  return running->received;
}

void fail(const char* format, ...) {
  std::fprintf(stderr, "emulation: %s: ", kernel_name);
  if (running != nullptr) {
    const uint3 b = running->at.block, t = running->at.thread;
    std::fprintf(stderr, "thread (%u, %u, %u) of block (%u, %u, %u): ", t.x, t.y, t.z, b.x, b.y, b.z);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  std::_Exit(86);
}

bool run(const char* name, const void* kernel, dim3 grid, dim3 size, const std::function<void()>& thread) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  if (size.count() - 1 >= kMaxThreadsPerBlock || size.z > 64) return false;
  if (grid.count() == 0 || grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX) return false;

  const char* const seed = std::getenv("FUSEDVAE_EMULATION_SEED");
  order.seed(static_cast<unsigned>(seed ? std::atoi(seed) : 0));
  kernel_name = name;
  body = &thread;
  shared = shared_memory_of(kernel);
  if (shared.size > kSharedBytesPerBlock) fail("%zu bytes of shared memory", shared.size);
  while (stacks.size() < size.count()) stacks.emplace_back(thread_main);

  std::vector<unsigned> blocks(grid.count());
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (const unsigned b : blocks) run_block({b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y}, grid, size);
  return true;
}

}  // namespace emulation

// --- the race check ---------------------------------------------------------------------------------------------

// Code compiled with -fsanitize=thread, and linked without, calls these at each access to memory.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* address, size_t size) {
  emulation::check_access(address, size, false);
}
void __tsan_write_range(void* address, size_t size) {
  emulation::check_access(address, size, true);
}
#define FUSEDVAE_HOOKS(size)                         \
  void __tsan_read##size(void* address) {            \
    emulation::check_access(address, size, false);   \
  }                                                  \
  void __tsan_write##size(void* address) {           \
    emulation::check_access(address, size, true);    \
  }                                                  \
  void __tsan_unaligned_read##size(void* address) {  \
    emulation::check_access(address, size, false);   \
  }                                                  \
  void __tsan_unaligned_write##size(void* address) { \
    emulation::check_access(address, size, true);    \
  }
FUSEDVAE_HOOKS(1)
FUSEDVAE_HOOKS(2)
FUSEDVAE_HOOKS(4)
FUSEDVAE_HOOKS(8)
FUSEDVAE_HOOKS(16)
}
