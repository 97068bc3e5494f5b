// The scheduler of the emulated blocks and the state of their threads.
#include "machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStack = 128 * 1024, kRedZone = 1024, kFreeShared = 48 * 1024;
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point format

struct Copy {
    uint32_t to;
    const void* from;
    int bytes;
};

struct Meeting {
    std::vector<int> waiting;
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};
    jmp_buf state;
    ucontext_t entry;
    bool started = false, finished = false;
    Index index;
    std::vector<Copy> open;                  // not committed yet
    std::vector<std::vector<Copy>> pending;  // committed groups, oldest first
};

struct Warp {
    Meeting meeting;
    Collective operation = nullptr;
    Lane lanes[kLanes];
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Meeting block;
    std::vector<Meeting> pairs;
    std::vector<int> ready;
    int threads = 0, current = -1;
    Index block_at, grid;
    std::vector<char> memory;
    size_t shared = 0;
    jmp_buf scheduler;
    const std::function<void()>* body = nullptr;
    std::string error = "no error";
    std::mt19937 random{0};
    int fast_warp = 0;  // runs ahead of the others
    bool late_copies = true;
    size_t shared_limit = 227 * 1024;
    std::map<const void*, size_t> allowed;

    Fiber& fiber() { return fibers[size_t(current)]; }
    Warp& warp() { return warps[size_t(current / kLanes)]; }
    char* shared_begin() { return memory.data() + kRedZone; }
};

Machine machine;

[[noreturn]] void fail(const std::string& what) {
    char where[96];
    std::snprintf(where, sizeof where, " (block %u, %u, %u; thread %d)", machine.block_at.x,
                  machine.block_at.y, machine.block_at.z, machine.current);
    machine.error = what + where;
    _longjmp(machine.scheduler, 2);
}

void wait() {
    if (_setjmp(machine.fiber().state) == 0) _longjmp(machine.scheduler, 1);
}

// Wait until `count` threads have arrived; the last one runs `complete` before any continues.
template <class Complete>
void meet(Meeting& meeting, size_t count, const Complete& complete) {
    if (meeting.waiting.size() + 1 < count) {
        meeting.waiting.push_back(machine.current);
        wait();
        return;
    }
    complete();
    machine.ready.insert(machine.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
}

void land(const Copy& copy) {
    char* to = shared_at(copy.to, 16);
    std::memset(to, 0, 16);
    if (copy.bytes) std::memcpy(to, copy.from, size_t(copy.bytes));
}

void run_fiber() {
    (*machine.body)();
    for (const auto& group : machine.fiber().pending) {
        if (!group.empty()) fail("a thread ended with pending copies");
    }
    machine.fiber().finished = true;
    _longjmp(machine.scheduler, 1);
}

void enter(Fiber& fiber) {
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, run_fiber, 0);
    setcontext(&fiber.entry);
}

// Index in `ready` of the thread that runs next. For thousands of steps one warp runs ahead of the
// others, then another: at equal speed, no warp would arrive early at a missing barrier.
size_t pick_thread() {
    constexpr int kSteps = 8192, kTries = 8;
    if (machine.random() % kSteps == 0) {
        machine.fast_warp = int(machine.random() % machine.warps.size());
    }
    size_t place = 0;
    for (int i = 0; i < kTries; ++i) {
        place = machine.random() % machine.ready.size();
        if (machine.ready[place] / kLanes == machine.fast_warp) break;
    }
    return place;
}

bool red_zones_intact() {
    for (size_t i = 0; i < kRedZone; ++i) {
        if (static_cast<unsigned char>(machine.memory[i]) != kPoison) return false;
        const char after = machine.memory[kRedZone + machine.shared + i];
        if (static_cast<unsigned char>(after) != kPoison) return false;
    }
    return true;
}

bool run_block() {
    std::memset(machine.memory.data(), kPoison, machine.memory.size());
    machine.block.waiting.clear();
    machine.ready.clear();
    machine.fast_warp %= int(machine.warps.size());
    for (Warp& warp : machine.warps) warp.meeting.waiting.clear();
    for (Meeting& pair : machine.pairs) pair.waiting.clear();
    for (int t = 0; t < machine.threads; ++t) {
        Fiber& fiber = machine.fibers[size_t(t)];
        fiber.started = fiber.finished = false;
        fiber.index = Index(unsigned(t), 0, 0);
        fiber.open.clear();
        fiber.pending.clear();
        machine.ready.push_back(t);
    }
    if (_setjmp(machine.scheduler) == 2) return false;
    if (!machine.ready.empty()) {
        const size_t pick = pick_thread();
        machine.current = machine.ready[pick];
        machine.ready[pick] = machine.ready.back();
        machine.ready.pop_back();
        enter(machine.fiber());
    }
    for (int t = 0; t < machine.threads; ++t) {
        if (machine.fibers[size_t(t)].finished) continue;
        machine.error = "some threads wait at a barrier that others never reach";
        return false;
    }
    if (!red_zones_intact()) {
        machine.error = "a block wrote outside its shared memory";
        return false;
    }
    return true;
}

}  // namespace

const Index& thread_index() { return machine.fiber().index; }
const Index& block_index() { return machine.block_at; }
const Index& grid_size() { return machine.grid; }

void block_barrier() {
    meet(machine.block, size_t(machine.threads), [] {});
}

void warp_pair_barrier() {
    const size_t pair = size_t(machine.current / (2 * kLanes));
    if (pair >= machine.pairs.size()) fail("a single warp waits at the barrier of a pair");
    meet(machine.pairs[pair], 2 * kLanes, [] {});
}

Lane& my_lane() { return machine.warp().lanes[machine.current % kLanes]; }

void collective(Collective operation) {
    Warp& warp = machine.warp();
    if (warp.meeting.waiting.empty()) warp.operation = operation;
    if (warp.operation != operation) fail("lanes of one warp call different operations");
    meet(warp.meeting, kLanes, [&] { operation(warp.lanes); });
}

void warp_barrier() {
    collective([](Lane*) {});
}

float shuffle_xor(uint32_t mask, float value, int distance) {
    if (mask != ~0u) fail("a shuffle of part of a warp");
    Lane& lane = my_lane();
    std::memcpy(lane.in, &value, 4);
    lane.in[1] = uint32_t(distance);
    collective([](Lane* lanes) {
        for (uint32_t i = 0; i < kLanes; ++i) lanes[i].out[0] = lanes[i ^ lanes[i].in[1]].in[0];
    });
    std::memcpy(&value, lane.out, 4);
    return value;
}

char* shared_memory() { return machine.shared_begin(); }

uint32_t shared_offset(const void* pointer) {
    return uint32_t(static_cast<const char*>(pointer) - machine.shared_begin());
}

char* shared_at(uint32_t offset, size_t bytes) {
    if (offset % 16) fail("a shared address is not a multiple of 16 bytes");
    if (size_t(offset) + bytes > machine.shared) fail("a shared address lies outside");
    return machine.shared_begin() + offset;
}

void cp_async(uint32_t to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("a copy's source is not 16-byte aligned");
    shared_at(to, 16);
    const Copy copy{to, from, bytes};
    if (machine.late_copies) {
        machine.fiber().open.push_back(copy);
    } else {
        land(copy);
    }
}

void cp_async_commit() {
    Fiber& fiber = machine.fiber();
    fiber.pending.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void cp_async_wait(int but) {
    auto& pending = machine.fiber().pending;
    while (pending.size() > size_t(but)) {
        for (const Copy& copy : pending.front()) land(copy);
        pending.erase(pending.begin());
    }
}

bool allow_shared(const void* kernel, size_t bytes) {
    if (bytes > machine.shared_limit) {
        machine.error = "more shared memory than the device has per block";
        return false;
    }
    machine.allowed[kernel] = bytes;
    return true;
}

bool launch(const void* kernel, Index grid, int threads, size_t shared,
            const std::function<void()>& body) {
    const auto allowed = machine.allowed.find(kernel);
    if (shared > (allowed == machine.allowed.end() ? kFreeShared : allowed->second)) {
        machine.error = "more shared memory than the kernel was allowed";
        return false;
    }
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || threads % kLanes ||
        threads < 1 || threads > 1024) {
        machine.error = "a grid or block of an invalid size";
        return false;
    }
    machine.grid = grid;
    machine.threads = threads;
    machine.shared = shared;
    machine.memory.resize(shared + 2 * kRedZone);
    machine.body = &body;
    if (machine.fibers.size() < size_t(threads)) machine.fibers.resize(size_t(threads));
    machine.warps.resize(size_t(threads / kLanes));
    machine.pairs.resize(machine.warps.size() / 2);
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                machine.block_at = Index(x, y, z);
                if (!run_block()) return false;
            }
        }
    }
    return true;
}

const char* last_error() { return machine.error.c_str(); }

void set_schedule(uint32_t seed, bool late_copies) {
    machine.random.seed(seed);
    machine.late_copies = late_copies;
}

void set_shared_limit(size_t bytes) { machine.shared_limit = bytes; }

size_t shared_limit() { return machine.shared_limit; }

}  // namespace emulation
