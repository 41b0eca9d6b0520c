"""LLaDA-MoE in JAX: masked-diffusion language models with a mixture of experts."""
