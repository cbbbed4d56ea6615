"""Subject-driven generation: SDXL learns one subject from a few photographs (DreamBooth), and draws it as prompted."""
