"""The demo's graph of the world: sources, facts, texts, pictures and the split, one module each."""
