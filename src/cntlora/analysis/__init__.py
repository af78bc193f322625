"""What an adapter is and does: comparison of adapters, and diagnostics of a start."""
