// Capture of streams into graphs, and launches of graphs.
#include "runtime.h"

#include <algorithm>

#define FIND_STREAM(handle)             \
  Lock lock;                            \
  Stream* stream = find_stream(handle); \
  if (!stream) return record(cudaErrorInvalidResourceHandle)

namespace sc {

static std::vector<std::shared_ptr<Capture>>& captures() {
  static auto* value = new std::vector<std::shared_ptr<Capture>>;
  return *value;
}
static thread_local int thread_mode = cudaStreamCaptureModeGlobal;
bool forbidden_in_capture() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  for (auto& capture : captures())
    if (capture->mode != cudaStreamCaptureModeRelaxed) {
      capture->invalid = true;
      return true;
    }
  return false;
}

void Capture::take(Item item) {
  auto& known = serials.emplace_back();
  for (const Range& used : item.uses)
    if (const uint64_t serial = serial_of(used.begin)) known[used.begin] = serial;
  items.push_back(std::move(item));
}

}  // namespace sc

using namespace sc;

extern "C" {

// ---- capture ----
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  FIND_STREAM(handle);
  if (stream->legacy) return record(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return record(cudaErrorIllegalState);
  static unsigned long long ids = 0;
  auto capture = std::make_shared<Capture>();
  capture->id = ++ids;
  capture->mode = mode;
  capture->origin = stream;
  capture->streams.push_back(stream);
  drain(stream);
  stream->capture = capture;
  captures().push_back(capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  FIND_STREAM(handle);
  auto capture = stream->capture;
  *graph = nullptr;
  if (!capture || capture->origin != stream) return record(cudaErrorStreamCaptureUnmatched);
  for (Stream* member : capture->streams) member->capture = nullptr;
  captures().erase(std::find(captures().begin(), captures().end(), capture));
  if (capture->invalid) return record(cudaErrorStreamCaptureInvalidated);
  for (const auto& [member, unjoined] : capture->unjoined)
    if (unjoined && member != stream) return record(cudaErrorStreamCaptureUnjoined);
  *graph = (cudaGraph_t) new Graph{std::move(capture->items), std::move(capture->serials)};
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  FIND_STREAM(handle);
  *status = !stream->capture           ? cudaStreamCaptureStatusNone
            : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  FIND_STREAM(handle);
  cudaStreamIsCapturing(handle, status);
  if (id) *id = stream->capture ? stream->capture->id : 0;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const int previous = thread_mode;
  thread_mode = *mode;
  *mode = (cudaStreamCaptureMode)previous;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                          unsigned long long) {
  *exec = (cudaGraphExec_t) new Graph(*(Graph*)graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  FIND_STREAM(handle);
  const auto& [items, serials] = *(Graph*)exec;
  for (size_t i = 0; i < items.size(); i++) {
    for (const auto& [address, serial] : serials[i])
      if (serial_of(address) != serial) {
        report("freed memory", "a graph was launched in which " + items[i].what +
                                   " was given memory that has been freed since");
        break;
      }
    if (const cudaError_t error = push(stream, items[i])) return record(error);
  }
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes) return record(unsupported("cudaGraphGetNodes", "cannot list nodes"));
  *count = ((Graph*)graph)->items.size();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete (Graph*)graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete (Graph*)exec, cudaSuccess; }

}  // extern "C"
