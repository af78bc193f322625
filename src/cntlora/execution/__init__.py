"""The executor, the passes over the data, and the way from what was read to the plan."""
