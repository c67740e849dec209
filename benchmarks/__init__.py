"""Questions about speed and memory, answered with numbers; docs/performance.md says how to read them."""
