"""Grids of arms and seeds through the real trainer (`arf ablate`).

config.py, reader.py -> plan.py -> grid.py: anchors.py, choose.py, runs.py (launch.py) -> table.py. configs/ holds the
grids that come with the package.
"""
