"""Grids of arms and seeds through the real trainer (`arf ablate`).

config.py, reader.py (document.py, flags.py) -> plan.py -> grid.py: anchors.py, choose.py, schedule.py (runs.py,
launch.py, progress.py), evaluate.py -> table.py. configs/ holds the grids that come with the package.
"""
