#pragma once

// The walks of group_norm_silu's backward kernels over items: the sums of gradients, and dx.

#include "fastdiff/group_norm_silu_dropout.cuh"
#include "fastdiff/group_norm_silu_sum_gradient.cuh"

namespace fastdiff {

// Of a group: base and rstd, and the bias of its first channel, which the base is relative to
// (fastdiff/group_norm_silu.h).
struct GroupStatistics {
  float base, rstd, first_added;
};

// The mean was rounded with the first channel's bias in it. Any value that rounds to it may be the
// base; where the group's first element does, it is the one that is exact in constant groups.
template <typename T>
__device__ __forceinline__ GroupStatistics load_statistics(const GroupNormSiluBackwardArgs& args,
                                                           int64_t sample, int group) {
  const GroupNormLayout& layout = args.layout;
  const int64_t i = sample * layout.groups + group;
  GroupStatistics s = {__ldg(static_cast<const float*>(args.mean) + i),
                       __ldg(static_cast<const float*>(args.rstd) + i), 0.0f};
  if (!args.channel_bias.data) return s;
  const int64_t channel = group * layout.group_channels();
  const int64_t element = sample * layout.channels * layout.pixels +
                          channel * (layout.channels_last ? 1 : layout.pixels);
  const float first = to_float(__ldg(static_cast<const T*>(args.x) + element));
  s.first_added = load_operand<T>(args.channel_bias, sample, channel, 0.0f);
  s.base = first + s.first_added == s.base ? first : s.base - s.first_added;
  return s;
}

// dz is needed twice, for the sums and for dx, and made from x and grad both times:
//   d = x - center,  z = slope d + offset,  dz = grad act'(z),  h_hat = rstd d,
//   dx = slope dz - rstd (m0 + h_hat m1) = slope dz + (linear d + constant).
// The sums are first of d in place of h_hat.
struct GradientTable : ChannelTable<5> {
  __device__ __forceinline__ void set(int c, const ChannelOperands& operands,
                                      const GroupStatistics& group) const {
    const auto& table = *this;
    table(c, kMinusCenter) = (operands.added - group.first_added) - group.base;
    table(c, kSlope) = group.rstd * operands.gamma;
    table(c, kOffset) = operands.beta;
    table(c, kRstd) = group.rstd;
    table(c, kGamma) = operands.gamma;
  }
  // m: (m0, m1)
  __device__ __forceinline__ void finish(int c, float2 m) const {
    const float rstd = (*this)(c, kRstd);
    (*this)(c, kLinear) = -(rstd * rstd * m.y);
    (*this)(c, kConstant) = -(rstd * m.x);
  }
};

// x - center and z of V channels, or of one.
template <typename T, bool ChannelsLast, int V>
struct Centered {
  using L = Lane<T, V>;
  using Float = typename L::Float;
  Float minus_center[L::kFloats], slope[L::kFloats], offset[L::kFloats];

  __device__ __forceinline__ Centered(const GradientTable& table, int c) {
    L::template coefficients<ChannelsLast>(table, c, kMinusCenter, minus_center);
    L::template coefficients<ChannelsLast>(table, c, kSlope, slope);
    L::template coefficients<ChannelsLast>(table, c, kOffset, offset);
  }
  __device__ __forceinline__ Float d(int j, Float x) const { return add(x, minus_center[j]); }
  __device__ __forceinline__ Float z(int j, Float d) const {
    return multiply_add(d, slope[j], offset[j]);
  }
};

// Zeroes what is dropped of a lane's vectors: in a loop of its own, as masks take many registers.
template <typename Vectors, typename Masks>
__device__ __forceinline__ void drop_on_chip(int count, Vectors vectors, Masks masks) {
#pragma unroll 1
  for (; count > 0; --count) {
    vectors.replace(0, masks.kept(0, vectors[0]));
    vectors.skip(1), masks.skip(1);
  }
}

// Sums of dz, dz d and d over the items, one per channel of an item, in `partials`; the
// coefficients of channel c are in place c - base. With dropout a gradient on chip loses the
// elements that are dropped for good.
template <typename T, bool ChannelsLast, int V, typename Source, typename Drop, typename Gate>
__device__ __forceinline__ void item_gradient_sums(Items<ChannelsLast, V>& items, const Source& x,
                                                   const Source& grad, const GradientTable& table,
                                                   int base, const Drop& dropout, Gate gate,
                                                   float* partials) {
  using L = Lane<T, V>;
  using Float = typename L::Float;
  constexpr int A = ChannelsLast ? V : 1, S = ChannelsLast ? L::kFloats : 1;
  items.template walk<Source::kSumsWalk>([&](const Item& item) {
    auto x_vectors = x.vectors(items, item), grad_vectors = grad.vectors(items, item);
    Float s0[S], s1[S], s2[S];
#pragma unroll
    for (int j = 0; j < S; ++j) s0[j] = s1[j] = s2[j] = broadcast<Float>(0.0f);
    auto masks = dropout.masks(items, item);
    if constexpr (Drop::kDrops && Source::kOnChip) drop_on_chip(item.count, grad_vectors, masks);
    in_steps<Source::kSumPairs>(item.count, [&](auto R) {
      Vector<T, V> xs[R], grads[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        xs[r] = x_vectors[r];
        grads[r] = grad_vectors[r];
        if constexpr (!Source::kOnChip) grads[r] = masks.kept(r, grads[r]);
      }
      const Centered<T, ChannelsLast, V> centered(table, item.channel - base);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int j = 0; j < L::kFloats; ++j) {
          const int a = j % S;
          const Float d = centered.d(j, L::widen(xs[r], j));
          const Float dz = gate.gradient(L::widen(grads[r], j), centered.z(j, d));
          s0[a] = add(s0[a], dz);
          s1[a] = multiply_add(dz, d, s1[a]);
          s2[a] = add(s2[a], d);
        }
      }
      x_vectors.skip(R), grad_vectors.skip(R), masks.skip(R);
    });
#pragma unroll
    for (int j = 0; j < S; ++j) s0[j] = dropout.scaled(s0[j]), s1[j] = dropout.scaled(s1[j]);
    float sums[GradientSums::kFloats][A];
    L::split(s0, sums[0]);
    L::split(s1, sums[1]);
    L::split(s2, sums[2]);
    const Share share = sum_lanes<ChannelsLast>(sums, items.tiling.lanes);
    if (!items.inside(item) || !share.own) return;
    float* to = partials + (items.place(item) + share.first) * GradientSums::kFloats;
#pragma unroll
    for (int a = 0; a < A; ++a) {
      if (a >= share.width) break;
#pragma unroll
      for (int k = 0; k < GradientSums::kFloats; ++k) {
        to[a * GradientSums::kFloats + k] = sums[k][a];
      }
    }
  });
}

// dx on the items, with what is added to it.
template <typename T, bool ChannelsLast, int V, typename Source, typename Drop, typename Added,
          typename Gate>
__device__ __forceinline__ void write_grad_x(T* grad_x, Items<ChannelsLast, V>& items,
                                             const Source& x, const Source& grad,
                                             const GradientTable& table, int base,
                                             const Drop& dropout, const Added& added, Gate gate) {
  using L = Lane<T, V>;
  using P = Lane<T, (V < 4 ? V : 4)>;
  using Float = typename L::Float;
  // Beside masks, or sums of eight channels, there are no registers for a second one.
  constexpr bool kCrowded =
      (Drop::kDrops && !Source::kOnChip) || (Added::kAdds && ChannelsLast && V > 4);
  constexpr int kVectors = kCrowded ? 1 : Source::kVectors;
  items.template walk<1>([&](const Item& item) {
    if (!Added::kAdds && item.count == 0) return;
    auto x_vectors = x.vectors(items, item), grad_vectors = grad.vectors(items, item);
    auto masks = dropout.masks(items, item);
    auto added_vectors = added.vectors(items, item);
    T* to = grad_x + items.offset(item);
    in_steps<kVectors>(item.count, [&](auto R) {
      Vector<T, V> xs[R], grads[R];
      added_vectors.load(R);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        xs[r] = x_vectors[r];
        grads[r] = grad_vectors[r];
        if constexpr (!Source::kOnChip) grads[r] = masks.kept(r, grads[r]);
      }
      Float values[R][L::kFloats];
      // Four channels after each other: coefficients of eight would not leave enough registers.
#pragma unroll
      for (int part = 0; part < L::kFloats; part += P::kFloats) {
        const int c = item.channel - base + (ChannelsLast ? part * V / L::kFloats : 0);
        const Centered<T, ChannelsLast, P::kElements> centered(table, c);
        Float linear[P::kFloats], constant[P::kFloats];
        P::template coefficients<ChannelsLast>(table, c, kLinear, linear);
        P::template coefficients<ChannelsLast>(table, c, kConstant, constant);
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int j = 0; j < P::kFloats; ++j) {
            const Float d = centered.d(j, L::widen(xs[r], part + j));
            const Float dz =
                dropout.scaled(gate.gradient(L::widen(grads[r], part + j), centered.z(j, d)));
            values[r][part + j] =
                multiply_add(centered.slope[j], dz, multiply_add(d, linear[j], constant[j]));
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        added_vectors.add_to(r, values[r]);
        L::store(to + r * items.tiling.step, L::narrow(values[r]));
      }
      x_vectors.skip(R), grad_vectors.skip(R), masks.skip(R);
      to += R * items.tiling.step;
    });
    added_vectors.finish();
  });
}

}  // namespace fastdiff
