// One call of the operator as sizes, strides and raw pointers, for CPU and CUDA.
#pragma once

#include <cstdint>

namespace sefi {

// Limits of all kernels.
constexpr int64_t kMaxKeys = 256, kMaxHeadDim = 256;

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

inline int64_t item_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// A [batch, head, row, head_dim] tensor with a dense last axis; strides count elements. An absent
// tensor has a null pointer. All samples use the one entry of a shared tensor; its batch stride is
// 0.
struct View {
    char* data = nullptr;
    int64_t batch = 0, head = 0, row = 0;
    bool shared = false;

    char* at(DType dtype, int64_t b, int64_t h, int64_t n) const {
        return data + item_size(dtype) * (b * batch + h * head + n * row);
    }
};

struct Problem {
    int64_t batch = 0, heads = 0, queries = 0, keys = 0, head_dim = 0;
    DType dtype = DType::float32;
    float scale = 1.0f;
    View query, key, value, reference_key;
    // One row per sample, or one for all with batch stride 0.
    const float* token_weights = nullptr;
    int64_t token_weights_batch = 0;
    const uint8_t* key_mask = nullptr;
    int64_t key_mask_batch = 0;
    const int64_t* probs_positions = nullptr;
    int64_t probs_positions_batch = 0, probs_count = 0;
    bool probs_all_heads = false;
};

struct ForwardCall : Problem {
    View output;
    float* subject_loss = nullptr;  // [batch]
    // [batch, probs_count, queries], or [batch, heads, probs_count, queries] for all heads.
    float* attn_probs = nullptr;
};

struct BackwardCall : Problem {
    View grad_output;
    const float* grad_subject_loss = nullptr;
    const float* grad_attn_probs = nullptr;
    bool reference_grad = false;
    // Absent if the gradient is not wanted.
    View grad_query, grad_key, grad_value, grad_reference_key;

    bool with_reference() const { return reference_key.data && grad_subject_loss; }
};

// Rows to which a unit of backward work writes its part of a key-side gradient: rows of the result,
// or float32 rows of a partial sum.
struct KeyGradient {
    char* data = nullptr;
    int64_t row = 0;
    DType dtype = DType::float32;
};

struct KeyGradients {
    KeyGradient key, value, reference_key;
};

}  // namespace sefi
