"""Fused-kernel losses for distilling language models."""
