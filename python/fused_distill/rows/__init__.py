"""Row arithmetic: losses, statistics and logit gradients of a chunk of logits."""
