"""The engine and its OpenAI-compatible server."""
