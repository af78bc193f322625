"""Experiments: arms × learning rates × seeds on a task, one JSON record a run. `cntlora run` and `compare` stand on it.

The way of the data: experiment file → `settings` → runs (`plan`) → `sweep` (processes) → `run` (one model trained) →
records → `cntlora.report`. `arms` is the table of methods, `tasks` the table of tasks: a new one is one row.
"""
