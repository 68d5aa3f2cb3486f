"""Collaborative decoding: who writes the next token, and how both models keep up."""
