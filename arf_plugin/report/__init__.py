"""Reports: from runs and their measurements to one page, figures, and figures for machines.

::

    sources ──► results ──► tables, comparison ──► page.html, report.json, table.md
       │           └──────► drawing ──► panels ──► figures ──► figures/*.svg, *.png
       └─► logs, gallery, provenance ──────────────► page
"""
