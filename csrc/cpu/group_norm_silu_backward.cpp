#include <memory>
#include <vector>

#include "bfloat16.h"
#include "float16.h"
#include "group_norm_silu.h"
#include "kernels.h"

namespace fastdiff::cpu {
namespace {

// A group, or channels_last sample, up to this size keeps dz for its second pass in the caches,
// rather than computing the activation's slope twice and reading grad again.
constexpr int64_t kKeptElements = int64_t{1} << 20;

template <typename F>
void store(const ChannelGradient& gradient, int64_t index, F value) {
  switch (gradient.type) {
    case DType::kBFloat16:
      static_cast<uint16_t*>(gradient.data)[index] =
          static_cast<uint16_t>(round_to_bfloat16(static_cast<float>(value)) >> 16);
      return;
    case DType::kFloat16:
      static_cast<uint16_t*>(gradient.data)[index] = round_to_float16(static_cast<float>(value));
      return;
    case DType::kFloat64:
      static_cast<double*>(gradient.data)[index] = static_cast<double>(value);
      return;
    default:
      static_cast<float*>(gradient.data)[index] = static_cast<float>(value);
  }
}

// Gradients per channel of one group; null for those not asked for.
struct GradientRows {
  double *weight, *bias, *channel_bias, *scale, *shift;
};

// From the sums s0, s1, s2 over the pixels of the channels of some groups: the coefficients of the
// second pass, and all gradients but that of x.
template <typename F>
FASTDIFF_HD void finish_loop(const Operands<F>& operands, int64_t groups, int64_t depth,
                             const F* rstds, double pixels, const double* s0, const double* s1,
                             const double* s2, F* a, F* b, F* c, const GradientRows& rows) {
  const F *weight = operands.weight, *bias = operands.bias, *scale = operands.scale;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * depth, last = first + depth;
    const double rstd = rstds[g];
    double m0 = 0, m1 = 0;
    for (int64_t i = first; i < last; ++i) {
      const double gamma = weight[i] * (F(1) + scale[i]);
      m0 += gamma * s0[i];
      m1 += gamma * s1[i];
    }
    const double numel = static_cast<double>(depth) * pixels;
    m0 /= numel;
    m1 *= rstd / numel;
#pragma omp simd
    for (int64_t i = first; i < last; ++i) {
      const double gamma = weight[i] * (F(1) + scale[i]);
      a[i] = static_cast<F>(rstd * gamma);
      b[i] = static_cast<F>(-rstd * rstd * m1);
      c[i] = static_cast<F>(-rstd * m0);
    }
    const auto fill = [=](double* row, const auto& gradient) FASTDIFF_LAMBDA {
      if (!row) return;
#pragma omp simd
      for (int64_t i = first; i < last; ++i) row[i] = gradient(i);
    };
    fill(rows.weight, [=](int64_t i) { return (F(1) + scale[i]) * (rstd * s1[i]); });
    fill(rows.bias, [=](int64_t i) { return (F(1) + scale[i]) * s0[i]; });
    fill(rows.channel_bias, [=](int64_t i) {
      const double gamma = weight[i] * (F(1) + scale[i]);
      return rstd * (gamma * s0[i] - pixels * m0 - rstd * s2[i] * m1);
    });
    fill(rows.scale, [=](int64_t i) { return weight[i] * (rstd * s1[i]) + bias[i] * s0[i]; });
    fill(rows.shift, [=](int64_t i) { return s0[i]; });
  }
}

// Two passes over x and grad: the sums s0, s1, s2 of group_norm_silu.h per channel, of d = h - mean
// in place of h_hat = d rstd; then grad_x = a dz + b d + c.
template <typename F>
class Backward {
 public:
  explicit Backward(const GroupNormSiluBackwardArgs& args)
      : args_(args),
        layout_(args.layout),
        size_(size_of(args.x_type)),
        stream_(is_streamed(layout_, 3 * size_)),
        kernels_(group_norm_kernels<F>(args.x_type, args.activation)) {
    const int64_t count = layout_.batch * layout_.channels;
    for (const ChannelGradient* gradient :
         {&args.grad_weight, &args.grad_bias, &args.grad_channel_bias, &args.grad_scale,
          &args.grad_shift, &args.grad_sum_bias}) {
      rows_.push_back(std::make_unique_for_overwrite<double[]>(gradient->data ? count : 0));
    }
  }

  void run() {
    layout_.channels_last ? run_pixels() : run_rows();
    sum_over_batch(args_.grad_weight, rows_[0].get());
    sum_over_batch(args_.grad_bias, rows_[1].get());
    store_rows(args_.grad_channel_bias, rows_[2].get());
    store_rows(args_.grad_scale, rows_[3].get());
    store_rows(args_.grad_shift, rows_[4].get());
    sum_over_batch(args_.grad_sum_bias, rows_[5].get());
  }

 private:
  // Coefficients per channel, in memory of kCount values per channel.
  struct Coefficients {
    static constexpr int64_t kCount = 6 + Operands<F>::kCount;
    F *k, *slope, *offset, *a, *b, *c;
    Operands<F> operands;

    Coefficients(const GroupNormSiluBackwardArgs& args, int64_t sample, int64_t first, int64_t n,
                 F* memory)
        : k(memory),
          slope(memory + n),
          offset(memory + 2 * n),
          a(memory + 3 * n),
          b(memory + 4 * n),
          c(memory + 5 * n),
          operands(args, sample, first, n, memory + 6 * n) {}
  };

  const char* x_of(int64_t i) const { return static_cast<const char*>(args_.x) + i * size_; }
  const char* grad_of(int64_t i) const { return static_cast<const char*>(args_.grad) + i * size_; }
  char* out_of(int64_t i) const { return static_cast<char*>(args_.grad_x) + i * size_; }
  const F* means(int64_t unit) const { return static_cast<const F*>(args_.mean) + unit; }
  const F* rstds(int64_t unit) const { return static_cast<const F*>(args_.rstd) + unit; }

  // What the first pass needs for the channels of some groups.
  void prepare(int64_t unit, int64_t groups, const Coefficients& to) const {
    const int64_t depth = layout_.group_channels();
    const F* bases = means(unit);
    if (args_.channel_bias.data) {
      for (int64_t g = 0; g < groups; ++g) {
        // In the place of what only the second pass needs.
        to.a[g] = base_of(bases[g], to.operands.channel_bias[g * depth], first_of(unit + g));
      }
      bases = to.a;
    }
    clones<affines_loop<F>>(to.operands, groups, depth, bases, rstds(unit), to.k, to.slope,
                            to.offset);
  }

  // The first element of a group.
  F first_of(int64_t unit) const {
    const int64_t sample = unit / layout_.groups, group = unit % layout_.groups;
    const int64_t stride = layout_.channels_last ? 1 : layout_.pixels;
    const int64_t i =
        sample * layout_.channels * layout_.pixels + group * layout_.group_channels() * stride;
    if constexpr (sizeof(F) == 8) {
      return static_cast<const double*>(args_.x)[i];
    } else {
      float value;
      return *load_tile(args_.x_type, args_.x, i, 1, &value);
    }
  }

  // sums: s0, then s1, then s2 of the groups' channels.
  void finish(int64_t unit, int64_t groups, const double* sums, const Coefficients& to) {
    const int64_t depth = layout_.group_channels(), channels = groups * depth;
    const auto row = [&](int which, const ChannelGradient& gradient) {
      return gradient.data ? rows_[which].get() + unit * depth : nullptr;
    };
    const GradientRows rows{row(0, args_.grad_weight), row(1, args_.grad_bias),
                            row(2, args_.grad_channel_bias), row(3, args_.grad_scale),
                            row(4, args_.grad_shift)};
    clones<finish_loop<F>>(to.operands, groups, depth, rstds(unit),
                           static_cast<double>(layout_.pixels), sums, sums + channels,
                           sums + 2 * channels, to.a, to.b, to.c, rows);
  }

  void store_rows(const ChannelGradient& gradient, const double* rows) const {
    if (!gradient.data) return;
    for (int64_t i = 0; i < layout_.batch * layout_.channels; ++i) store(gradient, i, rows[i]);
  }

  void sum_over_batch(const ChannelGradient& gradient, double* rows) const {
    if (!gradient.data) return;
    const int64_t channels = layout_.channels;
    for (int64_t k = 1; k < layout_.batch; ++k) {
      for (int64_t c = 0; c < channels; ++c) rows[c] += rows[k * channels + c];
    }
    for (int64_t c = 0; c < channels; ++c) store(gradient, c, rows[c]);
  }

  // Groups are runs of rows, one per channel.
  void run_rows() {
    const int64_t depth = layout_.group_channels(), numel = layout_.group_numel();
    const int64_t units = layout_.batch * layout_.groups;
    const Pieces pieces(layout_.pixels, kPiece);
    const int64_t count = depth * pieces.per_run, per_channel = Coefficients::kCount * depth;
    if (one_thread_each(units, numel)) {
      const bool keep = numel <= kKeptElements && args_.grad_x;
      const int64_t block = groups_per_block(layout_);
      parallel_items(units, numel, [&](int64_t begin, int64_t end) {
        F* memory = thread_scratch<F>(block * (per_channel + 3 * count + (keep ? numel : 0)));
        F* sums = memory + per_channel * block;
        F* kept = keep ? sums + 3 * count * block : nullptr;
        std::vector<double> totals(3 * depth * block);
        DropoutBits bits(args_.dropout, layout_);
        Gains<F> gains(bits, kernels_.evens_first);
        for_each_block(layout_, begin, end, [&](int64_t unit, int64_t groups) {
          const int64_t channels = depth * groups, all = count * groups;
          if (bits.any()) make_bits(bits, unit, groups, false);
          const Coefficients coefficients = group_coefficients(unit, groups, memory);
          prepare(unit, groups, coefficients);
          sum_pieces(unit, pieces, 0, all, coefficients, gains, kept, sums, all);
          add_pieces(pieces, sums, channels, totals.data());
          finish(unit, groups, totals.data(), coefficients);
          if (!args_.grad_x) return;
          F* of_sum_bias = adds() ? sums : nullptr;  // in the place of what is used up
          write_pieces(unit, pieces, 0, all, coefficients, gains, kept, of_sum_bias);
          finish_sum_bias(unit, channels, pieces, of_sum_bias);
        });
      });
      return;
    }
    std::vector<F> memory(per_channel), sums(3 * count);
    std::vector<double> totals(3 * depth);
    DropoutBits bits(args_.dropout, layout_);
    for (int64_t unit = 0; unit < units; ++unit) {
      if (bits.any()) make_bits(bits, unit, 1, true);
      const Coefficients coefficients = group_coefficients(unit, 1, memory.data());
      prepare(unit, 1, coefficients);
      parallel_items(count, pieces.length, [&](int64_t begin, int64_t end) {
        Gains<F> gains(bits, kernels_.evens_first);
        sum_pieces(unit, pieces, begin, end, coefficients, gains, nullptr, sums.data() + begin,
                   count);
      });
      add_pieces(pieces, sums.data(), depth, totals.data());
      finish(unit, 1, totals.data(), coefficients);
      if (!args_.grad_x) continue;
      parallel_items(count, pieces.length, [&](int64_t begin, int64_t end) {
        Gains<F> gains(bits, kernels_.evens_first);
        write_pieces(unit, pieces, begin, end, coefficients, gains, nullptr,
                     adds() ? sums.data() + begin : nullptr);
      });
      finish_sum_bias(unit, depth, pieces, adds() ? sums.data() : nullptr);
    }
  }

  int64_t first_channel(int64_t unit) const {
    return unit % layout_.groups * layout_.group_channels();
  }

  Coefficients group_coefficients(int64_t unit, int64_t groups, F* memory) const {
    return {args_, unit / layout_.groups, first_channel(unit), layout_.group_channels() * groups,
            memory};
  }

  // The mask of some groups.
  void make_bits(DropoutBits& bits, int64_t unit, int64_t groups, bool shared) const {
    bits.make(unit / layout_.groups, first_channel(unit), groups * layout_.group_channels(),
              shared);
  }

  // Whether x is the sum of a residual connection.
  bool adds() const { return args_.grad_sum || args_.grad_sum_bias.data; }

  const char* grad_sum_of(int64_t i) const {
    return args_.grad_sum ? static_cast<const char*>(args_.grad_sum) + i * size_ : nullptr;
  }

  // From sums of grad_x per piece to what some groups of a sample add to the gradient of sum_bias.
  void finish_sum_bias(int64_t unit, int64_t channels, const Pieces& pieces, const F* sums) {
    if (!args_.grad_sum_bias.data) return;
    double* to = rows_[5].get() + unit * layout_.group_channels();
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = 0;
      for (int64_t piece = 0; piece < pieces.per_run; ++piece) {
        to[c] += sums[c * pieces.per_run + piece];
      }
    }
  }

  // Calls body(first element within the group, row, rows, elements per row, piece) for the pieces
  // [begin, end): whole rows at once if they are one piece each.
  template <typename Body>
  static void for_each_run(const Pieces& pieces, int64_t begin, int64_t end, const Body& body) {
    if (pieces.per_run == 1) {
      body(begin * pieces.run, begin, end - begin, pieces.run, begin);
      return;
    }
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / pieces.per_run;
      body(row * pieces.run + pieces.begin(piece), row, int64_t{1}, pieces.size(piece), piece);
    }
  }

  void sum_pieces(int64_t unit, const Pieces& pieces, int64_t begin, int64_t end,
                  const Coefficients& from, Gains<F>& gains, F* kept, F* sums,
                  int64_t stride) const {
    const int64_t base = unit * layout_.group_numel();
    for_each_run(pieces, begin, end,
                 [&](int64_t first, int64_t row, int64_t rows, int64_t n, int64_t piece) {
                   gains.for_parts(first_channel(unit) + row, rows, first - row * pieces.run, n,
                                   [&](int64_t part, int64_t count, const F* gain) {
                                     const int64_t i = first + part * n, c = row + part;
                                     F* to = sums + (piece - begin + part);
                                     kernels_.row_grad_sums(
                                         x_of(base + i), grad_of(base + i), count, n, from.k + c,
                                         from.slope + c, from.offset + c, gain,
                                         kept ? kept + i : nullptr, to, to + stride,
                                         sums_per_channel() == 3 ? to + 2 * stride : nullptr);
                                   });
                 });
  }

  // Only the gradient of channel_bias takes s2.
  int64_t sums_per_channel() const { return args_.grad_channel_bias.data ? 3 : 2; }

  // From sums per piece to totals per channel.
  void add_pieces(const Pieces& pieces, const F* sums, int64_t channels, double* totals) const {
    if (pieces.per_run == 1) {
      std::copy(sums, sums + sums_per_channel() * channels, totals);
      return;
    }
    for (int64_t i = 0; i < sums_per_channel() * channels; ++i) {
      const F* of_row = sums + i * pieces.per_run;
      totals[i] = 0;
      for (int64_t piece = 0; piece < pieces.per_run; ++piece) totals[i] += of_row[piece];
    }
  }

  // `totals`: for the sums of grad_x per piece, if it is not null.
  void write_pieces(int64_t unit, const Pieces& pieces, int64_t begin, int64_t end,
                    const Coefficients& from, Gains<F>& gains, const F* kept, F* totals) const {
    const int64_t base = unit * layout_.group_numel();
    const auto write = [&](int64_t first, int64_t row, int64_t rows, int64_t n, int64_t piece,
                           const F* gain, char* out, bool stream) {
      kernels_.row_grad_x(x_of(base + first), grad_of(base + first), kept ? kept + first : nullptr,
                          out, rows, n, from.k + row, from.slope + row, from.offset + row, gain,
                          from.a + row, from.b + row, from.c + row, grad_sum_of(base + first),
                          totals ? totals + (piece - begin) : nullptr, stream);
    };
    for_each_run(pieces, begin, end,
                 [&](int64_t first, int64_t row, int64_t rows, int64_t n, int64_t piece) {
                   write_parts(
                       out_of(base + first), rows, n, size_, stream_, kernels_.streams,
                       [&](char* out, int64_t part, int64_t parts, bool stream) {
                         const int64_t at = first + part * n, c = row + part;
                         if (kept) {
                           return write(at, c, parts, n, piece + part, nullptr, out, stream);
                         }
                         gains.for_parts(first_channel(unit) + c, parts, first - row * pieces.run,
                                         n, [&](int64_t i, int64_t count, const F* gain) {
                                           write(at + i * n, c + i, count, n, piece + part + i,
                                                 gain, out + i * n * size_, stream);
                                         });
                       });
                 });
    finish_streaming();
  }

  // Channels_last: pieces are runs of pixels, with sums per channel.
  void run_pixels() {
    const int64_t channels = layout_.channels, numel = channels * layout_.pixels;
    const Pieces pieces(layout_.pixels, piece_pixels(channels));
    const int64_t count = pieces.per_run, per_channel = Coefficients::kCount * channels;
    if (one_thread_each(layout_.batch, numel)) {
      const bool keep = numel <= kKeptElements && args_.grad_x;
      parallel_items(layout_.batch, numel, [&](int64_t begin, int64_t end) {
        F* memory = thread_scratch<F>(per_channel + 3 * channels * count + (keep ? numel : 0));
        F* sums = memory + per_channel;
        F* kept = keep ? sums + 3 * channels * count : nullptr;
        DropoutBits bits(args_.dropout, layout_);
        for (int64_t sample = begin; sample < end; ++sample) {
          if (bits.any()) bits.make(sample, 0, layout_.pixels, false);
          const Coefficients coefficients(args_, sample, 0, channels, memory);
          prepare(sample * layout_.groups, layout_.groups, coefficients);
          sum_pixels(sample, pieces, 0, count, coefficients, bits, kept, sums);
          finish_sample(sample, count, sums, coefficients);
          if (!args_.grad_x) continue;
          write_pixels(sample, pieces, 0, count, coefficients, bits, kept, sums);
          finish_sum_bias_of_pixels(sample, count, sums);
        }
      });
      return;
    }
    std::vector<F> memory(per_channel), sums(3 * channels * count);
    const int64_t elements = pieces.length * channels;
    // The caller's memory: the threads that share a sample use none of their own.
    F* kept = numel <= kKeptElements && args_.grad_x ? thread_scratch<F>(numel) : nullptr;
    DropoutBits bits(args_.dropout, layout_);
    for (int64_t sample = 0; sample < layout_.batch; ++sample) {
      if (bits.any()) bits.make(sample, 0, layout_.pixels, true);
      const Coefficients coefficients(args_, sample, 0, channels, memory.data());
      prepare(sample * layout_.groups, layout_.groups, coefficients);
      parallel_items(count, elements, [&](int64_t begin, int64_t end) {
        sum_pixels(sample, pieces, begin, end, coefficients, bits, kept, sums.data());
      });
      finish_sample(sample, count, sums.data(), coefficients);
      if (!args_.grad_x) continue;
      parallel_items(count, elements, [&](int64_t begin, int64_t end) {
        write_pixels(sample, pieces, begin, end, coefficients, bits, kept, sums.data());
      });
      finish_sum_bias_of_pixels(sample, count, sums.data());
    }
  }

  void finish_sample(int64_t sample, int64_t count, const F* sums, const Coefficients& to) {
    const int64_t channels = layout_.channels;
    std::vector<double> totals(3 * channels);
    for (int64_t piece = 0; piece < count; ++piece) {
      const F* row = sums + 3 * channels * piece;
      for (int64_t i = 0; i < 3 * channels; ++i) totals[i] += row[i];
    }
    finish(sample * layout_.groups, layout_.groups, totals.data(), to);
  }

  void finish_sum_bias_of_pixels(int64_t sample, int64_t count, const F* sums) {
    if (!args_.grad_sum_bias.data) return;
    const int64_t channels = layout_.channels;
    double* to = rows_[5].get() + sample * channels;
    std::fill(to, to + channels, 0.0);
    for (int64_t piece = 0; piece < count; ++piece) {
      for (int64_t c = 0; c < channels; ++c) to[c] += sums[3 * channels * piece + c];
    }
  }

  void sum_pixels(int64_t sample, const Pieces& pieces, int64_t begin, int64_t end,
                  const Coefficients& from, const DropoutBits& bits, F* kept, F* sums) const {
    const int64_t channels = layout_.channels, base = sample * channels * layout_.pixels;
    Gains<F> gains(bits, false);
    std::vector<F> of_part(bits.any() ? 3 * channels : 0);
    for (int64_t piece = begin; piece < end; ++piece) {
      F* to = sums + 3 * channels * piece;
      const auto add = [&](int64_t part, int64_t count, const F* gain) {
        const int64_t i = (pieces.begin(piece) + part) * channels;
        F* found = part ? of_part.data() : to;
        kernels_.pixel_grad_sums(x_of(base + i), grad_of(base + i), count, channels, from.k,
                                 from.slope, from.offset, gain, kept ? kept + i : nullptr, found,
                                 found + channels, found + 2 * channels);
        for (int64_t k = 0; part && k < 3 * channels; ++k) to[k] += found[k];
      };
      gains.for_parts(pieces.begin(piece), pieces.size(piece), 0, channels, add);
    }
  }

  // Backwards: what the sums read last is still in the cache. The sums of grad_x per channel, if
  // they are asked for, take the place of those of the first pass.
  void write_pixels(int64_t sample, const Pieces& pieces, int64_t begin, int64_t end,
                    const Coefficients& from, const DropoutBits& bits, const F* kept,
                    F* sums) const {
    const int64_t channels = layout_.channels, base = sample * channels * layout_.pixels;
    Gains<F> gains(bits, false);
    std::vector<F> of_part(adds() ? channels : 0);
    for (int64_t piece = end - 1; piece >= begin; --piece) {
      const int64_t begin_pixel = pieces.begin(piece);
      F* total = sums + 3 * channels * piece;
      if (adds()) std::fill(total, total + channels, F(0));
      const auto write = [&](int64_t pixel, int64_t pixels, const F* gain, char* out, bool stream) {
        const int64_t i = (begin_pixel + pixel) * channels;
        kernels_.pixel_grad_x(x_of(base + i), grad_of(base + i), kept ? kept + i : nullptr, out,
                              pixels, channels, from.k, from.slope, from.offset, gain, from.a,
                              from.b, from.c, grad_sum_of(base + i),
                              adds() ? of_part.data() : nullptr, stream);
        for (size_t c = 0; c < of_part.size(); ++c) total[c] += of_part[c];
      };
      write_parts(out_of(base + begin_pixel * channels), pieces.size(piece), channels, size_,
                  stream_, kernels_.streams,
                  [&](char* out, int64_t pixel, int64_t pixels, bool stream) {
                    if (kept) return write(pixel, pixels, nullptr, out, stream);
                    gains.for_parts(begin_pixel + pixel, pixels, 0, channels,
                                    [&](int64_t part, int64_t count, const F* gain) {
                                      write(pixel + part, count, gain,
                                            out + part * channels * size_, stream);
                                    });
                  });
    }
    finish_streaming();
  }

  const GroupNormSiluBackwardArgs& args_;
  const GroupNormLayout& layout_;
  const int64_t size_;  // bytes of an element
  const bool stream_;
  const GroupNormKernels<F> kernels_;
  // (B, C) each: what the samples add to the gradients of weight and bias, and the other three.
  std::vector<std::unique_ptr<double[]>> rows_;
};

}  // namespace

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& args) {
  args.x_type == DType::kFloat64 ? Backward<double>(args).run() : Backward<float>(args).run();
}

}  // namespace fastdiff::cpu
