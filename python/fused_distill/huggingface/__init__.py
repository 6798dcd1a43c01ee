"""Reading transformers models: the LM head, dtypes and tokenizers."""
