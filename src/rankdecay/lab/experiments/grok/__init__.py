"""Grokking: does low-rank decay make a scale-invariant transformer generalise, and why?"""
