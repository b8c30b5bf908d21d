// From the text of PTX to instructions with numbers for registers.
#include <algorithm>
#include <bit>
#include <cctype>
#include <regex>
#include <set>
#include <sstream>

#include "ptx/program.hpp"

namespace lcodec::ptx {
namespace {

const std::map<std::string, unsigned>& type_bytes() {
  static const std::map<std::string, unsigned> bytes{
      {"b8", 1},  {"u8", 1},  {"s8", 1},  {"b16", 2}, {"u16", 2}, {"s16", 2}, {"b32", 4},
      {"u32", 4}, {"s32", 4}, {"f32", 4}, {"b64", 8}, {"u64", 8}, {"s64", 8}, {"f64", 8}};
  return bytes;
}

std::string strip(const std::string& text) {
  const char* const kSpace = " \t\n\r";
  const std::size_t first = text.find_first_not_of(kSpace);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

// At commas outside of braces and brackets.
std::vector<std::string> split_operands(const std::string& text) {
  std::vector<std::string> parts{""};
  int depth = 0;
  for (const char letter : text) {
    depth += (letter == '{' || letter == '[') - (letter == '}' || letter == ']');
    if (letter == ',' && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += letter;
    }
  }
  for (std::string& part : parts) part = strip(part);
  return parts.size() == 1 && parts[0].empty() ? std::vector<std::string>{} : parts;
}

std::vector<std::string> split_words(const std::string& opcode) {
  std::vector<std::string> words;
  std::istringstream in(opcode);
  for (std::string word; std::getline(in, word, '.');) words.push_back(word);
  return words;
}

// Statements of a body: labels with their colon, braces, directives with a dot, instructions.
std::vector<std::string> split_statements(const std::string& body) {
  std::vector<std::string> statements;
  std::string open;
  std::istringstream lines(body);
  for (std::string line; std::getline(lines, line);) {
    if (const std::size_t comment = line.find("//"); comment != std::string::npos) {
      line.resize(comment);
    }
    if (strip(line).starts_with(".loc\t")) {  // ends with its line
      statements.push_back(strip(line));
      continue;
    }
    bool in_vector = false;
    for (const char letter : line + " ") {
      const bool at_start = strip(open).empty();
      if (letter == ';' || (at_start && (letter == '{' || letter == '}')) ||
          (letter == ':' && !in_vector)) {
        if (letter != ';') open += letter;
        if (!strip(open).empty()) statements.push_back(strip(open));
        open.clear();
        continue;
      }
      in_vector = letter == '{' || (in_vector && letter != '}');
      open += letter;
    }
  }
  if (!strip(open).empty()) statements.push_back(strip(open));
  return statements;
}

class Parser {
 public:
  Parser(const std::string& name, const std::string& source) {
    kernel_->name = name;
    kernel_->source = source;
    read_files(source);
    read_head(source);
    const std::size_t begin = source.find('{', source.find(".entry"));
    const std::size_t end = source.rfind('}');
    const auto statements = split_statements(source.substr(begin + 1, end - begin - 1));
    scopes_.emplace_back();
    for (const std::string& statement : statements) read(statement);
    Instruction end_of_text;  // for labels at the end
    end_of_text.kind = Kind::exit;
    end_of_text.text = "end";
    kernel_->code.push_back(end_of_text);
    for (const auto& [at, label] : branches_) {
      const auto target = labels_.find(label);
      if (target == labels_.end()) unknown("label " + label);
      kernel_->code[at].target = target->second;
    }
  }

  std::unique_ptr<Kernel> take() { return std::move(kernel_); }

 private:
  [[noreturn]] void unknown(const std::string& what) const {
    throw Fault("kernel " + kernel_->name + ": the interpreter does not know " + what);
  }

  // ------------------------------------------------------------------------------------------
  // Declarations

  void read_files(const std::string& source) {
    static const std::regex file(R"re(\.file\s+(\d+)\s+"([^"]*/)?([^"/]*)")re");
    for (std::sregex_iterator m(source.begin(), source.end(), file), end; m != end; ++m) {
      files_[(*m)[1]] = (*m)[3];
    }
  }

  void read_head(const std::string& source) {
    static const std::regex extern_shared(R"(\.extern\s+\.shared[^;]*\s([\w$]+)\s*\[\s*\]\s*;)");
    for (std::sregex_iterator m(source.begin(), source.end(), extern_shared), end; m != end; ++m) {
      dynamic_.insert((*m)[1]);
    }
    const std::size_t entry = source.find(".entry");
    const std::string head = source.substr(entry, source.find('{', entry) - entry);
    static const std::regex param(
        R"(\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?)");
    for (std::sregex_iterator m(head.begin(), head.end(), param), end; m != end; ++m) {
      declare(kernel_->params, kernel_->param_bytes, *m);
    }
    static const std::regex most(R"(\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?)");
    if (std::smatch m; std::regex_search(head, m, most)) {
      kernel_->most_threads = 1;
      for (std::size_t k = 1; k < 4; ++k) {
        if (m[k].matched) {
          kernel_->most_threads *= static_cast<unsigned>(std::stoul(m[k]));
        }
      }
    }
  }

  // From groups alignment, type, name, count; `end` grows.
  static void declare(std::vector<Variable>& variables, std::size_t& end, const std::smatch& m) {
    const std::size_t element = type_bytes().at(m[2]);
    const std::size_t alignment = m[1].matched ? std::stoul(m[1]) : element;
    const std::size_t offset = (end + alignment - 1) / alignment * alignment;
    const std::size_t bytes = element * (m[4].matched ? std::stoul(m[4]) : 1);
    variables.push_back({m[3], bytes, alignment, offset});
    end = offset + bytes;
  }

  void read_directive(const std::string& statement) {
    static const std::regex variable(
        R"(\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?)");
    static const std::regex registers(R"(\.reg\s+\.\w+\s+(.*))");
    static const std::regex range(R"(([\w%$]+)<(\d+)>)");
    static const std::regex loc(R"(\.loc\s+(\d+)\s+(\d+).*)");
    static const std::regex used(R"re(\.pragma\s+"used_bytes_mask (\w+)")re");
    std::smatch m;
    if (std::regex_match(statement, m, loc)) {
      // Functions of CUDA's headers are told by where they are called, which comes first.
      if (!files_[m[1]].ends_with(".hpp")) place_ = files_[m[1]] + ":" + m[2].str();
    } else if (std::regex_match(statement, m, registers)) {
      for (const std::string& declared : split_operands(m[1])) {
        std::smatch many;
        if (std::regex_match(declared, many, range)) {
          for (int k = 0; k < std::stoi(many[2]); ++k) {
            scopes_.back()[many[1].str() + std::to_string(k)] = kernel_->registers++;
          }
        } else {
          scopes_.back()[declared] = kernel_->registers++;
        }
      }
    } else if (std::regex_match(statement, m, variable)) {
      declare_variable(m);
    } else if (std::regex_match(statement, m, used)) {
      used_ = static_cast<std::uint32_t>(std::stoul(m[1], nullptr, 0));
    } else if (!statement.starts_with(".pragma")) {
      unknown("the directive " + statement);
    }
  }

  // Between shared variables lie gaps, in which an index out of bounds is seen.
  void declare_variable(const std::smatch& m) {
    constexpr std::size_t kGap = 256;
    const std::size_t bytes = type_bytes().at(m[3]) * (m[5].matched ? std::stoul(m[5]) : 1);
    const std::size_t alignment = m[2].matched ? std::stoul(m[2]) : 8;
    if (m[1] == "local") {
      kernel_->local_bytes = (kernel_->local_bytes + alignment - 1) / alignment * alignment;
      symbols_[m[4]] = kernel_->local_bytes;
      kernel_->local_bytes += bytes;
      return;
    }
    const std::size_t offset = (kernel_->shared_end + kGap - 1) / kGap * kGap;
    kernel_->shared.push_back({m[4], bytes, alignment, offset});
    symbols_[m[4]] = offset;
    kernel_->shared_end = offset + bytes + kGap;
    kernel_->shared_bytes += (bytes + alignment - 1) / alignment * alignment;
  }

  // ------------------------------------------------------------------------------------------
  // Operands

  int constant(Word value) {
    const auto [found, is_new] = kernel_->constants.try_emplace(value, kernel_->registers);
    kernel_->registers += is_new;
    return found->second;
  }

  int operand(const std::string& text) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(text); found != scope->end()) return found->second;
    }
    if (text.starts_with("%")) {
      static const std::set<std::string> specials{
          "%tid.x",   "%tid.y",       "%tid.z",       "%ntid.x",      "%ntid.y",     "%ntid.z",
          "%ctaid.x", "%ctaid.y",     "%ctaid.z",     "%nctaid.x",    "%nctaid.y",   "%nctaid.z",
          "%laneid",  "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge"};
      if (!specials.contains(text)) unknown("the register " + text);
      const auto [found, is_new] = kernel_->specials.try_emplace(text, kernel_->registers);
      kernel_->registers += is_new;
      return found->second;
    }
    if (text.starts_with("0f") || text.starts_with("0F")) {  // the bits of a float
      return constant(std::stoull(text.substr(2), nullptr, 16));
    }
    if (text.starts_with("0d") || text.starts_with("0D")) {
      return constant(std::stoull(text.substr(2), nullptr, 16));
    }
    if (!text.empty() && (std::isdigit(text[0]) || text[0] == '-')) {
      const bool negative = text[0] == '-';
      const Word size = std::stoull(text.substr(negative), nullptr, 0);
      return constant(negative ? ~size + 1 : size);
    }
    if (const auto found = symbols_.find(text); found != symbols_.end()) {
      return constant(found->second);
    }
    if (dynamic_.contains(text)) return constant(kernel_->shared_end);
    unknown("the operand " + text);
  }

  static std::vector<std::string> elements(const std::string& text) {  // {a, b} or a
    return text.starts_with("{") ? split_operands(text.substr(1, text.size() - 2))
                                 : std::vector<std::string>{text};
  }

  // [base], [base+offset]
  void read_address(Instruction& i, const std::string& text) {
    static const std::regex form(R"(\[\s*([%\w$.]+?)\s*(?:\+\s*(-?\d+))?\s*\])");
    std::smatch m;
    if (!std::regex_match(text, m, form)) unknown("the address " + text);
    i.offset = m[2].matched ? std::stoll(m[2]) : 0;
    if (i.space == Space::param) {
      const auto& params = kernel_->params;
      const auto found = std::find_if(params.begin(), params.end(),
                                      [&](const Variable& v) { return v.name == m[1]; });
      if (found == params.end()) unknown("the parameter " + m[1].str());
      i.address = constant(found->offset);
    } else {
      i.address = operand(m[1]);
    }
  }

  // ------------------------------------------------------------------------------------------
  // Instructions

  void read(const std::string& statement) {
    if (statement == "{") {
      scopes_.emplace_back();
    } else if (statement == "}") {
      scopes_.pop_back();
    } else if (statement.ends_with(":")) {
      labels_[statement.substr(0, statement.size() - 1)] = static_cast<int>(kernel_->code.size());
    } else if (statement.starts_with(".")) {
      read_directive(statement);
    } else {
      read_instruction(statement);
    }
  }

  void read_instruction(const std::string& statement) {
    static const std::regex form(R"((?:@(!?)(\S+)\s+)?([\w.]+)\s*([^]*))");
    std::smatch m;
    if (!std::regex_match(statement, m, form)) unknown("the instruction " + statement);
    Instruction i;
    i.text = std::regex_replace(statement, std::regex(R"(\s+)"), " ");
    i.place = place_;
    i.used = used_;
    used_ = 0xffffffff;
    if (m[2].matched) {
      i.guard = operand(m[2]);
      i.negated = m[1] == "!";
    }
    const std::string opcode = m[3];
    const auto words = split_words(opcode);
    const auto operands = split_operands(m[4]);
    const auto is = [&](const char* word) {
      return std::find(words.begin() + 1, words.end(), word) != words.end();
    };
    bool known = true;
    if (words[0] == "bra") {
      i.kind = Kind::branch;
      branches_.emplace_back(kernel_->code.size(), operands.at(0));
    } else if (opcode == "ret" || opcode == "exit") {
      i.kind = Kind::exit;
    } else if (words[0] == "ld" || words[0] == "st") {
      known = read_memory(i, words, operands);
    } else if (words[0] == "atom") {
      known = read_atomic(i, words, operands);
    } else if (words[0] == "shfl" || words[0] == "vote" || words[0] == "redux") {
      known = read_warp_operation(i, words, operands);
    } else if (opcode == "bar.warp.sync") {
      i.kind = Kind::meet_warp;
      i.from[0] = operand(operands.at(0));
    } else if (words[0] == "bar" || words[0] == "barrier") {
      known = read_barrier(i, words, operands);
    } else if (words[0] == "membar" || words[0] == "fence" || words[0] == "nanosleep") {
      return;  // accesses happen in order
    } else if (words[0] == "cvta" && !is("shared") && !is("const")) {
      read_computed(i, "mov.b64", operands);
    } else {
      known = read_computed(i, opcode, operands);
    }
    if (!known) unknown("the instruction " + i.text);
    kernel_->code.push_back(i);
  }

  bool read_computed(Instruction& i, const std::string& opcode,
                     const std::vector<std::string>& operands) {
    if (operands.empty()) return false;
    const auto to = elements(operands[0]);
    std::vector<std::string> from;
    for (std::size_t k = 1; k < operands.size(); ++k) {
      for (const std::string& element : elements(operands[k])) from.push_back(element);
    }
    std::string name = opcode;
    if (opcode == "mov.b64" && (to.size() == 2 || from.size() == 2)) {
      name += to.size() == 2 ? ".split" : ".join";
    }
    i.compute = find_compute(name);
    if (!i.compute || to.size() > 2 || from.size() > 3) return false;
    for (std::size_t k = 0; k < to.size(); ++k) i.to[k] = operand(to[k]);
    for (std::size_t k = 0; k < from.size(); ++k) i.from[k] = operand(from[k]);
    return true;
  }

  // Modifiers that are not listed are not known.
  bool read_modifiers(Instruction& i, const std::vector<std::string>& words) {
    static const std::map<std::string, Space> spaces{{"global", Space::global},
                                                     {"shared", Space::shared},
                                                     {"local", Space::local},
                                                     {"param", Space::param}};
    static const std::set<std::string> strong{"volatile", "relaxed", "acquire", "release"};
    static const std::set<std::string> nothing{"nc", "gpu", "cta", "sys"};
    for (std::size_t k = 1; k + 1 < words.size(); ++k) {
      if (const auto space = spaces.find(words[k]); space != spaces.end()) {
        i.space = space->second;
      } else if (strong.contains(words[k])) {
        i.strong = true;
      } else if (words[k] == "v2" || words[k] == "v4") {
        i.count = words[k] == "v2" ? 2 : 4;
      } else if (!nothing.contains(words[k])) {
        return false;
      }
    }
    const auto bytes = type_bytes().find(words.back());
    if (bytes == type_bytes().end()) return false;
    i.bytes = bytes->second;
    i.is_signed = words.back()[0] == 's';
    i.is_float = words.back()[0] == 'f';
    return true;
  }

  bool read_memory(Instruction& i, const std::vector<std::string>& words,
                   const std::vector<std::string>& operands) {
    const bool loads = words[0] == "ld";
    i.kind = loads ? Kind::load : Kind::store;
    if (!read_modifiers(i, words) || operands.size() != 2) return false;
    const auto values = elements(operands[loads ? 0 : 1]);
    if (static_cast<int>(values.size()) != i.count) return false;
    for (std::size_t k = 0; k < values.size(); ++k) {
      (loads ? i.to[k] : i.from[k]) = operand(values[k]);
    }
    read_address(i, operands[loads ? 1 : 0]);
    return true;
  }

  bool read_atomic(Instruction& i, std::vector<std::string> words,
                   const std::vector<std::string>& operands) {
    static const std::map<std::string, Mode> modes{
        {"add", Mode::add},     {"min", Mode::min},       {"max", Mode::max}, {"or", Mode::bit_or},
        {"and", Mode::bit_and}, {"exch", Mode::exchange}, {"cas", Mode::swap}};
    i.kind = Kind::atomic;
    const auto name = std::find_if(words.begin() + 1, words.end(),
                                   [&](const std::string& word) { return modes.contains(word); });
    if (name == words.end()) return false;
    i.mode = modes.at(*name);
    words.erase(name);
    const std::size_t values = i.mode == Mode::swap ? 2 : 1;
    if (!read_modifiers(i, words) || operands.size() != 2 + values) return false;
    i.strong = true;
    i.to[0] = operand(operands[0]);
    read_address(i, operands[1]);
    for (std::size_t k = 0; k < values; ++k) i.from[k] = operand(operands[2 + k]);
    return true;
  }

  // shfl.sync.up.b32 to|within, value, b, c, mask;  vote.sync.any.pred to, value, mask
  bool read_warp_operation(Instruction& i, const std::vector<std::string>& words,
                           const std::vector<std::string>& operands) {
    static const std::map<std::string, Mode> modes{
        {"up", Mode::up},         {"down", Mode::down}, {"bfly", Mode::butterfly},
        {"idx", Mode::index},     {"any", Mode::any},   {"all", Mode::all},
        {"ballot", Mode::ballot}, {"add", Mode::add},   {"min", Mode::min},
        {"max", Mode::max},       {"or", Mode::bit_or}, {"and", Mode::bit_and}};
    const bool shuffles = words[0] == "shfl";
    i.kind = shuffles ? Kind::shuffle : Kind::vote;
    i.is_signed = words.back() == "s32";
    for (const std::string& word : words) {
      if (const auto mode = modes.find(word); mode != modes.end()) i.mode = mode->second;
    }
    if (i.mode == Mode::none || operands.size() != (shuffles ? 5 : 3)) return false;
    const std::size_t bar = operands[0].find('|');
    i.to[0] = operand(operands[0].substr(0, bar));
    if (bar != std::string::npos) i.to[1] = operand(operands[0].substr(bar + 1));
    i.from[0] = operand(operands.back());  // the mask, as of meet_warp
    for (std::size_t k = 1; k + 1 < operands.size(); ++k) i.from[k] = operand(operands[k]);
    return true;
  }

  // bar.sync 0;  bar.red.or.pred to, 0, value: of the whole block
  bool read_barrier(Instruction& i, const std::vector<std::string>& words,
                    const std::vector<std::string>& operands) {
    i.kind = Kind::meet_block;
    const auto is = [&](const char* word) {
      return std::find(words.begin(), words.end(), word) != words.end();
    };
    if (is("sync")) return operands.size() == 1 && operands[0] == "0";
    if (!is("red") || operands.size() != 3 || operands[1] != "0") return false;
    i.mode = is("popc") ? Mode::count : is("or") ? Mode::any : Mode::all;
    i.to[0] = operand(operands[0]);
    i.from[0] = operand(operands[2]);
    return true;
  }

  std::unique_ptr<Kernel> kernel_ = std::make_unique<Kernel>();
  std::map<std::string, std::string> files_;
  std::set<std::string> dynamic_;
  std::map<std::string, std::size_t> symbols_;
  std::vector<std::map<std::string, int>> scopes_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<std::size_t, std::string>> branches_;
  std::string place_;
  std::uint32_t used_ = 0xffffffff;
};

}  // namespace

std::map<std::string, std::string> split_module(const std::string& ptx) {
  std::string shared;  // what every kernel needs of the module
  std::map<std::string, std::string> kernels;
  std::istringstream lines(ptx);
  std::string* kernel = nullptr;
  std::ptrdiff_t depth = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::ptrdiff_t before = depth;
    depth += std::count(line.begin(), line.end(), '{') - std::count(line.begin(), line.end(), '}');
    if (line.starts_with(".extern .shared") || strip(line).starts_with(".file")) {
      shared += line + "\n";
    } else if (const std::size_t entry = line.find(".entry "); entry != std::string::npos) {
      const std::size_t name = entry + 7;
      kernel = &kernels[line.substr(name, line.find('(', name) - name)];
    }
    if (kernel) *kernel += line + "\n";
    if (before > 0 && depth == 0) kernel = nullptr;
  }
  for (auto& [name, source] : kernels) source = shared + source;
  return kernels;
}

std::unique_ptr<Kernel> parse_kernel(const std::string& name, const std::string& source) {
  return Parser(name, source).take();
}

}  // namespace lcodec::ptx
