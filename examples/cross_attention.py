"""Train a query towards a reference map with the fused cross-attention, without storing a map."""

from __future__ import annotations

import torch

from sefi_fast import available_backends, fused_cross_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator(device).manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=device)


query = normal(1, 8, 1024, 40).requires_grad_()  # [B, H, N, D]
key, value, reference_key = (normal(1, 8, 77, 40) for _ in range(3))  # [B, H, M, D]
optimizer = torch.optim.Adam([query], lr=0.1)

print("backends:", ", ".join(available_backends()))
for step in range(20):
    out = fused_cross_attention(query, key, value, reference_key=reference_key, reference_grad=True)
    loss = out.subject_loss.mean()  # equation 5: distance of the map to the reference map
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 4:
        print(f"step {step + 1}: subject loss {loss.item():.3f}")
