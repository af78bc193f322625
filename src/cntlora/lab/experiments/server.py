"""Imported first by the process that runs are forked from: what it imports after this says no more than it must."""

from ...messages import quiet_libraries

quiet_libraries()
