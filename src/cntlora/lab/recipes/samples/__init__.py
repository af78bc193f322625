"""Real models and data that ship inside packages, fetched once and cached."""
