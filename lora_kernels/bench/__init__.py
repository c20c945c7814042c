"""Measuring: what LoRA costs over the frozen layer, by shape, dtype and implementation, and what the tables are made of."""
