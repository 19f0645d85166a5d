// In C++ what is between callers of ops and their kernels: the call past autograd that nobody
// records, the kernel at the Autograd key, and the node of the op that is recorded most. On small
// tensors the same in Python takes longer than the kernels.
//
// The stable ABI has no autograd, so this uses torch's other headers, and fastdiff/_native.py loads
// it only under the very torch that it was built with. Without it Python does the same:
// fastdiff/ops/_library.py and group_norm_silu.py.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

namespace fastdiff {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Operand = std::optional<Tensor>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using c10::SymInt;
using Seed = std::optional<SymInt>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

bool is_recorded(const Tensor& x) {
  return x.defined() &&
         ((at::GradMode::is_enabled() && x.requires_grad()) || x._fw_grad(0).defined());
}
bool is_recorded(const Operand& x) { return x && is_recorded(*x); }
template <typename T>
bool is_recorded(const T&) {
  return false;
}

// Under torch.func's transforms, which do not know kernels at the Autograd key.
bool in_functorch() {
  using c10::DispatchKey;
  using c10::impl::tls_is_dispatch_key_included;
  return tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerBackMode);
}

Operand operand_of(const Tensor& saved) { return saved.defined() ? Operand(saved) : std::nullopt; }
Tensor saved_of(const Operand& operand) { return operand.value_or(Tensor()); }

int64_t number(const SymInt& value) { return value.guard_int(__FILE__, __LINE__); }

// create_graph: gradients that can be differentiated again, from the reference in Python.
template <typename... Args>
SixTensors differentiable_gradients(const char* module, const std::array<bool, 6>& wanted,
                                    const Args&... args) {
  pybind11::gil_scoped_acquire gil;
  const auto found = pybind11::module_::import(module).attr("_differentiable_gradients")(args...);
  std::array<Tensor, 6> gradients;
  for (size_t i = 0; i < 6; ++i) {
    const pybind11::object gradient = found[pybind11::int_(i)];
    if (wanted[i] && !gradient.is_none()) gradients[i] = gradient.cast<Tensor>();
  }
  return std::tuple_cat(gradients);
}

// Keeps x, the small operands, mean and rstd; the activation's input and dropout's mask are made
// again. D is what dropout adds to the arguments: threshold, keys, seed and stream, or nothing.
template <typename... D>
struct GroupNormSilu : torch::autograd::Function<GroupNormSilu<D...>> {
  static constexpr bool kDropout = sizeof...(D) > 0;

  static std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, int64_t num_groups,
                                                const Operand& weight, const Operand& bias,
                                                double eps, const Operand& channel_bias,
                                                const Operand& scale, const Operand& shift,
                                                int64_t activation, D... dropout) {
    static const auto op = find_op<decltype(run)>(kDropout ? "fastdiff::group_norm_silu_dropout"
                                                           : "fastdiff::group_norm_silu");
    at::AutoDispatchBelowAutograd below;
    return op.call(x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation,
                   dropout...);
  }

  static SixTensors run_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                 const Tensor& rstd, int64_t num_groups, const Operand& weight,
                                 const Operand& bias, const Operand& channel_bias,
                                 const Operand& scale, const Operand& shift, int64_t activation,
                                 bool need_x, bool need_weight, bool need_bias,
                                 bool need_channel_bias, bool need_scale, bool need_shift,
                                 D... dropout) {
    static const auto op =
        find_op<decltype(run_backward)>(kDropout ? "fastdiff::group_norm_silu_dropout_backward"
                                                 : "fastdiff::group_norm_silu_backward");
    at::AutoDispatchBelowAutograd below;
    return op.call(grad, x, mean, rstd, num_groups, weight, bias, channel_bias, scale, shift,
                   activation, need_x, need_weight, need_bias, need_channel_bias, need_scale,
                   need_shift, dropout...);
  }

  static variable_list forward(AutogradContext* ctx, const Tensor& x, int64_t num_groups,
                               const Operand& weight, const Operand& bias, double eps,
                               const Operand& channel_bias, const Operand& scale,
                               const Operand& shift, int64_t activation, D... dropout) {
    auto [y, mean, rstd] =
        run(x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation, dropout...);
    variable_list saved{x,
                        saved_of(weight),
                        saved_of(bias),
                        saved_of(channel_bias),
                        saved_of(scale),
                        saved_of(shift),
                        mean,
                        rstd};
    if constexpr (kDropout) {
      const auto& [threshold, keys, seed, stream] = std::tie(dropout...);
      saved.push_back(saved_of(keys));
      std::optional<int64_t> seed_number;
      if (seed) seed_number = number(*seed);
      ctx->saved_data["dropout"] = std::tuple(threshold, seed_number, number(stream));
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = std::tuple(num_groups, eps, activation);
    ctx->mark_non_differentiable({mean, rstd});
    ctx->set_materialize_grads(false);
    return {y, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad = grads[0];
    const variable_list saved = ctx->get_saved_variables();
    const auto [num_groups, eps, activation] =
        ctx->saved_data["call"].to<std::tuple<int64_t, double, int64_t>>();
    std::array<Operand, 6> inputs;
    std::array<bool, 6> needs{};
    for (size_t i = 0, edge = 0; i < 6; ++i) {
      if (!saved[i].defined()) continue;
      inputs[i] = saved[i];
      needs[i] = grad.defined() && ctx->needs_input_grad(edge++);  // edges are tensors only
    }
    SixTensors found;
    if (!grad.defined()) {
      // Nothing came back through y: nothing goes on.
    } else if (at::GradMode::is_enabled()) {
      found = std::apply(
          [&](const auto&... dropout) {
            return differentiable_gradients("fastdiff.ops.group_norm_silu", needs, grad, inputs,
                                            needs, num_groups, eps, activation, dropout...);
          },
          dropout_of(ctx, saved));
    } else {
      found = std::apply(
          [&](const auto&... dropout) {
            return run_backward(grad, *inputs[0], saved[6], saved[7], num_groups, inputs[1],
                                inputs[2], inputs[3], inputs[4], inputs[5], activation, needs[0],
                                needs[1], needs[2], needs[3], needs[4], needs[5], dropout...);
          },
          dropout_of(ctx, saved));
    }
    const auto& [x, weight, bias, channel_bias, scale, shift] = found;
    const auto wanted = [&](size_t i, const Tensor& g) { return needs[i] ? g : Tensor(); };
    variable_list gradients{wanted(0, x),     Tensor(),         wanted(1, weight),
                            wanted(2, bias),  Tensor(),         wanted(3, channel_bias),
                            wanted(4, scale), wanted(5, shift), Tensor()};
    gradients.resize(gradients.size() + sizeof...(D));
    return gradients;
  }

  static std::tuple<std::decay_t<D>...> dropout_of(AutogradContext* ctx,
                                                   const variable_list& saved) {
    if constexpr (kDropout) {
      const auto [threshold, seed, stream] =
          ctx->saved_data["dropout"].to<std::tuple<int64_t, std::optional<int64_t>, int64_t>>();
      return {threshold, operand_of(saved.back()), seed ? Seed(*seed) : std::nullopt,
              SymInt(stream)};
    } else {
      return {};
    }
  }

  static std::tuple<Tensor> call(const Tensor& x, int64_t num_groups, const Operand& weight,
                                 const Operand& bias, double eps, const Operand& channel_bias,
                                 const Operand& scale, const Operand& shift, int64_t activation,
                                 D... dropout) {
    if (is_recorded(x) || is_recorded(weight) || is_recorded(bias) || is_recorded(channel_bias) ||
        is_recorded(scale) || is_recorded(shift)) {
      return {GroupNormSilu::apply(x, num_groups, weight, bias, eps, channel_bias, scale, shift,
                                   activation, dropout...)[0]};
    }
    return {std::get<0>(
        run(x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation, dropout...))};
  }
};

using GroupNormSiluDropout =
    GroupNormSilu<int64_t /*threshold*/, const Operand& /*keys*/, Seed, SymInt /*stream*/>;

// Keeps the sum, the small operands, mean and rstd.
struct ResidualGroupNormSilu : torch::autograd::Function<ResidualGroupNormSilu> {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Tensor& x, const Tensor& residual,
                                                        int64_t num_groups, const Operand& weight,
                                                        const Operand& bias, double eps,
                                                        const Operand& scale, const Operand& shift,
                                                        int64_t activation,
                                                        const Operand& sum_bias) {
    static const auto op = find_op<decltype(run)>("fastdiff::residual_group_norm_silu");
    at::AutoDispatchBelowAutograd below;
    return op.call(x, residual, num_groups, weight, bias, eps, scale, shift, activation, sum_bias);
  }

  static SixTensors run_backward(const Tensor& grad, const Operand& grad_sum, const Tensor& sum,
                                 const Tensor& mean, const Tensor& rstd, int64_t num_groups,
                                 const Operand& weight, const Operand& bias, const Operand& scale,
                                 const Operand& shift, int64_t activation, const Operand& sum_bias,
                                 bool need_x, bool need_weight, bool need_bias, bool need_scale,
                                 bool need_shift, bool need_sum_bias) {
    static const auto op =
        find_op<decltype(run_backward)>("fastdiff::residual_group_norm_silu_backward");
    at::AutoDispatchBelowAutograd below;
    return op.call(grad, grad_sum, sum, mean, rstd, num_groups, weight, bias, scale, shift,
                   activation, sum_bias, need_x, need_weight, need_bias, need_scale, need_shift,
                   need_sum_bias);
  }

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual,
                               int64_t num_groups, const Operand& weight, const Operand& bias,
                               double eps, const Operand& scale, const Operand& shift,
                               int64_t activation, const Operand& sum_bias) {
    auto [sum, y, mean, rstd] =
        run(x, residual, num_groups, weight, bias, eps, scale, shift, activation, sum_bias);
    ctx->save_for_backward({sum, saved_of(weight), saved_of(bias), saved_of(scale), saved_of(shift),
                            saved_of(sum_bias), mean, rstd});
    ctx->saved_data["call"] = std::tuple(num_groups, eps, activation);
    ctx->mark_non_differentiable({mean, rstd});
    ctx->set_materialize_grads(false);
    return {sum, y, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor &grad_sum = grads[0], &grad = grads[1];
    const variable_list saved = ctx->get_saved_variables();
    const auto [num_groups, eps, activation] =
        ctx->saved_data["call"].to<std::tuple<int64_t, double, int64_t>>();
    std::array<Operand, 6> inputs;  // the sum in the place of the summands
    std::array<bool, 6> needs{};
    const bool need_x = ctx->needs_input_grad(0), need_residual = ctx->needs_input_grad(1);
    inputs[0] = saved[0];
    needs[0] = need_x || need_residual;
    for (size_t i = 1, edge = 2; i < 6; ++i) {
      if (!saved[i].defined()) continue;
      inputs[i] = saved[i];
      needs[i] = ctx->needs_input_grad(edge++);
    }
    const Operand of_sum = operand_of(grad_sum);
    SixTensors found;
    if (!grad.defined() || at::GradMode::is_enabled()) {
      found =
          differentiable_gradients("fastdiff.ops.residual_group_norm_silu", needs, operand_of(grad),
                                   of_sum, inputs, needs, num_groups, eps, activation);
    } else {
      found = run_backward(grad, of_sum, saved[0], saved[6], saved[7], num_groups, inputs[1],
                           inputs[2], inputs[3], inputs[4], activation, inputs[5], needs[0],
                           needs[1], needs[2], needs[3], needs[4], needs[5]);
    }
    const auto& [x, weight, bias, scale, shift, sum_bias] = found;
    const auto wanted = [](bool need, const Tensor& g) { return need ? g : Tensor(); };
    return {wanted(need_x, x),         wanted(need_residual, x), Tensor(),
            wanted(needs[1], weight),  wanted(needs[2], bias),   Tensor(),
            wanted(needs[3], scale),   wanted(needs[4], shift),  Tensor(),
            wanted(needs[5], sum_bias)};
  }

  static std::tuple<Tensor, Tensor> call(const Tensor& x, const Tensor& residual,
                                         int64_t num_groups, const Operand& weight,
                                         const Operand& bias, double eps, const Operand& scale,
                                         const Operand& shift, int64_t activation,
                                         const Operand& sum_bias) {
    if (is_recorded(x) || is_recorded(residual) || is_recorded(weight) || is_recorded(bias) ||
        is_recorded(scale) || is_recorded(shift) || is_recorded(sum_bias)) {
      const auto results =
          apply(x, residual, num_groups, weight, bias, eps, scale, shift, activation, sum_bias);
      return {results[0], results[1]};
    }
    auto [sum, y, mean, rstd] =
        run(x, residual, num_groups, weight, bias, eps, scale, shift, activation, sum_bias);
    return {sum, y};
  }
};

template <size_t N>
struct Name {
  char text[N]{};
  constexpr Name(const char (&name)[N]) { std::copy_n(name, N, text); }
};

// The other ops without autograd: None if a gradient is needed.
template <Name kName, typename Result, typename... Args>
struct Unrecorded {
  static std::optional<Result> call(Args... args) {
    if (in_functorch() || (is_recorded(args) || ...)) return std::nullopt;
    static const auto op = find_op<Result(Args...)>(kName.text);
    at::AutoDispatchBelowAutograd below;
    return op.call(args...);
  }

  // The three rows of a matrix one by one, which takes Python as long as the call.
  static std::optional<std::tuple<Tensor, Tensor, Tensor>> rows(Args... args) {
    const auto matrix = call(args...);
    if (!matrix) return std::nullopt;
    at::AutoDispatchBelowAutograd below;
    return std::tuple(matrix->select(0, 0), matrix->select(0, 1), matrix->select(0, 2));
  }
};

using QSample =
    Unrecorded<"fastdiff::q_sample", Tensor, const Tensor& /*x0*/, const Tensor& /*t*/,
               const Tensor& /*sqrt_alpha_bar*/, const Tensor& /*sqrt_one_minus_alpha_bar*/,
               const Operand& /*noise*/, const Operand& /*keys*/, Seed, SymInt /*stream*/,
               const Operand& /*flip*/, std::optional<at::ScalarType>>;
using EpsLoss =
    Unrecorded<"fastdiff::eps_loss", Tensor, const Tensor& /*prediction*/, const Operand& /*noise*/,
               const Operand& /*keys*/, Seed, SymInt /*stream*/, const Operand& /*weight*/,
               int64_t /*reduction*/, int64_t /*kind*/>;
using VlbTerms =
    Unrecorded<"fastdiff::vlb_terms", Tensor, const Tensor& /*x0*/, const Tensor& /*x_t*/,
               const Tensor& /*model_output*/, const Tensor& /*t*/, const Tensor& /*table*/,
               const Operand& /*noise*/, const Operand& /*keys*/, Seed, SymInt /*stream*/,
               int64_t /*prediction*/, bool /*learned*/, bool /*clip*/, bool /*detach_mean*/>;
template <Name kName>
using SamplerStep =
    Unrecorded<kName, std::tuple<Tensor, Tensor>, const Tensor& /*x_t*/,
               const Tensor& /*model_output*/, const Tensor& /*step*/, const Tensor& /*table*/,
               int64_t /*prediction*/, bool /*clip*/, bool /*flag*/, const Operand& /*uncond*/,
               double /*guidance_scale*/, const Operand& /*noise*/, const Operand& /*keys*/, Seed,
               SymInt /*stream*/, bool /*return_pred_x0*/>;

// An op's kernel at the Autograd key: past autograd if no gradient is needed, as in a compiled
// graph, which calls the op from a node of its own; else the kernel in Python.
class AutogradKernel : public c10::OperatorKernel {
 public:
  // The dispatcher keeps kernels until the process ends, when there is no Python to free them with.
  explicit AutogradKernel(pybind11::object python) : python_(python.release()) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const size_t count = schema.arguments().size(), first = stack->size() - count;
    const auto arguments = torch::jit::last(*stack, count);
    const auto recorded = [](const c10::IValue& value) {
      return value.isTensor() && is_recorded(value.toTensor());
    };
    if (!in_functorch() && std::none_of(arguments.begin(), arguments.end(), recorded)) {
      at::AutoDispatchBelowAutograd below;
      op.callBoxed(stack);
      return;
    }
    pybind11::gil_scoped_acquire gil;
    pybind11::tuple given(count);
    for (size_t i = 0; i < count; ++i) given[i] = to_python(schema.arguments()[i], arguments[i]);
    const pybind11::object returned = python_(*given);
    stack->resize(first);
    if (!pybind11::isinstance<pybind11::tuple>(returned)) {
      stack->emplace_back(returned.cast<Tensor>());
      return;
    }
    for (const pybind11::handle output : returned) stack->emplace_back(output.cast<Tensor>());
  }

 private:
  static pybind11::object to_python(const c10::Argument& argument, const c10::IValue& value) {
    auto type = argument.real_type();
    if (const auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
    if (type->kind() == c10::TypeKind::ScalarTypeType && value.isInt()) {
      return pybind11::cast(value.toScalarType());
    }
    return torch::jit::toPyObject(value);
  }

  pybind11::handle python_;
};

void register_autograd(const std::string& name, pybind11::object kernel) {
  static auto* library =  // kept: destroying it takes the kernels back
      new torch::Library(torch::Library::IMPL, "fastdiff", std::nullopt, __FILE__, __LINE__);
  auto functor = std::make_unique<AutogradKernel>(std::move(kernel));
  library->impl(name.c_str(),
                torch::dispatch(c10::DispatchKey::Autograd,
                                torch::CppFunction::makeFromBoxedFunctor(std::move(functor))));
}

}  // namespace
}  // namespace fastdiff

PYBIND11_MODULE(_dispatch, m) {
  m.doc() = "What is between callers of ops and their kernels.";
  m.def("register_autograd", &fastdiff::register_autograd,
        "Register a kernel at the Autograd key, in Python, for the calls that autograd records.");
  const auto define = [&m](const char* name, auto* call) {
    m.def(name, torch::wrap_pybind_function_no_gil(std::move(call)));
  };
  define("group_norm_silu", &fastdiff::GroupNormSilu<>::call);
  define("group_norm_silu_dropout", &fastdiff::GroupNormSiluDropout::call);
  define("residual_group_norm_silu", &fastdiff::ResidualGroupNormSilu::call);
  define("q_sample", &fastdiff::QSample::call);
  define("eps_loss", &fastdiff::EpsLoss::call);
  define("vlb_terms", &fastdiff::VlbTerms::rows);
  define("ddim_step", &fastdiff::SamplerStep<"fastdiff::ddim_step">::call);
  define("ddpm_step", &fastdiff::SamplerStep<"fastdiff::ddpm_step">::call);
}
