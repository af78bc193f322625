"""Sites, layer layouts, W wherever it lies (quantised, offloaded, FSDP2, ZeRO-3, files), and the one writer."""
