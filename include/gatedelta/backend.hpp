// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gatedelta/export.hpp"
#include "gatedelta/operator.hpp"
#include "gatedelta/tensor.hpp"

namespace gatedelta {

/// The static side of a call: everything a backend may base support and workspace on. Values in tensors are not part of it.
struct Problem {
  Config config;                      ///< of the operator
  Device device;                      ///< of all tensors
  std::int64_t rows = 0;              ///< N: sequences
  std::int64_t batch = 0;             ///< B of q
  std::int64_t tokens = 0;            ///< T of q; with cu_seqlens the total of all sequences
  std::int64_t slots = 0;             ///< size of the pool, or rows where there is none
  bool variable_length = false;       ///< cu_seqlens are given
  bool initial_state = false;         ///< a pool or state_in is read
  bool store_final = false;           ///< the last state of a row is stored
  bool store_tokens = false;          ///< token_slots are written
  bool snapshots = false;             ///< snapshots are written
  bool accepted = false;              ///< rows start from token_slots[n, accepted[n]-1]
  bool window = false;                ///< a replay window, or one of the calls for windows alone
  std::int64_t window_capacity = 0;   ///< W
  DType window_entries = DType::f32;  ///< of keys and corrections
  bool tree = false;                  ///< parent is given
};

/// A validated call: shapes, dtypes and devices are checked, and the two ways to give states are one.
struct Call {
  Problem problem;                       ///< what is known without reading tensors
  const Arguments* arguments = nullptr;  ///< as the caller gave them
  TensorView state_read;                 ///< [slots,H,V,K]; not defined: zero
  TensorView state_write;                ///< [slots,H,V,K]; not defined: no final or token store
  TensorView read_slots;                 ///< not defined (and no accepted): row n has slot n
  TensorView write_slots;                ///< not defined: the slot that was read
};

/// Whether a backend can work on this machine.
struct Availability {
  bool available = false;  ///< it can
  std::string reason;      ///< why not; empty if available
};

/// An implementation of the operator. Three separate questions: is it available on this machine, does it support this
/// problem, can it reach this memory. Methods may be called from several threads at once.
class GATEDELTA_API Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend();

  /// Unique among the backends, e.g. "cpu"; valid as long as the backend.
  virtual std::string_view name() const noexcept = 0;
  /// One line for listings, e.g. the instruction set or execution space in use.
  virtual std::string description() const = 0;
  /// Asked at every call, so it should remember its answer.
  virtual Availability availability() const = 0;
  /// Whether it can work on this device's memory. Must not start up a driver for host memory.
  virtual bool reaches(Device device) const noexcept = 0;
  /// Empty: supported. Otherwise the reason, for a message. Selection, forward() and tests all ask this one function.
  virtual std::string unsupported_reason(const Problem& problem) const = 0;
  /// Bytes of caller-provided workspace for forward().
  virtual std::size_t workspace_size(const Problem& problem) const;
  /// Runs a validated, supported call.
  virtual void forward(const Call& call) = 0;
  /// Runs a validated commit.
  virtual void commit(const Config& config, const CommitArguments& arguments) = 0;
  /// Run validated calls for replay windows; without an implementation they throw Error(unsupported), and the backend has to
  /// refuse problems with a window.
  virtual void accept(const Config& config, const AcceptArguments& arguments);
  virtual void reset(const Config& config, const ResetArguments& arguments);  ///< see accept()
  virtual void fold(const Config& config, const FoldArguments& arguments);    ///< see accept(); to the checkpoints, or to `out`
  virtual void copy(const Config& config, const ForkArguments& arguments);    ///< see accept()
  /// Throws Error(device) if an earlier call met a fault on the device (a bad slot, say). Host backends throw at the call.
  virtual void check(void* stream);
  /// Waits for the stream, then check().
  virtual void synchronize(void* stream);
};

/// All registered backends in the order in which auto tries them: the built-in ones, then those registered at run time.
/// "reference" comes last.
GATEDELTA_API std::vector<Backend*> backends();
/// The backend of this name, or nullptr.
GATEDELTA_API Backend* find_backend(std::string_view name);
/// Adds a backend, tried by auto before all earlier ones. Throws Error(invalid_argument) for a name that is taken, empty or
/// "auto".
GATEDELTA_API Backend& register_backend(std::unique_ptr<Backend> backend);
/// Removes a backend that was added at run time and hands it back; no operator may be using it. Throws for a built-in or
/// unknown name.
GATEDELTA_API std::unique_ptr<Backend> unregister_backend(std::string_view name);

/// Validates a call against a configuration; what every backend's forward() may rely on.
/// Throws Error(invalid_argument) that names the tensor, what was expected and what was found.
GATEDELTA_API Call validate(const Config& config, const Arguments& arguments);
/// The same for a commit.
GATEDELTA_API void validate(const Config& config, const CommitArguments& arguments);
/// The same for a configuration alone.
GATEDELTA_API void validate(const Config& config);
/// The same for the calls for replay windows alone. They return a problem without tokens, for the choice of a backend.
GATEDELTA_API Problem validate(const Config& config, const AcceptArguments& arguments);
/// See validate() of AcceptArguments.
GATEDELTA_API Problem validate(const Config& config, const ResetArguments& arguments);
/// See validate() of AcceptArguments.
GATEDELTA_API Problem validate(const Config& config, const FoldArguments& arguments);
/// See validate() of AcceptArguments.
GATEDELTA_API Problem validate(const Config& config, const ForkArguments& arguments);

}  // namespace gatedelta
