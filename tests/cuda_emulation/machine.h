// One block of threads at a time on the host: fibers, barriers, warp collectives, shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

struct Index {
    unsigned x = 1, y = 1, z = 1;
    Index(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

const Index& thread_index();
const Index& block_index();
const Index& grid_size();

void block_barrier();
void warp_pair_barrier();  // of two adjacent warps, the first of them even
void warp_barrier();
float shuffle_xor(uint32_t mask, float value, int distance);

// Dynamic shared memory of the running block; addresses are offsets into it.
char* shared_memory();
uint32_t shared_offset(const void* pointer);
// Return the host address. An access that is unaligned or outside ends the launch with an error.
char* shared_at(uint32_t offset, size_t bytes);

// An operation of all 32 lanes of a warp; the last lane to arrive computes it for all. Lanes that
// call different operations end the launch with an error.
constexpr int kLanes = 32, kWords = 12;
struct Lane {
    uint32_t in[kWords], out[kWords];
};
using Collective = void (*)(Lane* lanes);
Lane& my_lane();
void collective(Collective operation);

// Asynchronous copies of 16 bytes; fewer bytes are padded with zeros.
void cp_async(uint32_t to, const void* from, int bytes);
void cp_async_commit();
void cp_async_wait(int but);

bool allow_shared(const void* kernel, size_t bytes);
bool launch(const void* kernel, Index grid, int threads, size_t shared,
            const std::function<void()>& body);
const char* last_error();

// Set the order in which ready threads run, and whether copies arrive at once or as late as
// possible.
void set_schedule(uint32_t seed, bool late_copies);
// Dynamic shared memory per block of the emulated device.
void set_shared_limit(size_t bytes);
size_t shared_limit();

}  // namespace emulation
