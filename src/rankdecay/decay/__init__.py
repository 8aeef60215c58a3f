"""Decays of parameters, and how they join an optimizer."""

from rankdecay.decay.policy import Decay, Frobenius, LowRank, Planes

__all__ = ["Decay", "Frobenius", "LowRank", "Planes"]
