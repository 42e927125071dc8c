// SPDX-License-Identifier: Apache-2.0
// The fast backend for host memory: splits a call into blocks of value rows of single heads, and runs them on all threads
// with the kernels of the best instruction set variant that this CPU has.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "backends/cpu/kernels.hpp"
#include "core/builtin_backends.hpp"
#include "core/elements.hpp"
#include "core/host_rows.hpp"
#include "core/host_window.hpp"

namespace gatedelta {
namespace cpu {

#if !defined(GATEDELTA_X86_VARIANTS)
const Kernels* const kernels_avx2 = nullptr;
const Kernels* const kernels_avx512 = nullptr;
#endif

namespace {

static_assert(static_cast<int>(Element::f32) == static_cast<int>(DType::f32) &&
              static_cast<int>(Element::f16) == static_cast<int>(DType::f16) &&
              static_cast<int>(Element::bf16) == static_cast<int>(DType::bf16));

// Blocks of value rows below this cost more in repeated work on keys and queries than they gain in threads.
constexpr std::int64_t smallest_block = 16;
// Elements of state times tokens below which another thread costs more than it brings (starting one takes about 2 us).
constexpr std::int64_t smallest_share = 8192;
static_assert(max_window_entries == max_window && max_replay_tokens == max_window);

struct Variant {
  const Kernels* kernels;
  bool supported;
};

/// Best first.
std::vector<Variant> variants() {
  std::vector<Variant> out;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);  // not a name clang 14 knows
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (kernels_avx512) out.push_back({kernels_avx512, avx512});
  if (kernels_avx2) out.push_back({kernels_avx2, avx2});
#endif
  out.push_back({kernels_baseline, true});
  return out;
}

/// Scratch memory for the threads of a call, kept between calls: a fresh allocation of this size would fault in its pages.
class ScratchPool {
 public:
  class Lease {
   public:
    Lease(ScratchPool& pool, std::size_t bytes) : pool_(pool), block_(pool.take(bytes)) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { pool_.give(block_); }
    char* data() const { return static_cast<char*>(block_.data); }

   private:
    ScratchPool& pool_;
    struct Block {
      void* data;
      std::size_t bytes;
    } block_;
    friend class ScratchPool;
  };

  ~ScratchPool() {
    for (const auto& block : free_) release(block);
  }

 private:
  static constexpr std::align_val_t alignment{64};
  static constexpr std::size_t kept_blocks = 4;

  Lease::Block take(std::size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if (it->bytes >= bytes) {
          const Lease::Block block = *it;
          free_.erase(it);
          return block;
        }
    }
    return {::operator new(bytes, alignment), bytes};
  }
  void give(Lease::Block block) {
    const std::lock_guard lock(mutex_);
    if (free_.capacity() == 0) free_.reserve(kept_blocks + 1);
    free_.push_back(block);
    if (free_.size() <= kept_blocks) return;
    const auto smallest =
        std::min_element(free_.begin(), free_.end(), [](const auto& a, const auto& b) { return a.bytes < b.bytes; });
    release(*smallest);
    free_.erase(smallest);
  }
  static void release(Lease::Block block) { ::operator delete(block.data, alignment); }

  std::mutex mutex_;
  std::vector<Lease::Block> free_;
};

std::int64_t bytes(const TensorView& tensor, std::int64_t elements) {
  return elements * static_cast<std::int64_t>(gatedelta::size_of(tensor.dtype));
}

/// The matrix at `tensor[index...]` whose rows and columns are the next two dimensions, or the given ones.
Matrix matrix(const TensorView& tensor, char* data, int row_dim, int col_dim) {
  return {data, bytes(tensor, tensor.strides[row_dim]), bytes(tensor, tensor.strides[col_dim]),
          static_cast<Element>(tensor.dtype)};
}

template <class... Index>
char* address(const TensorView& tensor, Index... index) {
  return static_cast<char*>(element_address(tensor, index...));
}

/// The gates of one head, in double: decays multiply up over a sequence, so their logarithms deserve the precision.
class Gates {
 public:
  Gates(const Call& call, std::int64_t head) : config_(call.problem.config), in_(*call.arguments), head_(head) {
    if (config_.gate == GateForm::raw) {
      rate_ = -std::exp(load(in_.A_log, head));
      bias_ = in_.dt_bias.defined() ? load(in_.dt_bias, head) : 0.0;
    }
  }

  double log_decay(std::int64_t batch, std::int64_t token) const {
    double g = 0;
    if (config_.gate == GateForm::log_decay) g = load(in_.g, batch, token, head_);
    if (config_.gate == GateForm::raw) {
      const double x = load(in_.a, batch, token, head_) + bias_, scaled = config_.softplus_beta * x;
      g = rate_ * (scaled > config_.softplus_threshold ? x : std::log1p(std::exp(scaled)) / config_.softplus_beta);
    }
    // e^-1e5 is 0 in double, and differences of sums stay exact, which those of infinities would not.
    return g < -1e5 ? -1e5 : g;
  }

  double beta(std::int64_t batch, std::int64_t token) const {
    switch (config_.beta) {
      case BetaForm::one:
        return 1;
      case BetaForm::value:
        return load(in_.beta, batch, token, head_);
      case BetaForm::logits:
        return 1 / (1 + std::exp(-load(in_.b, batch, token, head_)));
      case BetaForm::twice_logits:
        return 2 / (1 + std::exp(-load(in_.b, batch, token, head_)));
    }
    return 0;
  }

 private:
  const Config& config_;
  const Arguments& in_;
  std::int64_t head_;
  double rate_ = 0, bias_ = 0;
};

/// Asks for the lines of [begin, begin + bytes). GCC takes a function that does nothing but prefetch for one without effects,
/// and drops its calls: the empty statement is an effect.
void prefetch(const char* begin, std::int64_t bytes) {
  asm volatile("");
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i, 0, 2);
}

/// How a call is cut into tasks: (row, head, block of value rows), the blocks of a head next to each other.
struct Split {
  int threads;
  std::int64_t blocks;  // of a head
  std::int64_t block_rows;
  std::int64_t tasks;
};

/// `tokens` is the sum over the rows.
Split split(const Problem& problem, std::int64_t tokens) {
  const Config& config = problem.config;
  Split out{1, 1, config.value_dim, problem.rows * config.heads()};
#if defined(_OPENMP)
  out.threads = config.num_threads > 0 ? config.num_threads : omp_get_max_threads();
#endif
  const std::int64_t work = config.heads() * config.value_dim * config.key_dim * tokens;
  out.threads = static_cast<int>(std::clamp<std::int64_t>(work / smallest_share, 1, out.threads));
  const std::int64_t heads = out.tasks;
  while (heads > 0 && out.tasks % out.threads != 0 && out.tasks < 4 * out.threads &&
         (config.value_dim + out.blocks) / (out.blocks + 1) >= smallest_block) {
    ++out.blocks;
    out.tasks = heads * out.blocks;
  }
  out.block_rows = (config.value_dim + out.blocks - 1) / out.blocks;
  out.block_rows = (out.block_rows + smallest_block - 1) / smallest_block * smallest_block;
  out.blocks = (config.value_dim + out.block_rows - 1) / out.block_rows;
  out.tasks = heads * out.blocks;
  out.threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(out.threads, out.tasks)));
  return out;
}

class CpuBackend final : public Backend {
 public:
  CpuBackend() {
    const char* wanted = std::getenv("GATEDELTA_CPU_VARIANT");
    std::string names;
    for (const Variant& variant : variants()) {
      names += (names.empty() ? "" : ", ") + std::string(variant.kernels->name);
      if (wanted ? wanted == std::string_view(variant.kernels->name) : variant.supported) {
        if (variant.supported)
          kernels_ = variant.kernels;
        else
          problem_ = "GATEDELTA_CPU_VARIANT: this CPU has no " + std::string(wanted);
        break;
      }
    }
    if (kernels_ == nullptr && problem_.empty())
      problem_ = "GATEDELTA_CPU_VARIANT: expected one of " + names + ", got \"" + wanted + "\"";
  }

  std::string_view name() const noexcept override { return "cpu"; }
  std::string description() const override {
    const std::string variant = kernels_ ? kernels_->name : "none";
#if defined(_OPENMP)
    return "vector kernels (" + variant + "), OpenMP";
#else
    return "vector kernels (" + variant + "), one thread";
#endif
  }
  Availability availability() const override { return {kernels_ != nullptr, problem_}; }
  bool reaches(Device device) const noexcept override { return device.type == DeviceType::cpu; }
  std::string unsupported_reason(const Problem&) const override { return {}; }

  void forward(const Call& call) override;
  void commit(const Config& config, const CommitArguments& arguments) override { commit_on_host(config, arguments); }
  void accept(const Config& config, const AcceptArguments& arguments) override { accept_on_host(config, arguments); }
  void reset(const Config& config, const ResetArguments& arguments) override { reset_on_host(config, arguments); }
  void fold(const Config& config, const FoldArguments& arguments) override { fold_on_host(config, arguments); }
  void copy(const Config& config, const ForkArguments& arguments) override { copy_on_host(config, arguments); }

 private:
  static void prefetch_inputs(const Call& call, const HostRows& rows, const Split& plan, std::int64_t task);
  void run_task(const Call& call, const HostRows& rows, const Split& plan, std::int64_t task, char* scratch) const;
  void replay(const Call& call, const HostRow& row, std::int64_t h, std::int64_t first_value, const HeadWork& head) const;
  bool by_chunks(const Call& call, std::int64_t tokens) const;

  const Kernels* kernels_ = nullptr;
  std::string problem_;
  ScratchPool scratch_;
};

/// Depends on nothing but the row's own length and the call's layout, so that a row's result does not change with the batch.
bool CpuBackend::by_chunks(const Call& call, std::int64_t tokens) const {
  const TensorView& snapshots = call.arguments->snapshots;
  const TensorView& state = call.state_read.defined() ? call.state_read : call.state_write;
  const TensorView& shown = state.defined() ? state : snapshots;
  if (shown.defined() && std::abs(shown.strides[shown.rank - 2]) < std::abs(shown.strides[shown.rank - 1])) return true;
  return tokens >= kernels_->chunks_from && !call.problem.store_tokens && !call.problem.snapshots;
}

void CpuBackend::forward(const Call& call) {
  const HostRows rows(call);
  std::int64_t longest = 0, tokens = 0;
  for (const HostRow& row : rows.rows()) {
    longest = std::max(longest, row.tokens);
    tokens += row.padding ? 0 : std::max<std::int64_t>(row.tokens, 1);
  }
  const Split plan = split(call.problem, tokens);
  // Of a task: the kernels' scratch, then log decay, beta and token targets of its tokens.
  const auto scratch_bytes = call.problem.window ? kernels_->replay_scratch_bytes : kernels_->scratch_bytes;
  const std::int64_t kernel_bytes = scratch_bytes(call.problem.config.key_dim, plan.block_rows);
  const std::int64_t task_bytes = kernel_bytes + (3 * 8 * longest + 63) / 64 * 64;
  const ScratchPool::Lease scratch(scratch_, static_cast<std::size_t>(task_bytes * plan.threads));
  rows.zero_padding();

  const auto run = [&](std::int64_t task, int thread) {
    prefetch_inputs(call, rows, plan, task + 1);
    run_task(call, rows, plan, task, scratch.data() + thread * task_bytes);
  };
#if defined(_OPENMP)
  if (plan.threads > 1) {
    // Short rows cost the same: neighbours in memory stay with one thread. Long ones may differ in length, and rows whose
    // window is folded take twice as long as others.
    const std::int64_t pieces = (call.problem.window ? 16 : 1) * plan.threads;
    const std::int64_t piece = longest > max_step_tokens ? 1 : (plan.tasks + pieces - 1) / pieces;
#pragma omp parallel for schedule(dynamic, piece) num_threads(plan.threads)
    for (std::int64_t task = 0; task < plan.tasks; ++task) run(task, omp_get_thread_num());
    return;
  }
#endif
  for (std::int64_t task = 0; task < plan.tasks; ++task) run(task, 0);
}

/// With few tokens a task takes microseconds, and a miss on each of its inputs would show.
void CpuBackend::prefetch_inputs(const Call& call, const HostRows& rows, const Split& plan, std::int64_t task) {
  if (task >= plan.tasks) return;
  const Config& config = call.problem.config;
  const Arguments& in = *call.arguments;
  const std::int64_t H = config.heads(), h = task / plan.blocks % H;
  const HostRow& row = rows.rows()[static_cast<std::size_t>(task / plan.blocks / H)];
  if (row.padding || row.tokens > max_step_tokens) return;
  const auto of_tokens = [&](const TensorView& tensor, std::int64_t heads) {
    if (!tensor.defined()) return;
    const std::int64_t size = tensor.rank == 4 && tensor.strides[3] == 1 ? bytes(tensor, tensor.shape[3]) : 1;
    for (std::int64_t t = 0; t < row.tokens; ++t)
      prefetch(address(tensor, row.batch, row.first_token + t, h / (H / heads)), size);
  };
  of_tokens(in.k, config.k_heads);
  of_tokens(in.q, config.q_heads);
  of_tokens(in.v, config.v_heads);
  of_tokens(in.o, H);
  of_tokens(in.a, H);
  of_tokens(in.g, H);
  of_tokens(in.b, H);
  of_tokens(in.beta, H);
  if (!call.problem.window) return;
  const ReplayWindow& window = *in.window;
  const auto entry = [&](const TensorView& tensor, std::int64_t head, std::int64_t place) {
    prefetch(address(tensor, row.source_slot, head, place), bytes(tensor, tensor.shape[3]));
  };
  for (std::int64_t j = 0; j < row.length + row.tokens; ++j) {
    const std::int64_t place = place_of(window.record, row.source_slot, j);
    entry(window.keys, h / (H / config.k_heads), place);
    entry(window.corrections, h, place);
  }
  prefetch(address(window.decays, row.source_slot, h), bytes(window.decays, window.decays.shape[2]));
}

void CpuBackend::run_task(const Call& call, const HostRows& rows, const Split& plan, std::int64_t task, char* scratch) const {
  const Config& config = call.problem.config;
  const Arguments& in = *call.arguments;
  const std::int64_t H = config.heads(), first_value = task % plan.blocks * plan.block_rows;
  const std::int64_t h = task / plan.blocks % H, n = task / plan.blocks / H;
  const HostRow& row = rows.rows()[static_cast<std::size_t>(n)];
  if (row.padding) return;
  const TensorView& to = call.state_write;
  const std::int64_t final_slot = row.fold ? row.source_slot : row.final_slot;
  char* target = final_slot >= 0 ? address(to, final_slot, h, first_value) : nullptr;
  if (row.tokens == 0) {
    const bool in_place = target && row.source && target == address(*row.source, row.source_slot, h, first_value);
    if (target == nullptr || in_place) return;
  }

  HeadWork work;
  work.tokens = row.tokens;
  work.key_dim = config.key_dim;
  work.rows = std::min(plan.block_rows, config.value_dim - first_value);
  work.qk_l2norm = config.qk_l2norm;
  work.l2_eps = config.l2_eps;
  work.scale = config.effective_scale();
  const auto token_matrix = [&](const TensorView& tensor, std::int64_t head, std::int64_t first) {
    return matrix(tensor, address(tensor, row.batch, row.first_token, head, first), 1, 3);
  };
  work.q = token_matrix(in.q, h / (H / config.q_heads), 0);
  work.k = token_matrix(in.k, h / (H / config.k_heads), 0);
  work.v = token_matrix(in.v, h / (H / config.v_heads), first_value);
  work.o = token_matrix(in.o, h, first_value);
  if (row.source) work.source = matrix(*row.source, address(*row.source, row.source_slot, h, first_value), 2, 3);
  if (target) work.target = matrix(to, target, 2, 3);

  const auto dense = [](const TensorView& tensor) { return !tensor.defined() || tensor.strides[3] == 1; };
  work.dense_rows = dense(call.state_read) && dense(to) && config.value_dim % 4 == 0;

  auto* log_decay = reinterpret_cast<double*>(scratch);
  double* beta = log_decay + row.tokens;
  const Gates gates(call, h);
  for (std::int64_t t = 0; t < row.tokens; ++t) {
    log_decay[t] = gates.log_decay(row.batch, row.first_token + t);
    beta[t] = gates.beta(row.batch, row.first_token + t);
  }
  work.log_decay = log_decay;
  work.beta = beta;
  if (call.problem.store_tokens) {
    auto** targets = reinterpret_cast<char**>(beta + row.tokens);
    for (std::int64_t t = 0; t < row.tokens; ++t) {
      const std::int64_t slot = rows.token_slot(n, t);
      targets[t] = slot < 0 ? nullptr : address(to, slot, h, first_value);
    }
    work.token_targets = targets;
    work.token_layout = matrix(to, nullptr, 2, 3);
  }
  if (call.problem.snapshots) {
    work.snapshots = matrix(in.snapshots, address(in.snapshots, n, 0, h, first_value), 3, 4);
    work.snapshot_stride = bytes(in.snapshots, in.snapshots.strides[1]);
  }
  work.scratch = scratch + (3 * 8 * row.tokens + 63) / 64 * 64;
  if (call.problem.window) return replay(call, row, h, first_value, work);
  by_chunks(call, row.tokens) ? kernels_->chunks(work) : kernels_->step(work);
}

void CpuBackend::replay(const Call& call, const HostRow& row, std::int64_t h, std::int64_t first_value,
                        const HeadWork& head) const {
  const Config& config = call.problem.config;
  const ReplayWindow& window = *call.arguments->window;
  const TensorView& parent = call.arguments->parent;
  const std::int64_t slot = row.source_slot, group = config.heads() / config.k_heads;
  std::int32_t order[max_window_entries + max_replay_tokens];
  for (std::int64_t i = 0; i < row.length + row.tokens; ++i)
    order[i] = static_cast<std::int32_t>(place_of(window.record, slot, i));
  ReplayWork work;
  work.head = head;
  work.length = row.length;
  work.order = order;
  work.entry_keys = matrix(window.keys, address(window.keys, slot, h / group), 2, 3);
  work.entry_corrections = matrix(window.corrections, address(window.corrections, slot, h, 0, first_value), 2, 3);
  work.decays = address(window.decays, slot, h);
  if (parent.defined()) {
    work.parent = reinterpret_cast<const std::int32_t*>(address(parent, row.batch, row.first_token));
    work.parent_stride = parent.strides[1];
  }
  work.stores_decays = first_value == 0;
  work.stores_keys = first_value == 0 && h % group == 0;
  kernels_->replay(work);
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<cpu::CpuBackend>(); }

}  // namespace gatedelta
