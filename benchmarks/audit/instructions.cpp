// Calls every CPU kernel once on a small shape, without Python and torch: for instruction counts
// under callgrind (benchmarks/audit/instructions.py), where their start would take a minute, and
// for results on machines that are emulated (tests/aarch64.py).
//
//     instructions NAME...   prints the instruction set that the kernels are chosen for, and runs
//                            these cases; without a name it prints them all
//     --again                runs every kernel twice: the plant that the gate must catch
//     --results FILE         runs all cases and writes what they compute: per case a line with the
//                            name, then per output its dtype and size and its values as text

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

// Memory on a cache line, filled with numbers in (-1, 1): other ones in each buffer, and the same
// in every run.
class Buffer {
 public:
  Buffer(int64_t count, DType type) {
    const size_t bytes = (count * size_of(type) + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, bytes);
    std::memset(data_, 0, bytes);
    static uint32_t buffers = 0;
    uint32_t state = ++buffers;
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

struct Output {
  const void* data;
  int64_t count;
  DType type;
};

struct Case {
  std::string name;
  std::function<void()> run;
  std::vector<Output> outputs;
};

void add_images(const Images& x, std::vector<Case>& cases) {
  const auto add = [&](const char* op, std::function<void()> run, Output output) {
    cases.push_back({std::string(op) + " " + x.name, std::move(run), {output}});
  };
  const auto images = [&](const void* data, int64_t heads = 1) {
    return Output{data, heads * x.numel(), x.type};
  };
  for (const NoiseMode mode : {NoiseMode::kGiven, NoiseMode::kGenerated}) {
    const bool given = mode == NoiseMode::kGiven;
    QSampleArgs q{};
    q.out = x.make(), q.x0 = x.make(), q.noise = given ? x.make() : nullptr;
    q.t = timesteps(x.batch), q.num_timesteps = kTimesteps;
    q.sqrt_alpha_bar = q.sqrt_one_minus_alpha_bar = floats(kTimesteps);
    q.layout = x.layout(), q.mode = mode;
    q.out_type = q.x0_type = q.noise_type = x.type;
    add(given ? "q_sample given" : "q_sample seed", [q] { cpu::q_sample(q); }, images(q.out));

    EpsLossArgs e{};
    e.out = floats(1), e.grad = floats(1), e.prediction = x.make();
    e.noise = given ? x.make() : nullptr;
    e.layout = x.layout(), e.mode = mode, e.reduction = Reduction::kMean;
    e.prediction_type = e.noise_type = x.type;
    add(given ? "eps_loss given" : "eps_loss seed", [e] { cpu::eps_loss(e); },
        {e.out, 1, DType::kFloat32});
    if (given) {
      e.grad_prediction = x.make();
      add("eps_loss_backward given", [e] { cpu::eps_loss_backward(e); }, images(e.grad_prediction));
    }
  }

  SamplerStepArgs s{};
  s.x_s = x.make(), s.x_t = x.make(), s.model_output = x.make(), s.uncond = x.make();
  s.step = timesteps(x.batch), s.table = table(), s.num_rows = kTimesteps;
  s.guidance_scale = 3.0, s.layout = x.layout(), s.mode = NoiseMode::kNone;
  s.prediction = Prediction::kEps, s.eps = EpsSource::kX0, s.clip = 1;
  s.x_type = s.output_type = x.type;
  add("ddim_step guided", [s] { cpu::sampler_step(s); }, images(s.x_s));

  VlbTermsArgs v{};
  v.out = floats(3 * x.batch), v.grad = floats(3 * x.batch), v.grad_output = x.make(2);
  v.x0 = x.make(), v.x_t = x.make(), v.model_output = x.make(2), v.noise = x.make();
  v.t = timesteps(x.batch), v.table = s.table, v.num_rows = kTimesteps;
  v.layout = x.layout(), v.mode = NoiseMode::kGiven, v.prediction = Prediction::kEps;
  v.learned = 1, v.noise_type = v.output_type = x.type;
  add("vlb_terms learned", [v] { cpu::vlb_terms(v); }, {v.out, 3 * x.batch, DType::kFloat32});
  add("vlb_terms_backward learned", [v] { cpu::vlb_terms_backward(v); }, images(v.grad_output, 2));
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
  const int64_t groups = x.batch * kGroups;
  cases.push_back({std::string("group_norm_silu ") + x.name,
                   [f] { cpu::group_norm_silu(f); },
                   {{f.y, x.numel(), x.type},
                    {f.mean, groups, DType::kFloat32},
                    {f.rstd, groups, DType::kFloat32}}});

  GroupNormSiluBackwardArgs b{};
  b.grad_x = x.make(), b.grad = x.make(), b.x = f.x;
  b.mean = f.mean, b.rstd = f.rstd;  // any finite values take as many instructions
  b.grad_weight = {floats(x.channels), DType::kFloat32};
  b.grad_bias = {floats(x.channels), DType::kFloat32};
  b.weight = f.weight, b.bias = f.bias;
  b.layout = f.layout, b.activation = f.activation, b.x_type = x.type;
  cases.push_back({std::string("group_norm_silu_backward ") + x.name,
                   [b] { cpu::group_norm_silu_backward(b); },
                   {{b.grad_x, x.numel(), x.type},
                    {b.grad_weight.data, x.channels, DType::kFloat32},
                    {b.grad_bias.data, x.channels, DType::kFloat32}}});
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

void write_results(const std::vector<Case>& cases, const char* path) {
  std::FILE* file = std::fopen(path, "w");
  if (!file) std::exit((std::perror(path), 1));
  for (const Case& c : cases) {
    c.run();
    std::fprintf(file, "%s\n", c.name.c_str());
    for (const Output& output : c.outputs) {
      const bool bf16 = output.type == DType::kBFloat16;
      std::fprintf(file, "  %s %lld", bf16 ? "bf16" : "fp32", static_cast<long long>(output.count));
      for (int64_t i = 0; i < output.count; ++i) {
        float value = 0;
        if (bf16) {
          const uint32_t bits = static_cast<const uint16_t*>(output.data)[i] << 16;
          std::memcpy(&value, &bits, 4);
        } else {
          value = static_cast<const float*>(output.data)[i];
        }
        std::fprintf(file, " %.9g", static_cast<double>(value));
      }
      std::fprintf(file, "\n");
    }
  }
  if (std::fclose(file)) std::exit((std::perror(path), 1));
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
    for (const auto& c : cases) std::printf("%s\n", c.name.c_str());
    return 0;
  }
  if (argc == 3 && std::strcmp(argv[1], "--results") == 0) {
    fastdiff::write_results(cases, argv[2]);
    return 0;
  }
  bool again = false;
  for (int i = 1; i < argc; ++i) again = again || std::strcmp(argv[i], "--again") == 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& c : cases) {
      if (c.name != argv[i]) continue;
      c.run();  // what is done once only: tables, choice of the instruction set
      measured(c.run, again);
    }
  }
  return 0;
}
