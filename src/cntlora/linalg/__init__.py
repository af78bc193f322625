"""Tensors only, no model in sight: moments of the inputs, pseudo-inverses, truncated SVD, factors, shared-out ranks.

Notation is that of `docs/math.md`: W (k, d), X (d, b), G = X Xᵀ.
"""
