"""The backends of sus_attention: the reference in plain PyTorch, the CPU kernels, the GPU kernels."""
