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

std::vector<const Kernels*> find_supported() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if defined(SEFI_HAVE_BF16)
        if (has_amx()) found.push_back(&amx_kernels);
        const bool bf16 = has_avx512_bf16(), first = bf16_dot_is_fast();
        if (bf16 && first) found.push_back(&avx512_bf16_kernels);
        found.push_back(&avx512_kernels);
        if (bf16 && !first) found.push_back(&avx512_bf16_kernels);
#else
        found.push_back(&avx512_kernels);
#endif
    }
    if (avx2) found.push_back(&avx2_kernels);
#endif
    found.push_back(&generic_kernels);
    return found;
}

// CPUID is slow on a virtual machine.
const std::vector<const Kernels*>& supported() {
    static const std::vector<const Kernels*> found = find_supported();
    return found;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> choice{supported().front()};
    return choice;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* entry : supported()) names.emplace_back(entry->name);
    return names;
}

const Kernels& kernels() { return *chosen().load(); }

void set_instruction_set(const std::string& name) {
    for (const Kernels* entry : supported()) {
        if (name == entry->name) {
            chosen().store(entry);
            return;
        }
    }
    std::string wanted;
    for (const std::string& known : instruction_sets())
        wanted += (wanted.empty() ? "" : ", ") + known;
    throw std::invalid_argument("instruction set \"" + name +
                                "\" is not available here; choose from " + wanted);
}

}  // namespace sefi
