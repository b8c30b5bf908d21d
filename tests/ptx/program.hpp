// A kernel in PTX, as the interpreter (README.md) runs it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace lcodec::ptx {

constexpr int kWarp = 32;
using Word = std::uint64_t;                // what a thread has in a register; small types lie low
using Register = std::array<Word, kWarp>;  // of the threads of a warp
using Lanes = std::uint32_t;               // a bit for each of them

// A mistake of a kernel, or something that the interpreter does not know.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Instruction;
using Compute = void (*)(const Instruction&, Register*, Lanes);  // computes in registers alone

enum class Kind {
  compute,
  branch,
  exit,
  load,
  store,
  atomic,
  shuffle,
  vote,
  meet_warp,
  meet_block
};
enum class Space { generic, global, shared, local, param };
// How values of lanes, or of memory and a lane, are combined.
enum class Mode {
  none,
  add,
  min,
  max,
  bit_or,
  bit_and,
  exchange,
  swap,
  any,
  all,
  ballot,
  count,
  up,
  down,
  butterfly,
  index
};

// Operands are numbers of registers; constants have registers of their own.
struct Instruction {
  Kind kind = Kind::compute;
  Compute compute = nullptr;
  std::array<int, 4> to{-1, -1, -1, -1};
  std::array<int, 5> from{-1, -1, -1, -1, -1};
  int guard = -1;  // runs where this predicate is true, or false if negated
  bool negated = false;
  int target = -1;  // of a branch
  // In memory.
  int address = -1;
  std::int64_t offset = 0;
  Space space = Space::generic;
  unsigned bytes = 0;  // of an element
  int count = 1;       // of elements
  bool is_signed = false;
  bool is_float = false;
  bool strong = false;              // ordered with other threads: volatile, relaxed
  std::uint32_t used = 0xffffffff;  // bytes that the program looks at
  Mode mode = Mode::none;

  std::string text;
  std::string place;  // file:line of the source
  std::uint64_t executed = 0;
};

struct Variable {
  std::string name;
  std::size_t bytes, alignment, offset;
};

struct Kernel {
  std::string name;    // as the compiler mangles it
  std::string source;  // PTX
  std::vector<Instruction> code;
  int registers = 0;
  std::map<Word, int> constants;        // and the register that holds each
  std::map<std::string, int> specials;  // %tid.x and the like
  std::vector<Variable> params, shared;
  std::size_t param_bytes = 0;
  std::size_t shared_bytes = 0;  // static, as the device counts them
  std::size_t shared_end = 0;    // static, with gaps: where dynamic memory begins
  std::size_t local_bytes = 0;
  unsigned most_threads = 1024;
  std::uint64_t launches = 0;
};

// Texts of the kernels of a module by name; each can be parsed alone.
std::map<std::string, std::string> split_module(const std::string& ptx);

// Raises Fault, which names it, at an instruction that the interpreter does not know.
std::unique_ptr<Kernel> parse_kernel(const std::string& name, const std::string& source);

// The function of an instruction by its full name ("add.s32"), or null.
Compute find_compute(const std::string& name);

}  // namespace lcodec::ptx
