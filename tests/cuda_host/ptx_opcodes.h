// What executes an instruction, by its opcode: those that nvcc makes of csrc/cuda, and no others.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "ptx_numbers.h"

namespace fusedrnn::cuda::host {

using Execute = void (*)(Thread&, const Instruction&);

template <class F>
Execute of_type(std::string_view type, F f) {
  if (type == "pred") return f.template operator()<uint64_t>();
  if (type == "s16") return f.template operator()<int16_t>();
  if (type == "s32") return f.template operator()<int32_t>();
  if (type == "s64") return f.template operator()<int64_t>();
  if (type == "u16" || type == "b16") return f.template operator()<uint16_t>();
  if (type == "u32" || type == "b32") return f.template operator()<uint32_t>();
  if (type == "u64" || type == "b64") return f.template operator()<uint64_t>();
  if (type == "f32") return f.template operator()<float>();
  if (type == "f64") return f.template operator()<double>();
  return nullptr;
}
template <class F>
Execute of_integer(std::string_view type, F f) {
  return of_type(type, [&]<class T>() -> Execute {
    if constexpr (std::is_integral_v<T>) return f.template operator()<T>();
    return nullptr;
  });
}

inline int bits_of(std::string_view type) {
  return type == "pred" ? 1 : type.size() < 2 ? 0 : std::atoi(std::string(type.substr(1)).c_str());
}

// The opcode's words and how many operands stand in each pair of braces (1 without).
struct Form {
  std::vector<std::string_view> words;
  std::vector<int> groups;

  std::string_view type() const { return words.back(); }
  bool has(std::string_view word) const { return std::find(words.begin(), words.end(), word) != words.end(); }
};

template <Space space>
Execute load_or_store(const Form& form) {
  return form.words[0] == "ld" ? load<space> : space == Space::param ? nullptr : store<space>;
}

inline Execute memory_access(const Form& form) {
  if (form.has("acquire")) return form.has("global") && form.type() == "u32" ? load_acquire : nullptr;
  if (form.has("async")) return store_async;
  if (form.has("param")) return load_or_store<Space::param>(form);
  if (form.has("shared")) return load_or_store<Space::shared>(form);
  if (form.has("global")) return load_or_store<Space::global>(form);
  return nullptr;
}

template <class T, auto f>
Execute comparison_by(bool unordered) {
  if constexpr (std::is_floating_point_v<T>) {
    if (unordered) return compare_unordered<T, f>;
  }
  return unordered ? nullptr : compare<T, f>;
}

// "lt" or, of floating-point numbers, "ltu".
inline Execute comparison(std::string_view relation, std::string_view type) {
  return of_type(type, [&]<class T>() -> Execute {
    const std::string_view name = relation.substr(0, 2);
    const bool unordered = relation.substr(name.size()) == "u";
    if (name != relation && !unordered) return nullptr;
    if (name == "eq") return comparison_by<T, equal>(unordered);
    if (name == "ne") return comparison_by<T, not_equal>(unordered);
    if (name == "lt") return comparison_by<T, less>(unordered);
    if (name == "le") return comparison_by<T, less_equal>(unordered);
    if (name == "gt") return comparison_by<T, greater>(unordered);
    if (name == "ge") return comparison_by<T, greater_equal>(unordered);
    return nullptr;
  });
}

inline Execute conversion(const Form& form) {
  const std::string_view to = form.words[form.words.size() - 2], from = form.type();
  if (to == "tf32") return form.has("rna") ? convert_to_tf32 : nullptr;
  if (to == "bf16") return form.has("rn") ? convert_to_bf16 : nullptr;
  if (to == "f16" && from == "f32") return form.has("rn") ? convert<_Float16, float> : nullptr;
  if (to == "f32" && from == "f16") return convert<float, _Float16>;
  return of_integer(to, [&]<class To>() -> Execute {
    return of_integer(from, [&]<class From>() -> Execute { return convert<To, From>; });
  });
}

inline Execute movement(const Form& form) {
  const int to = form.groups[0], from = form.groups[1], parts = std::max(to, from);
  if (parts > 1) {
    const int bits = bits_of(form.type()) / parts;
    if (bits == 32) return to > 1 ? split<uint32_t> : join<uint32_t>;
    if (bits == 16) return to > 1 ? split<uint16_t> : join<uint16_t>;
    return nullptr;
  }
  return of_type(form.type(), []<class T>() -> Execute { return move<T>; });
}

inline Execute arithmetic(const Form& form) {
  const std::string_view name = form.words[0];
  const auto binary_of = [&]<class T>() -> Execute {
    if (name == "add") return binary<T, add>;
    if (name == "sub") return binary<T, subtract>;
    if (name == "mul" && (!std::is_integral_v<T> || form.has("lo"))) return binary<T, multiply>;
    if (name == "min") return binary<T, least>;
    if (name == "max") return binary<T, most>;
    if (name == "selp") return select<T>;
    if ((name == "fma" && form.has("rn")) || (name == "mad" && form.has("lo"))) return multiply_add<T>;
    if constexpr (std::is_integral_v<T>) {
      if (name == "mul" && form.has("wide")) return multiply_wide<T>;
      if (name == "mul" && form.has("hi") && sizeof(T) == 8) return binary<T, multiply_high>;
      if (name == "div") return binary<T, divide>;
      if (name == "rem") return binary<T, remainder_of>;
      if (name == "and") return binary<T, bit_and>;
      if (name == "or") return binary<T, bit_or>;
      if (name == "xor") return binary<T, bit_xor>;
      if (name == "bfi" && sizeof(T) == 4) return insert_bits<T>;
      if (name == "shl") return shift_left<T>;
      if (name == "shr") return shift_right<T>;
      if (name == "neg") return negate<T>;
      if (name == "not") return form.type() == "pred" ? invert_predicate : invert<T>;
    } else {
      if (name == "div" && form.has("rn")) return binary<T, divide>;
      if (name == "rcp" && form.has("rn")) return reciprocal<T>;
    }
    if constexpr (std::is_same_v<T, float>) {
      if (name == "div" && form.has("approx")) return binary<T, divide_approximately>;
      if (name == "rcp" && form.has("approx") && form.has("ftz")) return reciprocal_approximately;
      if (name == "ex2" && form.has("approx") && form.has("ftz")) return exp2_approximately;
    }
    return nullptr;
  };
  return of_type(form.type(), binary_of);
}

inline Execute decode(const Form& form) {
  const std::string_view name = form.words[0];
  if (name == "ld" || name == "st") return memory_access(form);
  if (name == "mov") return movement(form);
  if (name == "cvt") return conversion(form);
  if (name == "cvta") return form.has("to") && form.has("global") ? move<uint64_t> : nullptr;
  if (name == "setp") return form.words.size() == 3 ? comparison(form.words[1], form.type()) : nullptr;
  if (name == "bra") return branch;
  if (name == "ret") return end;
  if (name == "bar") return form.has("sync") ? sync_block : nullptr;
  if (name == "barrier") return form.has("arrive") ? nothing : sync_cluster;  // the wait is all that counts
  if (name == "fence") return nothing;
  if (name == "red") return form.has("release") && form.has("add") ? add_release : nullptr;
  if (name == "mapa") return map_address;
  if (name == "mbarrier") {
    if (form.words[1] == "init") return mbarrier_init;
    if (form.words[1] == "arrive" && form.words[2] == "expect_tx") return mbarrier_arrive_expect;
    if (form.words[1] == "try_wait" && form.words[2] == "parity") return mbarrier_try_wait;
    return nullptr;
  }
  if (name == "mma") {
    if (form.has("m16n8k16") && form.has("bf16")) return mma<Bf16>;
    if (form.has("m16n8k16") && form.has("f16")) return mma<_Float16>;
    if (form.has("m16n8k8") && form.has("tf32")) return mma<Tf32>;
    return nullptr;
  }
  return arithmetic(form);
}

}  // namespace fusedrnn::cuda::host
