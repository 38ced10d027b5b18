// Loads, stores, atomics and copies. Every access is checked: its alignment, and that it stays within its memory.
#include <algorithm>
#include <cstdlib>

#include "decoder.h"
#include "numbers.h"

namespace ptx {

namespace {

// --- addresses --------------------------------------------------------------------------------------------------

Space space_of(const Decoder& d, const Operand& address) {
  if (address.kind == Operand::Kind::variable) return address.space;
  if (d.has("global") || d.has("const")) return Space::global;
  if (d.has("shared") || d.has("shared::cta") || d.has("shared::cluster")) return Space::shared;
  if (d.has("local")) return Space::local;
  if (d.has("param") || d.has("param::entry")) return Space::param;
  if (d.has("param::func")) return Space::local;
  return Space::generic;
}

// Slot 0 has the addresses, of 4 bytes if number[1] says so, else of 8; the offset is the instruction's.
void take_address(Decoder& d, const Operand& operand) {
  if (!operand.is_address) throw Fault("an address without brackets");
  Instruction& i = d.instruction;
  Operand base = operand;
  base.offset = 0;
  i.number[1] = d.bytes_of_operand(operand) == 4;
  i.slot[0] = d.source(base, i.number[1] ? 4 : 8);
  i.offset = operand.offset;
}

Vector<uint64_t> addresses(Warp& warp, const Instruction& i) {
  Vector<uint64_t> found;
  if (i.number[1])
    for (int l = 0; l < kLanes; ++l)
      found.lane[l] = static_cast<uint32_t>(warp.at<uint32_t>(i.slot[0]).lane[l] + static_cast<uint32_t>(i.offset));
  else
    for (int l = 0; l < kLanes; ++l)
      found.lane[l] = warp.at<uint64_t>(i.slot[0]).lane[l] + static_cast<uint64_t>(i.offset);
  return found;
}

enum class Access { load, store, both };

const char* verb(Access access) {
  return access == Access::load ? "a read" : access == Access::store ? "a write" : "an atomic operation";
}

[[noreturn]] void out_of_bounds(int lane, Access access, const std::string& complaint) {
  throw LaneFault(lane, std::string(verb(access)) + " out of bounds: " + complaint);
}

bool is_variable_of(const Module& module, uint64_t address, uint64_t bytes) {
  for (const auto& variable : module.variables) {
    const auto begin = reinterpret_cast<uint64_t>(variable->data());
    if (begin <= address && address + bytes <= begin + variable->size() * sizeof(uint64_t)) return true;
  }
  return false;
}

void check_global(Warp& warp, const Vector<uint64_t>& at, Mask mask, uint64_t bytes, Access access) {
  const Buffer* buffer = nullptr;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1) || (buffer && buffer->contains(at.lane[l], bytes))) continue;
    buffer = buffers.at_or_before(at.lane[l]);
    if (buffer && buffer->contains(at.lane[l], bytes)) continue;
    buffer = nullptr;
    if (!is_variable_of(*warp.program->module, at.lane[l], bytes))
      out_of_bounds(l, access, buffers.complaint(at.lane[l], bytes));
  }
  // Lanes side by side that read the same are served at once.
  uint64_t moved = 0, before = ~uint64_t{0};
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    if (access != Access::load || at.lane[l] != before) moved += bytes;
    before = at.lane[l];
  }
  if (access != Access::store) warp.program->bytes_read += moved;
  if (access != Access::load) warp.program->bytes_written += moved;
}

// What each lane is about to write, side by side; of loads, atomics and copies nothing.
struct Written {
  const char* of_lane_0 = nullptr;
  const char* of(int lane, uint64_t bytes) const {
    return of_lane_0 ? of_lane_0 + static_cast<size_t>(lane) * bytes : nullptr;
  }
};

char* shared_at(Warp& warp, uint64_t address, uint64_t bytes, int lane, Access access, const Written& written) {
  Block& block = *warp.block;
  if (address < kSharedBegin || address + bytes > block.shared.size())
    out_of_bounds(lane, access,
                  std::to_string(bytes) + " bytes at " + std::to_string(address) + " of shared memory, which has [" +
                      std::to_string(kSharedBegin) + ", " + std::to_string(block.shared.size()) + ")");
  static constexpr SharedMemory::Access accesses[] = {SharedMemory::Access::read, SharedMemory::Access::write,
                                                      SharedMemory::Access::atomic};
  const char* const value = written.of(lane, bytes);
  const std::string complaint =
      block.shared.complaint(address, bytes, accesses[static_cast<int>(access)], warp.number * kLanes + lane,
                             {block.barriers, warp.barriers}, value);
  if (!complaint.empty()) throw LaneFault(lane, complaint + ": at " + std::to_string(address));
  // At once, so that the next lane finds it.
  if (value) std::memcpy(block.shared.data() + address, value, bytes);
  return block.shared.data() + address;
}

char* local_at(Warp& warp, uint64_t address, uint64_t bytes, int lane, Access access) {
  const size_t size = warp.program->kernel->local_bytes;
  if (address + bytes > size || address > size) out_of_bounds(lane, access, "local memory");
  return warp.local.data() + static_cast<size_t>(lane) * size + address;
}

char* parameter_at(Warp& warp, uint64_t address, uint64_t bytes, int lane, Access access) {
  if (address + bytes > warp.program->kernel->parameter_bytes || address > warp.program->kernel->parameter_bytes)
    out_of_bounds(lane, access, "the kernel's parameters");
  if (access != Access::load) throw LaneFault(lane, "a write to the kernel's parameters");
  return const_cast<char*>(warp.block->parameters) + address;
}

// Where the lanes of a mask access so many bytes each.
template <Space space>
Vector<char*> places(Warp& warp, const Instruction& i, Mask mask, uint64_t bytes, Access access,
                     const Written& written = {}) {
  const Vector<uint64_t> at = addresses(warp, i);
  Vector<char*> found;
  uint64_t all = 0;
  for (int l = 0; l < kLanes; ++l) all |= mask >> l & 1 ? at.lane[l] : 0;
  if (all & (bytes - 1)) {
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1 && at.lane[l] & (bytes - 1))
        throw LaneFault(l, std::string(verb(access)) + " of " + std::to_string(bytes) + " bytes is misaligned: at " +
                               std::to_string(at.lane[l]));
  }
  if constexpr (space == Space::global) {
    check_global(warp, at, mask, bytes, access);
    for (int l = 0; l < kLanes; ++l) found.lane[l] = reinterpret_cast<char*>(at.lane[l]);
    return found;
  }
  Mask global = 0;
  for (Mask left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    const uint64_t address = at.lane[l];
    if constexpr (space == Space::shared) {
      found.lane[l] = shared_at(warp, address, bytes, l, access, written);
    } else if constexpr (space == Space::local) {
      found.lane[l] = local_at(warp, address, bytes, l, access);
    } else if constexpr (space == Space::param) {
      found.lane[l] = parameter_at(warp, address, bytes, l, access);
    } else {
      const uint64_t window = address & kWindows, within = address & ~kWindows;
      if (window == kSharedWindow) {
        found.lane[l] = shared_at(warp, within, bytes, l, access, written);
      } else if (window == kLocalWindow) {
        found.lane[l] = local_at(warp, within, bytes, l, access);
      } else if (window == kParameterWindow) {
        found.lane[l] = parameter_at(warp, within, bytes, l, access);
      } else {
        global |= Mask{1} << l;
        found.lane[l] = reinterpret_cast<char*>(address);
      }
    }
  }
  if (global) check_global(warp, at, global, bytes, access);
  return found;
}

// --- loads and stores -------------------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint64_t word[2];
};

// number[0] elements from slot 1 on.
template <class T, Space space>
void load(Warp& warp, const Instruction& i, Mask mask) {
  const Vector<char*> from = places<space>(warp, i, mask, sizeof(T) * static_cast<uint64_t>(i.number[0]), Access::load);
  for (int k = 0; k < i.number[0]; ++k) {
    Vector<T>& to = warp.at<T>(i.slot[k + 1]);
    const size_t offset = static_cast<size_t>(k) * sizeof(T);
    if (mask == kAllLanes)
      for (int l = 0; l < kLanes; ++l) std::memcpy(&to.lane[l], from.lane[l] + offset, sizeof(T));
    else
      for (Mask left = mask; left; left &= left - 1) {
        const int l = __builtin_ctz(left);
        std::memcpy(&to.lane[l], from.lane[l] + offset, sizeof(T));
      }
  }
}

template <class T, Space space>
void store(Warp& warp, const Instruction& i, Mask mask) {
  const auto count = static_cast<size_t>(i.number[0]);
  T values[kLanes * Instruction::kMostSlots];
  for (int l = 0; l < kLanes; ++l)
    for (size_t k = 0; k < count; ++k) values[static_cast<size_t>(l) * count + k] = warp.at<T>(i.slot[k + 1]).lane[l];
  const Written written{reinterpret_cast<const char*>(values)};
  const size_t bytes = count * sizeof(T);
  const Vector<char*> to = places<space>(warp, i, mask, bytes, Access::store, written);
  for (Mask left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    std::memcpy(to.lane[l], written.of(l, bytes), bytes);
  }
}

template <class T>
Handler access_to(Space space, bool is_load) {
  switch (space) {
    case Space::param:
      return is_load ? load<T, Space::param> : store<T, Space::param>;
    case Space::shared:
      return is_load ? load<T, Space::shared> : store<T, Space::shared>;
    case Space::local:
      return is_load ? load<T, Space::local> : store<T, Space::local>;
    case Space::generic:
      return is_load ? load<T, Space::generic> : store<T, Space::generic>;
    default:
      return is_load ? load<T, Space::global> : store<T, Space::global>;
  }
}

Handler access_of(int bytes, Space space, bool is_load) {
  switch (bytes) {
    case 1:
      return access_to<uint8_t>(space, is_load);
    case 2:
      return access_to<uint16_t>(space, is_load);
    case 4:
      return access_to<uint32_t>(space, is_load);
    case 8:
      return access_to<uint64_t>(space, is_load);
    default:
      return access_to<Bytes16>(space, is_load);
  }
}

// The values of an access: one, or those of a list.
std::vector<Operand> values_of(const Operand& operand) {
  return operand.kind == Operand::Kind::list ? operand.list : std::vector<Operand>{operand};
}

bool decode_access(Decoder& d, bool is_load) {
  Instruction& i = d.instruction;
  const int bytes = bytes_of(d.type());
  const bool is_signed = d.type()[0] == 's';
  const Operand& address = d.operand(is_load ? 1 : 0);
  const std::vector<Operand> values = values_of(d.operand(is_load ? 0 : 1));
  const size_t wanted = d.has("v2") ? 2 : d.has("v4") ? 4 : d.has("v8") ? 8 : 1;
  if (values.size() != wanted) throw Fault("not as many registers as values");
  take_address(d, address);
  i.number[0] = static_cast<int>(values.size());
  for (size_t k = 0; k < values.size(); ++k)
    i.slot[k + 1] = is_load ? d.destination(values[k], bytes, is_signed) : d.source(values[k], bytes);
  d.runs(access_of(bytes, space_of(d, address), is_load));
  return true;
}

// --- atomics ----------------------------------------------------------------------------------------------------

enum Operation { op_add, op_min, op_max, op_and, op_or, op_xor, op_exch, op_cas, op_inc, op_dec };
constexpr const char* kOperations[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};

template <class T>
T sum(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  else if constexpr (std::is_floating_point_v<T>)
    return a + b;
  else
    return T::of(static_cast<double>(a.value()) + static_cast<double>(b.value()));
}
template <class T>
bool less(T a, T b) {
  if constexpr (std::is_arithmetic_v<T>)
    return a < b;
  else
    return a.value() < b.value();
}

template <class T>
T updated(int operation, T old, T b, T c) {
  switch (operation) {
    case op_add:
      return sum(old, b);
    case op_min:
      return less(b, old) ? b : old;
    case op_max:
      return less(old, b) ? b : old;
    case op_exch:
      return b;
    case op_cas:
      return std::memcmp(&old, &b, sizeof(T)) == 0 ? c : old;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (operation) {
      case op_and:
        return static_cast<T>(old & b);
      case op_or:
        return static_cast<T>(old | b);
      case op_xor:
        return static_cast<T>(old ^ b);
      case op_inc:
        return old >= b ? T{0} : static_cast<T>(old + 1);
      case op_dec:
        return old == 0 || old > b ? b : static_cast<T>(old - 1);
      default:
        break;
    }
  }
  throw Fault("no such atomic operation");
}

// number[0] elements: what was there goes to the slots from 1 on, operands are in those behind. number[2] is the
// operation. Lanes follow each other.
template <class T, Space space>
void atomic(Warp& warp, const Instruction& i, Mask mask) {
  const int count = i.number[0];
  const Vector<char*> at = places<space>(warp, i, mask, sizeof(T) * static_cast<uint64_t>(count), Access::both);
  for (Mask left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    for (int k = 0; k < count; ++k) {
      const auto operand = [&](int n) { return warp.at<T>(i.slot[1 + n * count + k]).lane[l]; };
      T old;
      char* const place = at.lane[l] + static_cast<size_t>(k) * sizeof(T);
      std::memcpy(&old, place, sizeof(T));
      const T made = updated<T>(i.number[2], old, operand(1), i.number[2] == op_cas ? operand(2) : T{});
      std::memcpy(place, &made, sizeof(T));
      warp.at<T>(i.slot[1 + k]).lane[l] = old;
    }
  }
}

template <class T>
Handler atomic_on(Space space) {
  switch (space) {
    case Space::shared:
      return atomic<T, Space::shared>;
    case Space::generic:
      return atomic<T, Space::generic>;
    default:
      return atomic<T, Space::global>;
  }
}

// Both numbers of a pair, one after the other.
template <class T>
struct Pair {
  T low, high;
};
template <class T>
Pair<T> sum(Pair<T> a, Pair<T> b) {
  return {sum(a.low, b.low), sum(a.high, b.high)};
}
template <class T, Space space>
void add_pair(Warp& warp, const Instruction& i, Mask mask) {
  const int count = i.number[0];
  const Vector<char*> at = places<space>(warp, i, mask, sizeof(Pair<T>) * static_cast<uint64_t>(count), Access::both);
  for (Mask left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    for (int k = 0; k < count; ++k) {
      Pair<T> old;
      char* const place = at.lane[l] + static_cast<size_t>(k) * sizeof old;
      std::memcpy(&old, place, sizeof old);
      const Pair<T> made = sum(old, warp.at<Pair<T>>(i.slot[1 + count + k]).lane[l]);
      std::memcpy(place, &made, sizeof made);
      warp.at<Pair<T>>(i.slot[1 + k]).lane[l] = old;
    }
  }
}
template <class T>
Handler add_pair_on(Space space) {
  return space == Space::shared    ? add_pair<T, Space::shared>
         : space == Space::generic ? add_pair<T, Space::generic>
                                   : add_pair<T, Space::global>;
}

bool decode_atomic(Decoder& d) {
  Instruction& i = d.instruction;
  const bool is_reduction = d.name() == "red";
  const std::string& type = d.type();
  const size_t at = is_reduction ? 0 : 1;
  const Operand& address = d.operand(at);
  const Space space = space_of(d, address);
  i.number[2] = -1;
  for (int k = 0; k < 10; ++k)
    if (d.has(kOperations[k])) i.number[2] = k;
  if (i.number[2] < 0 || d.has("async")) return false;
  take_address(d, address);
  const int bytes = bytes_of(type);
  const std::vector<Operand> values = values_of(d.operand(at + 1));
  const size_t count = values.size();
  const bool swaps = i.number[2] == op_cas;
  if (1 + count * (swaps ? 3 : 2) > Instruction::kMostSlots) d.unknown();
  i.number[0] = static_cast<int>(count);
  const std::vector<Operand> results = is_reduction ? std::vector<Operand>(count) : values_of(d.operand(0));
  for (size_t k = 0; k < count; ++k) {
    i.slot[1 + k] = d.destination(results.at(k), bytes);
    i.slot[1 + count + k] = d.source(values[k], bytes);
    if (swaps) i.slot[1 + 2 * count + k] = d.source(d.operand(at + 2), bytes);
  }
  const bool is_exchange = swaps || i.number[2] == op_exch;
  if (is_exchange && bytes == 16) d.unknown();
  if (type == "f32")
    d.runs(atomic_on<float>(space));
  else if (type == "f64")
    d.runs(atomic_on<double>(space));
  else if (type == "f16")
    d.runs(atomic_on<Half>(space));
  else if (type == "bf16")
    d.runs(atomic_on<Bfloat>(space));
  else if (type == "f16x2" && i.number[2] == op_add)
    d.runs(add_pair_on<Half>(space));
  else if (type == "bf16x2" && i.number[2] == op_add)
    d.runs(add_pair_on<Bfloat>(space));
  else
    return with_integer(type, [&](auto zero) { d.runs(atomic_on<decltype(zero)>(space)); });
  return true;
}

// --- copies into shared memory, and of matrices -----------------------------------------------------------------

// cp.async [to], [from], bytes{, of which so many are read and the rest are zeros}. It is done at once.
bool decode_copy(Decoder& d) {
  if (d.has("bulk") || d.has("mbarrier") || d.has("reduce")) return false;
  Instruction& i = d.instruction;
  if (d.has("commit_group") || d.has("wait_group") || d.has("wait_all"))
    return d.runs([](Warp&, const Instruction&, Mask) {}), true;
  if (d.operand(2).kind != Operand::Kind::number) d.unknown();
  const bool is_part = d.operands() > 3 && !d.has("L2::cache_hint");
  take_address(d, d.operand(1));
  i.number[0] = static_cast<int>(d.operand(2).bits);
  i.number[2] = d.bytes_of_operand(d.operand(0)) == 4 ? 4 : 8;
  Operand to = d.operand(0);
  i.number[3] = static_cast<int>(to.offset);
  to.offset = 0;
  i.slot[1] = d.source(to, i.number[2]);
  i.slot[2] = is_part ? d.source(3, 4) : d.constant(static_cast<uint64_t>(i.number[0]), 4);
  d.runs([](Warp& warp, const Instruction& i, Mask mask) {
    Instruction store = i;  // the destination's address
    store.slot[0] = i.slot[1];
    store.number[1] = i.number[2] == 4;
    store.offset = i.number[3];
    const auto bytes = static_cast<uint64_t>(i.number[0]);
    Mask reading = 0;
    for (int l = 0; l < kLanes; ++l) reading |= static_cast<Mask>(warp.at<uint32_t>(i.slot[2]).lane[l] != 0) << l;
    const Vector<char*> from = places<Space::global>(warp, i, mask & reading, bytes, Access::load);
    const Vector<char*> to = places<Space::shared>(warp, store, mask, bytes, Access::store);
    for (Mask left = mask; left; left &= left - 1) {
      const int l = __builtin_ctz(left);
      const uint64_t read = std::min<uint64_t>(warp.at<uint32_t>(i.slot[2]).lane[l], bytes);
      std::memset(to.lane[l], 0, bytes);
      if (read) std::memcpy(to.lane[l], from.lane[l], read);
    }
  });
  return true;
}

// ldmatrix and stmatrix: 8 by 8 elements of 16 bits, whose rows' addresses are those of eight lanes.
template <bool is_load>
void move_matrices(Warp& warp, const Instruction& i, Mask mask) {
  if (mask != kAllLanes) throw LaneFault(__builtin_ctz(mask), "a matrix that a part of a warp moves");
  const Mask rows = i.number[0] == 4 ? kAllLanes : (Mask{1} << 8 * i.number[0]) - 1;
  const Vector<char*> at = places<Space::shared>(warp, i, rows, 16, is_load ? Access::load : Access::store);
  for (int matrix = 0; matrix < i.number[0]; ++matrix) {
    for (int l = 0; l < kLanes; ++l) {
      uint32_t& pair = warp.at<uint32_t>(i.slot[matrix + 1]).lane[l];
      for (int half = 0; half < 2; ++half) {
        int row = l / 4, column = l % 4 * 2 + half;
        if (i.number[2]) std::swap(row, column);
        char* const element = at.lane[8 * matrix + row] + 2 * column;
        uint16_t bits = static_cast<uint16_t>(pair >> 16 * half);
        if constexpr (is_load) {
          std::memcpy(&bits, element, sizeof bits);
          pair = (pair & (half ? 0xFFFFu : 0xFFFF0000u)) | static_cast<uint32_t>(bits) << 16 * half;
        } else {
          std::memcpy(element, &bits, sizeof bits);
        }
      }
    }
  }
}

bool decode_matrix(Decoder& d, bool is_load) {
  if (!d.has("m8n8") || d.type() != "b16") return false;
  Instruction& i = d.instruction;
  const std::vector<Operand> values = values_of(d.operand(is_load ? 0 : 1));
  take_address(d, d.operand(is_load ? 1 : 0));
  i.number[0] = static_cast<int>(values.size());
  i.number[2] = d.has("trans");
  for (size_t k = 0; k < values.size(); ++k)
    i.slot[k + 1] = is_load ? d.destination(values[k], 4) : d.source(values[k], 4);
  i.flow = Flow::warp_barrier;
  i.slot[Instruction::kMostSlots - 1] = d.constant(kAllLanes, 4);
  d.runs(is_load ? move_matrices<true> : move_matrices<false>);
  return true;
}

}  // namespace

bool decode_memory(Decoder& d) {
  const std::string& name = d.name();
  if (name == "ld" || name == "ldu") return decode_access(d, true);
  if (name == "st") return decode_access(d, false);
  if (name == "atom" || name == "red") return decode_atomic(d);
  if (name == "cp") return decode_copy(d);
  if (name == "ldmatrix" || name == "stmatrix") return decode_matrix(d, name == "ldmatrix");
  return false;
}

}  // namespace ptx
