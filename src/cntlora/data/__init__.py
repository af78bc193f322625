"""Batches, token masks by stream, the hooks that read inputs, gradients of the loss, and the memory they may take."""
