#include "decoder.h"

#include <cstdlib>

namespace ptx {

namespace {

// A copy of values into ones of another size, with their sign or without.
template <class To, class From>
void resize(Warp& warp, const Instruction& i, Mask mask) {
  Vector<To> results;
  for (int l = 0; l < kLanes; ++l) results.lane[l] = static_cast<To>(warp.at<From>(i.slot[1]).lane[l]);
  warp.put(i.slot[0], results, mask);
}

template <class From>
Handler resize_to(int bytes) {
  switch (bytes) {
    case 1:
      return resize<uint8_t, From>;
    case 2:
      return resize<uint16_t, From>;
    case 4:
      return resize<uint32_t, From>;
    default:
      return resize<uint64_t, From>;
  }
}

Handler resizing(int from, bool is_signed, int to) {
  switch (from) {
    case 1:
      return is_signed ? resize_to<int8_t>(to) : resize_to<uint8_t>(to);
    case 2:
      return is_signed ? resize_to<int16_t>(to) : resize_to<uint16_t>(to);
    case 4:
      return is_signed ? resize_to<int32_t>(to) : resize_to<uint32_t>(to);
    default:
      return resize_to<uint64_t>(to);
  }
}

void invert(Warp& warp, const Instruction& i, Mask mask) {
  warp.put_predicate(i.slot[0], ~warp.predicate(i.slot[1]), mask);
}

}  // namespace

Decoder::Decoder(const Module& module, const Kernel& kernel, Program& program)
    : module_(module), kernel_(kernel), program_(program) {
  for (const Register& reg : kernel.registers) slots_.push_back(allocate(reg.bytes));
}

uint32_t Decoder::allocate(int bytes) {
  const uint32_t slot = program_.file_bytes;
  program_.file_bytes += bytes == 0 ? 64 : static_cast<uint32_t>((bytes * kLanes + 63) / 64 * 64);
  return slot;
}

uint32_t Decoder::temporary(int bytes) {
  return allocate(bytes);
}

const Operand& Decoder::operand(size_t k) const {
  if (k >= operands()) throw Fault("too few operands");
  return statement_->operands[k];
}

void Decoder::unknown() const {
  throw Fault("the executor does not know this form of the instruction");
}

uint32_t Decoder::constant(uint64_t bits, int bytes) {
  if (bytes < 8) bits &= (uint64_t{1} << (8 * bytes)) - 1;
  const auto [found, is_new] = constants_.try_emplace({bytes, bits}, 0);
  if (is_new) {
    found->second = allocate(bytes);
    program_.constants.push_back({found->second, bytes, bits});
  }
  return found->second;
}

uint32_t Decoder::slot_of_special(const std::string& name, int bytes) {
  const std::string key = name + "/" + std::to_string(bytes);
  if (!specials_.count(key)) {
    specials_[key] = {allocate(8), bytes};
    program_.specials.push_back({specials_[key].first, name});
  }
  const uint32_t whole = specials_[key].first;  // of 64 bits
  if (bytes == 8) return whole;
  const uint32_t part = temporary(bytes);
  add_helper(resize_to<uint64_t>(bytes), part, whole, before_);
  return part;
}

void Decoder::add_helper(Handler handler, uint32_t to, uint32_t from, std::vector<Instruction>& where) {
  Instruction helper;
  helper.run = handler;
  helper.slot[0] = to;
  helper.slot[1] = from;
  helper.is_counted = false;
  where.push_back(helper);
}

uint32_t Decoder::source(const Operand& operand, int bytes) {
  switch (operand.kind) {
    case Operand::Kind::number: {
      uint64_t bits = operand.bits;
      if (operand.is_double && bytes == 4) {
        double value;
        std::memcpy(&value, &bits, sizeof value);
        const float narrow = static_cast<float>(value);
        bits = 0;
        std::memcpy(&bits, &narrow, sizeof narrow);
      }
      return constant(bits, bytes);
    }
    case Operand::Kind::variable:
      return constant(operand.bits + static_cast<uint64_t>(operand.offset), bytes);
    case Operand::Kind::special:
      return slot_of_special(operand.name, bytes);
    case Operand::Kind::reg: {
      const int held = bytes_of_register(operand.reg);
      const uint32_t slot = slots_[static_cast<size_t>(operand.reg)];
      if (held == bytes) return slot;
      if (held < bytes) throw Fault("an operand of " + std::to_string(held) + " bytes is too small");
      if (held == 16) throw Fault("parts of registers of 128 bits are not known");
      const uint32_t part = temporary(bytes);
      add_helper(resizing(held, false, bytes), part, slot, before_);
      return part;
    }
    default:
      throw Fault("an operand that is no value");
  }
}

uint32_t Decoder::predicate_source(const Operand& operand) {
  uint32_t slot = 0;
  if (operand.kind == Operand::Kind::number) {
    slot = allocate(0);
    program_.constants.push_back({slot, 0, operand.bits ? kAllLanes : 0});
  } else if (operand.kind == Operand::Kind::reg && bytes_of_register(operand.reg) == 0) {
    slot = slots_[static_cast<size_t>(operand.reg)];
  } else {
    throw Fault("an operand that is no predicate");
  }
  if (!operand.negated) return slot;
  const uint32_t inverted = temporary(0);
  add_helper(invert, inverted, slot, before_);
  return inverted;
}

uint32_t Decoder::destination(const Operand& operand, int bytes, bool is_signed) {
  if (operand.kind == Operand::Kind::absent) return temporary(bytes);
  if (operand.kind != Operand::Kind::reg) throw Fault("a result that is put into no register");
  const int held = bytes_of_register(operand.reg);
  const uint32_t slot = slots_[static_cast<size_t>(operand.reg)];
  if (held == bytes) return slot;
  if (held < bytes) throw Fault("a register of " + std::to_string(held) + " bytes is too small");
  if (held == 16) throw Fault("parts of registers of 128 bits are not known");
  const uint32_t part = temporary(bytes);
  add_helper(resizing(bytes, is_signed, held), slot, part, after_);
  return part;
}

uint32_t Decoder::predicate_destination(const Operand& operand) {
  if (operand.kind == Operand::Kind::absent) return temporary(0);
  if (operand.kind != Operand::Kind::reg || bytes_of_register(operand.reg) != 0)
    throw Fault("a result that is put into no predicate");
  return slots_[static_cast<size_t>(operand.reg)];
}

uint32_t Decoder::second_destination(const Operand& operand) {
  return operand.second < 0 ? kNowhere : slots_[static_cast<size_t>(operand.second)];
}

void Decoder::decode_statement() {
  instruction = Instruction();
  before_.clear();
  after_.clear();
  const bool is_known = decode_control(*this) || decode_moves(*this) || decode_memory(*this) ||
                        decode_integers(*this) || decode_floats(*this) || decode_comparisons(*this) ||
                        decode_conversions(*this) || decode_warp(*this);
  if (!is_known) throw Fault("the executor does not know this instruction");
}

void Decoder::decode_all() {
  for (size_t k = 0; k < kernel_.statements.size(); ++k) {
    statement_ = &kernel_.statements[k];
    program_.first_of.push_back(static_cast<int>(program_.code.size()));
    try {
      decode_statement();
    } catch (const Fault& fault) {
      throw Fault(std::string(fault.what()) + ": " + statement_->text + " (line " + std::to_string(statement_->line) +
                  " of the PTX, in " + kernel_.name + ")");
    }
    const auto append = [&](Instruction made) {
      made.statement = static_cast<int>(k);
      if (statement_->guard >= 0) {
        made.guard = static_cast<int>(slots_[static_cast<size_t>(statement_->guard)]);
        made.guard_negated = statement_->guard_negated;
      }
      program_.code.push_back(made);
    };
    for (const Instruction& helper : before_) append(helper);
    append(instruction);
    // What a guarded instruction leaves of a guard that it writes itself would be another: none has such a helper.
    for (const Instruction& helper : after_) append(helper);
  }
  program_.first_of.push_back(static_cast<int>(program_.code.size()));
  Instruction end;
  end.flow = Flow::exit;
  end.is_counted = false;
  program_.code.push_back(end);
  for (Instruction& made : program_.code)
    if (made.flow == Flow::branch)
      made.target =
          program_.first_of[static_cast<size_t>(kernel_.statements[static_cast<size_t>(made.statement)].target)];
}

std::unique_ptr<Program> decode(const Module& module, const Kernel& kernel) {
  auto program = std::make_unique<Program>();
  program->module = &module;
  program->kernel = &kernel;
  Decoder(module, kernel, *program).decode_all();
  return program;
}

void Program::prepare_files(size_t warps) {
  while (files.size() < warps) {
    char* const file = static_cast<char*>(std::aligned_alloc(64, (size_t{file_bytes} + 4095) / 4096 * 4096 + 4096));
    if (!file) throw Fault("no memory for registers");
    for (const Constant& constant : constants) {
      if (constant.bytes == 0) std::memcpy(file + constant.slot, &constant.bits, sizeof(Mask));
      for (int l = 0; l < kLanes && constant.bytes; ++l)
        std::memcpy(file + constant.slot + l * constant.bytes, &constant.bits, static_cast<size_t>(constant.bytes));
    }
    files.emplace_back(file, std::free);
  }
}

}  // namespace ptx
