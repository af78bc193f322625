"""The mathematics: pure functions on tensors, torch only, no model in sight.

`moments` streams the inputs of one batch, `constraints` turns them into the estimate of a mode, `solve` averages the
estimates over batches, `factor` splits the result into LoRA factors, `allocate` shares out the rank budget, and
`family` is the table of methods. Notation is that of `docs/math.md`: W (k, d), X (d, b), G = X Xᵀ.
"""
