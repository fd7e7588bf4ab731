// The scheduler: which fiber runs, what it may wait for, and the shared memory of its block.
#include "emulator.h"

#include <link.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "faults.h"
#include "fiber.h"
#include "races.h"

emulator::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr char kPoison = '\xff';      // NaN in every format, -1 as an integer
constexpr size_t kSharedAlign = 128;  // of dynamic shared memory

// splitmix64: every seed is a good one.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t below(uint32_t bound) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * bound >> 32);
  }

 private:
  uint64_t state_;
};

struct Range {
  char* begin = nullptr;
  size_t size = 0;
  bool holds(const void* address, size_t bytes) const {
    const auto* p = static_cast<const char*>(address);
    return begin <= p && p + bytes <= begin + size;
  }
};

// __shared__ variables are thread_local ones of this module, nothing else is: all of them are in one range of memory.
thread_local char in_the_module;

Range find_static_shared() {
  Range found;
  in_the_module = 0;  // before its first use the range may not exist
  auto visit = [](dl_phdr_info* module, size_t, void* result) {
    auto& range = *static_cast<Range*>(result);
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      if (module->dlpi_phdr[i].p_type != PT_TLS || module->dlpi_tls_data == nullptr) continue;
      const Range candidate{static_cast<char*>(module->dlpi_tls_data), module->dlpi_phdr[i].p_memsz};
      if (candidate.holds(&in_the_module, 1)) range = candidate;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}

struct Copy {  // of cp.async
  char* shared;
  const void* global;
  int bytes, group;
};

enum class State : uint8_t { kReady, kAtWarp, kAtBlock, kAtCluster, kExited };

struct Block;

struct Thread {
  Fiber fiber;
  Dim index;
  Block* block;
  int warp, lane;
  State state;
  // What it waits for.
  const char* what;
  Site site;
  uint32_t mask;
  void* arguments;
  std::vector<Copy> copies;
  int groups;
};

struct Warp {
  Thread** threads;
  uint32_t existing, ready, waiting, exited;  // lanes; waiting: at a warp's meeting
};

struct Block {
  Dim index;
  uint32_t rank;
  std::vector<std::unique_ptr<Thread>> owned;  // kept from block to block
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::unique_ptr<Pages> pages;
  Range dynamic;
  std::vector<char> statics;  // while another block of the cluster runs
  bool started;
  int ready, exited;
  int at_barrier, votes, result;
  Thread* first_at_barrier;
};

struct Machine {
  const Launch* launch = nullptr;
  bool late = true, clusters = true;  // clusters: does this arch have them?
  Random random{0};
  Range static_shared;
  std::vector<std::unique_ptr<Block>> blocks;  // of one cluster; kept from cluster to cluster
  int cluster_blocks = 0;
  int at_cluster = 0, exited = 0;
  Block* resident = nullptr;  // the one whose static shared memory is in place
  Thread* current = nullptr;
  std::string error;
};

Machine machine;

std::string describe(Site site) {
  const char* name = strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string describe(Dim d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

// ---- Where threads wait

void make_ready(Thread& t) {
  t.state = State::kReady;
  t.block->warps[t.warp].ready |= 1u << t.lane;
  ++t.block->ready;
}

void wait_as(State state, const char* what, Site site) {
  Thread& t = *machine.current;
  t.state = state;
  t.what = what;
  t.site = site;
  t.block->warps[t.warp].ready &= ~(1u << t.lane);
  --t.block->ready;
  races::release(&t);
}

// Every thread releases itself before it waits, and acquires itself after. In between, this orders what the first ones
// did before what the others will do.
void happens_before(const std::vector<Thread*>& first, const std::vector<Thread*>& then) {
  if (!races::kDetected) return;
  for (Thread* t : first) races::acquire(t);
  for (Thread* t : then) races::release(t);
}

void pause(Thread& me) {
  me.fiber.pause();
  races::acquire(&me);
}

void check_same(const Thread& a, const Thread& b, bool same_site) {
  if ((a.what == b.what || strcmp(a.what, b.what) == 0) && a.mask == b.mask &&
      (!same_site || a.site.line == b.site.line))
    return;
  fail(b.site, "%s, while thread %s of the block is at %s (%s)%s", b.what, describe(a.index).c_str(), a.what,
       describe(a.site).c_str(), a.mask == b.mask ? "" : " with another mask");
}

void release_cluster() {
  const int all = machine.cluster_blocks * static_cast<int>(machine.blocks[0]->threads.size());
  if (machine.at_cluster == 0 || machine.at_cluster + machine.exited < all) return;
  machine.at_cluster = 0;
  std::vector<Thread*> met;
  for (int b = 0; b < machine.cluster_blocks; ++b) {
    for (Thread* t : machine.blocks[b]->threads) {
      if (t->state == State::kAtCluster) met.push_back(t);
    }
  }
  happens_before(met, met);
  for (Thread* t : met) make_ready(*t);
}

// ---- Blocks

void start_fiber() {
  races::acquire(machine.current);
  machine.launch->kernel();
  Thread& t = *machine.current;
  wait_as(State::kExited, "exit", {"", 0});
  t.block->warps[t.warp].exited |= 1u << t.lane;
  ++t.block->exited;
  ++machine.exited;
  release_cluster();
  t.fiber.pause();
}

void prepare(Block& block, Dim index, uint32_t rank) {
  const Launch& launch = *machine.launch;
  const unsigned size = launch.block.x * launch.block.y * launch.block.z;
  while (block.owned.size() < size) block.owned.push_back(std::make_unique<Thread>());
  block.index = index;
  block.rank = rank;
  block.threads.resize(size);
  block.warps.assign((size + kLanes - 1) / kLanes, Warp{});
  block.started = false;
  block.at_barrier = block.votes = block.exited = 0;
  block.ready = static_cast<int>(size);
  // The last byte of dynamic shared memory is the last of its pages: what lies beyond faults.
  const size_t rounded = (launch.dynamic_shared + kSharedAlign - 1) / kSharedAlign * kSharedAlign;
  if (!block.pages || static_cast<size_t>(block.pages->end() - block.pages->begin()) < rounded) {
    block.pages = std::make_unique<Pages>(rounded);
  }
  block.dynamic = {block.pages->end() - rounded, launch.dynamic_shared};
  for (unsigned i = 0; i < size; ++i) {
    Thread& t = *(block.threads[i] = block.owned[i].get());
    t.index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / launch.block.x / launch.block.y};
    t.block = &block;
    t.warp = static_cast<int>(i / kLanes);
    t.lane = static_cast<int>(i % kLanes);
    t.state = State::kReady;
    t.mask = 0;
    t.copies.clear();
    t.groups = 0;
    t.fiber.prepare(start_fiber);
    Warp& warp = block.warps[t.warp];
    if (t.lane == 0) warp.threads = &block.threads[i];
    warp.existing |= 1u << t.lane;
    warp.ready = warp.existing;
  }
}

// Brings a block's static shared memory to where its threads look for it.
void make_resident(Block& block) {
  if (machine.resident == &block) return;
  const races::Ignored ours;
  const Range& window = machine.static_shared;
  // The static shared memory of all blocks has one address, so only races within a block can be told.
  if (machine.resident) happens_before(machine.resident->threads, block.threads);
  if (machine.resident) machine.resident->statics.assign(window.begin, window.begin + window.size);
  if (block.started) {
    memcpy(window.begin, block.statics.data(), window.size);
  } else {
    memset(window.begin, kPoison, window.size);
    memset(block.dynamic.begin, kPoison, block.dynamic.size);
    block.started = true;
  }
  machine.resident = &block;
}

// ---- Scheduling: a warp, once picked, runs mostly until it waits for others, so that warps drift apart.

Block* pick_block() {
  const int count = machine.cluster_blocks;
  const int first = count > 1 ? static_cast<int>(machine.random.below(count)) : 0;
  for (int i = 0; i < count; ++i) {
    Block& block = *machine.blocks[(first + i) % count];
    if (block.ready > 0) return &block;
  }
  return nullptr;
}

int pick_warp(const Block& block) {
  const auto count = static_cast<unsigned>(block.warps.size());
  unsigned warp = count > 1 ? machine.random.below(count) : 0;
  while (block.warps[warp].ready == 0) warp = (warp + 1) % count;
  return static_cast<int>(warp);
}

int pick_lane(uint32_t ready) {
  const int first = static_cast<int>(machine.random.below(kLanes));
  const uint32_t from_first = ready >> first;
  return from_first ? first + __builtin_ctz(from_first) : __builtin_ctz(ready);
}

// Who waits where, when nobody can go on.
std::string deadlock() {
  std::map<std::tuple<Block*, std::string>, std::vector<Thread*>> groups;
  for (int b = 0; b < machine.cluster_blocks; ++b) {
    for (Thread* t : machine.blocks[b]->threads) {
      const bool exited = t->state == State::kExited;
      groups[{t->block, exited ? "have exited" : std::string("wait at ") + t->what + " (" + describe(t->site) + ")"}]
          .push_back(t);
    }
  }
  std::string text = "deadlock:";
  for (const auto& [key, threads] : groups) {
    text += "\n  block " + describe(std::get<0>(key)->index) + ": " + std::to_string(threads.size()) + " threads " +
            std::get<1>(key) + ", first " + describe(threads[0]->index);
  }
  return text;
}

void run_cluster() {
  constexpr int kPatience = 16;  // how many turns a block or warp has on average before another gets one in between
  machine.resident = nullptr;
  machine.at_cluster = machine.exited = 0;
  Block* block = nullptr;
  int warp = 0;
  while (machine.error.empty()) {
    if (!block || block->ready == 0 || (!races::kDetected && machine.random.below(kPatience * 16) == 0)) {
      block = pick_block();
      if (!block) break;
      warp = pick_warp(*block);
    } else if (block->warps[warp].ready == 0 || machine.random.below(kPatience) == 0) {
      warp = pick_warp(*block);
    }
    make_resident(*block);
    Thread& t = *block->warps[warp].threads[pick_lane(block->warps[warp].ready)];
    machine.current = &t;
    threadIdx = t.index;
    blockIdx = block->index;
    t.fiber.resume();
    machine.current = nullptr;
  }
  for (int b = 0; b < machine.cluster_blocks && machine.error.empty(); ++b) {
    if (machine.blocks[b]->exited < static_cast<int>(machine.blocks[b]->threads.size())) machine.error = deadlock();
  }
}

void run_grid() {
  const Launch& launch = *machine.launch;
  const Dim c = launch.cluster, clusters = {launch.grid.x / c.x, launch.grid.y / c.y, launch.grid.z / c.z};
  machine.cluster_blocks = static_cast<int>(c.x * c.y * c.z);
  while (machine.blocks.size() < static_cast<size_t>(machine.cluster_blocks)) {
    machine.blocks.push_back(std::make_unique<Block>());
  }
  std::vector<uint64_t> order(uint64_t{clusters.x} * clusters.y * clusters.z);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[machine.random.below(static_cast<uint32_t>(std::min<size_t>(i, UINT32_MAX)))]);
  }
  for (const uint64_t i : order) {
    const Dim first = {static_cast<unsigned>(i % clusters.x) * c.x,
                       static_cast<unsigned>(i / clusters.x % clusters.y) * c.y,
                       static_cast<unsigned>(i / clusters.x / clusters.y) * c.z};
    for (unsigned rank = 0; rank < static_cast<unsigned>(machine.cluster_blocks); ++rank) {
      const Dim index = {first.x + rank % c.x, first.y + rank / c.x % c.y, first.z + rank / c.x / c.y};
      prepare(*machine.blocks[rank], index, rank);
      happens_before({}, machine.blocks[rank]->threads);
    }
    run_cluster();
    for (int b = 0; b < machine.cluster_blocks; ++b) happens_before(machine.blocks[b]->threads, {});
    if (!machine.error.empty()) return;
  }
}

}  // namespace

// ---- What kernels call

void fail(Site site, const char* format, ...) {
  char text[1000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Thread& t = *machine.current;
  machine.error = (site.line ? describe(site) + ": " : std::string()) + text + " [block " + describe(t.block->index) +
                  ", thread " + describe(t.index) + "]";
  t.fiber.pause();
  abort();  // nobody resumes it
}

void meet_warp(const char* what, Site site, uint32_t mask, bool aligned, void* arguments, Combine combine) {
  Thread& me = *machine.current;
  Warp& warp = me.block->warps[me.warp];
  mask &= warp.existing;
  if ((mask >> me.lane & 1) == 0) fail(site, "%s: lane %d is not in its own mask %08x", what, me.lane, mask);
  if (mask & warp.exited) fail(site, "%s: lane %d has exited", what, __builtin_ctz(mask & warp.exited));
  wait_as(State::kAtWarp, what, site);
  me.mask = mask;
  me.arguments = arguments;
  if (const uint32_t others = mask & warp.waiting) check_same(*warp.threads[__builtin_ctz(others)], me, aligned);
  warp.waiting |= 1u << me.lane;
  if ((mask & warp.waiting) == mask) {
    void* lanes[kLanes] = {};
    std::vector<Thread*> met;
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      Thread& t = *warp.threads[__builtin_ctz(left)];
      check_same(t, me, aligned);
      lanes[t.lane] = t.arguments;
      make_ready(t);
      if (races::kDetected) met.push_back(&t);
    }
    happens_before(met, met);
    if (combine) combine(lanes, mask);
    warp.waiting &= ~mask;
  }
  pause(me);
}

int meet_block(const char* what, Site site, bool predicate) {
  Thread& me = *machine.current;
  Block& block = *me.block;
  wait_as(State::kAtBlock, what, site);
  me.mask = 0;
  if (block.at_barrier == 0) block.first_at_barrier = &me;
  check_same(*block.first_at_barrier, me, true);
  block.votes += predicate;
  if (++block.at_barrier == static_cast<int>(block.threads.size())) {
    block.result = block.votes;
    block.at_barrier = block.votes = 0;
    happens_before(block.threads, block.threads);
    for (Thread* t : block.threads) make_ready(*t);
  }
  pause(me);
  return block.result;
}

void meet_cluster(Site site) {
  if (!machine.clusters) {
    meet_block("cluster_sync", site, false);
    return;
  }
  wait_as(State::kAtCluster, "cluster_sync", site);
  ++machine.at_cluster;
  release_cluster();
  pause(*machine.current);
}

size_t static_shared() { return find_static_shared().size; }

uint32_t lane() { return machine.current->lane; }
uint32_t cluster_rank() { return machine.current->block->rank; }
uint32_t cluster_size() { return machine.cluster_blocks; }
char* dynamic_shared() { return machine.current->block->dynamic.begin; }

void check_shared(const char* what, Site site, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(site, "%s: misaligned shared address", what);
  if (!machine.current->block->dynamic.holds(address, bytes) && !machine.static_shared.holds(address, bytes)) {
    fail(site, "%s: the address is not in shared memory", what);
  }
}

static char* shared_of(const char* what, Site site, uint32_t rank, void* address, size_t bytes) {
  check_shared(what, site, address, bytes);
  Block& mine = *machine.current->block;
  if (rank >= cluster_size()) fail(site, "%s: rank %u in a cluster of %u", what, rank, cluster_size());
  Block& other = *machine.blocks[rank];
  if (!other.started) fail(site, "%s: block %u of the cluster may not have started", what, rank);
  if (other.exited == static_cast<int>(other.threads.size())) fail(site, "%s: block %u has exited", what, rank);
  auto* target = static_cast<char*>(address);
  if (&other != &mine) {
    const bool dynamic = mine.dynamic.holds(address, bytes);
    target = dynamic ? other.dynamic.begin + (target - mine.dynamic.begin)
                     : other.statics.data() + (target - machine.static_shared.begin);
  }
  return target;
}

void store_shared_of(Site site, uint32_t rank, void* address, const void* value, size_t bytes) {
  char* target = shared_of("store_shared_of", site, rank, address, bytes);
  races::writes(target, bytes);
  memcpy(target, value, bytes);
}

void expect_bytes(Site site, uint64_t* counter, int bytes) {
  check_shared("expect_bytes", site, counter, sizeof *counter);
  *counter = bytes;
}

void send_to(Site site, uint32_t rank, void* address, const void* value, size_t bytes, uint64_t* counter) {
  char* target = shared_of("send_to", site, rank, address, bytes);
  races::writes(target, bytes);
  memcpy(target, value, bytes);
  auto* left = reinterpret_cast<uint64_t*>(shared_of("send_to", site, rank, counter, sizeof *counter));
  if (*left < bytes) fail(site, "send_to: more bytes than block %u expects", rank);
  *left -= bytes;
}

void await_bytes(Site site, uint64_t* counter) {
  meet_cluster(site);
  if (*counter != 0) fail(site, "await_bytes: %llu bytes are missing", static_cast<unsigned long long>(*counter));
}

static void arrive(const Copy& copy) {
  races::reads(copy.global, copy.bytes);
  races::writes(copy.shared, 16);
  memcpy(copy.shared, copy.global, copy.bytes);
  memset(copy.shared + copy.bytes, 0, 16 - copy.bytes);
}

void copy_async(Site site, void* shared, const void* global, int bytes) {
  check_shared("copy_async", site, shared, 16);
  if (bytes < 0 || bytes > 16) fail(site, "copy_async: %d bytes", bytes);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail(site, "copy_async: misaligned global address");
  Thread& t = *machine.current;
  const Copy copy = {static_cast<char*>(shared), global, bytes, t.groups};
  if (machine.late) {
    races::writes(shared, 16);
    memset(shared, kPoison, 16);  // from now on nobody knows what is there
    t.copies.push_back(copy);
  } else {
    arrive(copy);
  }
}

void commit_copies() { ++machine.current->groups; }

void wait_copies(int pending) {
  Thread& t = *machine.current;
  const auto newer = std::find_if(t.copies.begin(), t.copies.end(),
                                  [&](const Copy& copy) { return copy.group >= t.groups - pending; });
  std::for_each(t.copies.begin(), newer, arrive);
  t.copies.erase(t.copies.begin(), newer);
}

uint64_t setting(const char* name, uint64_t otherwise) {
  const char* value = getenv(name);
  return value && *value ? strtoull(value, nullptr, 10) : otherwise;
}

int arch() { return static_cast<int>(setting("LORAKERN_EMULATOR_ARCH", 90)); }

const char* run(const Launch& launch) {
  static std::mutex one_at_a_time;
  static std::string error;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const char* copies = getenv("LORAKERN_EMULATOR_COPIES");
  machine.launch = &launch;
  machine.late = !copies || strcmp(copies, "early") != 0;
  machine.clusters = arch() >= 90;
  machine.random = Random(setting("LORAKERN_EMULATOR_SEED", 0));
  machine.static_shared = find_static_shared();
  machine.error.clear();
  blockDim = launch.block;
  gridDim = launch.grid;
  // What else is thread_local in this module (pybind11 has such variables) is none of the kernel's.
  const Range& window = machine.static_shared;
  const std::vector<char> before(window.begin, window.begin + window.size);
  {
    const Faults caught([](const char* what) { fail({"", 0}, "%s", what); });
    run_grid();
  }
  memcpy(window.begin, before.data(), window.size);
  machine.launch = nullptr;
  if (machine.error.empty()) return nullptr;
  error = machine.error;
  return error.c_str();
}

}  // namespace emulator
