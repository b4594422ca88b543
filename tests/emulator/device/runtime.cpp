// Runs the threads of a CUDA block as fibers of one CPU thread: one block after another, a fiber until it waits for others.
//
// seed 0: warps and lanes in order. Otherwise warps and lanes take turns at random and blocks run in either order, so that
// a barrier that is missing shows as a wrong result.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda.h"

uint3 blockIdx, blockDim, gridDim;

namespace emulator {

Thread* current;
unsigned char* dynamic_shared;
unsigned dynamic_shared_bytes;

namespace {

constexpr size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 4096;
constexpr int MOST_THREADS = 1024, PAST_BYTES = 4096;
constexpr unsigned char NAN_BYTE = 0xff;  // a NaN in every floating type

enum class State { RUNS, WAITS_FOR_LANES, WAITS_FOR_BLOCK, ENDED };

struct Copy {
  unsigned shared, bytes;
  const void* global;  // null: zeros
};

struct Fiber : Thread {
  State state;
  bool has_started;
  const char* waits_in;
  Place place;
  unsigned mask;
  jmp_buf at;
  unsigned char* stack;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last is not committed
};

// A collective some lanes wait in.
struct Meeting {
  void (*finish)(void**, unsigned);
  unsigned mask, arrived;
  void* requests[32];
};

Fiber fibers[MOST_THREADS];
std::vector<Meeting> meetings[MOST_THREADS / 32];
int num_threads, num_waiting_for_block, num_ended;
jmp_buf scheduler;
ucontext_t first_entry, unused;
void (*kernel)(const void*);
const void* arguments;
std::string error;
unsigned random_state;

unsigned random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

Fiber& self() { return *static_cast<Fiber*>(current); }

void leave() {
  Fiber& fiber = self();
  if (!_setjmp(fiber.at)) _longjmp(scheduler, 1);
}

void run_kernel() {
  kernel(arguments);
  self().state = State::ENDED;
  ++num_ended;
  _longjmp(scheduler, 1);
}

// Continues `fiber` until it waits or ends.
void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.has_started) _longjmp(fiber.at, 1);
  fiber.has_started = true;
  getcontext(&first_entry);
  first_entry.uc_stack.ss_sp = fiber.stack;
  first_entry.uc_stack.ss_size = STACK_BYTES;
  first_entry.uc_link = nullptr;
  makecontext(&first_entry, run_kernel, 0);
  setcontext(&first_entry);
}

void release_block_if_all_wait() {
  if (!num_waiting_for_block || num_waiting_for_block + num_ended < num_threads) return;
  num_waiting_for_block = 0;
  for (int i = 0; i < num_threads; ++i)
    if (fibers[i].state == State::WAITS_FOR_BLOCK) fibers[i].state = State::RUNS;
}

std::string text_of(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

// Why nobody can go on: who waits where, for whom.
std::string describe_deadlock() {
  std::string text = "deadlock in block " + std::to_string(blockIdx.x) + ":";
  int told = 0;
  const Fiber* last = nullptr;
  for (int i = 0; i < num_threads && told < 8; ++i) {
    const Fiber& fiber = fibers[i];
    const bool is_same = last && last->state == fiber.state && last->waits_in == fiber.waits_in &&
                         last->place.line == fiber.place.line && last->index.x / 32 == fiber.index.x / 32;
    last = &fiber;
    if (is_same) continue;
    ++told;
    text += "\n  warp " + std::to_string(i / 32) + " from lane " + std::to_string(i % 32);
    if (fiber.state == State::ENDED)
      text += " has ended";
    else
      text += std::string(" waits in ") + fiber.waits_in + " at " + text_of(fiber.place);
  }
  return text;
}

bool run_warp(int warp, bool is_random) {
  const int first = warp * 32, count = min(32, num_threads - first);
  const int rotation = is_random ? random_number() % count : 0;
  bool has_run = false;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[first + (i + rotation) % count];
    if (fiber.state != State::RUNS) continue;
    has_run = true;
    resume(fiber);
    if (!error.empty()) return true;
  }
  return has_run;
}

void run_block(bool is_random) {
  for (int i = 0; i < num_threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {unsigned(i), 0, 0};
    fiber.lane = i % 32;
    fiber.state = State::RUNS;
    fiber.has_started = false;
    fiber.groups.assign(1, {});
  }
  const int warps = (num_threads + 31) / 32;
  for (int warp = 0; warp < warps; ++warp) meetings[warp].clear();
  num_waiting_for_block = num_ended = 0;
  while (num_ended < num_threads) {
    const int first = is_random ? random_number() % warps : 0;
    bool has_run = false;
    // At random one warp a turn; in order each warp as far as it comes.
    for (int i = 0; i < warps && !(is_random && has_run); ++i) {
      while (run_warp((first + i) % warps, is_random)) {
        has_run = true;
        if (!error.empty()) return;
        if (is_random) break;
      }
    }
    if (!has_run && num_ended < num_threads) {
      error = describe_deadlock();
      return;
    }
    release_block_if_all_wait();
  }
}

}  // namespace

void fail(Place place, const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  error = text_of(place) + ": block " + std::to_string(blockIdx.x) + ", thread " +
          std::to_string(current->index.x) + ": " + text;
  _longjmp(scheduler, 1);
}

void collective(const char* name, Place place, unsigned mask, void* request, void (*finish)(void**, unsigned)) {
  Fiber& fiber = self();
  const unsigned bit = 1u << fiber.lane;
  const int first = int(fiber.index.x) / 32 * 32;
  // A block's last warp may be short: its missing lanes are taken as present where the mask is full.
  const int count = min(32, num_threads - first);
  if (mask == 0xffffffffu && count < 32) mask = (1u << count) - 1;
  if (!(mask & bit)) fail(place, "%s: the mask %08x lacks the lane %d that calls it", name, mask, fiber.lane);
  for (int lane = 0; lane < count; ++lane)
    if (mask >> lane & 1 && fibers[first + lane].state == State::ENDED)
      fail(place, "%s: lane %d has ended and will never come", name, lane);

  auto& open = meetings[first / 32];
  size_t at = 0;
  while (at < open.size() && (open[at].finish != finish || open[at].mask != mask)) ++at;
  if (at == open.size()) open.push_back({finish, mask, 0, {}});
  Meeting& meeting = open[at];
  meeting.arrived |= bit;
  meeting.requests[fiber.lane] = request;
  if (meeting.arrived == mask) {
    Meeting complete = meeting;
    open.erase(open.begin() + at);
    complete.finish(complete.requests, mask);
    for (int lane = 0; lane < count; ++lane)
      if (mask >> lane & 1) fibers[first + lane].state = State::RUNS;
    return;
  }
  fiber.waits_in = name;
  fiber.place = place;
  fiber.state = State::WAITS_FOR_LANES;
  leave();
}

void barrier(Place place) {
  Fiber& fiber = self();
  fiber.waits_in = "__syncthreads";
  fiber.place = place;
  fiber.state = State::WAITS_FOR_BLOCK;
  ++num_waiting_for_block;
  leave();
}

void copy_async(Place place, unsigned bytes, unsigned shared, const void* global, bool valid) {
  if (shared % bytes || shared + bytes > dynamic_shared_bytes)
    fail(place, "cp_async_%u: writes at %u of %u bytes of shared memory", bytes, shared, dynamic_shared_bytes);
  if (valid && reinterpret_cast<uintptr_t>(global) % bytes)
    fail(place, "cp_async_%u: reads from %p, which is not aligned to %u bytes", bytes, global, bytes);
  std::memset(dynamic_shared + shared, NAN_BYTE, bytes);
  self().groups.back().push_back({shared, bytes, valid ? global : nullptr});
}

void commit_async() { self().groups.emplace_back(); }

void wait_async(int groups_in_flight) {
  auto& groups = self().groups;
  // As in PTX the copies after the last commit are not waited for.
  while (int(groups.size()) - 1 > groups_in_flight) {
    for (const Copy& copy : groups.front()) {
      if (copy.global)
        std::memcpy(dynamic_shared + copy.shared, copy.global, copy.bytes);
      else
        std::memset(dynamic_shared + copy.shared, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulator

using namespace emulator;

// Null on success, else what went wrong. `static_shared` to `static_end` are the kernel's static shared variables.
EMULATOR_EXPORT const char* emulator_launch(void (*entry)(const void*), unsigned char* static_shared,
                                            unsigned char* static_end, unsigned grid, unsigned block,
                                            unsigned shared_bytes, const void* bytes, unsigned seed) {
  static unsigned char* shared = nullptr;
  static size_t capacity = 0;
  error.clear();
  if (!block || block > MOST_THREADS) return "a block has 1 to 1024 threads";
  if (shared_bytes > 232448) return "a block has at most 227 KiB of dynamic shared memory";
  if (shared_bytes + PAST_BYTES > capacity) {
    capacity = shared_bytes + PAST_BYTES;
    free(shared);
    shared = static_cast<unsigned char*>(aligned_alloc(128, (capacity + 127) / 128 * 128));
  }
  dynamic_shared = shared;
  dynamic_shared_bytes = shared_bytes;
  for (unsigned i = 0; i < block; ++i) {
    if (fibers[i].stack) continue;
    void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(stack, GUARD_BYTES, PROT_NONE);
    fibers[i].stack = static_cast<unsigned char*>(stack);
  }
  kernel = entry;
  arguments = bytes;
  num_threads = block;
  blockDim = {block, 1, 1};
  gridDim = {grid, 1, 1};
  random_state = seed ? seed : 1;
  const bool is_reversed = seed && random_number() % 2;
  for (unsigned i = 0; i < grid && error.empty(); ++i) {
    blockIdx = {is_reversed ? grid - 1 - i : i, 0, 0};
    std::memset(shared, NAN_BYTE, shared_bytes + PAST_BYTES);
    if (static_shared) std::memset(static_shared, NAN_BYTE, static_end - static_shared);
    run_block(seed != 0);
    for (int past = 0; past < PAST_BYTES && error.empty(); ++past)
      if (shared[shared_bytes + past] != NAN_BYTE)
        error = "block " + std::to_string(blockIdx.x) + " wrote " + std::to_string(past) +
                " bytes past the end of its " + std::to_string(shared_bytes) + " bytes of dynamic shared memory";
  }
  return error.empty() ? nullptr : error.c_str();
}

// What g++ -fsanitize=alignment,bounds calls; the data begin with the place.
struct CheckedPlace {
  const char* file;
  unsigned line, column;
};
EMULATOR_EXPORT void __ubsan_handle_type_mismatch_v1_abort(CheckedPlace* at, uintptr_t address) {
  fail({at->file, int(at->line)}, "an access at %p is not aligned to its type", reinterpret_cast<void*>(address));
}
EMULATOR_EXPORT void __ubsan_handle_out_of_bounds_abort(CheckedPlace* at, uintptr_t index) {
  fail({at->file, int(at->line)}, "index %lld is outside its array", static_cast<long long>(index));
}
