// The tools of the decoders: operands become places in a register file, functions of values become loops over lanes.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "machine.h"
#include "numbers.h"

namespace ptx {

class Decoder {
 public:
  Decoder(const Module& module, const Kernel& kernel, Program& program);
  void decode_all();

  const Statement& statement() const { return *statement_; }
  const std::string& name() const { return statement_->name(); }
  const std::string& type() const { return statement_->type(); }
  bool has(const char* modifier) const { return statement_->has(modifier); }
  const Operand& operand(size_t k) const;
  // Of a register; 0 of anything else.
  int bytes_of_operand(const Operand& operand) const {
    return operand.kind == Operand::Kind::reg ? bytes_of_register(operand.reg) : 0;
  }
  size_t operands() const { return statement_->operands.size(); }
  [[noreturn]] void unknown() const;  // this form of the instruction

  // Where an operand is read from, as values of so many bytes. Of wider registers it is the low part.
  uint32_t source(const Operand& operand, int bytes);
  uint32_t source(size_t k, int bytes) { return source(operand(k), bytes); }
  uint32_t predicate_source(const Operand& operand);
  // Where a result is put. Wider registers are filled with its sign or with zeros.
  uint32_t destination(const Operand& operand, int bytes, bool is_signed = false);
  uint32_t destination(size_t k, int bytes, bool is_signed = false) {
    return destination(operand(k), bytes, is_signed);
  }
  uint32_t predicate_destination(const Operand& operand);
  uint32_t second_destination(const Operand& operand);  // the predicate of d|p
  uint32_t constant(uint64_t bits, int bytes);
  uint32_t temporary(int bytes);
  // The carry flag of each lane: a predicate that has no name.
  uint32_t carry() {
    if (carry_ == kNowhere) carry_ = allocate(0);
    return carry_;
  }
  static constexpr uint32_t kNowhere = ~uint32_t{0};

  // The instruction under way, and what it does.
  Instruction instruction;
  void runs(Handler handler) { instruction.run = handler; }

  // d = f(a, b, …) in each lane: of operands from the first on, whose types are given.
  template <class D, class... S, class F>
  void each_lane(F) {
    instruction.slot[0] = destination(0, sizeof(D), std::is_signed_v<D>);
    size_t k = 0;
    ((++k, instruction.slot[k] = source(k, sizeof(S))), ...);
    runs([](Warp& warp, const Instruction& i, Mask mask) {
      apply<D, F, S...>(warp, i, mask, std::index_sequence_for<S...>{});
    });
  }

  // The same under a rounding mode of the machine.
  template <class D, class... S, class F>
  void each_lane_rounded(F f, Rounding rounding) {
    each_lane<D, S...>(f);
    if (rounding == Rounding::nearest) return;
    instruction.number[0] = static_cast<int>(rounding);
    runs([](Warp& warp, const Instruction& i, Mask mask) {
      const MachineRounding changed(static_cast<Rounding>(i.number[0]));
      apply<D, F, S...>(warp, i, mask, std::index_sequence_for<S...>{});
    });
  }

 private:
  uint32_t allocate(int bytes);
  uint32_t carry_ = kNowhere;

  template <class D, class F, class... S, size_t... k>
  static void apply(Warp& warp, const Instruction& i, Mask mask, std::index_sequence<k...>) {
    Vector<D> results;
    for (int l = 0; l < kLanes; ++l) results.lane[l] = F{}(warp.at<S>(i.slot[k + 1]).lane[l]...);
    warp.put(i.slot[0], results, mask);
  }

  void decode_statement();
  int bytes_of_register(int reg) const { return kernel_.registers[static_cast<size_t>(reg)].bytes; }
  uint32_t slot_of_special(const std::string& name, int bytes);
  void add_helper(Handler handler, uint32_t to, uint32_t from, std::vector<Instruction>& where);

  const Module& module_;
  const Kernel& kernel_;
  Program& program_;
  const Statement* statement_ = nullptr;
  std::vector<uint32_t> slots_;  // of registers
  std::map<std::pair<int, uint64_t>, uint32_t> constants_;
  std::map<std::string, std::pair<uint32_t, int>> specials_;
  std::vector<Instruction> before_, after_;  // what is added around the instruction
};

// Calls f with a null value of the integer type of that name. Bits count as unsigned.
template <class F>
bool with_integer(const std::string& type, F f) {
  if (type == "u8" || type == "b8") return f(uint8_t{}), true;
  if (type == "s8") return f(int8_t{}), true;
  if (type == "u16" || type == "b16") return f(uint16_t{}), true;
  if (type == "s16") return f(int16_t{}), true;
  if (type == "u32" || type == "b32") return f(uint32_t{}), true;
  if (type == "s32") return f(int32_t{}), true;
  if (type == "u64" || type == "b64") return f(uint64_t{}), true;
  if (type == "s64") return f(int64_t{}), true;
  return false;
}

}  // namespace ptx
