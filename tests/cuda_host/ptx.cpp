#include "ptx.h"

#include <dlfcn.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "ptx_opcodes.h"

namespace fusedrnn::cuda::host {
namespace {

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n'; }
std::string_view trimmed(std::string_view s) {
  while (!s.empty() && is_space(s.front())) s.remove_prefix(1);
  while (!s.empty() && is_space(s.back())) s.remove_suffix(1);
  return s;
}
std::vector<std::string_view> separated(std::string_view s, char by) {
  std::vector<std::string_view> parts;
  for (size_t from = 0; from <= s.size();) {
    const size_t to = std::min(s.find(by, from), s.size());
    parts.push_back(trimmed(s.substr(from, to - from)));
    from = to + 1;
  }
  return parts;
}

// What stands outside the kernels: their text and the module's variables.
struct Module {
  std::map<std::string, PtxKernel, std::less<>> kernels;
  std::map<std::string, std::unique_ptr<unsigned char[]>, std::less<>> variables;
  std::set<std::string, std::less<>> shared;
} loaded;

class Decoder {
 public:
  explicit Decoder(PtxKernel& kernel) : kernel_(kernel) {
    for (size_t i = 0; i < special_registers.size(); ++i) scopes_[0].names[special_registers[i]] = int(i);
    std::string_view rest = kernel.body;
    while (!(rest = trimmed(rest)).empty()) rest.remove_prefix(statement(rest));
    for (const auto& [instruction, scope, label] : branches_) kernel.code[instruction].target = place_of(scope, label);
  }

 private:
  struct Scope {
    size_t outer;
    std::map<std::string_view, int> names;
    std::map<std::string_view, size_t> labels;
  };
  struct Branch {
    size_t instruction, scope;
    std::string_view label;
  };

  // Its length.
  size_t statement(std::string_view s) {
    if (s[0] == '{') {
      scopes_.push_back({scope_, {}, {}}), scope_ = scopes_.size() - 1;
      return 1;
    }
    if (s[0] == '}') {
      scope_ = scopes_[scope_].outer;
      return 1;
    }
    const size_t end = s.find(';'), colon = s.find_first_of(":;[ \t");
    if (end == s.npos) fail_at(s, "PTX without an end");
    if (colon < end && s[colon] == ':' && s.substr(colon, 2) != "::") {
      scopes_[scope_].labels[s.substr(0, colon)] = kernel_.code.size();
      return colon + 1;
    }
    if (s.starts_with(".reg"))
      registers(trimmed(s.substr(4, end - 4)));
    else if (!s.starts_with(".pragma"))
      instruction(trimmed(s.substr(0, end)));
    return end + 1;
  }

  // ".b32 %r<100>" or ".pred there"
  void registers(std::string_view s) {
    const std::string_view name = trimmed(s.substr(s.find_first_of(" \t")));
    const size_t many = name.find('<');
    if (many == name.npos) {
      scopes_[scope_].names[name] = kernel_.registers++;
      return;
    }
    const int count = std::atoi(std::string(name.substr(many + 1)).c_str());
    for (int i = 0; i < count; ++i) {
      names_.push_back(std::make_unique<std::string>(std::string(name.substr(0, many)) + std::to_string(i)));
      scopes_[scope_].names[*names_.back()] = kernel_.registers++;
    }
  }

  void instruction(std::string_view s) {
    Instruction i;
    i.text = s;
    if (s[0] == '@') {
      const size_t space = s.find_first_of(" \t");
      i.unless = s[1] == '!';
      i.guard = operand(s.substr(i.unless ? 2 : 1, space - (i.unless ? 2 : 1)));
      s = trimmed(s.substr(space));
    }
    const size_t space = std::min(s.find_first_of(" \t"), s.size());
    Form form;
    for (const std::string_view word : separated(s.substr(0, space), '.'))
      for (const std::string_view part : separated(word, ':'))
        if (!part.empty()) form.words.push_back(part);
    const std::string_view operands = trimmed(s.substr(space));
    if (form.words[0] == "bra") {
      branches_.push_back({kernel_.code.size(), scope_, operands});
    } else {
      size_t at = 0;
      for (size_t from = 0; from < operands.size();) {
        const bool is_vector = operands[from] == '{';
        const size_t to = std::min(operands.find(is_vector ? '}' : ',', from), operands.size());
        const auto group = separated(operands.substr(from + is_vector, to - from - is_vector), ',');
        for (const std::string_view name : group) {
          if (at == i.at.size()) fail_at(i.text, "too many operands");
          i.at[at++] = name[0] == '[' ? address(name, i) : operand(name);
        }
        form.groups.push_back(int(group.size()));
        i.count = std::max(i.count, int(group.size()));
        const size_t comma = operands.find(',', to);
        from = comma == operands.npos ? operands.size() : operands.find_first_not_of(" \t\n", comma + 1);
      }
      const bool is_counter = form.words[0] == "mbarrier";
      i.bytes = is_counter ? int(sizeof(Mbarrier)) : (bits_of(form.type()) + 7) / 8;
    }
    i.execute = decode(form);
    if (!i.execute) fail_at(i.text, "this interpreter does not know the instruction");
    kernel_.code.push_back(i);
  }

  // "[%rd1+8]"
  int address(std::string_view s, Instruction& i) {
    s = trimmed(s.substr(1, s.find(']') - 1));
    const size_t plus = s.find('+');
    if (plus != s.npos) i.offset = std::atoll(std::string(s.substr(plus + 1)).c_str());
    return operand(trimmed(s.substr(0, plus)));
  }

  int operand(std::string_view s) {
    for (size_t scope = scope_;; scope = scopes_[scope].outer) {
      const auto found = scopes_[scope].names.find(s);
      if (found != scopes_[scope].names.end()) return found->second;
      if (scope == 0) break;
    }
    if (s == "_") return kernel_.registers++;
    if (s.find("_param_") != s.npos) return constant(0);
    if (loaded.shared.contains(s)) return shared_register;
    if (const auto found = loaded.variables.find(s); found != loaded.variables.end())
      return constant(reinterpret_cast<uint64_t>(found->second.get()));
    const std::string text(s);
    if (s.starts_with("0f") || s.starts_with("0d")) return constant(std::stoull(text.substr(2), nullptr, 16));
    if (s[0] == '-' || (s[0] >= '0' && s[0] <= '9'))
      return constant(s[0] == '-' ? uint64_t(std::stoll(text)) : std::stoull(text, nullptr, 0));
    fail_at(s, "this interpreter does not know the operand");
  }

  int constant(uint64_t bits) {
    kernel_.constants.push_back(bits);
    return ~int(kernel_.constants.size() - 1);
  }

  size_t place_of(size_t scope, std::string_view label) const {
    for (;; scope = scopes_[scope].outer) {
      const auto found = scopes_[scope].labels.find(label);
      if (found != scopes_[scope].labels.end()) return found->second;
      if (scope == 0) fail_at(label, "no such label");
    }
  }

  PtxKernel& kernel_;
  std::vector<Scope> scopes_{{0, {}, {}}};
  size_t scope_ = 0;
  std::vector<Branch> branches_;
  std::vector<std::unique_ptr<std::string>> names_;
};

// ".global .align 16 .b8 name[16];" and ".extern .shared .align 32 .b8 name[];", the only forms.
void declare(std::string_view line) {
  const size_t open = line.find('['), space = line.find_last_of(" \t", open);
  if (open == line.npos) return;
  const std::string name(line.substr(space + 1, open - space - 1));
  if (line.find(".shared") != line.npos)
    loaded.shared.insert(name);
  else if (line.starts_with(".global") && line.find('=') == line.npos)
    loaded.variables[name] = std::make_unique<unsigned char[]>(size_t(std::atoi(line.data() + open + 1)));
}

void load_ptx(const char* path) {
  std::ifstream file(path);
  if (!file) fail_at(path, "no such file");
  PtxKernel* kernel = nullptr;
  bool in_body = false;
  for (std::string line; std::getline(file, line);) {
    line.resize(std::min(line.find("//"), line.size()));
    if (in_body) {
      if (line == "}")
        in_body = false;
      else
        kernel->body += line + "\n";
    } else if (const size_t entry = line.find(".entry "); entry != line.npos) {
      const size_t name = entry + 7;
      kernel = &(loaded.kernels[line.substr(name, line.find('(') - name)] = {});
    } else if (line.find("_param_") != line.npos) {
      kernel->param_bytes = size_t(std::atoi(line.c_str() + line.rfind('[') + 1));
    } else if (line == "{") {
      in_body = true;
    } else {
      declare(line);
    }
  }
}

}  // namespace

const PtxKernel* find_ptx(const void* function) {
  if (loaded.kernels.empty()) return nullptr;
  Dl_info info{};
  if (!dladdr(function, &info) || !info.dli_sname || info.dli_saddr != function) fail("a kernel without a name");
  const auto found = loaded.kernels.find(std::string_view(info.dli_sname));
  if (found == loaded.kernels.end()) fail_at(info.dli_sname, "not in the PTX");
  PtxKernel& kernel = found->second;
  if (kernel.code.empty()) Decoder{kernel};
  return &kernel;
}

void run_ptx(const PtxKernel& kernel, const void* params) {
  const Block& block = *self().block;
  static std::vector<std::vector<uint64_t>> unused;  // threads come and go, their memory stays
  Thread t{kernel, static_cast<const unsigned char*>(params), {}};
  if (!unused.empty()) t.registers.swap(unused.back()), unused.pop_back();
  t.registers.assign(size_t(kernel.registers), 0xffffffffffffffff);
  const std::array<uint32_t, special_registers.size()> special = {uint32_t(self().thread),
                                                                  uint32_t(block.threads),
                                                                  block.index.x,
                                                                  block.index.y,
                                                                  block.index.z,
                                                                  block.grid.x,
                                                                  block.grid.y,
                                                                  block.grid.z,
                                                                  shared_base(rank_of(block))};
  for (size_t i = 0; i < special.size(); ++i) t.registers[i] = special[i];
  t.until_pass = 1 + unsigned(any(256));
  while (!t.ended) {
    const Instruction& i = kernel.code[t.next++];
    if (i.guard == Instruction::no_guard || t.predicate(i.guard) != i.unless) i.execute(t, i);
  }
  unused.push_back(std::move(t.registers));
}

}  // namespace fusedrnn::cuda::host

// For the tests: from now on, kernels run as nvcc compiled them.
extern "C" void fusedrnn_cuda_host_load_ptx(const char* path) { fusedrnn::cuda::host::load_ptx(path); }
