// PTX text, read: kernels as lists of statements, with their names resolved. Calls of functions are expanded in place.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// What is wrong with a program, or with what it does.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Space { none, param, shared, global, local, constant, generic };

struct Register {
  std::string name;
  int bytes = 0;  // 0 for a predicate
};

struct Operand {
  enum class Kind { absent, number, reg, special, variable, label, list };
  Kind kind = Kind::absent;
  bool is_address = false;  // in brackets
  bool negated = false;     // a predicate with ! before it
  int reg = -1;
  int second = -1;         // the predicate of d|p
  uint64_t bits = 0;       // of a number; of a variable, its address in its space
  bool is_double = false;  // bits are of a decimal number or one of 64 bits: a number of the operation's type is meant
  Space space = Space::none;  // of a variable
  int64_t offset = 0;         // of an address
  std::string name;           // of a label or a special register
  std::vector<Operand> list;
};

struct Statement {
  std::string text;
  int line = 0;
  int guard = -1;  // a register, or none
  bool guard_negated = false;
  std::vector<std::string> opcode;  // between dots
  std::vector<Operand> operands;
  int target = -1;           // of a branch
  std::vector<int> targets;  // of an indexed one

  const std::string& name() const { return opcode[0]; }
  const std::string& type() const { return opcode.back(); }
  bool has(const char* modifier) const {
    for (size_t k = 1; k < opcode.size(); ++k)
      if (opcode[k] == modifier) return true;
    return false;
  }
  // The one that the opcode has of some modifiers; empty if none.
  std::string one_of(std::initializer_list<const char*> modifiers) const {
    for (const char* modifier : modifiers)
      if (has(modifier)) return modifier;
    return "";
  }
};

struct Parameter {
  std::string name;
  size_t offset = 0, bytes = 0;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  size_t parameter_bytes = 0;
  size_t local_bytes = 0;  // a thread
  std::vector<Register> registers;
  std::vector<Statement> statements;
};

struct Module {
  std::vector<std::unique_ptr<Kernel>> kernels;
  size_t shared_bytes = 0;  // of static variables: an extern one, the dynamic memory, begins behind them
  std::vector<std::unique_ptr<std::vector<uint64_t>>> variables;  // global and constant ones
};

// Shared memory begins here: what lies before it is no variable's, as on the hardware, so that a null pointer is none.
constexpr uint64_t kSharedBegin = 1024;

// Bytes of a type such as f32 or b8x16; 0 for a predicate.
int bytes_of(const std::string& type);

std::unique_ptr<Module> parse(const std::string& text);

}  // namespace ptx
