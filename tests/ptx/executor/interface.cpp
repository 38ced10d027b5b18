#include "interface.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

namespace {

struct Loaded {
  std::unique_ptr<Module> module;
  std::map<std::string, std::unique_ptr<Program>> programs;  // those that were launched
};

std::mutex mutex;
std::vector<Loaded> loaded;
std::vector<std::string> offered;
std::string error, profile;
uint64_t seed = 1, launches = 0;

const Kernel* find(int module, const std::string& name) {
  if (module < 0 || module >= static_cast<int>(loaded.size())) return nullptr;
  for (const auto& kernel : loaded[static_cast<size_t>(module)].module->kernels)
    if (kernel->name == name) return kernel.get();
  return nullptr;
}

int load(const std::string& text) {
  loaded.push_back({parse(text), {}});
  return static_cast<int>(loaded.size()) - 1;
}

int module_of(const std::string& kernel) {
  for (int k = 0; k < static_cast<int>(loaded.size()); ++k)
    if (find(k, kernel)) return k;
  for (auto text = offered.begin(); text != offered.end(); ++text) {
    if (text->find(".entry " + kernel + "(") == std::string::npos) continue;
    const int number = load(*text);
    offered.erase(text);
    return number;
  }
  throw Fault("no PTX has the kernel " + kernel);
}

const Kernel& kernel_named(int module, const std::string& name) {
  const Kernel* const found = find(module, name);
  if (!found) throw Fault("no kernel " + name);
  return *found;
}

Program& program_of(int module, const std::string& name) {
  std::unique_ptr<Program>& program = loaded[static_cast<size_t>(module)].programs[name];
  if (!program) program = decode(*loaded[static_cast<size_t>(module)].module, kernel_named(module, name));
  return *program;
}

void launch(int module, const char* name, const uint32_t grid[3], const uint32_t block[3], size_t dynamic_bytes,
            const void* const* parameters, int given) {
  const Kernel& kernel = kernel_named(module, name);
  if (given > static_cast<int>(kernel.parameters.size()))
    throw Fault("more arguments than parameters of " + kernel.name);
  std::vector<uint64_t> memory(kernel.parameter_bytes / sizeof(uint64_t) + 2);
  char* const bytes = reinterpret_cast<char*>(memory.data());
  for (int k = 0; k < given; ++k) {
    const Parameter& parameter = kernel.parameters[static_cast<size_t>(k)];
    std::memcpy(bytes + parameter.offset, parameters[k], parameter.bytes);
  }
  Launch launch;
  launch.grid = {grid[0], grid[1], grid[2]};
  launch.block = {block[0], block[1], block[2]};
  launch.dynamic_bytes = dynamic_bytes;
  launch.seed = seed + 0x9E3779B97F4A7C15u * ++launches;
  launch.parameters = bytes;
  Program& program = program_of(module, name);
  ++program.launches;
  run(program, launch);
}

// Runs f; 0, or 1 and the reason.
template <class F>
int guarded(F f) {
  const std::lock_guard<std::mutex> lock(mutex);
  try {
    f();
    return 0;
  } catch (const std::exception& fault) {
    error = fault.what();
    return 1;
  }
}

template <class F>
void each_program(F f) {
  for (Loaded& one : loaded)
    for (auto& [name, program] : one.programs)
      if (program) f(*program);
}

}  // namespace

}  // namespace ptx

using namespace ptx;

extern "C" {

const char* ptx_error() {
  return error.c_str();
}

int ptx_load(const char* text) {
  int number = -1;
  guarded([&] { number = load(text); });
  return number;
}

void ptx_offer(const char* text) {
  guarded([&] { offered.emplace_back(text); });
}

int ptx_module_of(const char* kernel) {
  int number = -1;
  guarded([&] { number = module_of(kernel); });
  return number;
}

void ptx_allow(uint64_t address, uint64_t bytes) {
  buffers.add(address, bytes);
}

void ptx_forget_all() {
  buffers.clear();
}

int ptx_launch(int module, const char* kernel, const uint32_t grid[3], const uint32_t block[3], size_t dynamic_bytes,
               const void* const* parameters, int given) {
  return guarded([&] { launch(module, kernel, grid, block, dynamic_bytes, parameters, given); });
}

int ptx_parameters(int module, const char* kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Kernel* const found = find(module, kernel);
  return found ? static_cast<int>(found->parameters.size()) : -1;
}

size_t ptx_parameter_bytes(int module, const char* kernel, int parameter) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Kernel* const found = find(module, kernel);
  return found ? found->parameters.at(static_cast<size_t>(parameter)).bytes : 0;
}

void ptx_seed(uint64_t value) {
  seed = value;
  launches = 0;
}

void ptx_approximate(int units) {
  approximation_error = units;
}

void ptx_reset_counts() {
  each_program([](Program& program) {
    program.bytes_read = program.bytes_written = program.launches = 0;
    for (Instruction& instruction : program.code) instruction.issues = instruction.lanes = 0;
  });
}

void ptx_counts(PtxCounts* counts) {
  *counts = {};
  each_program([&](const Program& program) {
    counts->launches += program.launches;
    counts->bytes_read += program.bytes_read;
    counts->bytes_written += program.bytes_written;
    for (const Instruction& instruction : program.code) {
      if (!instruction.is_counted) continue;
      counts->instructions += instruction.issues;
      counts->lane_instructions += instruction.lanes;
    }
  });
}

const char* ptx_profile() {
  profile.clear();
  each_program([&](const Program& program) {
    for (const Instruction& instruction : program.code) {
      if (!instruction.is_counted || instruction.issues == 0) continue;
      const Statement& statement = program.kernel->statements[static_cast<size_t>(instruction.statement)];
      profile += program.kernel->name + "\t" + std::to_string(statement.line) + "\t" +
                 std::to_string(instruction.issues) + "\t" + std::to_string(instruction.lanes) + "\t" + statement.text +
                 "\n";
    }
  });
  return profile.c_str();
}

}  // extern "C"
