"""The methods: what each reads, its equation, and how its factors are made. `family` is the table."""
