"""From names to models: the catalog, loading, and the caches of converted weights."""
