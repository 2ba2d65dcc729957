#include "emulator.h"

#include <csetjmp>
#include <csignal>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

Thread* current = nullptr;
dim3 grid_size;
dim3 block_size;

namespace {

constexpr size_t kStack = size_t{64} << 10;
constexpr long kPatience = 200000;  // turns in which every thread only slept

cudaError_t error = cudaSuccess;
std::string message;
uint64_t state = 1;
uint64_t seed = 0;
unsigned resident_blocks = 4;
const std::function<void()>* kernel = nullptr;
sigjmp_buf escape;

unsigned random_below(unsigned limit) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return static_cast<unsigned>((state >> 20) % limit);
}

#ifdef __x86_64__

extern "C" void molt_emulator_switch(void** save, void* to);
asm(R"(
.text
.globl molt_emulator_switch
.hidden molt_emulator_switch
.type molt_emulator_switch, @function
molt_emulator_switch:
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
)");

void* scheduler = nullptr;

void run(Thread& thread) {
  current = &thread;
  molt_emulator_switch(&scheduler, thread.stack_pointer);
}

void stop() { molt_emulator_switch(&current->stack_pointer, scheduler); }

void entry() {
  (*kernel)();
  current->wait = Wait::done;
  stop();
}

void prepare(Thread& thread, char* stack) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 1;  // a function begins 8 bytes off the ABI's alignment
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

#else

ucontext_t scheduler;

void run(Thread& thread) {
  current = &thread;
  swapcontext(&scheduler, static_cast<ucontext_t*>(thread.stack_pointer));
}

void stop() { swapcontext(static_cast<ucontext_t*>(current->stack_pointer), &scheduler); }

void entry() {
  (*kernel)();
  current->wait = Wait::done;
  stop();
}

void prepare(Thread& thread, char* stack) {
  if (thread.stack_pointer == nullptr) thread.stack_pointer = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(thread.stack_pointer);
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, &entry, 0);
}

#endif

struct Block {
  std::vector<Thread> threads;
  std::vector<std::pair<const void*, void*>> shared;
  char* stacks = nullptr;
  unsigned alive = 0;
  bool busy = false;
  unsigned epoch = 0;  // barriers so far
  Clock acquired;      // by any thread, before the last barrier
};

struct Write {
  unsigned block;
  unsigned epoch;
  unsigned thread;
};

std::unordered_map<const void*, Write> writes_so_far;  // of a launch
std::unordered_map<const void*, Clock> published;       // by counter

void join(Clock& to, const Clock& from) {
  for (const auto& [block, epochs] : from) to[block] = std::max(to[block], epochs);
}

bool knows(const Clock& clock, const Write& write) {
  const auto found = clock.find(write.block);
  return found != clock.end() && found->second > write.epoch;
}

std::vector<std::unique_ptr<Block>> blocks;
Block* current_block = nullptr;
bool slept_only = true;

void start(Block& block, unsigned number, dim3 size) {
  const unsigned count = size.x;
  if (block.threads.size() < count) {
    if (block.stacks != nullptr) munmap(block.stacks, kStack * block.threads.size());
    block.threads.resize(count);
    block.stacks = static_cast<char*>(
        mmap(nullptr, kStack * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = block.threads[t];
    thread.index = dim3(t, 0, 0);
    thread.block = dim3(number, 0, 0);
    thread.lane = t % 32;
    thread.wait = Wait::none;
    thread.acquired.clear();
    prepare(thread, block.stacks + kStack * t);
  }
  block.alive = count;
  block.busy = true;
  block.epoch = 0;
  block.acquired.clear();
}

void finish(Block& block) {
  for (auto& [site, data] : block.shared) release(data);
  block.shared.clear();
  block.busy = false;
}

// Lets the threads of one warp run, in an order of chance, until each waits, ends, or chooses to give way.
void run_warp(Block& block, unsigned first, unsigned count) {
  unsigned order[32];
  for (unsigned i = 0; i < count; ++i) {
    const unsigned j = random_below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[first + order[i]];
    if (thread.wait != Wait::none) continue;
    run(thread);
    if (thread.wait == Wait::done) --block.alive;
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[first + i];
    if (thread.wait != Wait::warp) continue;
    bool complete = true;
    for (unsigned lane = 0; lane < count; ++lane) {
      if ((thread.mask >> lane & 1u) == 0) continue;
      const Thread& other = block.threads[first + lane];
      if (other.wait == Wait::done || (other.wait == Wait::warp && other.mask != thread.mask)) {
        fail("a warp intrinsic that not all lanes of its mask reach");
        return;
      }
      complete = complete && other.wait == Wait::warp;
    }
    if (!complete) continue;
    slept_only = false;
    const unsigned mask = thread.mask;
    for (unsigned lane = 0; lane < count; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      Thread& other = block.threads[first + lane];
      for (unsigned from = 0; from < count; ++from) other.values[from] = block.threads[first + from].value;
    }
    for (unsigned lane = 0; lane < count; ++lane) {
      if (mask >> lane & 1u) block.threads[first + lane].wait = Wait::none;
    }
  }
}

void release_barrier(Block& block, unsigned count) {
  unsigned waiting = 0;
  for (unsigned t = 0; t < count; ++t) waiting += block.threads[t].wait == Wait::block;
  if (waiting == 0) return;
  if (waiting < block.alive) return;
  if (block.alive < count) return fail("a barrier that some threads of the block have left behind");
  for (unsigned t = 0; t < count; ++t) {
    block.threads[t].wait = Wait::none;
    join(block.acquired, block.threads[t].acquired);
    block.threads[t].acquired.clear();
  }
  ++block.epoch;
  slept_only = false;
}

void schedule(dim3 grid, dim3 block_dim) {
  const unsigned count = block_dim.x;
  const unsigned warps = (count + 31) / 32;
  const unsigned slots = std::max(1u, std::min(resident_blocks, grid.x));
  while (blocks.size() < slots) blocks.push_back(std::make_unique<Block>());
  unsigned next = 0;
  unsigned running = 0;
  long idle = 0;
  while (error == cudaSuccess && (next < grid.x || running > 0)) {
    slept_only = true;
    for (unsigned s = 0; s < slots; ++s) {
      if (!blocks[s]->busy && next < grid.x) {
        start(*blocks[s], next++, block_dim);
        ++running;
        slept_only = false;
      }
    }
    // A few turns of chance, so that some blocks fall far behind others.
    for (unsigned turn = 0; turn < 2 * warps && error == cudaSuccess; ++turn) {
      const unsigned s = random_below(slots);
      Block& block = *blocks[s];
      if (!block.busy) continue;
      current_block = &block;
      const unsigned warp = random_below(warps);
      run_warp(block, warp * 32, std::min(32u, count - warp * 32));
      release_barrier(block, count);
      if (block.alive == 0) {
        finish(block);
        --running;
        slept_only = false;
      }
    }
    idle = slept_only ? idle + 1 : 0;
    if (idle > kPatience) fail("threads wait for what nobody does");
  }
  for (auto& block : blocks) {
    if (block->busy) finish(*block);
  }
}

void on_fault(int) { siglongjmp(escape, 1); }

}  // namespace

void fail(const char* what, cudaError_t code) {
  if (error == cudaSuccess) {
    error = code;
    message = what;
  }
}

void give_way(bool sleeping) {
  if (!sleeping) {
    slept_only = false;
    if (random_below(4) != 0) return;
  }
  stop();
}

void barrier() {
  slept_only = false;
  current->wait = Wait::block;
  stop();
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  if ((mask >> current->lane & 1u) == 0) fail("a warp intrinsic whose mask leaves out the caller");
  current->mask = mask;
  current->value = value;
  current->wait = Wait::warp;
  slept_only = false;
  stop();
  return current->values;
}

void note_access(const void* at, bool writes) {
  const Write own{current->block.x, current_block->epoch, current->index.x};
  const auto found = writes_so_far.find(at);
  if (found != writes_so_far.end()) {
    const Write& last = found->second;
    const bool before = last.block != own.block
                            ? knows(current_block->acquired, last) || knows(current->acquired, last)
                            : last.epoch < own.epoch || last.thread == own.thread;
    if (!before) fail("an access that nothing orders after another thread's write");
  }
  if (writes) writes_so_far[at] = own;
}

// What the thread itself wrote since the last barrier is left out, which asks for more than a GPU would.
void publish(const void* counter) {
  Clock& clock = published[counter];
  join(clock, current_block->acquired);
  join(clock, current->acquired);
  join(clock, {{current->block.x, current_block->epoch}});
}

void acquire(const void* counter) { join(current->acquired, published[counter]); }

void* shared_array(const void* site, size_t bytes, size_t alignment) {
  for (auto& [known, data] : current_block->shared) {
    if (known == site) return data;
  }
  // Some blocks find accesses beyond the end, the others those that ask for more than the type's alignment.
  void* data = allocate(bytes, alignment, (current->block.x + seed) % 2 == 0);
  current_block->shared.emplace_back(site, data);
  return data;
}

namespace {
struct Allocation {
  void* data;
  char* pages;
  size_t bytes;
};
std::vector<Allocation> allocations;
}  // namespace

// Between two pages that fault, ending at the second; filled with bytes that make NaN and absurd integers.
void* allocate(size_t bytes, size_t alignment, bool tight) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t room = bytes + (tight ? 0 : alignment);
  const size_t body = (room + page - 1) / page * page + (room == 0 ? page : 0);
  char* pages = static_cast<char*>(
      mmap(nullptr, body + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(pages + page, body, PROT_READ | PROT_WRITE);
  std::memset(pages + page, 0xff, body);
  char* data = pages + page + (body - bytes) / alignment * alignment;
  if (!tight && reinterpret_cast<uintptr_t>(data) % (2 * alignment) == 0) data -= alignment;
  allocations.push_back({data, pages, body + 2 * page});
  return data;
}

void release(void* data) {
  for (size_t i = allocations.size(); i-- > 0;) {
    if (allocations[i].data != data) continue;
    munmap(allocations[i].pages, allocations[i].bytes);
    allocations[i] = allocations.back();
    allocations.pop_back();
    return;
  }
}

void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  if (error != cudaSuccess) return;
  if (grid.x == 0 || block.x == 0 || block.x > 1024 || grid.x > 0x7fffffffu) return fail("a grid out of range");
  kernel = &body;
  grid_size = grid;
  block_size = block;
  writes_so_far.clear();
  published.clear();
  static char signal_stack[size_t{64} << 10];
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof(signal_stack);
  stack_t old_stack{};
  sigaltstack(&stack, &old_stack);
  struct sigaction action {};
  action.sa_handler = on_fault;
  action.sa_flags = SA_ONSTACK | SA_NODEFER;
  struct sigaction old_segv {};
  struct sigaction old_bus {};
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  if (sigsetjmp(escape, 1) == 0) {
    schedule(grid, block);
  } else {
    error = cudaErrorIllegalAddress;
    message = "illegal access";
    for (auto& one : blocks) {
      if (one->busy) finish(*one);
    }
  }
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
}

cudaError_t last_error() { return error; }

void reset(uint64_t chosen, unsigned resident) {
  seed = chosen;
  error = cudaSuccess;
  message.clear();
  state = seed * 0x9e3779b97f4a7c15u + 0x1234567u;
  resident_blocks = resident;
}

const char* last_message() { return message.c_str(); }

}  // namespace emulator
