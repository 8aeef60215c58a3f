"""One attention module: its settings, parameters, heads, and where its matrices lie.

``reader`` puts them together. Each file uses those before it: ``found``, ``settings``, ``beside``, ``projections``,
``between``, ``heads``, ``windows``, ``latent``.
"""
