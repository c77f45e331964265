"""Studies that end in a table and a report: what pruning does to a network, from its first weight to its last."""
