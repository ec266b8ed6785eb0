"""Runs that can be repeated, stopped and gone on with: random numbers, orders of samples, positions, checkpoints.

    rng         the generators of a process: seeded, isolated, noted and put back
    order       the seeded order of samples in a stream, begun anywhere; how far the stream is
    identity    what determines which data a run sees: compared when it goes on
    checkpoint  the file: written whole or not at all, checked field by field when it is read

What has a state tells it by ``state_dict`` and takes it by ``load_state_dict``. Nothing here knows of anchors, and the
hooks that bring it into open_clip's trainer are `arf_plugin.hooks.resume`.
"""
