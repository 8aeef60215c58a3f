"""What is L2 on W_Q and W_K under rotary positions? Planes fitted to a score, against a convex certificate."""
