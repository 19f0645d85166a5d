// What the generated code calls at loops and function entries.
#pragma once
#include <ctime>

#include "state.h"

ALWAYS_INLINE double now_seconds() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

ALWAYS_INLINE bool is_past_deadline() {
  return launch.deadline > 0 && now_seconds() > launch.deadline;
}

// ---- at every backward branch ----
RUNTIME_FUNCTION void pause_loop(Thread* thread, const char* where) {
  thread->where = where;
  if (is_past_deadline()) fail(thread, FAULT_TIMEOUT, "timeout");
  if (!launch.direct) yield_to_scheduler(thread);  // so that a spinning thread lets the others work
}
ALWAYS_INLINE void tick_loop(Thread* thread, const char* where) {
  if (UNLIKELY((++thread->loop_ticks & 0x3ff) == 0)) pause_loop(thread, where);
}

// ---- at the entry of a device function ----
RUNTIME_FUNCTION void fail_stack(Thread* thread) {
  fail(thread, FAULT_OTHER, "stack overflow");
}
ALWAYS_INLINE void check_stack(Thread* thread) {
  const u64 kReserve = 16384;
  if (UNLIKELY((u64)__builtin_frame_address(0) < (u64)thread->stack + kReserve)) fail_stack(thread);
}
