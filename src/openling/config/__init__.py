"""Presets and typed settings; nothing here imports torch or the model."""
