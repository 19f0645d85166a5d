// Counts of global memory traffic: bytes, widths, and the 32-byte sectors of each warp's requests.
//
// A load or store that the lanes of a warp execute together is one request of the memory system,
// which moves whole sectors. Threads run one after another here, so accesses are collected and put
// together afterwards: the n-th execution of an instruction by each lane since the warp was last
// together (at a barrier or at an instruction of the whole warp) belongs to one request. For lanes
// that skip iterations of a loop this is an estimate.
#pragma once
#include <vector>

#include "observe.h"

const u64 kSectorBytes = 32;
const u8 kTouchedByLoad = 1;
const u8 kTouchedByStore = 2;

struct Request {
  struct Sector {
    u64 number;
    u32 mask;  // of its bytes
  };
  Direction* direction;
  std::vector<Sector> sectors;

  void add(u64 offset, u32 bytes) {
    const u64 number = offset / kSectorBytes;
    const u32 mask = (u32)(((1ull << bytes) - 1) << (offset % kSectorBytes));
    for (size_t i = sectors.size(); i-- > 0;) {
      if (sectors[i].number != number) continue;
      sectors[i].mask |= mask;
      return;
    }
    sectors.push_back({number, mask});
  }

  void count() {
    u64 bytes = 0;
    for (const Sector& sector : sectors) bytes += __builtin_popcount(sector.mask);
    direction->requests++;
    direction->request_bytes += bytes;
    direction->sectors += sectors.size();
    direction->min_sectors += (bytes + kSectorBytes - 1) / kSectorBytes;
    sectors.clear();
  }
};

// Requests of one instruction by one warp since it was last together.
struct Requests {
  std::vector<Request> items;  // beyond `used` they only keep their memory
  u32 used = 0;
  u32 executions[32] = {};  // by lane
};

struct Sectors {
  std::vector<std::vector<Requests>> warps;  // [warp][instruction]
  std::vector<std::vector<u32>> active;      // [warp]: instructions with requests
};

static Sectors* sectors;

static void add_to_request(const Thread* thread, Direction* direction, u64 offset, u32 bytes,
                           const Site* site) {
  Requests& requests = sectors->warps[thread->warp->slot][site->number];
  const u32 n = requests.executions[thread->lane]++;
  if (!requests.used) sectors->active[thread->warp->slot].push_back(site->number);
  if (n >= requests.used) {
    requests.used = n + 1;
    if (requests.items.size() < requests.used) requests.items.resize(requests.used);
    requests.items[n].direction = direction;
  }
  Request& request = requests.items[n];
  if (request.direction != direction) {  // lanes address different arrays
    request.count();
    request.direction = direction;
  }
  request.add(offset, bytes);
}

static void finish_requests(const Warp* warp) {
  for (u32 site : sectors->active[warp->slot]) {
    Requests& requests = sectors->warps[warp->slot][site];
    for (u32 i = 0; i < requests.used; i++) requests.items[i].count();
    requests.used = 0;
    memset(requests.executions, 0, sizeof requests.executions);
  }
  sectors->active[warp->slot].clear();
}

static void finish_requests_of_block(const Block* block) {
  for (int w = 0; w < launch.warp_count; w++) finish_requests(&block->warps[w]);
}

static void count_global(const Thread* thread, MemoryRange* range, u64 address, u32 bytes, u32 kind,
                         const Site* site) {
  const u32 access = kind & kAccessMask;
  u8 flags = kTouchedByLoad | kTouchedByStore;
  if (access == ATOMIC) {
    range->atomic_bytes += bytes;
  } else {
    Direction* direction = access == LOAD ? &range->loads : &range->stores;
    direction->bytes += bytes;
    direction->accesses++;
    direction->widths[__builtin_ctz(bytes)]++;
    add_to_request(thread, direction, address - range->origin, bytes, site);
    flags = access == LOAD ? kTouchedByLoad : kTouchedByStore;
  }
  u8* touched = range->touched + (address - range->begin);
  for (u32 i = 0; i < bytes; i++) touched[i] |= flags;
}

// ---- the launch ----
static void begin_counting() {
  sectors = new Sectors;
  const int warps = launch.warp_count * launch.cluster_size;
  sectors->warps.assign(warps, std::vector<Requests>(kSiteCount));
  sectors->active.resize(warps);
  for (u64 i = 0; i < launch.range_count; i++)
    launch.ranges[i].touched = (u8*)calloc(launch.ranges[i].end - launch.ranges[i].begin, 1);
}

static void end_counting() {
  for (u64 r = 0; r < launch.range_count; r++) {
    MemoryRange& range = launch.ranges[r];
    for (u64 i = 0; i < range.end - range.begin; i++) {
      range.loads.unique_bytes += (range.touched[i] & kTouchedByLoad) != 0;
      range.stores.unique_bytes += (range.touched[i] & kTouchedByStore) != 0;
    }
    free(range.touched);
    range.touched = nullptr;
  }
  delete sectors;
  sectors = nullptr;
}
