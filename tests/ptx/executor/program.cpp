#include "program.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>

namespace ptx {

namespace {

// --- tokens -----------------------------------------------------------------------------------------------------

struct Token {
  std::string text;
  int line = 0;
  bool is_word() const {
    return std::isalnum(static_cast<unsigned char>(text[0])) || std::strchr("_$%.", text[0]) != nullptr;
  }
};

bool is_word_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_$%.", c) != nullptr;
}

std::vector<Token> tokens_of(const std::string& text) {
  std::vector<Token> tokens;
  int line = 1;
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    if (c == '\n') ++line;
    if (c == '\0' || std::isspace(static_cast<unsigned char>(c))) {
      ++at;
    } else if (text.compare(at, 2, "//") == 0) {
      at = std::min(text.find('\n', at), text.size());
    } else if (text.compare(at, 2, "/*") == 0) {
      const size_t end = std::min(text.find("*/", at), text.size());
      line += static_cast<int>(std::count(text.begin() + at, text.begin() + end, '\n'));
      at = std::min(end + 2, text.size());
    } else if (c == '"') {
      const size_t end = std::min(text.find('"', at + 1), text.size() - 1);
      tokens.push_back({text.substr(at, end + 1 - at), line});
      at = end + 1;
    } else if (is_word_character(c)) {
      size_t end = at;
      // Two colons are within a word (.shared::cta), one ends it.
      while (end < text.size() && (is_word_character(text[end]) || text.compare(end, 2, "::") == 0))
        end += text[end] == ':' ? 2 : 1;
      tokens.push_back({text.substr(at, end - at), line});
      at = end;
    } else {
      tokens.push_back({std::string(1, c), line});
      ++at;
    }
  }
  return tokens;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

size_t aligned(size_t offset, size_t alignment) {
  return (offset + alignment - 1) / alignment * alignment;
}

// --- declarations -----------------------------------------------------------------------------------------------

// A variable of any space.
struct Variable {
  std::string name;
  Space space = Space::none;
  size_t alignment = 1, bytes = 0;
  int element = 1;  // bytes
};

struct Function {
  std::vector<std::string> returns, parameters;
  size_t body = 0;  // the token behind its brace; 0 for one without
};

// Names that are visible in a pair of braces.
struct Scope {
  const Scope* outer = nullptr;
  int number = 0;
  std::map<std::string, int> registers;
  std::map<std::string, Operand> variables;
};

const std::set<std::string> kSpecial = {"%tid.x",
                                        "%tid.y",
                                        "%tid.z",
                                        "%ntid.x",
                                        "%ntid.y",
                                        "%ntid.z",
                                        "%ctaid.x",
                                        "%ctaid.y",
                                        "%ctaid.z",
                                        "%nctaid.x",
                                        "%nctaid.y",
                                        "%nctaid.z",
                                        "%laneid",
                                        "%warpid",
                                        "%nwarpid",
                                        "%gridid",
                                        "%smid",
                                        "%nsmid",
                                        "%clock",
                                        "%clock64",
                                        "%clock_hi",
                                        "%globaltimer",
                                        "%warp_id",
                                        "%lanemask_eq",
                                        "%lanemask_lt",
                                        "%lanemask_le",
                                        "%lanemask_gt",
                                        "%lanemask_ge",
                                        "%clusterid.x",
                                        "%cluster_ctarank",
                                        "%cluster_nctarank",
                                        "%cluster_ctaid.x",
                                        "%cluster_nctaid.x",
                                        "%dynamic_smem_size",
                                        "%total_smem_size",
                                        "WARP_SZ",
                                        "%globaltimer_lo",
                                        "%globaltimer_hi"};

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(tokens_of(text)), module_(std::make_unique<Module>()) {}

  std::unique_ptr<Module> module() {
    module_->shared_bytes = kSharedBegin;
    while (at_ < tokens_.size()) top_level();
    for (const auto& [body, name] : bodies_) kernel(body, name);
    // Dynamic memory begins behind all static variables, which are known now.
    const size_t dynamic = aligned(module_->shared_bytes, 128);
    module_->shared_bytes = dynamic;
    for (const auto& kernel : module_->kernels)
      for (Statement& statement : kernel->statements)
        for (Operand& operand : statement.operands)
          if (operand.kind == Operand::Kind::variable && operand.space == Space::shared && operand.bits == kDynamic)
            operand.bits = dynamic;
    return std::move(module_);
  }

 private:
  static constexpr uint64_t kDynamic = ~uint64_t{0};
  struct Head {
    std::vector<Variable> parameters;
    size_t body = 0;
  };

  // --- reading tokens

  const Token& peek(size_t ahead = 0) const {
    if (at_ + ahead >= tokens_.size()) throw Fault("the PTX ends too early");
    return tokens_[at_ + ahead];
  }
  bool next_is(const char* text) const { return at_ < tokens_.size() && tokens_[at_].text == text; }
  Token take() {
    const Token token = peek();
    ++at_;
    return token;
  }
  bool take_if(const char* text) {
    if (!next_is(text)) return false;
    ++at_;
    return true;
  }
  void expect(const char* text) {
    if (!take_if(text)) fail("expected " + std::string(text) + ", found " + peek().text);
  }
  [[noreturn]] void fail(const std::string& message) const {
    const int line = at_ < tokens_.size() ? tokens_[at_].line : 0;
    throw Fault("line " + std::to_string(line) + " of the PTX: " + message);
  }
  void skip_to_end_of_line() {
    const int line = tokens_[at_ - 1].line;
    while (at_ < tokens_.size() && tokens_[at_].line == line) ++at_;
  }
  void skip_braces() {
    expect("{");
    for (int depth = 1; depth > 0;) {
      const std::string text = take().text;
      depth += text == "{" ? 1 : text == "}" ? -1 : 0;
    }
  }
  static uint64_t integer(const std::string& text) {
    if (text.size() > 2 && text[0] == '0' && (text[1] == 'b' || text[1] == 'B'))
      return std::strtoull(text.c_str() + 2, nullptr, 2);
    return std::strtoull(text.c_str(), nullptr, 0);
  }

  // --- the outermost level

  void top_level() {
    const Token token = take();
    const std::string& word = token.text;
    if (word == ".version" || word == ".target" || word == ".address_size" || word == ".file" || word == ".loc") {
      skip_to_end_of_line();
    } else if (word == ".section") {
      take();
      skip_braces();
    } else if (word == ".visible" || word == ".extern" || word == ".weak" || word == ".common") {
      is_extern_ = word == ".extern";
      return;  // of what follows
    } else if (word == ".entry") {
      entry();
    } else if (word == ".func") {
      function();
    } else if (word == ".global" || word == ".const" || word == ".shared") {
      --at_;
      Variable variable = declaration();
      declare(variable, &outermost_, nullptr);
    } else if (word == ".pragma" || word == ".alias") {
      while (!take_if(";")) take();
    } else if (word != ";") {
      --at_;
      fail("unknown directive " + word);
    }
    is_extern_ = false;
  }

  void entry() {
    const std::string name = take().text;
    std::vector<Variable> parameters;
    if (next_is("(")) parameters = parameter_list();
    while (!next_is("{")) take();  // performance directives
    heads_[name] = {parameters, at_ + 1};
    bodies_.emplace_back(at_ + 1, name);
    skip_braces();
  }

  void function() {
    Function made;
    const auto names = [this] {
      std::vector<std::string> found;
      for (const Variable& variable : parameter_list()) found.push_back(variable.name);
      return found;
    };
    while (next_is(".attribute")) skip_attribute();
    if (next_is("(")) made.returns = names();
    const std::string name = take().text;
    if (next_is("(")) made.parameters = names();
    while (!next_is("{") && !next_is(";")) take();
    if (next_is("{")) {
      made.body = at_ + 1;
      skip_braces();
    }
    if (made.body || !functions_.count(name)) functions_[name] = made;
  }

  void skip_attribute() {
    take();
    while (!take_if(")")) take();
  }

  std::vector<Variable> parameter_list() {
    std::vector<Variable> found;
    expect("(");
    while (!take_if(")")) {
      found.push_back(declaration());
      take_if(",");
    }
    return found;
  }

  // .space [.align n] .type name[size]; of a .param pointer also what it points to.
  Variable declaration() {
    static const std::map<std::string, Space> spaces = {{".param", Space::param},    {".global", Space::global},
                                                        {".const", Space::constant}, {".shared", Space::shared},
                                                        {".local", Space::local},    {".reg", Space::none}};
    Variable variable;
    const std::string space = take().text;
    if (!spaces.count(space)) fail("not a declaration: " + space);
    variable.space = spaces.at(space);
    bool is_pointer = false;
    for (;;) {
      const std::string word = take().text;
      if (word == ".align") {
        const size_t alignment = integer(take().text);
        if (!is_pointer) variable.alignment = std::max(variable.alignment, alignment);
      } else if (word == ".ptr") {
        is_pointer = true;
      } else if (word == ".attribute") {
        while (!take_if(")")) take();
      } else if (word[0] == '.') {
        static const std::set<std::string> pointed = {".global", ".const", ".shared", ".local"};
        if (is_pointer && pointed.count(word)) continue;
        if (word == ".v2" || word == ".v4") {
          variable.bytes = word == ".v2" ? 2 : 4;
          continue;
        }
        variable.element = bytes_of(word.substr(1));
      } else {
        variable.name = word;
        break;
      }
    }
    variable.bytes = std::max<size_t>(variable.bytes, 1) * std::max(variable.element, 1);
    variable.alignment = std::max<size_t>(variable.alignment, std::max(variable.element, 1));
    while (take_if("[")) {
      if (next_is("]"))
        variable.bytes = 0;  // of a size that the launch says
      else
        variable.bytes *= integer(take().text);
      expect("]");
    }
    return variable;
  }

  // Gives a variable a place. The declaration may go on with initial values.
  void declare(const Variable& variable, Scope* scope, Kernel* kernel) {
    Operand operand;
    operand.kind = Operand::Kind::variable;
    operand.space = variable.space;
    operand.name = variable.name;
    if (variable.space == Space::shared) {
      if (variable.bytes == 0) {
        operand.bits = kDynamic;
      } else {
        operand.bits = aligned(module_->shared_bytes, variable.alignment);
        module_->shared_bytes = operand.bits + variable.bytes;
      }
    } else if (variable.space == Space::global || variable.space == Space::constant) {
      auto memory = std::make_unique<std::vector<uint64_t>>(variable.bytes / 8 + 2);
      operand.bits = reinterpret_cast<uint64_t>(memory->data());
      operand.bits = aligned(operand.bits, 16) - operand.bits < 16 ? aligned(operand.bits, 16) : operand.bits;
      char* bytes = reinterpret_cast<char*>(operand.bits);
      if (take_if("=")) initialize(bytes, variable.element);
      module_->variables.push_back(std::move(memory));
    } else {
      // What a function is called with is a thread's own, as its local memory is.
      operand.space = Space::local;
      operand.bits = aligned(kernel->local_bytes, std::max<size_t>(variable.alignment, 8));
      kernel->local_bytes = operand.bits + variable.bytes;
    }
    scope->variables[variable.name] = operand;
    if (!next_is(",")) take_if(";");
  }

  void initialize(char* bytes, int element) {
    const bool is_list = take_if("{");
    do {
      if (is_list && next_is("}")) break;
      const Operand value = number();
      std::memcpy(bytes, &value.bits, static_cast<size_t>(element));
      bytes += element;
    } while (take_if(","));
    if (is_list) expect("}");
  }

  // --- kernels

  void kernel(size_t body, const std::string& name) {
    auto made = std::make_unique<Kernel>();
    made->name = name;
    Scope scope;
    scope.outer = &outermost_;
    for (const Variable& variable : heads_[name].parameters) {
      const size_t offset = aligned(made->parameter_bytes, variable.alignment);
      made->parameters.push_back({variable.name, offset, variable.bytes});
      made->parameter_bytes = offset + variable.bytes;
      Operand operand;
      operand.kind = Operand::Kind::variable;
      operand.space = Space::param;
      operand.name = variable.name;
      operand.bits = offset;
      scope.variables[variable.name] = operand;
    }
    labels_.clear();
    pending_.clear();
    scopes_ = 0;
    const size_t before = at_;
    at_ = body;
    block(*made, scope, {});
    at_ = before;
    for (const Pending& branch : pending_) {
      Statement& statement = made->statements[branch.statement];
      if (branch.is_table)
        statement.targets.push_back(label_at(branch));
      else
        statement.target = label_at(branch);
    }
    module_->kernels.push_back(std::move(made));
  }

  struct Pending {
    size_t statement;
    std::string label;
    std::vector<int> scopes;  // innermost first
    bool is_table;
  };

  int label_at(const Pending& branch) const {
    for (const int scope : branch.scopes) {
      const auto found = labels_.find(std::to_string(scope) + ":" + branch.label);
      if (found != labels_.end()) return found->second;
    }
    throw Fault("no label " + branch.label);
  }

  // Statements up to the closing brace. In the body of a function, `end` is the label that it returns to.
  void block(Kernel& kernel, Scope& scope, const std::string& end) {
    scope.number = ++scopes_;
    while (!take_if("}")) {
      if (take_if(";")) continue;
      if (take_if("{")) {
        Scope inner;
        inner.outer = &scope;
        block(kernel, inner, end);
        continue;
      }
      const std::string& word = peek().text;
      if (word == ".reg") {
        registers(kernel, scope);
      } else if (word == ".param" || word == ".local" || word == ".shared" || word == ".global" || word == ".const") {
        declare(declaration(), &scope, &kernel);
      } else if (word == ".loc" || word == ".file") {
        take();
        skip_to_end_of_line();
      } else if (word == ".pragma") {
        while (!take_if(";")) take();
      } else if (peek(1).text == ":") {
        const std::string label = take().text;
        take();
        if (next_is(".branchtargets")) {
          take();
          std::vector<std::string>& table = tables_[label];
          table.clear();
          while (!take_if(";"))
            if (!take_if(",")) table.push_back(take().text);
          continue;
        }
        labels_[std::to_string(scope.number) + ":" + label] = static_cast<int>(kernel.statements.size());
      } else {
        statement(kernel, scope, end);
      }
    }
  }

  void registers(Kernel& kernel, Scope& scope) {
    take();
    std::string type = take().text;
    int count = 1;
    if (type == ".v2" || type == ".v4") fail("vectors of registers are not known");
    const int bytes = bytes_of(type.substr(1));
    do {
      const std::string name = take().text;
      count = 1;
      const bool is_range = take_if("<");
      if (is_range) {
        count = static_cast<int>(integer(take().text));
        expect(">");
      }
      for (int k = 0; k < count; ++k) {
        const std::string full = is_range ? name + std::to_string(k) : name;
        scope.registers[full] = static_cast<int>(kernel.registers.size());
        kernel.registers.push_back({full, bytes});
      }
    } while (take_if(","));
    expect(";");
  }

  // --- statements

  void statement(Kernel& kernel, Scope& scope, const std::string& end) {
    Statement made;
    const size_t first = at_;
    made.line = peek().line;
    if (take_if("@")) {
      made.guard_negated = take_if("!");
      made.guard = register_named(take().text, scope);
    }
    made.opcode = split(take().text, '.');
    if (made.name() == "call") return call(kernel, scope, made, first);
    while (!take_if(";")) {
      made.operands.push_back(operand(scope));
      if (!next_is(";")) expect(",");
    }
    for (size_t k = first; k + 1 < at_; ++k) {
      const std::string& text = tokens_[k].text;
      const bool joins = k == first || text == "," || text == "]" || text == "}" || tokens_[k - 1].text == "@" ||
                         tokens_[k - 1].text == "[" || tokens_[k - 1].text == "-" || tokens_[k - 1].text == "+" ||
                         tokens_[k - 1].text == "{" || tokens_[k - 1].text == "!" || text == "+" || text == "|" ||
                         tokens_[k - 1].text == "|" || (text == "-" && tokens_[k - 1].text == "+");
      made.text += (joins ? "" : " ") + text;
    }
    const size_t index = kernel.statements.size();
    if (made.name() == "bra") {
      pending_.push_back({index, made.operands.at(0).name, numbers_of(scope), false});
    } else if (made.name() == "brx") {
      for (const std::string& label : tables_[made.operands.at(1).name])
        pending_.push_back({index, label, numbers_of(scope), true});
    } else if (made.name() == "ret" && !end.empty()) {
      made.opcode = {"bra"};
      pending_.push_back({index, end, {0}, false});
    }
    kernel.statements.push_back(std::move(made));
  }

  static std::vector<int> numbers_of(const Scope& scope) {
    std::vector<int> numbers;
    for (const Scope* at = &scope; at; at = at->outer) numbers.push_back(at->number);
    return numbers;
  }

  // call (returned), function, (given): the function's body, in which its parameters are the caller's variables.
  void call(Kernel& kernel, Scope& scope, const Statement& head, size_t first) {
    std::vector<std::string> returned, given;
    std::string name;
    const auto names = [this](std::vector<std::string>& into) {
      expect("(");
      while (!take_if(")"))
        if (!take_if(",")) into.push_back(take().text);
    };
    if (next_is("(")) names(returned), expect(",");
    name = take().text;
    if (take_if(",")) names(given);
    expect(";");
    std::string text;
    for (size_t k = first; k + 1 < at_; ++k) text += tokens_[k].text + " ";
    const auto found = functions_.find(name);
    if (found == functions_.end() || found->second.body == 0) {
      // What has no body is the driver's: assertions that fail, prints. It must not be run.
      Statement trap = head;
      trap.text = text;
      trap.opcode = {"trap"};
      kernel.statements.push_back(trap);
      return;
    }
    const Function& function = found->second;
    if (head.guard >= 0) fail("calls under a guard are not known: " + text);
    if (given.size() != function.parameters.size() || returned.size() != function.returns.size())
      fail("wrong number of arguments: " + text);
    if (++depth_ > 16) fail("functions that call themselves are not known: " + text);
    Scope inner;
    inner.outer = &outermost_;
    const auto bind = [&](const std::vector<std::string>& formal, const std::vector<std::string>& actual) {
      for (size_t k = 0; k < formal.size(); ++k) {
        if (const Operand* variable = variable_named(actual[k], scope))
          inner.variables[formal[k]] = *variable;
        else
          inner.registers[formal[k]] = register_named(actual[k], scope);
      }
    };
    bind(function.parameters, given);
    bind(function.returns, returned);
    const std::string end = "end of call " + std::to_string(++calls_);
    const size_t after = at_;
    at_ = function.body;
    block(kernel, inner, end);
    at_ = after;
    labels_["0:" + end] = static_cast<int>(kernel.statements.size());
    --depth_;
  }

  static const Operand* variable_named(const std::string& name, const Scope& scope) {
    for (const Scope* at = &scope; at; at = at->outer) {
      const auto found = at->variables.find(name);
      if (found != at->variables.end()) return &found->second;
    }
    return nullptr;
  }

  int register_named(const std::string& name, const Scope& scope) const {
    for (const Scope* at = &scope; at; at = at->outer) {
      const auto found = at->registers.find(name);
      if (found != at->registers.end()) return found->second;
    }
    fail("no register " + name);
  }

  static bool has_register(const std::string& name, const Scope& scope) {
    for (const Scope* at = &scope; at; at = at->outer)
      if (at->registers.count(name)) return true;
    return false;
  }

  Operand operand(const Scope& scope) {
    if (take_if("[")) {
      Operand address = operand(scope);
      address.is_address = true;
      while (next_is("+") || next_is("-")) {
        take_if("+");
        address.offset += static_cast<int64_t>(number().bits);
      }
      expect("]");
      return address;
    }
    if (take_if("{")) {
      Operand list;
      list.kind = Operand::Kind::list;
      while (!take_if("}")) {
        list.list.push_back(operand(scope));
        take_if(",");
      }
      return list;
    }
    if (take_if("!")) {
      Operand negated = operand(scope);
      negated.negated = true;
      return negated;
    }
    const std::string& word = peek().text;
    if (word == "-" || std::isdigit(static_cast<unsigned char>(word[0]))) return number();
    Operand made;
    made.name = take().text;
    if (made.name == "_") {
      if (take_if("|")) made.second = register_named(take().text, scope);
      return made;
    }
    if (has_register(made.name, scope)) {
      made.kind = Operand::Kind::reg;
      made.reg = register_named(made.name, scope);
      if (take_if("|") && !take_if("_")) made.second = register_named(take().text, scope);
    } else if (const Operand* variable = variable_named(made.name, scope)) {
      made = *variable;
      if (next_is("+")) {
        take();
        made.offset += static_cast<int64_t>(number().bits);
      }
    } else if (kSpecial.count(made.name)) {
      made.kind = Operand::Kind::special;
    } else if (made.name[0] == '%') {
      fail("no register " + made.name);
    } else {
      made.kind = Operand::Kind::label;
    }
    return made;
  }

  Operand number() {
    Operand made;
    made.kind = Operand::Kind::number;
    const bool is_negative = take_if("-");
    std::string text = take().text;
    if (text.size() > 2 && text[0] == '0' && std::strchr("fF", text[1])) {
      made.bits = std::strtoull(text.c_str() + 2, nullptr, 16);
    } else if (text.size() > 2 && text[0] == '0' && std::strchr("dD", text[1])) {
      made.bits = std::strtoull(text.c_str() + 2, nullptr, 16);
    } else if (text.find('.') != std::string::npos) {
      const double value = std::strtod(text.c_str(), nullptr);
      std::memcpy(&made.bits, &value, sizeof value);
      made.is_double = true;
      if (is_negative) made.bits ^= uint64_t{1} << 63;
      return made;
    } else {
      if (!text.empty() && (text.back() == 'U' || text.back() == 'u')) text.pop_back();
      made.bits = integer(text);
    }
    if (is_negative) made.bits = 0 - made.bits;
    return made;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  bool is_extern_ = false;
  std::unique_ptr<Module> module_;
  Scope outermost_;
  std::map<std::string, Head> heads_;
  std::map<std::string, Function> functions_;
  std::vector<std::pair<size_t, std::string>> bodies_;
  std::map<std::string, int> labels_;  // by scope and name
  std::map<std::string, std::vector<std::string>> tables_;
  std::vector<Pending> pending_;
  int scopes_ = 0, calls_ = 0, depth_ = 0;
};

}  // namespace

int bytes_of(const std::string& type) {
  if (type == "pred") return 0;
  if (type == "f16x2" || type == "bf16x2") return 4;
  if (type == "f32x2") return 8;
  size_t digits = 0;
  while (digits < type.size() && !std::isdigit(static_cast<unsigned char>(type[digits]))) ++digits;
  const int bits = std::atoi(type.c_str() + digits);
  if (bits % 8 || bits == 0) throw Fault("no type ." + type);
  return bits / 8;
}

std::unique_ptr<Module> parse(const std::string& text) {
  return Parser(text).module();
}

}  // namespace ptx
