"""Structured channel pruning for JAX: a smaller Flax model from a trained one."""
