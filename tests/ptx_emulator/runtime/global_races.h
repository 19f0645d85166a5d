// Race detection on global memory, between the blocks of one launch.
//
// Two accesses of different blocks to one byte, at least one of them a write and not both strong
// (atomic, volatile or with a memory order), race unless synchronisation orders the blocks. What
// does: a fence by the first block after its access, then a strong store or atomic on some address
// (or one with release semantics, without the fence), then a strong load or atomic of the second
// block on the same address; and the barrier of a cluster. A fence counts for the whole block. The
// order in which the blocks happen to run has no influence, so every pair is noticed.
//
// Each release leaves a SyncEvent at its address; a block collects the events it has acquired. Only
// when a byte turns out to be shared is the graph of events searched. A byte remembers its last
// writer and two readers of different blocks.
#pragma once
#include <deque>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "memory.h"
#include "racecheck.h"

struct SyncEvent {
  const SyncEvent* previous;  // at the same address
  u64 block;
  u32 epoch;     // accesses of the block before this epoch are published
  u32 acquired;  // events the block had acquired by then
};

struct BlockOrder {
  u32 epoch = 0;                // number of fences and releases so far
  bool has_new_access = false;  // since the epoch began
  std::vector<const SyncEvent*> acquired;
  std::unordered_set<const SyncEvent*> has_acquired;
  // Block -> epoch before which its accesses precede this block, for the events acquired so far.
  std::unordered_map<u64, u32> ordered_before;
  size_t searched = 0;  // events of `acquired` that `ordered_before` reflects
};

struct GlobalAccess {
  u64 block;
  u32 epoch;
  u32 thread;  // the first of the block
  bool strong;
  const char* where;
};

struct GlobalByte {  // indices into GlobalRaces::accesses, 0: none
  u32 writer;
  u32 readers[2];
};

struct GlobalRaces {
  std::vector<GlobalAccess> accesses;
  std::vector<u32> last_access;  // by instruction
  std::deque<SyncEvent> events;
  std::unordered_map<u64, const SyncEvent*> latest;  // by address
  std::unordered_map<u64, BlockOrder> blocks;
  u64 clusters = 0;
};

static GlobalRaces* global_races;

// ---- order between blocks ----
static void search_events(BlockOrder& order) {
  std::vector<const SyncEvent*> pending = order.acquired;
  std::unordered_set<const SyncEvent*> seen;
  while (!pending.empty()) {
    const SyncEvent* event = pending.back();
    pending.pop_back();
    if (!event || !seen.insert(event).second) continue;
    u32& epoch = order.ordered_before[event->block];
    if (event->epoch > epoch) epoch = event->epoch;
    pending.push_back(event->previous);
    const auto& inherited = global_races->blocks[event->block].acquired;
    pending.insert(pending.end(), inherited.begin(), inherited.begin() + event->acquired);
  }
  order.searched = order.acquired.size();
}

static bool precedes(const GlobalAccess& earlier, const Block* block) {
  BlockOrder& order = *block->order;
  if (order.searched != order.acquired.size()) search_events(order);
  const auto found = order.ordered_before.find(earlier.block);
  return found != order.ordered_before.end() && earlier.epoch < found->second;
}

static void begin_epoch(const Block* block) {
  if (!block->order->has_new_access) return;
  block->order->has_new_access = false;
  block->order->epoch++;
}

static void acquire(const Block* block, u64 address) {
  const auto found = global_races->latest.find(address);
  const SyncEvent* event = found == global_races->latest.end() ? nullptr : found->second;
  while (event && event->block == block->number) event = event->previous;
  BlockOrder& order = *block->order;
  if (event && order.has_acquired.insert(event).second) order.acquired.push_back(event);
}

static void release(const Block* block, u64 address) {
  const BlockOrder& order = *block->order;
  const u32 acquired = (u32)order.acquired.size();
  if (!order.epoch && !acquired) return;  // nothing to tell
  const SyncEvent*& latest = global_races->latest[address];
  if (latest && latest->block == block->number && latest->epoch == order.epoch &&
      latest->acquired == acquired)
    return;
  global_races->events.push_back({latest, block->number, order.epoch, acquired});
  latest = &global_races->events.back();
}

// The barrier of a cluster is an address of its own in every phase.
static u64 cluster_barrier_address(u32 phase) {
  return 1ull << 63 | global_races->clusters << 32 | phase;
}

// ---- accesses ----
static void report_global_race(HazardKind kind, const MemoryRange* range, u64 address, u32 first,
                               const Thread* thread, const char* where) {
  const GlobalAccess& earlier = global_races->accesses[first];
  const u64 x = earlier.block % launch.grid[0];
  const u64 rest = earlier.block / launch.grid[0];
  add_hazard({(u32)kind,
              IN_GLOBAL,
              address - range->begin,
              (u32)(range - launch.ranges),
              {(u32)x, (u32)(rest % launch.grid[1]), (u32)(rest / launch.grid[1])},
              earlier.thread,
              {thread->block->x, thread->block->y, thread->block->z},
              (u32)thread->index,
              {0, 0, 0},
              earlier.where,
              where});
}

// Index of the description of this access; threads of a block share one per instruction.
static u32 describe_access(const Thread* thread, const Site* site, bool strong) {
  BlockOrder& order = *thread->block->order;
  order.has_new_access = true;
  u32& last = global_races->last_access[site->number];
  const GlobalAccess& known = global_races->accesses[last];
  if (last && known.block == thread->block->number && known.epoch == order.epoch) return last;
  last = (u32)global_races->accesses.size();
  global_races->accesses.push_back(
      {thread->block->number, order.epoch, (u32)thread->index, strong, site->where});
  return last;
}

static bool races_with(u32 earlier_index, const Thread* thread, bool strong) {
  if (!earlier_index) return false;
  const GlobalAccess& earlier = global_races->accesses[earlier_index];
  return earlier.block != thread->block->number && !(strong && earlier.strong) &&
         !precedes(earlier, thread->block);
}

// Such a record stands for later strong accesses of the block too: it races with more.
static bool is_weak_access_of(u32 index, u64 block) {
  const GlobalAccess& access = global_races->accesses[index];
  return index && access.block == block && !access.strong;
}

static void remember_global_reader(GlobalByte& byte, u32 access) {
  const auto& accesses = global_races->accesses;
  if (!byte.readers[0] || accesses[byte.readers[0]].block == accesses[access].block) {
    byte.readers[0] = access;
  } else {
    byte.readers[1] = access;
  }
}

static void note_global_access(const Thread* thread, MemoryRange* range, u64 address, u32 bytes,
                               u32 kind, const Site* site) {
  const Block* block = thread->block;
  const u32 access = kind & kAccessMask;
  const bool strong = kind & (kStrong | kVolatile);
  if (strong && access != STORE) acquire(block, address);
  const u32 index = describe_access(thread, site, strong);
  GlobalByte* touched = range->accesses + (address - range->begin);
  for (u32 i = 0; i < bytes; i++) {
    GlobalByte& byte = touched[i];
    if (access == LOAD) {
      if (byte.readers[0] == index || byte.readers[1] == index) continue;
      if (races_with(byte.writer, thread, strong))
        report_global_race(READ_AFTER_WRITE, range, address + i, byte.writer, thread, site->where);
      remember_global_reader(byte, index);
      continue;
    }
    if (byte.writer != index && races_with(byte.writer, thread, strong))
      report_global_race(WRITE_AFTER_WRITE, range, address + i, byte.writer, thread, site->where);
    for (u32& reader : byte.readers) {
      if (races_with(reader, thread, strong))
        report_global_race(WRITE_AFTER_READ, range, address + i, reader, thread, site->where);
      if (!strong) reader = 0;  // whoever races with that reader also races with this write
    }
    if (!strong || !is_weak_access_of(byte.writer, block->number)) byte.writer = index;
  }
  if (kind & kRelease) begin_epoch(block);
  if (strong && access != LOAD) release(block, address);
}

// ---- the launch ----
static void begin_global_races() {
  global_races = new GlobalRaces;
  global_races->accesses.resize(1);
  global_races->last_access.resize(kSiteCount);
  for (u64 i = 0; i < launch.range_count; i++) {
    MemoryRange& range = launch.ranges[i];
    range.accesses = (GlobalByte*)calloc(range.end - range.begin, sizeof(GlobalByte));
  }
}

static void begin_global_order(Block* block) {
  block->order = &global_races->blocks[block->number];
}

static void end_global_races() {
  for (u64 i = 0; i < launch.range_count; i++) {
    free(launch.ranges[i].accesses);
    launch.ranges[i].accesses = nullptr;
  }
  delete global_races;
  global_races = nullptr;
}
