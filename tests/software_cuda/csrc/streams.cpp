// Streams and events.
#include "runtime.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <set>

namespace sc {

Hooks hooks;
Counters counters;
TorchHooks torch_hooks;

void note_wait(const char* what) {
  counters.host_waits++;
  report("host wait", what);
}

static int environment(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text && *text ? atoi(text) : otherwise;
}
int device_count() {
  static const int count = environment("SOFTWARE_CUDA_DEVICES", 1);
  return count;
}
int& current_device() {
  static thread_local int device = 0;
  return device;
}
static int& lazy_flag() {
  static int flag = [] {
    const char* mode = getenv("SOFTWARE_CUDA_MODE");
    return mode && !strcmp(mode, "lazy") ? 1 : 0;
  }();
  return flag;
}
bool lazy() { return lazy_flag() != 0; }

static double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// ---- queues ----
static std::set<Stream*>& streams() {
  static auto* value = new std::set<Stream*>;
  return *value;
}
static Stream* legacy_stream(int device) {
  static auto* made = [] {
    auto* all = new std::vector<Stream*>;
    for (int i = 0; i < device_count(); i++) {
      auto* stream = new Stream;
      stream->device = i;
      stream->legacy = true;
      streams().insert(stream);
      all->push_back(stream);
    }
    return all;
  }();
  return (*made)[device];
}
Stream* find_stream(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return legacy_stream(current_device());
  if (handle == cudaStreamPerThread) return nullptr;
  Lock lock;
  legacy_stream(0);
  auto found = streams().find((Stream*)handle);
  return found == streams().end() ? nullptr : *found;
}

static cudaError_t run_front(Stream* stream) {
  Item item = std::move(stream->queue.front());
  stream->queue.pop_front();
  int error = cudaSuccess;
  if (item.wait) error = run_until(item.wait);
  if (item.work) {
    const int device = current_device();
    current_device() = stream->device;
    stream->running = true;
    error = item.work();
    stream->running = false;
    current_device() = device;
    if (error && !device_error(stream->device)) device_error(stream->device) = (cudaError_t)error;
  }
  if (item.mark) {
    item.mark->done = true;
    item.mark->seconds = now();
  }
  return (cudaError_t)error;
}
bool is_behind(Stream* stream) {
  Lock lock;
  return !stream->queue.empty();
}
// Runs what can run without a wait by the host: all up to a sleep, or a wait for such a stream.
static cudaError_t advance(Stream* stream) {
  cudaError_t first = cudaSuccess;
  while (!stream->queue.empty() && !stream->running) {
    const Item& item = stream->queue.front();
    if (item.hold || (item.wait && !item.wait->done)) break;
    const cudaError_t error = run_front(stream);
    if (!first) first = error;
  }
  return first;
}
cudaError_t advance_all() {
  cudaError_t first = cudaSuccess;
  for (bool more = true; more;) {
    more = false;
    for (Stream* stream : std::vector<Stream*>(streams().begin(), streams().end())) {
      const size_t before = stream->queue.size();
      const cudaError_t error = advance(stream);
      if (!first) first = error;
      more |= stream->queue.size() < before;
    }
  }
  return first;
}
cudaError_t drain(Stream* stream) {
  Lock lock;
  cudaError_t first = cudaSuccess;
  while (!stream->queue.empty() && !stream->running) {
    const cudaError_t error = run_front(stream);
    if (!first) first = error;
  }
  if (!lazy()) {
    const cudaError_t error = advance_all();
    if (!first) first = error;
  }
  return first ? first : device_error(stream->device);
}
cudaError_t run_until(const std::shared_ptr<Mark>& mark) {
  Lock lock;
  cudaError_t first = cudaSuccess;
  while (mark && !mark->done && !mark->stream->queue.empty()) {
    const cudaError_t error = run_front(mark->stream);
    if (!first) first = error;
  }
  return first;  // in eager mode whoever asked for this advances the others afterwards
}
cudaError_t drain_device(int device) {
  Lock lock;
  cudaError_t first = cudaSuccess;
  legacy_stream(device);
  for (Stream* stream : std::vector<Stream*>(streams().begin(), streams().end()))
    if (stream->device == device) {
      const cudaError_t error = drain(stream);
      if (!first) first = error;
    }
  return first;
}
cudaError_t drain_legacy(int device) {
  Lock lock;
  cudaError_t first = drain(legacy_stream(device));
  for (Stream* stream : std::vector<Stream*>(streams().begin(), streams().end()))
    if (stream->device == device && stream->blocking) {
      const cudaError_t error = drain(stream);
      if (!first) first = error;
    }
  return first;
}
bool any_pending() {
  Lock lock;
  return std::any_of(streams().begin(), streams().end(),
                     [](Stream* stream) { return stream->running || !stream->queue.empty(); });
}

std::shared_ptr<Mark> tail(Stream* stream) {
  auto mark = std::make_shared<Mark>();
  mark->stream = stream;
  if (stream->queue.empty() && !stream->running) {
    mark->done = true;
    mark->seconds = now();
  } else {
    stream->queue.push_back({"mark", {}, {}, mark});
  }
  return mark;
}

cudaError_t push(Stream* stream, Item item) {
  if (device_error(stream->device)) return device_error(stream->device);
  if (stream->capture) {
    if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
    if (stream != stream->capture->origin) stream->capture->unjoined[stream] = true;
    stream->capture->take(std::move(item));
    return cudaSuccess;
  }
  // The legacy stream and blocking streams wait for each other.
  if (stream->legacy) {
    for (Stream* other : streams())
      if (other->blocking && other->device == stream->device && !other->queue.empty())
        stream->queue.push_back({"legacy stream", {}, {}, {}, tail(other)});
  } else if (stream->blocking) {
    Stream* legacy = legacy_stream(stream->device);
    if (!legacy->queue.empty())
      stream->queue.push_back({"legacy stream", {}, {}, {}, tail(legacy)});
  }
  stream->polls = 0;
  stream->queue.push_back(std::move(item));
  return lazy() ? cudaSuccess : advance_all();
}
cudaError_t enqueue(Stream* stream, std::string what, Work work, std::vector<Range> uses,
                    bool hold) {
  Lock lock;
  return push(stream, {std::move(what), std::move(work), std::move(uses), {}, {}, hold});
}
void enqueue_later(Stream* stream, std::string what, Work work) {
  Lock lock;
  if (stream->capture)
    stream->capture->take({std::move(what), std::move(work)});
  else
    stream->queue.push_back({std::move(what), std::move(work)});
}

// How many items of each stream's queue come before anything that `stream` gets from now on.
static void order_before(Stream* stream, size_t items, std::map<Stream*, size_t>& ordered) {
  const size_t known = ordered.count(stream) ? ordered[stream] : 0;
  if (items <= known) return;
  ordered[stream] = items;
  for (size_t i = known; i < items; i++) {
    const auto& wait = stream->queue[i].wait;
    if (!wait || wait->done) continue;
    const auto& queue = wait->stream->queue;
    for (size_t k = 0; k < queue.size(); k++)
      if (queue[k].mark == wait) order_before(wait->stream, k + 1, ordered);
  }
}
std::string unfinished_use(const Allocation& allocation, Range range) {
  std::map<Stream*, size_t> ordered;
  if (allocation.stream) order_before(allocation.stream, allocation.stream->queue.size(), ordered);
  for (Stream* stream : streams()) {
    if (stream == allocation.stream) continue;
    for (size_t i = ordered.count(stream) ? ordered[stream] : 0; i < stream->queue.size(); i++)
      for (const Range& used : stream->queue[i].uses)
        if (used.begin < range.end && range.begin < used.end) return stream->queue[i].what;
  }
  return "";
}

static cudaError_t wait_by_host(Stream* stream, const char* what) {
  if (stream->capture) {
    stream->capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  note_wait(what);
  return drain(stream);
}

}  // namespace sc

using namespace sc;

// ---- for Python ----
EXPORTED void sc_set_hooks(const Hooks* given) { hooks = *given; }
EXPORTED void sc_set_lazy(int flag) {
  Lock lock;
  if (!flag)
    for (int i = 0; i < device_count(); i++) drain_device(i);
  lazy_flag() = flag;
}
EXPORTED int sc_lazy() { return lazy(); }
EXPORTED int sc_current_device() { return current_device(); }
EXPORTED Counters* sc_counters() { return &counters; }
EXPORTED int sc_pending() { return any_pending(); }

extern "C" {

// ---- streams ----
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  Lock lock;
  auto* stream = new Stream;
  stream->device = current_device();
  stream->blocking = !(flags & cudaStreamNonBlocking);
  stream->priority = priority;
  streams().insert(stream);
  *handle = (cudaStream_t)stream;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  return cudaStreamCreateWithPriority(handle, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* handle) {
  return cudaStreamCreateWithPriority(handle, 0, 0);
}
#define FIND_STREAM(handle)             \
  Lock lock;                            \
  Stream* stream = find_stream(handle); \
  if (!stream) return record(cudaErrorInvalidResourceHandle)
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  FIND_STREAM(handle);
  const cudaError_t error = drain(stream);  // the real one returns at once; the work still runs
  streams().erase(stream);                  // not deleted: marks may point to it
  return record(error);
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  FIND_STREAM(handle);
  return record(wait_by_host(stream, "cudaStreamSynchronize"));
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  FIND_STREAM(handle);
  if (stream->capture) return record(cudaErrorStreamCaptureUnsupported);
  if (stream->queue.empty()) return cudaSuccess;
  // A loop that polls must end: the third question in a row runs the work.
  if (++stream->polls < 3) return cudaErrorNotReady;
  return record(drain(stream));
}
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  FIND_STREAM(handle);
  return *priority = stream->priority, cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  FIND_STREAM(handle);
  auto* event = (Event*)event_handle;
  if (event->capture) {
    if (!stream->capture) {  // joins the capture
      if (!stream->queue.empty() && lazy()) drain(stream);
      stream->capture = event->capture;
      event->capture->streams.push_back(stream);
      event->capture->unjoined[stream] = false;
    } else if (stream->capture != event->capture) {
      return record(cudaErrorStreamCaptureMerge);
    }
    // Items of a capture are kept in the order of their enqueueing. What the other stream had
    // waited for counts as joined with it.
    event->capture->unjoined[event->captured_on] = false;
    if (stream != event->capture->origin) event->capture->unjoined[stream] = true;
    return cudaSuccess;
  }
  if (stream->capture) {
    stream->capture->invalid = true;
    return record(cudaErrorStreamCaptureIsolation);
  }
  if (!event->mark || event->mark->done) return cudaSuccess;
  return record(push(stream, {"wait", {}, {}, {}, event->mark}));
}
cudaError_t cudaDeviceSynchronize() {
  Lock lock;
  if (forbidden_in_capture()) return record(cudaErrorStreamCaptureUnsupported);
  note_wait("cudaDeviceSynchronize");
  const cudaError_t error = drain_device(current_device());
  return record(error ? error : device_error(current_device()));
}
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  FIND_STREAM(handle);
  return record(enqueue(stream, "host function", [=] { return function(data), cudaSuccess; }));
}
cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t callback, void* data,
                                  unsigned) {
  FIND_STREAM(handle);
  return record(enqueue(stream, "callback",
                        [=] { return callback(handle, cudaSuccess, data), cudaSuccess; }));
}

// ---- events ----
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  auto* event = new Event;
  event->device = current_device();
  event->timing = !(flags & cudaEventDisableTiming);
  return *handle = (cudaEvent_t)event, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) { return delete (Event*)handle, cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event_handle, cudaStream_t handle, unsigned) {
  FIND_STREAM(handle);
  auto* event = (Event*)event_handle;
  if (event->device != stream->device) return record(cudaErrorInvalidResourceHandle);
  event->capture = stream->capture;
  event->captured_on = stream;
  if (stream->capture) return event->mark = nullptr, cudaSuccess;
  event->mark = tail(stream);
  event_recorded(event->mark);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock;
  auto* event = (Event*)handle;
  if (event->capture) return record(cudaErrorCapturedEvent);
  note_wait("cudaEventSynchronize");
  const cudaError_t error = run_until(event->mark);
  return record(error || lazy() ? error : advance_all());
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock;
  auto* event = (Event*)handle;
  if (event->capture) return record(cudaErrorCapturedEvent);
  if (!event->mark || event->mark->done) return cudaSuccess;
  if (++event->mark->polls < 3) return cudaErrorNotReady;
  // Work that has failed fails the next call: torch's allocator forgets its events if this one
  // does.
  run_until(event->mark);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  auto *first = (Event*)begin, *last = (Event*)end;
  if (!first->timing || !last->timing || !first->mark || !last->mark)
    return record(cudaErrorInvalidResourceHandle);
  if (!first->mark->done || !last->mark->done) return record(cudaErrorNotReady);
  *milliseconds = (float)((last->mark->seconds - first->mark->seconds) * 1e3);
  return cudaSuccess;
}

}  // extern "C"
