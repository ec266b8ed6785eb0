"""Zero-shot evaluation in CLIP_benchmark's layout, and interpolation in weight space (WiSE-FT)."""
