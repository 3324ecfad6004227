"""What would run: stages as nodes, variants as chains of them, and which are in the store already."""
