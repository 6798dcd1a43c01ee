"""Vocabulary-parallel LM heads and FSDP2 parameters."""
