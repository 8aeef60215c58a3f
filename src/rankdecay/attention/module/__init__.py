"""One attention module: its settings, parameters, heads, and where its matrices lie.

``reader`` puts them together. What each file knows stands on the ones before it: ``settings``, ``projections``,
``between``, ``heads``, ``windows``, ``latent``.
"""
