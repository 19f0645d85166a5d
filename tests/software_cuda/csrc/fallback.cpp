// torch's own CUDA kernels are machine code for a GPU. Here every aten op with a CUDA kernel gets a
// boxed kernel that runs the CPU kernel on CPU tensors over the same memory, in the order of the
// current stream. Ops that only make tensors or views, and copies from and to the host, stay
// torch's own: they call the (fake) runtime.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/copy_native.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cstdio>
#include <set>
#include <unordered_map>

#include "runtime.h"

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

std::map<std::string, int64_t> calls;  // by op, for `software_cuda.operator_calls()`

// Stay torch's own.
const std::set<std::string> kNative = {"aten::empty.memory_format",
                                       "aten::empty_strided",
                                       "aten::resize_",
                                       "aten::_local_scalar_dense",
                                       "aten::is_pinned",
                                       "aten::record_stream",
                                       "aten::_pin_memory",
                                       "aten::_efficientzerotensor",
                                       "aten::is_set_to",
                                       "aten::set_",
                                       "aten::set_.source_Storage",
                                       "aten::set_.source_Tensor",
                                       "aten::set_.source_Storage_storage_offset",
                                       "aten::_cuda_getCurrentRawStream"};
// Have no CUDA kernel of their own, but would choose cuDNN or another library by the device.
const char* const kAlso[] = {"convolution", "convolution_backward"};
// May take tensors of two devices.
const std::set<std::string> kMixed = {"aten::copy_",           "aten::index.Tensor",
                                      "aten::index_put_",      "aten::_index_put_impl_",
                                      "aten::_foreach_copy_",  "aten::_unsafe_index.Tensor",
                                      "aten::index.Tensor_out"};

// ---- arguments of an op, with their tensors replaced ----
template <typename Map>
IValue replaced(const IValue& value, const Map& map) {
  if (value.isTensor()) return map(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& x : value.toTensorVector()) list.push_back(map(x));
    return list;
  }
  if (value.isList()) {  // of optional tensors
    const auto given = value.toList();
    bool any = false;
    for (const IValue& x : given) any |= x.isTensor();
    if (!any) return value;
    c10::impl::GenericList list(given.elementType());
    for (const IValue& x : given)
      list.push_back(x.isTensor() ? IValue(map(x.toTensor())) : IValue(x));
    return list;
  }
  return value;
}
template <typename Visit>
void each_tensor(const IValue& value, const Visit& visit) {
  replaced(value, [&](const Tensor& x) { return visit(x), x; });
}

void copy_flags(const Tensor& from, const Tensor& to) {
  if (from.unsafeGetTensorImpl()->is_wrapped_number())
    to.unsafeGetTensorImpl()->set_wrapped_number(true);
  if (from.is_conj()) to._set_conj(true);
  if (from.is_neg()) to._set_neg(true);
}
Tensor on_host(const Tensor& x) {  // a CPU tensor over the same memory
  if (!x.defined() || !x.is_cuda()) return x;
  TORCH_CHECK(x.layout() == at::kStrided, "software_cuda: only strided tensors");
  void* data = const_cast<void*>(x.const_data_ptr());
  const Tensor alias = at::from_blob(data, x.sizes(), x.strides(), x.options().device(at::kCPU));
  copy_flags(x, alias);
  return alias;
}
Tensor as_meta(const Tensor& x) {
  if (!x.defined() || (x.is_cpu() && x.dim() == 0)) return x;  // numbers stay numbers
  const Tensor meta = at::empty_strided(x.sizes(), x.strides(), x.options().device(at::kMeta));
  copy_flags(x, meta);
  return meta;
}
IValue device_replaced(const IValue& value, c10::Device device) {
  return value.isDevice() && value.toDevice().is_cuda() ? IValue(device) : value;
}

// ---- random numbers: the CPU's, from a seed that the CUDA generator's state determines ----
uint64_t mixed(uint64_t seed, uint64_t offset) {
  uint64_t x = seed * 0x9E3779B97F4A7C15ull + offset + 1;
  x = (x ^ (x >> 31)) * 0xBF58476D1CE4E5B9ull;
  return x ^ (x >> 29);
}
uint64_t seed_now(const at::PhiloxCudaState& state) {
  if (!state.captured_) return mixed(state.seed_.val, state.offset_.val);
  return mixed((uint64_t)*state.seed_.ptr, (uint64_t)*state.offset_.ptr + state.offset_intragraph_);
}

// ---- running ----
struct Call {
  OperatorHandle op;
  Stack arguments;              // on the host
  std::vector<Tensor> targets;  // where new results go, if their memory exists already
  std::optional<at::PhiloxCudaState> random;

  Stack operator()() const {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard plain(DispatchKeySet(
        {DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::Functionalize,
         DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::FuncTorchDynamicLayerBackMode}));
    if (!random) return run(arguments);
    Stack given = arguments;
    const at::Generator generator = at::detail::createCPUGenerator(seed_now(*random));
    bool has_argument = false;
    for (size_t i = 0; i < given.size(); i++) {
      const auto& type = op.schema().arguments()[i].type();
      if (given[i].isGenerator() ||
          (given[i].isNone() && type->str().find("Generator") != std::string::npos)) {
        given[i] = generator;
        has_argument = true;
      }
    }
    if (has_argument) return run(given);
    auto standard = at::detail::getDefaultCPUGenerator();  // ops such as dropout take no generator
    const auto saved = standard.get_state();
    standard.set_current_seed(generator.current_seed());
    try {
      Stack results = run(given);
      standard.set_state(saved);
      return results;
    } catch (...) {
      standard.set_state(saved);
      throw;
    }
  }

  Stack run(Stack stack) const {
    const Stack copy = stack;
    try {
      op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &stack);
      return stack;
    } catch (const c10::Error& error) {
      // Some CPU kernels lack the 16-bit types: in float32, then.
      if (std::string(error.what()).find("not implemented for '") == std::string::npos) throw;
    }
    at::ScalarType narrow = at::kHalf;
    bool found = false;
    const auto widen = [&](const Tensor& x) {
      if (!x.defined() || (x.scalar_type() != at::kHalf && x.scalar_type() != at::kBFloat16))
        return x;
      narrow = x.scalar_type();
      found = true;
      return x.to(at::kFloat);
    };
    Stack wide;
    for (const IValue& value : copy) wide.push_back(replaced(value, widen));
    TORCH_CHECK(found, "software_cuda: ", op.operator_name(), " has no CPU kernel for these types");
    Stack results = wide;
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &results);
    for (size_t i = 0; i < copy.size(); i++) {
      const auto* alias = op.schema().arguments()[i].alias_info();
      if (alias && alias->isWrite() && copy[i].isTensor())
        copy[i].toTensor().copy_(wide[i].toTensor());
    }
    for (IValue& value : results)
      value = replaced(value, [&](const Tensor& x) {
        return x.defined() && x.scalar_type() == at::kFloat ? x.to(narrow) : x;
      });
    return results;
  }
};

bool is_new(const c10::Argument& result) { return !result.alias_info(); }

// Memory on the device for a result of these sizes.
Tensor allocated(const Tensor& like, c10::Device device) {
  if (!like.defined()) return like;
  const auto options = like.options().device(device);
  if (like.is_non_overlapping_and_dense())
    return at::empty_strided(like.sizes(), like.strides(), options);
  return at::empty(like.sizes(), options);
}

bool waits(const OperatorHandle& op, const Stack& arguments) {
  const bool indexing = op.schema().name().find("index") != std::string::npos;
  if (!indexing &&
      (op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output)))
    return true;
  for (const auto& result : op.schema().returns()) {
    const auto text = result.type()->str();
    if (text.find("Tensor") == std::string::npos) return true;  // a number for the host
  }
  if (indexing) {  // by a mask: counts its elements
    bool mask = false;
    for (size_t i = 1; i < arguments.size(); i++)
      if (arguments[i].isList())
        each_tensor(arguments[i], [&](const Tensor& x) {
          mask |= x.defined() && (x.scalar_type() == at::kBool || x.scalar_type() == at::kByte);
        });
    return mask;
  }
  return false;
}

std::string name_of(const OperatorHandle& op) {
  const auto& name = op.operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

bool has_cpu_kernel(const OperatorHandle& op) {
  return op.hasKernelForDispatchKey(DispatchKey::CPU) ||
         op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
         op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional) ||
         op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
}

void cpu_kernel(const OperatorHandle& op, DispatchKeySet, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  const auto& schema = op.schema();
  const std::string name = name_of(op);
  const size_t count = schema.arguments().size();
  const Stack arguments(stack->end() - (int64_t)count, stack->end());
  torch::jit::drop(*stack, count);
  TORCH_CHECK_NOT_IMPLEMENTED(has_cpu_kernel(op), "software_cuda: ", name, " has no CPU kernel");
  {
    const sc::Lock lock;
    calls[name]++;
  }

  // ---- the device ----
  std::optional<c10::Device> device;
  const auto visit = [&](const Tensor& x) {
    if (!x.defined()) return;
    if (x.is_cuda() && !device) device = x.device();
  };
  for (const IValue& value : arguments) each_tensor(value, visit);
  for (const IValue& value : arguments)
    if (!device && value.isDevice() && value.toDevice().is_cuda()) device = value.toDevice();
  TORCH_INTERNAL_ASSERT(device, name, ": no CUDA device among the arguments");
  if (!device->has_index()) device = c10::Device(at::kCUDA, c10::cuda::current_device());
  if (!kMixed.count(name))
    for (const IValue& value : arguments)
      each_tensor(value, [&](const Tensor& x) {
        TORCH_CHECK(
            !x.defined() || x.device() == *device || (x.is_cpu() && x.dim() == 0),
            "Expected all tensors to be on the same device, but found at least two devices, ",
            *device, " and ", x.device(), "! (", name, ")");
      });
  const c10::cuda::CUDAGuard guard(*device);
  sc::Stream* stream = sc::find_stream(c10::cuda::getCurrentCUDAStream(device->index()).stream());

  // ---- outputs of out= variants get their sizes first ----
  const bool deferred = sc::lazy() || stream->capture || sc::is_behind(stream);
  Call call{op, {}, {}, {}};
  std::vector<size_t> outs;  // empty ones, to be resized
  const auto argument_on_host = [&](const Tensor& x) {
    if (!deferred || !x.defined() || x.is_cuda()) return on_host(x);
    const Tensor copy = x.clone();  // a number of the host, which may change before it is read
    copy_flags(x, copy);
    return copy;
  };
  for (size_t i = 0; i < count; i++) {
    const auto& argument = schema.arguments()[i];
    const bool out = argument.is_out() && arguments[i].isTensor();
    if (out && arguments[i].toTensor().numel() == 0) outs.push_back(i);
    call.arguments.push_back(device_replaced(replaced(arguments[i], argument_on_host), at::kCPU));
  }
  const auto fresh = [&](Stack& given, at::DeviceType type) {
    for (size_t i : outs) given[i] = at::empty({0}, arguments[i].toTensor().options().device(type));
  };
  if (op.hasTag(at::Tag::nondeterministic_seeded)) {
    std::optional<at::Generator> given;
    for (const IValue& value : arguments)
      if (value.isGenerator()) given = value.toGenerator();
    auto* generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
        given, at::cuda::detail::getDefaultCUDAGenerator(device->index()));
    std::lock_guard<std::mutex> lock(generator->mutex_);
    call.random = generator->philox_cuda_state(4);
  }
  const auto push_result = [&](size_t i, IValue found) {
    const auto& result = schema.returns()[i];
    if (is_new(result)) return stack->push_back(std::move(found));
    for (size_t k = 0; k < count; k++) {  // the argument that was written
      const auto* alias = schema.arguments()[k].alias_info();
      if (alias && alias->beforeSets() == result.alias_info()->beforeSets())
        return stack->push_back(arguments[k]);
    }
    TORCH_INTERNAL_ASSERT(false, name, ": unknown alias");
  };

  if (!deferred || waits(op, arguments)) {
    if (waits(op, arguments)) {
      c10::cuda::warn_or_error_on_sync();
      TORCH_CHECK(!stream->capture,
                  "CUDA error: operation not permitted when stream is capturing (", name,
                  " waits for the device)");
      sc::note_wait(name.c_str());
    }
    const cudaError_t error = sc::drain(stream);
    TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error), " before ", name);
    fresh(call.arguments, at::kCPU);
    Stack results = call();
    for (size_t i : outs) {
      const Tensor found = call.arguments[i].toTensor(), wanted = arguments[i].toTensor();
      at::native::resize_output(wanted, found.sizes());
      if (!found.is_contiguous() && found.is_non_overlapping_and_dense())
        wanted.as_strided_(found.sizes(), found.strides());
      on_host(wanted).copy_(found);
    }
    for (size_t i = 0; i < results.size(); i++)
      // Nothing is allocated for what was written in place: with deterministic algorithms new
      // memory is filled by such an op.
      push_result(
          i, !is_new(schema.returns()[i]) ? IValue() : replaced(results[i], [&](const Tensor& x) {
            const Tensor made = allocated(x, *device);
            if (x.defined()) on_host(made).copy_(x);
            return made;
          }));
    return;
  }

  // ---- later: the results' sizes come from the Meta kernel, or else from a trial run ----
  bool any_new = !outs.empty();
  for (const auto& result : schema.returns()) any_new |= is_new(result);
  if (any_new) {
    Stack trial;
    for (const IValue& value : arguments)
      trial.push_back(device_replaced(replaced(value, as_meta), at::kMeta));
    fresh(trial, at::kMeta);
    Stack given = trial;
    try {
      for (IValue& value : trial)
        if (value.isGenerator()) value = IValue();
      op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &trial);
    } catch (const std::exception& error) {
      const std::string text = error.what();
      if (text.find("Meta") == std::string::npos && text.find("meta") == std::string::npos) throw;
      Call once = call;
      if (once.random) once.random = at::PhiloxCudaState(0, 0);
      once.arguments.clear();
      for (const IValue& value : arguments)
        once.arguments.push_back(device_replaced(
            replaced(value, [](const Tensor& x) { return x.defined() ? on_host(x).clone() : x; }),
            at::kCPU));
      fresh(once.arguments, at::kCPU);
      given = once.arguments;
      trial = once();
    }
    for (size_t i : outs) {
      const Tensor found = given[i].toTensor(), wanted = arguments[i].toTensor();
      at::native::resize_output(wanted, found.sizes());
      call.arguments[i] = on_host(wanted);
    }
    // Meta kernels do not know that convolutions keep channels_last.
    auto format = at::MemoryFormat::Contiguous;
    if (name.find("convolution") != std::string::npos)
      for (const IValue& value : arguments)
        each_tensor(value, [&](const Tensor& x) {
          if (x.defined() && x.dim() > 3 &&
              x.suggest_memory_format() != at::MemoryFormat::Contiguous)
            format = x.suggest_memory_format();
        });
    for (size_t i = 0; i < trial.size(); i++)
      push_result(i, replaced(trial[i], [&](const Tensor& x) {
                    const bool kept =
                        x.defined() && x.dim() > 3 && format != at::MemoryFormat::Contiguous;
                    const Tensor made = allocated(kept ? x.contiguous(format) : x, *device);
                    if (is_new(schema.returns()[i])) call.targets.push_back(on_host(made));
                    return made;
                  }));
  } else {
    for (size_t i = 0; i < schema.returns().size(); i++) push_result(i, {});
  }
  const auto later = [call, name]() -> int {
    try {
      Stack results = call();
      size_t next = 0;
      for (size_t i = 0; i < results.size(); i++)
        if (is_new(call.op.schema().returns()[i]))
          each_tensor(results[i], [&](const Tensor& x) {
            const Tensor& target = call.targets[next++];
            if (x.defined()) target.copy_(x);
          });
      return cudaSuccess;
    } catch (const std::exception& error) {
      const auto* torchs = dynamic_cast<const c10::Error*>(&error);
      sc::report("operator failed",
                 name + ": " + (torchs ? torchs->what_without_backtrace() : error.what()));
      return cudaErrorLaunchFailure;
    }
  };
  std::vector<sc::Range> uses;
  const auto note_use = [&](const Tensor& x) {
    if (!x.defined() || !x.is_cuda()) return;
    const auto begin = (uint64_t)x.storage().data();
    uses.push_back({begin, begin + x.storage().nbytes()});
  };
  for (const IValue& value : arguments) each_tensor(value, note_use);
  const cudaError_t error = sc::enqueue(stream, name, later, std::move(uses));
  TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error), " (", name, ")");
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  const bool one_device = self.is_cuda() && source.is_cuda() && self.device() == source.device();
  const bool plain = self.scalar_type() == source.scalar_type() && self.sizes() == source.sizes() &&
                     self.is_contiguous() && source.is_contiguous() &&
                     self.is_conj() == source.is_conj() && self.is_neg() == source.is_neg();
  if (!one_device || plain) return at::native::copy_(self, source, non_blocking);
  Stack stack{self, source, non_blocking};
  cpu_kernel(op, DispatchKeySet(), &stack);
  return self;
}

// ---- what torch knows and the runtime asks ----
cudaStream_t current_stream(int device) {
  return c10::cuda::getCurrentCUDAStream((c10::DeviceIndex)device).stream();
}
void watch_allocator() {
  using Entry = c10::CachingDeviceAllocator::TraceEntry;
  c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker([](const Entry& entry) {
    sc::in_allocator = true;
    if (entry.action_ == Entry::ALLOC) {
      const c10::cuda::CUDAGuard guard(
          entry.device_);  // of the default stream, whose handle is null
      const bool own_pool = entry.mempool_ != c10::MempoolId_t{0, 0};
      sc::tensor_allocated(entry.addr_, entry.size_, entry.device_,
                           sc::find_stream((cudaStream_t)entry.stream_), own_pool);
    } else if (entry.action_ == Entry::FREE_REQUESTED) {
      sc::tensor_freed(entry.addr_);
    } else if (entry.action_ == Entry::FREE_COMPLETED) {  // after the streams that were recorded
      sc::memory_reusable(entry.addr_);
    }
    sc::in_allocator = false;
  });
}

std::vector<c10::RegistrationHandleRAII>& registrations() {
  static auto* value = new std::vector<c10::RegistrationHandleRAII>;
  return *value;
}

}  // namespace

// Returns how many operators run on the CPU now.
EXPORTED int sc_install_fallback() {
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto install = [&](const c10::OperatorName& name, c10::KernelFunction kernel) {
    registrations().push_back(dispatcher.registerImpl(name, DispatchKey::CUDA, std::move(kernel),
                                                      std::nullopt, nullptr, "software_cuda"));
  };
  int count = 0;
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::CUDA)) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const auto op = dispatcher.findSchema(name);
    if (!op || kNative.count(name_of(*op))) continue;
    bool view = false;
    for (const auto& result : op->schema().returns())
      view |= result.alias_info() && !result.alias_info()->isWrite();
    if (view) continue;
    install(name, c10::KernelFunction::makeFromBoxedFunction<&cpu_kernel>());
    count++;
  }
  for (const char* name : kAlso)
    install({std::string("aten::") + name, ""},
            c10::KernelFunction::makeFromBoxedFunction<&cpu_kernel>());
  install({"aten::copy_", ""}, c10::KernelFunction::makeFromUnboxedRuntimeFunction(&copy_));
  sc::torch_hooks.current_stream = &current_stream;
  sc::torch_hooks.watch_allocator = &watch_allocator;
  at::globalContext().setSDPUseFlash(false);
  at::globalContext().setSDPUseMemEfficient(false);
  at::globalContext().setSDPUseCuDNN(false);
  return count;
}

// "name count\n..." of the ops that ran on the CPU.
EXPORTED const char* sc_operator_calls() {
  const sc::Lock lock;
  static std::string text;
  text.clear();
  for (const auto& [name, number] : calls) text += name + " " + std::to_string(number) + "\n";
  return text.c_str();
}
