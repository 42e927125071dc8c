// SPDX-License-Identifier: Apache-2.0
// Tensors of a trained model, with outputs of a sequential float64 evaluation made elsewhere.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "core/elements.hpp"
#include "io/safetensors.hpp"
#include "verify/check.hpp"

using namespace gatedelta;
using namespace gatedelta::verify;

namespace {

/// A file's call as a case; the names of its tensors are given where they are not the contract's.
class GoldenFile {
 public:
  explicit GoldenFile(const std::string& name)
      : file_(io::SafetensorsFile::read(std::string(GATEDELTA_GOLDEN_FOLDER) + "/" + name + ".safetensors")) {
    case_.name = name;
    for (const auto& [tensor, field] : {std::pair{Tensor::q, "q"},
                                        {Tensor::k, "k"},
                                        {Tensor::v, "v"},
                                        {Tensor::a, "a"},
                                        {Tensor::b, "b"},
                                        {Tensor::A_log, "A_log"},
                                        {Tensor::dt_bias, "dt_bias"}})
      case_[tensor] = spec(field);
    Config& config = case_.config;
    config.q_heads = case_[Tensor::q].shape[2];
    config.k_heads = case_[Tensor::k].shape[2];
    config.v_heads = case_[Tensor::v].shape[2];
    config.key_dim = case_[Tensor::q].shape[3];
    config.value_dim = case_[Tensor::v].shape[3];
    DTypes& d = config.dtypes;
    d.q = d.k = d.v = d.gate = d.beta = DType::bf16;
  }

  void input(Tensor tensor, const char* name) { case_[tensor] = spec(name); }
  void output(Tensor tensor, const char* name) {
    case_[tensor] = spec(name);
    case_[tensor].values.clear();
    outputs_.emplace_back(tensor, name);
  }
  Case& call() { return case_; }

  /// The recurrence of the tests gives the file's outputs up to their rounding to f32, and so does every backend.
  void check() {
    const Golden expected = golden(case_);
    for (const auto& named : outputs_) {
      const std::string name = named.second;
      CAPTURE(name);
      const std::vector<double> stored = spec(name).values;
      const Output& output = *expected.find(named.first);
      double difference = 0, rounding = 0;
      for (std::size_t i = 0; i < stored.size(); ++i) {
        difference += std::pow(stored[i] - output.values[i], 2);
        rounding += std::pow(rounded(DType::f32, output.values[i]) - output.values[i], 2);
      }
      CHECK(difference <= 1.5 * 1.5 * rounding);
    }
    int dispatched = 0;
    for (Backend* backend : backends()) {
      Memory* memory = memory_for(*backend);
      if (!backend->availability().available || memory == nullptr) {
        MESSAGE(std::string(backend->name()) << " is skipped: " << backend->availability().reason);
        continue;
      }
      Checker checker(*backend, *memory);
      if (const std::string reason = checker.unsupported_reason(case_); !reason.empty()) {
        MESSAGE(std::string(backend->name()) << " is skipped: " << reason);
        continue;
      }
      checker.against_golden(case_, expected);
      dispatched += checker.calls();
      for (const Failure& failure : checker.failures()) FAIL_CHECK(std::string(backend->name()) << ": " << text(failure));
    }
    CHECK(dispatched > 0);
  }

 private:
  TensorSpec spec(const std::string& name) const {
    const TensorView& found = file_.tensor(name);
    TensorSpec out{found.dtype, {found.shape.begin(), found.shape.begin() + found.rank}, {}, {}};
    out.strides.assign(found.strides.begin(), found.strides.begin() + found.rank);
    for (std::int64_t i = 0; i < found.elements(); ++i)
      out.values.push_back(load_element(
          static_cast<const std::byte*>(found.data) + i * static_cast<std::int64_t>(size_of(found.dtype)), found.dtype));
    return out;
  }

  io::SafetensorsFile file_;
  Case case_;
  std::vector<std::pair<Tensor, const char*>> outputs_;
};

}  // namespace

TEST_CASE("decode of a trained model") {
  GoldenFile file("decode_t1_layer0");
  SUBCASE("f32 state") {
    file.input(Tensor::state_in, "state");
    file.output(Tensor::o, "o");
    file.output(Tensor::state_out, "state_out");
    file.check();
  }
  SUBCASE("bf16 state") {
    // The file has the outputs of a bf16 state in f32; a bf16 value is one of f32.
    file.input(Tensor::state_in, "state_bf16");
    file.call()[Tensor::state_in].dtype = DType::f32;
    file.output(Tensor::o, "o_from_bf16");
    file.output(Tensor::state_out, "state_out_from_bf16");
    file.check();
  }
}

TEST_CASE("verification of drafts of a trained model") {
  GoldenFile file("verify_t4_layer3");
  file.input(Tensor::state_in, "state");
  file.output(Tensor::o, "o");
  file.output(Tensor::snapshots, "snapshots");
  file.check();
}

TEST_CASE("prefill of a trained model") {
  GoldenFile file("prefill_256_layer0");
  file.output(Tensor::o, "o");
  file.output(Tensor::state_out, "state_out");
  file.check();
}
