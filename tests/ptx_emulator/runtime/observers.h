// Passes what happens to the counters and the race detectors (see observe.h).
#pragma once
#include "global_races.h"
#include "racecheck.h"
#include "sectors.h"

void note_global(Thread* thread, MemoryRange* range, u64 address, u32 bytes, u32 kind,
                 const Site* site) {
  if (launch.counting) count_global(thread, range, address, bytes, kind, site);
  if (launch.racecheck) note_global_access(thread, range, address, bytes, kind, site);
}

void note_shared(Thread* thread, const u8* pointer, u32 bytes, u32 kind, const u8* data,
                 const char* where) {
  const u32 access = kind & kAccessMask;
  if (launch.counting && access != STORE) launch.shared_loaded_bytes += bytes;
  if (launch.counting && access != LOAD) launch.shared_stored_bytes += bytes;
  if (!launch.racecheck) return;
  if (access == LOAD) race_note_load(thread, pointer, bytes, kind & kStrong, where);
  if (access != LOAD) race_note_store(thread, pointer, bytes, data, kind & kStrong, where);
}

void note_copied(Thread* thread, const u8* pointer, u32 bytes, const char* where) {
  if (launch.racecheck) race_note_store(thread, pointer, bytes, nullptr, false, where);
}

void note_open_barrier(Block* block, u32 barrier, bool has_arrivals) {
  if (launch.racecheck) race_open_barrier(block, barrier, has_arrivals);
  const Barrier& b = block->barriers[barrier];
  if (launch.counting && b.arrived == launch.thread_count - block->exited)
    finish_requests_of_block(block);
}

void note_barrier_arrival(Thread* thread, u32 barrier) {
  if (launch.racecheck) race_publish_to_barrier(thread, barrier);
}

void note_collective(Warp* warp, u32 lanes, bool orders_memory) {
  if (launch.racecheck && orders_memory) race_order_warp(warp, lanes);
  if (launch.counting && lanes == warp->alive) finish_requests(warp);
}

void note_fence(Thread* thread) {
  if (launch.racecheck) begin_epoch(thread->block);
}

void note_cluster_arrival(Thread* thread, bool releases) {
  if (!launch.racecheck) return;
  race_arrive_at_cluster(thread, releases);
  if (!releases) return;
  begin_epoch(thread->block);
  release(thread->block, cluster_barrier_address(thread->cluster_arrivals));
}

void note_open_cluster_barrier() {
  if (launch.racecheck) race_open_cluster_barrier();
  for (int rank = 0; launch.counting && rank < launch.cluster_size; rank++)
    finish_requests_of_block(&launch.blocks[rank]);
}

void note_cluster_wait(Thread* thread, bool acquires) {
  if (!launch.racecheck || !acquires) return;
  learn_phase(thread->slot, thread->cluster_waits);
  acquire(thread->block, cluster_barrier_address(thread->cluster_waits));
}

void note_begin_launch() {
  if (launch.counting) begin_counting();
  if (!launch.racecheck) return;
  race_begin_launch();
  begin_global_races();
}

void note_begin_cluster() {
  if (!launch.racecheck) return;
  race_begin_cluster();
  for (int rank = 0; rank < launch.cluster_size; rank++) begin_global_order(&launch.blocks[rank]);
}

void note_end_cluster() {
  for (int rank = 0; launch.counting && rank < launch.cluster_size; rank++)
    finish_requests_of_block(&launch.blocks[rank]);
  if (launch.racecheck) global_races->clusters++;
}

void note_end_launch() {
  if (launch.counting) end_counting();
  if (!launch.racecheck) return;
  race_end_launch();
  end_global_races();
}
