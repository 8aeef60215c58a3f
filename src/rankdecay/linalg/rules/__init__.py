r"""Decay rules, one file each: what a step of size τ makes of the singular values.

=================  ====================================================  ==================================
rule               singular value σ becomes                              near zero
=================  ====================================================  ==================================
``prox``           max(σ - τ, 0)                                         exact zeros, no overshoot
``smooth``         σ - τ σ/√(σ² + ε²), ε = max(τ, smoothing·‖W‖_F)       decays exponentially below ε
``polar``          σ - τ                                                 chatters: |σ - τ| about τ/2 for ever
``newton_schulz``  σ - τ p_k(σ/‖W‖_F), p(x) = x (3 - x²)/2               multiplicative; unstable for small W
=================  ====================================================  ==================================

To add a rule, add a file here that defines ``RULE``, a :class:`rankdecay.rules.Rule`; its name is the file's.
"""
