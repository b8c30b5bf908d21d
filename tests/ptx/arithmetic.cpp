// Instructions that compute in registers alone.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#include "ptx/program.hpp"

namespace lcodec::ptx {
namespace {

using Table = std::map<std::string, Compute>;

template <class T>
T get(const Word& word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
void put(Word& word, T value) {
  if constexpr (std::is_signed_v<T> && std::is_integral_v<T>) {
    word = static_cast<Word>(static_cast<std::int64_t>(value));  // wider registers have the sign
  } else {
    word = 0;
    std::memcpy(&word, &value, sizeof value);
  }
}

template <class Body>
void each_lane(Lanes lanes, const Body& body) {
  if (lanes == 0xffffffff) {
    for (std::size_t lane = 0; lane < kWarp; ++lane) body(lane);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) body(static_cast<std::size_t>(std::countr_zero(lanes)));
  }
}

// to = f(a), f(a, b), f(a, b, c); T is the operands' type.
template <class T, auto f>
void unary(const Instruction& i, Register* r, Lanes lanes) {
  Register& to = r[i.to[0]];
  const Register& a = r[i.from[0]];
  each_lane(lanes, [&](std::size_t lane) { put(to[lane], f(get<T>(a[lane]))); });
}

template <class T, auto f>
void binary(const Instruction& i, Register* r, Lanes lanes) {
  Register& to = r[i.to[0]];
  const Register& a = r[i.from[0]];
  const Register& b = r[i.from[1]];
  each_lane(lanes, [&](std::size_t lane) { put(to[lane], f(get<T>(a[lane]), get<T>(b[lane]))); });
}

// c has the type of the result.
template <class T, class Result, auto f>
void ternary(const Instruction& i, Register* r, Lanes lanes) {
  Register& to = r[i.to[0]];
  const Register& a = r[i.from[0]];
  const Register& b = r[i.from[1]];
  const Register& c = r[i.from[2]];
  each_lane(lanes, [&](std::size_t lane) {
    put(to[lane], f(get<T>(a[lane]), get<T>(b[lane]), get<Result>(c[lane])));
  });
}

// Integers wrap around.
template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
T wrap(Word value) {
  return static_cast<T>(static_cast<Unsigned<T>>(value));
}
template <class T>
Word word_of(T value) {
  return static_cast<Word>(static_cast<Unsigned<T>>(value));
}
template <class T>
T plus(T a, T b) {
  return wrap<T>(word_of(a) + word_of(b));
}
template <class T>
T minus(T a, T b) {
  return wrap<T>(word_of(a) - word_of(b));
}
template <class T>
T times(T a, T b) {
  return wrap<T>(word_of(a) * word_of(b));
}
template <class T, class Twice>
Twice wide_product(T a, T b) {
  return times(static_cast<Twice>(a), static_cast<Twice>(b));
}
template <class T>
T high_times(T a, T b) {
  __extension__ using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * b >> (8 * sizeof(T)));
}
// By zero a GPU gives all bits, and the dividend as remainder.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return minus<T>(0, a);
  }
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return static_cast<T>(a % b);
}
// Shifts by more bits than there are shift all out.
template <class T>
T left(T a, std::uint32_t by) {
  return by < 8 * sizeof(T) ? static_cast<T>(a << by) : T{0};
}
template <class T>
T right(T a, std::uint32_t by) {
  constexpr std::uint32_t kMost = 8 * sizeof(T) - 1;
  if (std::is_signed_v<T>) return static_cast<T>(a >> std::min(by, kMost));
  return by <= kMost ? static_cast<T>(a >> by) : T{0};
}
template <class T>
T reversed(T a) {
  T result = 0;
  for (std::size_t bit = 0; bit < 8 * sizeof(T); ++bit) {
    result = static_cast<T>(result << 1 | (a >> bit & 1));
  }
  return result;
}
std::uint32_t bit_mask(std::uint32_t from, std::uint32_t width) {
  return left(left<std::uint32_t>(1, std::min(width, 32u)) - 1, std::min(from, 32u));
}
std::uint32_t shift_to_first_bit(std::uint32_t a) {
  return a == 0 ? 0xffffffff : static_cast<std::uint32_t>(std::countl_zero(a));
}

template <class T, auto f>
void shift(const Instruction& i, Register* r, Lanes lanes) {
  Register& to = r[i.to[0]];
  const Register& a = r[i.from[0]];
  const Register& by = r[i.from[1]];
  each_lane(lanes, [&](std::size_t lane) {
    put(to[lane], f(get<T>(a[lane]), get<std::uint32_t>(by[lane])));
  });
}

void move(const Instruction& i, Register* r, Lanes lanes) {
  Register& to = r[i.to[0]];
  const Register& a = r[i.from[0]];
  each_lane(lanes, [&](std::size_t lane) { to[lane] = a[lane]; });
}

// mov.b64 of two halves into a register, and of a register into two.
void join_halves(const Instruction& i, Register* r, Lanes lanes) {
  each_lane(lanes, [&](std::size_t lane) {
    r[i.to[0]][lane] = (r[i.from[0]][lane] & 0xffffffff) | r[i.from[1]][lane] << 32;
  });
}
void split_halves(const Instruction& i, Register* r, Lanes lanes) {
  each_lane(lanes, [&](std::size_t lane) {
    const Word whole = r[i.from[0]][lane];
    r[i.to[0]][lane] = whole & 0xffffffff;
    r[i.to[1]][lane] = whole >> 32;
  });
}

void select(const Instruction& i, Register* r, Lanes lanes) {
  each_lane(lanes, [&](std::size_t lane) {
    r[i.to[0]][lane] = r[r[i.from[2]][lane] ? i.from[0] : i.from[1]][lane];
  });
}

template <class To, class From>
To convert(From value) {
  return static_cast<To>(value);
}

// Towards zero; the nearest integer there is, and 0 for NaN.
template <class To, class From>
To truncate(From value) {
  if (value != value) return 0;
  const From whole = std::trunc(value);
  if (whole <= static_cast<From>(std::numeric_limits<To>::min())) {
    return std::numeric_limits<To>::min();
  }
  if (whole >= static_cast<From>(std::numeric_limits<To>::max())) {
    return std::numeric_limits<To>::max();
  }
  return static_cast<To>(whole);
}

template <class T, auto f>
void add_comparison(Table& table, const std::string& name, const std::string& type) {
  table["setp." + name + "." + type] = binary<T, [](T a, T b) -> Word { return f(a, b); }>;
}

template <class T>
void add_comparisons(Table& t, const std::string& type) {
  add_comparison<T, std::equal_to<T>{}>(t, "eq", type);
  add_comparison<T, std::less<T>{}>(t, "lt", type);
  add_comparison<T, std::less_equal<T>{}>(t, "le", type);
  add_comparison<T, std::greater<T>{}>(t, "gt", type);
  add_comparison<T, std::greater_equal<T>{}>(t, "ge", type);
  if constexpr (std::is_floating_point_v<T>) {  // with u: true where one is NaN
    add_comparison<T, [](T a, T b) { return (a < b) || (a > b); }>(t, "ne", type);
    add_comparison<T, [](T a, T b) { return !((a < b) || (a > b)); }>(t, "equ", type);
    add_comparison<T, std::not_equal_to<T>{}>(t, "neu", type);
    add_comparison<T, [](T a, T b) { return !(a >= b); }>(t, "ltu", type);
    add_comparison<T, [](T a, T b) { return !(b < a); }>(t, "leu", type);
    add_comparison<T, [](T a, T b) { return !(a <= b); }>(t, "gtu", type);
    add_comparison<T, [](T a, T b) { return !(a < b); }>(t, "geu", type);
  } else {
    add_comparison<T, std::not_equal_to<T>{}>(t, "ne", type);
  }
}

template <class T>
void add_integer(Table& t, const std::string& type) {
  t["add." + type] = binary<T, plus<T>>;
  t["sub." + type] = binary<T, minus<T>>;
  t["mul.lo." + type] = binary<T, times<T>>;
  t["mul.hi." + type] = binary<T, high_times<T>>;
  t["mad.lo." + type] = ternary<T, T, [](T a, T b, T c) { return plus(times(a, b), c); }>;
  t["div." + type] = binary<T, quotient<T>>;
  t["rem." + type] = binary<T, remainder<T>>;
  t["neg." + type] = unary<T, [](T a) { return minus<T>(0, a); }>;
  t["min." + type] = binary<T, [](T a, T b) { return std::min(a, b); }>;
  t["max." + type] = binary<T, [](T a, T b) { return std::max(a, b); }>;
  t["shr." + type] = shift<T, right<T>>;
  add_comparisons<T>(t, type);
}

template <class T, class Twice>
void add_wide(Table& t, const std::string& type) {
  t["mul.wide." + type] = binary<T, wide_product<T, Twice>>;
  t["mad.wide." + type] =
      ternary<T, Twice, [](T a, T b, Twice c) { return plus(wide_product<T, Twice>(a, b), c); }>;
}

template <class T>
void add_bits(Table& t, const std::string& type) {
  t["and." + type] = binary<T, [](T a, T b) { return static_cast<T>(a & b); }>;
  t["or." + type] = binary<T, [](T a, T b) { return static_cast<T>(a | b); }>;
  t["xor." + type] = binary<T, [](T a, T b) { return static_cast<T>(a ^ b); }>;
  t["not." + type] = unary<T, [](T a) { return static_cast<T>(~a); }>;
  t["shl." + type] = shift<T, left<T>>;
  t["shr." + type] = shift<T, right<T>>;
  t["setp.eq." + type] = binary<T, [](T a, T b) -> Word { return a == b; }>;
  t["setp.ne." + type] = binary<T, [](T a, T b) -> Word { return a != b; }>;
  if constexpr (sizeof(T) >= 4) {
    t["popc." + type] = unary<T, [](T a) { return static_cast<std::uint32_t>(std::popcount(a)); }>;
    t["clz." + type] =
        unary<T, [](T a) { return static_cast<std::uint32_t>(std::countl_zero(a)); }>;
    t["brev." + type] = unary<T, reversed<T>>;
  }
}

template <class T>
void add_float(Table& t, const std::string& type) {
  t["add.rn." + type] = binary<T, [](T a, T b) { return a + b; }>;
  t["sub.rn." + type] = binary<T, [](T a, T b) { return a - b; }>;
  t["mul.rn." + type] = binary<T, [](T a, T b) { return a * b; }>;
  t["div.rn." + type] = binary<T, [](T a, T b) { return a / b; }>;
  t["sqrt.rn." + type] = unary<T, [](T a) { return std::sqrt(a); }>;
  t["neg." + type] = unary<T, [](T a) { return -a; }>;
  t["abs." + type] = unary<T, [](T a) { return std::abs(a); }>;
  t["cvt.rzi.s32." + type] = unary<T, truncate<std::int32_t, T>>;
  t["cvt.rzi.u32." + type] = unary<T, truncate<std::uint32_t, T>>;
  t["cvt.rzi.s64." + type] = unary<T, truncate<std::int64_t, T>>;
  t["cvt.rzi.u64." + type] = unary<T, truncate<std::uint64_t, T>>;
  t["cvt.rn." + type + ".s32"] = unary<std::int32_t, convert<T, std::int32_t>>;
  t["cvt.rn." + type + ".u32"] = unary<std::uint32_t, convert<T, std::uint32_t>>;
  t["cvt.rn." + type + ".s64"] = unary<std::int64_t, convert<T, std::int64_t>>;
  t["cvt.rn." + type + ".u64"] = unary<std::uint64_t, convert<T, std::uint64_t>>;
  add_comparisons<T>(t, type);
}

template <class From, class... To>
void add_conversions(Table& t, const std::string& from, const std::array<const char*, 8>& to) {
  std::size_t k = 0;
  ((t[std::string("cvt.") + to[k++] + "." + from] = unary<From, convert<To, From>>), ...);
}

template <class From>
void add_integer_conversions(Table& t, const std::string& from) {
  add_conversions<From, std::uint8_t, std::int8_t, std::uint16_t, std::int16_t, std::uint32_t,
                  std::int32_t, std::uint64_t, std::int64_t>(
      t, from, {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"});
}

Table make_table() {
  Table t;
  add_integer<std::int16_t>(t, "s16");
  add_integer<std::uint16_t>(t, "u16");
  add_integer<std::int32_t>(t, "s32");
  add_integer<std::uint32_t>(t, "u32");
  add_integer<std::int64_t>(t, "s64");
  add_integer<std::uint64_t>(t, "u64");
  add_wide<std::int32_t, std::int64_t>(t, "s32");
  add_wide<std::uint32_t, std::uint64_t>(t, "u32");
  add_wide<std::int16_t, std::int32_t>(t, "s16");
  add_wide<std::uint16_t, std::uint32_t>(t, "u16");
  add_bits<std::uint16_t>(t, "b16");
  add_bits<std::uint32_t>(t, "b32");
  add_bits<std::uint64_t>(t, "b64");
  add_float<float>(t, "f32");
  add_float<double>(t, "f64");
  add_integer_conversions<std::uint8_t>(t, "u8");
  add_integer_conversions<std::int8_t>(t, "s8");
  add_integer_conversions<std::uint16_t>(t, "u16");
  add_integer_conversions<std::int16_t>(t, "s16");
  add_integer_conversions<std::uint32_t>(t, "u32");
  add_integer_conversions<std::int32_t>(t, "s32");
  add_integer_conversions<std::uint64_t>(t, "u64");
  add_integer_conversions<std::int64_t>(t, "s64");
  t["cvt.f64.f32"] = unary<float, convert<double, float>>;
  t["cvt.rn.f32.f64"] = unary<double, convert<float, double>>;
  t["bmsk.clamp.b32"] = binary<std::uint32_t, bit_mask>;
  t["bfind.shiftamt.u32"] = unary<std::uint32_t, shift_to_first_bit>;
  for (const char* type :
       {"pred", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"}) {
    t[std::string("mov.") + type] = move;
    t[std::string("selp.") + type] = select;
  }
  t["mov.b64.join"] = join_halves;
  t["mov.b64.split"] = split_halves;
  t["and.pred"] = binary<Word, [](Word a, Word b) { return a & b; }>;
  t["or.pred"] = binary<Word, [](Word a, Word b) { return a | b; }>;
  t["xor.pred"] = binary<Word, [](Word a, Word b) { return a ^ b; }>;
  t["not.pred"] = unary<Word, [](Word a) { return a ^ 1; }>;
  return t;
}

}  // namespace

Compute find_compute(const std::string& name) {
  static const Table table = make_table();
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace lcodec::ptx
