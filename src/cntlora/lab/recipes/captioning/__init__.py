"""Captions by vision-language models, and the small one that it is tried on."""
