// What the counters and the race detectors want to know about; called only while
// launch.observed. The definitions (racecheck.h, global_races.h, sectors.h) are part of the runtime
// object alone.
#pragma once
#include "state.h"

enum Access { LOAD, STORE, ATOMIC };

// The properties of an access, constants of the instruction.
const u32 kAccessMask = 3;  // enum Access
const u32 kStrong = 4;      // atomic, or has an explicit memory order
const u32 kVolatile = 8;    // strong as far as other blocks are concerned
const u32 kRelease = 16;    // orders what the thread did before

HIDDEN void note_global(Thread* thread, MemoryRange* range, u64 address, u32 bytes, u32 kind,
                        const Site* site);

// data: the bytes about to be written, or null if unknown.
HIDDEN void note_shared(Thread* thread, const u8* pointer, u32 bytes, u32 kind, const u8* data,
                        const char* where);

// Before the waiting threads of a barrier continue.
HIDDEN void note_open_barrier(Block* block, u32 barrier, bool has_arrivals);
// bar.arrive
HIDDEN void note_barrier_arrival(Thread* thread, u32 barrier);
// A warp instruction that `lanes` executed together.
HIDDEN void note_collective(Warp* warp, u32 lanes, bool orders_memory);
// Memory that a finished cp.async fills.
HIDDEN void note_copied(Thread* thread, const u8* pointer, u32 bytes, const char* where);
HIDDEN void note_fence(Thread* thread);
HIDDEN void note_cluster_arrival(Thread* thread, bool releases);
HIDDEN void note_open_cluster_barrier();
HIDDEN void note_cluster_wait(Thread* thread, bool acquires);
HIDDEN void note_begin_launch();
HIDDEN void note_begin_cluster();
HIDDEN void note_end_cluster();
HIDDEN void note_end_launch();
