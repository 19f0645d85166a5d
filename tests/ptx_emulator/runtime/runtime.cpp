// The part of the emulator that does not depend on the kernel, compiled once: runs a grid, one
// cluster of blocks (one block, for most launches) after another, the threads as coroutines.
#define PTX_RUNTIME_OBJECT
#include <sys/mman.h>

#include <utility>

#include "ptx_runtime.h"

#include "global_races.h"
#include "racecheck.h"
#include "sectors.h"

#include "observers.h"

LaunchState launch;

asm(R"(
.text
.globl ptx_switch_stack
.hidden ptx_switch_stack
.type ptx_switch_stack, @function
ptx_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size ptx_switch_stack, .-ptx_switch_stack
)");

struct LaunchConfig {  // mirrored by launch.py
  u32 grid[3];
  u32 block[3];
  u32 cluster[3];
  u32 explicit_cluster;
  const u8* parameters;
  u64 parameter_bytes;
  u64 static_shared_bytes;
  u64 dynamic_shared_bytes;
  MemoryRange* ranges;
  u64 range_count;
  u64 seed;
  u64 shuffle;  // 0: natural order of clusters and threads
  u64 counting;
  u64 racecheck;  // enum RaceLevel
  u64 stack_bytes;
  double timeout;   // seconds, 0: none
  u64 last_blocks;  // run only these, 0: all
};

struct LaunchReport {  // mirrored by launch.py
  u64 blocks;
  u64 instructions;
  u64 shared_loaded_bytes;
  u64 shared_stored_bytes;
  s64 fault;
  char message[2048];
};

// ---- life of a thread ----
// Other blocks must be done with a block's shared memory when its last thread ends.
static void check_end_of_block(Thread* last) {
  const Block* block = last->block;
  if (block->exited < launch.thread_count || block->phases_required <= block->phases_waited) return;
  last->where = block->required_by;
  fail(last, FAULT_LIFETIME,
       "block %d of the cluster exits while another block may still use its shared memory: no "
       "barrier of the cluster lies between the exit and the access",
       block->rank);
}

static void end_thread(Thread* thread) {
  wait_all_async_copies(thread);
  thread->state = FINISHED;
  thread->block->exited++;
  launch.exited++;
  check_end_of_block(thread);
  Warp* warp = thread->warp;
  warp->alive &= ~(1u << thread->lane);
  FOR_LANES(lane, warp->posted) {
    Thread* other = warp->lanes[lane];
    if (other->collective != ACTIVE_MASK && other->state == AT_WARP_COLLECTIVE)
      try_collective(warp, other->member_mask, other->collective, other->collective_site, false);
  }
  open_barriers_after_exit(thread->block);
  leave_cluster_barrier(thread);
}

extern "C" void ptx_thread_main() {
  Thread* thread = launch.current;
  ptx_kernel(thread);
  end_thread(thread);
  for (;;) yield_to_scheduler(thread);
}

static void prepare_stack(Thread* thread) {
  const int kSavedRegisters = 6;
  u64* top = (u64*)(thread->stack + launch.stack_bytes);
  for (int i = 0; i < 3; i++) *--top = 0;  // keeps the stack 16-byte aligned at entry
  *--top = (u64)ptx_thread_main;
  for (int i = 0; i < kSavedRegisters; i++) *--top = 0;
  thread->stack_pointer = top;
}

// ---- one cluster ----
static void begin_block(Block* block, u32 x, u32 y, u32 z) {
  block->x = x;
  block->y = y;
  block->z = z;
  block->number = x + (u64)launch.grid[0] * (y + (u64)launch.grid[1] * z);
  block->exited = 0;
  block->phases_waited = 0;
  block->phases_required = 0;
  memset(block->shared, 0xff, launch.shared_bytes);  // poison: NaN in every float format
  for (Barrier& barrier : block->barriers) reset_barrier(barrier);
  for (int w = 0; w < launch.warp_count; w++) {
    const int lanes = launch.thread_count - 32 * w;
    block->warps[w].posted = 0;
    block->warps[w].alive = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
  }
  for (int i = 0; i < launch.thread_count; i++) {
    Thread* thread = &block->threads[i];
    thread->state = READY;
    thread->where = nullptr;
    thread->cluster_arrivals = 0;
    thread->cluster_waits = 0;
    thread->async_count = 0;
    thread->async_group = 0;
  }
}

static void begin_cluster(u64 number) {
  const u32 clusters_x = launch.grid[0] / launch.cluster[0];
  const u32 clusters_y = launch.grid[1] / launch.cluster[1];
  const u32 first_x = number % clusters_x * launch.cluster[0];
  const u32 first_y = number / clusters_x % clusters_y * launch.cluster[1];
  const u32 first_z = number / clusters_x / clusters_y * launch.cluster[2];
  for (int rank = 0; rank < launch.cluster_size; rank++)
    begin_block(&launch.blocks[rank], first_x + rank % launch.cluster[0],
                first_y + rank / launch.cluster[0] % launch.cluster[1],
                first_z + rank / launch.cluster[0] / launch.cluster[1]);
  launch.exited = 0;
  launch.cluster_phase = 0;
  launch.cluster_arrived = 0;
  launch.cluster_missing = launch.thread_count * launch.cluster_size;
  if (launch.observed) note_begin_cluster();
}

static void run_cluster_directly(const int* order) {
  if (setjmp(launch.direct_escape)) return;
  char* frame = (char*)__builtin_frame_address(0);
  for (int i = 0; i < launch.thread_count * launch.cluster_size; i++) {
    Thread* thread = &launch.threads[order[i]];
    thread->stack = frame - launch.stack_bytes;
    launch.current = thread;
    ptx_kernel(thread);
    wait_all_async_copies(thread);
  }
}

// activemask needs no agreement: when nothing else can run, it sees those that have arrived.
static bool release_active_mask() {
  for (int i = 0; i < launch.thread_count * launch.cluster_size; i++) {
    Thread* thread = &launch.threads[i];
    if (thread->state != AT_WARP_COLLECTIVE || thread->collective != ACTIVE_MASK) continue;
    if (try_collective(thread->warp, thread->member_mask, ACTIVE_MASK, thread->collective_site,
                       true))
      return true;
  }
  return false;
}

static void report_deadlock() {
  launch.fault = FAULT_DEADLOCK;
  const int threads = launch.thread_count * launch.cluster_size;
  const Block& block = launch.blocks[0];
  char* text = launch.message;
  size_t room = sizeof launch.message;
  size_t used = snprintf(text, room, "deadlock in %s (%u,%u,%u): %d of %d threads exited; waiting:",
                         launch.cluster_size > 1 ? "the cluster of block" : "block", block.x,
                         block.y, block.z, launch.exited, threads);
  const char* last = nullptr;
  for (int i = 0; i < threads && used + 300 < room; i++) {
    const Thread& thread = launch.threads[i];
    if (thread.state == FINISHED || thread.where == last) continue;
    last = thread.where;
    used += snprintf(text + used, room - used, " [thread %d.. at `%.200s`]", i, last ? last : "?");
  }
}

static void run_cluster_as_coroutines(const int* order) {
  const int threads = launch.thread_count * launch.cluster_size;
  for (int i = 0; i < threads; i++) prepare_stack(&launch.threads[i]);
  while (launch.exited < threads && !launch.fault) {
    bool progress = false;
    for (int i = 0; i < threads && !launch.fault; i++) {
      Thread* thread = &launch.threads[order[i]];
      if (thread->state != READY) continue;
      progress = true;
      launch.current = thread;
      ptx_switch_stack(&launch.scheduler_stack_pointer, thread->stack_pointer);
    }
    if (!progress && !launch.fault && !release_active_mask()) report_deadlock();
  }
}

// ---- the launch ----
static void check_block_deadline() {
  if (!is_past_deadline() || launch.fault) return;
  launch.fault = FAULT_TIMEOUT;
  snprintf(launch.message, sizeof launch.message, "timeout after %llu blocks",
           (ull)launch.blocks_done);
}

template <class T>
static T* ordered_indices(u64 count, bool shuffled, u64* random) {
  T* order = (T*)malloc(sizeof(T) * count);
  for (u64 i = 0; i < count; i++) order[i] = (T)i;
  for (u64 i = count; shuffled && i > 1; i--)
    std::swap(order[i - 1], order[next_random(random) % i]);
  return order;
}

static void run_clusters(const LaunchConfig* config) {
  u64 random = config->seed;
  const bool shuffled = config->shuffle != 0;
  const u64 block_count = (u64)launch.grid[0] * launch.grid[1] * launch.grid[2];
  const u64 cluster_count = block_count / launch.cluster_size;
  const u64 wanted = (config->last_blocks + launch.cluster_size - 1) / launch.cluster_size;
  const u64 first = wanted && wanted < cluster_count ? cluster_count - wanted : 0;
  u64* clusters = shuffled ? ordered_indices<u64>(cluster_count, true, &random) : nullptr;
  for (u64 i = first; i < cluster_count && !launch.fault; i++) {
    const int thread_count = launch.thread_count * launch.cluster_size;
    int* threads = ordered_indices<int>(thread_count, shuffled, &random);
    begin_cluster(clusters ? clusters[i] : i);
    if (launch.direct) {
      run_cluster_directly(threads);
    } else {
      run_cluster_as_coroutines(threads);
    }
    free(threads);
    if (launch.observed && !launch.fault) note_end_cluster();
    launch.blocks_done += launch.cluster_size;
    check_block_deadline();
  }
  free(clusters);
}

static void begin_threads() {
  const int threads = launch.thread_count * launch.cluster_size;
  launch.threads = (Thread*)calloc(threads, sizeof(Thread));
  launch.warps = (Warp*)calloc(launch.warp_count * launch.cluster_size, sizeof(Warp));
  launch.blocks = (Block*)calloc(launch.cluster_size, sizeof(Block));
  if (!launch.direct)
    launch.stacks = (char*)mmap(nullptr, threads * launch.stack_bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (int slot = 0; slot < threads; slot++) {
    Thread* thread = &launch.threads[slot];
    const int i = slot % launch.thread_count;
    const int rank = slot / launch.thread_count;
    Block* block = &launch.blocks[rank];
    if (i == 0) {
      block->rank = rank;
      block->threads = thread;
      block->warps = &launch.warps[rank * launch.warp_count];
      block->shared = launch.shared + rank * launch.shared_stride;
    }
    thread->index = i;
    thread->slot = slot;
    thread->lane = i % 32;
    thread->block = block;
    thread->warp = &block->warps[i / 32];
    thread->warp->slot = (int)(thread->warp - launch.warps);
    thread->warp->lanes[i % 32] = thread;
    thread->x = i % launch.block[0];
    thread->y = i / launch.block[0] % launch.block[1];
    thread->z = i / launch.block[0] / launch.block[1];
    thread->parameters = launch.parameters;
    if (launch.stacks) thread->stack = launch.stacks + slot * launch.stack_bytes;
  }
}

static void begin_launch(const LaunchConfig* config) {
  static MemoryRange no_range = {};
  memset(&launch, 0, sizeof launch);
  memcpy(launch.grid, config->grid, sizeof launch.grid);
  memcpy(launch.block, config->block, sizeof launch.block);
  memcpy(launch.cluster, config->cluster, sizeof launch.cluster);
  launch.cluster_size = config->cluster[0] * config->cluster[1] * config->cluster[2];
  launch.explicit_cluster = config->explicit_cluster;
  launch.thread_count = config->block[0] * config->block[1] * config->block[2];
  launch.warp_count = (launch.thread_count + 31) / 32;
  launch.parameters = config->parameters;
  launch.parameter_bytes = config->parameter_bytes;
  launch.ranges = config->ranges;
  launch.range_count = config->range_count;
  launch.last_range = config->range_count ? config->ranges : &no_range;
  launch.shared_bytes = config->static_shared_bytes + config->dynamic_shared_bytes;
  launch.shared_stride = (launch.shared_bytes + 2047) / 1024 * 1024;
  launch.dynamic_shared_bytes = (u32)config->dynamic_shared_bytes;
  launch.shared = (u8*)aligned_alloc(1024, launch.shared_stride * launch.cluster_size);
  launch.stack_bytes = config->stack_bytes;
  launch.direct = !kKernelSynchronises;
  launch.deadline = config->timeout > 0 ? now_seconds() + config->timeout : 0;
  launch.counting = config->counting;
  launch.racecheck = (int)config->racecheck;
  launch.observed = launch.counting || launch.racecheck;
  begin_threads();
  if (launch.observed) note_begin_launch();
}

static void end_launch(LaunchReport* report) {
  report->blocks = launch.blocks_done;
  report->shared_loaded_bytes = launch.shared_loaded_bytes;
  report->shared_stored_bytes = launch.shared_stored_bytes;
  report->instructions = 0;
  const int threads = launch.thread_count * launch.cluster_size;
  for (int i = 0; i < threads; i++) report->instructions += launch.threads[i].instructions;
  report->fault = launch.fault;
  snprintf(report->message, sizeof report->message, "%s", launch.fault ? launch.message : "");
  if (launch.observed) note_end_launch();
  if (launch.stacks) munmap(launch.stacks, threads * launch.stack_bytes);
  free(launch.shared);
  free(launch.threads);
  free(launch.warps);
  free(launch.blocks);
}

EXPORTED void ptx_launch(const LaunchConfig* config, LaunchReport* report) {
  begin_launch(config);
  run_clusters(config);
  end_launch(report);
}
