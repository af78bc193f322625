"""From what was read to the plan, in one process, in several passes, or in several processes."""
