"""What is decayed and by which rule."""

from rankdecay.decay.policy import Decay, Frobenius, LowRank

__all__ = ["Decay", "Frobenius", "LowRank"]
