// The choice of the instruction set, made once at run time.
#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

namespace sefi {
namespace {

std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(&avx512_kernels);
    }
    if (avx2) found.push_back(&avx2_kernels);
#endif
    found.push_back(&generic_kernels);
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
    for (const std::string& known : instruction_sets()) wanted += (wanted.empty() ? "" : ", ") + known;
    throw std::invalid_argument("instruction set \"" + name + "\" is not available here; choose from " +
                                wanted);
}

}  // namespace sefi
