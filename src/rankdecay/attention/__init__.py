"""Location of W_Q, W_K, W_V and W_O in a model or a checkpoint."""

from rankdecay.attention.layer import AttentionLayer, MatrixView, Window
from rankdecay.attention.locate import find_attention
from rankdecay.attention.names import AttentionNames

__all__ = ["AttentionLayer", "AttentionNames", "MatrixView", "Window", "find_attention"]
