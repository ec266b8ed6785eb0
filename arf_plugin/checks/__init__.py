"""What is known before the first step is checked before the first step: one set of rules, and two that report them.

``arf check`` collects all findings (:mod:`arf_plugin.checks.report`); the trainer stops at the first error and logs
the rest (:mod:`arf_plugin.data.startup`).
"""
