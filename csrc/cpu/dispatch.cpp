// Choice of the instruction set at run time.
#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(SEFI_HAVE_BF16)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sefi {
namespace {

struct InstructionSet {
    const char* name;
    const Kernels *float32, *float16, *bfloat16;
};

#if defined(SEFI_HAVE_BF16)
bool has_avx512_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}

// On Intel the dot product measured two cycles per instruction, a float32 multiply-add half a
// cycle: half the rate in total.
bool bf16_dot_is_fast() { return __builtin_cpu_is("amd"); }

// Linux permits the tile registers on request and may refuse.
bool has_amx() {
#if defined(__linux__)
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & kAmxBf16) || !(d & kAmxTile) || !has_avx512_bf16()) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

std::vector<InstructionSet> find_supported() {
    std::vector<InstructionSet> found;
    const auto add = [&](const char* name, const Kernels& all) {
        found.push_back({name, &all, &all, &all});
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        add("avx512", avx512_kernels);
#if defined(SEFI_HAVE_BF16)
        if (has_avx512_bf16()) {
            const auto place = bf16_dot_is_fast() ? found.begin() : found.end();
            found.insert(place,
                         {"avx512_bf16", &avx512_kernels, &avx512_kernels, &avx512_bf16_kernels});
        }
        if (has_amx()) {
            found.insert(found.begin(),
                         {"amx", &avx512_kernels, &amx_float16_kernels, &amx_kernels});
        }
#endif
    }
    if (avx2) add("avx2", avx2_kernels);
#endif
    add("generic", generic_kernels);
    return found;
}

// CPUID is slow on a virtual machine.
const std::vector<InstructionSet>& supported() {
    static const std::vector<InstructionSet> found = find_supported();
    return found;
}

std::atomic<const InstructionSet*>& chosen() {
    static std::atomic<const InstructionSet*> choice{supported().data()};
    return choice;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet& isa : supported()) names.emplace_back(isa.name);
    return names;
}

std::string instruction_set() { return chosen().load()->name; }

const Kernels& kernels(DType dtype) {
    const InstructionSet& isa = *chosen().load();
    return *(dtype == DType::float32   ? isa.float32
             : dtype == DType::float16 ? isa.float16
                                       : isa.bfloat16);
}

void set_instruction_set(const std::string& name) {
    std::string known;
    for (const InstructionSet& isa : supported()) {
        if (name == isa.name) return chosen().store(&isa);
        known += (known.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw std::invalid_argument("instruction set \"" + name +
                                "\" is not available here; choose from " + known);
}

}  // namespace sefi
