"""Loss terms of ARF, built from open_clip's own losses, and those of the baselines."""
