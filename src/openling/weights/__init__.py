"""Checkpoint folders in and out: streaming safetensors, invertible name maps, GGUF import, Hugging Face export."""
