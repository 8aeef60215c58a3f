"""Many small transformers trained as one batched computation."""
