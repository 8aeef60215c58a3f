"""A model with a smaller head and KV cache, written as an ordinary checkpoint of its own class."""

from rankdecay.compress.compression import compress, plan
from rankdecay.compress.reduction import NotReducible
from rankdecay.compress.result import Compression, Size

__all__ = ["Compression", "NotReducible", "Size", "compress", "plan"]
