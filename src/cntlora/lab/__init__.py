"""The laboratory: recipes (tasks and training), experiments (runs → records), report (records → tables and pages).

The commands import it; the library never does.
"""
