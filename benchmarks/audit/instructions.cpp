// Calls every CPU kernel once on a small shape, for instruction counts under callgrind
// (benchmarks/audit/instructions.py): without Python and torch, whose start would take a minute
// there.
//
//     instructions NAME...   prints the instruction set that the kernels are chosen for, and runs
//                            these cases; without a name it prints them all
//     --again                runs every kernel twice: the plant that the gate must catch

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/parallel.h"
#include "../../csrc/cpu/simd.h"

namespace fastdiff {
namespace cpu {

// One thread: what the kernels would ask of torch.
int64_t num_threads() { return 1; }
void parallel_ranges(int64_t begin, int64_t end, int64_t, RangeFunction function, void* context) {
  function(begin, end, context);
}

}  // namespace cpu

namespace {

constexpr int64_t kTimesteps = 10;

// Memory on a cache line, filled with numbers in (-1, 1) that are the same every time.
class Buffer {
 public:
  Buffer(int64_t count, DType type) {
    const size_t bytes = (count * size_of(type) + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, bytes);
    std::memset(data_, 0, bytes);
    uint32_t state = 1;
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      const float value = static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (type == DType::kFloat32) static_cast<float*>(data_)[i] = value;
      if (type == DType::kBFloat16) static_cast<uint16_t*>(data_)[i] = bits >> 16;
      if (type == DType::kUInt8) static_cast<uint8_t*>(data_)[i] = state >> 24;
    }
  }
  Buffer(const Buffer&) = delete;
  void* get() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  void* data_;  // kept until the process ends
};

void* tensor(int64_t count, DType type) { return (new Buffer(count, type))->get(); }
float* floats(int64_t count) { return static_cast<float*>(tensor(count, DType::kFloat32)); }

int64_t* timesteps(int64_t batch) {
  auto* t = new int64_t[batch];
  for (int64_t k = 0; k < batch; ++k) t[k] = k % kTimesteps;
  return t;
}

// A table whose coefficients are all moderate: the kernels' work does not depend on their values.
float* table() {
  float* values = floats(kTimesteps * kStepColumns);
  for (int64_t i = 0; i < kTimesteps * kStepColumns; ++i) values[i] = 0.5f + 0.25f * values[i];
  return values;
}

struct Images {
  const char* name;
  DType type;
  bool channels_last;
  int64_t batch = 4, channels = 3, side = 32;

  int64_t numel() const { return batch * channels * side * side; }
  SampleLayout layout() const {
    return {batch, channels * side * side, channels_last ? channels : 1, side};
  }
  void* make(int64_t heads = 1) const { return tensor(heads * numel(), type); }
};

using Case = std::pair<std::string, std::function<void()>>;

void add_images(const Images& x, std::vector<Case>& cases) {
  const auto add = [&](const char* op, std::function<void()> run) {
    cases.emplace_back(std::string(op) + " " + x.name, std::move(run));
  };
  for (const NoiseMode mode : {NoiseMode::kGiven, NoiseMode::kGenerated}) {
    const bool given = mode == NoiseMode::kGiven;
    QSampleArgs q{};
    q.out = x.make(), q.x0 = x.make(), q.noise = given ? x.make() : nullptr;
    q.t = timesteps(x.batch), q.num_timesteps = kTimesteps;
    q.sqrt_alpha_bar = q.sqrt_one_minus_alpha_bar = floats(kTimesteps);
    q.layout = x.layout(), q.mode = mode;
    q.out_type = q.x0_type = q.noise_type = x.type;
    add(given ? "q_sample given" : "q_sample seed", [q] { cpu::q_sample(q); });

    EpsLossArgs e{};
    e.out = floats(1), e.grad = floats(1), e.prediction = x.make();
    e.noise = given ? x.make() : nullptr;
    e.layout = x.layout(), e.mode = mode, e.reduction = Reduction::kMean;
    e.prediction_type = e.noise_type = x.type;
    add(given ? "eps_loss given" : "eps_loss seed", [e] { cpu::eps_loss(e); });
    if (given) {
      e.grad_prediction = x.make();
      add("eps_loss_backward given", [e] { cpu::eps_loss_backward(e); });
    }
  }

  SamplerStepArgs s{};
  s.x_s = x.make(), s.x_t = x.make(), s.model_output = x.make(), s.uncond = x.make();
  s.step = timesteps(x.batch), s.table = table(), s.num_rows = kTimesteps;
  s.guidance_scale = 3.0, s.layout = x.layout(), s.mode = NoiseMode::kNone;
  s.prediction = Prediction::kEps, s.eps = EpsSource::kX0, s.clip = 1;
  s.x_type = s.output_type = x.type;
  add("ddim_step guided", [s] { cpu::sampler_step(s); });

  VlbTermsArgs v{};
  v.out = floats(3 * x.batch), v.grad = floats(3 * x.batch), v.grad_output = x.make(2);
  v.x0 = x.make(), v.x_t = x.make(), v.model_output = x.make(2), v.noise = x.make();
  v.t = timesteps(x.batch), v.table = s.table, v.num_rows = kTimesteps;
  v.layout = x.layout(), v.mode = NoiseMode::kGiven, v.prediction = Prediction::kEps;
  v.learned = 1, v.noise_type = v.output_type = x.type;
  add("vlb_terms learned", [v] { cpu::vlb_terms(v); });
  add("vlb_terms_backward learned", [v] { cpu::vlb_terms_backward(v); });
}

void add_group_norm(const Images& x, std::vector<Case>& cases) {
  constexpr int64_t kGroups = 8;
  const auto vector = [&] { return ChannelVector{floats(x.channels), 0, DType::kFloat32}; };
  GroupNormSiluArgs f{};
  f.y = x.make(), f.x = x.make();
  f.mean = floats(x.batch * kGroups), f.rstd = floats(x.batch * kGroups);
  f.weight = vector(), f.bias = vector();
  f.layout = {x.batch, x.channels, kGroups, x.side * x.side, x.channels_last};
  f.eps = 1e-5, f.activation = Activation::kSilu, f.x_type = x.type;
  cases.emplace_back(std::string("group_norm_silu ") + x.name, [f] { cpu::group_norm_silu(f); });

  GroupNormSiluBackwardArgs b{};
  b.grad_x = x.make(), b.grad = x.make(), b.x = f.x;
  b.mean = f.mean, b.rstd = f.rstd;  // any finite values take as many instructions
  b.grad_weight = {floats(x.channels), DType::kFloat32};
  b.grad_bias = {floats(x.channels), DType::kFloat32};
  b.weight = f.weight, b.bias = f.bias;
  b.layout = f.layout, b.activation = f.activation, b.x_type = x.type;
  cases.emplace_back(std::string("group_norm_silu_backward ") + x.name,
                     [b] { cpu::group_norm_silu_backward(b); });
}

void add_winograd(bool upsample, std::vector<Case>& cases) {
  WinogradConvArgs w{};
  w.batch = 2, w.height = w.width = 16, w.channels = 64, w.out_channels = 48;
  w.upsample = upsample;
  const int64_t pixels = w.batch * w.height * w.width;
  w.y = floats(pixels * w.out_channels), w.residual = floats(pixels * w.out_channels);
  w.x = floats(pixels * w.channels), w.bias = floats(w.out_channels);
  w.weight = floats(winograd_points(upsample) * w.channels * w.out_channels);
  cases.emplace_back(upsample ? "winograd_conv upsample" : "winograd_conv",
                     [w] { cpu::winograd_conv(w); });
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const DType type : {DType::kFloat32, DType::kBFloat16}) {
    const bool narrow = type == DType::kBFloat16;
    add_images({narrow ? "bf16 nchw" : "fp32 nchw", type, false}, cases);
    add_images({narrow ? "bf16 channels_last" : "fp32 channels_last", type, true}, cases);
    add_group_norm({narrow ? "bf16 nchw" : "fp32 nchw", type, false, 2, 64, 16}, cases);
    add_group_norm({narrow ? "bf16 channels_last" : "fp32 channels_last", type, true, 2, 64, 16},
                   cases);
  }
  for (const bool upsample : {false, true}) add_winograd(upsample, cases);
  return cases;
}

}  // namespace
}  // namespace fastdiff

// The function whose instructions callgrind counts, and after which it writes them down.
extern "C" __attribute__((noinline)) void measured(const std::function<void()>& run, bool again) {
  run();
  if (again) run();
}

int main(int argc, char** argv) {
  const auto cases = fastdiff::all_cases();
  std::printf("%s\n", fastdiff::cpu::simd_level());
  if (argc == 1) {
    for (const auto& [name, run] : cases) std::printf("%s\n", name.c_str());
    return 0;
  }
  bool again = false;
  for (int i = 1; i < argc; ++i) again = again || std::strcmp(argv[i], "--again") == 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& [name, run] : cases) {
      if (name != argv[i]) continue;
      run();  // what is done once only: tables, choice of the instruction set
      measured(run, again);
    }
  }
  return 0;
}
