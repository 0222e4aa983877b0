"""Qwen3, the language model whose last hidden states are what text-conditional networks are told."""
