"""Frozen networks of others that training looks through: the teacher of representation alignment."""
