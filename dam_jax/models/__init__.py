"""Models in Flax and the names that their weights have elsewhere.

The core of dam_jax takes parameters and functions, and never imports this.
"""
