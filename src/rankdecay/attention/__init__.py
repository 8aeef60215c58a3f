"""Where W_Q, W_K, W_V and W_O are in a model."""

from rankdecay.attention.layer import AttentionLayer, MatrixView, Window
from rankdecay.attention.locate import find_attention
from rankdecay.attention.names import AttentionNames

__all__ = ["AttentionLayer", "AttentionNames", "MatrixView", "Window", "find_attention"]
