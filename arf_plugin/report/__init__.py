"""Reports: from runs and their measurements to one page, plots, and scores for machines.

::

    sources ──► scores ──► tables ──► answer ──► output: index.html, report.json, table.md
       │           └─────────┴──► plots (style) ──► render: figures/*.svg, *.png
       └─► logs, gallery (images), provenance ────► output

report.py gathers all of it.
"""
