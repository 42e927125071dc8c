// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/kokkos/rows.hpp"

// The kernels. A team has one row, one head and a slice of the state's value rows, which stays in its scratch memory for all
// tokens. A thread works on one value row at a time, its vector lanes are spread over the keys.
namespace gatedelta::kokkos {

/// Of products over the keys.
template <class Real>
struct Sum {
  Real part[parts] = {};

  KOKKOS_INLINE_FUNCTION Sum& operator+=(const Sum& other) {
    for (int i = 0; i < parts; ++i) part[i] += other.part[i];
    return *this;
  }
  template <int count = parts>
  KOKKOS_INLINE_FUNCTION Real total() {
    if constexpr (count == 1) return part[0];
    for (int i = 0; i < count / 2; ++i) part[i] += part[i + count / 2];
    return total<(count + 1) / 2>();
  }
};

/// g of a token.
KOKKOS_INLINE_FUNCTION double log_decay(const ForwardParams& p, std::int64_t batch, std::int64_t token, int h) {
  if (p.gate_form == GateForm::none) return 0;
  double x = load(p.gate, batch, token, h);
  if (p.gate_form == GateForm::log_decay) return x;
  if (p.dt_bias.defined()) x += static_cast<double>(load(p.dt_bias, h));
  const double scaled = p.softplus_beta * x;
  const double softplus = scaled > p.softplus_threshold ? x : ::log1p(::exp(scaled)) / p.softplus_beta;
  return -::exp(static_cast<double>(load(p.A_log, h))) * softplus;
}

KOKKOS_INLINE_FUNCTION double beta_of(const ForwardParams& p, std::int64_t batch, std::int64_t token, int h) {
  if (p.beta_form == BetaForm::one) return 1;
  const double x = load(p.beta, batch, token, h);
  if (p.beta_form == BetaForm::value) return x;
  return (p.beta_form == BetaForm::logits ? 1 : 2) / (1 + ::exp(-x));
}

class Forward {
 public:
  explicit Forward(const ForwardParams& params) : p(params) {}

  /// Teams of a launch. Where teams resolve rows, those behind the last row zero the tokens that belong to no sequence.
  int teams() const {
    const std::int64_t rows = p.rows + (p.resolved == nullptr && p.cu_seqlens.defined() ? 1 : 0);
    return static_cast<int>(rows * p.heads * p.slices);
  }
  KOKKOS_INLINE_FUNCTION std::size_t scratch_bytes() const {
    return (static_cast<std::size_t>(p.slice_rows + 2) * static_cast<std::size_t>(p.row_size) + 2) * sizeof(float);
  }

  KOKKOS_INLINE_FUNCTION void operator()(const Team& team) const {
    const int id = team.league_rank();
    const std::int64_t n = id / p.slices / p.heads;
    Slice slice;
    slice.h = id / p.slices % p.heads;
    slice.first = id % p.slices * p.slice_rows;
    slice.rows = p.value_dim - slice.first < p.slice_rows ? p.value_dim - slice.first : p.slice_rows;
    HostRow row;
    if (p.resolved != nullptr) {
      row = p.resolved[n];
      if (row.padding) return;  // the host has zeroed its outputs
    } else {
      if (p.cu_seqlens.defined() && !has_sequence(team, n, slice)) return;
      row = resolve(team, p, n);
      if (row.padding) return zero_outputs(team, row.batch, row.first_token, row.first_token + row.tokens, slice);
    }
    slice.S = static_cast<float*>(team.team_shmem().get_shmem(static_cast<std::ptrdiff_t>(scratch_bytes())));
    slice.q = slice.S + p.slice_rows * p.row_size;
    slice.k = slice.q + p.row_size;
    slice.gates = slice.k + p.row_size;
    run(team, n, row, slice);
  }

 private:
  struct Slice {
    int h, first, rows;  ///< the head, the first value row, how many
    float* S;            ///< [rows, K]
    float* q;            ///< [K], as k
    float* k;
    float* gates;  ///< decay and beta of the token
  };

  /// The slice's outputs of some tokens.
  KOKKOS_INLINE_FUNCTION void zero_outputs(const Team& team, std::int64_t batch, std::int64_t begin, std::int64_t end,
                                           const Slice& slice) const {
    Kokkos::parallel_for(Kokkos::TeamVectorRange(team, (end - begin) * slice.rows), [&](const std::int64_t e) {
      store(p.o, 0.0f, batch, begin + e / slice.rows, slice.h, slice.first + e % slice.rows);
    });
  }

  /// With cu_seqlens. False: there is nothing left to do, since the sequences make no sense or n is behind the last row.
  KOKKOS_INLINE_FUNCTION bool has_sequence(const Team& team, std::int64_t n, const Slice& slice) const {
    const bool good = sequences_are_good(team, p);
    if (n == p.rows) {
      zero_outputs(team, 0, 0, good ? index_in(p.cu_seqlens, 0) : p.tokens, slice);
      if (good) zero_outputs(team, 0, index_in(p.cu_seqlens, p.rows), p.tokens, slice);
    }
    return n < p.rows && good;
  }

  KOKKOS_INLINE_FUNCTION void run(const Team& team, std::int64_t n, const HostRow& row, const Slice& slice) const {
    load_state(team, row, slice);
    for (std::int64_t t = 0; t < row.tokens; ++t) {
      const std::int64_t token = row.first_token + t;
      load_token(team, row.batch, token, slice);
      Kokkos::parallel_for(Kokkos::TeamThreadRange(team, slice.rows),
                           [&](const int v) { step(team, row.batch, token, slice, v); });
      team.team_barrier();
      if (p.snapshots.defined()) store_state(team, p.snapshots, slice, n, t);
      if (p.store_tokens)
        if (const std::int64_t slot = index_in(p.token_slots, n, t); slot > p.null_slot)
          store_state(team, p.state_write, slice, slot);
    }
    if (row.final_slot >= 0) store_state(team, p.state_write, slice, row.final_slot);
  }

  /// Ends with a barrier.
  KOKKOS_INLINE_FUNCTION void load_state(const Team& team, const HostRow& row, const Slice& slice) const {
    // A GPU's rows are longer for the sake of the banks, and what is behind their keys is never read.
    if (!p.initial_state || (on_host && p.row_size > p.key_dim))
      Kokkos::parallel_for(Kokkos::TeamVectorRange(team, slice.rows * p.row_size), [&](const int i) { slice.S[i] = 0; });
    team.team_barrier();
    if (p.initial_state && p.resolved != nullptr)
      read_state(team, *row.source, row.source_slot, slice);
    else if (p.initial_state)
      read_state(team, p.state_read, row.source_slot, slice);
    team.team_barrier();
  }

  KOKKOS_INLINE_FUNCTION void read_state(const Team& team, const TensorView& from, std::int64_t slot,
                                         const Slice& slice) const {
    const std::int64_t base = offset_of(from, slot, slice.h, slice.first), v_stride = from.strides[2],
                       k_stride = from.strides[3];
    with_element(from.dtype, [&](auto type) {
      const auto* data = static_cast<const decltype(type)*>(from.data) + base;
      for_each_element(team, slice.rows, p.key_dim, v_stride, k_stride, [&](const int v, const int i) {
        slice.S[v * p.row_size + i] = widened(data[v * v_stride + i * k_stride]);
      });
    });
  }

  /// To to[index...], a state of all heads. The tokens before it must be done.
  template <class... Index>
  KOKKOS_INLINE_FUNCTION void store_state(const Team& team, const TensorView& to, const Slice& slice, Index... index) const {
    const std::int64_t base = offset_of(to, index..., slice.h, slice.first);
    const std::int64_t v_stride = to.strides[sizeof...(index) + 1], k_stride = to.strides[sizeof...(index) + 2];
    with_element(to.dtype, [&](auto type) {
      auto* data = static_cast<decltype(type)*>(to.data) + base;
      for_each_element(team, slice.rows, p.key_dim, v_stride, k_stride, [&](const int v, const int i) {
        data[v * v_stride + i * k_stride] = narrowed<decltype(type)>(slice.S[v * p.row_size + i]);
      });
    });
  }

  /// q, k, decay and beta to scratch memory. Begins after a barrier and ends with one.
  KOKKOS_INLINE_FUNCTION void load_token(const Team& team, std::int64_t batch, std::int64_t token, const Slice& slice) const {
    load_vector(team, p.q, batch, token, slice.h / p.q_group, slice.q);
    load_vector(team, p.k, batch, token, slice.h / p.k_group, slice.k);
    Kokkos::single(Kokkos::PerTeam(team), [&] {
      slice.gates[0] = static_cast<float>(::exp(log_decay(p, batch, token, slice.h)));
      slice.gates[1] = static_cast<float>(beta_of(p, batch, token, slice.h));
    });
    team.team_barrier();
    if (!p.l2norm) return;
    const float q_factor = inverse_norm(team, slice.q), k_factor = inverse_norm(team, slice.k);
    team.team_barrier();
    Kokkos::parallel_for(Kokkos::TeamVectorRange(team, p.row_size), [&](const int i) {
      slice.q[i] *= q_factor;
      slice.k[i] *= k_factor;
    });
    team.team_barrier();
  }

  KOKKOS_INLINE_FUNCTION void load_vector(const Team& team, const TensorView& from, std::int64_t batch, std::int64_t token,
                                          int head, float* to) const {
    const std::int64_t base = offset_of(from, batch, token, head), stride = from.strides[3];
    with_element(from.dtype, [&](auto type) {
      const auto* data = static_cast<const decltype(type)*>(from.data) + base;
      Kokkos::parallel_for(Kokkos::TeamVectorRange(team, p.row_size),
                           [&](const int i) { to[i] = i < p.key_dim ? widened(data[i * stride]) : 0.0f; });
    });
  }

  /// Of the sums over the keys, part `part` has these.
  KOKKOS_INLINE_FUNCTION static int key_of(int block, int part) { return block * parts + part; }
  KOKKOS_INLINE_FUNCTION int blocks() const { return on_host ? p.row_size / parts : p.key_dim; }

  /// Each thread of the team computes it for itself.
  KOKKOS_INLINE_FUNCTION float inverse_norm(const Team& team, const float* vector) const {
    Sum<double> squares;
    Kokkos::parallel_reduce(
        Kokkos::ThreadVectorRange(team, blocks()),
        [&](const int block, Sum<double>& sum) {
          for (int i = 0; i < parts; ++i) {
            const double x = vector[key_of(block, i)];
            sum.part[i] += x * x;
          }
        },
        squares);
    return static_cast<float>(1 / ::sqrt(squares.total() + p.l2_eps));
  }

  /// One token of one value row.
  KOKKOS_INLINE_FUNCTION void step(const Team& team, std::int64_t batch, std::int64_t token, const Slice& slice, int v) const {
    float* const row = slice.S + v * p.row_size;
    const float* const q = slice.q;
    const float* const k = slice.k;
    const float decay = slice.gates[0];
    Sum<float> recalled, out;
    Kokkos::parallel_reduce(
        Kokkos::ThreadVectorRange(team, blocks()),
        [&](const int block, Sum<float>& sum) {
          for (int i = 0; i < parts; ++i) sum.part[i] += decay * row[key_of(block, i)] * k[key_of(block, i)];
        },
        recalled);
    const float u = slice.gates[1] * (load(p.v, batch, token, slice.h / p.v_group, slice.first + v) - recalled.total());
    Kokkos::parallel_reduce(
        Kokkos::ThreadVectorRange(team, blocks()),
        [&](const int block, Sum<float>& sum) {
          float next[parts];
          for (int i = 0; i < parts; ++i) next[i] = decay * row[key_of(block, i)] + u * k[key_of(block, i)];
          for (int i = 0; i < parts; ++i) row[key_of(block, i)] = next[i];
          for (int i = 0; i < parts; ++i) sum.part[i] += next[i] * q[key_of(block, i)];
        },
        out);
    const float total = out.total();
    Kokkos::single(Kokkos::PerThread(team), [&] { store(p.o, p.scale * total, batch, token, slice.h, slice.first + v); });
  }

  ForwardParams p;
};

/// A team has one row and head.
class Commit {
 public:
  explicit Commit(const CommitParams& params) : p(params) {}

  int teams() const { return static_cast<int>(p.rows * p.heads); }
  KOKKOS_INLINE_FUNCTION std::size_t scratch_bytes() const { return 0; }

  KOKKOS_INLINE_FUNCTION void operator()(const Team& team) const {
    const std::int64_t n = team.league_rank() / p.heads;
    const int h = team.league_rank() % p.heads;
    const std::int64_t slot = checked_slot(p, FaultKind::write_slots, index_in(p.write_slots, n), n);
    if (slot < 0) return;
    const std::int64_t count = index_in(p.accepted, n), room = p.snapshots.shape[1];
    if (count < 1 || count > room) return record(p.fault, FaultKind::accepted, n, count, room);
    for_each_element(team, p.value_dim, p.key_dim, p.state.strides[2], p.state.strides[3], [&](const int v, const int i) {
      store(p.state, load(p.snapshots, n, count - 1, h, v, i), slot, h, v, i);
    });
  }

 private:
  CommitParams p;
};

/// Enqueues a kernel on the space, which is not waited for.
template <class Kernel>
void launch(const Space& space, const char* name, const Kernel& kernel) {
  if (kernel.teams() == 0) return;
  Policy policy(space, kernel.teams(), team_threads, team_lanes);
  policy.set_scratch_size(0, Kokkos::PerTeam(static_cast<int>(kernel.scratch_bytes())));
  // The functor is an argument of the kernel: through constant memory, a launch would wait for the one before.
  Kokkos::parallel_for(name, Kokkos::Experimental::require(policy, Kokkos::Experimental::WorkItemProperty::HintLightWeight),
                       kernel);
}

}  // namespace gatedelta::kokkos

template <class Real>
struct Kokkos::reduction_identity<gatedelta::kokkos::Sum<Real>> {
  KOKKOS_FORCEINLINE_FUNCTION static gatedelta::kokkos::Sum<Real> sum() { return {}; }
};
