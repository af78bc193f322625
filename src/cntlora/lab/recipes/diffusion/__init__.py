"""DreamBooth, and the small text-to-image model that it is tried on."""
